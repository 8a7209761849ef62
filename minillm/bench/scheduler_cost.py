"""The time of a step outside the model: scheduler, block manager and input preparation, for several queue lengths.

minillm bench engine --scheduler
"""

import gc
import statistics
from collections.abc import Callable
from itertools import count

import torch

from minillm.bench.measuring import TIMERS
from minillm.engine import BlockManager, Request, Scheduler, SchedulerConfig
from minillm.model import Decoder, load_model
from minillm.runtime import ModelOutput, Runner, RunnerOptions, SchedulerOutput, Step, Worker, carve
from minillm.sampling import SamplingParams
from minillm.storyteller import CHECKPOINT_DIR

RUNNING = 256
WAITING = (0, 1_000, 10_000)
STEPS = 64  # decode steps measured, in which every request takes four new blocks
WARM_STEPS = 8
BLOCK_SIZE = 16
SHORTEST_PROMPT = 48  # prompts have 48 to 63 tokens, so that each step a sixteenth of the requests takes a block
PHASES = ("schedule", "prepare", "update")


def measure(repeats: int, timer: str, running: int = RUNNING, waiting: tuple[int, ...] = WAITING) -> dict:
    """Milliseconds per decode step on the named timer, for JSON: medians of steps per number of waiting requests.

    "total" is schedule + prepare + update. Not part of it are "attention", which its kernels need once per step, and
    "trace", the time to make a step's events, which happens only when the trace is requested.
    """
    model = load_model(CHECKPOINT_DIR, torch.float32, skip_tokenizer_init=True).model
    repeats_of = {number: [] for number in waiting}
    for _ in range(repeats):
        for number in waiting:
            repeats_of[number].append(measure_once(model, TIMERS[timer], running, number))
    return {
        "running": running,
        "steps": STEPS,
        "timer": timer,
        "waiting": {str(number): summary(runs) for number, runs in repeats_of.items()},
    }


def measure_once(model: Decoder, read: Callable[[], float], running: int, num_waiting: int) -> dict[str, float]:
    """Milliseconds per decode step of each phase, and "trace"."""
    scheduler, runner = decoding_engine(model, running, num_waiting)
    steps = []
    gc.collect()
    for number in range(WARM_STEPS + STEPS):
        timed = {}
        plan, timed["schedule"] = time_of(read, scheduler.schedule)
        step, timed["prepare"] = time_of(read, lambda plan=plan: prepare(runner, plan))
        _, timed["attention"] = time_of(read, lambda step=step: runner.attention(carve(step.buffer, step.layout)))
        output = made_up_output(plan)
        _, timed["update"] = time_of(read, lambda plan=plan, output=output: scheduler.update(plan, output))
        if number == WARM_STEPS - 1:
            scheduler.trace  # noqa: B018  makes the events of the steps so far
        if number >= WARM_STEPS:
            timed["total"] = sum(timed[phase] for phase in PHASES)
            steps.append(timed)
    _, trace = time_of(read, lambda: scheduler.trace)
    medians = {name: statistics.median(step[name] for step in steps) * 1000 for name in steps[0]}
    return medians | {"trace": trace / STEPS * 1000}


def prepare(runner: Runner, plan: SchedulerOutput) -> Step:
    """The runner's work before the forward pass."""
    runner.follow(plan)
    return runner.batch.prepare(plan)


def decoding_engine(model: Decoder, running: int, num_waiting: int) -> tuple[Scheduler, Runner]:
    """An engine whose running requests all decode while `num_waiting` wait; no model computed anything."""
    most_tokens = SHORTEST_PROMPT + BLOCK_SIZE + 1 + WARM_STEPS + STEPS
    num_blocks = 2 + (running + 1) * (most_tokens // BLOCK_SIZE + 1)
    config = SchedulerConfig(running, max_num_batched_tokens=running * 64, max_model_len=2 * most_tokens)
    scheduler = Scheduler(config, block_manager=BlockManager(num_blocks, BLOCK_SIZE))
    worker = Worker(model, RunnerOptions(max_num_seqs=running, max_model_len=config.max_model_len))
    worker.init_cache(num_blocks)
    runner = worker.runner
    for request in made_up_requests(running + num_waiting, most_tokens):
        scheduler.add_request(request)
    plan = scheduler.schedule()
    prepare(runner, plan)
    scheduler.update(plan, made_up_output(plan))
    return scheduler, runner


def made_up_requests(number: int, max_tokens: int):
    """Requests whose blocks fill up at different times, each with a prompt of its own."""
    tokens = count()
    for i in range(number):
        prompt = [next(tokens) % 1900 for _ in range(SHORTEST_PROMPT + i % BLOCK_SIZE)]
        yield Request(f"req {i}", prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def made_up_output(plan: SchedulerOutput) -> ModelOutput:
    """The output of an executor that samples the same token for every request."""
    return ModelOutput({part.request_id: 7 for part in plan.scheduled if part.samples}, 0)


def time_of(read: Callable[[], float], work: Callable[[], object]) -> tuple[object, float]:
    """The result of `work`, and its seconds."""
    began = read()
    result = work()
    return result, read() - began


def summary(runs: list[dict[str, float]]) -> dict:
    """Medians over the repeats, and the repeats of the total."""
    medians = {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}
    return medians | {"repeats": [run["total"] for run in runs]}


def table(result: dict) -> str:
    """The record as text."""
    columns = (*PHASES, "total", "attention", "trace")
    lines = [
        f"Milliseconds per decode step of {result['running']} requests, without the model; total: the first three",
        f"{'waiting':>10}" + "".join(f"{name:>10}" for name in columns),
    ]
    for number, row in result["waiting"].items():
        lines.append(f"{number:>10}" + "".join(f"{row[name]:>10.3f}" for name in columns))
    return "\n".join(lines)
