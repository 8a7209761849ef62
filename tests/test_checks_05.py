"""Chapter 5's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from check_answers import message, passes
from minillm import checks
from minillm.attention import masked_attention, masks
from minillm.checks.chapter_05 import BUDGET, IN_ORDER_OF_ARRIVAL
from minillm.simulation import course_requests

# padding --------------------------------------------------------------------------------------------


def pads_of(lengths):
    return len(lengths) * max(lengths) - sum(lengths)


@pytest.mark.parametrize(
    "right",
    [
        lambda lengths: (pads_of(lengths), sum(lengths) / (len(lengths) * max(lengths))),
        lambda lengths: [sum(max(lengths) - n for n in lengths), np.mean(lengths) / np.max(lengths)],
        lambda lengths: torch.tensor([pads_of(lengths), sum(lengths) / len(lengths) / max(lengths)]).double(),
        lambda lengths: (pads_of(lengths), Fraction(sum(lengths), len(lengths) * max(lengths))),
    ],
    ids=["rectangle", "rows", "tensor", "fraction"],
)
def test_padding_accepts(right, capsys):
    assert passes(checks.padding, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (pads_of, "got       13"),
        (lambda lengths: (pads_of(lengths), 100 * sum(lengths) / (len(lengths) * max(lengths))), "not per cent"),
        (lambda lengths: (sum(lengths), sum(lengths) / (len(lengths) * max(lengths))), "got       (17, 0.56"),
        (lambda lengths: (pads_of(lengths), 1 - sum(lengths) / (len(lengths) * max(lengths))), "expected  (13, 0.56"),
        (
            lambda lengths: (sum(lengths[-1] - n for n in lengths), sum(lengths) / (len(lengths) * lengths[-1])),
            "max(lengths), not lengths[-1]",
        ),
    ],
    ids=["pads alone", "per cent", "tokens", "waste", "last"],
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


# padded_pass ----------------------------------------------------------------------------------------


def folded(model, rectangle, positions, row_masks, attention):
    def attend(layer, q, k, v):
        q, k, v = (x.unflatten(0, rectangle.shape) for x in (q, k, v))
        return attention(q, k, v, row_masks).flatten(0, 1)

    return model(rectangle.flatten(), positions.flatten(), attend).unflatten(0, rectangle.shape)


def row_by_row(model, rectangle, positions, row_masks, attention):
    """One pass, in which each row is attended to by itself."""

    def attend(layer, q, k, v):
        rows = zip(*(x.split(rectangle.shape[1]) for x in (q, k, v)), row_masks, strict=True)
        return torch.cat([attention(*row) for row in rows])

    hidden = model(rectangle.reshape(-1), positions.reshape(-1), attend)
    return hidden.view(*rectangle.shape, -1)


def one_pass_per_row(model, rectangle, positions, row_masks, attention):
    rows = zip(rectangle, positions, row_masks, strict=True)
    return torch.stack([model(ids, at, lambda layer, q, k, v, m=m: attention(q, k, v, m)) for ids, at, m in rows])


def left_flat(model, rectangle, positions, row_masks, attention):
    return folded(model, rectangle, positions, row_masks, attention).flatten(0, 1)


def with_pads_seen(model, rectangle, positions, row_masks, attention):
    seen = masks.causal(rectangle.shape[1]).expand(row_masks.shape)
    return folded(model, rectangle, positions, seen, attention)


def at_positions_of_the_row(model, rectangle, positions, row_masks, attention):
    return folded(model, rectangle, positions.flip(1), row_masks, attention)


def at_places_in_the_rectangle(model, rectangle, positions, row_masks, attention):
    """RoPE sees differences alone, so the hidden states are right."""
    places = torch.arange(rectangle.shape[1]).expand(rectangle.shape)
    return folded(model, rectangle, places, row_masks, attention)


def by_itself(model, rectangle, positions, row_masks, attention):
    return folded(model, rectangle, positions, row_masks, masked_attention)


def one_long_row(model, rectangle, positions, row_masks, attention):
    mask = masks.causal(rectangle.numel())
    hidden = model(rectangle.flatten(), positions.flatten(), lambda layer, q, k, v: attention(q, k, v, mask))
    return hidden.unflatten(0, rectangle.shape)


@pytest.mark.parametrize("right", [folded, row_by_row])
def test_padded_pass_accepts(right, capsys):
    assert passes(checks.padded_pass, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (one_pass_per_row, "got       forward passes of 3, 3 tokens"),
        (left_flat, "give what it returns its [B, L] back"),
        (with_pads_seen, "hand `row_masks` to the attention"),
        (at_positions_of_the_row, "got       forward passes of"),
        (at_places_in_the_rectangle, "the positions are not those that were given"),
        (by_itself, "the attention that was given is not used"),
        (one_long_row, "each row attends to itself"),
        (lambda *args: None, "no tokens"),
    ],
)
def test_padded_pass_refuses(wrong, told):
    assert told in message(checks.padded_pass, wrong)


# static_batches -------------------------------------------------------------------------------------


def columns(batch):
    return max(prompt for prompt, _ in batch) + max(output for _, output in batch) - 1


def sorted_by(key):
    def batches(lengths, rows):
        order = sorted(range(len(lengths)), key=lambda i: key(lengths[i]))
        return [order[first : first + rows] for first in range(0, len(order), rows)]

    return batches


def exchanged(lengths, rows):
    """Exchange two requests as long as that saves tokens."""
    batches = sorted_by(sum)(lengths, rows)

    def cost():
        return sum(columns([lengths[i] for i in batch]) for batch in batches)

    best, improved = cost(), True
    while improved:
        improved = False
        for one, other in itertools.combinations(batches, 2):
            for i, j in itertools.product(range(len(one)), range(len(other))):
                one[i], other[j] = other[j], one[i]
                if cost() < best:
                    best, improved = cost(), True
                else:
                    one[i], other[j] = other[j], one[i]
    return batches


def test_the_budget_is_what_exchanges_reach_and_no_order_does(capsys):
    assert passes(checks.static_batches, exchanged, capsys)
    lengths = [(request.num_prompt_tokens, request.params.max_tokens) for request in course_requests()]
    for key in (sum, lambda each: each[0], lambda each: each[1], lambda each: 0):
        batches = sorted_by(key)(lengths, 16)
        computed = sum(len(batch) * columns([lengths[i] for i in batch]) for batch in batches)
        assert computed > BUDGET
        assert f"{computed:,}" in message(checks.static_batches, sorted_by(key)) or key is not sum
    assert computed == IN_ORDER_OF_ARRIVAL


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (sorted_by(lambda each: 0), "got       210"),
        (lambda lengths, rows: [[i] for i in range(len(lengths))], "at most 2 groups, each of at most 2"),
        (lambda lengths, rows: [range(len(lengths))], "groups of [4]"),
        (lambda lengths, rows: [[0, 2], [1, 1]], "exactly once"),
        (lambda lengths, rows: [], "exactly once"),
    ],
    ids=["arrival", "alone", "all", "twice", "nobody"],
)
def test_static_batches_refuses(wrong, told):
    assert told in message(checks.static_batches, wrong)
