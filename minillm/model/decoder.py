"""The decoder: Llama, Mistral, Qwen2 and Qwen3 in one file, token-wise, without a batch dimension.

Everything here acts on each token by itself: embedding, RMSNorm, the projections, RoPE, the gated MLP. The one place
where tokens meet is the callable `attend`, handed in by the caller:

    attend(layer, q, k, v) -> out      # [T, Hq, D], [T, Hkv, D], [T, Hkv, D] -> [T, Hq, D]

So the model does not know whether its T tokens are one prompt, one new token, a padded batch or parts of forty
requests; masks, caches and block tables live behind `attend`. Sources: Touvron et al. 2023 (Llama), Jiang et al. 2023
(Mistral 7B), Qwen2 and Qwen3 technical reports.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model.config import ModelConfig, RopeConfig
from minillm.model.linear import Embedding, Linear, pack, pack_linears, packed_linear, plain, worth_packing
from minillm.model.shards import WHOLE, Shard

ALIGNED_IDS = 64  # on a GPU a multiple of this many columns of the logits is computed, if the weight has enough rows

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Decoder(nn.Module):
    """Token ids in, last hidden states out; `logits` turns chosen rows of those into scores over the vocabulary."""

    def __init__(self, config: ModelConfig, shard: Shard = WHOLE):
        super().__init__()
        self.config, self.shard = config, shard  # a rank has its part's shape, but the whole vocabulary
        vocab_rows = shard.vocab_rows(config.vocab_size)
        self.embed_tokens = Embedding(vocab_rows, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, vocab_rows, bias=False)
        self.register_buffer("packed_head", None, persistent=False)  # the output projection, after `pack`
        self.register_buffer("inv_freq", rope_frequencies(config.rope, config.head_dim), persistent=False)

    def forward(
        self, token_ids: Tensor, positions: Tensor, attend: Attend, layers: "list[BoundLayer] | None" = None
    ) -> Tensor:
        """[T] token ids at [T] positions -> [T, hidden] final hidden states. The caller has checked both ranges.

        `layers` are those of `bound`, for callers that call often or have faster small operations.
        """
        layers = self.bound() if layers is None else layers
        # [T, hidden]: the stream, to which every layer adds twice
        embed, shard = self.embed_tokens, self.shard
        hidden = embed(token_ids) if shard.size == 1 else shard.embed(embed, token_ids)
        rotation = rope_rotation(self.inv_freq, positions, hidden.dtype)
        x = self.layers[0].input_layernorm(hidden)
        for layer in layers:  # one name for all values: what is no longer needed is freed
            x = layer.attend_heads(layer.qkv_proj(x), layer.heads, rotation, attend)  # [T, Hq, D]: they meet
            x = layer.add_rms_norm(layer.o_proj(x.flatten(-2)), hidden, *layer.attention_norm)
            x = layer.silu_mul(layer.gate_up_proj(x))  # [T, ff]
            x = layer.add_rms_norm(layer.down_proj(x), hidden, *layer.next_norm)
        return x

    def bound(self, first: "Operations | None" = None, others: "Operations | None" = None) -> "list[BoundLayer]":
        """The layers with all that `forward` needs looked up: an attribute of a module costs a CPU as much as a kernel.

        The small operations are `first` in the first layer and `others` in the layers after it; by default plain torch.
        For weights that are in place and will not be replaced.
        """
        first = first or PLAIN
        following = [layer.input_layernorm for layer in self.layers[1:]] + [self.norm]
        return [
            bind(layer, norm, number, (others or first) if number else first, self.shard)
            for number, (layer, norm) in enumerate(zip(self.layers, following, strict=True))
        ]

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, ids]: only for the rows asked for, and only for ids the tokenizer knows.

        On a GPU they may be a view of wider rows: products are slow where rows begin at odd addresses, and a vocabulary
        is rarely a round number. Qwen3's tokenizer knows 151,669 ids, its matrix has 151,936.
        """
        num_ids, is_part = self.config.num_sampled_ids, self.shard.size > 1
        ours = self._logits(hidden, self.embed_tokens.num_embeddings if is_part else num_ids)
        return self.shard.gather(ours)[..., :num_ids].contiguous() if is_part else ours

    def _logits(self, hidden: Tensor, num_ids: int) -> Tensor:
        """The product with the first `num_ids` rows of the head, or a few more."""
        if self.packed_head is not None:
            return packed_linear(hidden, self.packed_head)
        weight, num_rows = (self.embed_tokens if self.lm_head is None else self.lm_head).weight, num_ids
        if hidden.device.type != "cpu" and (aligned := -(-num_ids // ALIGNED_IDS) * ALIGNED_IDS) <= len(weight):
            num_rows = aligned
        return F.linear(hidden, weight[:num_rows])[..., :num_ids]

    def pack(self) -> None:
        """Bring the weights into the form that this machine multiplies fastest, where there is one (see `linear`).

        Only for a model that will not be moved, cast or saved afterwards. What it computes changes only by rounding.
        """
        self.pack_head()
        pack_linears(self.layers)  # not lm_head: `logits` reads a part of its weight where `pack_head` did not pay

    def pack_head(self) -> None:
        """`pack` for the output projection only; of its rows, those that are read are kept."""
        head = (self.embed_tokens if self.lm_head is None else self.lm_head).weight
        head = head[: self.config.num_sampled_ids] if self.shard.size == 1 else head
        if worth_packing(head):
            self.packed_head, self.lm_head = pack(head), None

    def _apply(self, fn, recurse=True):
        """Casting or moving the model must not round the RoPE frequencies: they stay float32."""
        super()._apply(fn, recurse)
        self.inv_freq = rope_frequencies(self.config.rope, self.config.head_dim).to(self.device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The data type of weights, activations and cache."""
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device


class DecoderLayer(nn.Module):
    """The weights of attention, then of the MLP, each behind the norm whose output it reads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)


class Attention(nn.Module):
    """The projections around `attend`; one matrix product makes q, k and v together."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads, config.num_key_value_heads
        num_heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.qkv_proj = Linear(config.hidden_size, num_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(config.query_size, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU); gate and up in one matrix product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019), in float32 at least, whatever the dtype of x."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """[D/2] radians per position: theta^(-2i/D), stretched as `rope.scaling` says. Always float32, as it is trained."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        return _stretch_long_wavelengths(frequencies, rope)
    return frequencies


def _stretch_long_wavelengths(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1's rule: keep short wavelengths, divide long ones by `factor`, blend linearly in between."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)  # full turns within the first context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = blend.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def rope_rotation(inv_freq: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every token's angles, [T, 1, D] each: one table for all layers and heads."""
    angles = positions[:, None].to(torch.float32) * inv_freq[None, :]  # [T, D/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype)[:, None], torch.cat((-sin, sin), -1).to(dtype)[:, None]


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of [T, H, D] by its angle, the pairing that transformers' checkpoints use."""
    cos, signed_sin = rotation
    partner = x.roll(x.shape[-1] // 2, dims=-1)  # what each number is paired with
    return torch.addcmul(x * cos, partner, signed_sin)


# --- a layer, bound to its operations ---


class Norm(NamedTuple):
    """An RMSNorm's numbers."""

    weight: Tensor
    eps: float


class Heads(NamedTuple):
    """How a projection is cut into heads, and how these are normalised."""

    layer: int
    num_heads: int  # Hq
    num_kv_heads: int  # Hkv
    q_weight: Tensor | None  # [D], of the RMSNorm of every query head; None without one
    k_weight: Tensor | None
    eps: float


class Operations(NamedTuple):
    """What is computed between the matrix products, one function for what one kernel can do."""

    attend_heads: Callable[[Tensor, Heads, tuple[Tensor, Tensor], Attend], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    silu_mul: Callable[[Tensor], Tensor]


class BoundLayer(NamedTuple):
    """The parts of a layer in the order of their use, and the norm that comes after it."""

    qkv_proj: Callable[[Tensor], Tensor]
    heads: Heads
    o_proj: Callable[[Tensor], Tensor]
    attention_norm: Norm  # after attention
    gate_up_proj: Callable[[Tensor], Tensor]
    down_proj: Callable[[Tensor], Tensor]
    next_norm: Norm  # after the MLP: of the next layer, or the last
    attend_heads: Callable
    add_rms_norm: Callable
    silu_mul: Callable


def bind(layer: DecoderLayer, following: RMSNorm, number: int, operations: Operations, shard: Shard) -> BoundLayer:
    """A layer whose weights are in place; `following` is the norm that comes after it."""
    by_rows = plain if shard.size == 1 else lambda linear: shard.summed(plain(linear))
    attention, mlp, norm, q_norm = layer.self_attn, layer.mlp, layer.post_attention_layernorm, layer.self_attn.q_norm
    head_norms = (None, None, 0.0) if q_norm is None else (q_norm.weight, attention.k_norm.weight, q_norm.eps)
    return BoundLayer(
        qkv_proj=plain(attention.qkv_proj),
        heads=Heads(number, *attention.num_heads, *head_norms),
        o_proj=by_rows(attention.o_proj),
        attention_norm=Norm(norm.weight, norm.eps),
        gate_up_proj=plain(mlp.gate_up_proj),
        down_proj=by_rows(mlp.down_proj),
        next_norm=Norm(following.weight, following.eps),
        **operations._asdict(),
    )


def attend_heads(qkv: Tensor, heads: Heads, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
    """[T, (Hq + 2 * Hkv) * D] of the fused projection -> [T, Hq, D] the result of `attend`."""
    layer, num_heads, num_kv_heads, q_weight, k_weight, eps = heads
    split = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))  # [T, Hq + 2 * Hkv, D]
    q, k, v = split.split((num_heads, num_kv_heads, num_kv_heads), dim=-2)
    if q_weight is not None:
        q, k = (F.rms_norm(x, weight.shape, weight, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    return attend(layer, rotate(q, rotation), rotate(k, rotation), v)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add [T, hidden] `x` to `residual` in place, and normalise the sum -> [T, hidden]."""
    residual += x
    return F.rms_norm(residual, weight.shape, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * ff] -> silu(first half) * second half, [T, ff]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


PLAIN = Operations(attend_heads, add_rms_norm, silu_mul)
