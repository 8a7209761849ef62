"""Chapter 5, static and dynamic batching: rectangles, pads, the masks of padded rows, and what all of it wastes."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from minillm.attention import masks
from minillm.checks.base import Case, as_list, describe, nested, realised, run_check, same_value


def padding(function: Callable) -> None:
    """`padding(lengths)` -> how many pads fill the rectangle up."""
    hints = {
        (2, 5, 10): "Every row is filled up to the longest, 10: 8 + 5 + 0 pads.",
        (7,): "One prompt is its own rectangle.",
        (4, 4, 4): "Prompts of one length need no pads.",
        (9, 1, 1, 1): "The longest need not be the last: take max(lengths), not lengths[-1].",
        (1, 1000): "Count the pads, not all tokens of the rectangle and not the real ones.",
    }
    cases = [
        Case((list(lengths),), len(lengths) * max(lengths) - sum(lengths), hint) for lengths, hint in hints.items()
    ]
    run_check("padding", function, cases)


# left_pad ---------------------------------------------------------------------------------------


class Padded(NamedTuple):
    """What `left_pad` returns, as nested lists; a position of None is a pad's, which may be anything."""

    rectangle: Any  # [B][L]
    positions: Any  # [B][L]
    changed_prompts: list[list[int]] | None = None  # the prompts after the call, if that changed them


def left_pad(function: Callable) -> None:
    """`left_pad(prompts, pad_id)` -> (rectangle, positions), both [B, L]; the positions of pads are not looked at."""
    inputs = {
        "Every row is as long as the longest prompt.": ([[5, 6], [7, 8, 9, 10]], 0),
        "A row may have one token and the rest pads.": ([[5, 6, 7], [8]], 0),
        "The pads must be the pad_id that was given.": ([[5], [6, 7]], 99),
        "A prompt may contain the pad_id as a token: count positions from its length, not from the ids.": (
            ([[0, 5, 0], [6, 7, 8, 9, 4]]),
            0,
        ),
        "Prompts of one length get no pads at all.": ([[5, 6], [7, 8]], 0),
        "One prompt is its own rectangle: still [1, L].": ([[5, 6, 7]], 0),
    }
    cases = [Case((prompts, pad_id), _padded(prompts, pad_id), hint) for hint, (prompts, pad_id) in inputs.items()]
    run_check("left_pad", _observed(function), cases, same=_same_padded, show=_show_padded, advise=_on_padded)


def _padded(prompts: Sequence[Sequence[int]], pad_id: int) -> Padded:
    length = max(map(len, prompts))
    return Padded(
        [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts],
        [[None] * (length - len(prompt)) + list(range(len(prompt))) for prompt in prompts],
    )


def _observed(function: Callable) -> Callable:
    """The reader's function, with an eye on what happens to the prompts. What is no pair is returned as it is."""

    def observed(prompts: list[list[int]], pad_id: int) -> Any:
        before = copy.deepcopy(prompts)
        answer = as_list(realised(function(prompts, pad_id)))
        if not isinstance(answer, list) or len(answer) != 2:
            return answer
        return Padded(*map(nested, answer), None if prompts == before else prompts)

    return observed


def _same_padded(got: Any, expected: Padded) -> bool:
    if not isinstance(got, Padded) or got.changed_prompts is not None:
        return False
    return same_value(got.rectangle, expected.rectangle) and _same_positions(got.positions, expected.positions)


def _same_positions(got: Any, expected: list[list[int | None]]) -> bool:
    """In the places of tokens; pads may have any number."""
    if not isinstance(got, list) or len(got) != len(expected):
        return False
    return all(map(_same_row, got, expected))


def _same_row(got: Any, expected: list[int | None]) -> bool:
    if not isinstance(got, list) or len(got) != len(expected):
        return False
    return all(wanted is None or same_value(place, wanted) for place, wanted in zip(got, expected, strict=True))


def _on_padded(got: Any, case: Case) -> str | None:
    """Which of the two is wrong, and how."""
    rows = got.rectangle if isinstance(got, Padded) else None
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return "Return two things: the rectangle of ids and the positions, both with a row for each prompt."
    prompts, pad_id = case.args
    length = max(map(len, prompts))
    if not same_value(got.rectangle, case.expected.rectangle):
        behind = [list(prompt) + [pad_id] * (length - len(prompt)) for prompt in prompts]
        right = same_value(got.rectangle, behind)
        return "Pads go in front, so that every row ends with its newest token; these are behind." if right else None
    if got.changed_prompts is not None:
        return "The caller goes on using its lists: make new rows, and leave the prompts as they are."
    if same_value(got.positions, [list(range(length)) for _ in prompts]):
        return "The rectangle is right; the positions count the pads. A row's own tokens have 0, 1, 2, ..."
    if any(pad_id in prompt for prompt in prompts):
        return None
    return "The rectangle is right, the positions are not: a row's own tokens have 0, 1, 2, ..."


def _show_padded(answer: Any) -> str:
    if not isinstance(answer, Padded):
        return describe(answer)
    changed = "" if answer.changed_prompts is None else f"; and the prompts are now {describe(answer.changed_prompts)}"
    return f"rectangle {_rows(answer.rectangle)}, positions {_rows(answer.positions)}{changed}"


def _rows(value: Any) -> str:
    """Rows in brackets; `-` stands for a pad's position, which may be anything."""
    return describe(value).replace("None", "-")


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


def static_batch_tokens(function: Callable) -> None:
    """`static_batch_tokens(prompt_lengths, output_lengths)` -> computed tokens until the longest request has ended."""
    hints = {
        ((4,), (1,)): "The first pass gives the first output token: with one token a request, it is the only pass.",
        ((4,), (3,)): "4 computed tokens give the first new one, then 2 passes of 1: the last token is never fed back.",
        ((2, 5, 10), (1, 1, 1)): "The first pass is the rectangle of the prompts: 3 rows of 10.",
        ((2, 5, 10), (2, 5, 16)): "Then 15 passes, until the longest has 16 tokens; every row is computed in each.",
        ((2, 5, 10), (16, 5, 2)): "The longest prompt and the longest output may belong to different requests.",
        ((7, 7, 7, 7), (20, 20, 20, 20)): "Without padding, too: 4 * 7 tokens, then 19 passes of 4.",
    }
    cases = [Case((list(p), list(o)), len(p) * (max(p) + max(o) - 1), hint) for (p, o), hint in hints.items()]
    run_check("static_batch_tokens", function, cases)


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
