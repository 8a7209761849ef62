"""Contiguous key-value caches, of one sequence and of several.

Keys and values of old tokens never change under a causal mask, so they are computed once and kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minillm.errors import (
    CacheFullError,
    ConfigError,
    Count,
    KernelError,
    OutOfMemoryError,
    Positive,
    check_device,
    checked,
)
from minillm.model import ModelConfig


class KVCache:
    """Room for `capacity` tokens of one sequence, allocated once: [capacity, Hkv, D] keys and values per layer.

    `length` counts the tokens whose keys and values are stored in *every* layer. A forward pass over T new tokens
    calls `append` once per layer and `advance(T)` once at its end. Until then the length is unchanged, so a pass that
    fails half-way leaves the cache as it was.
    """

    @checked
    def __init__(self, config: ModelConfig, capacity: Positive, dtype: torch.dtype, device=None):
        shape = (config.num_hidden_layers, capacity, config.num_key_value_heads, config.head_dim)
        self.keys = allocate(torch.empty, shape, dtype, device)  # [L, capacity, Hkv, D]
        self.values = allocate(torch.empty, shape, dtype, device)  # [L, capacity, Hkv, D]
        self.capacity = capacity
        self.length = 0

    @checked(error=KernelError)
    def append(self, layer: Count, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store [T, Hkv, D] keys and values after the cached ones; return views of all, [length + T, Hkv, D].

        Raises CacheFullError, and stores nothing, if the T tokens do not fit.
        """
        if layer >= len(self.keys) or k.shape != v.shape or k.ndim != 3 or k.shape[1:] != self.keys.shape[2:]:
            raise KernelError(
                f"keys {[*k.shape]} and values {[*v.shape]} for layer {layer} do not fit a cache of {len(self.keys)} "
                f"layers of [tokens, {self.keys.shape[2]}, {self.keys.shape[3]}]"
            )
        end = self.length + k.shape[0]
        if end > self.capacity:
            raise CacheFullError(
                f"{k.shape[0]} tokens do not fit after the {self.length} cached ones: capacity is {self.capacity}; "
                "make the cache larger or generate fewer tokens"
            )
        self.keys[layer, self.length : end] = k
        self.values[layer, self.length : end] = v
        return self.keys[layer, :end], self.values[layer, :end]

    @checked
    def advance(self, num_tokens: Count) -> None:
        """Count `num_tokens` as cached, after every layer has appended them. Raises CacheFullError past the end."""
        if self.length + num_tokens > self.capacity:
            raise CacheFullError(
                f"{self.length} + {num_tokens} tokens are more than the capacity of {self.capacity}; "
                "advance by no more than was appended"
            )
        self.length += num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes allocated, used or not."""
        return self.keys.nbytes + self.values.nbytes


class RowCache:
    """One contiguous row of `capacity` tokens for each of `num_rows` requests that run together.

    Every row is reserved for the longest possible request, used or not: simple, and what chapter 8 replaces.
    Values start as zeros and return to zeros, because a masked key still multiplies its value: 0 * NaN is NaN.
    """

    @checked
    def __init__(self, config: ModelConfig, num_rows: Positive, capacity: Positive, dtype: torch.dtype, device=None):
        shape = (config.num_hidden_layers, num_rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = allocate(torch.zeros, shape, dtype, device)  # [L, R, Hkv, capacity, D]
        self.values = allocate(torch.zeros, shape, dtype, device)  # [L, R, Hkv, capacity, D]
        self.capacity = capacity
        self.free_rows = list(range(num_rows))[::-1]

    @checked
    def take(self, num_tokens: Count) -> int:
        """A free row for a request of at most `num_tokens`. Raises CacheFullError if there is none that fits."""
        if num_tokens > self.capacity or not self.free_rows:
            raise CacheFullError(
                f"no row for a request of {num_tokens} tokens: {len(self.free_rows)} rows are free, "
                f"each holds {self.capacity}; run fewer or shorter requests"
            )
        return self.free_rows.pop()

    @checked
    def release(self, row: Count) -> None:
        """Give a row back. Raises ConfigError for one that is not taken."""
        if row >= self.keys.shape[1] or row in self.free_rows:
            raise ConfigError(f"row {row} is not taken; there are {self.keys.shape[1]}, free are {self.free_rows}")
        self.keys[:, row].zero_()
        self.values[:, row].zero_()
        self.free_rows.append(row)

    def places(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where the tokens at [T] positions of [T] rows are stored: [T * Hkv] vectors of D numbers."""
        num_kv_heads = self.keys.shape[2]
        heads = torch.arange(num_kv_heads, device=self.keys.device)
        return ((rows[:, None] * num_kv_heads + heads) * self.capacity + positions[:, None]).flatten()

    def store(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Write [T, Hkv, D] keys and values to their places."""
        self.keys[layer].flatten(0, 2).index_copy_(0, places, k.flatten(0, 1))
        self.values[layer].flatten(0, 2).index_copy_(0, places, v.flatten(0, 1))

    def read(self, layer: int, rows: list[int], num_tokens: int) -> tuple[Tensor, Tensor]:
        """The first `num_tokens` keys and values of B rows, [B, Hkv, num_tokens, D]; views of neighbouring rows."""
        keys, values = self.keys[layer, :, :, :num_tokens], self.values[layer, :, :, :num_tokens]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return keys[rows[0] : rows[0] + len(rows)], values[rows[0] : rows[0] + len(rows)]
        chosen = torch.tensor(rows, device=keys.device)
        return keys.index_select(0, chosen), values.index_select(0, chosen)


def allocate(make: Callable, shape: tuple[int, ...], dtype: torch.dtype, device) -> Tensor:
    """A tensor of a cache, by torch.empty or torch.zeros. Raises OutOfMemoryError if there is no memory for it."""
    device = None if device is None else check_device("device", device)
    try:
        return make(shape, dtype=dtype, device=device)
    except (RuntimeError, TypeError, OverflowError) as error:  # torch's, also for numbers beyond 64 bits
        raise OutOfMemoryError(f"a cache of {[*shape]} numbers of {dtype} does not fit; make it smaller") from error
