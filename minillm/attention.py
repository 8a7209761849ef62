"""Attention itself, in two equal forms, and the `attend` callables that the chapters swap.

`masked_attention` is softmax(QK^T / sqrt(d) + mask) V written out (Vaswani et al. 2017, equation 1); `sdpa_attention`
computes the same through torch's fused kernel. Both give zeros, never NaN, for a query that may see nothing.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm import masks
from minillm.config import ModelConfig
from minillm.kv_cache import KVCache

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attention_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """[Tq, Hq, D] queries, [Tk, Hkv, D] keys, bool [Tq, Tk] -> [Hq, Tq, Tk] weights; rows sum to 1, or 0 if empty.

    With fewer key than query heads, neighbouring query heads share a key head (grouped-query attention).
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [Tk, Hq, D]
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])  # [Hq, Tq, Tk]
    scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(dim=-1)
    return weights.masked_fill(~mask.any(dim=-1)[:, None], 0.0)  # a row of -inf alone would be NaN


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The readable form: [Tq, Hq, D], [Tk, Hkv, D], [Tk, Hkv, D], bool [Tq, Tk] -> [Tq, Hq, D]."""
    weights = attention_weights(q, k, mask)  # [Hq, Tq, Tk]
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)  # [Tk, Hq, D]
    return torch.einsum("hqk,khd->qhd", weights, v)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The fast twin of `masked_attention`, same shapes: torch's scaled_dot_product_attention.

    The query heads that share a key head become rows of one longer query, so the keys are never repeated in memory.
    """
    num_queries, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    q = q.unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)  # [Hkv, group * Tq, D]
    k, v = k.transpose(0, 1), v.transpose(0, 1)  # [Hkv, Tk, D]
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)  # [Tq, Tk]
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias.repeat(group, 1))[0]
    out = out.unflatten(1, (group, num_queries)).permute(2, 0, 1, 3).flatten(1, 2)  # [Tq, Hq, D]
    return out.masked_fill(~mask.any(dim=-1)[:, None, None], 0.0)


class CausalAttention:
    """Chapter 1 and 2: the tokens of this pass are the whole sequence, under a causal mask.

    `score_entries` counts the query-key pairs scored, in one head of one layer.
    """

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
    """Chapter 3 and 4: append this pass's keys and values to a cache, then look at everything in it.

    One new token is a decode step; several are a prompt or a chunk of one, under a rectangular mask.
    `score_entries` counts the query-key pairs scored, in one head of one layer.
    """

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
