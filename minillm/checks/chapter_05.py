"""Chapter 5, static and dynamic batching: rectangles, pads, the masks of padded rows, and what all of it wastes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from minillm import masks
from minillm.checks.base import Case, describe, run_check, same_value


def padding(function: Callable) -> None:
    """`padding(lengths)` -> how many pads fill the rectangle up."""
    hints = {
        (2, 5, 10): "Every row is filled up to the longest, 10: 8 + 5 + 0 pads.",
        (7,): "One prompt is its own rectangle.",
        (4, 4, 4): "Prompts of one length need no pads.",
        (9, 1, 1, 1): "The longest need not be the last: take max(lengths), not lengths[-1].",
        (1, 1000): "Count the pads, not the rectangle's slots and not the real tokens.",
    }
    cases = [
        Case((list(lengths),), len(lengths) * max(lengths) - sum(lengths), hint) for lengths, hint in hints.items()
    ]
    run_check("padding", function, cases)


# left_pad ---------------------------------------------------------------------------------------


class Padded(NamedTuple):
    """What `left_pad` returns, as nested lists; a position of None is a pad's, which may be anything."""

    rectangle: list[list[int]]
    positions: list[list[int | None]]


def left_pad(function: Callable) -> None:
    """`left_pad(prompts, pad_id)` -> (rectangle, positions), both [B, L]; the positions of pads are not looked at."""
    inputs = {
        "Pads go in front, so that every row ends with its newest token.": ([[5, 6], [7, 8, 9, 10]], 0),
        "A row's own tokens have the positions 0, 1, 2, ...; its pads are not counted.": ([[5, 6, 7], [8]], 0),
        "The pads must be the pad_id that was given.": ([[5], [6, 7]], 99),
        "A prompt may contain the pad_id as a token: count positions from its length, not from the ids.": (
            ([[0, 5, 0], [6, 7, 8, 9, 4]]),
            0,
        ),
        "Prompts of one length get no pads at all.": ([[5, 6], [7, 8]], 0),
        "One prompt is its own rectangle: still [1, L].": ([[5, 6, 7]], 0),
    }
    cases = [Case((prompts, pad_id), _padded(prompts, pad_id), hint) for hint, (prompts, pad_id) in inputs.items()]
    run_check("left_pad", _on_copies(function), cases, same=_same_padded, show=_show_padded)


def _padded(prompts: Sequence[Sequence[int]], pad_id: int) -> Padded:
    length = max(map(len, prompts))
    return Padded(
        [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts],
        [[None] * (length - len(prompt)) + list(range(len(prompt))) for prompt in prompts],
    )


def _on_copies(function: Callable) -> Callable:
    """The reader's function on lists of its own, so that one that writes into them spoils no message."""

    def on_copies(prompts: list[list[int]], pad_id: int) -> Any:
        return function([list(prompt) for prompt in prompts], pad_id)

    return on_copies


def _same_padded(got: Any, expected: Padded) -> bool:
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        return False
    rectangle, positions = map(_nested, got)
    if not same_value(rectangle, expected.rectangle) or not isinstance(positions, list):
        return False
    if [len(row) if isinstance(row, list) else None for row in positions] != [len(r) for r in expected.positions]:
        return False
    looked_at = [
        [None if wanted is None else place for place, wanted in zip(*rows, strict=True)]
        for rows in zip(positions, expected.positions, strict=True)
    ]
    return same_value(looked_at, expected.positions)


def _nested(value: Any) -> Any:
    """Tensors, arrays and tuples as nested lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_nested(item) for item in value] if isinstance(value, (list, tuple)) else value


def _show_padded(answer: Any) -> str:
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        return describe(answer)
    return f"rectangle {_rows(answer[0])}, positions {_rows(answer[1])}"


def _rows(value: Any) -> str:
    """Rows in brackets; `-` stands for a pad's position, which may be anything."""
    return describe(_nested(value)).replace("None", "-")


# masks and counts ----------------------------------------------------------------------------------


def padding_mask(function: Callable) -> None:
    """`padding_mask(num_tokens, padded_length)` -> bool [L, L] of one row: pads in front, causal behind."""
    hints = {
        (5, 10): "Real tokens stand at the right end: the triangle is in the lower right corner, all else is False.",
        (2, 10): "Nobody looks at a pad: the first L - n columns are all False.",
        (3, 7): "A pad looks at nobody: the first L - n rows are all False, the diagonal too.",
        (10, 10): "Without pads this is the causal mask.",
        (1, 1): "One token sees itself. The answer is a bool tensor, not one of numbers.",
        (0, 4): "A row may be all pads, and then all False. (If you slice with [-n:], remember that -0 is 0.)",
    }
    run_check("padding_mask", function, [Case(args, masks.left_padded(*args), hint) for args, hint in hints.items()])


def static_slots(function: Callable) -> None:
    """`static_slots(prompt_lengths, output_lengths)` -> slots computed until the longest request of the batch ends."""
    hints = {
        ((4,), (1,)): "The first pass gives the first output token: with one token a request, it is the only pass.",
        ((4,), (3,)): "4 slots give the first token, then 2 passes of 1 slot: the last token is never fed back.",
        ((2, 5, 10), (1, 1, 1)): "The first pass is the rectangle of the prompts: 3 rows of 10.",
        ((2, 5, 10), (2, 5, 16)): "Then 15 passes, until the longest has 16 tokens; every row is computed in each.",
        ((2, 5, 10), (16, 5, 2)): "The longest prompt and the longest output may belong to different requests.",
        ((7, 7, 7, 7), (20, 20, 20, 20)): "Without padding, too: 4 * 7 slots, then 19 passes of 4.",
    }
    cases = [Case((list(p), list(o)), len(p) * (max(p) + max(o) - 1), hint) for (p, o), hint in hints.items()]
    run_check("static_slots", function, cases)


def joining_waste(function: Callable) -> None:
    """`joining_waste(n, B)` -> pads of a pass of B rows in which one computes a prompt of n tokens, the rest decode."""
    hints = {
        (100, 8): "7 rows decode: each has 1 real token and is filled up to 100.",
        (100, 9): "Eight decodes and the newcomer: B counts the newcomer too.",
        (1, 8): "A prompt of 1 token is as short as a decode: no pads.",
        (100, 1): "Nobody else is there: no pads.",
        (2, 2): "One row of 1 token beside one of 2: a single pad.",
        (4096, 32): "(n - 1) pads in each of the other B - 1 rows.",
    }
    cases = [Case((n, rows), (n - 1) * (rows - 1), hint) for (n, rows), hint in hints.items()]
    run_check("joining_waste", function, cases)
