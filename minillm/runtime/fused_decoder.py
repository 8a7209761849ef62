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

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from minillm.model import Decoder, DecoderLayer, RMSNorm, plain, rope_rotation
from minillm.runtime.kernel_attention import KernelAttention

Product = Callable[[Tensor], Tensor]


class Norm(NamedTuple):
    """An RMSNorm's numbers."""

    weight: Tensor
    eps: float


class FusedLayer(NamedTuple):
    """What a layer is made of, looked up once: modules and their attributes cost a CPU as much as a small kernel."""

    qkv_proj: Product
    num_heads: tuple[int, int]  # Hq, Hkv
    head_norms: tuple[Tensor | None, Tensor | None, float]  # weights of q's and k's norm, and their eps
    o_proj: Product
    attention_norm: Norm  # after attention
    gate_up_proj: Product
    down_proj: Product
    next_norm: Norm  # after the MLP: of the next layer, or the last


class FusedDecoder:
    """The forward pass of a `Decoder` whose weights will not change any more.

    `ops`: `kernels.ops`, `kernels.cpu` or `kernels.triton_ops`. Where it has `unchecked` operations, they are used in
    all layers but the first, which are like it.
    """

    def __init__(self, model: Decoder, ops: ModuleType):
        self.model = model
        self.ops = ops
        self.fast_ops = getattr(ops, "unchecked", ops)
        following = [layer.input_layernorm for layer in model.layers[1:]] + [model.norm]
        pairs = zip(model.layers, following, strict=True)
        self.layers = [fused_layer(layer, norm, model.config.qk_norm) for layer, norm in pairs]

    def __call__(self, token_ids: Tensor, positions: Tensor, attend: KernelAttention) -> Tensor:
        """[T] token ids at [T] positions -> [T, hidden] final hidden states, as `model(token_ids, positions, attend)`.

        The caller has checked both ranges.
        """
        model, ops = self.model, self.ops
        residual = model.embed_tokens(token_ids)  # [T, hidden]; each addition is written into it
        rotation = rope_rotation(model.inv_freq, positions, residual.dtype)
        normed = model.layers[0].input_layernorm(residual)
        for number, layer in enumerate(self.layers):
            q = ops.norm_rotate_store(
                layer.qkv_proj(normed),
                *layer.num_heads,
                *layer.head_norms,
                rotation,
                attend.slots,
                *attend.pool(number),
            )  # [T, Hq, D]
            out = layer.o_proj(attend.attend(number, q).flatten(-2))
            normed = ops.add_rms_norm(out, residual, *layer.attention_norm)
            out = layer.down_proj(ops.silu_mul(layer.gate_up_proj(normed)))
            normed = ops.add_rms_norm(out, residual, *layer.next_norm)
            ops = self.fast_ops
        return normed


def fused_layer(layer: DecoderLayer, following: RMSNorm, qk_norm: bool) -> FusedLayer:
    """The parts of a layer, and of the norm that comes after it."""
    attention, mlp, norm = layer.self_attn, layer.mlp, layer.post_attention_layernorm
    head_norms = (None, None, 0.0)
    if qk_norm:
        head_norms = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps
    return FusedLayer(
        qkv_proj=plain(attention.qkv_proj),
        num_heads=attention.num_heads[:2],
        head_norms=head_norms,
        o_proj=plain(attention.o_proj),
        attention_norm=Norm(norm.weight, norm.eps),
        gate_up_proj=plain(mlp.gate_up_proj),
        down_proj=plain(mlp.down_proj),
        next_norm=Norm(following.weight, following.eps),
    )
