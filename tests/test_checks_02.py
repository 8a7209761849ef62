"""Chapter 2's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

import math
from fractions import Fraction

import pytest
import torch

from check_answers import message, passes
from minillm import checks, costs
from minillm.attention import masks
from minillm.model.config import ModelConfig
from minillm.viz import MaskGrid

# causal_mask --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda n: torch.tril(torch.ones(n, n, dtype=torch.bool)),
        lambda n: torch.arange(n)[:, None] >= torch.arange(n),
        lambda n: [[column <= row for column in range(n)] for row in range(n)],
    ],
    ids=["tril", "positions", "lists"],
)
def test_causal_mask_accepts(right, capsys):
    assert passes(checks.causal_mask, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda n: torch.triu(torch.ones(n, n, dtype=torch.bool)), "mask (2, 2) ##/.#"),  # the transpose
        (lambda n: torch.tril(torch.ones(n, n)), "bool tensor"),  # numbers, not True and False
        (lambda n: torch.tril(torch.ones(n, n, dtype=torch.bool), diagonal=-1), "sees itself"),
        (lambda n: torch.ones(n, n, dtype=torch.bool), "expected  mask (2, 2) #./##"),
        (lambda n: torch.tril(torch.ones(7, 7, dtype=torch.bool)), "tensor [n, n]"),
        (lambda n: torch.tril(torch.ones(n, dtype=torch.bool)), "raised    RuntimeError"),
    ],
    ids=["transposed", "floats", "without itself", "full", "always seven", "raises"],
)
def test_causal_mask_refuses(wrong, told):
    assert told in message(checks.causal_mask, wrong)


# visible_tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda mask, row: mask[row].nonzero().flatten().tolist(),
        lambda mask, row: torch.where(mask[row])[0],
        lambda mask, row: tuple(column for column in range(mask.shape[1]) if mask[row, column]),
    ],
    ids=["nonzero", "tensor", "loop"],
)
def test_visible_tokens_accepts(right, capsys):
    assert passes(checks.visible_tokens, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda mask, row: mask[:, row].nonzero().flatten().tolist(), "got       [3, 4, 5, 6]"),  # the column
        (lambda mask, row: mask[row].sum().item(), "expected  [0, 1, 2, 3]"),  # how many, not which
        (lambda mask, row: list(range(row + 1)), "Not every row begins at 0"),  # causal only
        (lambda mask, row: [i for i in range(len(mask)) if mask[row, i]], "need not be square"),
        (lambda mask, row: mask[row].nonzero().flatten().tolist() or None, "returned nothing"),
        (lambda mask, row: mask[row].tolist(), "mask[row]"),
    ],
    ids=["column", "count", "always causal", "rows for columns", "none when empty", "bools"],
)
def test_visible_tokens_refuses(wrong, told):
    assert told in message(checks.visible_tokens, wrong)


# attention ----------------------------------------------------------------------------------------


def attend(q, k, v, mask, *, scale=None, hidden=-math.inf, dim=-1):
    """The right answer, with a knob for each typical mistake."""
    scores = q @ k.T / (math.sqrt(q.shape[1]) if scale is None else scale)
    weights = scores.masked_fill(~mask, hidden).softmax(dim=dim)
    return weights.masked_fill(~mask.any(dim=1, keepdim=True), 0.0) @ v


def attend_in_loops(q, k, v, mask):
    """Plain Python, one row at a time; returns nested lists."""
    out = []
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if mask[i, j]]
        scores = [sum(a * b for a, b in zip(q[i].tolist(), k[j].tolist(), strict=True)) for j in seen]
        exps = [math.exp(score / math.sqrt(q.shape[1])) for score in scores]
        weighted = [[e / sum(exps) * x for x in v[j].tolist()] for e, j in zip(exps, seen, strict=True)]
        out.append([sum(column) for column in zip(*weighted, strict=True)] or [0.0] * v.shape[1])
    return out


def attend_with_float_mask(q, k, v, mask):
    bias = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    return torch.nan_to_num((q @ k.T * q.shape[1] ** -0.5 + bias).softmax(-1)) @ v


@pytest.mark.parametrize("right", [attend, attend_in_loops, attend_with_float_mask])
def test_attention_accepts(right, capsys):
    assert passes(checks.attention, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda q, k, v, mask: attend(q, k, v, mask, scale=1.0), "square root of D"),
        (lambda q, k, v, mask: attend(q, k, v, mask, scale=q.shape[1]), "square root of D"),
        (lambda q, k, v, mask: attend(q, k, v, mask, dim=0), "over a row"),
        (lambda q, k, v, mask: attend(q, k, v, mask, hidden=0.0), "Equal scores"),
        (lambda q, k, v, mask: attend(q, k, v, ~mask), "one weight"),
        (lambda q, k, v, mask: attend(q, k, v, masks.causal(len(q))), "fewer queries than keys"),
        (lambda q, k, v, mask: (q @ k.T / 4).masked_fill(~mask, -math.inf).softmax(-1) @ v, "Row 2"),  # NaN
        (lambda q, k, v, mask: (q @ k.T / 4).masked_fill(~mask, -1e9).softmax(-1) @ v, "Row 2"),  # a mean of all
        (lambda q, k, v, mask: attend(q, k, v, mask)[0], "got       tensor (16,)"),
    ],
    ids=["unscaled", "by D", "columns", "zero", "inverted", "own mask", "NaN", "-1e9", "one row"],
)
def test_attention_refuses(wrong, told):
    assert told in message(checks.attention, wrong)


def test_attention_shows_the_first_row_that_differs():
    """Rows 0 to 2 are right; the fourth one is not."""

    def three_rows_only(q, k, v, mask):
        out = attend(q, k, v, mask)
        out[3:] = 0
        return out

    told = message(checks.attention, three_rows_only)
    assert "got       row 3: tensor (16,) [0, 0," in told and "expected  row 3: tensor (16,) [" in told


def test_attention_without_the_maximum_subtracted_overflows():
    def overflowing(q, k, v, mask):
        exps = (q @ k.T / math.sqrt(q.shape[1])).exp() * mask
        return exps / exps.sum(dim=1, keepdim=True).clamp(min=1e-30) @ v

    assert "Large scores" in message(checks.attention, overflowing)


# window_mask --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda n, window: torch.ones(n, n, dtype=torch.bool).tril().triu(1 - window),
        lambda n, window: [[row - window < column <= row for column in range(n)] for row in range(n)],
        lambda n, window: masks.causal(n) & ~masks.causal(n).tril(-window),
    ],
    ids=["tril and triu", "lists", "difference"],
)
def test_window_mask_accepts(right, capsys):
    assert passes(checks.window_mask, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda n, window: masks.causal(n).triu(-window), "three tokens, itself counted"),  # one too many
        (lambda n, window: masks.causal(n).triu(2 - window), "three tokens, itself counted"),  # one too few
        (
            lambda n, window: torch.ones(n, n, dtype=torch.bool).tril(window - 1).triu(1 - window),
            "nothing in the future",
        ),
        (lambda n, window: masks.causal(n), "expected  mask (7, 7) #....../##...../###..../.###"),
        (lambda n, window: masks.causal(n) & (torch.arange(n) >= n - window), "Token 6 sees 4, 5 and 6"),  # columns
    ],
    ids=["one too many", "one too few", "both sides", "causal", "the last columns"],
)
def test_window_mask_refuses(wrong, told):
    assert told in message(checks.window_mask, wrong)


# attention_share ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda n, d: 4 * n**2 * d / (24 * n * d**2),
        lambda n, d: n / (6 * d),
        lambda n, d: torch.tensor(n / (6 * d)),
        lambda n, d: float(Fraction(n, 6 * d)),
    ],
    ids=["counted", "short", "tensor", "fraction"],
)
def test_attention_share_accepts(right, capsys):
    assert passes(checks.attention_share, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda n, d: n / (12 * d), "two products"),  # one product only
        (lambda n, d: n / (24 * d), "two products"),  # and a multiply-add as one
        (lambda n, d: 6 * d / n, "attention_share(1000, 4096)"),  # upside down
        (lambda n, d: n / (n + 6 * d), "expected  0.04069"),  # of the whole
        (lambda n, d: n // (6 * d), "got       0"),
        (lambda n, d: f"{n / (6 * d):.2f}", "got       '0.04'"),
    ],
    ids=["one product", "multiply-adds", "inverted", "of the whole", "whole number", "text"],
)
def test_attention_share_refuses(wrong, told):
    assert told in message(checks.attention_share, wrong)


def test_the_rule_of_thumb_is_what_costs_counts_for_a_layer_of_24_d_squared(capsys):
    """ff = 8/3 d and as many key as query heads make a layer of 12 d² weights: 24 d² FLOP a token."""

    def counted(n, d):
        scaled = ModelConfig(1, 3 * d, 8 * d, 1, 1, 1, 3 * d, 1)  # 3d is divisible by three, whatever d is
        attention = costs.attention_flops(scaled, n * n)
        return 3 * attention / costs.tokenwise_flops(scaled, n, num_logit_rows=0)

    assert passes(checks.attention_share, counted, capsys)


# beside -------------------------------------------------------------------------------------------


def stub(n):
    raise NotImplementedError("write it")


def broken(n):
    raise ValueError("oops")


@pytest.mark.parametrize(
    ("function", "title"),
    [
        (masks.causal, "yours"),
        (lambda n: masks.causal(n).tolist(), "yours"),
        (stub, "yours: not written yet"),
        (broken, "yours: ValueError"),
        (lambda n: None, "yours: no mask of this size"),
        (lambda n: masks.causal(n + 1), "yours: no mask of this size"),
    ],
    ids=["right", "lists", "stub", "raises", "None", "other size"],
)
def test_the_target_is_drawn_beside_whatever_the_function_gives(function, title):
    picture = checks.beside(masks.causal(3), function, 3, labels=["a", "b", "c"])
    target, yours = picture.pictures
    assert target.text() == MaskGrid(masks.causal(3), key_labels=["a", "b", "c"]).text()
    assert yours.title == title
    assert (yours.text() == target.text()) == (title == "yours")
    assert picture.figure()


def test_numbers_instead_of_a_mask_are_drawn_as_what_they_are():
    picture = checks.beside(masks.causal(2), lambda n: torch.ones(n, n).triu(), 2)
    assert picture.pictures[1].text() == MaskGrid([[True, True], [False, True]]).text()
