"""The `attend` of a paged step on kernels: everything it must know of the requests is a few tensors on the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from minillm.runtime.cache_engine import CacheEngine
from minillm.runtime.kernels.dispatch import Backend


class AttentionInputs(NamedTuple):
    """Where the T tokens of a step lie in the paged cache: requests with one new token first, then the chunks.

    Whole numbers of 32 or 64 bits, all on the pool's device. A row of padding has slot -1; among the requests with one
    token its length is 0. Padding behind the chunks must be the rows of a last chunk of length 0.
    """

    slots: Tensor  # [T], where each token's keys and values are stored: block * block_size + offset
    num_decodes: int  # Bd: the first so many rows are of requests with one new token
    decode_tables: Tensor  # [Bd, W] block tables
    decode_lengths: Tensor  # [Bd] keys each has, its new one included
    chunk_tables: Tensor  # [Bc, W] block tables of requests with several new tokens
    chunk_starts: Tensor  # [Bc + 1] first row of each, counted from the first row behind the decodes; then the end
    chunk_lengths: Tensor  # [Bc] keys each has, its new ones included
    max_queries: int  # new tokens of a chunk, at most


class KernelAttention:
    """Stores the step's keys and values by slot, then one call of a kernel for all decodes and one for all chunks."""

    def __init__(self, cache: CacheEngine, inputs: AttentionInputs, backend: Backend):
        self.cache = cache
        self.inputs = inputs
        self.backend = backend

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, Hq, D] queries, [T, Hkv, D] new keys and values -> [T, Hq, D]."""
        self.backend.store_kv(*self.pool(layer), self.slots, k, v)
        return self.attend(layer, q)

    @property
    def slots(self) -> Tensor:
        """[T] places of the new keys and values."""
        return self.inputs.slots

    def pool(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [num_blocks, block_size, Hkv, D] each."""
        return self.cache.keys[layer], self.cache.values[layer]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """[T, Hq, D] -> [T, Hq, D], where the new keys and values have been stored already."""
        step, (keys, values) = self.inputs, self.pool(layer)
        window = self.cache.config.sliding_window(layer)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        split = step.num_decodes
        if split:
            self.backend.decode(
                q[:split], keys, values, step.decode_tables, step.decode_lengths, window, out=out[:split]
            )
        if split < len(q):
            chunks = step.chunk_tables, step.chunk_starts, step.chunk_lengths, step.max_queries
            self.backend.prefill(q[split:], keys, values, *chunks, window, out=out[split:])
        return out
