"""What all kernels require of their arguments: each backend states its `Limits`; an error names anything else.

Only shapes, strides, types and devices are checked, never a number in a tensor: that would mean waiting for the GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.errors import KernelError


@dataclass(frozen=True)
class Limits:
    """What the kernels of one backend take; None = anything. A `range` gives the ends and the step."""

    kernels: str  # their name in messages: "the Triton kernels"
    instead: str  # what a message tells the reader to do
    devices: tuple[str, ...]  # device types
    dtypes: tuple[torch.dtype, ...]
    head_sizes: Sequence[int] | None = None
    block_sizes: Sequence[int] | None = None
    groups: Sequence[int] | None = None  # query heads that share a key head
    missing: str | None = None  # why these kernels cannot run in this Python at all

    def refusal(self, device: str, dtype: torch.dtype, head_size: int, block_size: int, group: int) -> str | None:
        """Which of these values is not taken, and what is; None if all are."""
        if self.missing:
            return f"{self.missing}; {self.instead}"
        rows = (
            (device, device, self.devices),
            (dtype, dtype, self.dtypes),
            (head_size, f"head size {head_size}", self.head_sizes),
            (block_size, f"block_size {block_size}", self.block_sizes),
            (group, f"{group} query heads per key head", self.groups),
        )
        for value, words, taken in rows:
            if taken is not None and value not in taken:
                return f"{words}: {self.kernels} take {_listed(taken)}; {self.instead}"
        return None


def check_pool(keys: Tensor, values: Tensor, limits: Limits, num_heads: int | None = None) -> None:
    """Raise KernelError unless these are a layer's [num_blocks, block_size, Hkv, D] pools, and within the limits.

    `num_heads` query heads share the Hkv key heads evenly; without it they are not checked.
    """
    if keys.ndim != 4 or keys.shape != values.shape or not (keys.is_contiguous() and values.is_contiguous()):
        raise KernelError(
            f"pools of keys {list(keys.shape)} and values {list(values.shape)}: pass one layer each, contiguous, "
            "[num_blocks, block_size, Hkv, D]"
        )
    if keys.dtype != values.dtype:
        raise KernelError(f"keys are {keys.dtype}, values {values.dtype}; they must be the same")
    _, block_size, num_kv_heads, head_size = keys.shape
    num_heads = num_kv_heads if num_heads is None else num_heads
    if num_heads % num_kv_heads:
        raise KernelError(f"{num_heads} query heads over {num_kv_heads} key heads: pass whole query heads per key head")
    values_taken = keys.device.type, keys.dtype, head_size, block_size, num_heads // num_kv_heads
    if refusal := limits.refusal(*values_taken):
        raise KernelError(refusal)


def check_store(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor, limits: Limits) -> None:
    """Raise KernelError unless [T, Hkv, D] keys and values fit the pools and there is a slot for each."""
    check_pool(keys, values, limits)
    check_rows("k", k, keys)
    check_rows("v", v, keys)
    check_integers("slots", slots, (len(k),), keys)
    if k.shape != v.shape or k.shape[1] != keys.shape[2]:
        raise KernelError(
            f"k {list(k.shape)} and v {list(v.shape)} do not fit a pool of {keys.shape[2]} heads; pass [T, Hkv, D] each"
        )


def check_decode(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, window: int | None, limits: Limits
) -> int:
    """Returns the query heads per key head. Raises KernelError unless all fits [B, Hq, D] queries, one token each."""
    group = _check_attention(q, keys, values, tables, window, limits)
    check_integers("tables", tables, (len(q), tables.shape[1]), keys)
    check_integers("lengths", lengths, (len(q),), keys)
    return group


def check_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    max_queries: int,
    window: int | None,
    limits: Limits,
) -> int:
    """Returns the query heads per key head. Raises KernelError unless all fits [T, Hq, D] queries of some requests."""
    group = _check_attention(q, keys, values, tables, window, limits)
    check_integers("tables", tables, tuple(tables.shape), keys)
    check_integers("query_starts", query_starts, (len(tables) + 1,), keys)
    check_integers("lengths", lengths, (len(tables),), keys)
    if max_queries < 0:
        raise KernelError(f"max_queries {max_queries}: pass the most new tokens a request has, 0 or more")
    return group


def _check_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, window: int | None, limits: Limits
) -> int:
    if q.ndim != 3:
        raise KernelError(f"q of shape {list(q.shape)}: pass [T, Hq, D]")
    check_pool(keys, values, limits, q.shape[1])
    check_rows("q", q, keys)
    if tables.ndim != 2:
        raise KernelError(f"tables of shape {list(tables.shape)}: pass [B, W]")
    if window is not None and window < 1:
        raise KernelError(f"window {window}: pass 1 key or more, or None for all")
    return q.shape[1] // keys.shape[2]


def check_rows(name: str, x: Tensor, keys: Tensor) -> None:
    """[T, H, D] of the pool's dtype and device; tokens may lie apart (a slice of fused QKV), heads may not."""
    head_size = keys.shape[3]
    together = x.ndim == 3 and x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == head_size)
    if not together or x.shape[2] != head_size:
        raise KernelError(
            f"{name} of shape {list(x.shape)}, strides {list(x.stride())}: pass [T, heads, {head_size}] whose heads "
            "are neighbours in memory"
        )
    if x.dtype != keys.dtype or x.device != keys.device:
        raise KernelError(
            f"{name} is {x.dtype} on {x.device}, the pool {keys.dtype} on {keys.device}; they must be the same"
        )


