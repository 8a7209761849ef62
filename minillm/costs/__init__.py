"""What computing costs: FLOPs, bytes, the roofline; shapes of models and cards; where an engine's memory goes.

May import `model` and the rooms below.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "all_reduce": "Message follow_plan is_complete plan_seconds ring_plan",
        "activations": "ActivationBytes activation_bytes chunk_that_fits",
        "kv_bytes": "blocks_needed kv_bytes_per_token",
        "links": (
            "ETHERNET_100G LINKS Link NVLINK_3 PCIE_4 all_reduce_bytes all_reduce_seconds tensor_parallel_pays_up_to "
            "tensor_parallel_seconds"
        ),
        "memory_ledger": (
            "CacheLimits MemoryFit MemoryLedger MemoryProfile available_memory mib pieces plan_cache what_fits"
        ),
        "peak_memory": "PeakMemory",
        "roofline": (
            "StepPrices attention_flops cached_flops causal_entries compute_bound_batch decode_seconds "
            "matmul_parameters naive_flops num_layer_parameters prefill_seconds step_seconds tokenwise_flops "
            "trace_seconds workload_seconds"
        ),
        "shapes": (
            "A100_40GB A100_80GB A10G CARDS Card GIB H200 LLAMA_13B LLAMA_2_70B LLAMA_2_7B LLAMA_3_2_1B LLAMA_3_8B "
            "LLAMA_7B QWEN3_0_6B QWEN3_8B RTX_4090 SHAPES"
        ),
    },
)
