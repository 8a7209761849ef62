"""The decoder: Llama, Mistral, Qwen2 and Qwen3 in one file, token-wise, without a batch dimension.

Everything here acts on each token alone: embedding, RMSNorm, the projections, RoPE, the gated MLP. The one place
where tokens meet is the callable `attend`, handed in by the caller:

    attend(layer, q, k, v) -> out      # [T, Hq, D], [T, Hkv, D], [T, Hkv, D] -> [T, Hq, D]

So the model does not know whether its T tokens are one prompt, one new token, a padded batch or parts of forty
requests; masks, caches and block tables live behind `attend`. Sources: Touvron et al. 2023 (Llama), Jiang et al. 2023
(Mistral 7B), Qwen2 and Qwen3 technical reports.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import ModelConfig, RopeConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Decoder(nn.Module):
    """Token ids in, last hidden states out; `logits` turns chosen rows of those into scores over the vocabulary."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.register_buffer("inv_freq", rope_frequencies(config.rope, config.head_dim), persistent=False)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """[T] token ids at [T] positions -> [T, hidden] final hidden states. The caller has checked both ranges."""
        hidden = self.embed_tokens(token_ids)  # [T, hidden]
        rotation = rope_rotation(self.inv_freq, positions, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rotation, attend)
        return self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, ids]: only for the rows asked for, and only for ids the tokenizer knows."""
        projection = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, projection.weight[: self.config.num_sampled_ids])

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
    """Attention, then the MLP, each on a normalised copy of the stream and added back to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    """Projections and RoPE around `attend`; one matrix product makes q, k and v together."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.sizes = (config.query_size, config.key_value_size, config.key_value_size)
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.query_size, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q, k, v = self.qkv_proj(hidden).split(self.sizes, dim=-1)  # [T, Hq*D], [T, Hkv*D], [T, Hkv*D]
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))  # [T, H, D]
        q = rotate(self.q_norm(q), rotation)
        k = rotate(self.k_norm(k), rotation)
        out = attend(self.layer, q, k, v)  # [T, Hq, D]: the only line in which tokens meet
        return self.o_proj(out.flatten(-2))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU); gate and up in one matrix product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)  # [T, ff] each
        return self.down_proj(F.silu(gate) * up)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019), in float32 at least, whatever the dtype of x."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normalised.to(x.dtype) * self.weight


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """[D/2] radians a position: theta^(-2i/D), stretched as `rope.scaling` says. Always float32, as it is trained."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
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
    """Cosine and sine of every token's angles, [T, 1, D/2] each: one table for all layers and heads."""
    angles = positions[:, None].to(torch.float32) * inv_freq[None, :]  # [T, D/2]
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of [T, H, D] by its angle, the pairing that transformers' checkpoints use."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)  # [T, H, D/2] each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
