"""How much memory a forward pass needs besides weights and cache, calculated beforehand.

The calculation knows the two moments of a layer at which most memory is in use: in attention, the table of scores; in
the MLP, its wide middle. Layers run one after the other, so a deep model needs no more at its peak than a shallow one.
"""

from dataclasses import dataclass

from minillm.errors import ConfigError, Positive, checked
from minillm.model import ModelConfig

MASK_BYTES = 1  # a bool
SCORE_TABLES = 3  # `attention_weights` holds three at once: scores, masked scores, and the softmax of these


@dataclass(frozen=True)
class ActivationBytes:
    """What one chunk needs besides weights and cache, in bytes. Either attention or the MLP is the peak, never both."""

    attention_tokens: int  # token-wise: the stream, queries, keys and values of the chunk's tokens
    scores: int  # tables of chunk x keys scores, and keys repeated for them; 0 in a fused kernel
    mask: int  # one bool per query-key pair; 0 in a fused kernel
    mlp_tokens: int  # token-wise: the stream and the wide middle of the MLP

    @property
    def attention(self) -> int:
        """Bytes in use at once in attention."""
        return self.attention_tokens + self.scores + self.mask

    @property
    def total(self) -> int:
        """The peak: the larger of the two moments."""
        return max(self.attention, self.mlp_tokens)


@checked
def activation_bytes(
    config: ModelConfig, chunk_size: Positive, num_keys: Positive, dtype_bytes: Positive = 2, *, fused: bool = False
) -> ActivationBytes:
    """The bytes that a pass over `chunk_size` tokens needs when they attend to `num_keys` tokens, their own included.

    By default for the readable kernel, `masked_attention`. `fused` is for a kernel that never writes a table of scores
    to memory (FlashAttention, Dao et al. 2022). Norms and the few rows of logits are left out.
    Raises ConfigError for a chunk of no tokens, more tokens than keys, or bytes below 1.
    """
    if chunk_size > num_keys:
        raise ConfigError(f"a chunk of {chunk_size} tokens looks at {num_keys} keys; use 1 <= chunk_size <= num_keys")
    stream = 2 * config.hidden_size  # the residual stream and its normalised copy
    projected = config.query_size + 2 * config.key_value_size
    rotated = config.query_size + config.key_value_size
    middle = 4 * config.intermediate_size  # gate, up, silu(gate), and the product
    scores = SCORE_TABLES * config.num_attention_heads * chunk_size * num_keys + num_keys * config.query_size
    return ActivationBytes(
        attention_tokens=chunk_size * (stream + projected + rotated) * dtype_bytes,
        scores=0 if fused else scores * dtype_bytes,
        mask=0 if fused else chunk_size * num_keys * MASK_BYTES,
        mlp_tokens=chunk_size * (stream + middle) * dtype_bytes,
    )


@checked
def chunk_that_fits(
    config: ModelConfig, free_bytes: int, num_prompt_tokens: Positive, dtype_bytes: Positive = 2, *, fused: bool = False
) -> int:
    """The whole prompt if it fits in one pass, else the largest power of two whose last, most expensive chunk fits.

    `free_bytes` is what is left beside the weights *and the cache of the whole prompt*: chunking makes neither smaller.
    Raises ConfigError if there is no prompt, or not even chunks of one token fit.
    """
    powers = [2**power for power in range(num_prompt_tokens.bit_length()) if 2**power < num_prompt_tokens]
    for chunk_size in [num_prompt_tokens, *reversed(powers)]:
        if activation_bytes(config, chunk_size, num_prompt_tokens, dtype_bytes, fused=fused).total <= free_bytes:
            return chunk_size
    least = activation_bytes(config, 1, num_prompt_tokens, dtype_bytes, fused=fused).total
    raise ConfigError(
        f"chunks of a single token need {least:,} bytes beside weights and cache, {free_bytes:,} are free; "
        "shorten the prompt, use a smaller model, or free memory"
    )
