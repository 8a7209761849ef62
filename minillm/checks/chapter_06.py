"""Chapter 6, ragged batching: the mask, the positions and the last rows of one long row, and what is wasted."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from minillm.attention import masks
from minillm.checks.base import Case, run_check


def block_diagonal_mask(function: Callable) -> None:
    """`block_diagonal_mask(lengths)` -> bool [n, n], n = sum of lengths: a causal block for each prompt."""
    hints = {
        (1,): "The answer is a bool tensor [n, n], not one of numbers. One token sees itself.",
        (3,): "A single prompt: this is the causal mask. Row = the looking token, row i sees the columns 0..i.",
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


def last_rows(function: Callable) -> None:
    """`last_rows(lengths)` -> for each prompt the row of its last token in the joint row."""
    hints = {
        (3,): "Rows are counted from 0: the last of three rows is row 2.",
        (3, 2): "The second prompt's last token is the last row of all, row 4: add up the lengths, then subtract 1.",
        (1, 1, 1): "A prompt of one token: its first row is its last row.",
        (2, 5, 10): "One row a prompt: 2 - 1, then 2 + 5 - 1, then 2 + 5 + 10 - 1.",
    }
    run_check("last_rows", function, _cases(hints, _last_rows))


def utilisation(function: Callable) -> None:
    """`utilisation(lengths)` -> real tokens / computed tokens of the padded rectangle, in 0..1."""
    hints = {
        (2, 5, 10): "17 real tokens in a rectangle of 3 rows and 10 columns. A share between 0 and 1, not per cent.",
        (7, 7): "Equal lengths need no padding: 1.0.",
        (5,): "A single request needs no padding: 1.0.",
        (1, 100): "101 of 200 computed tokens are real: every row is as long as the longest request.",
        (10, 2, 5): "The longest request need not be the last one.",
    }
    run_check("utilisation", function, _cases(hints, _utilisation))


def wasted_share(function: Callable) -> None:
    """`wasted_share(lengths)` -> 1 - sum of squares / square of the sum."""
    hints = {
        (
            2,
            5,
            10,
        ): "Under one mask 17 * 17 = 289 pairs are scored, alone 4 + 25 + 100 = 129. Wasted: 160 / 289.",
        (5,): "A single prompt: both ways score 25 pairs, and nothing is wasted.",
        (1, 1): "Four pairs scored, two needed: half is wasted. No rounding.",
        (64,) * 16: "16 equal prompts: 15 of 16 pairs join two different prompts.",
        (3, 2): "25 pairs scored, 9 + 4 within a prompt: the wasted share is what is *left*, 12 / 25.",
    }
    run_check("wasted_share", function, _cases(hints, _wasted_share))


def _cases(hints: Mapping[tuple[int, ...], str], answer: Callable) -> list[Case]:
    return [Case((list(lengths),), answer(list(lengths)), hint) for lengths, hint in hints.items()]


def _positions(lengths: Sequence[int]) -> list[int]:
    return [position for length in lengths for position in range(length)]


def _last_rows(lengths: Sequence[int]) -> list[int]:
    return [end - 1 for end in accumulate(lengths)]


def _utilisation(lengths: Sequence[int]) -> float:
    return sum(lengths) / (len(lengths) * max(lengths))


def _wasted_share(lengths: Sequence[int]) -> float:
    return 1 - sum(length**2 for length in lengths) / sum(lengths) ** 2
