"""The sizes of all measurements: `FULL` on a GPU, `DRY` on the CPU to test that every line runs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from minillm.costs import LLAMA_2_7B, LLAMA_3_2_1B, QWEN3_0_6B
from minillm.model import ModelConfig


@dataclass(frozen=True)
class Lengths:
    """A workload: the number of requests, and the distribution of their lengths (see `workloads`)."""

    requests: int
    shortest: int  # tokens, W1: of prompts and of outputs
    longest: int
    highest_token: int  # prompts are random ids from 0 to this one


@dataclass(frozen=True)
class Scale:
    """Sizes of all parts. Lengths and contexts are in tokens."""

    device: str
    dtype: torch.dtype
    # ceilings
    copy_bytes: int  # of the buffer that is copied: many times the card's cache
    gemm_side: int  # of the square matrices that are multiplied
    # kernels
    kernel_shape: ModelConfig  # whose heads they serve
    decode_batches: tuple[int, ...]
    decode_contexts: tuple[int, ...]
    sweep_cases: tuple[tuple[int, int], ...]  # (batch, context)
    sweep_launches: tuple[tuple[int, ...], ...]  # keys per tile, warps, stages to try
    sweep_splits: tuple[int, ...]  # numbers of parts into which to split each request's keys
    prefill_cases: tuple[tuple[int, int, int], ...]  # (requests, new tokens, cached tokens)
    cell_seconds: float  # for one cell of the table
    rotated_bytes: int  # to read before the same bytes are read again: several times the card's cache
    # serving
    w1: Lengths
    w1_shapes: Mapping[str, ModelConfig]
    large_shape: tuple[str, ModelConfig]  # of W2 and W3
    w2_tokens: tuple[int, int]  # prompt, output
    w3_requests: int
    w3_prompt: int
    w3_mean_output: int
    w3_longest_output: int
    max_num_seqs: int
    max_num_batched_tokens: int
    static_batches: tuple[int, ...]  # transformers' left-padded batches in W1
    ablation_blocks: tuple[int, ...]

    @property
    def torch_device(self) -> torch.device:
        """The device of all measurements."""
        return torch.device(self.device)

    @property
    def is_full(self) -> bool:
        """True if the results are meaningful."""
        return self is FULL


FULL = Scale(
    device="cuda",
    dtype=torch.bfloat16,
    copy_bytes=2 * 2**30,
    gemm_side=8192,
    kernel_shape=QWEN3_0_6B,
    decode_batches=(1, 64, 256),
    decode_contexts=(128, 512, 1024, 4096),
    sweep_cases=((64, 1024), (256, 512), (256, 1024)),
    sweep_launches=((32, 64, 128), (2, 4, 8), (2, 3, 4)),
    sweep_splits=(1, 2, 4),
    prefill_cases=((16, 1024, 0), (4, 4096, 0), (16, 512, 1536)),
    cell_seconds=0.05,
    rotated_bytes=256 * 2**20,
    w1=Lengths(256, 100, 1024, 10_000),
    w1_shapes={"Qwen3-0.6B": QWEN3_0_6B, "Llama-3.2-1B": LLAMA_3_2_1B},
    large_shape=("Llama-2-7B", LLAMA_2_7B),
    w2_tokens=(5, 256),
    w3_requests=1000,
    w3_prompt=512,
    w3_mean_output=128,
    w3_longest_output=1536,
    max_num_seqs=256,
    max_num_batched_tokens=16_384,
    static_batches=(256, 32),
    ablation_blocks=(32, 256),
)

_TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)
DRY = Scale(
    device="cpu",
    dtype=torch.float32,
    copy_bytes=2**20,
    gemm_side=64,
    kernel_shape=_TINY,
    decode_batches=(2,),
    decode_contexts=(20,),
    sweep_cases=((2, 20),),
    sweep_launches=((32,), (4,), (3,)),
    sweep_splits=(),
    prefill_cases=((2, 4, 12),),
    cell_seconds=0.0,
    rotated_bytes=2**10,
    w1=Lengths(3, 2, 3, 90),
    w1_shapes={"tiny Qwen3": replace(_TINY, qk_norm=True), "tiny Llama": _TINY},
    large_shape=("tiny Llama", _TINY),
    w2_tokens=(5, 8),
    w3_requests=3,
    w3_prompt=8,
    w3_mean_output=4,
    w3_longest_output=6,
    max_num_seqs=4,
    max_num_batched_tokens=32,
    static_batches=(3, 2),
    ablation_blocks=(32, 256),
)
