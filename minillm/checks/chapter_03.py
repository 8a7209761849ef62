"""Chapter 3, the KV cache: appending to it, how much work it saves, how much memory it takes."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.checks.base import Case, describe, run_check, same_value
from minillm.costs import (
    A100_80GB,
    LLAMA_2_7B,
    LLAMA_2_70B,
    LLAMA_3_8B,
    QWEN3_0_6B,
    RTX_4090,
    MemoryFit,
    kv_bytes_per_token,
)


class Appended(NamedTuple):
    """What one call of `cache_append` left behind."""

    length: Any  # what it returned; REFUSED if it raised because of an overflow
    keys: Tensor  # [capacity, Hkv, D]
    values: Tensor  # [capacity, Hkv, D]


REFUSED = "an exception"


def cache_append(function: Callable) -> None:
    """`cache_append(keys, values, length, k, v)` -> the new length; writes in place, or refuses and writes nothing."""
    run_check("cache_append", _observed(function), _append_cases(), same=_same_append, show=_show_append)


def _append_cases() -> Iterator[Case]:
    overflow = (
        "Compare length + k.shape[0] with keys.shape[0] before the first write, and raise if it is more. "
        "(A slice that ends early can swallow a row without a word.)"
    )
    yield _append_case(4, 2, 1, "Write behind the cached rows, into the tensors given: keys[length:length + new] = k.")
    yield _append_case(6, 0, 3, "Into an empty cache (length 0) three new tokens go to the rows 0, 1 and 2.")
    yield _append_case(4, 1, 3, "Three tokens behind one just fill a capacity of 4: that is allowed.")
    yield _append_case(3, 1, 2, "Any number of heads, any head size: index the first dimension only.", heads=2, dim=3)
    yield _append_case(4, 2, 0, "No new token: nothing to write, and the length stays.")
    yield _append_case(4, 4, 1, overflow)
    yield _append_case(4, 2, 3, overflow)


def _append_case(capacity: int, length: int, new: int, hint: str, heads: int = 1, dim: int = 2) -> Case:
    """Old keys are 1, 2, 3, ..., new ones go on from there plus 10; values are the negatives; free rows hold 0."""
    numbers = torch.arange(1.0, 1 + (length + new) * heads * dim).view(length + new, heads, dim)
    old, k = numbers[:length], numbers[length:] + 10
    free = torch.zeros(max(0, capacity - length), heads, dim)
    keys = torch.cat([old, free])
    if length + new > capacity:
        expected = Appended(REFUSED, keys, -keys)
    else:
        after = torch.cat([old, k, free[new:]])
        expected = Appended(length + new, after, -after)
    return Case((keys, -keys, length, k, -k), expected, hint)


def _observed(function: Callable) -> Callable:
    """The reader's function and what it did to the cache; an exception is a refusal only if the rows do not fit."""

    def observed(keys: Tensor, values: Tensor, length: int, k: Tensor, v: Tensor) -> Appended:
        try:
            returned = function(keys, values, length, k, v)
        except Exception as error:
            if isinstance(error, NotImplementedError) or length + k.shape[0] <= keys.shape[0]:
                raise
            returned = REFUSED
        return Appended(returned, keys, values)

    return observed


def _same_append(got: Appended, expected: Appended) -> bool:
    same_rows = torch.equal(got.keys, expected.keys) and torch.equal(got.values, expected.values)
    return same_rows and same_value(got.length, expected.length)


def _show_append(outcome: Appended) -> str:
    returned = REFUSED if outcome.length is REFUSED else f"length {describe(outcome.length)}"
    return f"{returned}; keys {_rows(outcome.keys)}; values {_rows(outcome.values)}"


def _rows(cache: Tensor) -> str:
    """One bracket a token, its heads joined: [1 2] [3 4] [0 0]."""
    return " ".join("[" + " ".join(f"{number + 0.0:g}" for number in row) + "]" for row in cache.flatten(1).tolist())


