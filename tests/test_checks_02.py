"""Chapter 2's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

import math

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


# all_heads ----------------------------------------------------------------------------------------


def one_head_after_the_other(q, k, v, mask, *, key_head=None, dim=1):
    group = q.shape[1] // k.shape[1]
    places = [(key_head or (lambda h, group: h // group))(h, group) for h in range(q.shape[1])]
    return torch.stack([attend(q[:, h], k[:, i], v[:, i], mask) for h, i in enumerate(places)], dim=dim)


def repeated(q, k, v, mask):
    """The key heads copied for their query heads, then all heads at once."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize("right", [one_head_after_the_other, repeated, lambda *args: repeated(*args).tolist()])
def test_all_heads_accepts(right, capsys):
    assert passes(checks.all_heads, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda *args: one_head_after_the_other(*args, key_head=lambda h, group: 0), "each has its own"),
        (
            lambda q, k, v, mask: one_head_after_the_other(q, k, v, mask, key_head=lambda h, group: h % k.shape[1]),
            "Query heads 0 and 1 share key head 0",
        ),
        (lambda *args: one_head_after_the_other(*args, dim=0), "One head"),
        (lambda q, k, v, mask: repeated(q, k, v, masks.causal(len(q))), "fewer queries than keys"),
        (lambda q, k, v, mask: repeated(q, k, v, mask | ~mask.any(-1, keepdim=True)), "gives zeros in every head"),
        (lambda q, k, v, mask: one_head_after_the_other(q, k, v, mask, key_head=lambda h, group: h), "IndexError"),
    ],
    ids=["first key head", "modulo", "heads first", "own mask", "empty rows see all", "no groups"],
)
def test_all_heads_refuses(wrong, told):
    assert told in message(checks.all_heads, wrong)


# layer_flops --------------------------------------------------------------------------------------


def flops(config, n, *, keys=None, mlp=3, add=2, products=2, width=None):
    keys = config.key_value_size if keys is None else keys
    query = config.query_size if width is None else width(config)
    weights = config.hidden_size * (2 * query + 2 * keys + mlp * config.intermediate_size)
    return add * n * weights, 2 * products * n * n * query


@pytest.mark.parametrize(
    "right",
    [flops, lambda *args: list(map(float, flops(*args))), lambda *args: torch.tensor(flops(*args))],
    ids=["counted", "floats", "tensor"],
)
def test_layer_flops_accepts(right, capsys):
    assert passes(checks.layer_flops, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda config, n: flops(config, n, add=1), "The second number is right. Token-wise"),
        (lambda config, n: flops(config, n, mlp=2), "three matrices of the MLP"),
        (lambda config, n: flops(config, n, products=1), "The first number is right"),
        (lambda config, n: flops(config, n, keys=config.query_size), "Fewer key heads"),
        (lambda config, n: flops(config, n, width=lambda config: config.hidden_size), "wider than hidden_size"),
        (lambda config, n: flops(config, n)[::-1], "multiply-add is 2 FLOP"),
        (lambda config, n: sum(flops(config, n)), "Return two numbers"),
        (lambda config, n: [config.num_hidden_layers * each for each in flops(config, n)], "got       12,"),
    ],
    ids=["multiply-adds", "two in the MLP", "one product", "all key heads", "hidden size", "turned", "sum", "model"],
)
def test_layer_flops_refuses(wrong, told):
    assert told in message(checks.layer_flops, wrong)


@pytest.mark.parametrize(("n", "d"), [(1000, 4096), (24_576, 4096), (1, 128)])
def test_the_chapters_rule_is_what_costs_counts_for_a_layer_of_12_d_squared_weights(n, d):
    """ff = 8/3 d and as many key as query heads make a layer of 12 d² weights: 24 d² FLOP per token."""
    scaled = ModelConfig(1, 3 * d, 8 * d, 1, 1, 1, 3 * d, 1)  # 3d is divisible by three, whatever d is
    tokenwise = costs.tokenwise_flops(scaled, n, num_logit_rows=0)
    assert tokenwise == 24 * n * (3 * d) ** 2 and costs.attention_flops(scaled, n * n) == 4 * n * n * 3 * d


# find_mask ----------------------------------------------------------------------------------------


def three_looks(look, n, *, shifts=(0, 1), window=None):
    window = window or int(look([0]).sum())
    ends = set()
    for shift in shifts:
        changed = [*look(range(shift, n, window)).tolist(), True]
        ends |= {row for row in range(shift, n) if changed[row] and not changed[row + 1]}
    prompt = torch.tensor([sum(end < row for end in ends) for row in range(n)])
    return (prompt[:, None] == prompt) & masks.causal(n, window=window)


def one_look_per_token(look, n):
    return torch.stack([look([place]) for place in range(n)], dim=1)


def test_find_mask_accepts(capsys):
    assert passes(checks.find_mask, three_looks, capsys)
    assert passes(checks.find_mask, lambda look, n: three_looks(look, n).tolist(), capsys)

    def by_flags(look, n):
        return three_looks(lambda places: look(torch.zeros(n).index_fill(0, torch.tensor([*places]), 1).bool()), n)

    assert passes(checks.find_mask, by_flags, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (one_look_per_token, "in 8 looks"),
        (lambda look, n: three_looks(look, n, shifts=(0,)), "A border right before a replaced token"),
        (lambda look, n: three_looks(look, n, shifts=()), "a prompt has ended before it"),
        (lambda look, n: three_looks(look, n, window=4), "A single prompt"),
        (lambda look, n: masks.causal(n), "A single prompt"),
        (lambda look, n: three_looks(look, n).T, "A single prompt"),
    ],
    ids=["a look per token", "one shift", "no borders", "always 4", "causal", "transposed"],
)
def test_find_mask_refuses(wrong, told):
    text = message(checks.find_mask, wrong)
    assert told in text and "in at most 3 looks" in text


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
