"""A whole step of paged attention beside its definition: decodes and chunks together, cached prefixes, windows."""

from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from minillm.kernels import dispatch, reference
from minillm.kernels.dispatch import AttentionInputs, PagedAttention
from minillm.model.config import ModelConfig
from minillm.runtime.cache_engine import CacheEngine
from paged_cases import one_row

BLOCK = 16
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-12}

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TRITON = pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"))
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


class Step(NamedTuple):
    """A step, and whose its tokens are."""

    inputs: AttentionInputs
    positions: Tensor  # [T]
    tables: Tensor  # [T, W] block table of each token's request


def config(window: int | None = None, heads: int = 4, layers: int = 2) -> ModelConfig:
    windows = (None,) * (layers - 1) + (window,)
    return ModelConfig(50, 64, 96, layers, heads, 2, 16, 512, sliding_windows=windows)


def step_of(decodes: list[int], chunks: list[tuple[int, int]]) -> Step:
    """Decodes of requests of so many tokens (in rising order), chunks (start, end); blocks in an order of their own."""
    lengths = decodes + [end for _, end in chunks]
    blocks = np.random.default_rng(0).permutation(np.arange(1, 1 + sum(-(-length // BLOCK) for length in lengths)))
    width = max(-(-length // BLOCK) for length in lengths)
    tables = np.zeros((len(lengths), width), np.int64)
    for row, length in enumerate(lengths):
        count = -(-length // BLOCK)
        tables[row, :count], blocks = blocks[:count], blocks[count:]
    spans = [(length - 1, length) for length in decodes] + chunks
    positions = np.concatenate([np.arange(*span) for span in spans])
    owners = np.concatenate([np.full(end - start, row) for row, (start, end) in enumerate(spans)])
    slots = tables[owners, positions // BLOCK] * BLOCK + positions % BLOCK
    starts = np.cumsum([0, *(end - start for start, end in chunks)])
    tables, positions, slots = (torch.from_numpy(each).to(DEVICE) for each in (tables, positions, slots))
    inputs = AttentionInputs(
        slots=slots,
        num_decodes=len(decodes),
        decode_tables=tables[: len(decodes)].int(),
        decode_lengths=torch.tensor(decodes, dtype=torch.int32, device=DEVICE),
        chunk_tables=tables[len(decodes) :].int(),
        chunk_starts=torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        chunk_lengths=torch.tensor([end for _, end in chunks], dtype=torch.int32, device=DEVICE),
        max_queries=max((end - start for start, end in chunks), default=0),
    )
    return Step(inputs, positions, tables[torch.from_numpy(owners).to(DEVICE)])


def cache_of(shape: ModelConfig, dtype: torch.dtype, num_blocks: int, device: str = DEVICE) -> CacheEngine:
    """What is cached before the step: random, the same for every call."""
    cache = CacheEngine(shape, num_blocks, BLOCK, dtype, device)
    torch.manual_seed(1)
    for pool in (cache.keys, cache.values):
        pool.copy_(torch.randn(pool.shape))
    return cache


def random_qkv(num_tokens: int, shape: ModelConfig, dtype: torch.dtype, layer: int) -> tuple[Tensor, ...]:
    torch.manual_seed(2 + layer)
    heads = shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads
    return torch.randn(num_tokens, sum(heads), shape.head_dim).to(dtype).split(heads, dim=1)


def attention(shape: ModelConfig, dtype: torch.dtype, inputs: AttentionInputs, backend, device: str = DEVICE):
    """What attends, over a cache of its own."""
    return PagedAttention(backend, shape, cache_of(shape, dtype, 20, device).layers, inputs)


def unmasked(backend: dispatch.Backend) -> dispatch.Backend:
    """As on a GPU, where nobody looks at lengths to make masks of them."""
    return replace(backend, prepare=lambda inputs, pool, config: inputs)


def chosen(name: str, shape: ModelConfig, dtype: torch.dtype = torch.float64, device: str = DEVICE) -> dispatch.Backend:
    """By name; "masked" is the reference on a CPU, and "reference" the same as on a GPU."""
    backend = dispatch.choose("reference" if name == "masked" else name, shape, dtype, device, BLOCK)
    return unmasked(backend) if name == "reference" else backend


def outputs(attend: PagedAttention, num_tokens: int) -> Tensor:
    layers, keys = range(attend.config.num_hidden_layers), attend.pools[0][0]
    qkv = [[x.to(keys.device) for x in random_qkv(num_tokens, attend.config, keys.dtype, layer)] for layer in layers]
    return torch.stack([attend(layer, *qkv[layer]) for layer in layers]).cpu()


def expected_of(step: Step, shape: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """[L, T, Hq, D] in float64, each token by itself from the definition; and the pools with the step's tokens."""
    pools, layers = cache_of(shape, dtype, 20, "cpu").layers, []
    for layer, (keys, values) in enumerate(pools):
        q, k, v = random_qkv(len(step.positions), shape, dtype, layer)
        slots = step.inputs.slots.cpu()
        keys.flatten(0, 1)[slots], values.flatten(0, 1)[slots] = k, v
        rows = [
            one_row(q[i], *(pool[table].flatten(0, 1).double() for pool in (keys, values)), position, window)
            for window in [shape.sliding_window(layer)]
            for i, (table, position) in enumerate(zip(step.tables.cpu(), step.positions.tolist(), strict=True))
        ]
        layers.append(torch.stack(rows))
    return torch.stack(layers), pools


MASKED = pytest.param("masked", marks=pytest.mark.skipif(GPU, reason="masks are made on a CPU alone"))
MIXED = [1, 16, 17, 40], [(0, 20), (33, 50), (16, 18)]


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("decodes", "chunks"), [MIXED, (MIXED[0], []), ([], MIXED[1])])
@pytest.mark.parametrize("name", [MASKED, "reference", TRITON, CUDA])
def test_a_step_is_what_the_definition_says(name, decodes, chunks, window):
    dtype = torch.float64 if name in ("masked", "reference") else torch.float32
    shape, step = config(window), step_of(decodes, chunks)
    attend = attention(shape, dtype, step.inputs, chosen(name, shape, dtype))
    assert (name == "masked") == (attend.state is not step.inputs)
    expected, pools = expected_of(step, shape, dtype)
    found = outputs(attend, len(step.positions))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    for ours, theirs in zip(attend.pools, pools, strict=True):
        assert all(torch.equal(pool.cpu(), other) for pool, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", [MASKED, "reference", TRITON, CUDA])
def test_padding_changes_nothing_of_any_request(name):
    """Rows of padding behind the decodes and behind the chunks, full of NaN: theirs are zeros, the others the same.

    Where whole blocks are read, padding has the null block, as the runner's has, and may be anything.
    """
    shape, (inputs, positions, _) = config(), step_of(*MIXED)
    backend, num_tokens = chosen(name, shape, torch.float32), len(positions)
    plain = attention(shape, torch.float32, inputs, backend)
    expected = outputs(plain, num_tokens)
    pads, nowhere = torch.full((3,), -1, device=DEVICE), 0 if name == "masked" else 10**6
    padded = inputs._replace(
        slots=torch.cat([inputs.slots[:4], pads[:2], inputs.slots[4:], pads]),
        num_decodes=6,
        decode_tables=torch.nn.functional.pad(inputs.decode_tables, (0, 0, 0, 2), value=nowhere),
        decode_lengths=torch.nn.functional.pad(inputs.decode_lengths, (0, 2)),
        chunk_tables=torch.nn.functional.pad(inputs.chunk_tables, (0, 0, 0, 1), value=nowhere),
        chunk_starts=torch.cat([inputs.chunk_starts, inputs.chunk_starts[-1:] + 3]),
        chunk_lengths=torch.nn.functional.pad(inputs.chunk_lengths, (0, 1)),
    )
    attend = attention(shape, torch.float32, padded, backend)
    real = torch.cat([torch.arange(4), torch.arange(6, num_tokens + 2)]).to(DEVICE)
    for layer in range(2):
        qkv = []
        for x in random_qkv(num_tokens, shape, torch.float32, layer):
            rows = torch.full((num_tokens + 5, *x.shape[1:]), torch.nan, device=DEVICE)
            rows[real] = x.to(DEVICE)
            qkv.append(rows)
        out = attend(layer, *qkv)
        torch.testing.assert_close(out[real].cpu(), expected[layer], rtol=0, atol=1e-6)
        out[real] = 0
        assert name == "masked" or out.eq(0).all()
    for ours, theirs in zip(attend.pools, plain.pools, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_the_reference_reads_nothing_that_is_not_a_request_s_own():
    """NaN in the ends of blocks, in other blocks and the null block, and tables that point past the pool."""
    shape, step = config(window=9), step_of(*MIXED)
    inputs = step.inputs
    expected, _ = expected_of(step, shape, torch.float64)
    attend = attention(shape, torch.float64, inputs, chosen("reference", shape))
    own = torch.zeros(20 * BLOCK, dtype=torch.bool, device=DEVICE)
    tables = [*inputs.decode_tables, *inputs.chunk_tables]
    lengths = [*inputs.decode_lengths.tolist(), *inputs.chunk_lengths.tolist()]
    for table, length in zip(tables, lengths, strict=True):
        token = torch.arange(length, device=DEVICE)
        own[table[token // BLOCK] * BLOCK + token % BLOCK] = True
        table[-(-length // BLOCK) :] = 10**6
    for pools in attend.pools:
        for pool in pools:
            pool.flatten(0, 1)[~own] = torch.nan
    torch.testing.assert_close(outputs(attend, len(step.positions)), expected, rtol=0, atol=1e-12)


def test_the_reference_in_slices_is_the_reference(monkeypatch):
    shape, step = config(), step_of(*MIXED)
    num_tokens = len(step.positions)
    sliced = attention(shape, torch.float64, step.inputs, chosen("reference", shape))
    expected, _ = expected_of(step, shape, torch.float64)
    calls = []
    rows = reference._decode_rows
    monkeypatch.setattr(reference, "_decode_rows", lambda q, *others: calls.append(len(q)) or rows(q, *others))
    monkeypatch.setattr(reference, "SLICE_BYTES", 3 * 2 * 4 * sliced.pools[0][0][:1].nbytes)
    torch.testing.assert_close(outputs(sliced, num_tokens), expected, rtol=0, atol=1e-12)
    assert max(calls) == 3 and sum(calls) == 2 * num_tokens


BUGS = {
    "not stored": ("store_kv", lambda own: lambda *arguments: None),
    "decodes look at the chunks' rows": (
        "decode",
        lambda own: lambda q, *others, out: own(q.flip(0), *others, out=out),
    ),
    "prefix forgotten": (
        "prefill",
        lambda own: (
            lambda q, keys, values, tables, starts, lengths, *others, out: own(
                q, keys, values, tables, starts, starts.diff(), *others, out=out
            )
        ),
    ),
    "window forgotten": (
        "prefill",
        lambda own: lambda *arguments, out: own(*arguments[:-1], None, out=out),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name):
    function, broken = BUGS[name]
    shape, step = config(window=9), step_of(*MIXED)
    backend = chosen("reference", shape)
    own = {each: getattr(backend.kernels, each) for each in ("store_kv", "decode", "prefill")}
    kernels = SimpleNamespace(**own | {function: broken(own[function])})
    attend = attention(shape, torch.float64, step.inputs, replace(backend, kernels=kernels, unchecked=kernels))
    expected, _ = expected_of(step, shape, torch.float64)
    assert (outputs(attend, len(step.positions)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.skipif(
    dispatch.choose("auto", config(), torch.float64, "cpu", BLOCK).name != "cpu", reason="no C++ kernels"
)
def test_whole_numbers_of_either_size_in_every_layer(dtype):
    """The kernels of later layers do not look at their arguments, but must know how to read them."""
    shape, step = config(window=9, layers=3), step_of(*MIXED)
    tensors = {name: x.to("cpu", dtype) for name, x in step.inputs._asdict().items() if isinstance(x, Tensor)}
    inputs = step.inputs._replace(**tensors)
    attend = attention(shape, torch.float64, inputs, chosen("cpu", shape, device="cpu"), "cpu")
    expected, _ = expected_of(step, shape, torch.float64)
    torch.testing.assert_close(outputs(attend, len(step.positions)), expected, rtol=0, atol=1e-12)
