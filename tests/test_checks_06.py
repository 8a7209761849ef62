"""Chapter 6's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

import itertools

import numpy as np
import pytest
import torch

from check_answers import message, passes
from minillm import checks
from minillm.attention import masked_attention, masks
from minillm.checks.chapter_06 import fewest_scores

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


# attend_caches ------------------------------------------------------------------------------------


def cut_and_joined(q, k, v, lengths, caches):
    out, grown, start = torch.empty_like(q), [], 0
    for n, (keys, values) in zip(lengths, caches, strict=True):
        own = slice(start, start + n)
        keys, values = torch.cat([keys, k[own]]), torch.cat([values, v[own]])
        out[own] = masked_attention(q[own], keys, values, masks.rectangular(n, len(keys)))
        grown.append((keys, values))
        start += n
    return out, grown


def under_one_mask(q, k, v, lengths, caches):
    """All keys one behind the other, and the blocks of a mask that is not square."""
    grown = [
        tuple(torch.cat(pair) for pair in zip(cache, new, strict=True))
        for cache, new in zip(caches, zip(k.split(lengths), v.split(lengths), strict=True), strict=True)
    ]
    mask = torch.block_diag(*(masks.rectangular(n, len(keys)) for n, (keys, _) in zip(lengths, grown, strict=True)))
    keys, values = (torch.cat(each) for each in zip(*grown, strict=True))
    return masked_attention(q, keys, values, mask.bool()), grown


def new_keys_only(q, k, v, lengths, caches):
    out = torch.cat(
        [
            masked_attention(*own, masks.causal(len(own[0])))
            for own in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ]
    )
    return out, cut_and_joined(q, k, v, lengths, caches)[1]


def nothing_kept(q, k, v, lengths, caches):
    return cut_and_joined(q, k, v, lengths, caches)[0], caches


def as_one_text(q, k, v, lengths, caches):
    keys, values = (torch.cat([*old, new]) for old, new in zip(zip(*caches, strict=True), (k, v), strict=True))
    out = masked_attention(q, keys, values, masks.rectangular(len(q), len(keys)))
    return out, cut_and_joined(q, k, v, lengths, caches)[1]


def upper_left(q, k, v, lengths, caches):
    """The triangle at the wrong end: the first new token sees the first cached one only."""
    _, grown = cut_and_joined(q, k, v, lengths, caches)
    rows = [
        masked_attention(own, *pair, masks.causal(len(pair[0]))[: len(own)])
        for own, pair in zip(q.split(lengths), grown, strict=True)
    ]
    return torch.cat(rows), grown


@pytest.mark.parametrize("right", [cut_and_joined, under_one_mask])
def test_attend_caches_accepts(right, capsys):
    assert passes(checks.attend_caches, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (new_keys_only, "it sees all five keys"),
        (nothing_kept, "caches of [0] tokens"),
        (as_one_text, "must not see the first"),
        (upper_left, "it sees all five keys"),
        (lambda *args: cut_and_joined(*args)[0], "not (out, caches)"),
    ],
)
def test_attend_caches_refuses(wrong, told):
    assert told in message(checks.attend_caches, wrong)


# few_rectangles -----------------------------------------------------------------------------------


def cut_sorted(lengths, num_calls):
    """Groups are runs of the sorted prompts; the best cuts of the first n, with ever more groups."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best = [(0, [])] + [(float("inf"), [])] * len(order)
    for _ in range(num_calls):
        best = [(0, [])] + [
            min(
                (best[first][0] + (end - first) * lengths[order[end - 1]] ** 2, [*best[first][1], order[first:end]])
                for first in range(end)
            )
            for end in range(1, len(order) + 1)
        ]
    return best[-1][1]


def equal_groups(lengths, num_calls):
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [list(group) for group in np.array_split(order, num_calls)]


def test_few_rectangles_accepts(capsys):
    assert passes(checks.few_rectangles, cut_sorted, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (equal_groups, "need not be of one size"),
        (lambda lengths, num_calls: [[i] for i in range(len(lengths))], "at most 2 groups"),
        (lambda lengths, num_calls: np.array_split(range(len(lengths)), num_calls), "about one length belong together"),
        (lambda lengths, num_calls: [[0, 1], [2]], "exactly once"),
    ],
    ids=["equal", "alone", "unsorted", "lost"],
)
def test_few_rectangles_refuses(wrong, told):
    assert told in message(checks.few_rectangles, wrong)


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_the_fewest_scores_are_what_trying_everything_finds(num_groups):
    lengths = [3, 9, 4, 4, 1, 7]
    costs = []
    for where in itertools.product(range(num_groups), repeat=len(lengths)):
        groups = [[n for n, group in zip(lengths, where, strict=True) if group == own] for own in range(num_groups)]
        costs.append(sum(len(own) * max(own) ** 2 for own in groups if own))
    assert fewest_scores(lengths, num_groups) == min(costs)
