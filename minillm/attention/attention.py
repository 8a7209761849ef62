"""Attention itself, in two equal forms.

`masked_attention` is softmax(QK^T / sqrt(d) + mask) V written out (Vaswani et al. 2017, equation 1); `sdpa_attention`
computes the same through torch's fused kernel. Both give zeros, never NaN, for a query that may see nothing.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.errors import KernelError, checked

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@checked(error=KernelError)
def attention_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """[Tq, Hq, D] queries, [Tk, Hkv, D] keys, bool [Tq, Tk] -> [Hq, Tq, Tk] weights; rows sum to 1, or 0 if empty.

    With fewer key than query heads, neighbouring query heads share a key head (grouped-query attention).
    Any leading batch dimensions, the same for all three, are kept.
    """
    _check_shapes(q, k, k, mask)
    k = k.repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2)  # [Tk, Hq, D]
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1])  # [Hq, Tq, Tk]
    mask = mask.unsqueeze(-3)  # [1, Tq, Tk]
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)  # a row of only -inf would be NaN


@checked(error=KernelError)
def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The readable form: [Tq, Hq, D], [Tk, Hkv, D], [Tk, Hkv, D], bool [Tq, Tk] -> [Tq, Hq, D]; batch kept."""
    _check_shapes(q, k, v, mask)
    weights = attention_weights(q, k, mask)  # [Hq, Tq, Tk]
    v = v.repeat_interleave(q.shape[-2] // v.shape[-2], dim=-2)  # [Tk, Hq, D]
    return torch.einsum("...hqk,...khd->...qhd", weights, v)


@checked(error=KernelError)
def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The fast twin of `masked_attention`, same shapes: torch's scaled_dot_product_attention."""
    _check_shapes(q, k, v, mask)
    added = additive_mask(mask, group=q.shape[-2] // k.shape[-2], dtype=q.dtype)
    out = fused_attention(q, k.transpose(-3, -2), v.transpose(-3, -2), added)
    return out.masked_fill(~mask.any(dim=-1)[..., None, None], 0.0)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
    """Raises KernelError unless they are what attention takes."""
    if (
        q.ndim < 3
        or k.ndim != q.ndim
        or not k.shape[-2]
        or q.shape[-2] % k.shape[-2]
        or q.shape[-1] != k.shape[-1]
        or v.shape != k.shape
        or mask.dtype != torch.bool
        or mask.shape[-2:] != (q.shape[-3], k.shape[-3])
    ):
        shapes = f"q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}, {mask.dtype} mask {[*mask.shape]}"
        raise KernelError(
            f"{shapes} do not go together; give [Tq, Hq, D], [Tk, Hkv, D] twice, bool [Tq, Tk], Hq a multiple of Hkv"
        )


def additive_mask(mask: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """bool [Tq, Tk] -> 0 or -inf, [1, group * Tq, Tk], as `fused_attention` adds it to the scores."""
    return torch.cat([zero_or_minus_infinity(mask, dtype)] * group, dim=-2).unsqueeze(-3)


def zero_or_minus_infinity(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as a term to add to scores, of the same shape."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    """[Tq, Hq, D] queries, [Hkv, Tk, D] keys and values, an additive mask -> [Tq, Hq, D]; batch kept.

    The `group` query heads that share a key head become rows of one longer query, so the keys are never repeated in
    memory. The result for a query that may see nothing is undefined.
    """
    num_queries, num_heads = q.shape[-3:-1]
    group = num_heads // k.shape[-3]
    q = q.unflatten(-2, (-1, group)).movedim(-4, -2).flatten(-3, -2)  # [Hkv, group * Tq, D]
    if q.ndim == 3:
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=added[None])[0]
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
    return out.unflatten(-2, (group, num_queries)).movedim(-2, -4).flatten(-3, -2)  # [Tq, Hq, D]
