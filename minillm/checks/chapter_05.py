"""Chapter 5, static and dynamic batching: rectangles, pads, the masks of padded rows, a padded pass, and a puzzle."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.attention import masked_attention, masks
from minillm.checks.base import Case, as_list, describe, nested, number_of, realised, run_check, same_value
from minillm.ladder import CausalAttention
from minillm.model import Decoder, ModelConfig
from minillm.simulation import course_requests


def padding(function: Callable) -> None:
    """`padding(lengths)` -> pads that fill the rectangle up, and the share of it that is real tokens, in 0..1."""
    hints = {
        (
            2,
            5,
            10,
        ): "Every row is filled up to the longest, 10: 8 + 5 + 0 pads. Real are 17 of 30: a share, not per cent.",
        (7,): "One prompt is its own rectangle: no pads, and all of it is real.",
        (4, 4, 4): "Prompts of one length need no pads.",
        (9, 1, 1, 1): "The longest need not be the last: take max(lengths), not lengths[-1].",
        (1, 1000): "The rectangle has 2 rows of 1000 tokens; 1001 of them are real.",
    }
    cases = [Case((list(lengths),), _padding(lengths), hint) for lengths, hint in hints.items()]
    run_check("padding", function, cases)


def _padding(lengths: Sequence[int]) -> tuple[int, float]:
    computed = len(lengths) * max(lengths)
    return computed - sum(lengths), sum(lengths) / computed


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


# padding_mask ------------------------------------------------------------------------------------


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


# padded_pass -------------------------------------------------------------------------------------


class Batch:
    """Prompts of random ids as a rectangle, with the positions and the masks that go with it."""

    def __init__(self, *lengths: int):
        self.lengths = lengths
        draw = torch.Generator().manual_seed(5)
        self.prompts = [torch.randint(1, CONFIG.vocab_size, (length,), generator=draw) for length in lengths]
        longest = max(lengths)
        self.rectangle = torch.stack([pad_front(prompt, longest) for prompt in self.prompts])  # [B, L]
        self.positions = torch.stack([pad_front(torch.arange(length), longest) for length in lengths])  # [B, L]
        self.row_masks = torch.stack([masks.left_padded(length, longest) for length in lengths])  # [B, L, L]

    def __repr__(self) -> str:
        return f"model, rectangle and masks of prompts of {', '.join(map(str, self.lengths))} tokens"

    def alone(self, model: Decoder) -> Tensor:
        """[sum of lengths, hidden]: what the prompts get one by one."""
        return torch.cat([model(ids, torch.arange(len(ids)), CausalAttention(model.config)) for ids in self.prompts])


class Passed(NamedTuple):
    """What came of a call of `padded_pass`."""

    hidden: Any  # [sum of lengths, hidden] of the real tokens; whatever it returned, if that is no [B, L, hidden]
    passes: tuple[int, ...]  # tokens of each forward pass
    asked: bool = True  # the attention that was given has been called
    folded: bool = True  # what was returned is [B, L, hidden]
    placed: bool = True  # the first pass had the positions that were given; a constant offset of a row changes no score


def padded_pass(function: Callable) -> None:
    """`padded_pass(model, rectangle, positions, row_masks, attention)` -> hidden states [B, L, hidden], in one pass."""
    cases = [
        ((4,), "One row: flatten the rectangle for the model, and give what it returns its [B, L] back."),
        (
            (3, 3),
            "Two rows without pads. In `attend`, fold q, k and v to [B, L, heads, D]: each row attends to itself.",
        ),
        ((2, 5), "With pads: hand `row_masks` to the attention, and take the positions as they are given."),
        ((2, 5, 10), "Three rows in one forward pass of 30 tokens."),
    ]
    model = tiny_model()
    run_check(
        "padded_pass",
        lambda batch: _passed(function, model, batch),
        [
            Case((batch,), Passed(batch.alone(model), (batch.rectangle.numel(),)), hint)
            for batch, hint in ((Batch(*lengths), hint) for lengths, hint in cases)
        ],
        same=_same_pass,
        show=_show_pass,
    )


def _passed(function: Callable, model: Decoder, batch: Batch) -> Passed:
    passes, calls, placed = [], [], []
    columns = torch.arange(batch.rectangle.shape[1])
    real = torch.cat([columns >= len(columns) - length for length in batch.lengths])  # [B·L]

    class Counted:
        config, dtype, device, logits = model.config, model.dtype, model.device, model.logits

        def __call__(self, token_ids: Tensor, positions: Tensor, attend: Callable) -> Tensor:
            passes.append(len(token_ids))
            if len(positions) == len(real):
                placed.append(same_value(positions[real], batch.positions.flatten()[real]))
            return model(token_ids, positions, attend)

    def attention(*args, **named) -> Tensor:
        calls.append(1)
        return masked_attention(*args, **named)

    answer = function(Counted(), batch.rectangle, batch.positions, batch.row_masks, attention)
    shape = (*batch.rectangle.shape, model.config.hidden_size)
    folded = isinstance(answer, Tensor) and answer.shape == shape
    if folded:
        answer = torch.cat([row[-length:] for row, length in zip(answer, batch.lengths, strict=True)]).detach()
    return Passed(answer, tuple(passes), bool(calls), folded, all(placed))


def _same_pass(got: Passed, expected: Passed) -> bool:
    well = got.asked and got.folded and got.placed and got.passes == expected.passes
    return well and same_value(got.hidden, expected.hidden)


def _show_pass(answer: Passed) -> str:
    passes = ", ".join(map(str, answer.passes)) or "no"
    told = "" if answer.asked else "; the attention that was given is not used"
    told += "" if answer.placed else "; the positions are not those that were given"
    return f"forward passes of {passes} tokens, hidden states of the real ones {describe(answer.hidden)}{told}"


CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


def tiny_model() -> Decoder:
    """Two layers of random weights, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Decoder(CONFIG).double().eval().requires_grad_(False)


