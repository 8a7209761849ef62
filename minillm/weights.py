"""A transformers checkpoint (the shipped storyteller, a local folder, or a hub id) -> model and tokenizer.

transformers reads the configuration and the tokenizer, safetensors the tensors; no code from a checkpoint is ever run
and no pickle ever opened. All names and shapes are compared before the first weight is allocated.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from minillm.config import ModelConfig, RopeConfig
from minillm.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from minillm.model import Decoder
from minillm.storyteller import CHECKPOINT_DIR

SHIPPED_MODELS = {"storyteller": CHECKPOINT_DIR}
SUPPORTED_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DOWNLOADED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


class LoadedModel(NamedTuple):
    """What `load_model` returns; unpack it as `model, tokenizer = load_model(...)`."""

    model: Decoder
    tokenizer: PreTrainedTokenizerBase | None


def load_model(
    name_or_path: str | Path = "storyteller",
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    *,
    skip_tokenizer_init: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer, ready to generate.

    `name_or_path`: "storyteller", a local checkpoint folder, or a Hugging Face hub id "owner/name". `dtype`: a torch
    dtype or its name. With `skip_tokenizer_init` the tokenizer is None and prompts must be token ids.
    Raises ModelNotFoundError, UnsupportedModelError, CheckpointError, or ConfigError for dtype or device.
    """
    dtype, device = as_dtype(dtype), as_device(device)
    folder = find_checkpoint(name_or_path)
    config = read_config(folder)
    tokenizer = None if skip_tokenizer_init else load_tokenizer(folder)
    config = with_ids_of(tokenizer, config)
    return LoadedModel(load_decoder(folder, config, dtype, device), tokenizer)


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype from itself or its name. Raises ConfigError for one the model does not run in."""
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ConfigError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    return found


def as_device(device: torch.device | str) -> torch.device:
    """A torch device that is there. Raises ConfigError for one that is not."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not a device; use 'cpu', 'cuda' or 'cuda:N'") from error
    if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise ConfigError(f"device {device!r} is not there: torch sees {count} CUDA devices; use 'cpu' or another")
    return found


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The local folder of a shipped model, a folder given, or a hub id (downloaded once, then cached)."""
    name = str(name_or_path)
    if name in SHIPPED_MODELS:
        return SHIPPED_MODELS[name]
    if name and Path(name).is_dir():
        return Path(name)
    known = f"known are: {', '.join(SHIPPED_MODELS)}, a local checkpoint folder, or a hub id 'owner/name'"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ModelNotFoundError(f"no model or folder {name!r}; {known}")
    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFoundError(
            f"{name!r} is no local folder and the hub did not give it ({reason}); {known}"
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. Raises CheckpointError if its files are missing or broken."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(f"{folder} has no tokenizer.json; add it, or load with skip_tokenizer_init=True")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"no usable tokenizer in {folder} ({error}); add tokenizer.json, or load with skip_tokenizer_init=True"
        ) from error


def with_ids_of(tokenizer: PreTrainedTokenizerBase | None, config: ModelConfig) -> ModelConfig:
    """The configuration with only those ids to sample that the tokenizer knows; unchanged without one."""
    if tokenizer is None:
        return config
    num_tokens = min(max(tokenizer.get_vocab().values()) + 1, config.vocab_size)
    return dataclasses.replace(config, num_tokens=num_tokens)


# --- configuration ---------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> ModelConfig:
    """config.json and generation_config.json -> ModelConfig. Raises UnsupportedModelError or CheckpointError."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; give a folder saved by transformers' save_pretrained")
    try:
        raw = json.loads((folder / "config.json").read_text())
        check_supported(raw if isinstance(raw, dict) else {})
        hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return model_config(hf, eos_token_ids(folder, hf))
    except (json.JSONDecodeError, OSError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json in {folder} cannot be read: {error}") from error


def check_supported(raw: dict) -> None:
    """Refuse architectures and options that would silently give other logits."""
    model_type = raw.get("model_type")
    architecture = SUPPORTED_ARCHITECTURES.get(model_type)
    named = raw.get("architectures") or [architecture]
    if architecture is None or architecture not in named:
        raise UnsupportedModelError(
            f"architecture {named[0] or model_type!r} is not supported; "
            f"supported are {', '.join(SUPPORTED_ARCHITECTURES.values())}"
        )
    if raw.get("quantization_config"):
        raise UnsupportedModelError("quantised checkpoints are not supported; use the float16 or bfloat16 original")
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"activation {raw['hidden_act']!r} is not supported; the gated MLP uses 'silu'")


def eos_token_ids(folder: Path, hf: PretrainedConfig) -> tuple[int, ...]:
    """The ids that end a request: generation_config.json if it names any, else config.json; possibly several."""
    ids = hf.eos_token_id
    if (folder / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(folder).eos_token_id
        ids = ids if named is None else named
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def model_config(hf: PretrainedConfig, eos_ids: tuple[int, ...]) -> ModelConfig:
    """transformers' configuration -> ours, with each family's defaults made explicit."""
    attention_bias = getattr(hf, "attention_bias", False)
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
        eos_token_ids=eos_ids,
    )


