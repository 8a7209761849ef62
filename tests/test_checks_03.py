"""Chapter 3's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from check_answers import message, passes
from minillm import checks

MIB = 1024 * 1024


# cache_append -------------------------------------------------------------------------------------


def append(keys, values, length, k, v):
    """The right answer in slices."""
    end = length + k.shape[0]
    if end > keys.shape[0]:
        raise ValueError("full")
    keys[length:end] = k
    values[length:end] = v
    return end


def append_in_a_loop(keys, values, length, k, v):
    """Row by row; refuses with another exception."""
    if len(k) > len(keys) - length:
        raise RuntimeError("full")
    for key, value in zip(k, v, strict=True):
        keys[length], values[length] = key, value
        length += 1
    return torch.tensor(length)


def append_with_narrow(keys, values, length, k, v):
    assert length + len(k) <= len(keys), "full"
    keys.narrow(0, length, len(k)).copy_(k)
    values.index_copy_(0, torch.arange(length, length + len(v)), v)
    return length + len(v)


def append_unchecked(keys, values, length, k, v):
    keys[length : length + len(k)] = k
    values[length : length + len(k)] = v
    return length + len(k)


def append_until_it_breaks(keys, values, length, k, v):
    for row in range(len(k)):
        keys[length + row] = k[row]
        values[length + row] = v[row]
    return length + len(k)


def append_to_new_tensors(keys, values, length, k, v):
    keys = torch.cat([keys[:length], k])
    values = torch.cat([values[:length], v])
    return len(keys)


def append_at_the_front(keys, values, length, k, v):
    keys[: len(k)], values[: len(k)] = k, v
    return length + len(k)


def append_keys_twice(keys, values, length, k, v):
    return append(keys, values, length, k, k)


def append_forgetting_the_values(keys, values, length, k, v):
    return append(keys, values.clone(), length, k, v)


def append_counting_the_new(keys, values, length, k, v):
    return append(keys, values, length, k, v) - length


def append_returning_nothing(keys, values, length, k, v):
    append(keys, values, length, k, v)


def append_saying_full_too_early(keys, values, length, k, v):
    if length + len(k) >= len(keys):
        raise ValueError("full")
    return append(keys, values, length, k, v)


def append_returning_none_when_full(keys, values, length, k, v):
    return append(keys, values, length, k, v) if length + len(k) <= len(keys) else None


def append_only_two_numbers(keys, values, length, k, v):
    end = append(keys, values, length, k, v)
    keys[length:end, :, 2:] = 0
    return end


@pytest.mark.parametrize("right", [append, append_in_a_loop, append_with_narrow])
def test_cache_append_accepts(right, capsys):
    assert passes(checks.cache_append, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (append_unchecked, "before the first write"),
        (append_until_it_breaks, "before the first write"),
        (append_to_new_tensors, "into the tensors given"),
        (append_at_the_front, "got       length 3; keys [15 16] [3 4] [0 0] [0 0]"),
        (
            append_keys_twice,
            "expected  length 3; keys [1 2] [3 4] [15 16] [0 0]; values [-1 -2] [-3 -4] [-15 -16] [0 0]",
        ),
        (append_forgetting_the_values, "values [-1 -2] [-3 -4] [0 0] [0 0]"),
        (append_counting_the_new, "got       length 1;"),
        (append_returning_nothing, "got       length None;"),
        (append_saying_full_too_early, "raised    ValueError: full"),
        (append_returning_none_when_full, "expected  an exception; keys [1 2] [3 4] [5 6] [7 8]"),
        (append_only_two_numbers, "Any number of heads"),
    ],
)
def test_cache_append_refuses(wrong, told):
    assert told in message(checks.cache_append, wrong)


def test_writing_some_rows_before_refusing_is_shown():
    text = message(checks.cache_append, lambda keys, *rest: append_until_it_breaks_later(keys, *rest))
    assert "got       an exception; keys [1 2] [3 4] [15 16] [17 18]" in text


def append_until_it_breaks_later(keys, values, length, k, v):
    """Refuses a full cache at once, but fills the free rows of one that is nearly full."""
    if length == len(keys) and len(k):
        raise ValueError("full")
    return append_until_it_breaks(keys, values, length, k, v)


# naive_over_cached --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda n: sum(i * i for i in range(1, n + 1)) / sum(range(1, n + 1)),
        lambda n: (2 * n + 1) / 3,
        lambda n: Fraction(2 * n + 1, 3),
        lambda n: torch.arange(1.0, n + 1).square().sum() / torch.arange(1.0, n + 1).sum(),
        lambda n: np.sum(np.arange(n + 1) ** 2) / np.sum(np.arange(n + 1)),
    ],
    ids=["sums", "formula", "fraction", "tensor", "numpy"],
)
def test_naive_over_cached_accepts(right, capsys):
    assert passes(checks.naive_over_cached, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda n: n**3 / (n**2 + (n - 1) * n), "1 + 4 entries"),  # every pass as dear as the last
        (lambda n: (n + 1) / 2, "got       1.5"),  # token-wise work
        (lambda n: (2 * n + 1) // 3, "No rounding"),
        (lambda n: sum(range(1, n + 1)) / sum(i * i for i in range(1, n + 1)), "expected  1.66"),  # upside down
        (lambda n: sum(i * i for i in range(n)) / sum(range(n)), "raised    ZeroDivisionError"),  # stops at n - 1
        (lambda n: str((2 * n + 1) / 3), "got       '1.0'"),
    ],
    ids=["the chapter's", "tokens", "rounded", "upside down", "one short", "text"],
)
def test_naive_over_cached_refuses(wrong, told):
    assert told in message(checks.naive_over_cached, wrong)


# kv_bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda layers, heads, dim, size: 2 * layers * heads * dim * size,
        lambda layers, heads, dim, size: sum(heads * dim * size for _ in range(layers) for _ in ("key", "value")),
        lambda layers, heads, dim, size: 2 * torch.empty(layers, heads, dim, dtype=torch.uint8).nbytes * size,
        lambda layers, heads, dim, size: torch.tensor([2, layers, heads, dim, size]).prod(),
    ],
    ids=["product", "loop", "allocated", "tensor"],
)
def test_kv_bytes_accepts(right, capsys):
    assert passes(checks.kv_bytes, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda layers, heads, dim, size: layers * heads * dim * size, "a key *and* a value"),
        (lambda layers, heads, dim, size: 2 * layers * dim * size, "expected  524288"),  # one head
        (lambda layers, heads, dim, size: 2 * layers * heads * dim * 2, "kv_bytes(32, 8, 128, 1)"),  # always fp16
        (lambda layers, heads, dim, size: 2 * layers * 32 * dim * size, "kv_bytes(80, 8, 128, 2)"),  # always 32 heads
        (lambda layers, heads, dim, size: 2 * layers * heads * dim * size / MIB, "got       0.5"),
    ],
    ids=["keys only", "one head", "always fp16", "always 32 heads", "MiB"],
)
def test_kv_bytes_refuses(wrong, told):
    assert told in message(checks.kv_bytes, wrong)


# cache_mebibytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda requests, tokens, size: requests * tokens * size / MIB,
        lambda requests, tokens, size: sum(tokens * size for _ in range(requests)) / 2**20,
        lambda requests, tokens, size: Fraction(requests * tokens * size, MIB),
    ],
    ids=["product", "loop", "fraction"],
)
def test_cache_mebibytes_accepts(right, capsys):
    assert passes(checks.cache_mebibytes, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda requests, tokens, size: requests * tokens * size / 10**6, "got       524.288"),
        (lambda requests, tokens, size: tokens * size / MIB, "a cache of its own"),  # one request
        (lambda requests, tokens, size: requests * tokens * size // MIB, "expected  0.5"),
        (lambda requests, tokens, size: requests * tokens * size, "got       524288000"),
        (lambda requests, tokens, size: requests * tokens * 0.5, "cache_mebibytes(4, 8192, 131072)"),  # Llama-2-7B only
    ],
    ids=["MB", "one request", "whole", "bytes", "one model"],
)
def test_cache_mebibytes_refuses(wrong, told):
    assert told in message(checks.cache_mebibytes, wrong)


# requests_that_fit --------------------------------------------------------------------------------


def fit_by_adding(card, weights, per_token, tokens):
    """One request after the other, while there is room."""
    requests = 0
    while weights + (requests + 1) * per_token * tokens <= card:
        requests += 1
    return requests


@pytest.mark.parametrize(
    "right",
    [
        lambda card, weights, per_token, tokens: max(0, card - weights) // (per_token * tokens),
        lambda card, weights, per_token, tokens: max(0, (card - weights) // per_token // tokens),
        lambda card, weights, per_token, tokens: np.int64(max(0, (card - weights) // per_token // tokens)),
        fit_by_adding,
    ],
    ids=["bytes", "tokens", "numpy", "one by one"],
)
def test_requests_that_fit_accepts(right, capsys):
    assert passes(checks.requests_that_fit, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda card, weights, per_token, tokens: card // (per_token * tokens), "Weights first"),
        (lambda card, weights, per_token, tokens: (card - weights) // (per_token * tokens), "not for minus some"),
        (lambda card, weights, per_token, tokens: max(0, card - weights) / (per_token * tokens), "expected  23"),
        (
            lambda card, weights, per_token, tokens: -((weights - card) // (per_token * tokens)),
            "whole requests",
        ),
        (lambda card, weights, per_token, tokens: max(0, card - weights) // per_token, "expected  23"),  # tokens
        (lambda card, weights, per_token, tokens: max(0, card - weights - 1) // (per_token * tokens), "exactly 3"),
    ],
    ids=["no weights", "negative", "not whole", "rounded up", "tokens", "one byte short"],
)
def test_requests_that_fit_refuses(wrong, told):
    assert told in message(checks.requests_that_fit, wrong)
