"""The small operations of `ops`, each fused into one Triton kernel: a number is read once, kept in registers, written.

Computed in float32 and rounded once at the end, where torch rounds after each operation. What is moved for T tokens,
beside weights and tables: add_rms_norm reads two [T, hidden] and writes two (torch: three and two); silu_mul
reads two [T, ff] and writes one (torch: three and two); norm_rotate_store reads qkv once and writes it once, q to the
output, k and v into the pool (torch, with norms: q and k are read five times and written four before k is stored).

Limits, interpreter and checks are those of `triton_kernels`. The sizes of tiles are reasoned, not yet measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.errors import KernelError
from minillm.kernels.checks import check_add_rms_norm, check_norm_rotate_store, check_silu_mul
from minillm.kernels.triton_kernels import LIMITS
from minillm.kernels.triton_sampling import sample_rows

__all__ = ["add_rms_norm", "norm_rotate_store", "sample_rows", "silu_mul"]

MOST_COLUMNS = 16384  # of a row that one program keeps in registers
SILU_COLUMNS = 1024  # of a silu_mul tile
HEADS = 8  # of a token that one program of norm_rotate_store takes: enough bytes in flight to be worth its start


# --- what callers see: see `ops` for what they mean ---


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add [T, hidden] `x` to `residual` in place, and normalise the sum -> [T, hidden]. Raises KernelError."""
    check_add_rms_norm(x, residual, weight, LIMITS)
    num_tokens, size = x.shape
    if size > MOST_COLUMNS:
        raise KernelError(f"hidden size {size}: a program keeps up to {MOST_COLUMNS} numbers; use kernels/ops.py")
    out = torch.empty_like(x)
    columns = triton.next_power_of_2(size)
    if num_tokens:
        _add_rms_norm_kernel[(num_tokens,)](
            x, residual, weight, out, eps, size, COLUMNS=columns, num_warps=_warps(columns)
        )
    return out


def norm_rotate_store(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """From [T, (Hq + 2 * Hkv) * D]: heads of q and k normalised if there are weights, RoPE, keys and values to their
    slots of the pool -> [T, Hq, D] queries. Raises KernelError.
    """
    check_norm_rotate_store(qkv, num_heads, num_kv_heads, q_weight, k_weight, rotation, slots, keys, values, LIMITS)
    head_size, num_tokens, all_heads = keys.shape[3], len(qkv), num_heads + 2 * num_kv_heads
    q = torch.empty(num_tokens, num_heads, head_size, dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        normed = q_weight is not None
        _norm_rotate_store_kernel[(num_tokens, triton.cdiv(all_heads, HEADS))](
            qkv, q_weight if normed else qkv, k_weight if normed else qkv, *rotation, slots, q, keys, values, eps,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=head_size // 2, HEADS=HEADS, NORMED=normed,
            num_warps=4,
        )  # fmt: skip
    return q


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * ff] -> silu(first half) * second half, [T, ff]. Raises KernelError."""
    check_silu_mul(gate_up, LIMITS)
    num_tokens, both = gate_up.shape
    out = torch.empty(num_tokens, both // 2, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        tiles = triton.cdiv(both // 2, SILU_COLUMNS)
        _silu_mul_kernel[(num_tokens, tiles)](gate_up, out, both // 2, COLUMNS=SILU_COLUMNS, num_warps=4)
    return out


# --- kernels ---


@triton.jit
def _add_rms_norm_kernel(x, residual, weight, out, eps, size, COLUMNS: tl.constexpr):
    """One token per program."""
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, COLUMNS)
    real = column < size
    added = tl.load(x + row + column, mask=real, other=0.0).to(tl.float32)
    total = tl.load(residual + row + column, mask=real, other=0.0).to(tl.float32) + added
    total = total.to(out.dtype.element_ty)  # normalise what the next layer will read
    tl.store(residual + row + column, total, mask=real)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / size + eps)
    gain = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row + column, (total * scale * gain).to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _norm_rotate_store_kernel(
    qkv, q_weight, k_weight, cosines, sines, slots, q, keys, values, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token per program, each as two halves: number i of one is rotated with number i of the other.

    What is loaded and computed is the same for q, k and v; what is stored is not.
    """
    D: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    column = tl.arange(0, HALF)[None, :]
    real = head < NUM_HEADS + 2 * NUM_KV_HEADS
    of_q = head < NUM_HEADS
    of_v = head >= NUM_HEADS + NUM_KV_HEADS
    source = qkv + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * D + column  # [HEADS, HALF]
    low, high = tl.load(source, mask=real, other=0.0), tl.load(source + HALF, mask=real, other=0.0)
    first, second = low.to(tl.float32), high.to(tl.float32)
    if NORMED:
        scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / D + eps)[:, None]
        low_weight = tl.where(of_q, tl.load(q_weight + column), tl.load(k_weight + column)).to(tl.float32)
        first = first * scale * low_weight
        high_weight = tl.where(of_q, tl.load(q_weight + HALF + column), tl.load(k_weight + HALF + column))
        second = second * scale * high_weight.to(tl.float32)
    angle = token * D + column
    turned = first * tl.load(cosines + angle).to(tl.float32) + second * tl.load(sines + angle).to(tl.float32)
    angle += HALF
    partner = second * tl.load(cosines + angle).to(tl.float32) + first * tl.load(sines + angle).to(tl.float32)
    turned, partner = turned.to(low.dtype), partner.to(low.dtype)

    target = q + (token * NUM_HEADS + head) * D + column
    tl.store(target, turned, mask=of_q)
    tl.store(target + HALF, partner, mask=of_q)
    slot = tl.load(slots + token).to(tl.int64)
    stored = real & (slot >= 0)
    target = keys + (slot * NUM_KV_HEADS + head - NUM_HEADS) * D + column
    of_k = stored & (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    tl.store(target, turned, mask=of_k)
    tl.store(target + HALF, partner, mask=of_k)
    target = values + (slot * NUM_KV_HEADS + head - NUM_HEADS - NUM_KV_HEADS) * D + column
    tl.store(target, low, mask=stored & of_v)
    tl.store(target + HALF, high, mask=stored & of_v)


@triton.jit
def _silu_mul_kernel(gate_up, out, size, COLUMNS: tl.constexpr):
    """A tile of one token's columns per program."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < size
    source = gate_up + token * 2 * size + column
    gate = tl.load(source, mask=real, other=0.0).to(tl.float32)
    up = tl.load(source + size, mask=real, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * size + column, product.to(out.dtype.element_ty), mask=real)


# --- launch parameters ---


def _warps(columns: int) -> int:
    """A thread keeps about 16 numbers of a row."""
    return min(16, max(1, columns // 512))
