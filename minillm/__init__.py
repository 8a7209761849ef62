"""minillm: LLM inference from first principles, a course that is also an engine.

The notebooks import from here and from the rooms, the folders beside this file; the `__init__.py` of each says what is
in it. Names are looked up on first use, so that `import minillm`, the scheduler and `minillm --help` do not load torch.
"""

from collections.abc import Callable, Mapping
from importlib import import_module

__version__ = "0.1.0"


def hand_on(room: str, names: Mapping[str, str]) -> tuple[Callable, Callable, list[str]]:
    """A package's `__getattr__`, `__dir__` and `__all__`, for names that its modules hold: {module: names}.

    A name that is the module's own, as in {"cuda.emulator": "emulator"}, stands for the module.
    """
    module_of = {name: module for module, held in names.items() for name in held.split()}

    def get(name: str):
        if name not in module_of:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        module = import_module(f"{room}.{module_of[name]}")
        return module if module.__name__.endswith(f".{name}") else getattr(module, name)

    return get, lambda: sorted({*vars(import_module(room)), *module_of}), sorted(module_of)


__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "attention": "masked_attention sdpa_attention",
        "attention.masks": "masks",
        "costs": "kv_bytes_per_token what_fits",
        "engine": "LLM CompletionOutput EngineConfig LLMEngine RequestOutput",
        "errors": "MiniLLMError",
        "ladder": (
            "BlockDiagonalAttention CachedAttention CausalAttention GenerationResult KVCache generate_cached "
            "generate_chunked generate_naive generate_ragged"
        ),
        "model": "Decoder ModelConfig RopeConfig encode load_model token_texts",
        "sampling": "SamplingParams",
        "trace": "Trace",
    },
)