def pad_front(values: Tensor, length: int) -> Tensor:
    """[n] -> [length], zeros in front."""
    return torch.cat([values.new_zeros(length - len(values)), values])


# the puzzle --------------------------------------------------------------------------------------

BUDGET, IN_ORDER_OF_ARRIVAL = 15_000, 27_664


def static_batches(function: Callable) -> None:
    """`static_batches(lengths, rows)` -> lists of request numbers, so that static batching computes few tokens.

    `lengths` are (prompt, output) pairs. A batch of B computes B * (longest prompt + longest output - 1) tokens.
    """
    small = [(2, 9), (50, 3), (3, 8), (40, 2)]
    course = [(request.num_prompt_tokens, request.params.max_tokens) for request in course_requests()]
    cases = [
        (small, 2, 2 * (3 + 9 - 1) + 2 * (50 + 3 - 1), "Put the two long prompts together, and the two long outputs."),
        (
            course,
            16,
            BUDGET,
            "Exchange requests while that saves tokens, from several orders; sums of lengths come nearest.",
        ),
    ]
    run_check(
        "static_batches",
        lambda lengths, rows: Groups.of(
            function(copy.copy(lengths), rows), lengths, rows, lambda own: len(own) * _columns(own)
        ),
        [Case((lengths, rows), budget, hint) for lengths, rows, budget, hint in cases],
        same=Groups.within,
        show=Groups.show,
    )


def _columns(batch: Sequence[tuple[int, int]]) -> int:
    prompts, outputs = zip(*batch, strict=True)
    return max(prompts) + max(outputs) - 1


class Groups(NamedTuple):
    """Items in groups, as the puzzles of chapters 5 and 6 ask for them, and what they cost; or what is wrong."""

    cost: int | None
    wrong: str = ""

    @classmethod
    def of(cls, answer: Any, items: Sequence, most: int, cost: Callable, most_groups: int | None = None) -> "Groups":
        """`answer`: lists of numbers of `items`. `most` items go into a group, as few groups as that allows."""
        groups = [[number_of(number) for number in as_list(group)] for group in as_list(realised(answer))]
        groups = [group for group in groups if group]
        most_groups = most_groups or math.ceil(len(items) / most)
        numbers = sorted(number for group in groups for number in group if number is not None)
        if numbers != list(range(len(items))):
            return cls(None, f"not every number from 0 to {len(items) - 1} exactly once")
        if len(groups) > most_groups or max(map(len, groups)) > most:
            sizes = [len(group) for group in groups]
            return cls(None, f"groups of {sizes}; at most {most_groups} groups, each of at most {most}")
        return cls(sum(cost([items[number] for number in group]) for group in groups))

    @staticmethod
    def within(got: Any, budget: int) -> bool:
        """Complete, and within the budget."""
        return got.cost is not None and got.cost <= budget

    @staticmethod
    def show(answer: Any) -> str:
        """What it costs; a budget is a number."""
        if not isinstance(answer, Groups):
            return f"at most {answer:,}"
        return answer.wrong or f"{answer.cost:,}"
