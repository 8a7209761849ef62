"""How an engine is set up: plain frozen data, checked before anything is loaded. Names are vLLM's."""

import difflib
from dataclasses import dataclass, fields, replace

from minillm.costs import CacheLimits
from minillm.engine.scheduler import PREEMPTION_MODES, SchedulerConfig
from minillm.errors import MOST, ConfigError, Count, Positive, check_choice, check_fields, check_number
from minillm.kernels import ATTENTION_BACKENDS
from minillm.runtime import RunnerOptions

WORKERS = ("inline", "process")
BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}  # per step: few leave a GPU idle, many take a CPU too long


@dataclass(frozen=True)
class EngineConfig(SchedulerConfig, CacheLimits, RunnerOptions):
    """The engine arguments of `LLM`: those that the scheduler, the memory plan and the runner read, and these.

    Fields that are None may depend on the model and the device: `resolved` decides them.
    """

    max_num_batched_tokens: Positive | None = None  # None = 512, on a GPU 8,192
    max_model_len: Positive | None = None  # None = the model's context
    num_host_blocks: Count | None = None  # None = as many as the pool has if preemption swaps (see `plan_cache`), or 0
    enable_prefix_caching: bool = True  # requests that begin with the same tokens share their blocks
    watermark: float = 0.01  # share of the pool that must be left over when another request is admitted
    preemption_mode: str = "recompute"  # when blocks run out: "recompute" their tokens later, or "swap" them out
    worker: str = "inline"  # the model runs in this process, or in a "process" of its own
    tensor_parallel_size: Positive = 1  # processes that share the model; on GPUs, each has its own
    async_scheduling: bool | None = None  # launch a step before the last one's tokens are read; None = where that helps
    trace: bool = True  # record what happens in each step
    max_trace_steps: Positive | None = 10_000  # how many of the newest are kept; None = all, for a short run

    def __post_init__(self):
        check_fields(self)
        check_number("watermark", self.watermark, "a share of the pool, in [0, 1)", lambda share: 0 <= share < 1)
        check_choice("preemption_mode", self.preemption_mode, PREEMPTION_MODES)
        check_choice("worker", self.worker, WORKERS)
        check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        if self.max_num_batched_tokens is None or self.max_model_len is None:  # not decided yet, so no contradiction
            tokens, length = self.max_num_batched_tokens or MOST, self.max_model_len or 1
            replace(self, max_num_batched_tokens=tokens, max_model_len=length)
        else:
            self.check_limits()
            self.check_pool()

    @classmethod
    def from_arguments(cls, **arguments) -> "EngineConfig":
        """The configuration of the arguments given. Raises ConfigError for one that does not exist."""
        known = [field.name for field in fields(cls)]
        for name in arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                meant = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(f"{name!r} is no engine argument; {meant}there are: {', '.join(known)}")
        return cls(**arguments)

    def resolved(self, context: int, device: object = "cpu") -> "EngineConfig":
        """The same with everything decided, for a model of this context on this device ("cuda:1", or torch's own).

        Steps are launched ahead where a device or process computes while the engine's thread goes on. With a worker
        process on two cores, 64 requests to the storyteller finish about 1.1 times as fast: medians of 8 to 12
        interleaved runs on a busy machine gave 1.05 to 1.12. Raises ConfigError if `max_model_len` is beyond the
        context, or if a decided value contradicts a given one.
        """
        kind = "cuda" if str(device).startswith("cuda") else "cpu"
        worker = "process" if self.tensor_parallel_size > 1 else self.worker
        if self.max_model_len is not None and self.max_model_len > context:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}, the model's context only {context}; lower it or leave it out"
            )
        decided = {
            "max_num_batched_tokens": BATCHED_TOKENS[kind],
            "max_model_len": context,
            "num_host_blocks": None if self.preemption_mode == "swap" else 0,
            "async_scheduling": worker == "process" or kind == "cuda",
        }
        decided = {name: value for name, value in decided.items() if getattr(self, name) is None}
        return replace(self, worker=worker, **decided)
