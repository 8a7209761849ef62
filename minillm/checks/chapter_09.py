"""Chapter 9, the limits of decode: the time of a step, the batch where arithmetic takes over, who reads what, a kernel.

`decode_loop` needs Triton to run a kernel; where there is none it says so and checks nothing.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm import costs, shapes
from minillm.checks.base import Case, CheckFailed, NotWrittenYet, call, describe, failure, run_check

# --- decode_step_seconds ---------------------------------------------------------------------------------------------


class Name(str):
    """The name of a shape or a card in `minillm.shapes`, printed as the reader writes it."""

    __repr__ = str.__str__


def decode_step_seconds(function: Callable) -> None:
    """`decode_step_seconds(shape, card, contexts)` -> least seconds of a decode step, a context a request."""
    cases = [
        _step("LLAMA_2_7B", "H200", [0], "Nothing is cached: what is left is reading the weights, 2 bytes each."),
        _step("LLAMA_2_7B", "H200", [2_048], "The cache is read besides: its tokens times the bytes a token has."),
        _step("LLAMA_2_7B", "A100_80GB", [500] * 8, "Weights are read once for all 8; each has a cache of its own."),
        _step("LLAMA_2_7B", "A100_80GB", [1, 4_000, 17], "Contexts differ: add them up."),
        _step("QWEN3_0_6B", "RTX_4090", [300, 900], "Two query heads share a key head: kv_bytes_per_token knows."),
        _step("LLAMA_2_7B", "H200", [0] * 512, "512 requests: 2 FLOP a weight and request take longer than reading."),
        _step("LLAMA_2_70B", "H200", [10] * 300, "Arithmetic and reading overlap: the larger of the two, not the sum."),
    ]
    run_check("decode_step_seconds", _with_shapes(function), cases)


def _step(shape: str, card: str, contexts: list[int], hint: str) -> Case:
    batch_size = len(contexts)
    seconds = costs.step_seconds(
        getattr(shapes, shape), getattr(shapes, card), batch_size, batch_size, cached_tokens=sum(contexts)
    )
    return Case((Name(shape), Name(card), contexts), seconds, hint)


def _with_shapes(function: Callable) -> Callable:
    return lambda shape, card, contexts: function(getattr(shapes, shape), getattr(shapes, card), list(contexts))


# --- compute_bound_batch ---------------------------------------------------------------------------------------------


def compute_bound_batch(function: Callable) -> None:
    """`compute_bound_batch(card, weight_bytes)` -> the smallest batch whose arithmetic takes as long as its weights."""
    cases = [
        _crossing("H200", 2, "2 · P · B / flops ≥ weight_bytes · P / bandwidth. P is on both sides."),
        _crossing("A100_80GB", 2, "A batch is a whole number of requests: the first one that is large enough."),
        _crossing("RTX_4090", 2, "The card's flops over its bandwidth says how many FLOP go with a byte."),
        _crossing("H200", 1, "Weights of one byte are read in half the time: the crossing comes at half the batch."),
        _crossing("A100_80GB", 4, "Weights of four bytes take twice as long to read."),
    ]
    run_check("compute_bound_batch", _with_card(function), cases, same=_same_whole)


def _crossing(card: str, weight_bytes: int, hint: str) -> Case:
    expected = costs.compute_bound_batch(getattr(shapes, card), weight_bytes)
    return Case((Name(card), weight_bytes), expected, hint)


def _with_card(function: Callable) -> Callable:
    return lambda card, weight_bytes: function(getattr(shapes, card), weight_bytes)


def _same_whole(got: Any, expected: int) -> bool:
    """A whole number of any type; 2.0 is one too."""
    is_whole = isinstance(got, Integral) and not isinstance(got, bool)
    return (is_whole or (isinstance(got, float) and got.is_integer())) and int(got) == expected


# --- key_number ------------------------------------------------------------------------------------------------------

NUM_KEYS, HEAD_SIZE = 16, 64  # of the block that is read
NUM_LOADS, NUM_THREADS, VECTOR = 4, 32, 8  # loads of a thread, threads of a warp, numbers in a load
NUMBER_BYTES, SECTOR_BYTES = 2, 32


class Reads(NamedTuple):
    """What the warp reads: the first number of each [load][thread], and the sectors that each load fetches."""

    first: list[list[int]]
    sectors: list[set[int]]

    @property
    def num_sectors(self) -> int:
        return sum(map(len, self.sectors))


def key_number(function: Callable) -> None:
    """`key_number(load, thread, head, num_heads)` -> which number of a block [16 keys, heads, 64] a thread reads first.

    32 threads make 4 loads each of 8 numbers (of 2 bytes) in a row. They must read every number of the head's keys
    once, and fetch no sector of 32 bytes twice. Any order will do.
    """
    layouts = [(0, 1), (0, 2), (1, 2), (5, 8)]
    for head, num_heads in layouts:
        _check_reads(function, head, num_heads)
    print(f"✓ key_number: {len(layouts)} cases")


def reads_of(function: Callable, head: int, num_heads: int) -> Reads:
    """Play the warp: ask the function for every load of every thread, and count sectors. Raises what it raises."""
    first = [
        [int(function(load, thread, head, num_heads)) for thread in range(NUM_THREADS)] for load in range(NUM_LOADS)
    ]
    return Reads(first, [{number * NUMBER_BYTES // SECTOR_BYTES for number in _numbers(load)} for load in first])


def _numbers(firsts: Sequence[int]) -> list[int]:
    return [number for first in firsts for number in range(first, first + VECTOR)]


def _check_reads(function: Callable, head: int, num_heads: int) -> None:
    for load in range(NUM_LOADS):
        for thread in range(NUM_THREADS):
            _check_number(function, load, thread, head, num_heads)
    reads = reads_of(function, head, num_heads)
    numbers = [number for load in reads.first for number in _numbers(load)]
    wanted = {number_of(key, head, num_heads) + i for key in range(NUM_KEYS) for i in range(HEAD_SIZE)}
    case = _all_loads(head, num_heads, "every number of the head's keys once")
    if foreign := sorted(set(numbers) - wanted):
        owner = foreign[0] // HEAD_SIZE % num_heads
        hint = "From one key to the next it is num_heads · 64 numbers; a head's 64 begin at head · 64."
        _refuse(case, f"number {foreign[0]}, which belongs to head {owner}", hint)
    if missing := sorted(wanted - set(numbers)):
        hint = "Number all 128 loads, 0 to 127: which one is this, and which key and which eighth of it are its own?"
        _refuse(case, f"{len(missing)} numbers read by nobody, the first is {missing[0]}", hint)
    budget = NUM_KEYS * HEAD_SIZE * NUMBER_BYTES // SECTOR_BYTES
    if reads.num_sectors > budget:
        hint = "In one load, let threads that are neighbours read numbers that are neighbours."
        case = _all_loads(head, num_heads, f"{budget} sectors")
        _refuse(case, f"{reads.num_sectors} sectors fetched: {[len(load) for load in reads.sectors]} by load", hint)


def _check_number(function: Callable, load: int, thread: int, head: int, num_heads: int) -> None:
    """One answer alone: a whole number inside the block at which a load of 16 bytes may begin."""
    most = NUM_KEYS * num_heads * HEAD_SIZE - VECTOR
    case = Case(
        (load, thread, head, num_heads),
        f"a multiple of 8 from 0 to {most}",
        "A load of 8 numbers, 16 bytes, must begin at a multiple of 16 bytes.",
    )
    got = call("key_number", function, case, str)
    whole = isinstance(got, Integral) or (isinstance(got, Tensor) and got.numel() == 1 and not got.is_floating_point())
    if not whole or isinstance(got, bool) or int(got) % VECTOR or not 0 <= int(got) <= most:
        raise CheckFailed(failure("key_number", case, f"got       {describe(got)}", str))


def number_of(key: int, head: int, num_heads: int) -> int:
    """Where a head's 64 numbers of a key begin in the block."""
    return (key * num_heads + head) * HEAD_SIZE


