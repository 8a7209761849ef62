"""How an engine is set up: plain frozen data, checked before anything is loaded. Names are vLLM's."""

import difflib
from dataclasses import dataclass, fields

from minillm.engine.paged_scheduler import PREEMPTION_MODES
from minillm.engine.queue import POLICIES
from minillm.engine.scheduler import SchedulerConfig
from minillm.errors import ConfigError
from minillm.memory_ledger import CacheLimits
from minillm.plan import ATTENTION_BACKENDS, RunnerOptions

WORKERS = ("inline", "process")


@dataclass(frozen=True)
class EngineConfig:
    """The engine arguments of `LLM`."""

    block_size: int = 16  # tokens in a block of the cache
    num_blocks: int | None = None  # the whole pool, its null block included; None = what the memory has room for
    num_host_blocks: int | None = None  # to swap to; None = as many as `num_blocks` if preemption swaps, else none
    gpu_memory_utilization: float = 0.9  # share of a card's memory that weights, activations and cache may take
    max_num_seqs: int = 64  # requests that run at the same time
    max_num_batched_tokens: int = 512  # tokens pushed through the model in one step: the token budget
    max_model_len: int | None = None  # prompt and output tokens of one request; None = the model's context
    enable_prefix_caching: bool = True  # requests that begin with the same tokens share the blocks of those
    enable_chunked_prefill: bool = True  # False: a prompt is computed in one step or waits
    scheduling_policy: str = "fcfs"  # "fcfs", "priority" or "sjf" (shortest predicted job first)
    ageing: float = 1.0  # "priority", "sjf": levels, or tokens, that a request gains with each second it waits
    watermark: float = 0.01  # share of the pool that must be left over when another request is admitted
    preemption_mode: str = "recompute"  # when blocks run out: "recompute" their tokens later, or "swap" them out
    worker: str = "inline"  # the model runs in this process, or in a "process" of its own
    async_scheduling: bool | None = None  # launch a step before the last one's tokens are read; None = where that helps
    attention_backend: str = "auto"  # "reference", "cuda", "triton" or "flash"; "auto" = the fastest that will do
    enforce_eager: bool = False  # on a GPU: no CUDA graphs, every kernel is launched from Python
    fused_ops: bool = True  # on a GPU: neighbouring small operations run as one kernel
    trace: bool = True  # record every step; False for an engine that runs for days

    def __post_init__(self):
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            _check_whole(name, getattr(self, name), 1)
        for name, least in (("num_blocks", 2), ("num_host_blocks", 0), ("max_model_len", 1)):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), least)
        if not self.ageing > 0:
            raise ConfigError(f"ageing is {self.ageing}; it must be positive, or a request could wait for ever")
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark is {self.watermark}; it is a share of the pool and must lie in [0, 1)")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must lie in (0, 1]")
        _check_one_of("scheduling_policy", self.scheduling_policy, POLICIES)
        _check_one_of("preemption_mode", self.preemption_mode, PREEMPTION_MODES)
        _check_one_of("worker", self.worker, WORKERS)
        _check_one_of("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _check_one_of("async_scheduling", self.async_scheduling, (None, True, False))
        _check_one_of("enforce_eager", self.enforce_eager, (True, False))
        _check_one_of("fused_ops", self.fused_ops, (True, False))
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


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, at least {least}")


def _check_one_of(name: str, value: object, known: tuple) -> None:
    if value not in known or type(value) not in set(map(type, known)):  # 1 equals True and is not meant
        raise ConfigError(f"{name} {value!r} is not one of {', '.join(map(str, known))}")
