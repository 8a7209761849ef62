"""The `attend` callables of chapters 1 to 7: the one place where tokens meet, with less and less waste."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.attention import Kernel, additive_mask, fused_attention, masks, sdpa_attention
from minillm.errors import Count, checked
from minillm.ladder.kv_cache import KVCache, RowCache
from minillm.model import ModelConfig


class CausalAttention:
    """Chapter 1 and 2: the tokens of this pass are the whole sequence, under a causal mask.

    `score_entries` counts the query-key pairs scored, in one head of one layer.
    """

    @checked
    def __init__(self, config: ModelConfig, kernel: Kernel = sdpa_attention):
        self.config = config
        self.kernel = kernel
        self.score_entries = 0

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = masks.causal(q.shape[0], window=self.config.sliding_window(layer), device=q.device)
        if layer == 0:
            self.score_entries += mask.numel()
        return self.kernel(q, k, v, mask)


class CachedAttention:
    """Chapter 3 and 4: append this pass's keys and values to a cache, then attend to everything in it.

    One new token is a decode step; several are a prompt or a chunk of one, under a rectangular mask.
    `score_entries` counts the query-key pairs scored, in one head of one layer.
    """

    @checked
    def __init__(self, config: ModelConfig, cache: KVCache, kernel: Kernel = sdpa_attention):
        self.config = config
        self.cache = cache
        self.kernel = kernel
        self.score_entries = 0

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.append(layer, k, v)  # [length + T, Hkv, D]
        window = self.config.sliding_window(layer)
        mask = masks.rectangular(q.shape[0], keys.shape[0], window=window, device=q.device)
        if layer == 0:
            self.score_entries += mask.numel()
        return self.kernel(q, keys, values, mask)


class BlockDiagonalAttention:
    """Chapter 6: several concatenated prompts, without a cache; no token sees another prompt.

    `dense` scores all (sum of lengths)^2 pairs under one block-diagonal mask; otherwise each prompt is attended to by
    itself and only the sum of length^2 pairs are scored, as a variable-length kernel does.
    """

    @checked
    def __init__(self, config: ModelConfig, lengths: Sequence[Count], dense: bool, kernel: Kernel = sdpa_attention):
        self.config = config
        self.lengths = list(lengths)
        self.dense = dense
        self.kernel = kernel
        self.score_entries = sum(lengths) ** 2 if dense else sum(length**2 for length in lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self.config.sliding_window(layer)
        if self.dense:
            return self.kernel(q, k, v, masks.block_diagonal(self.lengths, window=window, device=q.device))
        rows = [x.split(self.lengths) for x in (q, k, v)]
        alone = [masks.causal(length, window=window, device=q.device) for length in self.lengths]
        return torch.cat([self.kernel(*row, mask) for *row, mask in zip(*rows, alone, strict=True)])


@dataclass(frozen=True)
class Part:
    """Consecutive new tokens of one request in a step that several requests share."""

    row: int  # of the cache: where its keys and values are
    start: int  # tokens cached before this step
    num_tokens: int  # new tokens

    @property
    def end(self) -> int:
        """Tokens cached after this step."""
        return self.start + self.num_tokens


class RowAttention:
    """What chapters 5 and 7 share: new tokens go to rows of the cache, and queries attend to a row's keys by position.

    `score_entries` counts the query-key pairs scored, in one head of one layer.
    """

    def __init__(self, config: ModelConfig, cache: RowCache, parts: Sequence[Part], device=None):
        self.config = config
        self.cache = cache
        self.device = device
        self.group = config.num_attention_heads // config.num_key_value_heads
        rows = torch.tensor([part.row for part in parts for _ in range(part.num_tokens)], device=device)
        positions = torch.tensor([i for part in parts for i in range(part.start, part.end)], device=device)
        self.places = cache.places(rows, positions)  # of the new tokens

    def mask(self, positions: Tensor, num_keys: int, window: int | None) -> Tensor:
        """[..., Tq] positions of queries (-1: a pad, sees nothing) -> additive mask against a row's first keys."""
        return additive_mask(masks.visible(positions, num_keys, window), self.group, self.cache.keys.dtype)


