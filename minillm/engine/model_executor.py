"""One or more workers behind three calls: `profile`, `reserve` and `launch`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from minillm.costs import CacheLimits, MemoryLedger, MemoryProfile, plan_cache
from minillm.engine.engine_config import WORKERS
from minillm.errors import ConfigError
from minillm.model import Decoder
from minillm.runtime import (
    DEFAULT_OPTIONS,
    ModelOutput,
    PendingOutput,
    ProcessWorker,
    RunnerOptions,
    SchedulerOutput,
    Worker,
)


class AnyWorker(Protocol):
    """What an executor asks of a worker, wherever that runs."""

    def profile(
        self, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int
    ) -> MemoryProfile: ...

    def init_cache(self, num_blocks: int, block_size: int, num_host_blocks: int) -> int: ...

    @property
    def why(self) -> str: ...

    def launch(self, plan: SchedulerOutput) -> PendingOutput: ...

    def shutdown(self) -> None: ...


@dataclass(frozen=True)
class OutputOfAll:
    """A step that several workers compute."""

    parts: Sequence[PendingOutput]  # one a worker

    def result(self) -> ModelOutput:
        """Wait for all of them; what the first one says."""
        return [part.result() for part in self.parts][0]


class ModelExecutor:
    """Every worker gets every plan; the result of the first one counts.

    executor = ModelExecutor.start(model)
    ledger = executor.reserve(CacheLimits(max_num_seqs=16, max_num_batched_tokens=512, max_model_len=2048))
    output = executor.execute_model(plan)
    """

    def __init__(self, workers: Sequence[AnyWorker]):
        if not workers:
            raise ConfigError("an executor of 0 workers computes nothing; give at least 1")
        self.workers = list(workers)

    @classmethod
    def start(
        cls,
        model: Decoder | str | Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        num_tokens: int | None = None,
        options: RunnerOptions = DEFAULT_OPTIONS,
        worker: str = "inline",
    ) -> "ModelExecutor":
        """An executor with one worker: "inline", in this process, or a "process" of its own.

        `model` is a loaded Decoder (inline only: dtype, device and num_tokens are its own) or what `load_model` takes;
        `num_tokens` is how many ids the tokenizer has; `options` say how steps are computed. Raises ConfigError and
        what `load_model` raises.
        """
        if worker not in WORKERS:
            raise ConfigError(f"worker {worker!r} is not one of {', '.join(map(repr, WORKERS))}")
        if isinstance(model, Decoder):
            if worker == "process":
                raise ConfigError("a worker process loads the model itself; give its name or folder, not a Decoder")
            return cls([Worker(model, options)])
        make = Worker.load if worker == "inline" else ProcessWorker
        return cls([make(model, dtype=dtype, device=device, num_tokens=num_tokens, options=options)])

    def profile(
        self, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int = 16
    ) -> MemoryProfile:
        """Run the worst steps; what is safe for every worker."""
        limits = (max_num_batched_tokens, max_num_seqs, max_model_len, block_size)
        return MemoryProfile.worst([worker.profile(*limits) for worker in self.workers])

    def reserve(self, limits: CacheLimits) -> MemoryLedger:
        """Profile, decide how many blocks there are, and allocate them; returns where the memory went.

        Raises OutOfMemoryError, before the pool is allocated, if it does not fit or is too small to be of use.
        """
        profile = self.profile(
            limits.max_num_batched_tokens, limits.max_num_seqs, limits.max_model_len, limits.block_size
        )
        ledger = plan_cache(profile, limits)
        self.init_cache(ledger.num_blocks, ledger.block_size, ledger.num_host_blocks)
        return ledger

    def init_cache(self, num_blocks: int, block_size: int = 16, num_host_blocks: int = 0) -> None:
        """Allocate the pool of every worker, of exactly this size."""
        for worker in self.workers:
            worker.init_cache(num_blocks, block_size, num_host_blocks)

    @property
    def why(self) -> str:
        """One line, from `init_cache` on: which kernels were picked and why."""
        return self.workers[0].why

    def launch(self, plan: SchedulerOutput) -> PendingOutput:
        """Let every worker begin the plan. Raises WorkerDiedError, here or from the result, if one of them has ended.

        Plans are carried out, and their results to be read, in the order of their launch. When a plan is launched, at
        most one launched before it may be unread, unless they are given up: nobody reads the results of steps that are
        retracted.
        """
        pending = [worker.launch(plan) for worker in self.workers]
        return pending[0] if len(pending) == 1 else OutputOfAll(pending)

    def execute_model(self, plan: SchedulerOutput) -> ModelOutput:
        """Carry out a plan on every worker and wait for what comes of it."""
        return self.launch(plan).result()

    def shutdown(self) -> None:
        """End all workers and give their memory back. No effect the second time."""
        for worker in self.workers:
            worker.shutdown()
