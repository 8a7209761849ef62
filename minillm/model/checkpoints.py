"""Where a checkpoint's files are: in the package, in a local folder, or on the Hugging Face hub.

From the hub come config.json first, so that a model that cannot run costs a kilobyte, and then only the files that
will be read.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import huggingface_hub  # its names load an HTTP client, only where they are used

from minillm.errors import CheckpointError, ConfigError, ModelNotFoundError, shown
from minillm.model.hf_config import check_supported, read_json
from minillm.storyteller import CHECKPOINT_DIR

SHIPPED_MODELS = {"storyteller": CHECKPOINT_DIR}
KNOWN = f"known are: {', '.join(SHIPPED_MODELS)}, a local checkpoint folder, or a hub id 'owner/name'"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # which of several files holds which tensor
SMALL_FILES = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    INDEX,
]


def find_checkpoint(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a shipped model, a given folder, or a hub id (downloaded once, then cached).

    `revision` is a branch, tag or commit of the hub's repository. Raises ModelNotFoundError, or ConfigError for the
    revision of a model that has none; CheckpointError and UnsupportedModelError if a download would be useless.
    """
    name = str(name_or_path)
    name = name.rstrip("/") or name
    folder = SHIPPED_MODELS.get(name) or local_folder(name)
    if folder is None and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return download(name, revision)
    if folder is None:
        raise ModelNotFoundError(f"no model or folder {name!r}; {KNOWN}")
    if revision is not None:
        raise ConfigError(
            f"revision is {shown(revision)}, but {name!r} is local; only models of the hub have revisions"
        )
    check_has_config(str(folder), os.listdir(folder))
    return folder


def local_folder(name: str) -> Path | None:
    """The folder of that name, `~` included, if there is one."""
    path = os.path.expanduser(name)
    return Path(path) if name and os.path.isdir(path) else None


# --- the hub ---------------------------------------------------------------------------------------------------------


def download(name: str, revision: str | None = None) -> Path:
    """A hub id -> the folder of the cache with its files, of one commit. Raises the errors of `find_checkpoint`."""
    folder = download_config(name, revision).parent
    check_supported(read_json(folder / "config.json"))
    commit = folder.name  # so that all files are of the same, whatever happens to the branch meanwhile
    ask_hub(name, lambda: huggingface_hub.snapshot_download(name, revision=commit, allow_patterns=SMALL_FILES))
    weights = weight_files(folder)
    ask_hub(name, lambda: huggingface_hub.snapshot_download(name, revision=commit, allow_patterns=weights))
    if not all((folder / each).is_file() for each in weights):
        check_has_weights(name, ask_hub(name, lambda: huggingface_hub.list_repo_files(name, revision=commit)), weights)
    return folder


def download_config(name: str, revision: str | None) -> Path:
    """Where config.json of a hub id is now. Raises CheckpointError if there is none, and like `ask_hub`."""

    def get() -> str | None:
        try:
            return huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
        except huggingface_hub.errors.LocalEntryNotFoundError:  # not in the cache, and the hub is out of reach
            raise
        except huggingface_hub.errors.EntryNotFoundError:
            return None

    path = ask_hub(name, get)
    if path is None:
        check_has_config(name, ask_hub(name, lambda: huggingface_hub.list_repo_files(name, revision=revision)))
        raise ModelNotFoundError(f"the hub lists a config.json for {name!r} but does not give it; try again")
    return Path(path)


def ask_hub(name: str, question: Callable):
    """What `question()` gets from the hub or its cache. Raises ModelNotFoundError whatever goes wrong."""
    try:
        return question()
    except Exception as error:  # the hub's client also lets through what its HTTP library raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFoundError(
            f"{name!r} is not a local folder, and the hub did not give it all ({reason}). What was downloaded before "
            f"stays in the cache, but is not the whole model; {KNOWN}"
        ) from error


# --- what a checkpoint must have -------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[str]:
    """The name of the one file with all tensors, or of the shards that the index names. Raises CheckpointError."""
    index = folder / INDEX
    if not index.is_file():
        return [WEIGHTS]
    shards = read_json(index).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise CheckpointError(f"{index} is not a readable list of shards: weight_map is {shown(shards)}")
    return sorted(set(names))


def safetensors_files(folder: Path) -> list[Path]:
    """One file, or the shards its index names. Raises CheckpointError for missing shards or other formats."""
    names = weight_files(folder)
    check_has_weights(str(folder), os.listdir(folder), names)
    return [folder / name for name in names]


def check_has_weights(where: str, present: Iterable[str], weights: list[str]) -> None:
    """Refuse a checkpoint that lacks a file of its weights, and say what it has instead. Raises CheckpointError."""
    missing = sorted(set(weights) - set(present))
    if not missing:
        return
    if weights != [WEIGHTS]:
        raise CheckpointError(f"{INDEX} of {where} names shards that are not there: {', '.join(missing)}")
    refuse_gguf(where, present)
    pickles = sorted(name for name in present if name.endswith((".bin", ".pt", ".pth")))
    if pickles:
        raise CheckpointError(
            f"{where} has only pickled weights ({', '.join(pickles)}), which can run code when opened; "
            "save them again with save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(f"{where} has no {WEIGHTS} and no {INDEX}")


def check_has_config(where: str, present: Iterable[str]) -> None:
    """Refuse a checkpoint without config.json, and say what it has instead. Raises CheckpointError."""
    if "config.json" in present:
        return
    refuse_gguf(where, present)
    what = "is an empty folder" if not present else "has no config.json"
    raise CheckpointError(
        f"{where} {what}; give a folder saved by transformers' save_pretrained. (A local folder is taken before a "
        "model of that name on the hub: remove or rename it if you mean that one.)"
    )


def refuse_gguf(where: str, present: Iterable[str]) -> None:
    """Raises CheckpointError, which names the file, for a checkpoint that has only GGUF."""
    files = sorted(name for name in present if name.endswith(".gguf"))
    if files:
        raise CheckpointError(
            f"{where} has its weights as GGUF only ({files[0]}); use the model that it was made from, in safetensors"
        )