def check_integers(name: str, x: Tensor, shape: tuple[int, ...], beside: Tensor) -> None:
    """Raise KernelError unless `x` holds whole numbers, of this shape, on the device of the tensor `beside`."""
    strided = x.ndim > 0 and x.shape[-1] > 1 and x.stride(-1) != 1
    if x.shape != shape or x.dtype not in (torch.int32, torch.int64) or x.device != beside.device or strided:
        raise KernelError(
            f"{name}: {x.dtype} of shape {list(x.shape)}, strides {list(x.stride())}, on {x.device}; pass int32 or "
            f"int64 of shape {list(shape)}, stride 1, on {beside.device}"
        )


def check_matrix(
    name: str,
    x: Tensor,
    limits: Limits,
    shape: tuple[int, ...] | None = None,
    beside: Tensor | None = None,
    *,
    rows_apart: bool = False,
) -> None:
    """Raise KernelError unless `x` is a matrix within the limits; of this shape and `beside`'s kind.

    It may have no gaps; with `rows_apart`, only between rows.
    """
    if x.ndim != 2 or not (x.is_contiguous() or (rows_apart and x.stride(1) == 1 and x.stride(0) >= x.shape[1])):
        raise KernelError(f"{name} of shape {list(x.shape)}, strides {list(x.stride())}: pass a contiguous matrix")
    if x.dtype not in limits.dtypes or x.device.type not in limits.devices:
        raise KernelError(
            f"{name} is {x.dtype} on {x.device}: {limits.kernels} take {_listed(limits.dtypes)} on "
            f"{_listed(limits.devices)}; use kernels/ops.py"
        )
    if beside is not None:
        check_table(name, x, shape, beside)


def check_table(name: str, x: Tensor, shape: tuple[int, ...], beside: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise KernelError unless `x` has this shape, without gaps, on the device and of the dtype of `beside`."""
    dtype = dtype or beside.dtype
    if x.shape != shape or x.dtype != dtype or x.device != beside.device or not x.is_contiguous():
        raise KernelError(
            f"{name}: {x.dtype} of shape {list(x.shape)}, strides {list(x.stride())}, on {x.device}; pass {dtype} of "
            f"shape {list(shape)}, contiguous, on {beside.device}"
        )


def check_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, limits: Limits) -> None:
    """Raise KernelError unless two [T, hidden] and the [hidden] weight of a norm fit each other."""
    check_matrix("x", x, limits)
    check_matrix("residual", residual, limits, tuple(x.shape), x)
    check_table("weight", weight, (x.shape[1],), x)


def check_sample_rows(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, draws: Tensor, limits: Limits, *, rows_apart: bool = False
) -> None:
    """Raise KernelError unless there are [R, V] logits, V at least 1, and three [R] columns beside them."""
    check_matrix("logits", logits, limits, rows_apart=rows_apart)
    num_rows, num_ids = logits.shape
    check_table("temperatures", temperatures, (num_rows,), logits, torch.float32)
    for name, numbers in (("seeds", seeds), ("draws", draws)):
        check_table(name, numbers, (num_rows,), logits, torch.int64)
    if num_ids < 1:
        raise KernelError("logits of 0 ids: there is nothing to draw")


def check_silu_mul(gate_up: Tensor, limits: Limits) -> None:
    """Raise KernelError unless this is a [T, 2 * ff]."""
    check_matrix("gate_up", gate_up, limits)
    if gate_up.shape[1] % 2:
        raise KernelError(
            f"gate_up has {gate_up.shape[1]} columns; pass gate and up beside each other, so an even number"
        )


def check_norm_rotate_store(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotation: tuple[Tensor, Tensor],
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    limits: Limits,
) -> None:
    """Raise KernelError unless a fused projection, norms, RoPE's tables and slots fit each other and the pools."""
    check_pool(keys, values, limits, num_heads)
    head_size, num_tokens = keys.shape[3], len(qkv)
    check_matrix("qkv", qkv, limits, (num_tokens, (num_heads + 2 * num_kv_heads) * head_size), keys)
    if num_kv_heads != keys.shape[2]:
        raise KernelError(f"{num_kv_heads} key heads for a pool of {keys.shape[2]}; the numbers must be equal")
    if (q_weight is None) != (k_weight is None):
        raise KernelError("one of q_weight and k_weight is None; pass both or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_table(name, weight, (head_size,), keys)
    for name, table in zip(("cosines", "sines"), rotation, strict=True):
        check_table(name, table, (num_tokens, 1, head_size), keys)
    check_integers("slots", slots, (num_tokens,), keys)


def output_for(q: Tensor, out: Tensor | None) -> Tensor:
    """`out`, or a new tensor for the result of these queries. Raise KernelError if `out` does not fit."""
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.shape != q.shape or out.dtype != q.dtype or out.device != q.device or not out.is_contiguous():
        raise KernelError(
            f"out: {out.dtype} of shape {list(out.shape)} on {out.device}; pass a contiguous {q.dtype} of shape "
            f"{list(q.shape)} on {q.device}"
        )
    return out


def _listed(taken: Sequence) -> str:
    if isinstance(taken, range):
        steps = "" if taken.step == 1 else f" in steps of {taken.step}"
        return f"{taken[0]} to {taken[-1]}{steps}"
    return ", ".join(map(str, taken))
