"""Chapter 6's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
import torch

from check_answers import message, passes
from minillm import checks
from minillm.attention import masks

# block_diagonal_mask ------------------------------------------------------------------------------


def block_by_block(lengths):
    """A square of False, into which each prompt writes its triangle."""
    mask = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    start = 0
    for n in lengths:
        mask[start : start + n, start : start + n] = torch.ones(n, n, dtype=torch.bool).tril()
        start += n
    return mask


def by_owner(lengths):
    """Causal, and of the same prompt."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return masks.causal(len(owner)) & (owner[:, None] == owner)


def in_lists(lengths):
    owner = [prompt for prompt, n in enumerate(lengths) for _ in range(n)]
    return [[c <= r and owner[c] == owner[r] for c in range(len(owner))] for r in range(len(owner))]


def full_blocks(lengths):
    return torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()


def blocks_of_the_first_length(lengths):
    return masks.block_diagonal(lengths[:1] * len(lengths))


def two_prompts_only(lengths):
    return masks.block_diagonal([lengths[0], sum(lengths[1:])])


def sizes_sorted(lengths):
    return masks.block_diagonal(sorted(lengths, reverse=True))


@pytest.mark.parametrize("right", [block_by_block, by_owner, in_lists])
def test_block_diagonal_mask_accepts(right, capsys):
    assert passes(checks.block_diagonal_mask, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda lengths: masks.causal(sum(lengths)), "neither sees the other"),
        (full_blocks, "this is the causal mask"),
        (lambda lengths: masks.block_diagonal(lengths).T, "row i sees the columns 0..i"),
        (lambda lengths: masks.block_diagonal(lengths).int(), "bool tensor"),
        (blocks_of_the_first_length, "block_diagonal_mask([3, 2])"),
        (two_prompts_only, "more than two prompts"),
        (sizes_sorted, "in the order of `lengths`"),
        (lambda lengths: torch.block_diag(*map(torch.ones, lengths)).bool(), "expected  mask (3, 3) #../##./###"),
    ],
    ids=["plain causal", "not causal", "transposed", "numbers", "equal blocks", "two prompts", "sorted", "rows"],
)
def test_block_diagonal_mask_refuses(wrong, told):
    assert told in message(checks.block_diagonal_mask, wrong)


# restarting_positions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda lengths: torch.cat([torch.arange(n) for n in lengths]),
        lambda lengths: [i for n in lengths for i in range(n)],
        lambda lengths: np.concatenate([np.arange(n) for n in lengths]),
        lambda lengths: tuple(torch.tensor(i) for n in lengths for i in range(n)),
    ],
    ids=["cat", "list", "numpy", "tensors"],
)
def test_restarting_positions_accepts(right, capsys):
    assert passes(checks.restarting_positions, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda lengths: torch.arange(sum(lengths)), "got       tensor (5,) [0, 1, 2, 3, 4]"),
        (lambda lengths: [i + 1 for n in lengths for i in range(n)], "begins at 0"),
        (lambda lengths: [list(range(n)) for n in lengths], "one position for each token"),  # not flat
        (lambda lengths: [prompt for prompt, n in enumerate(lengths) for _ in range(n)], "expected  [0, 1, 2]"),
        (lambda lengths: torch.arange(max(lengths)).repeat(len(lengths)), "second prompt starts at 0"),  # rectangle
    ],
    ids=["running on", "from one", "nested", "whose", "rectangle"],
)
def test_restarting_positions_refuses(wrong, told):
    assert told in message(checks.restarting_positions, wrong)


