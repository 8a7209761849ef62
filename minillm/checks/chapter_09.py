"""Chapter 9: the least time of a decode step, attention through a block table, softmax in parts, who reads what."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm import costs
from minillm.checks.base import (
    Case,
    CheckFailed,
    call,
    describe,
    failure,
    is_number,
    number_of,
    run_check,
    to_tensor,
)
from minillm.costs import kv_bytes_per_token, shapes

# --- decode_step_seconds ---------------------------------------------------------------------------------------------


class Name(str):
    """The name of a shape or a card in `minillm.costs.shapes`, printed as the reader writes it."""

    __repr__ = str.__str__


class Contexts(list):
    """Cached tokens of each request; many equal ones are printed as "[0] * 512"."""

    def __repr__(self) -> str:
        return f"[{self[0]}] * {len(self)}" if len(self) > 3 and len(set(self)) == 1 else super().__repr__()


def decode_step_seconds(function: Callable) -> None:
    """`decode_step_seconds(shape, card, contexts)` -> least seconds of a decode step, a context a request."""
    cases = [
        _step("LLAMA_2_7B", "H200", [0], "Nothing is cached: what is left is reading the weights, 2 bytes each."),
        _step("LLAMA_2_7B", "H200", [2_048], "The cache is read besides: its tokens times the bytes of one."),
        _step("LLAMA_2_7B", "A100_80GB", [500] * 8, "Weights are read once for all 8; each has a cache of its own."),
        _step("LLAMA_2_7B", "A100_80GB", [1, 4_000, 17], "Contexts differ: add them up."),
        _step("QWEN3_0_6B", "RTX_4090", [300, 900], "Two query heads share a key head: kv_bytes_per_token knows."),
        _step("LLAMA_2_7B", "H200", [0] * 512, "512 requests: 2 FLOP a weight and request take longer than reading."),
        _step("LLAMA_2_70B", "H200", [10] * 300, "Arithmetic and reading overlap: the larger of the two, not the sum."),
    ]
    run_check("decode_step_seconds", _with_shapes(function), cases, advise=_on_seconds)


def _step(shape: str, card: str, contexts: list[int], hint: str) -> Case:
    batch_size = len(contexts)
    seconds = costs.step_seconds(
        getattr(shapes, shape), getattr(shapes, card), batch_size, batch_size, cached_tokens=sum(contexts)
    )
    return Case((Name(shape), Name(card), Contexts(contexts)), seconds, hint)


def _with_shapes(function: Callable) -> Callable:
    return lambda shape, card, contexts: function(getattr(shapes, shape), getattr(shapes, card), contexts)


def _on_seconds(got: Any, case: Case) -> str | None:
    """What is wrong with it: the unit, or what the maximum is taken of."""
    if not is_number(got) or not float(got) > 0:
        return None
    power = math.log10(float(got) / case.expected)
    if round(power) and math.isclose(power, round(power), abs_tol=1e-6):
        return f"That is 10^{round(power)} times as much: give seconds. The card's bandwidth is bytes per second."
    shape, card = (getattr(shapes, name) for name in case.args[:2])
    weights, contexts = costs.matmul_parameters(shape), case.args[2]
    caches = sum(contexts) * kv_bytes_per_token(shape) / card.bandwidth
    inside = max(2 * weights / card.bandwidth + caches, 2 * weights * len(contexts) / card.flops)
    if math.isclose(float(got), inside, rel_tol=1e-6):
        return "Reading the caches is added to the larger of the other two: it stands behind the max, not in it."
    return None


# --- slot_of ---------------------------------------------------------------------------------------------------------


def slot_of(function: Callable) -> None:
    """`slot_of(table, position, block_size)` -> the slot of a token: block * block_size + place in the block."""
    cases = [
        Case(([5, 2], 0, 4), 20, "Position 0 is place 0 of the first block in the table, here block 5."),
        Case(([5, 2], 6, 4), 10, "Position 6 is place 6 % 4 of logical block 6 // 4; the table says where that lies."),
        Case(([5, 2], 3, 4), 23, "Position 3 is the last place of the first block."),
        Case(([5, 2], 4, 4), 8, "Position 4 is the first place of the second block."),
        Case(([7, 1, 9, 3], 40, 16), 152, "Use `block_size`, not 4."),
        Case(([3, 8], 1, 1), 8, "With one token in a block, the table holds the slots themselves."),
    ]
    run_check("slot_of", function, cases, advise=_on_slot)


def _on_slot(got: Any, case: Case) -> str | None:
    """A block that was not looked up, or a place that was left out."""
    table, position, block_size = case.args
    block = table[position // block_size]
    known = {
        float(position): "That is the position itself: the table has not been asked where its block lies.",
        float(block): "That is the block. Multiply by `block_size`, and add the place in the block.",
        float(block * block_size): "That is where the block begins: add the place in the block.",
    }
    return known.get(float(got)) if is_number(got) else None


# --- paged_decode ----------------------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """A request as it lies in a pool: everything that is not its own is NaN."""

    q: Tensor  # [Hq, D]
    keys: Tensor  # [blocks, block_size, Hkv, D]
    values: Tensor
    k: Tensor  # the same keys and values, side by side: [length, Hkv, D]
    v: Tensor


def paged_decode(function: Callable) -> None:
    """`paged_decode(q, keys, values, table, length)` -> attention of the newest token, read through the table.

    q [Hq, D], keys and values [blocks, block_size, Hkv, D], all of them NaN where no token of the request lies.
    """
    cases = [
        _paged([2], 1, 1, 1, "One token: its weight is 1, and the output is its value."),
        _paged([1, 2], 7, 1, 1, "Blocks 1 and 2 lie in order: scores, divided by √D, softmax, sum of values."),
        _paged([5, 2], 7, 1, 1, "Token t lies in block table[t // block_size], at place t % block_size."),
        _paged([5, 2], 7, 4, 2, "4 query heads, 2 key heads: query head h reads key head h // 2."),
        _paged([3, 6, 1], 12, 4, 4, "Three full blocks, and a key head for each query head."),
        _paged([4, 1, 7], 9, 6, 1, "All query heads share one key head."),
    ]
    run_check("paged_decode", function, cases, same=_near, advise=_on_decode)


def _paged(table: list[int], length: int, num_heads: int, num_kv_heads: int, hint: str) -> Case:
    pool = _pool(table, length, num_heads, num_kv_heads)
    return Case((pool.q, pool.keys, pool.values, table, length), _attention(pool.q, pool.k, pool.v), hint)


def _pool(table: list[int], length: int, num_heads: int, num_kv_heads: int, block_size: int = 4) -> Pool:
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(num_heads, 8, generator=generator)
    k, v = torch.randn(2, length, num_kv_heads, 8, generator=generator)
    keys, values = torch.full((2, 8, block_size, num_kv_heads, 8), math.nan)
    token = torch.arange(length)
    place = torch.tensor(table)[token // block_size], token % block_size
    keys[place], values[place] = k, v
    return Pool(q, keys, values, k, v)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """[Hq, D] query that sees all of [n, Hkv, D] keys and values -> [Hq, D]."""
    k, v = (x.repeat_interleave(len(q) // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("hd,khd->hk", q, k) * (scale or q.shape[-1] ** -0.5)
    return torch.einsum("hk,khd->hd", scores.softmax(-1), v)


def _near(got: Any, expected: Tensor) -> bool:
    got = to_tensor(got)
    return got is not None and got.shape == expected.shape and torch.allclose(got.float(), expected, rtol=0, atol=1e-4)


def _on_decode(got: Any, case: Case) -> str | None:
    """What typical mistakes give."""
    got, (q, keys, values, table, length) = to_tensor(got), case.args
    if got is None or got.shape != case.expected.shape:
        return f"The output has the shape of `q`, {tuple(q.shape)}."
    if got.isnan().any():
        return "NaN: a place was read in which no token of the request lies. Its tokens are 0 to length - 1."
    token = torch.arange(length)
    place = torch.tensor(table)[token // keys.shape[1]], token % keys.shape[1]
    k, v = keys[place], values[place]
    if _near(got, _attention(q, k, v, scale=1.0)):
        return "The scores are not divided by √D."
    heads = torch.arange(len(q)) % k.shape[1]
    if _near(got, _attention(q, k[:, heads], v[:, heads])):
        return "Query heads that share a key head are neighbours: head // group, not head % number of key heads."
    return None


# --- merge_softmax ---------------------------------------------------------------------------------------------------


class Part(tuple):
    """(best, total, acc) of some keys, printed with few digits."""

    def __repr__(self) -> str:
        best, total, acc = self
        return f"({float(best):.4g}, {float(total):.4g}, [{', '.join(f'{x:.4g}' for x in acc.tolist())}])"


def merge_softmax(function: Callable) -> None:
    """`merge_softmax(one, other)` -> (best, total, acc) of all keys, from those of two parts."""
    cases = [
        _parts([1.0, 2.0], [2.0, 0.5], "Both have the same largest score: totals and sums are added."),
        _parts([1.0, 2.0], [3.0], "The other part has the larger score: the first one's sums count for less."),
        _parts([5.0, -1.0], [2.0, 2.0], "The first part has the larger score: the other one's sums count for less."),
        _parts([800.0], [799.0, 790.0], "exp(800) is infinite: take the exponent of a difference, best - new best."),
        _parts([-900.0], [-901.0], "exp(-900) is 0: take the exponent of a difference, best - new best."),
        _parts([0.5, 1.5], [], "An empty part has best = -inf, total = 0 and acc = 0: it changes nothing."),
        _parts([], [-3.0], "The first part is empty: the result is the other one."),
        _parts([], [], "Both are empty: -inf - -inf is NaN. Measure exponents from 0 where nothing has been seen."),
    ]
    run_check("merge_softmax", function, cases, show=_show_part)


def _parts(one: list[float], other: list[float], hint: str) -> Case:
    generator = torch.Generator().manual_seed(len(one) + 3 * len(other))
    v = torch.randn(len(one) + len(other), 3, generator=generator)
    parts = _part(one, v[: len(one)]), _part(other, v[len(one) :])
    return Case(parts, _part(one + other, v), hint)


def _part(scores: list[float], v: Tensor) -> Part:
    best = torch.tensor(max(scores, default=-math.inf))
    weights = (torch.tensor(scores) - best).exp()
    return Part((best, weights.sum(), weights @ v))


def _show_part(got: Any) -> str:
    try:
        return repr(Part(to_tensor(each) for each in got))
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return describe(got)


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

    @property
    def num_partial_sums(self) -> int:
        """A thread holds one for each key of which it reads anything."""
        row = [[number // HEAD_SIZE for number in load] for load in self.first]
        return len({(thread, load[thread]) for load in row for thread in range(NUM_THREADS)})


def key_number(function: Callable) -> None:
    """`key_number(load, thread, head, num_heads)` -> which number of a block [16 keys, heads, 64] a thread reads first.

    32 threads make 4 loads each of 8 numbers (of 2 bytes) in a row. They must read every number of the head's keys
    once, fetch no sector of 32 bytes twice, and leave no more than two partial sums for each key. Any order will do.
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
    wanted = {first_number(key, head, num_heads) + i for key in range(NUM_KEYS) for i in range(HEAD_SIZE)}
    case = _all_loads(head, num_heads, "every number of the head's keys once")
    if foreign := sorted(set(numbers) - wanted):
        owner = foreign[0] // HEAD_SIZE % num_heads
        hint = "From one key to the next it is num_heads · 64 numbers; a head's 64 begin at head · 64."
        _refuse(case, f"number {foreign[0]}, which belongs to head {owner}", hint)
    if missing := sorted(wanted - set(numbers)):
        hint = "There are 4 · 32 loads and 16 · 8 pieces of 8 numbers: each piece belongs to one load."
        _refuse(case, f"{len(missing)} numbers read by nobody, the first is {missing[0]}", hint)
    budget = NUM_KEYS * HEAD_SIZE * NUMBER_BYTES // SECTOR_BYTES
    if reads.num_sectors > budget:
        hint = "In one load, let threads that are neighbours read numbers that are neighbours."
        case = _all_loads(head, num_heads, f"{budget} sectors")
        _refuse(case, f"{reads.num_sectors} sectors fetched: {[len(load) for load in reads.sectors]} by load", hint)
    if reads.num_partial_sums > 2 * NUM_KEYS:
        hint = "Give each key to two threads alone. Which pieces of it may they read in one load, and share a sector?"
        case = _all_loads(head, num_heads, f"{2 * NUM_KEYS} partial sums")
        _refuse(case, f"{reads.num_partial_sums} partial sums, with {reads.num_sectors} sectors fetched", hint)


