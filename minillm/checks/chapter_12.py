"""Chapter 12, more than one: a matrix cut in parts, a sum over ranks and its time, and which replica gets a request."""

import math
import random
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from minillm.checks.base import Case, describe, number_of, run_check, same_number, same_tensor, to_tensor
from minillm.costs import follow_plan, is_complete
from minillm.errors import ConfigError

# --- part_of ---------------------------------------------------------------------------------------------------------


def part_of(function: Callable) -> None:
    """`part_of(weight, rank, size, by)` -> the rank's part of [inputs, outputs], cut by "columns" or by "rows"."""
    run_check("part_of", function, _part_cases(), advise=_advise_part)


def _part_cases() -> Iterator[Case]:
    hints = {
        "columns": "The parts side by side must be the whole matrix: a rank has neighbouring columns, and all rows.",
        "rows": "The parts below each other must be the whole matrix: a rank has neighbouring rows, and all columns.",
    }
    for rows, columns, size in ((4, 6, 2), (6, 4, 2), (6, 12, 3), (8, 8, 4), (3, 5, 1)):
        weight = torch.arange(rows * columns, dtype=torch.float64).reshape(rows, columns)
        for by, dim in (("columns", 1), ("rows", 0)):
            if weight.shape[dim] % size == 0:
                for rank, part in enumerate(weight.chunk(size, dim)):
                    yield Case((weight, rank, size, by), part, hints[by])


