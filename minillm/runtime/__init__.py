"""Layer 3: what touches tensors. A worker turns a scheduler's plan into one forward pass and new tokens.

May import `kernels` and the rooms below; never `engine`. `plan` is plain data, without torch.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "batch": "Layout Step carve rows_computed",
        "cache_engine": "CacheEngine",
        "processes": "descendants end_family_with start_of",
        "ranks": "end_with environment_of start_ranks",
        "runner": "Runner",
        "plan": (
            "BlockMove DEFAULT_OPTIONS ModelOutput NULL_BLOCK NewRequest PendingOutput RunnerOptions "
            "ScheduledRequest SchedulerOutput not_finite"
        ),
        "pooling": "mean_hidden_state",
        "step_graph": "bucket_sizes record",
        "worker": "Worker",
        "worker_process": "ProcessWorker search_path",
    },
)
