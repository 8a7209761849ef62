"""Models of a published shape with random weights, made on their device: ours and transformers'."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from minillm.errors import UnsupportedModelError
from minillm.model import Decoder, ModelConfig, RopeConfig

DEVIATION = 0.02  # of the weights: transformers' initializer_range, which keeps logits small


def random_decoder(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Our decoder with normal random weights, allocated once, on the device and in `dtype`."""
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)  # a norm's
            else:
                parameter.normal_(0.0, DEVIATION, generator=generator)
    return model.eval().requires_grad_(False)


def random_peer(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """transformers' model of the same shape, with weights from its own initialiser."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            transformers_config(config), dtype=dtype, attn_implementation="sdpa"
        ).eval()
    model.generation_config.eos_token_id = None  # otherwise `generate` would use it
    return model.requires_grad_(False)


def transformers_config(config: ModelConfig) -> PreTrainedConfig:
    """The configuration for transformers. Raises UnsupportedModelError for biases and sliding windows."""
    if config.qkv_bias or config.attention_out_bias or config.mlp_bias or config.sliding_windows:
        raise UnsupportedModelError("a shape with biases or sliding windows is not benchmarked; use one without")
    kind = Qwen3Config if config.qk_norm else LlamaConfig
    return kind(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope_parameters(config.rope),
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=DEVIATION,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def rope_parameters(rope: RopeConfig) -> dict:
    """transformers' rope_parameters."""
    parameters = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    if rope.scaling != "default":
        parameters["factor"] = rope.factor
    if rope.scaling == "llama3":
        parameters |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    return parameters
