"""Shared by the benchmarks: a run on the model with every step timed, calibration, and the machine's name."""

import datetime
import os
import platform
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import minillm
from minillm.bench.peer_process import TIMERS
from minillm.engine import Request, SchedulerConfig
from minillm.errors import ConfigError
from minillm.kernels import cpu
from minillm.ladder import ContiguousExecutor
from minillm.model import Decoder
from minillm.sampling import sample_rows
from minillm.simulation import (
    BATCHING,
    CostModel,
    RealClock,
    Report,
    SimulatedExecutor,
    StepWork,
    VirtualClock,
    fresh,
    made_request,
    report,
    run,
)
from minillm.trace import Trace

TEMPERATURE = 0.8  # of requests that are not greedy
MAX_MODEL_LEN = 576  # tokens: the storyteller's longest prompt plus its longest story


@dataclass(frozen=True)
class MeasuredRun:
    """One run on the model: its report, its steps, and its outputs."""

    report: Report
    seconds: dict[str, float]  # of the whole run, on each timer
    steps: list[tuple[StepWork, float]]  # work and seconds, including the scheduler
    outputs: dict[str, tuple[int, ...]]
    trace: Trace


def measure(
    model: Decoder, requests: Iterable[Request], batching: str, config: SchedulerConfig, timer: str = "cpu"
) -> MeasuredRun:
    """Run copies of `requests`, which must all arrive at 0, and time every step on the named timer."""
    sampler = sample_rows if cpu.unusable(model.dtype) else cpu.sample_rows  # the engine's
    executor = ContiguousExecutor(model, config.max_num_seqs, config.max_model_len, sampler)
    clock = RealClock(TIMERS[timer])
    scheduler = BATCHING[batching](config, clock)
    copies = [fresh(request) for request in requests]
    works, moments = [], [clock()]

    def note(plan, updates) -> None:
        works.append(StepWork.of(plan))
        moments.append(clock())

    began = {name: read() for name, read in TIMERS.items()}
    trace = run(scheduler, executor, copies, clock, on_step=note)
    seconds = {name: read() - began[name] for name, read in TIMERS.items()}
    durations = [end - start for start, end in zip(moments, moments[1:], strict=False)]
    outputs = {request.request_id: tuple(request.output_token_ids) for request in copies}
    return MeasuredRun(report(trace), seconds, list(zip(works, durations, strict=True)), outputs, trace)


def simulate(cost_model: CostModel, requests: Iterable[Request], batching: str, config: SchedulerConfig) -> Report:
    """The same run without the model."""
    clock = VirtualClock()
    scheduler = BATCHING[batching](config, clock)
    return report(run(scheduler, SimulatedExecutor(cost_model, clock), map(fresh, requests), clock))


def calibration_steps(model: Decoder, timer: str = "cpu", seed: int = 0) -> list[tuple[StepWork, float]]:
    """Steps to fit this machine's prices to: synthetic requests under every batching policy in several batch sizes.

    The speed of a machine varies: measure these steps in turns with the runs to predict, and fit to all of them.
    """
    steps = []
    for max_num_seqs, num_requests, longest_prompt in ((1, 3, 100), (4, 10, 300), (10, 24, 40), (16, 32, 150)):
        config = SchedulerConfig(max_num_seqs, max_num_batched_tokens=256, max_model_len=MAX_MODEL_LEN)
        requests = mixed_requests(num_requests, longest_prompt, 150, f"calibration {seed} {max_num_seqs}")
        for batching in BATCHING:
            steps += measure(model, requests, batching, config, timer).steps
    return steps


def mixed_requests(num_requests: int, longest_prompt: int, longest_output: int, seed: object) -> list[Request]:
    """Synthetic requests of lengths up to the given ones, all at once; every second one is sampled, not greedy."""
    rng = random.Random(str(seed))
    requests = [
        made_request(f"req {i}", 0.0, rng.randint(1, longest_prompt), rng.randint(1, longest_output))
        for i in range(num_requests)
    ]
    for i in range(0, num_requests, 2):
        requests[i].params = replace(requests[i].params, temperature=TEMPERATURE, seed=i)
    return requests


def load(name: str):
    """The model and its tokenizer, on one thread."""
    torch.set_num_threads(1)
    return minillm.load_model(name)


def surroundings() -> dict[str, str]:
    """Machine, date and versions, for the record."""
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread used",
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "minillm": minillm.__version__,
    }


def processor() -> str:
    """The processor's name from the operating system."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- other processes -------------------------------------------------------------------------------------------------


def seconds_of_processes(pids: Iterable[int]) -> dict[str, float]:
    """CPU seconds used by processes so far, to hundredths. Raises ConfigError without /proc."""
    found = {"cpu": 0.0, "user": 0.0}
    for pid in pids:
        user, system = (int(number) / os.sysconf("SC_CLK_TCK") for number in _statistics(pid)[11:13])
        found["user"] += user
        found["cpu"] += user + system
    return found


def _statistics(pid: int) -> list[str]:
    """Linux's statistics of a process, from its state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        raise ConfigError("the CPU time of another process is read from /proc, which does not tell it") from error
