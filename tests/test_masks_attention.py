"""Masks are the matrices the chapter draws; the two forms of attention agree and never give NaN."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from minillm import masked_attention, sdpa_attention
from minillm.attention import masks
from minillm.attention.attention import attention_weights
from minillm.errors import MaskError

KERNELS = [masked_attention, sdpa_attention]
windows = st.one_of(st.none(), st.integers(1, 12))


def grid(mask: torch.Tensor) -> list[str]:
    """One string a row, x = may look."""
    return ["".join("x" if entry else "." for entry in row) for row in mask.tolist()]


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "rows"),
    [
        (masks.causal(1), ["x"]),
        (masks.causal(4), ["x...", "xx..", "xxx.", "xxxx"]),
        (masks.causal(4, window=1), ["x...", ".x..", "..x.", "...x"]),
        (masks.causal(5, window=2), ["x....", "xx...", ".xx..", "..xx.", "...xx"]),
        (masks.rectangular(3, 7), ["xxxxx..", "xxxxxx.", "xxxxxxx"]),  # the chapter's second chunk: t4..t6 of 7
        (masks.rectangular(1, 4), ["xxxx"]),  # a decode step
        (masks.rectangular(2, 4, window=2), [".xx.", "..xx"]),
        (masks.left_padded(2, 4), ["....", "....", "..x.", "..xx"]),
        (masks.padded(2, 3, 3, 5), [".....", "xx...", "xxx.."]),
        (masks.block_diagonal([3, 2]), ["x....", "xx...", "xxx..", "...x.", "...xx"]),
        (masks.block_diagonal([2, 2], window=1), ["x...", ".x..", "..x.", "...x"]),
    ],
)
def test_mask_is_exactly_this_matrix(mask, rows):
    assert mask.dtype == torch.bool
    assert grid(mask) == rows


def test_masks_of_nothing_are_empty():
    assert masks.causal(0).shape == (0, 0)
    assert masks.rectangular(0, 3).shape == (0, 3)


@given(num_keys=st.integers(0, 12), data=st.data(), window=windows)
def test_a_chunks_mask_is_the_last_rows_of_the_whole_causal_mask(num_keys, data, window):
    num_queries = data.draw(st.integers(0, num_keys))
    whole = masks.causal(num_keys, window=window)
    assert torch.equal(masks.rectangular(num_queries, num_keys, window=window), whole[num_keys - num_queries :])


@given(n=st.integers(1, 12), window=windows)
def test_every_token_sees_itself_and_at_most_a_window_of_the_past(n, window):
    for row, looks in enumerate(masks.causal(n, window=window).tolist()):
        seen = [column for column, may_look in enumerate(looks) if may_look]
        assert seen == list(range(max(0, row + 1 - (window or n)), row + 1))


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), window=windows)
def test_block_diagonal_lets_each_prompt_see_itself_alone(lengths, window):
    mask, start = masks.block_diagonal(lengths, window=window), 0
    for length in lengths:
        rows = mask[start : start + length]
        assert torch.equal(rows[:, start : start + length], masks.causal(length, window=window))
        assert rows.sum() == masks.causal(length, window=window).sum(), "a token of another prompt is seen"
        start += length
    assert mask.shape == (start, start)


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (lambda: masks.rectangular(4, 3), ["4", "3"]),
        (lambda: masks.rectangular(-1, 3), ["-1", "0"]),
        (lambda: masks.causal(-2), ["-2"]),
        (lambda: masks.causal(3, window=0), ["0", "1"]),
        (lambda: masks.causal(3, window=-1), ["-1", "1"]),
        (lambda: masks.padded(3, 3, 2, 5), ["3", "2"]),
        (lambda: masks.left_padded(3, 2), ["3", "2"]),
        (lambda: masks.block_diagonal([2, -1]), ["-1"]),
    ],
)
def test_impossible_masks_are_refused_with_their_numbers(make, numbers):
    with pytest.raises(MaskError) as error:
        make()
    for number in numbers:
        assert number in str(error.value)


# --- attention -------------------------------------------------------------------------------------------------------


def random_qkv(num_queries, num_keys, num_heads, num_kv_heads, head_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (num_queries, num_heads), (num_keys, num_kv_heads), (num_keys, num_kv_heads)
    return [torch.randn(*size, head_dim, generator=generator, dtype=torch.float64) for size in sizes]


def attention_in_loops(q, k, v, mask):
    """softmax(q . k / sqrt(d)) v, one query and head at a time: the definition, as slow and plain as it can be."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        seen = [j for j in range(k.shape[0]) if mask[i, j]]
        for head in range(q.shape[1]) if seen else ():
            kv_head = head // group
            scores = [math.exp(float(q[i, head] @ k[j, kv_head]) / math.sqrt(q.shape[2])) for j in seen]
            for j, score in zip(seen, scores, strict=True):
                out[i, head] += score / sum(scores) * v[j, kv_head]
    return out


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1)])
def test_both_forms_are_the_definition(kernel, num_heads, num_kv_heads):
    q, k, v = random_qkv(3, 5, num_heads, num_kv_heads)
    mask = masks.rectangular(3, 5)
    assert (kernel(q, k, v, mask) - attention_in_loops(q, k, v, mask)).abs().max() <= 1e-12


