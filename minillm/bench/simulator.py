"""How well the simulator predicts real runs: calibrate on this machine, then predict ten new workloads.

minillm bench simulator --json simulator.json
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import NamedTuple

from minillm.bench.measuring import (
    MAX_MODEL_LEN,
    TIMERS,
    calibration_steps,
    load,
    measure,
    mixed_requests,
    simulate,
    surroundings,
)
from minillm.engine import Request, SchedulerConfig
from minillm.errors import check_options
from minillm.simulation import Calibrated


class Workload(NamedTuple):
    """A workload to predict; lengths are uniform from 1 to the longest, in tokens."""

    batching: str
    max_num_seqs: int
    num_requests: int
    longest_prompt: int
    longest_output: int


WORKLOADS = (
    Workload("continuous", 16, 48, 30, 120),
    Workload("continuous", 8, 24, 200, 60),
    Workload("continuous", 2, 6, 60, 100),
    Workload("continuous", 12, 12, 400, 150),
    Workload("static", 16, 32, 30, 120),
    Workload("static", 8, 24, 200, 60),
    Workload("static", 3, 9, 100, 80),
    Workload("dynamic", 16, 48, 30, 80),
    Workload("dynamic", 6, 18, 120, 60),
    Workload("dynamic", 12, 24, 10, 150),
)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    model, _ = load(arguments.model)
    steps, measured = [], {workload: [] for workload in WORKLOADS}
    for turn in range(arguments.repeats):
        steps += calibration_steps(model, arguments.timer, seed=turn)
        for number, workload in enumerate(WORKLOADS):
            run = measure(model, requests_of(workload, number), workload.batching, config_of(workload), arguments.timer)
            measured[workload].append(run.seconds[arguments.timer])
    cost_model = Calibrated.fit(steps)
    rows = []
    print(
        f"{'batching':12}{'seqs':>5}{'requests':>10}{'prompt':>8}{'output':>8}{'measured':>10}{'predicted':>11}{'error':>8}"
    )
    for number, workload in enumerate(WORKLOADS):
        row = compare(cost_model, workload, number, statistics.median(measured[workload]))
        rows.append(row)
        print(
            f"{workload.batching:12}{workload.max_num_seqs:>5}{workload.num_requests:>10}{workload.longest_prompt:>8}"
            f"{workload.longest_output:>8}{row['measured']:>10.2f}{row['predicted']:>11.2f}{row['error']:>+8.1%}"
        )
    median = statistics.median(abs(row["error"]) for row in rows)
    print(f"median error {median:.1%}, largest {max(abs(row['error']) for row in rows):.1%}")
    if arguments.json:
        content = {"median_error": median, "workloads": rows, "prices": vars(cost_model), "timer": arguments.timer}
        content |= surroundings()
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="minillm bench simulator", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="storyteller", help="storyteller, or a checkpoint folder")
    parser.add_argument("--repeats", type=int, default=3, help="runs a workload; the median counts")
    parser.add_argument("--timer", default="cpu", choices=list(TIMERS), help="cpu: undisturbed by other programs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    check_options(arguments, at_least_one=("repeats",), files=("json",))
    return arguments


def config_of(workload: Workload) -> SchedulerConfig:
    """The limits of a step under which the workload runs."""
    return SchedulerConfig(workload.max_num_seqs, max_num_batched_tokens=256, max_model_len=MAX_MODEL_LEN)


def requests_of(workload: Workload, number: int) -> list[Request]:
    """The workload's requests, none of which the calibration has seen."""
    return mixed_requests(workload.num_requests, workload.longest_prompt, workload.longest_output, f"test {number}")


def compare(cost_model: Calibrated, workload: Workload, number: int, measured: float) -> dict:
    """Measured and predicted makespan of one workload, in seconds."""
    requests, config = requests_of(workload, number), config_of(workload)
    predicted = simulate(cost_model, requests, workload.batching, config).makespan
    return workload._asdict() | {"measured": measured, "predicted": predicted, "error": predicted / measured - 1}
