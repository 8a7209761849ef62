"""Chapter 4's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

import math

import numpy as np
import pytest
import torch

from check_answers import message, passes
from minillm import checks
from minillm.attention import masks

# num_chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda n, m: -(-n // m),
        lambda n, m: (n + m - 1) // m,
        lambda n, m: math.ceil(n / m),
        lambda n, m: n // m + (n % m > 0),
        lambda n, m: len(range(0, n, m)),
        lambda n, m: np.ceil(n / m),
        lambda n, m: torch.tensor(n / m, dtype=torch.float64).ceil().int(),
    ],
    ids=["negated", "added", "ceil", "remainder", "range", "numpy", "tensor"],
)
def test_num_chunks_accepts(right, capsys):
    assert passes(checks.num_chunks, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda n, m: n // m, "a pass that is not full is a pass too"),
        (lambda n, m: n / m, "got       1.75"),
        (lambda n, m: n // m + 1, "exactly two full passes"),
        (lambda n, m: round(n / m), "needs a pass of its own"),  # 9 / 4 is rounded down
        (lambda n, m: str(-(-n // m)), "got       '2'"),
        (lambda n, m: n % m, "got       3"),
        (lambda n, m: len(range(0, n + 1, m)), "exactly two full passes"),
    ],
    ids=["rounded down", "not rounded", "one more", "rounded", "text", "remainder", "one token more"],
)
def test_num_chunks_refuses(wrong, told):
    assert told in message(checks.num_chunks, wrong)


# chunk_ranges -------------------------------------------------------------------------------------


def in_a_loop(n, m):
    ranges, start = [], 0
    while start < n:
        ranges.append([start, min(n, start + m)])
        start += m
    return ranges


@pytest.mark.parametrize(
    "right",
    [
        in_a_loop,
        lambda n, m: [(start, min(start + m, n)) for start in range(0, n, m)],
        lambda n, m: tuple((start, min(start + m, n)) for start in range(0, n, m)),
        lambda n, m: torch.tensor(in_a_loop(n, m)),
        lambda n, m: np.array(in_a_loop(n, m)),
        lambda n, m: [(int(chunk[0]), int(chunk[-1]) + 1) for chunk in torch.arange(n).split(m)],
    ],
    ids=["loop", "list", "tuple", "tensor", "numpy", "split"],
)
def test_chunk_ranges_accepts(right, capsys):
    assert passes(checks.chunk_ranges, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda n, m: [(start, start + m) for start in range(0, n, m)], "got       [(0, 4), (4, 8)]"),
        (lambda n, m: [(start, min(start + m, n) - 1) for start in range(0, n, m)], "got       [(0, 3), (4, 6)]"),
        (
            lambda n, m: [(start, min(m, n - start)) for start in range(0, n, m)],
            "expected  [(0, 4), (4, 7)]",
        ),  # lengths
        (lambda n, m: [(i * m, min(i * m + m, n)) for i in range(n // m)], "got       [(0, 4)]"),  # the rest is lost
        (lambda n, m: [(i * m, min(i * m + m, n)) for i in range(n // m + 1)], "none of them may be empty"),
        (lambda n, m: list(range(0, n, m)), "got       [0, 4]"),
        (lambda n, m: (start for start in range(0, n, m)), "got       [0, 4]"),
        (lambda n, m: -(-n // m), "got       2"),
        (lambda n, m: None, "got       None"),
    ],
    ids=[
        "beyond the end",
        "inclusive",
        "lengths",
        "rest lost",
        "empty one",
        "starts",
        "generator",
        "a number",
        "nothing",
    ],
)
def test_chunk_ranges_refuses(wrong, told):
    assert told in message(checks.chunk_ranges, wrong)


@pytest.mark.parametrize(
    ("slip", "told"),
    [
        (lambda start, end, m: (start, start + m), "must not reach beyond the prompt"),
        (lambda start, end, m: (start, end - 1), "as in a slice; this is the last one"),
        (lambda start, end, m: (start, end - start), "This is start and length"),
        (lambda start, end, m: (start + 1, end), "start at 0, m, 2 m"),
        (lambda start, end, m: start, "Return pairs"),
    ],
)
def test_chunk_ranges_hints_at_what_is_wrong(slip, told):
    hint = message(checks.chunk_ranges, lambda n, m: [slip(*pair, m) for pair in in_a_loop(n, m)]).splitlines()[-1]
    assert told in hint


# chunk_mask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda start, end: torch.arange(end) <= torch.arange(start, end)[:, None],
        lambda start, end: torch.ones(end, end, dtype=torch.bool).tril()[start:],
        lambda start, end: torch.ones(end - start, end, dtype=torch.bool).tril(start),
        lambda start, end: masks.rectangular(end - start, end),
        lambda start, end: torch.tensor([[column <= row for column in range(end)] for row in range(start, end)]),
        lambda start, end: torch.from_numpy(np.tri(end, end, dtype=bool)[start:]),
        lambda start, end: torch.cat([torch.ones(end - start, start).bool(), masks.causal(end - start)], dim=1),
    ],
    ids=["positions", "last rows", "tril", "package", "lists", "numpy", "two parts"],
)
def test_chunk_mask_accepts(right, capsys):
    assert passes(checks.chunk_mask, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda start, end: masks.causal(end - start), "got       mask (3, 3) #../##./###"),  # the cache forgotten
        (lambda start, end: torch.ones(end - start, end).bool().tril(), "got       mask (3, 7) #....../"),  # not offset
        (lambda start, end: torch.ones(end - start, end).bool(), "got       mask (3, 7) #######/#######"),
        (lambda start, end: masks.causal(end), "got       mask (7, 7)"),
        (lambda start, end: masks.causal(end)[start:].T, "got       mask (7, 3)"),
        (lambda start, end: masks.causal(end)[start:].float(), "five Trues"),
        (lambda start, end: masks.causal(end)[start:].int().tolist(), "A bool tensor"),
        (lambda start, end: torch.ones(end - start, end).bool().tril(start - 1), "got       mask (3, 7) ####.../"),
        (
            lambda start, end: torch.cat([torch.zeros(end - start, start).bool(), masks.causal(end - start)], dim=1),
            "got       mask (3, 7) ....#../",  # sees its own chunk only
        ),
    ],
    ids=[
        "own chunk",
        "not offset",
        "all",
        "whole square",
        "transposed",
        "floats",
        "lists",
        "not itself",
        "no earlier chunk",
    ],
)
def test_chunk_mask_refuses(wrong, told):
    assert told in message(checks.chunk_mask, wrong)


# chunk_for_memory ---------------------------------------------------------------------------------


def by_doubling(free_bytes, bytes_per_token):
    if bytes_per_token > free_bytes:
        return 0
    chunk = 1
    while 2 * chunk * bytes_per_token <= free_bytes:
        chunk *= 2
    return chunk


def by_halving(free_bytes, bytes_per_token):
    chunk = 2**40
    while chunk and chunk * bytes_per_token > free_bytes:
        chunk //= 2
    return chunk


@pytest.mark.parametrize(
    "right",
    [
        by_doubling,
        by_halving,
        lambda free, each: (1 << (free // each).bit_length()) >> 1,
        lambda free, each: 2 ** int(math.log2(free // each)) if free >= each else 0,
        lambda free, each: np.int64(by_doubling(free, each)),
    ],
    ids=["doubling", "halving", "bits", "logarithm", "numpy"],
)
def test_chunk_for_memory_accepts(right, capsys):
    assert passes(checks.chunk_for_memory, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda free, each: free // each, "got       10"),
        (lambda free, each: 1 << (free // each).bit_length(), "got       16"),  # one power too many
        (lambda free, each: 2 ** round(math.log2(max(1, free / each))), "8 tokens would need one byte too many"),
        (lambda free, each: max(1, by_doubling(free, each)), "Not even one token fits"),
        (lambda free, each: by_doubling(free - 1, each), "exactly full is allowed"),
        (lambda free, each: by_doubling(free, each).bit_length() - 1, "got       3"),  # the exponent
        (lambda free, each: 2 ** int(math.log2(free // each)), "raised    ValueError"),
    ],
    ids=["any number", "too large", "rounded", "at least one", "one byte short", "exponent", "log of 0"],
)
def test_chunk_for_memory_refuses(wrong, told):
    assert told in message(checks.chunk_for_memory, wrong)
