"""A whole step on kernels beside the CPU's masked attention: decodes and chunks together, cached prefixes, windows."""

from dataclasses import replace
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from minillm.kernels import dispatch, reference
from minillm.model.config import ModelConfig
from minillm.runtime.cache_engine import CacheEngine
from minillm.runtime.kernel_attention import AttentionInputs, KernelAttention
from minillm.runtime.paged_attention import Chunk, PagedAttention, PagedBatch

BLOCK = 16
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-12}

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TRITON = pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"))
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


class Step(NamedTuple):
    """A step in both forms, over the same blocks."""

    batch: PagedBatch
    inputs: AttentionInputs


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
    first, parts = len(decodes), []
    starts = [0]
    for row, (start, end) in enumerate(chunks):
        parts.append(Chunk(str(row), first + starts[-1], start, end, tables[len(decodes) + row]))
        starts.append(starts[-1] + end - start)
    batch = PagedBatch(positions, positions, slots, tables[: len(decodes)], parts)
    inputs = AttentionInputs(
        slots=torch.from_numpy(slots),
        num_decodes=len(decodes),
        decode_tables=torch.from_numpy(tables[: len(decodes)]).int(),
        decode_lengths=torch.tensor(decodes, dtype=torch.int32),
        chunk_tables=torch.from_numpy(tables[len(decodes) :]).int(),
        chunk_starts=torch.tensor(starts, dtype=torch.int32),
        chunk_lengths=torch.tensor([end for _, end in chunks], dtype=torch.int32),
        max_queries=max((end - start for start, end in chunks), default=0),
    )
    on_the_device = {name: value.to(DEVICE) for name, value in inputs._asdict().items() if isinstance(value, Tensor)}
    return Step(batch, inputs._replace(**on_the_device))


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


def outputs(attend, shape: ModelConfig, num_tokens: int) -> Tensor:
    layers = range(shape.num_hidden_layers)
    keys = attend.cache.keys
    qkv = [[x.to(keys.device) for x in random_qkv(num_tokens, shape, keys.dtype, layer)] for layer in layers]
    return torch.stack([attend(layer, *qkv[layer]) for layer in layers]).cpu()


MIXED = [1, 16, 17, 40], [(0, 20), (33, 50), (16, 18)]


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("decodes", "chunks"), [MIXED, (MIXED[0], []), ([], MIXED[1])])
@pytest.mark.parametrize("name", ["reference", TRITON, CUDA])
def test_a_step_equals_the_masked_attention_of_the_cpu(name, decodes, chunks, window):
    dtype = torch.float64 if name == "reference" else torch.float32
    shape, step = config(window), step_of(decodes, chunks)
    num_tokens = len(step.batch.slots)
    masked = PagedAttention(cache_of(shape, dtype, 20, "cpu"), step.batch, torch.device("cpu"))
    backend = dispatch.choose(name, shape, dtype, DEVICE, BLOCK)
    kernels = KernelAttention(cache_of(shape, dtype, 20), step.inputs, backend)
    ours, theirs = (outputs(attend, shape, num_tokens) for attend in (kernels, masked))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(kernels.cache.keys.cpu(), masked.cache.keys)
    assert torch.equal(kernels.cache.values.cpu(), masked.cache.values)


@pytest.mark.parametrize("name", ["reference", TRITON, CUDA])
def test_padding_changes_nothing_of_any_request(name):
    """Rows of padding behind the decodes and behind the chunks, full of NaN: theirs are zeros, the others the same."""
    shape, (batch, inputs) = config(), step_of(*MIXED)
    backend, num_tokens = dispatch.choose(name, shape, torch.float32, DEVICE, BLOCK), len(batch.slots)
    plain = KernelAttention(cache_of(shape, torch.float32, 20), inputs, backend)
    expected = outputs(plain, shape, num_tokens)
    pads = torch.full((3,), -1, device=DEVICE)
    padded = inputs._replace(
        slots=torch.cat([inputs.slots[:4], pads[:2], inputs.slots[4:], pads]),
        num_decodes=6,
        decode_tables=torch.nn.functional.pad(inputs.decode_tables, (0, 0, 0, 2), value=10**6),
        decode_lengths=torch.nn.functional.pad(inputs.decode_lengths, (0, 2)),
        chunk_tables=torch.nn.functional.pad(inputs.chunk_tables, (0, 0, 0, 1), value=10**6),
        chunk_starts=torch.cat([inputs.chunk_starts, inputs.chunk_starts[-1:] + 3]),
        chunk_lengths=torch.nn.functional.pad(inputs.chunk_lengths, (0, 1)),
    )
    attend = KernelAttention(cache_of(shape, torch.float32, 20), padded, backend)
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
        assert out.eq(0).all()
    assert torch.equal(attend.cache.keys, plain.cache.keys)