# last_rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda lengths: torch.tensor(lengths).cumsum(0) - 1,
        lambda lengths: [sum(lengths[: i + 1]) - 1 for i in range(len(lengths))],
        lambda lengths: np.cumsum(lengths) - 1,
        lambda lengths: (end - 1 for end in accumulate(lengths)),
    ],
    ids=["cumsum", "sums", "numpy", "generator"],
)
def test_last_rows_accepts(right, capsys):
    assert passes(checks.last_rows, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda lengths: list(accumulate(lengths)), "counted from 0"),  # where the next one starts
        (lambda lengths: [n - 1 for n in lengths], "add up the lengths"),  # within its own prompt
        (lambda lengths: [sum(lengths) - 1], "expected  [2, 4]"),  # of the whole row
        (lambda lengths: [0, *accumulate(lengths)][:-1], "got       [0]"),  # first rows
        (lambda lengths: torch.tensor(lengths).cumsum(1) - 1, "raised    IndexError"),
    ],
    ids=["one too far", "own row", "one row", "first rows", "raises"],
)
def test_last_rows_refuses(wrong, told):
    assert told in message(checks.last_rows, wrong)


# utilisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda lengths: sum(lengths) / (len(lengths) * max(lengths)),
        lambda lengths: Fraction(sum(lengths), len(lengths) * max(lengths)),
        lambda lengths: torch.tensor(lengths).float().mean() / max(lengths),
        lambda lengths: 1 - sum(max(lengths) - n for n in lengths) / (len(lengths) * max(lengths)),
        lambda lengths: np.mean(lengths) / np.max(lengths),
    ],
    ids=["quotient", "fraction", "tensor", "less the pads", "numpy"],
)
def test_utilisation_accepts(right, capsys):
    assert passes(checks.utilisation, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda lengths: 100 * sum(lengths) / (len(lengths) * max(lengths)), "not per cent"),
        (lambda lengths: 1 - sum(lengths) / (len(lengths) * max(lengths)), "expected  0.56"),  # the pads
        (lambda lengths: sum(lengths) / (len(lengths) * lengths[-1]), "need not be the last one"),
        (lambda lengths: min(1.0, sum(lengths) / (3 * max(lengths))), "Equal lengths"),  # always 3 rows
        (lambda lengths: sum(lengths), "got       17"),
        (lambda lengths: len(lengths) * max(lengths) / sum(lengths), "got       1.76"),
    ],
    ids=["per cent", "waste", "last", "three rows", "count", "upside down"],
)
def test_utilisation_refuses(wrong, told):
    assert told in message(checks.utilisation, wrong)


# wasted_share -------------------------------------------------------------------------------------


def wasted_by_counting(lengths):
    """Pairs of different prompts, counted in the mask."""
    own = torch.block_diag(*(torch.ones(n, n) for n in lengths))
    return (own == 0).double().mean()


@pytest.mark.parametrize(
    "right",
    [
        lambda lengths: 1 - sum(n * n for n in lengths) / sum(lengths) ** 2,
        lambda lengths: 1 - Fraction(sum(n * n for n in lengths), sum(lengths) ** 2),
        lambda lengths: np.float64(1 - np.square(lengths).sum() / np.sum(lengths) ** 2),
        wasted_by_counting,
    ],
    ids=["formula", "fraction", "numpy", "counted"],
)
def test_wasted_share_accepts(right, capsys):
    assert passes(checks.wasted_share, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda lengths: sum(n * n for n in lengths) / sum(lengths) ** 2, "160 / 289"),  # the useful share
        (lambda lengths: 1 - sum(lengths) / (len(lengths) * max(lengths)), "160 / 289"),  # of a padded rectangle
        (lambda lengths: 1 - sum(n * (n + 1) / 2 for n in lengths) / sum(lengths) ** 2, "got       0.747"),  # causal
        (lambda lengths: 1 - sum(n * n for n in lengths) // sum(lengths) ** 2, "expected  0.553"),
        (lambda lengths: 1 - 1 / len(lengths), "got       0.66"),  # as if all were equal
        (lambda lengths: sum(lengths) ** 2 - sum(n * n for n in lengths), "got       160"),
        (lambda lengths: round(1 - sum(n * n for n in lengths) / sum(lengths) ** 2, 2), "got       0.55"),
    ],
    ids=["useful", "padded", "causal", "whole", "equal", "count", "rounded"],
)
def test_wasted_share_refuses(wrong, told):
    assert told in message(checks.wasted_share, wrong)