def naive_over_cached(function: Callable) -> None:
    """`naive_over_cached(n)` -> score entries of passes over 1..n tokens, without a cache over with one."""
    hints = {
        1: "One pass of one token has one entry, with and without a cache.",
        2: "Passes of 1 and 2 tokens: 1 + 4 entries without a cache, 1 + 2 with one. No rounding.",
        7: "Add up i * i for i = 1..n, and i for i = 1..n; then divide.",
        10: "385 / 55. (1000 / 190 would make every pass as expensive as the last.)",
        100: "338,350 / 5,050.",
        1000: "The ratio keeps growing with n.",
    }
    cases = [Case((n,), sum(i * i for i in range(n + 1)) / sum(range(n + 1)), hint) for n, hint in hints.items()]
    run_check("naive_over_cached", function, cases)


def kv_bytes(function: Callable) -> None:
    """`kv_bytes(num_layers, num_kv_heads, head_dim, dtype_bytes)` -> bytes one token adds to the cache."""
    hint = "In each layer every KV head keeps a key *and* a value: head_dim numbers each, dtype_bytes bytes a number."
    shapes = [(LLAMA_2_7B, 2), (LLAMA_2_70B, 2), (LLAMA_3_8B, 1), (QWEN3_0_6B, 4)]
    cases = [
        Case((c.num_hidden_layers, c.num_key_value_heads, c.head_dim, size), kv_bytes_per_token(c, size), hint)
        for c, size in shapes
    ]
    cases.append(Case((1, 1, 1, 1), 2, "One key and one value of one byte."))
    run_check("kv_bytes", function, cases)


def cache_mebibytes(function: Callable) -> None:
    """`cache_mebibytes(num_requests, tokens_each, bytes_per_token)` -> MiB of all the requests' caches."""
    llama_2, llama_3 = kv_bytes_per_token(LLAMA_2_7B), kv_bytes_per_token(LLAMA_3_8B)
    cases = [
        Case((1, 1000, llama_2), 500.0, "A MiB is 1024 * 1024 bytes; with 1,000,000 you would get MB."),
        Case((10, 500, llama_2), 2500.0, "Each request has a cache of its own: requests * tokens * bytes a token."),
        Case((1, 1, llama_2), 0.5, "Half a MiB is an answer too: divide with /, not with //."),
        Case((4, 8192, llama_3), 4096.0, "Requests * tokens * bytes a token, divided by 1024 * 1024."),
        Case((0, 500, llama_2), 0.0, "No request, no cache."),
    ]
    run_check("cache_mebibytes", function, cases)


def requests_that_fit(function: Callable) -> None:
    """`requests_that_fit(card_bytes, weight_bytes, bytes_per_token, tokens_each)` -> whole requests, at least 0."""
    weights, per_token = 2 * LLAMA_2_7B.num_parameters, kv_bytes_per_token(LLAMA_2_7B)
    small, large = RTX_4090.memory_bytes, A100_80GB.memory_bytes
    calls = [
        (
            (small, weights, per_token, 1000),
            "Weights first, then whole requests: tokens_each * bytes_per_token each.",
        ),
        (
            (large, weights, per_token, 4096),
            "Weights first, then whole requests: tokens_each * bytes_per_token each.",
        ),
        ((1000, 400, 2, 100), "600 bytes are left, a request takes 200: exactly 3."),
        ((999, 400, 2, 100), "Only whole requests count, so round down."),
        ((1000, 1000, 2, 100), "Nothing is left beside the weights."),
        ((small, 10 * weights, per_token, 1000), "Weights larger than the card leave room for 0, not for minus some."),
    ]
    cases = [Case(call, _num_requests(*call), hint) for call, hint in calls]
    run_check("requests_that_fit", function, cases)


def _num_requests(card_bytes: int, weight_bytes: int, bytes_per_token: int, tokens_each: int) -> int:
    return MemoryFit(card_bytes, weight_bytes, bytes_per_token, reserved_bytes=0).num_requests(tokens_each)
