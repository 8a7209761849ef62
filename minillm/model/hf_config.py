"""What a checkpoint says of itself, in config.json, generation_config.json and its tokenizer -> ModelConfig.

transformers reads the files and fills in each family's defaults; no code from a checkpoint is ever run. The shipped
model leaves nothing to defaults and is read without it, because importing it takes longer than a story. An option that
changes the arithmetic and is not implemented is refused by name, never ignored.
"""

import json
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from minillm.errors import CheckpointError, ConfigError, UnsupportedModelError, check_number, check_whole, shown
from minillm.model.config import ModelConfig, RopeConfig
from minillm.model.text import LightTokenizer, Tokenizer
from minillm.storyteller import CHECKPOINT_DIR

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUPPORTED_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Keys that change what a decoder computes, and the values with which they do not; None never does.
NOT_IMPLEMENTED = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "per_layer_config": ({},),
    "use_bidirectional_attention": (False,),
    "attention_chunk_size": (),
    "alibi": (False,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "attn_temperature_tuning": (False,),
    "clip_qkv": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "scale_emb": (1.0,),
    "scale_depth": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "kv_lora_rank": (0,),
}
LLAMA_DEFAULTS = {
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}
# Biases that some of the four families have and the others' transformers classes do not read.
FAMILIES_WITH = {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}
ROPE_NUMBERS = {
    "theta": "rope_theta",
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position": "original_max_position_embeddings",
}
ROPE_READS = {"default": ("theta",), "linear": ("theta", "factor"), "llama3": tuple(ROPE_NUMBERS)}
TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))  # any of these sets


def load_tokenizer(folder: Path) -> Tokenizer:
    """The checkpoint's own tokenizer. Raises CheckpointError if its files are missing, broken or unusable here."""
    without = "or load with skip_tokenizer_init=True"
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has no tokenizer.json; add it, {without}")
    if folder == CHECKPOINT_DIR:
        eos_token = read_json(folder / "tokenizer_config.json")["eos_token"]
        return LightTokenizer(folder / "tokenizer.json", eos_token, partial(transformers_tokenizer, folder))
    try:
        tokenizer = transformers_tokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(f"no usable tokenizer in {folder} ({error}); add tokenizer.json, {without}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise CheckpointError(
            f"the tokenizer in {folder} is a {type(tokenizer).__name__}, which has no fast form; "
            f"add a tokenizer.json, {without}"
        )
    return tokenizer


def transformers_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that transformers loads from a folder. Raises whatever it raises."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, mistral_format=False)


def read_config(folder: Path, tokenizer: Tokenizer | None = None) -> ModelConfig:
    """The shape of the model in a folder. With its tokenizer, also which ids there are to sample.

    A request ends with any id that generation_config.json, config.json or the tokenizer names as the end of a text. If
    none of them names one, the family's default is used. Raises UnsupportedModelError or CheckpointError.
    """
    hf = read_hf_config(folder)
    eos_ids = eos_token_ids(folder, hf, tokenizer)
    try:
        return model_config(hf, eos_ids, tokenizer)
    except ConfigError as error:
        raise CheckpointError(f"config.json in {folder} asks for an impossible model: {error}") from error


def read_hf_config(folder: Path) -> "PretrainedConfig | SimpleNamespace":
    """config.json as transformers reads it, after the check of what is supported. Raises like `read_config`."""
    raw = read_json(folder / "config.json")
    check_supported(raw)
    if folder == CHECKPOINT_DIR:  # it leaves nothing to a default
        return SimpleNamespace(**raw)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        if raw["model_type"] == "llama":
            return llama_config(raw)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json in {folder} cannot be read: {error!r}") from error


def llama_config(raw: dict) -> "PretrainedConfig":
    """A Llama's config.json, read by Mistral's class: except for `LLAMA_DEFAULTS` they are alike.

    transformers' own class for it imports torch's compiler: 1.1 seconds, and 150 MiB for as long as the process lives.
    """
    from transformers import MistralConfig

    raw = LLAMA_DEFAULTS | raw | {"sliding_window": None}
    if raw["num_key_value_heads"] is None:
        raw["num_key_value_heads"] = raw["num_attention_heads"]
    config = MistralConfig.from_dict(raw)
    config.model_type = "llama"
    return config


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: no JSON, or no UTF-8
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {shown(content)}; it must be a JSON object")
    return content


def check_supported(raw: dict) -> None:
    """Raises UnsupportedModelError for architectures and options that would silently give other logits."""
    model_type, named = raw.get("model_type"), raw.get("architectures")
    expected = SUPPORTED_ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if expected is None:
        families = ", ".join(f"{family} ({name})" for family, name in SUPPORTED_ARCHITECTURES.items())
        raise UnsupportedModelError(
            f"model_type {shown(model_type)} (architectures {shown(named)}) is not supported; supported are {families}"
        )
    if named and expected not in named:
        raise UnsupportedModelError(
            f"architectures {shown(named)} are not supported for model_type {model_type!r}; supported is {expected}"
        )
    if raw.get("quantization_config") or raw.get("compression_config"):
        raise UnsupportedModelError("quantised checkpoints are not supported; use the float16 or bfloat16 original")
    for key, harmless in NOT_IMPLEMENTED.items():
        if raw.get(key) is not None and raw[key] not in harmless:
            possible = " or ".join(map(repr, harmless)) or "null"
            raise UnsupportedModelError(f"{key} {shown(raw[key])} in config.json is not supported, only {possible}")
    for key, families in FAMILIES_WITH.items():
        if raw.get(key) and model_type not in families:
            raise UnsupportedModelError(f"{key} {shown(raw[key])} is not supported for model_type {model_type!r}")