class PaddedAttention(RowAttention):
    """Chapter 5: B requests as a rectangle of B rows and L columns, pads in front, flattened to B * L tokens.

    Every row is scored against as many keys as the longest request has. Pads are computed like tokens; they are not
    stored, see nothing and are not seen.
    """

    def __init__(self, config: ModelConfig, cache: RowCache, parts: Sequence[Part], row_length: int, device=None):
        super().__init__(config, cache, parts, device)
        self.row_length = row_length
        self.num_keys = max(part.end for part in parts)
        self.cache_rows = [part.row for part in parts]
        rows = [[-1] * (row_length - part.num_tokens) + list(range(part.start, part.end)) for part in parts]
        self.positions = torch.tensor(rows, device=device)  # [B, L]; -1 for pads
        self.pads = self.positions < 0  # [B, L]
        self.real_tokens = (~self.pads).flatten().nonzero()[:, 0]
        self.row_mask = functools.cache(functools.partial(self.mask, self.positions, self.num_keys))
        self.score_entries = len(parts) * row_length * self.num_keys

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.store(layer, self.places, k[self.real_tokens], v[self.real_tokens])
        keys, values = self.cache.read(layer, self.cache_rows, self.num_keys)  # [B, Hkv, K, D]
        q = q.unflatten(0, (-1, self.row_length))  # [B, L, Hq, D]
        out = fused_attention(q, keys, values, self.row_mask(self.config.sliding_window(layer)))
        return out.masked_fill(self.pads[..., None, None], 0.0).flatten(0, 1)


class RaggedAttention(RowAttention):
    """Chapter 7: concatenated new tokens of many requests, each attending only to its own request's cached keys.

    Requests with a single new token are computed together, each against as many keys as the longest of them has;
    chunks of prompts one by one. Nothing is padded outside attention.
    """

    def __init__(self, config: ModelConfig, cache: RowCache, parts: Sequence[Part], device=None):
        super().__init__(config, cache, parts, device)
        first_rows = [0, *itertools.accumulate(part.num_tokens for part in parts)]
        placed = list(zip(first_rows, parts, strict=False))
        self.chunks = [(row, part) for row, part in placed if part.num_tokens > 1]
        decodes = [(row, part) for row, part in placed if part.num_tokens == 1]
        decodes.sort(key=lambda decode: decode[1].row)  # neighbouring rows are read without being copied
        self.cache_rows = [part.row for _, part in decodes]
        self.decode_rows = torch.tensor([row for row, _ in decodes], dtype=torch.long, device=device)
        positions = torch.tensor([[part.start] for _, part in decodes], device=device)  # [decodes, 1]
        self.num_keys = max((part.end for _, part in decodes), default=0)
        self.decode_mask = functools.cache(functools.partial(self.mask, positions, self.num_keys))
        self.chunk_mask = functools.cache(self._chunk_mask)
        self.score_entries = len(decodes) * self.num_keys + sum(part.num_tokens * part.end for _, part in self.chunks)

    def _chunk_mask(self, part: Part, window: int | None) -> Tensor:
        return self.mask(torch.arange(part.start, part.end, device=self.device), part.end, window)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.store(layer, self.places, k, v)
        window = self.config.sliding_window(layer)
        out = torch.empty_like(q)
        for row, part in self.chunks:
            rows = slice(row, row + part.num_tokens)
            keys, values = self.cache.read(layer, [part.row], part.end)  # [1, Hkv, K, D]
            out[rows] = fused_attention(q[None, rows], keys, values, self.chunk_mask(part, window))[0]
        if self.cache_rows:
            keys, values = self.cache.read(layer, self.cache_rows, self.num_keys)  # [decodes, Hkv, K, D]
            queries = q.index_select(0, self.decode_rows)[:, None]  # [decodes, 1, Hq, D]
            new = fused_attention(queries, keys, values, self.decode_mask(window))
            out.index_copy_(0, self.decode_rows, new[:, 0])
        return out
