"""The `attend` of a paged step on kernels: everything it must know of the requests is a few tensors on the device."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.kernels import Backend
from minillm.runtime.cache_engine import CacheEngine
from minillm.runtime.paged_attention import PagedBatch
from minillm.runtime.step_inputs import NO_SLOT


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


def attention_inputs(batch: PagedBatch, num_rows: int) -> AttentionInputs:
    """The same of a batch on the host, padded to `num_rows` tokens."""
    num_tokens, num_decodes, chunks = len(batch.slots), len(batch.tables), batch.chunks
    starts = [0, *(chunk.end_row - num_decodes for chunk in chunks)]
    ends = [chunk.end for chunk in chunks]
    tables = [chunk.table for chunk in chunks]
    if num_rows > num_tokens:  # the padding is a request of its own, of no tokens
        starts.append(num_rows - num_decodes)
        ends.append(0)
        tables.append(np.zeros_like(chunks[0].table if chunks else batch.tables[0]))
    slots = np.full(num_rows, NO_SLOT)
    slots[:num_tokens] = batch.slots
    return AttentionInputs(
        slots=torch.from_numpy(slots),
        num_decodes=num_decodes,
        decode_tables=torch.from_numpy(batch.tables.astype(np.int32)),
        decode_lengths=torch.from_numpy((batch.positions[:num_decodes] + 1).astype(np.int32)),
        chunk_tables=torch.from_numpy(np.array(tables, np.int32).reshape(len(tables), -1 if tables else 0)),
        chunk_starts=torch.tensor(starts, dtype=torch.int32),
        chunk_lengths=torch.tensor(ends, dtype=torch.int32),
        max_queries=max((end - chunk.start for end, chunk in zip(ends, chunks, strict=False)), default=0),
    )


class KernelAttention:
    """Stores the step's keys and values by slot, then one call of a kernel for all decodes and one for all chunks."""

    def __init__(self, cache: CacheEngine, inputs: AttentionInputs, backend: Backend):
        self.cache = cache
        self.inputs = inputs
        self.backend = backend
        self.windows = [cache.config.sliding_window(layer) for layer in range(cache.config.num_hidden_layers)]

    @property
    def score_entries(self) -> int:
        """Query-key pairs scored, in one head of one layer; waits for the device."""
        step = self.inputs
        counts = step.chunk_starts.diff()
        chunks = counts * step.chunk_lengths - counts * (counts - 1) // 2
        return int(step.decode_lengths.sum() + chunks[step.chunk_lengths > 0].sum())

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
        return self.cache.layers[layer]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """[T, Hq, D] -> [T, Hq, D], where the new keys and values have been stored already."""
        step, (keys, values) = self.inputs, self.pool(layer)
        window = self.windows[layer]
        kernels = self.backend if layer == 0 else self.backend.unchecked or self.backend
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        split, num_rows = step.num_decodes, q.shape[0]
        if split == num_rows:
            kernels.decode(q, keys, values, step.decode_tables, step.decode_lengths, window, out=out)
            return out
        if split:
            kernels.decode(q[:split], keys, values, step.decode_tables, step.decode_lengths, window, out=out[:split])
        chunks = step.chunk_tables, step.chunk_starts, step.chunk_lengths, step.max_queries
        kernels.prefill(q[split:], keys, values, *chunks, window, out=out[split:])
        return out
