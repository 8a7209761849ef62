"""Requests whose keys and values lie in a paged pool, and what attention over them must give, in float64.

Whatever a kernel must not read is NaN: free blocks, ends of blocks, what block tables point at behind a request's own
blocks, and the output before the call. `kernels` is any module with decode, prefill and store_kv.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# In units of values drawn from N(0, 1): 2 to 3 roundings of an output near 1, weights being rounded too.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NULL, POISON = 0, 1  # blocks of NaN: the null block, and what is behind a request's own blocks in its table


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    """What torch.empty hands out: outputs, and the parts that splits leave for the combine kernel."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Paged(NamedTuple):
    """Requests of random keys and values, once as they lie in a pool and once as they are."""

    keys: Tensor  # [N, block_size, Hkv, D], NaN wherever no token is
    values: Tensor
    tables: Tensor  # [B, W], blocks of the pool in random order
    lengths: Tensor  # [B]
    own: list[tuple[Tensor, Tensor]]  # of each request, [length, Hkv, D] keys and values in float64


def paged(lengths, dtype=torch.float32, num_kv_heads=2, head_size=64, block_size=16, seed=0, device=DEVICE) -> Paged:
    torch.manual_seed(seed)
    counts = [-(-length // block_size) for length in lengths]
    blocks = (torch.randperm(sum(counts) + 3) + 2).tolist()
    # The layer in the middle of three: what is written beside it shows.
    pool = torch.full((2, 3, len(blocks) + 2, block_size, num_kv_heads, head_size), math.nan, dtype=dtype)
    tables = torch.full((len(lengths), max(counts) + 2), POISON)
    own = []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[row, :count] = torch.tensor([blocks.pop() for _ in range(count)], dtype=torch.long)
        k, v = torch.randn(2, length, num_kv_heads, head_size).to(dtype)
        token = torch.arange(length)
        place = tables[row, token // block_size], token % block_size
        pool[0, 1][place], pool[1, 1][place] = k, v
        own.append((k.double(), v.double()))
    pool = pool.to(device)
    return Paged(pool[0, 1], pool[1, 1], tables.to(device), torch.tensor(lengths).to(device), own)


def one_row(q: Tensor, k: Tensor, v: Tensor, position: int, window: int | None) -> Tensor:
    """[Hq, D] query at a position of one request, [n, Hkv, D] keys and values -> [Hq, D], in float64."""
    first = 0 if window is None else max(0, position - window + 1)
    if position < 0:
        return torch.zeros_like(q, dtype=torch.float64)
    group = q.shape[0] // k.shape[1]
    k, v = (x[first : position + 1].repeat_interleave(group, dim=1) for x in (k, v))
    weights = torch.einsum("hd,khd->hk", q.double(), k).div(math.sqrt(q.shape[1])).softmax(-1)
    return torch.einsum("hk,khd->hd", weights, v)


def poisoned(q: Tensor) -> Tensor:
    return torch.full(q.shape, math.nan, dtype=q.dtype, device=q.device)


def random_queries(count: int, case: Paged, group: int) -> Tensor:
    """[count, Hq, D] that lie in memory as the first third of a fused QKV projection's output does."""
    num_heads = group * case.keys.shape[2]
    return torch.randn(count, 3 * num_heads, case.keys.shape[3]).to(case.keys)[:, :num_heads]


def assert_near(out: Tensor, expected: list[Tensor]) -> None:
    torch.testing.assert_close(out.cpu().double(), torch.stack(expected), rtol=0, atol=TOLERANCE[out.dtype])


def check_decode(kernels, case: Paged, group=2, window=None, num_splits=3) -> None:
    q = random_queries(len(case.lengths), case, group)
    out = poisoned(q)
    returned = kernels.decode(
        q, case.keys, case.values, case.tables, case.lengths, window, num_splits=num_splits, out=out
    )
    assert returned is out
    rows = zip(q.cpu(), case.own, case.lengths.tolist(), strict=True)
    assert_near(out, [one_row(row, k, v, length - 1, window) for row, (k, v), length in rows])


def check_prefill(kernels, case: Paged, counts, group=2, window=None) -> None:
    """`counts`: new tokens of each request, the last ones of its length."""
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    q = random_queries(starts[-1], case, group)
    out = poisoned(q)
    arguments = case.tables, torch.tensor(starts, device=q.device), case.lengths, max(counts), window
    assert kernels.prefill(q, case.keys, case.values, *arguments, out=out) is out
    expected = []
    for start, count, length, (k, v) in zip(starts, counts, case.lengths.tolist(), case.own, strict=False):
        own = q[start : start + count].cpu()
        expected += [one_row(row, k, v, length - count + i, window) for i, row in enumerate(own)]
    assert_near(out, expected)


def check_store(kernels, dtype, block_size=16, device=DEVICE) -> None:
    case = paged([40, 7], dtype, block_size=block_size, device=device)
    k, v = torch.randn(2, 9, 6, 64).to(case.keys)[:, :, 2:4]  # as if cut out of a fused projection
    slots = torch.randperm(case.keys.shape[0] * block_size)[:9].to(case.keys.device)
    slots[[3, 8]] = -1
    around = case.keys._base.clone()  # all layers, keys and values
    kernels.store_kv(case.keys, case.values, slots, k, v)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            around[0, 1].flatten(0, 1)[slot] = k[token]
            around[1, 1].flatten(0, 1)[slot] = v[token]
    torch.testing.assert_close(case.keys._base, around, rtol=0, atol=0, equal_nan=True)


def check_nan_stays_with_those_who_see_it(kernels, what: str, device=DEVICE) -> None:
    """One value of one token is NaN: all that may see the token are NaN there, and nobody else is changed."""
    case, broken = paged([100, 100], num_kv_heads=1, device=device), 83
    q, starts = random_queries(40, case, group=2), torch.tensor([0, 20, 40], device=device)
    arguments = q, case.keys, case.values, case.tables, starts, case.lengths, 20
    clean = kernels.prefill(*arguments)
    getattr(case, what)[case.tables[0, broken // 16], broken % 16, 0, 5] = math.nan
    out = kernels.prefill(*arguments)
    sees = torch.arange(40) < 20
    sees &= torch.arange(80, 120) >= broken
    assert out[sees][..., 5].isnan().all()
    assert torch.equal(out[~sees], clean[~sees])
    decoded = kernels.decode(q[:2], case.keys, case.values, case.tables, case.lengths, num_splits=2)
    assert decoded[0, :, 5].isnan().all() and decoded[1].isfinite().all()
