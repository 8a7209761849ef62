"""The bytes of a token in the cache, and the blocks of tokens."""

from minillm.errors import Positive, checked
from minillm.model import ModelConfig


def blocks_needed(num_tokens: int, block_size: int) -> int:
    """How many blocks `num_tokens` take; the last one may be partly empty."""
    return -(-num_tokens // block_size)


@checked
def kv_bytes_per_token(config: ModelConfig, dtype_bytes: Positive = 2) -> int:
    """Bytes one token adds to the cache: 2 (K and V) * layers * KV heads * head_dim * bytes of an element."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype_bytes
