"""minillm: LLM inference from first principles, a course that is also an engine.

The notebooks import from here; the rooms (`model`, `masks`, `attention`, `kv_cache`, `generation`, ...) hold the parts.
Names are looked up on first use, so that `import minillm`, the scheduler and `minillm --help` do not load torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_ROOM_OF = {
    "BlockDiagonalAttention": "attention",
    "CachedAttention": "attention",
    "CausalAttention": "attention",
    "CompletionOutput": "engine.outputs",
    "Decoder": "model",
    "EngineConfig": "engine.engine_config",
    "GenerationResult": "generation",
    "KVCache": "kv_cache",
    "LLM": "engine.llm",
    "LLMEngine": "engine.llm_engine",
    "MiniLLMError": "errors",
    "ModelConfig": "config",
    "RequestOutput": "engine.outputs",
    "RopeConfig": "config",
    "SamplingParams": "sampling_params",
    "Trace": "trace",
    "encode": "text",
    "generate_cached": "generation",
    "generate_chunked": "generation",
    "generate_naive": "generation",
    "generate_ragged": "generation",
    "kv_bytes_per_token": "kv_cache",
    "load_model": "weights",
    "masked_attention": "attention",
    "sdpa_attention": "attention",
    "token_texts": "text",
    "what_fits": "kv_cache",
}

__all__ = sorted(_ROOM_OF)


def __getattr__(name: str):
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'minillm' has no attribute {name!r}")
    value = getattr(import_module(f"minillm.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
