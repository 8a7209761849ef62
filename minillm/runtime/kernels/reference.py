"""Paged attention in plain torch: the CPU's kernel, and what faster kernels are compared with.

The pool of one layer is [num_blocks, block_size, Hkv, D]; a token's *slot* is block * block_size + offset. Attention
gathers a request's blocks in the order of its block table and calls torch's fused attention on what it gathered, so a
table must not reach past the pool, and what is masked must be finite: 0 * NaN is NaN.

Measured on the CPU: many requests of one length in a single call are fastest as long as what is gathered fits the
second-level cache. Hence `groups_of`: neighbours in length together, GROUP_BYTES at most.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from minillm.attention import fused_attention

GROUP_BYTES = 1 << 20  # of keys and values gathered at once


def store_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Write [T, Hkv, D] new keys and values into the pool of a layer, [N, block_size, Hkv, D], at [T] slots."""
    keys.flatten(0, 1).index_copy_(0, slots, k)
    values.flatten(0, 1).index_copy_(0, slots, v)


def gather_kv(keys: Tensor, values: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Through [B, W] block tables, keys and values in the order of the tokens, [B, Hkv, W * block_size, D] each."""
    chosen = tables.flatten()
    shape = (tables.shape[0], -1, *keys.shape[2:])
    k, v = keys.index_select(0, chosen).view(shape), values.index_select(0, chosen).view(shape)
    return k.transpose(1, 2), v.transpose(1, 2)


def decode(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, mask: Tensor) -> Tensor:
    """One new token each of B requests, [B, Hq, D] queries, looks through [B, W] block tables -> [B, Hq, D].

    `mask` is additive, [B, 1, 1, W * block_size]. Query heads that share a key head are rows of one longer query.
    """
    k, v = gather_kv(keys, values, tables)  # [B, Hkv, W * block_size, D]
    q = q.unflatten(1, (k.shape[1], -1))  # [B, Hkv, group, D]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, -1, q.shape[2], -1))
    return out.flatten(1, 2)


def prefill(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    """Several new tokens of one request, [Tq, Hq, D], look through its [W] block table, cached prefix included.

    `mask` is additive, [1, 1, group * Tq, W * block_size], repeated for the `group` query heads that share a key head.
    """
    k, v = gather_kv(keys, values, table[None])  # [1, Hkv, W * block_size, D]
    return fused_attention(q[None], k, v, mask)[0]


class Group(NamedTuple):
    """Neighbouring rows whose requests are attended to in one call."""

    first: int
    end: int
    width: int  # blocks gathered of each: those of the longest


def groups_of(widths: Sequence[int], block_bytes: int) -> list[Group]:
    """Cut rows, in rising order of the blocks they look at, into groups of at most GROUP_BYTES gathered.

    `block_bytes`: keys and values of a block in one layer. A request that is larger alone is a group of its own.
    """
    groups, end = [], len(widths)
    while end > 0:
        width = max(1, widths[end - 1])
        first = max(0, end - max(1, GROUP_BYTES // (width * block_bytes)))
        groups.append(Group(first, end, width))
        end = first
    return groups[::-1]
