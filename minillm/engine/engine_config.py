"""How an engine is set up: plain frozen data, checked before anything is loaded. Names are vLLM's."""

import difflib
from dataclasses import dataclass, fields

from minillm.costs import CacheLimits
from minillm.engine.paged_scheduler import PREEMPTION_MODES
from minillm.engine.scheduler import SchedulerConfig
from minillm.errors import ConfigError, Count, Positive, check_choice, check_fields, check_number, check_whole
from minillm.kernels import ATTENTION_BACKENDS
from minillm.runtime import RunnerOptions

WORKERS = ("inline", "process")


@dataclass(frozen=True)
class EngineConfig:
    """The engine arguments of `LLM`."""

    block_size: Positive = 16  # tokens in a block of the cache
    num_blocks: int | None = None  # the whole pool, with its null block; None = for `max_num_seqs` long requests
    num_host_blocks: Count | None = None  # to swap to; None = as many as `num_blocks` if preemption swaps, else none
    gpu_memory_utilization: float = 0.9  # share of a card's memory that weights, activations and cache may take
    max_num_seqs: Positive = 64  # requests that run at the same time
    max_num_batched_tokens: Positive = 512  # tokens pushed through the model in one step: the token budget
    max_model_len: Positive | None = None  # prompt and output tokens of one request; None = the model's context
    enable_prefix_caching: bool = True  # requests that begin with the same tokens share the blocks of those
    enable_chunked_prefill: bool = True  # False: a prompt is computed in one step or waits
    scheduling_policy: str = "fcfs"  # "fcfs", "priority" or "sjf" (shortest predicted job first)
    ageing: float = 1.0  # "priority", "sjf": levels, or tokens, that a request gains with each second it waits
    watermark: float = 0.01  # share of the pool that must be left over when another request is admitted
    preemption_mode: str = "recompute"  # when blocks run out: "recompute" their tokens later, or "swap" them out
    worker: str = "inline"  # the model runs in this process, or in a "process" of its own
    async_scheduling: bool | None = None  # launch a step before the last one's tokens are read; None = where that helps
    attention_backend: str = "auto"  # "reference", "cpu", "cuda", "triton", "flash"; "auto" = the fastest that will do
    enforce_eager: bool = False  # on a GPU: no CUDA graphs, every kernel is launched from Python
    fused_ops: bool = True  # on a GPU: neighbouring small operations run as one kernel
    trace: bool = True  # record what happens in each step
    max_trace_steps: Positive | None = 10_000  # the last so many are kept; None = all, for a run that ends soon

    def __post_init__(self):
        check_fields(self)
        if self.num_blocks is not None:
            check_whole("num_blocks", self.num_blocks, 2)
        check_number("watermark", self.watermark, "a share of the pool, in [0, 1)", lambda share: 0 <= share < 1)
        utilization = self.gpu_memory_utilization
        check_number("gpu_memory_utilization", utilization, "a share of the card, in (0, 1]", lambda u: 0 < u <= 1)
        check_choice("preemption_mode", self.preemption_mode, PREEMPTION_MODES)
        check_choice("worker", self.worker, WORKERS)
        check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        self.scheduler_config(self.max_model_len or 1)  # the limits of a step must not contradict each other

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

    def model_len(self, context: int) -> int:
        """Most tokens of one request on a model of this context. Raises ConfigError if `max_model_len` is beyond it."""
        if self.max_model_len is None:
            return context
        if self.max_model_len > context:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}, the model's context only {context}; lower it or leave it out"
            )
        return self.max_model_len

    def scheduler_config(self, max_model_len: int) -> SchedulerConfig:
        """The limits of a step. Raises ConfigError if they contradict each other."""
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=max_model_len,
            scheduling_policy=self.scheduling_policy,
            ageing=self.ageing,
            enable_chunked_prefill=self.enable_chunked_prefill,
        )

    def runner_options(self, max_model_len: int) -> RunnerOptions:
        """How the worker is to compute."""
        return RunnerOptions(
            attention_backend=self.attention_backend,
            enforce_eager=self.enforce_eager,
            fused_ops=self.fused_ops,
            max_num_seqs=self.max_num_seqs,
            max_model_len=max_model_len,
        )

    def cache_limits(self, max_model_len: int) -> CacheLimits:
        """What decides how large the pool is. Raises ConfigError for a pool smaller than one request of that length."""
        num_host_blocks = self.num_host_blocks
        if num_host_blocks is None and self.preemption_mode != "swap":
            num_host_blocks = 0
        return CacheLimits(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=max_model_len,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            num_host_blocks=num_host_blocks,
            gpu_memory_utilization=self.gpu_memory_utilization,
        )
