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

from minillm.model.config import ModelConfig, RopeConfig
from minillm.model.linear import Embedding, Linear, pack, pack_linears, packed_linear, worth_packing

ALIGNED_IDS = 64  # on a GPU so many columns of the logits or a multiple are computed, if the weight has so many rows

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Decoder(nn.Module):
    """Token ids in, last hidden states out; `logits` turns chosen rows of those into scores over the vocabulary."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("packed_head", None, persistent=False)  # the output projection, after `pack`
        self.register_buffer("inv_freq", rope_frequencies(config.rope, config.head_dim), persistent=False)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """[T] token ids at [T] positions -> [T, hidden] final hidden states. The caller has checked both ranges."""
        hidden = self.embed_tokens(token_ids)  # [T, hidden]
        rotation = rope_rotation(self.inv_freq, positions, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rotation, attend)
        return self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, ids]: only for the rows asked for, and only for ids the tokenizer knows.

        On a GPU they may be a view of wider rows: it multiplies slowly where rows begin at odd addresses, and a
        vocabulary is rarely a round number (Qwen3's tokenizer knows 151,669 ids, its matrix has 151,936).
        """
        if self.packed_head is not None:
            return packed_linear(hidden, self.packed_head)
        weight = (self.embed_tokens if self.lm_head is None else self.lm_head).weight
        num_ids = num_rows = self.config.num_sampled_ids
        if hidden.device.type != "cpu" and (aligned := -(-num_ids // ALIGNED_IDS) * ALIGNED_IDS) <= len(weight):
            num_rows = aligned
        return F.linear(hidden, weight[:num_rows])[..., :num_ids]

    def pack(self) -> None:
        """Bring the weights into the form that this machine multiplies fastest, where there is one (see `linear`).

        For a model that only computes from now on: it cannot be moved, cast or saved afterwards. What is computed
        changes by rounding alone.
        """
        self.pack_head()
        pack_linears(self.layers)  # not lm_head: `logits` reads a part of its weight if that part was too small

    def pack_head(self) -> None:
        """`pack` for the output projection alone, of which only the rows that are read are kept."""
        head = (self.embed_tokens if self.lm_head is None else self.lm_head).weight[: self.config.num_sampled_ids]
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
        self.num_heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.qkv_proj = Linear(config.hidden_size, sum(self.num_heads) * self.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(config.query_size, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        heads = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))  # [T, Hq + 2 * Hkv, D]
        q, k, v = heads.split(self.num_heads, dim=-2)
        q = rotate(self.q_norm(q), rotation)
        k = rotate(self.k_norm(k), rotation)
        out = attend(self.layer, q, k, v)  # [T, Hq, D]: the only line in which tokens meet
        return self.o_proj(out.flatten(-2))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU); gate and up in one matrix product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

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
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """[D/2] radians a position: theta^(-2i/D), stretched as `rope.scaling` says. Always float32, as it is trained."""
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
