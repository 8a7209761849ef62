"""The shape of a decoder, as plain frozen data: everything `model.py` needs to know and nothing about files."""

from dataclasses import dataclass, field

from minillm.errors import ConfigError, Positive, check_fields, check_number


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, section 3.2) and its two common extensions to longer contexts."""

    theta: float = 10_000.0  # base of the geometric series of wavelengths
    scaling: str = "default"  # "default", "linear" (divide positions) or "llama3" (stretch long wavelengths only)
    factor: float = 1.0  # how many times longer the context becomes ("linear", "llama3")
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / this are stretched fully
    high_freq_factor: float = 4.0  # llama3: wavelengths below original / this are kept
    original_max_position: Positive = 8192  # llama3: context of the first training, tokens

    def __post_init__(self):
        check_fields(self)
        if self.scaling not in ("default", "linear", "llama3"):
            raise ConfigError(f"RoPE scaling {self.scaling!r} is not one of 'default', 'linear', 'llama3'")
        if self.theta <= 0 or self.factor <= 0:
            raise ConfigError(f"RoPE theta ({self.theta}) and factor ({self.factor}) must be positive")
        if self.scaling == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"llama3 RoPE needs 0 < low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-like decoder. Field names are those of transformers' and vLLM's configurations."""

    vocab_size: Positive  # rows of the embedding, padding included
    hidden_size: Positive  # width of the residual stream
    intermediate_size: Positive  # width inside the gated MLP
    num_hidden_layers: Positive  # decoder layers
    num_attention_heads: Positive  # query heads, Hq
    num_key_value_heads: (
        Positive  # key-value heads, Hkv; fewer than Hq is grouped-query attention (Ainslie et al. 2023)
    )
    head_dim: Positive  # width of one head, D; need not be hidden_size / Hq
    max_position_embeddings: Positive  # context: prompt + output tokens of one request
    rms_norm_eps: float = 1e-6  # added to the mean square before the root
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False  # the output projection is the embedding matrix
    qkv_bias: bool = False  # Qwen2, and Llama with attention_bias
    attention_out_bias: bool = False  # Llama with attention_bias
    mlp_bias: bool = False  # Llama with mlp_bias
    qk_norm: bool = False  # Qwen3: RMSNorm over each head of q and k, before RoPE
    sliding_windows: tuple[Positive | None, ...] = ()  # one entry per layer; None = no limit; () = None for all
    num_tokens: int | None = None  # ids that exist in the tokenizer; the rest of the vocabulary is never sampled
    eos_token_ids: tuple[int, ...] = ()  # any of them ends a request

    def __post_init__(self):
        check_fields(self)
        check_number("rms_norm_eps", self.rms_norm_eps, "0 or a positive number", lambda eps: eps >= 0)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key-value heads "
                "evenly; make num_attention_heads a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; RoPE rotates pairs, so it must be even")
        if self.sliding_windows and len(self.sliding_windows) != self.num_hidden_layers:
            raise ConfigError(
                f"{len(self.sliding_windows)} sliding windows given for {self.num_hidden_layers} layers; give one each"
            )
        if self.num_tokens is not None and not 1 <= self.num_tokens <= self.vocab_size:
            raise ConfigError(f"num_tokens is {self.num_tokens}; it must lie in 1..vocab_size = {self.vocab_size}")
        for token_id in self.eos_token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ConfigError(f"eos token id {token_id} is outside the vocabulary of {self.vocab_size}")

    @property
    def num_sampled_ids(self) -> int:
        """Ids that logits are computed for: the tokenizer's, without the vocabulary's padding."""
        return self.vocab_size if self.num_tokens is None else self.num_tokens

    @property
    def query_size(self) -> int:
        """Width of all query heads together, Hq * D."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key (or value) heads together, Hkv * D."""
        return self.num_key_value_heads * self.head_dim

    def sliding_window(self, layer: int) -> int | None:
        """How many tokens back `layer` may look, itself counted; None for no limit."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    @property
    def num_parameters(self) -> int:
        """Weights in the whole model; a tied output projection counts once."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.key_value_size)
        attention += self.qkv_bias * (self.query_size + 2 * self.key_value_size)
        attention += self.attention_out_bias * self.hidden_size + self.qk_norm * 2 * self.head_dim
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        norms = 2 * self.hidden_size
        return self.num_hidden_layers * (attention + mlp + norms) + embeddings + self.hidden_size
