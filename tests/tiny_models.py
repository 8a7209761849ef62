"""Random small models for the tests: checkpoints as transformers saves them, a scripted model, and one comparison."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from minillm import CausalAttention, ModelConfig
from minillm.ladder.generation import as_tensor, positions

BASE = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,  # far above the usual: attention far from uniform, logits far from equal
    "bos_token_id": 1,
    "eos_token_id": [3, 5],
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "llama": LlamaConfig(**BASE),
    "llama-mha": LlamaConfig(**BASE | {"num_key_value_heads": 4}),
    "llama-mqa": LlamaConfig(**BASE | {"num_key_value_heads": 1}),
    "llama-biases-tied": LlamaConfig(**BASE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-rope-linear": LlamaConfig(
        **BASE, rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
    ),
    "llama-rope-llama3": LlamaConfig(**BASE, rope_parameters=LLAMA3_ROPE),
    "mistral-window": MistralConfig(**BASE, sliding_window=7),
    "qwen2": Qwen2Config(**BASE),
    "qwen2-window": Qwen2Config(**BASE, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": Qwen3Config(**BASE, head_dim=32, tie_word_embeddings=True),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}  # transformers rounds norms and RoPE to float32 even in float64
LADDER_TOLERANCE = 1e-10  # our own rungs do not


def random_transformers_model(kind: str):
    """A transformers model with random weights, biases and norms included, in float32."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(KINDS[kind]).eval()
    for name, parameter in hf.named_parameters():
        if "bias" in name or "norm" in name:  # zeros and ones by default: leaving them out would not be noticed
            parameter.data.normal_(std=1.0 if "norm" in name else 0.3)
    return hf


def change_config(folder, **changed):
    """Write values into config.json; None removes the entry."""
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_tensors(folder, change):
    """Rewrite model.safetensors as `change(tensors)` leaves it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def random_token_ids(num_tokens: int, vocab_size: int = BASE["vocab_size"], seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (num_tokens,), generator=generator).tolist()


@torch.inference_mode()
def all_logits(model, token_ids, attend=None) -> torch.Tensor:
    """[T, ids] logits of a whole sequence, by default in one pass under a causal mask."""
    attend = attend or CausalAttention(model.config)
    return model.logits(model(as_tensor(token_ids, model), positions(0, len(token_ids), model), attend))


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference of two sets of logits, as a share of the reference's spread; infinite if any is NaN."""
    spread = (reference.max() - reference.min()).item()
    assert spread > 1, "the reference's logits are nearly equal: the comparison would prove nothing"
    largest = (ours.double() - reference.double()).abs().max().item()
    return largest / spread if largest == largest else float("inf")


class ScriptedModel:
    """Stands in for a Decoder: says `script`, token by token, whatever it is given; attends over zeros."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, script: list[int], num_prompt_tokens: int = 1, vocab_size: int = 1000, **config):
        self.script = script
        self.num_prompt_tokens = num_prompt_tokens
        self.config = ModelConfig(
            **{"vocab_size": vocab_size, "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 2}
            | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": 500}
            | config
        )
        self.calls: list[tuple[int, int]] = []  # (first position, number of tokens) of each pass

    def __call__(self, token_ids, positions, attend):
        self.calls.append((int(positions[0]), len(token_ids)))
        for layer in range(self.config.num_hidden_layers):
            attend(layer, *(torch.zeros(len(token_ids), 1, 2) for _ in "qkv"))
        return positions[:, None]  # [T, 1]

    def logits(self, hidden):
        said = int(hidden[0]) + 1 - self.num_prompt_tokens
        return torch.zeros(self.config.num_sampled_ids).index_fill(0, torch.tensor(self.script[said]), 20.0)