def _check_number(function: Callable, load: int, thread: int, head: int, num_heads: int) -> None:
    """One answer alone: a whole number inside the block at which a load of 16 bytes may begin."""
    most = NUM_KEYS * num_heads * HEAD_SIZE - VECTOR
    case = Case((load, thread, head, num_heads), f"a multiple of 8 from 0 to {most}", "")
    got = call("key_number", function, case, str)
    number = number_of(got)
    if number is None or number % 1:
        _refuse(case, describe(got), "Give a whole number: `//` divides without a rest.")
    if not 0 <= number <= most:
        _refuse(case, describe(got), "Is it in bytes? Count in numbers (2 bytes each) from the block's first.")
    if number % VECTOR:
        _refuse(case, describe(got), "A load of 8 numbers, 16 bytes, must begin at a multiple of 16 bytes.")


def first_number(key: int, head: int, num_heads: int) -> int:
    """Where a head's 64 numbers of a key begin in the block."""
    return (key * num_heads + head) * HEAD_SIZE


def _all_loads(head: int, num_heads: int, expected: str) -> Case:
    return Case((Name("all loads"), Name("all threads"), head, num_heads), expected, "")


def _refuse(case: Case, got: str, hint: str) -> None:
    raise CheckFailed(failure("key_number", replace(case, hint=hint), f"got       {got}", case.expected))
