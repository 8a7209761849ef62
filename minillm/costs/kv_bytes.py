"""How much memory a cache takes, and how many tokens and requests fit beside the weights."""

from dataclasses import dataclass

from minillm.costs.memory_ledger import MemoryProfile
from minillm.errors import Positive, check_number, checked
from minillm.model import ModelConfig


@checked
def kv_bytes_per_token(config: ModelConfig, dtype_bytes: Positive = 2) -> int:
    """Bytes one token adds to the cache: 2 (K and V) * layers * KV heads * head_dim * bytes of an element."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype_bytes


@dataclass(frozen=True)
class MemoryFit:
    """How a model and its cache share a card; all sizes in bytes."""

    card_bytes: int
    weight_bytes: int
    bytes_per_token: int
    reserved_bytes: int  # kept for activations and the framework

    @property
    def cache_bytes(self) -> int:
        """Bytes left for the cache, as an engine plans its memory; 0 if the weights alone do not fit."""
        sizes = {"weights": self.weight_bytes, "activations": self.reserved_bytes, "masks": 0, "host_available": 0}
        available, block = self.card_bytes - self.weight_bytes, self.bytes_per_token
        profile = MemoryProfile(**sizes, bytes_per_block=block, available=available, card_bytes=self.card_bytes)
        return profile.room(profile.budget(gpu_memory_utilization=1.0))

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values fit, over all requests together."""
        return self.cache_bytes // self.bytes_per_token

    @checked
    def num_requests(self, tokens_each: Positive) -> int:
        """Requests of `tokens_each` tokens (prompt and output) that fit at once."""
        return self.num_tokens // tokens_each


@checked
def what_fits(
    config: ModelConfig, card_bytes: Positive, *, dtype_bytes: Positive = 2, reserved_share: float = 0.1
) -> MemoryFit:
    """What a card of `card_bytes` holds of the model: weights, then as many tokens of cache as go in the rest.

    `reserved_share` of the card is kept free for activations, as vLLM's gpu_memory_utilization = 0.9 does.
    Raises ConfigError if a size is not positive or the share is outside [0, 1).
    """
    check_number("reserved_share", reserved_share, "a share of the card, in [0, 1)", lambda share: 0 <= share < 1)
    return MemoryFit(
        card_bytes=card_bytes,
        weight_bytes=config.num_parameters * dtype_bytes,
        bytes_per_token=kv_bytes_per_token(config, dtype_bytes),
        reserved_bytes=int(card_bytes * reserved_share),
    )
