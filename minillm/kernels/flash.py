"""Paged attention by the FlashAttention-2 that torch brings with it: `torch.nn.attention.varlen.varlen_attn`.

One call does for decode and prefill: a decode step is a prefill of one query a request. What must be known of it:

- Its pages are multiples of 256 tokens. Keys are stored by our Triton kernel, which takes pages of up to 256.
- For one query, causal or not is the same; said as "no window" it lets the heads of a group share the keys they load.
- `num_splits=1`: left to itself it may cut the keys of paged requests into parts that come out as NaN (torchtitan issue
  3235). torch 2.11 has no `block_table`, and the FlashAttention-2 of torch 2.12 takes no `num_splits`.
- Block tables, lengths and starts are read as int32; others are converted, a small kernel each.
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from minillm.kernels import triton_kernels
from minillm.kernels.checks import Limits, check_decode, check_prefill, check_store, output_for

LEAST_TORCH = (2, 13)


def missing(version: str) -> str | None:
    """Why this version of torch will not do; None if it will."""
    if tuple(int(part) for part in version.split(".")[:2]) >= LEAST_TORCH:
        return None
    return f"torch {version}: varlen_attn takes block_table and num_splits together from torch 2.13 on"


LIMITS = Limits(
    kernels="torch's FlashAttention kernels",
    instead='use attention_backend "triton"',
    devices=("cuda",),
    dtypes=(torch.float16, torch.bfloat16),
    head_sizes=triton_kernels.HEAD_SIZES,
    block_sizes=(256,),
    missing=missing(torch.__version__),
)


def store_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Write [T, Hkv, D] new keys and values into the pool of a layer, as `triton_kernels.store_kv` does.

    Raises KernelError for what these kernels do not take.
    """
    check_store(keys, values, slots, k, v, LIMITS)
    triton_kernels.store_kv(keys, values, slots, k, v)


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    window: int | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """B requests with one new token each, [B, Hq, D] queries, read through [B, W] block tables -> [B, Hq, D].

    As `reference.decode`. Raises KernelError for what these kernels do not take.
    """
    check_decode(q, keys, values, tables, lengths, window, LIMITS)
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    left_and_right = (-1, -1) if window is None else (window - 1, 0)
    return _attend(q, keys, values, tables, starts, lengths, 1, left_and_right, out)


def prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    max_queries: int,
    window: int | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """New tokens of B requests, one after the other in [T, Hq, D], read through [B, W] block tables -> [T, Hq, D].

    As `reference.prefill`, but rows of no request are undefined. Raises KernelError for what these kernels do not take.
    """
    check_prefill(q, keys, values, tables, query_starts, lengths, max_queries, window, LIMITS)
    left_and_right = (-1, 0) if window is None else (window - 1, 0)
    return _attend(q, keys, values, tables, query_starts, lengths, max_queries, left_and_right, out)


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_queries: int,
    left_and_right: tuple[int, int],
    out: Tensor | None,
) -> Tensor:
    out = output_for(q, out)
    if not len(q) or not len(tables) or not max_queries:
        return out
    starts = starts.int()
    result = varlen_attn(
        q,
        keys,
        values,
        starts,
        starts,  # of keys: required, but not read where there are block tables
        max_queries,
        tables.shape[1] * keys.shape[1],
        window_size=left_and_right,
        enable_gqa=q.shape[1] != keys.shape[2],
        seqused_k=lengths.int(),
        block_table=tables.int(),
        num_splits=1,
    )
    return out.copy_(result)
