"""Chapters 1 to 7: ways to generate, the `attend` callables, contiguous caches, static and dynamic batching.

May import `engine` and the rooms below; the engine never imports it.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "attend": "BlockDiagonalAttention CachedAttention CausalAttention Part RaggedAttention",
        "contiguous": "ContiguousExecutor",
        "generation": (
            "GenerationResult as_tensor generate_cached generate_chunked generate_naive generate_ragged positions"
        ),
        "kv_cache": "KVCache RowCache",
        "padded_schedulers": "DynamicScheduler MergingScheduler StaticScheduler",
    },
)
