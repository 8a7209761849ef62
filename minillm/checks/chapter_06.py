"""Chapter 6, ragged batching: the mask and the positions of one long row, attention over caches, and a puzzle."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.attention import masked_attention, masks
from minillm.checks.base import Case, as_list, describe, realised, run_check, same_value
from minillm.checks.chapter_05 import Groups
from minillm.simulation import course_requests


def block_diagonal_mask(function: Callable) -> None:
    """`block_diagonal_mask(lengths)` -> bool [n, n], n = sum of lengths: a causal block for each prompt."""
    hints = {
        (1,): "The answer is a bool tensor [n, n], not one of numbers. One token sees itself.",
        (3,): "A single prompt: this is the causal mask. Row = the token that attends; row i sees the columns 0..i.",
        (1, 1): "Two prompts of one token each: both see themselves, and neither sees the other.",
        (
            3,
            2,
        ): "Rows 3 and 4 belong to the second prompt. Row 3 begins anew: it sees column 3 only.",
        (2, 3): "The blocks stand in the order of `lengths`, and each has its own size.",
        (2, 5, 10): "There may be more than two prompts: the mask is 17 x 17.",
    }
    run_check("block_diagonal_mask", function, _cases(hints, masks.block_diagonal))


def restarting_positions(function: Callable) -> None:
    """`restarting_positions(lengths)` -> the position of every token in the row, counted within its own prompt."""
    hints = {
        (3,): "Counting begins at 0, and there is one position for each token.",
        (3, 2): "The second prompt starts at 0 again.",
        (1, 1, 1): "The first token of each prompt has position 0.",
        (2, 5, 10): "One flat row of 17 positions: 0..1, then 0..4, then 0..9.",
    }
    run_check("restarting_positions", function, _cases(hints, _positions))


# attention over several caches -------------------------------------------------------------------


class Step:
    """A pass that several requests share: (cached tokens, new tokens) of each, random numbers in all of them."""

    def __init__(self, *requests: tuple[int, int]):
        self.requests = requests
        draw = torch.Generator().manual_seed(6)

        def random(num: int, heads: int) -> Tensor:
            return torch.randn(num, heads, 8, generator=draw, dtype=torch.float64)

        total = sum(new for _, new in requests)
        self.q, self.k, self.v = random(total, 4), random(total, 2), random(total, 2)
        self.caches = [(random(cached, 2), random(cached, 2)) for cached, _ in requests]

    def __repr__(self) -> str:
        return ", ".join(f"{new} new behind {cached} cached" for cached, new in self.requests)


class Attended(NamedTuple):
    """The result: the rows, and the keys and values that are cached now."""

    out: Any  # [T, Hq, D]
    caches: Any  # a pair of [cached + new, Hkv, D] for each request


def attend_caches(function: Callable) -> None:
    """`attend_caches(q, k, v, lengths, caches)` -> (out [T, Hq, D], caches with the new keys and values in them)."""
    cases = [
        (((0, 3),), "One request and an empty cache: causal attention over the three new tokens."),
        (((0, 3), (0, 2)), "Cut q, k and v at the borders: the second request must not see the first."),
        (((4, 1),), "One new token behind four cached ones: it sees all five keys."),
        (((4, 3),), "Three new tokens behind four: masks.rectangular(3, 7), the last three rows of a causal mask."),
        (((5, 1), (0, 4), (2, 1)), "Every request has a cache of its own length: join the new keys to its own ones."),
    ]
    run_check(
        "attend_caches",
        lambda step: _attended(function, step),
        [Case((Step(*requests),), _attended(_each_by_itself, Step(*requests)), hint) for requests, hint in cases],
        same=_same_attended,
        show=_show_attended,
        advise=_keeps_old_caches,
    )


def _attended(function: Callable, step: Step) -> Any:
    answer = as_list(realised(function(step.q, step.k, step.v, [new for _, new in step.requests], step.caches)))
    if not isinstance(answer, list) or len(answer) != 2:
        return answer
    out, caches = answer
    return Attended(out, [as_list(pair) for pair in as_list(caches)] if isinstance(as_list(caches), list) else caches)


def _each_by_itself(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], caches: Sequence) -> tuple:
    outs, grown = [], []
    for q_, k_, v_, cache in zip(*(x.split(lengths) for x in (q, k, v)), caches, strict=True):
        keys, values = (torch.cat(pair) for pair in zip(cache, (k_, v_), strict=True))
        outs.append(masked_attention(q_, keys, values, masks.rectangular(len(q_), len(keys))))
        grown.append((keys, values))
    return torch.cat(outs), grown


def _same_attended(got: Any, expected: Attended) -> bool:
    if not isinstance(got, Attended) or not isinstance(got.caches, list) or len(got.caches) != len(expected.caches):
        return False
    pairs = zip(got.caches, expected.caches, strict=True)
    return same_value(got.out, expected.out) and all(same_value(own, wanted) for own, wanted in pairs)


def _keeps_old_caches(got: Any, case: Case) -> str | None:
    if isinstance(got, Attended) and same_value(got.out, case.expected.out):
        return "The rows are right. Return the grown caches beside them: for each request old and new keys, and values."
    return None


def _show_attended(answer: Any) -> str:
    if not isinstance(answer, Attended):
        return f"not (out, caches): {describe(answer)}"
    lengths = (
        [
            len(pair[0]) if isinstance(pair, list) and pair and hasattr(pair[0], "__len__") else "?"
            for pair in answer.caches
        ]
        if isinstance(answer.caches, list)
        else describe(answer.caches)
    )
    return f"out {describe(answer.out)}, caches of {lengths} tokens"


# the puzzle --------------------------------------------------------------------------------------

CALLS = 8


def few_rectangles(function: Callable) -> None:
    """`few_rectangles(lengths, num_calls)` -> lists of prompt numbers; scored are B masks of the longest in each.

    The budget is the fewest scores that `num_calls` rectangles can have.
    """
    cases = [
        ([5, 1, 5, 1], 2, "Prompts of about one length belong together: 2 * 25 + 2 * 1 scores."),
        ([3, 3, 4, 9], 2, "The groups need not be of one size: three of 4 and one of 9."),
        (
            [request.num_prompt_tokens for request in course_requests()],
            CALLS,
            "Sort, then choose where to cut: after "
            "the first k prompts, the rest is the same puzzle with one rectangle less.",
        ),
    ]
    run_check(
        "few_rectangles",
        lambda lengths, calls: Groups.of(
            function(list(lengths), calls), lengths, len(lengths), lambda own: len(own) * max(own) ** 2, calls
        ),
        [Case((lengths, calls), fewest_scores(lengths, calls), hint) for lengths, calls, hint in cases],
        same=Groups.within,
        show=Groups.show,
    )


def fewest_scores(lengths: Sequence[int], num_groups: int) -> int:
    """Groups are runs of the sorted lengths: best[n] for the n shortest, with one group more in each round."""
    ordered = sorted(lengths)
    best: list[float] = [0] + [math.inf] * len(ordered)
    for _ in range(num_groups):
        best = [0] + [
            min(best[first] + (end - first) * ordered[end - 1] ** 2 for first in range(end))
            for end in range(1, len(ordered) + 1)
        ]
    return int(best[-1])


def _cases(hints: Mapping[tuple[int, ...], str], answer: Callable) -> list[Case]:
    return [Case((list(lengths),), answer(list(lengths)), hint) for lengths, hint in hints.items()]


def _positions(lengths: Sequence[int]) -> list[int]:
    return [position for length in lengths for position in range(length)]