def _all_loads(head: int, num_heads: int, expected: str) -> Case:
    return Case((Name("all loads"), Name("all threads"), head, num_heads), expected, "")


def _refuse(case: Case, got: str, hint: str) -> None:
    raise CheckFailed(failure("key_number", replace(case, hint=hint), f"got       {got}", str))


# --- decode_loop -----------------------------------------------------------------------------------------------------

KEYS, BLOCK_SIZE, NUM_KV_HEADS, LOOP_HEAD_SIZE = 8, 4, 2, 16
TOLERANCE = 1e-4  # of float32 sums over a few dozen keys, each near 1


class Batch(NamedTuple):
    """Requests of random keys and values, once as they lie in the pool of a layer and once as they are."""

    q: Tensor  # [B, Hq, D]
    keys: Tensor  # [N, block_size, Hkv, D], NaN wherever no token is
    values: Tensor
    tables: Tensor  # [B, W], blocks in random order; behind a request's own ones stands a block of NaN
    own: list[tuple[Tensor, Tensor]]  # keys and values of each request, [length, Hkv, D] each

    def __repr__(self) -> str:
        lengths = [len(k) for k, _ in self.own]
        return f"lengths {lengths}, {self.group} query heads a key head, tiles of {KEYS} keys, blocks of {BLOCK_SIZE}"

    @property
    def group(self) -> int:
        return self.q.shape[1] // NUM_KV_HEADS