@given(
    num_queries=st.integers(1, 6),
    num_keys=st.integers(1, 9),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_both_forms_agree_under_any_mask_and_grouping(num_queries, num_keys, num_kv_heads, group, seed):
    q, k, v = random_qkv(num_queries, num_keys, num_kv_heads * group, num_kv_heads, seed=seed)
    mask = torch.rand(num_queries, num_keys, generator=torch.Generator().manual_seed(seed)) < 0.5  # empty rows too
    plain, fast = (kernel(q, k, v, mask) for kernel in KERNELS)
    assert plain.shape == q.shape
    assert (plain - fast).abs().max() <= 1e-12
    weights = attention_weights(q, k, mask)
    assert torch.allclose(weights.sum(-1), mask.any(-1).double().expand(weights.shape[:2]), atol=1e-12)
    assert (weights[:, ~mask] == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_gets_zeros(kernel, dtype):
    q, k, v = (x.to(dtype) for x in random_qkv(3, 3, 4, 2))
    mask = masks.causal(3)
    mask[1] = False
    out = kernel(q, k, v, mask)
    assert (out[1] == 0).all()
    assert (out[[0, 2]] != 0).all()
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_hidden_keys_have_no_influence(kernel):
    q, k, v = random_qkv(2, 6, 4, 2)
    mask = masks.rectangular(2, 6, window=3)
    before = kernel(q, k, v, mask)
    k[:2], v[:2] = 1e3, -1e3  # outside both windows
    assert torch.equal(kernel(q, k, v, mask), before)
    k[5] = 0  # seen by the last query only
    assert not torch.equal(kernel(q, k, v, mask)[1], before[1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_batch_of_rows_is_attended_to_row_by_row(kernel):
    rows = [random_qkv(2, 5, 4, 2, seed=seed) for seed in (1, 2, 3)]
    row_masks = [masks.padded(2, length, 2, 5) for length in (2, 4, 5)]
    q, k, v = (torch.stack(x) for x in zip(*rows, strict=True))
    together = kernel(q, k, v, torch.stack(row_masks))
    alone = torch.stack([kernel(*row, mask) for row, mask in zip(rows, row_masks, strict=True)])
    assert (together - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("rows", [(), (3,)], ids=["one sequence", "a batch"])
def test_the_fast_form_really_runs_the_fused_kernel(rows):
    """torch falls back to separate products in silence, twice as slow, for a mask of three dimensions."""
    q, k, v = (x.expand(*rows, *x.shape) for x in random_qkv(2, 5, 4, 2))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error if torch would have to use another
        sdpa_attention(q, k, v, masks.rectangular(2, 5).expand(*rows, 2, 5))
