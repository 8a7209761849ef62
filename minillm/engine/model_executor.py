"""One or more workers behind a few calls: `profile`, `reserve`, then `execute_model` or `launch` for every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from minillm.costs import CacheLimits, MemoryLedger, MemoryProfile, plan_cache
from minillm.engine.engine_config import EngineConfig
from minillm.errors import ConfigError
from minillm.model import Decoder
from minillm.runtime import ModelOutput, PendingOutput, ProcessWorker, SchedulerOutput, Worker, start_ranks


@dataclass(frozen=True)
class OutputOfAll:
    """A step that several workers compute."""

    parts: Sequence[PendingOutput]  # one per worker

    def result(self) -> ModelOutput:
        """Wait for all of them; returns the output of the first."""
        return [part.result() for part in self.parts][0]


class ModelExecutor:
    """Every worker gets every plan; the result of the first one counts.

    executor = ModelExecutor.start(model, config)
    ledger = executor.reserve(config)
    output = executor.execute_model(plan)
    """

    def __init__(self, workers: Sequence[Worker | ProcessWorker]):
        if not workers:
            raise ConfigError("an executor of 0 workers computes nothing; give at least 1")
        self.workers = list(workers)

    @classmethod
    def start(cls, model: Decoder | str | Path, config: EngineConfig, **loading) -> "ModelExecutor":
        """An executor whose model runs in this process or, as `config` says, in one process of its own or in several.

        `model` is a loaded Decoder (in this process only), or its name or folder: then `loading` is what `Worker.load`
        takes. `config` has been resolved. Raises ConfigError and what `load_model` raises.
        """
        if not isinstance(model, Decoder):
            make = Worker.load if config.worker == "inline" else ProcessWorker
            if config.tensor_parallel_size > 1:
                make = partial(start_ranks, size=config.tensor_parallel_size)
            return cls([make(model, config, **loading)])
        if config.worker == "process":
            raise ConfigError("a worker process loads the model itself; give its name or folder, not a Decoder")
        return cls([Worker(model, config)])

    def profile(self) -> MemoryProfile:
        """Run the worst steps; returns a profile that is safe for every worker."""
        return MemoryProfile.worst([worker.profile() for worker in self.workers])

    def reserve(self, limits: CacheLimits) -> MemoryLedger:
        """Profile, decide how many blocks there are, and allocate them; returns where the memory went.

        Raises OutOfMemoryError, before the pool is allocated, if it does not fit or is too small to be of use.
        """
        ledger = plan_cache(self.profile(), limits)
        self.init_cache(ledger.num_blocks, num_host_blocks=ledger.num_host_blocks)
        return ledger

    def init_cache(self, num_blocks: int, *, num_host_blocks: int = 0) -> None:
        """Allocate the pool of every worker, of exactly this size."""
        for worker in self.workers:
            worker.init_cache(num_blocks, num_host_blocks=num_host_blocks)

    @property
    def why(self) -> str:
        """One line, from `init_cache` on: which kernels were picked and why."""
        return self.workers[0].why

    def launch(self, plan: SchedulerOutput) -> PendingOutput:
        """Let every worker begin the plan. Raises WorkerDiedError, here or from the result, if one of them has ended.

        Plans are carried out in the order of their launch, and their results must be read in that order. When a plan is
        launched, the results of at most one earlier plan may be unread. Results of retracted steps are never read.
        """
        pending = [worker.launch(plan) for worker in self.workers]
        return pending[0] if len(pending) == 1 else OutputOfAll(pending)

    def execute_model(self, plan: SchedulerOutput) -> ModelOutput:
        """Carry out a plan on every worker and wait for its output."""
        return self.launch(plan).result()

    def encode(self, token_ids: Sequence[int]) -> Tensor:
        """[hidden] a prompt's vector, see `Worker.encode`; a step in flight is waited for."""
        return self.workers[0].encode(token_ids)

    def check_alive(self) -> None:
        """Raises WorkerDiedError if a worker has ended, also while nothing is computed."""
        for worker in self.workers:
            worker.check_alive()

    def shutdown(self) -> None:
        """End all workers and give their memory back. No effect the second time."""
        for worker in self.workers:
            worker.shutdown()
