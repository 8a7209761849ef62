"""The decoder's forward pass with its small operations fused: the same weights, the same result, fewer kernels.

On a GPU a kernel of a decode step takes microseconds, and so does launching it or waiting for its last thread. In
`Decoder.forward` a layer is 20 kernels with qk-norm and 18 without; here it is 9:

                      model.py                                          fused
    before attention  norm, qkv; q and k: norm, and 3 for RoPE          (norm), qkv, norm_rotate_store
    attention         store, attend                                     attend
    after it          o_proj, add, norm, gate_up, silu, multiply,       o_proj, add_rms_norm, gate_up, silu_mul,
                      down, add                                         down, add_rms_norm

counting one kernel for each RMSNorm, and for attention where its keys are not split (a second one puts splits
together). A norm is fused with the addition before it, so the last one of a layer is the first of the next layer.
"""

from types import ModuleType

from torch import Tensor

from minillm.model import Attention, Decoder, GatedMLP, rope_rotation
from minillm.runtime.kernel_attention import KernelAttention


def fused_forward(
    model: Decoder, token_ids: Tensor, positions: Tensor, attend: KernelAttention, ops: ModuleType
) -> Tensor:
    """[T] token ids at [T] positions -> [T, hidden] final hidden states, as `model(token_ids, positions, attend)`.

    `ops`: `kernels.ops` or `kernels.triton_ops`. The caller has checked both ranges.
    """
    residual = model.embed_tokens(token_ids)  # [T, hidden]; each addition is written into it
    rotation = rope_rotation(model.inv_freq, positions, residual.dtype)
    normed = model.layers[0].input_layernorm(residual)
    following = [layer.input_layernorm for layer in model.layers[1:]] + [model.norm]
    for layer, next_norm in zip(model.layers, following, strict=True):
        out = _attention(layer.self_attn, normed, rotation, attend, ops)
        norm = layer.post_attention_layernorm
        normed = ops.add_rms_norm(out, residual, norm.weight, norm.eps)
        out = _mlp(layer.mlp, normed, ops)
        normed = ops.add_rms_norm(out, residual, next_norm.weight, next_norm.eps)
    return normed


def _attention(
    layer: Attention, hidden: Tensor, rotation: tuple[Tensor, Tensor], attend: KernelAttention, ops: ModuleType
) -> Tensor:
    num_heads, num_kv_heads, _ = layer.num_heads
    weights, eps = (None, None), 0.0
    if attend.cache.config.qk_norm:
        weights, eps = (layer.q_norm.weight, layer.k_norm.weight), layer.q_norm.eps
    pool = attend.pool(layer.layer)
    q = ops.norm_rotate_store(
        layer.qkv_proj(hidden), num_heads, num_kv_heads, *weights, eps, rotation, attend.slots, *pool
    )  # [T, Hq, D]
    return layer.o_proj(attend.attend(layer.layer, q).flatten(-2))


def _mlp(layer: GatedMLP, hidden: Tensor, ops: ModuleType) -> Tensor:
    return layer.down_proj(ops.silu_mul(layer.gate_up_proj(hidden)))
