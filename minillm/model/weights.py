"""A transformers checkpoint (the shipped storyteller, a local folder, or a hub id) -> model and tokenizer.

safetensors reads the tensors, and no pickle is ever opened. All names and shapes are compared before the first weight
is allocated. Then the tensors are copied part by part, so never more than a part of the files is in memory.
"""

import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minillm.errors import CheckpointError, ConfigError, check_device, checked, shown
from minillm.model.checkpoints import find_checkpoint, safetensors_files
from minillm.model.config import ModelConfig
from minillm.model.decoder import Decoder
from minillm.model.hf_config import load_tokenizer, read_config, read_json
from minillm.model.linear import pack_linears
from minillm.model.shards import WHOLE, Cut, Shard
from minillm.model.text import Tokenizer

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OTHER_NAMES = {"float": "float32", "half": "float16"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class LoadedModel(NamedTuple):
    """What `load_model` returns; unpack it as `model, tokenizer = load_model(...)`."""

    model: Decoder
    tokenizer: Tokenizer | None


@checked
def load_model(
    name_or_path: str | Path = "storyteller",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    skip_tokenizer_init: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer, ready to generate.

    `name_or_path`: "storyteller", a local checkpoint folder, or a Hugging Face hub id "owner/name", of which
    `revision` may name a branch, tag or commit. `dtype`: a torch dtype or its name, or "auto" for the checkpoint's own;
    by default float32 on a CPU and "auto" on a GPU. With `skip_tokenizer_init` the tokenizer is None and prompts must
    be token ids. Raises ModelNotFoundError, UnsupportedModelError, CheckpointError, or ConfigError for dtype, device or
    revision.
    """
    folder, dtype, device = locate(name_or_path, dtype, device, revision)
    tokenizer = None if skip_tokenizer_init else load_tokenizer(folder)
    return LoadedModel(load_decoder(folder, read_config(folder, tokenizer), dtype, device), tokenizer)


def locate(
    name_or_path: str | Path, dtype: torch.dtype | str | None, device: torch.device | str, revision: str | None = None
) -> tuple[Path, torch.dtype, torch.device]:
    """The folder, dtype and device that the arguments of `load_model` mean. Raises the same errors.

    A wrong dtype or device is reported before anything is downloaded.
    """
    device = as_device(device)
    if dtype is None:
        dtype = "auto" if device.type == "cuda" else "float32"
    if dtype != "auto":
        dtype = as_dtype(dtype)
    folder = find_checkpoint(name_or_path, revision)
    return folder, checkpoint_dtype(folder) if dtype == "auto" else dtype, device


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype from itself or its name. Raises ConfigError for one the model does not run in."""
    name = str(dtype).removeprefix("torch.")
    found = DTYPES.get(OTHER_NAMES.get(name, name))
    if found is None:
        raise ConfigError(f"dtype {shown(dtype)} is not supported; use one of auto, half, {', '.join(DTYPES)}")
    return found


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The dtype in config.json, or, without one, that of the stored norm. Raises like `as_dtype`."""
    raw = read_json(folder / "config.json")
    named = raw.get("dtype") or raw.get("torch_dtype")
    if named is None:
        stored = read_headers(safetensors_files(folder)).get("model.norm.weight")
        named = "float32" if stored is None else stored.read().dtype
    return as_dtype(named)


def as_device(device: torch.device | str) -> torch.device:
    """An existing torch device. Raises ConfigError for one that does not exist."""
    return check_device("device", device)


# --- tensors ---------------------------------------------------------------------------------------------------------


class Placement(NamedTuple):
    """Where a checkpoint's tensor goes, or a part of it: rows first_row.. of one of our (perhaps fused) parameters."""

    parameter: str
    first_row: int
    shape: tuple[int, ...]
    part: tuple[slice, ...]  # of each dimension

    @classmethod
    def of(cls, parameter: str, first_row: int, *cuts: Cut) -> "Placement":
        """A tensor whose dimensions are cut like this."""
        return cls(parameter, first_row, *zip(*cuts, strict=True))

    def read(self, tensors: safe_open, name: str) -> Tensor:
        """What we keep of a tensor. Of a part only that part is read; a whole tensor is a view of the file."""
        if self.part == tuple(slice(0, size) for size in self.shape):
            return tensors.get_tensor(name)
        return tensors.get_slice(name)[self.part]


class Stored(NamedTuple):
    """Where a tensor lies in a checkpoint."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, a view of the file for as long as it is kept."""
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor(self.name)


def load_decoder(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    pack: bool = False,
    shard: Shard = WHOLE,
) -> Decoder:
    """Check every name and shape in the checkpoint's headers, then allocate the decoder and copy the tensors in.

    With `pack`, each layer is packed (see `Decoder.pack`) before the next one is read. The decoder's `config` says
    whether the output head is tied; the given one only says what config.json claims. With a `shard`, only its part of
    the files is read, and the decoder is that part. Raises ConfigError if the model cannot be cut like this.
    """
    found = read_headers(safetensors_files(folder))
    config = settle_tying(found, config, dtype)
    placements = expected_tensors(config, shard)
    check_tensors(found, placements)
    with torch.device("meta"):
        model = Decoder(shard.config_of(config), shard).to(dtype)
    make = torch.empty if shard.size == 1 else torch.zeros  # a part has biases and ids that another rank holds
    model._apply(lambda each: make(each.shape, dtype=each.dtype, device=device))  # `to_empty` would load sympy
    model.eval().requires_grad_(False)
    for layer, names in parts(placements):
        copy_tensors(model, {found[name]: placements[name] for name in names})
        if pack:
            model.pack_head() if layer is None else pack_linears(model.layers[layer])
    return model


def read_headers(files: Iterable[Path]) -> dict[str, Stored]:
    """All tensors by name, except those that are recomputed; reads no weights. Raises CheckpointError."""
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in list(tensors.keys()):
                    found[name] = Stored(file, name, tuple(tensors.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    return {name: each for name, each in found.items() if not name.endswith("rotary_emb.inv_freq")}


def settle_tying(found: dict[str, Stored], config: ModelConfig, dtype: torch.dtype) -> ModelConfig:
    """Make what config.json says of the output head agree with the tensors `found`, as transformers does.

    A tied checkpoint may carry its one matrix twice, or as the output head only. Where it carries two that differ, they
    are not tied, whatever config.json says.
    """
    if not config.tie_word_embeddings or HEAD not in found:
        return config
    if EMBEDDING not in found:
        found[EMBEDDING] = found.pop(HEAD)
        return config
    embedding, head = found[EMBEDDING], found[HEAD]
    if embedding.shape == head.shape and torch.equal(embedding.read().to(dtype), head.read().to(dtype)):
        del found[HEAD]
        return config
    warnings.warn(
        f"config.json in {head.file.parent} ties the output head to the embedding, but {HEAD} is another matrix than "
        f"{EMBEDDING}: they are not tied",
        stacklevel=3,
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


def check_tensors(found: dict[str, Stored], placements: dict[str, Placement]) -> None:
    """Compare the tensors found with what the configuration asks for. Raises CheckpointError."""
    missing, extra = sorted(placements.keys() - found.keys()), sorted(found.keys() - placements.keys())
    if missing or extra:
        raise CheckpointError(
            f"the checkpoint does not match its config.json: missing {_some(missing)}; not expected {_some(extra)}"
        )
    for name, place in placements.items():
        if found[name].shape != place.shape:
            raise CheckpointError(f"tensor {name} has shape {found[name].shape}, config.json asks for {place.shape}")


def parts(placements: dict[str, Placement]) -> list[tuple[int | None, list[str]]]:
    """The tensors' names in the order of loading: all that is outside the layers (None), then layer by layer."""
    names: dict[int | None, list[str]] = {None: []}
    for name, place in placements.items():
        room, layer, *_ = place.parameter.split(".")
        names.setdefault(int(layer) if room == "layers" else None, []).append(name)
    return list(names.items())


def copy_tensors(model: Decoder, places: dict[Stored, Placement]) -> None:
    """Copy tensors into their parameters. Closing each file removes its pages from this process's memory."""
    for file in sorted({stored.file for stored in places}):
        with safe_open(file, framework="pt") as tensors:
            for stored, place in places.items():
                if stored.file == file and place.part[0].start < place.part[0].stop:
                    part = place.read(tensors, stored.name)
                    model.get_parameter(place.parameter)[place.first_row : place.first_row + len(part)].copy_(part)


def _some(names: list[str], most: int = 4) -> str:
    """The first few names and how many more, or 'none'."""
    listed = ", ".join(names[:most]) or "none"
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


def expected_tensors(config: ModelConfig, shard: Shard = WHOLE) -> dict[str, Placement]:
    """Every tensor a checkpoint of this shape must hold, by its name there, and its place in `Decoder`.

    With a shard: which part of each goes to which place in its own. Raises ConfigError if it cannot be cut like this.
    """
    own = shard.config_of(config)
    vocab, hidden = shard.vocab(config.vocab_size), WHOLE.evenly(config.hidden_size)
    q, kv, ff = shard.evenly(config.query_size), shard.key_values(config), shard.evenly(config.intermediate_size)
    places = {
        "model.embed_tokens.weight": Placement.of("embed_tokens.weight", 0, vocab, hidden),
        "model.norm.weight": Placement.of("norm.weight", 0, hidden),
    }
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = Placement.of("lm_head.weight", 0, vocab, hidden)
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."

        def linear(name, fused, first_row, rows, columns, bias, ours=ours, theirs=theirs):
            places[f"{theirs}{name}.weight"] = Placement.of(f"{ours}{fused}.weight", first_row, rows, columns)
            if bias:
                rows = shard.once(hidden.whole) if rows is hidden else rows
                places[f"{theirs}{name}.bias"] = Placement.of(f"{ours}{fused}.bias", first_row, rows)

        linear("self_attn.q_proj", "self_attn.qkv_proj", 0, q, hidden, config.qkv_bias)
        linear("self_attn.k_proj", "self_attn.qkv_proj", own.query_size, kv, hidden, config.qkv_bias)
        values = own.query_size + own.key_value_size
        linear("self_attn.v_proj", "self_attn.qkv_proj", values, kv, hidden, config.qkv_bias)
        linear("self_attn.o_proj", "self_attn.o_proj", 0, hidden, q, config.attention_out_bias)
        linear("mlp.gate_proj", "mlp.gate_up_proj", 0, ff, hidden, config.mlp_bias)
        linear("mlp.up_proj", "mlp.gate_up_proj", own.intermediate_size, ff, hidden, config.mlp_bias)
        linear("mlp.down_proj", "mlp.down_proj", 0, hidden, ff, config.mlp_bias)
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if config.qk_norm:
            each_head = WHOLE.evenly(config.head_dim)
            norms |= {"self_attn.q_norm": each_head, "self_attn.k_norm": each_head}
        for name, size in norms.items():
            places[f"{theirs}{name}.weight"] = Placement.of(f"{ours}{name}.weight", 0, size)
    return places
