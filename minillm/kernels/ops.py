"""The small operations between the matrix products of a step, in plain torch; `triton_ops` fuses them, by name.

Each groups what one kernel of the model's can do at once; `sample_rows` is that of `sampling`.
"""

import torch.nn.functional as F
from torch import Tensor

from minillm.kernels import reference
from minillm.model import add_rms_norm, rotate, silu_mul
from minillm.sampling import sample_rows

__all__ = ["add_rms_norm", "norm_rotate_store", "sample_rows", "silu_mul"]


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
    """From [T, (Hq + 2 * Hkv) * D] of a fused projection: RMSNorm of q's and k's heads if there are weights [D], RoPE
    by `model.rope_rotation`'s tables, keys and values to their [T] slots of a layer's pool -> [T, Hq, D] queries.

    A token whose slot is negative is padding and not stored.
    """
    heads = qkv.unflatten(-1, (-1, keys.shape[-1]))  # [T, Hq + 2 * Hkv, D]
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=-2)
    if q_weight is not None:
        q, k = (F.rms_norm(x, weight.shape, weight, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    reference.store_kv(keys, values, slots, rotate(k, rotation), v)
    return rotate(q, rotation)
