"""The shapes of well-known models and cards, for arithmetic: no weights, only `ModelConfig`s and data sheets.

Model shapes are those of the published config.json files. Card figures are the vendors' dense (not sparse) peak
numbers; what a card really reaches is measured by `minillm bench`. Bandwidths and FLOP are sold in powers of ten,
memory in powers of two: an "80 GB" card has 80 GiB.
"""

from dataclasses import dataclass, replace

from minillm.errors import ConfigError, Positive, check_fields
from minillm.model import ModelConfig, RopeConfig

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """The limits of a device: how much it holds, how fast it reads that, how fast it multiplies."""

    name: str
    memory_bytes: Positive
    bandwidth: float  # bytes per second from device memory
    flops: float  # 16-bit matrix multiply-adds per second, each counted as two operations

    def __post_init__(self):
        check_fields(self)
        if min(self.bandwidth, self.flops) <= 0:
            raise ConfigError(f"card {self.name!r} needs positive memory, bandwidth and flops")


RTX_4090 = Card("RTX 4090 24 GB", 24 * GIB, 1.008e12, 165e12)
A10G = Card("A10G 24 GB", 23_028 * 2**20, 600e9, 70e12)  # memory as its driver reports it, with error correction
A100_40GB = Card("A100 40 GB", 40 * GIB, 1.555e12, 312e12)
A100_80GB = Card("A100 80 GB", 80 * GIB, 2.039e12, 312e12)
H200 = Card("H200 141 GB", 143_771 * 2**20, 4.8e12, 989e12)  # what its driver reports: a little less than 141 GiB
CARDS = (RTX_4090, A100_80GB, H200)  # those that chapters compare

LLAMA_2_7B = ModelConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
LLAMA_7B = replace(LLAMA_2_7B, max_position_embeddings=2048, rms_norm_eps=1e-6)  # of February 2023
LLAMA_13B = replace(
    LLAMA_7B,
    hidden_size=5120,
    intermediate_size=13_824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
)
LLAMA_2_70B = ModelConfig(
    vocab_size=32_000,
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
LLAMA_3_8B = ModelConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500_000.0),
)
LLAMA_3_2_1B = ModelConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    rope=RopeConfig(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192),
    tie_word_embeddings=True,
)
QWEN3_0_6B = ModelConfig(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    rope=RopeConfig(theta=1_000_000.0),
    tie_word_embeddings=True,
    qk_norm=True,
)
QWEN3_8B = ModelConfig(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=12_288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    rope=RopeConfig(theta=1_000_000.0),
    qk_norm=True,
)
SHAPES = {  # those that chapters compare
    "Llama-2-7B": LLAMA_2_7B,
    "Llama-2-70B": LLAMA_2_70B,
    "Llama-3-8B": LLAMA_3_8B,
    "Llama-3.2-1B": LLAMA_3_2_1B,
    "Qwen3-0.6B": QWEN3_0_6B,
    "Qwen3-8B": QWEN3_8B,
}