def _advise_part(got: Any, case: Case) -> str | None:
    weight, rank, size, by = case.args
    found, (rows, columns) = to_tensor(got), weight.shape
    if found is None or found.ndim != 2:
        return None
    if found.shape != case.expected.shape:
        other = (rows // size, columns) if by == "columns" else (rows, columns // size)
        if tuple(found.shape) == other:
            return 'This is cut the other way: weight[:, a:b] are columns, "rows" are weight[a:b].'
        return f"Each of {size} ranks has 1/{size} of the {by}."
    first = case.args[0].chunk(size, 1 if by == "columns" else 0)[0]
    if rank and same_tensor(found, first):
        return f"This is the part of rank 0, and rank {rank} has another: the first number depends on the rank."
    return None


# --- mlp_on_rank -----------------------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """What all ranks returned, and how many sums each asked for."""

    outputs: list[Any]
    num_sums: list[int]

    def __str__(self) -> str:
        if len({str(describe(output)) for output in self.outputs}) == 1:
            words = f"{describe(self.outputs[0])} on every rank"
        else:
            words = "; ".join(f"rank {rank} {describe(output)}" for rank, output in enumerate(self.outputs))
        return f"{words}; sums: {', '.join(map(str, self.num_sums))}"


def mlp_on_rank(function: Callable) -> None:
    """`mlp_on_rank(x, gate, up, down, add_up)` -> x + the whole MLP of x, from a rank's parts, with one sum.

    The ranks are threads here, each with its parts and an `add_up` that waits for the others.
    """
    run_check(
        "mlp_on_rank",
        lambda x, gate, up, down, size: _on_threads(function, x, gate, up, down, size),
        _mlp_cases(),
        same=_is_mlp,
        show=str,
        advise=_advise_mlp,
    )


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """[T, hidden] -> [T, hidden], with the residual; the whole matrices are [inputs, outputs]."""
    return x + (silu(x @ gate) * (x @ up)) @ down


def _mlp_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(12)
    for tokens, hidden, wide, size in ((1, 2, 4, 2), (3, 4, 8, 2), (2, 3, 9, 3), (2, 4, 8, 1)):
        shapes = (tokens, hidden), (hidden, wide), (hidden, wide), (wide, hidden)
        x, gate, up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        expected = Ranks([mlp(x, gate, up, down)] * size, [1] * size)
        hint = "Gate and up give this rank's part of the wide vector; down makes of it one term of the sum over ranks."
        yield Case((x, gate, up, down, size), expected, hint)


def _on_threads(function: Callable, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, size: int) -> Ranks:
    """Every rank in a thread of its own. Raises what a rank has raised, the first one that did."""
    barrier, brought = threading.Barrier(size, timeout=5), [None] * size
    found, errors = Ranks([None] * size, [0] * size), []

    def compute(rank: int) -> None:
        def add_up(term: Tensor) -> Tensor:
            found.num_sums[rank] += 1
            brought[rank] = term.clone()
            barrier.wait()
            total = sum(brought)
            barrier.wait()
            return term.copy_(total)  # in place, as torch.distributed does

        try:
            parts = (each.chunk(size, dim)[rank].clone() for each, dim in ((gate, 1), (up, 1), (down, 0)))
            found.outputs[rank] = function(x.clone(), *parts, add_up)
        except threading.BrokenBarrierError:
            pass  # another rank raised an error, or asked for more sums
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=compute, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def _is_mlp(got: Ranks, expected: Ranks) -> bool:
    right = all(same_tensor(one, other) for one, other in zip(got.outputs, expected.outputs, strict=True))
    return right and got.num_sums == expected.num_sums


def _advise_mlp(got: Ranks, case: Case) -> str | None:
    x, *_, size = case.args
    if all(output is None for output in got.outputs):
        return "Your function returned nothing: does it end with `return`?"
    if any(number > 1 for number in got.num_sums):
        return (
            "One sum is enough. The wide vector stays in parts: each rank has the columns of gate and up that belong "
            "to its rows of down."
        )
    if not any(got.num_sums):
        return "Each rank has one term of the sum only: add_up gives it the sum of all."
    output, whole = to_tensor(got.outputs[0]), case.expected.outputs[0]
    if output is None or output.shape != whole.shape:
        return f"Return [T, hidden], as x is: {tuple(whole.shape)}."
    if same_tensor(output, whole - x):
        return "x itself is missing: the residual is added as well."
    if size > 1 and same_tensor(output, whole + (size - 1) * x):
        return f"x is in the sum {size} times, once for each rank: add it behind the sum."
    return None


# --- ring_seconds ----------------------------------------------------------------------------------------------------


def ring_seconds(function: Callable) -> None:
    """`ring_seconds(num_bytes, num_ranks, bandwidth, latency)` -> seconds of an all-reduce in a ring."""
    run_check("ring_seconds", function, _ring_cases(), advise=_advise_ring)


def _ring_cases() -> Iterator[Case]:
    pieces = "In each round a rank sends one piece, and a vector has as many pieces as there are ranks."
    yield Case((8000, 4, 1e9, 0.0), 12e-6, f"Without latency: six rounds of a quarter of the bytes. {pieces}")
    yield Case((0, 3, 1e9, 5e-6), 20e-6, "Without bytes each round still takes the latency, and three ranks have 4.")
    yield Case((8000, 2, 1e9, 0.0), 8e-6, f"Two ranks: two rounds of half the bytes. {pieces}")
    yield Case((0, 8, 1e9, 5e-6), 70e-6, "Eight ranks: n - 1 rounds until the sums are whole, n - 1 to hand them on.")
    yield Case((8192, 8, 300e9, 4e-6), 14 * (4e-6 + 1024 / 300e9), "Each round takes its latency and its bytes.")
    yield Case((8192, 1, 300e9, 4e-6), 0.0, "A single rank sends nothing.")


def _advise_ring(got: Any, case: Case) -> str | None:
    seconds = number_of(got)
    if seconds is None:
        return "Return one number of seconds."
    num_bytes, num_ranks, bandwidth, latency = case.args
    if same_number(2 * seconds, case.expected):
        return "This is half of it: n - 1 rounds make whole sums, and n - 1 more hand them to everybody."
    if same_number(seconds, 2 * (num_ranks - 1) * (latency + num_bytes / bandwidth)):
        return "A round carries one piece, not the whole vector."
    return None


# --- fast_plan -------------------------------------------------------------------------------------------------------


@dataclass
class Planned:
    """What a plan costs; without `problem` it is an all-reduce."""

    num_ranks: int
    rounds: int = 0
    most_sent: int = 0  # pieces, by the busiest rank
    problem: str = ""

    @classmethod
    def of(cls, plan: Any, num_ranks: int) -> "Planned":
        """Follow the plan. `problem` says why it is none, or what is still missing at its end."""
        try:
            rounds = [[(int(a), int(b), [int(each) for each in pieces]) for a, b, pieces in each] for each in plan]
        except (TypeError, ValueError):
            return cls(num_ranks, problem="no list of rounds, each a list of (sender, receiver, pieces)")
        sent = [0] * num_ranks
        try:
            last = follow_plan(rounds, num_ranks)[-1]
        except ConfigError as error:
            return cls(num_ranks, len(rounds), problem=str(error))
        for each in rounds:
            for sender, _, pieces in each:
                sent[sender] += len(pieces)
        missing = next(
            (f"at the end rank {rank} has piece {piece} as a sum over {len(terms)} of {num_ranks} ranks"
             for rank, held in enumerate(last) for piece, terms in enumerate(held) if len(terms) < num_ranks),
            "",
        )  # fmt: skip
        assert is_complete(last) == (not missing)
        return cls(num_ranks, len(rounds), max(sent), missing)

    @classmethod
    def budget(cls, num_ranks: int) -> "Planned":
        """Rounds of a butterfly, and no more pieces than the ring sends."""
        return cls(num_ranks, 2 * int(math.log2(num_ranks)), 2 * (num_ranks - 1))

    def within(self, budget: "Planned") -> bool:
        return not self.problem and self.rounds <= budget.rounds and self.most_sent <= budget.most_sent

    def __str__(self) -> str:
        return self.problem or f"{self.rounds} rounds, and at most {self.most_sent} pieces sent by a rank"


def fast_plan(function: Callable) -> None:
    """`fast_plan(num_ranks)` -> rounds of (sender, receiver, pieces): an all-reduce in 2 log2(n) rounds.

    The budget: so many rounds, and at most 2 (n - 1) pieces sent by each rank, as in the ring. n is a power of two.
    """
    cases = [
        Case((num_ranks,), Planned.budget(num_ranks), "In the first half of the rounds, what a rank works on halves.")
        for num_ranks in (2, 4, 8, 16)
    ]
    run_check(
        "fast_plan",
        lambda num_ranks: Planned.of(function(num_ranks), num_ranks),
        cases,
        same=Planned.within,
        show=str,
        advise=_advise_plan,
    )


def _advise_plan(got: Planned, case: Case) -> str | None:
    if got.problem:
        return "A round is a list of (sender, receiver, pieces); each rank sends and receives one message at most."
    if got.rounds > case.expected.rounds:
        return (
            f"The ring has {2 * (got.num_ranks - 1)} rounds, because a term travels one place per round. Let partners "
            "be far apart first: ranks that differ in one bit."
        )
    return "Whole vectors in every round are too many pieces: send only what the partner goes on working on."


# --- choose_replica --------------------------------------------------------------------------------------------------


def choose_replica(function: Callable) -> None:
    """`choose_replica(blocks, sent, loads, most_ahead)` -> the number of the replica that gets the prompt.

    `sent` is a list of sets of blocks, `loads` a list of numbers of requests, both by replica.
    """
    run_check("choose_replica", function, _choice_cases())


def chosen(blocks: Sequence[Hashable], sent: Sequence[set], loads: Sequence[int], most_ahead: int) -> int:
    """The rule: the longest beginning, unless that replica is ahead by more than `most_ahead`; then the least load."""

    def held(replica: int) -> int:
        return next((count for count, block in enumerate(blocks) if block not in sent[replica]), len(blocks))

    replicas = range(len(loads))
    best = min(replicas, key=lambda replica: (-held(replica), loads[replica]))
    if not held(best) or loads[best] > min(loads) + most_ahead:
        return min(replicas, key=lambda replica: loads[replica])
    return best


def _choice_cases() -> Iterator[Case]:
    for blocks, sent, loads, most_ahead, hint in (
        (["a"], [{"b"}, {"a"}, set()], [3, 3, 3], 8, "Replica 1 was sent the block, and all have as much to do."),
        (["a", "b", "c"], [{"a"}, set(), {"a", "b", "c"}], [1, 0, 2], 8, "Replica 2 has three blocks, replica 0 one."),
        (
            ["a", "b", "c"],
            [{"b", "c"}, {"a"}],
            [0, 0],
            8,
            "Count from the first block on, up to the first that is missing: without block a the cache has no use for "
            "b and c.",
        ),
        (
            ["a"],
            [{"a"}, set()],
            [20, 0],
            8,
            "20 requests are more than 8 ahead of 0: the least loaded gets it.",
        ),
        (["a"], [{"a"}, set()], [8, 0], 8, "8 ahead is not more than most_ahead = 8: the prefix decides."),
        (["a"], [{"a"}, set(), set()], [9, 9, 0], 8, "Compare with the least loaded replica, not with the mean."),
        (["a", "b"], [{"a", "b"}, {"a", "b"}], [5, 2], 8, "Both hold the same: the less loaded of them."),
        (["a"], [{"b"}, {"c"}, {"d"}], [4, 1, 2], 8, "Nobody holds a block of it: the least loaded replica."),
        ([], [{"b"}, {"c"}], [4, 1], 8, "A prompt without a full block has no prefix: the least loaded replica."),
        (["a"], [set(), {"a"}], [6, 6], 0, "Nobody is ahead: with most_ahead = 0 the prefix still decides."),
        (["a"], [set(), set(), set()], [2, 1, 1], 8, "Two have the least load: the lower number."),
        (["a"], [set(), {"a"}, {"a"}], [0, 3, 3], 8, "Two hold as much and have as much to do: the lower number."),
        (["a", "b"], [{"a", "b"}, {"a"}, set()], [20, 3, 2], 8, "The best is too busy: now only the load counts."),
    ):
        yield Case((blocks, sent, loads, most_ahead), chosen(blocks, sent, loads, most_ahead), hint)
    draw = random.Random(12)
    for _ in range(40):
        num_replicas = draw.randint(2, 5)
        sent = [set(draw.sample("abcde", draw.randrange(5))) for _ in range(num_replicas)]
        loads = [draw.randrange(9) for _ in range(num_replicas)]
        arguments = list("abcde"[: draw.randrange(5)]), sent, loads, draw.randrange(7)
        yield Case(arguments, chosen(*arguments), "First the replica with the longest beginning, then its load.")
