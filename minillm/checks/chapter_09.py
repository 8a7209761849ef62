"""Chapter 9, the limits of decode: the time of a step, the batch where arithmetic takes over, who reads what."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from minillm import costs
from minillm.checks.base import Case, CheckFailed, call, describe, failure, is_number, number_of, run_check
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
        _step("LLAMA_2_7B", "H200", [2_048], "The cache is read besides: its tokens times the bytes a token has."),
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
        return f"That is 10^{round(power)} times as much: give seconds. The card's bandwidth is bytes a second."
    shape, card = (getattr(shapes, name) for name in case.args[:2])
    weights, contexts = costs.matmul_parameters(shape), case.args[2]
    caches = sum(contexts) * kv_bytes_per_token(shape) / card.bandwidth
    inside = max(2 * weights / card.bandwidth + caches, 2 * weights * len(contexts) / card.flops)
    if math.isclose(float(got), inside, rel_tol=1e-6):
        return "Reading the caches is added to the larger of the other two: it stands behind the max, not in it."
    return None


# --- compute_bound_batch ---------------------------------------------------------------------------------------------


def compute_bound_batch(function: Callable) -> None:
    """`compute_bound_batch(card, weight_bytes)` -> the smallest batch whose arithmetic takes as long as its weights."""
    cases = [
        _crossing("H200", 2, "2 · P · B / flops ≥ weight_bytes · P / bandwidth. P is on both sides."),
        _crossing("A100_80GB", 2, "A batch is a whole number of requests: the first one that is large enough."),
        _crossing("RTX_4090", 2, "The card's flops over its bandwidth says how many FLOP go with a byte."),
        _crossing("H200", 1, "Weights of one byte are read in half the time: the crossing comes at half the batch."),
        _crossing("A100_80GB", 4, "Weights of four bytes take twice as long to read."),
        _crossing(EVEN, 2, "It divides without a rest: at that batch the times are equal, and no more is needed."),
    ]
    run_check("compute_bound_batch", _with_card(function), cases, advise=_on_batch)


EVEN = "Card('a card of round numbers', memory_bytes=80_000_000_000, bandwidth=2e12, flops=400e12)"


def _crossing(card: str, weight_bytes: int, hint: str) -> Case:
    return Case((Name(card), weight_bytes), costs.compute_bound_batch(_card(card), weight_bytes), hint)


def _card(name: str) -> shapes.Card:
    if name == EVEN:
        return shapes.Card("a card of round numbers", 80_000_000_000, 2e12, 400e12)
    return getattr(shapes, name)


def _with_card(function: Callable) -> Callable:
    return lambda card, weight_bytes: function(_card(card), weight_bytes)


def _on_batch(got: Any, case: Case) -> str | None:
    """A number that would be right if it were rounded up."""
    short = is_number(got) and case.expected - 1 <= float(got) < case.expected
    return "A batch is a whole number, and just before the crossing is too few: round up." if short else None


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
    wanted = {first_number(key, head, num_heads) + i for key in range(NUM_KEYS) for i in range(HEAD_SIZE)}
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
