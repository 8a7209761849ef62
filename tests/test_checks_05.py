"""Chapter 5's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from check_answers import message, passes
from minillm import checks
from minillm.attention import masks

# padding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda lengths: sum(max(lengths) - length for length in lengths),
        lambda lengths: len(lengths) * max(lengths) - sum(lengths),
        lambda lengths: (torch.tensor(lengths).max() - torch.tensor(lengths)).sum(),
        lambda lengths: np.sum(np.max(lengths) - np.array(lengths)).item(),
    ],
    ids=["rows", "rectangle", "tensor", "numpy"],
)
def test_padding_accepts(right, capsys):
    assert passes(checks.padding, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda lengths: len(lengths) * max(lengths), "got       30"),  # all computed
        (sum, "got       17"),  # the real tokens
        (lambda lengths: sum(lengths[-1] - length for length in lengths), "max(lengths), not lengths[-1]"),
        (lambda lengths: max(lengths) - min(lengths), "8 + 5 + 0 pads"),  # the shortest row's alone
        (lambda lengths: str(sum(max(lengths) - length for length in lengths)), "got       '13'"),
    ],
    ids=["slots", "tokens", "last", "one row", "text"],
)
def test_padding_refuses(wrong, told):
    assert told in message(checks.padding, wrong)


# left_pad -------------------------------------------------------------------------------------------


def pad_lists(prompts, pad_id):
    length = max(len(prompt) for prompt in prompts)
    rectangle = [[pad_id] * (length - len(prompt)) + prompt for prompt in prompts]
    positions = [[0] * (length - len(prompt)) + list(range(len(prompt))) for prompt in prompts]
    return rectangle, positions


def pad_tensors(prompts, pad_id):
    """Pads with the position -1, and one tensor each."""
    length = max(map(len, prompts))
    rectangle = torch.stack([F.pad(torch.tensor(p), (length - len(p), 0), value=pad_id) for p in prompts])
    positions = torch.stack([torch.arange(length) - (length - len(p)) for p in prompts])
    return rectangle, positions.clamp(min=-1)


def pad_in_place(prompts, pad_id):
    """Writes into the lists it was given, and returns a list of arrays and tuples."""
    length = max(map(len, prompts))
    positions = [(1,) * (length - len(p)) + tuple(range(len(p))) for p in prompts]
    for prompt in prompts:
        while len(prompt) < length:
            prompt.insert(0, pad_id)
    return [np.array(prompts), positions]


def pad_with_torch(prompts, pad_id):
    rows = [torch.tensor(prompt) for prompt in prompts]
    places = [torch.arange(len(prompt)) for prompt in prompts]
    sides = {"batch_first": True, "padding_side": "left"}
    return pad_sequence(rows, padding_value=pad_id, **sides), pad_sequence(places, **sides)


def pad_right(prompts, pad_id):
    length = max(map(len, prompts))
    rectangle = [prompt + [pad_id] * (length - len(prompt)) for prompt in prompts]
    return rectangle, [list(range(length)) for _ in prompts]


def pad_counting_pads(prompts, pad_id):
    rectangle, _ = pad_lists(prompts, pad_id)
    return rectangle, [list(range(len(row))) for row in rectangle]


def pad_always_zero(prompts, pad_id):
    return pad_lists(prompts, 0)


def pad_asking_the_ids(prompts, pad_id):
    rectangle = torch.tensor(pad_lists(prompts, pad_id)[0])
    return rectangle, ((rectangle != pad_id).cumsum(dim=1) - 1).clamp(min=0)


def pad_without_positions(prompts, pad_id):
    return pad_lists(prompts, pad_id)[0]


def pad_flat(prompts, pad_id):
    rectangle, positions = map(torch.tensor, pad_lists(prompts, pad_id))
    return rectangle.flatten(), positions.flatten()


@pytest.mark.parametrize("right", [pad_lists, pad_tensors, pad_with_torch])
def test_left_pad_accepts(right, capsys):
    assert passes(checks.left_pad, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (pad_right, "Pads go in front"),
        (pad_counting_pads, "positions [[0, 1, 2, 3], [0, 1, 2, 3]]"),
        (pad_always_zero, "the pad_id that was given"),
        (pad_asking_the_ids, "A prompt may contain the pad_id"),
        (pad_without_positions, "expected  rectangle [[0, 0, 5, 6], [7, 8, 9, 10]], positions [[-, -, 0, 1],"),
        (pad_in_place, "leave the prompts as they are"),
        (pad_flat, "rectangle [0, 0, 5, 6, 7, 8, 9, 10]"),
        (lambda prompts, pad_id: None, "got       None"),
    ],
)
def test_left_pad_refuses(wrong, told):
    assert told in message(checks.left_pad, wrong)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda prompts, pad_id: (pad_right(prompts, pad_id)[0], pad_lists(prompts, pad_id)[1]), "these are behind"),
        (pad_counting_pads, "The rectangle is right; the positions count the pads"),
        (lambda prompts, pad_id: (pad_lists(prompts, pad_id)[0], [[0] * 4] * len(prompts)), "the positions are not"),
        (pad_without_positions, "Return two things"),
    ],
)
def test_left_pad_hints_at_what_is_wrong(answer, told):
    assert told in message(checks.left_pad, answer).splitlines()[-1]


# padding_mask ---------------------------------------------------------------------------------------


def mask_in_a_corner(n, length):
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[length - n :, length - n :] = masks.causal(n)
    return mask


def mask_from_causal(n, length):
    mask = masks.causal(length)
    mask[:, : length - n] = False
    return mask


def mask_as_lists(n, length):
    return [[length - n <= column <= row for column in range(length)] for row in range(length)]


def mask_with_pads_on_the_diagonal(n, length):
    return mask_from_causal(n, length) | torch.eye(length, dtype=torch.bool)


def mask_with_pads_seen(n, length):
    return masks.causal(length)


def mask_of_right_padding(n, length):
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[:n, :n] = masks.causal(n)
    return mask


def mask_with_minus_zero(n, length):
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[-n:, -n:] = masks.causal(n)
    return mask


@pytest.mark.parametrize("right", [mask_in_a_corner, mask_from_causal, mask_as_lists, masks.left_padded])
def test_padding_mask_accepts(right, capsys):
    assert passes(checks.padding_mask, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (mask_with_pads_seen, "lower right corner"),
        (mask_of_right_padding, "lower right corner"),
        (mask_with_pads_on_the_diagonal, "lower right corner"),
        (lambda n, length: mask_in_a_corner(n, length).float(), "got       tensor (10, 10)"),
        (lambda n, length: masks.causal(n), "got       mask (5, 5)"),
        (mask_with_minus_zero, "remember that -0 is 0"),
    ],
    ids=["pads seen", "right", "diagonal", "numbers", "too small", "minus zero"],
)
def test_padding_mask_refuses(wrong, told):
    assert told in message(checks.padding_mask, wrong)


# static_batch_tokens ---------------------------------------------------------------------------------------


def tokens_pass_by_pass(prompts, outputs):
    computed = len(prompts) * max(prompts)
    for _ in range(1, max(outputs)):
        computed += len(prompts)
    return computed


@pytest.mark.parametrize(
    "right",
    [
        tokens_pass_by_pass,
        lambda prompts, outputs: len(prompts) * (max(prompts) + max(outputs) - 1),
        lambda prompts, outputs: torch.tensor(len(prompts) * (max(prompts) + max(outputs) - 1)),
    ],
    ids=["passes", "product", "tensor"],
)
def test_static_batch_tokens_accepts(right, capsys):
    assert passes(checks.static_batch_tokens, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda p, o: len(p) * (max(p) + max(o)), "it is the only pass"),  # the last token fed back
        (lambda p, o: sum(p) + sum(o) - len(o), "3 rows of 10"),  # no padding
        (lambda p, o: len(p) * max(p) + sum(o) - len(o), "every row is computed in each"),  # ended rows leave
        (lambda p, o: len(p) * (max(a + b for a, b in zip(p, o, strict=True)) - 1), "different requests"),
        (lambda p, o: len(p) * max(p), "got       4"),  # the first pass alone
    ],
    ids=["fed back", "no padding", "rows leave", "same request", "prompts alone"],
)
def test_static_batch_tokens_refuses(wrong, told):
    assert told in message(checks.static_batch_tokens, wrong)


# joining_waste --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda n, rows: (n - 1) * (rows - 1),
        lambda n, rows: n * rows - (n + rows - 1),
        lambda n, rows: sum(n - 1 for _ in range(rows - 1)),
    ],
    ids=["product", "rectangle", "loop"],
)
def test_joining_waste_accepts(right, capsys):
    assert passes(checks.joining_waste, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda n, rows: (n - 1) * rows, "7 rows decode"),
        (lambda n, rows: n * (rows - 1), "got       700"),
        (lambda n, rows: n * rows, "got       800"),
        (lambda n, rows: n * rows - n - rows, "expected  693"),
        (lambda n, rows: 693, "B counts the newcomer too"),
        (lambda n, rows: abs(n - rows) * (rows - 1), "got       644"),
    ],
    ids=["B rows", "n pads", "slots", "one short", "constant", "difference"],
)
def test_joining_waste_refuses(wrong, told):
    assert told in message(checks.joining_waste, wrong)