# --- the end of a text -----------------------------------------------------------------------------------------------


def eos_token_ids(
    folder: Path, hf: "PretrainedConfig | SimpleNamespace", tokenizer: Tokenizer | None = None
) -> tuple[int, ...]:
    """All ids that end a request, each once. Ids outside the vocabulary are left out, with a warning."""
    named = [*ids_in(folder / "generation_config.json"), *ids_in(folder / "config.json")]
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        named.append(tokenizer.eos_token_id)
    ids = list(dict.fromkeys(named or as_ids(hf.eos_token_id)))
    for token_id in ids:
        if not 0 <= token_id < hf.vocab_size:
            warnings.warn(
                f"eos token id {token_id} of {folder} is outside the vocabulary of {hf.vocab_size} ids and is ignored",
                stacklevel=2,
            )
    return tuple(token_id for token_id in ids if 0 <= token_id < hf.vocab_size)


def ids_in(path: Path) -> list[int]:
    """The eos ids that a JSON file names; none if there is no such file. Raises CheckpointError if they are not ids."""
    if not path.is_file():
        return []
    return [
        check_whole(f"eos_token_id in {path}", token_id, -(2**63), error=CheckpointError)
        for token_id in as_ids(read_json(path).get("eos_token_id"))
    ]


def as_ids(value: object) -> Iterable:
    """None, one id or a list of ids -> a list."""
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]


# --- shape -----------------------------------------------------------------------------------------------------------


def model_config(
    hf: "PretrainedConfig | SimpleNamespace", eos_ids: tuple[int, ...], tokenizer: Tokenizer | None = None
) -> ModelConfig:
    """transformers' configuration -> ours, with each family's defaults made explicit."""
    attention_bias = getattr(hf, "attention_bias", False)
    num_tokens = None
    if tokenizer is not None:
        num_tokens = min(max(tokenizer.backend_tokenizer.get_vocab().values()) + 1, hf.vocab_size)
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_key_value_heads=hf.num_key_value_heads or hf.num_attention_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        max_position_embeddings=hf.max_position_embeddings,
        rms_norm_eps=hf.rms_norm_eps,
        rope=rope_config(hf.rope_parameters),
        tie_word_embeddings=hf.tie_word_embeddings,
        qkv_bias=attention_bias or hf.model_type == "qwen2",
        attention_out_bias=attention_bias,
        mlp_bias=getattr(hf, "mlp_bias", False),
        qk_norm=hf.model_type == "qwen3",
        sliding_windows=sliding_windows(hf),
        num_tokens=num_tokens,
        eos_token_ids=eos_ids,
    )


def sliding_windows(hf: "PretrainedConfig | SimpleNamespace") -> tuple[int | None, ...]:
    """The window of each layer: all in Mistral, those named "sliding_attention" in Qwen; () if none has one.

    Raises UnsupportedModelError for layers of another kind than the family's transformers class makes.
    """
    window = None if hf.model_type == "llama" else hf.sliding_window  # in a Llama's config.json it has no effect
    everywhere = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(hf, "layer_types", None) or [everywhere] * hf.num_hidden_layers
    possible = {everywhere} if hf.model_type in ("llama", "mistral") else {everywhere, "full_attention"}
    for kind in kinds:
        if kind not in possible:
            raise UnsupportedModelError(
                f"layer_types in config.json names {shown(kind)}, which is not supported for model_type "
                f"{hf.model_type!r} with sliding_window {window}; possible is {' or '.join(sorted(possible))}"
            )
    return () if window is None else tuple(window if kind == "sliding_attention" else None for kind in kinds)


def rope_config(parameters: dict) -> RopeConfig:
    """transformers' rope_parameters -> RopeConfig. Raises UnsupportedModelError for other kinds of scaling."""
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_READS:
        raise UnsupportedModelError(
            f"rope_type {shown(kind)} in rope_parameters is not supported; supported are {', '.join(ROPE_READS)}"
        )
    part = parameters.get("partial_rotary_factor", 1.0)
    if part != 1.0:
        raise UnsupportedModelError(
            f"partial_rotary_factor {shown(part)} in rope_parameters is not supported; only whole heads rotate"
        )
    for name, value in parameters.items():
        if isinstance(value, dict):
            raise UnsupportedModelError(f"rope_parameters only for {name!r} are not supported: one set for all layers")
    numbers = {
        ours: check_number(
            f"{ROPE_NUMBERS[ours]} in rope_parameters of config.json",
            parameters.get(ROPE_NUMBERS[ours]),
            "a number above 0",
            lambda number: number > 0,
            error=CheckpointError,
        )
        for ours in ROPE_READS[kind]
    }
    context = numbers.get("original_max_position")  # tokens: a whole number, however it is written
    if context is not None and context.is_integer():
        numbers["original_max_position"] = int(context)
    return RopeConfig(scaling=kind, **numbers)