def decode_loop(kernel: Any) -> None:
    """The page's `@triton.jit` kernel, launched on requests of several lengths, beside attention in torch."""
    if _is_stub(kernel):
        raise NotWrittenYet("✗ decode_loop: not written yet. Replace the `raise NotImplementedError` above.")
    if not hasattr(kernel, "__getitem__"):  # what Triton makes of a function can be launched on a grid
        print("decode_loop: nothing was checked. Triton is not installed (there is one for Linux on x86_64 only).")
        return
    cases = [
        _loop([KEYS], 1, "One full tile: scores, the largest of a row, weights exp(score - largest), and two sums."),
        _loop([3], 1, "The text ends inside the tile: what is not seen gets the score -inf, before the maximum."),
        _loop([5 * KEYS], 1, "When a larger score comes, total and acc so far count for exp(best - new_best) of it."),
        _loop([1, 2 * KEYS + 1, KEYS - 1], 1, "Several requests: each ends somewhere else."),
        _loop([4 * KEYS], 60, "Large scores: exp(score) alone is infinite. Take the largest off first."),
        _loop([0, 4], 1, "A request without keys (padding) makes no round of the loop: best, total, acc stay."),
        _loop([KEYS + 3], 1, "Four query heads share a key head: a row of scores for each of them.", group=4),
    ]
    run_check("decode_loop", _launched(kernel), cases, same=_near)


def _is_stub(kernel: Any) -> bool:
    """Read from its source: where Triton compiles, a `raise` in a kernel never gets as far as raising."""
    try:
        lines = inspect.getsource(getattr(kernel, "fn", kernel)).splitlines()
    except (OSError, TypeError):
        return False
    return any(line.strip().startswith("raise NotImplementedError") for line in lines)


def _loop(lengths: list[int], spread: float, hint: str, group: int = 2) -> Case:
    """Requests of these lengths; `spread`: how far from 0 their queries lie, and so the scores."""
    batch = _batch(lengths, spread, group)
    expected = torch.stack([_attention(q, k, v) for q, (k, v) in zip(batch.q, batch.own, strict=True)])
    return Case((batch,), expected, hint)


def _batch(lengths: list[int], spread: float, group: int) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    blocks = (torch.randperm(sum(counts), generator=generator) + 1).tolist()  # block 0 stays NaN
    pool = torch.full((2, 1 + sum(counts), BLOCK_SIZE, NUM_KV_HEADS, LOOP_HEAD_SIZE), math.nan)
    tables = torch.zeros(len(lengths), 1 + max(counts), dtype=torch.int64)
    own = []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[row, :count] = torch.tensor([blocks.pop() for _ in range(count)], dtype=torch.int64)
        token = torch.arange(length)
        k, v = torch.randn(2, length, NUM_KV_HEADS, LOOP_HEAD_SIZE, generator=generator)
        place = tables[row, token // BLOCK_SIZE], token % BLOCK_SIZE
        pool[0][place], pool[1][place] = k, v
        own.append((k, v))
    q = spread * torch.randn(len(lengths), NUM_KV_HEADS * group, LOOP_HEAD_SIZE, generator=generator)
    return Batch(q, pool[0], pool[1], tables, own)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[Hq, D] query at the end of [n, Hkv, D] keys and values -> [Hq, D]; zeros where there is no key."""
    k, v = (x.repeat_interleave(q.shape[0] // NUM_KV_HEADS, dim=1) for x in (k, v))
    weights = torch.einsum("hd,khd->hk", q, k).div(math.sqrt(LOOP_HEAD_SIZE)).softmax(-1)
    return torch.einsum("hk,khd->hd", weights, v)


def _launched(kernel: Any) -> Callable[[Batch], Tensor]:
    """The kernel on the whole grid, a program a request and key head, where its kind runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def launched(batch: Batch) -> Tensor:
        q, keys, values, tables = (x.to(device) for x in batch[:4])
        lengths = torch.tensor([len(k) for k, _ in batch.own], device=device)
        out = torch.full_like(q, math.nan)
        kernel[(len(q), NUM_KV_HEADS)](
            q, keys, values, tables, lengths, out, tables.shape[1], 1 / math.sqrt(LOOP_HEAD_SIZE),
            NUM_KV_HEADS=NUM_KV_HEADS, GROUP=batch.group, D=LOOP_HEAD_SIZE, BLOCK_SIZE=BLOCK_SIZE, KEYS=KEYS,
        )  # fmt: skip
        return out.cpu()

    return launched


def _near(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=0, atol=TOLERANCE)
