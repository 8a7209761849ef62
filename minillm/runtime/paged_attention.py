"""The `attend` of chapter 8: new tokens go into blocks, and queries look through block tables."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.attention import visible, zero_or_minus_infinity
from minillm.costs import blocks_needed
from minillm.kernels import reference
from minillm.runtime.cache_engine import CacheEngine


class Chunk(NamedTuple):
    """Several new tokens of one request: its prompt, a part of it, or what is computed again."""

    request_id: str
    first: int  # its first row among the step's tokens
    start: int  # position of that token; as many are cached before it
    end: int  # position after its last token
    table: np.ndarray  # its block table

    @property
    def end_row(self) -> int:
        """The row after its last one."""
        return self.first + self.end - self.start


class Call(NamedTuple):
    """What every layer calls once: a kernel for some rows of the step's tokens."""

    kernel: Callable
    rows: slice
    tables: Tensor
    masks: dict[int | None, Tensor]  # one for each window there is


class PagedBatch(NamedTuple):
    """Where the T tokens of a step lie in the paged cache: requests with one new token first, then the chunks.

    The first requests are in rising order of `positions`. Everything is known before the step begins and is the same
    for all layers.
    """

    token_ids: np.ndarray  # [T]
    positions: np.ndarray  # [T], of each token in its own request
    slots: np.ndarray  # [T], where its keys and values are stored: block * block_size + offset
    tables: np.ndarray  # [decodes, W] block tables of the requests with one new token
    chunks: list[Chunk]


class PagedAttention:
    """Stores the step's keys and values by slot, then attends group by group and chunk by chunk.

    `score_entries` counts the query-key pairs scored, in one head of one layer; `mask_bytes` what all masks take.
    """

    def __init__(self, cache: CacheEngine, batch: PagedBatch, device: torch.device):
        self.cache = cache
        config = cache.config
        self.slots = torch.from_numpy(batch.slots).to(device)
        self.windows = [config.sliding_window(layer) for layer in range(config.num_hidden_layers)]
        self.calls: list[Call] = []
        self.score_entries = self.mask_bytes = 0
        if len(batch.tables):
            self._add_decodes(batch, device)
        group = config.num_attention_heads // config.num_key_value_heads  # query heads that share a key head
        for chunk in batch.chunks:
            table = torch.from_numpy(chunk.table[: blocks_needed(chunk.end, cache.block_size)]).to(device)
            positions = torch.arange(chunk.start, chunk.end, device=device).repeat(group)
            masks = self._masks(positions[None, None], len(table))
            self._add(reference.prefill_masked, slice(chunk.first, chunk.end_row), table, masks)

    def _add_decodes(self, batch: PagedBatch, device: torch.device) -> None:
        """One call for each group of neighbours in length; what groups share is made once and sliced."""
        positions = batch.positions[: len(batch.tables)]
        tables = torch.from_numpy(batch.tables).to(device)  # [decodes, W]
        masks = self._masks(torch.from_numpy(positions).to(device)[:, None, None], tables.shape[1])
        widths = (positions // self.cache.block_size + 1).tolist()
        block_bytes = 2 * self.cache.keys[0, 0].nbytes
        for first, end, width in reference.groups_of(widths, block_bytes):
            rows, num_keys = slice(first, end), width * self.cache.block_size
            own_masks = {window: mask[rows, ..., :num_keys] for window, mask in masks.items()}
            self._add(reference.decode_masked, rows, tables[rows, :width].contiguous(), own_masks)

    def _masks(self, positions: Tensor, num_blocks: int) -> dict[int | None, Tensor]:
        num_keys, dtype = num_blocks * self.cache.block_size, self.cache.keys.dtype
        masks = {
            window: zero_or_minus_infinity(visible(positions, num_keys, window), dtype) for window in {*self.windows}
        }
        self.mask_bytes += sum(mask.nbytes for mask in masks.values())
        return masks

    def _add(self, kernel: Callable, rows: slice, tables: Tensor, masks: dict[int | None, Tensor]) -> None:
        """One call of a kernel in every layer."""
        self.calls.append(Call(kernel, rows, tables, masks))
        self.score_entries += (rows.stop - rows.start) * tables.shape[-1] * self.cache.block_size

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values, window = self.cache.keys[layer], self.cache.values[layer], self.windows[layer]
        num_tokens = len(self.slots)  # rows behind them are padding: not stored, and nobody asks what they see
        reference.write_slots(keys, values, self.slots, k[:num_tokens], v[:num_tokens])
        if len(self.calls) == 1 and num_tokens == len(q):
            kernel, _, tables, masks = self.calls[0]
            return kernel(q, keys, values, tables, masks[window])
        out = torch.empty_like(q) if num_tokens == len(q) else torch.zeros_like(q)
        for kernel, rows, tables, masks in self.calls:
            out[rows] = kernel(q[rows], keys, values, tables, masks[window])
        return out