def test_the_reference_reads_nothing_that_is_not_a_request_s_own():
    """NaN in the ends of blocks, in other blocks and the null block, and tables that point past the pool."""
    shape, (batch, inputs) = config(window=9), step_of(*MIXED)
    backend, num_tokens = dispatch.choose("reference", shape, torch.float64, DEVICE, BLOCK), len(batch.slots)
    clean = KernelAttention(cache_of(shape, torch.float64, 20), inputs, backend)
    expected = outputs(clean, shape, num_tokens)
    cache = cache_of(shape, torch.float64, 20)
    own = torch.zeros(20 * BLOCK, dtype=torch.bool, device=DEVICE)
    tables = [*inputs.decode_tables, *inputs.chunk_tables]
    lengths = [*inputs.decode_lengths.tolist(), *inputs.chunk_lengths.tolist()]
    for table, length in zip(tables, lengths, strict=True):
        token = torch.arange(length, device=DEVICE)
        own[table[token // BLOCK] * BLOCK + token % BLOCK] = True
        table[-(-length // BLOCK) :] = 10**6
    for pool in (cache.keys, cache.values):
        pool.flatten(1, 2)[:, ~own] = torch.nan
    out = outputs(KernelAttention(cache, inputs, backend), shape, num_tokens)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_the_reference_in_slices_is_the_reference(monkeypatch):
    shape, step = config(), step_of(*MIXED)
    backend, num_tokens = dispatch.choose("reference", shape, torch.float64, DEVICE, BLOCK), len(step.batch.slots)
    whole, sliced = (KernelAttention(cache_of(shape, torch.float64, 20), step.inputs, backend) for _ in "12")
    expected = outputs(whole, shape, num_tokens)
    calls = []
    rows = reference._decode_rows
    monkeypatch.setattr(reference, "_decode_rows", lambda q, *others: calls.append(len(q)) or rows(q, *others))
    monkeypatch.setattr(reference, "SLICE_BYTES", 3 * 2 * 4 * whole.cache.keys[0, :1].nbytes)
    torch.testing.assert_close(outputs(sliced, shape, num_tokens), expected, rtol=0, atol=1e-12)
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
    backend = dispatch.choose("reference", shape, torch.float64, DEVICE, BLOCK)
    backend = replace(backend, **{function: broken(getattr(backend, function))})
    masked = PagedAttention(cache_of(shape, torch.float64, 20, "cpu"), step.batch, torch.device("cpu"))
    kernels = KernelAttention(cache_of(shape, torch.float64, 20), step.inputs, backend)
    num_tokens = len(step.batch.slots)
    expected, out = (outputs(attend, shape, num_tokens) for attend in (masked, kernels))
    assert (out - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.skipif(
    dispatch.choose("auto", config(), torch.float64, "cpu", BLOCK).name != "cpu", reason="no C++ kernels"
)
def test_whole_numbers_of_either_size_in_every_layer(dtype):
    """The kernels of later layers do not look at their arguments, but must know how to read them."""
    shape, step = config(window=9, layers=3), step_of(*MIXED)
    tensors = {name: x.to("cpu", dtype) for name, x in step.inputs._asdict().items() if isinstance(x, Tensor)}
    inputs = step.inputs._replace(**tensors)
    num_tokens = len(step.batch.slots)
    masked = PagedAttention(cache_of(shape, torch.float64, 20, "cpu"), step.batch, torch.device("cpu"))
    backend = dispatch.choose("cpu", shape, torch.float64, "cpu", BLOCK)
    kernels = KernelAttention(cache_of(shape, torch.float64, 20, "cpu"), inputs, backend)
    expected, out = (outputs(attend, shape, num_tokens) for attend in (masked, kernels))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