def sliding_windows(hf: PretrainedConfig) -> tuple[int | None, ...]:
    """The window of each layer: all in Mistral, those named "sliding_attention" in Qwen; () if none has one."""
    window = None if hf.model_type == "llama" else hf.sliding_window  # in a Llama's config.json it has no effect
    if window is None:
        return ()
    if hf.model_type == "mistral":
        return (window,) * hf.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in hf.layer_types)


def rope_config(parameters: dict) -> RopeConfig:
    """transformers' rope_parameters -> RopeConfig. Raises UnsupportedModelError for other kinds of scaling."""
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedModelError(f"RoPE scaling {kind!r} is not supported; supported are default, linear, llama3")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"partial_rotary_factor {parameters['partial_rotary_factor']} is not supported; only whole heads rotate"
        )
    names = {
        "theta": "rope_theta",
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
    }
    given = {ours: parameters[theirs] for ours, theirs in names.items() if parameters.get(theirs) is not None}
    return RopeConfig(scaling=kind, **given)


# --- tensors ---------------------------------------------------------------------------------------------------------


class Placement(NamedTuple):
    """Where a checkpoint's tensor goes: rows first_row.. of one of our (perhaps fused) parameters."""

    parameter: str
    first_row: int
    shape: tuple[int, ...]


def load_decoder(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """Check every name and shape in the checkpoint's headers, then allocate the decoder and copy the tensors in."""
    placements = expected_tensors(config)
    files = safetensors_files(folder)
    check_tensors(files, placements, config)
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys() & placements.keys():
                place = placements[name]
                rows = parameters[place.parameter].data[place.first_row : place.first_row + place.shape[0]]
                rows.copy_(tensors.get_tensor(name))
    return model.eval().requires_grad_(False)


def safetensors_files(folder: Path) -> list[Path]:
    """One file, or the shards its index names. Raises CheckpointError for missing shards or pickle-only weights."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is not a readable list of shards: {error!r}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{index} names shards that are not there: {', '.join(missing)}")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} has only pickled weights ({', '.join(pickles)}), which can run code when opened; "
            "save them again with save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(f"{folder} has no model.safetensors and no model.safetensors.index.json")


def check_tensors(files: list[Path], placements: dict[str, Placement], config: ModelConfig) -> None:
    """Compare the files' headers with what the configuration asks for; reads no weights."""
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    found = {name: shape for name, shape in found.items() if not name.endswith("rotary_emb.inv_freq")}  # recomputed
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # a copy of the embedding that some tied checkpoints carry
    missing, extra = sorted(placements.keys() - found.keys()), sorted(found.keys() - placements.keys())
    if missing or extra:
        raise CheckpointError(
            f"the checkpoint does not match its config.json: missing {_some(missing)}; not expected {_some(extra)}"
        )
    for name, place in placements.items():
        if found[name] != place.shape:
            raise CheckpointError(f"tensor {name} has shape {found[name]}, config.json asks for {place.shape}")


def _some(names: list[str], most: int = 4) -> str:
    """The first few names and how many more, or 'none'."""
    listed = ", ".join(names[:most]) or "none"
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


def expected_tensors(config: ModelConfig) -> dict[str, Placement]:
    """Every tensor a checkpoint of this shape must hold, by its name there, and its place in `Decoder`."""
    hidden, ff, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    places = {
        "model.embed_tokens.weight": Placement("embed_tokens.weight", 0, (vocab, hidden)),
        "model.norm.weight": Placement("norm.weight", 0, (hidden,)),
    }
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = Placement("lm_head.weight", 0, (vocab, hidden))
    q, kv = config.query_size, config.key_value_size
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."

        def linear(name, fused, first_row, rows, columns, bias, ours=ours, theirs=theirs):
            places[f"{theirs}{name}.weight"] = Placement(f"{ours}{fused}.weight", first_row, (rows, columns))
            if bias:
                places[f"{theirs}{name}.bias"] = Placement(f"{ours}{fused}.bias", first_row, (rows,))

        linear("self_attn.q_proj", "self_attn.qkv_proj", 0, q, hidden, config.qkv_bias)
        linear("self_attn.k_proj", "self_attn.qkv_proj", q, kv, hidden, config.qkv_bias)
        linear("self_attn.v_proj", "self_attn.qkv_proj", q + kv, kv, hidden, config.qkv_bias)
        linear("self_attn.o_proj", "self_attn.o_proj", 0, hidden, q, config.attention_out_bias)
        linear("mlp.gate_proj", "mlp.gate_up_proj", 0, ff, hidden, config.mlp_bias)
        linear("mlp.up_proj", "mlp.gate_up_proj", ff, ff, hidden, config.mlp_bias)
        linear("mlp.down_proj", "mlp.down_proj", 0, hidden, ff, config.mlp_bias)
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if config.qk_norm:
            norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
        for name, size in norms.items():
            places[f"{theirs}{name}.weight"] = Placement(f"{ours}{name}.weight", 0, (size,))
    return places
