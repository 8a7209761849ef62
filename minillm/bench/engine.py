"""The paged engine beside transformers and vLLM: the same weights, the same requests, greedy, real runs.

    minillm bench engine --json engine.json
    minillm bench engine --vllm ../vllm/bin/python --dtype bfloat16
    minillm bench engine --peers none --threads 1,2
    minillm bench engine --scheduler

The contenders take turns, so that a disturbance of the machine affects all of them. Ratios are taken within a turn, and
their median is reported. In float32 all must give the same tokens. On a shared machine, use the ratios of user CPU
time. `minillm/bench/live.py` says what makes the comparison with vLLM fair, CONTRIBUTING.md how to make an environment
for it.
"""

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from minillm.bench import live, real_model, scheduler_cost
from minillm.bench.contenders import (
    SHAPE_135M,
    Contender,
    ContinuousBatches,
    GemmFloor,
    Job,
    Ours,
    StaticBatches,
    load_peer,
    make_jobs,
    our_arguments,
    products_of,
    write_random_checkpoint,
)
from minillm.bench.engine_report import Run, Turn, summary, table, turn_line
from minillm.bench.measuring import surroundings
from minillm.bench.peer_process import TIMERS, bind, timed
from minillm.errors import ConfigError, ModelNotFoundError, check_options, check_whole, shown
from minillm.ladder import CausalAttention, as_tensor, positions
from minillm.model import Decoder, load_model, read_config
from minillm.storyteller import CHECKPOINT_DIR

ROUNDING = 5e-5  # of the logits' spread: ten times the largest error measured in float32 on these shapes
WARM_UPS = 2  # whole workloads: vLLM's second is still slower than its third
DTYPES = ("float32", "bfloat16")
MOST_THREADS = 1024


@dataclass(frozen=True)
class Shape:
    """A model and its workload; the limits of a step are the best of those tried for each contender."""

    label: str
    num_requests: int
    checkpoint: Callable[[Path], Path]  # gets an empty folder to write to, returns that of the checkpoint
    max_num_seqs: int
    max_num_batched_tokens: int
    peer_max_requests: int
    peer_max_batch_tokens: int


SHAPES = {
    "storyteller": Shape("storyteller", 64, lambda _: CHECKPOINT_DIR, 64, 512, 16, 64),
    "135m": Shape("135M shape", 16, lambda folder: write_random_checkpoint(SHAPE_135M, folder), 64, 512, 16, 256),
    "smollm2": Shape("SmolLM2-135M", 16, lambda _: real_model.checkpoint(), 64, 512, 16, 256),
}


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads[0])
    transformers.utils.logging.disable_progress_bar()
    if arguments.scheduler:
        result = scheduler_cost.measure(arguments.repeats, arguments.timer)
        print(scheduler_cost.table(result))
        write(arguments.json, {"scheduler": result} | surroundings())
        return 0
    shapes = {}
    for name in SHAPES if arguments.shape == "all" else [arguments.shape]:
        try:
            shapes[name] = measure_shape(SHAPES[name], arguments)
        except ModelNotFoundError as missing:
            if arguments.shape != "all":
                raise
            print(f"{SHAPES[name].label} is left out: {missing}")
            continue
        print(table(SHAPES[name].label, shapes[name]))
    write(arguments.json, {"shapes": shapes, "transformers": transformers.__version__} | surroundings())
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="minillm bench engine", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="all", choices=[*SHAPES, "all"])
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of all contenders")
    parser.add_argument("--peers", default="all", choices=["all", "none"], help="none: without transformers")
    parser.add_argument(
        "--vllm",
        metavar="PYTHON",
        help="the Python of an environment with vLLM's CPU build; see CONTRIBUTING.md",
    )
    parser.add_argument("--eager", action="store_true", help="vLLM without its compiler, which makes it slower")
    parser.add_argument(
        "--threads", default="1", metavar="N[,N...]", help="of all contenders; and ours with each further number too"
    )
    parser.add_argument("--requests", type=int, help="instead of the shape's own number")
    parser.add_argument("--repeats", type=int, default=5, help="turns; the median counts")
    parser.add_argument("--timer", default="wall", choices=list(TIMERS), help="cpu: undisturbed by other programs")
    parser.add_argument("--scheduler", action="store_true", help="what a step costs besides the model, alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    check_options(arguments, at_least_one=("requests", "repeats"), files=("json",))
    arguments.threads = parse_threads(arguments.threads)
    if arguments.vllm is not None:
        arguments.vllm = live.check_vllm(arguments.vllm)
    return arguments


def parse_threads(text: str) -> list[int]:
    """Parse distinct numbers of threads from "1,2". Raises ConfigError."""
    try:
        found = [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"--threads {shown(text)} is no list of whole numbers; say --threads 1,2") from None
    for number in found:
        check_whole("--threads", number, 1, MOST_THREADS)
    return list(dict.fromkeys(found))


def write(file: Path | None, content: dict) -> None:
    if file is not None:
        file.write_text(json.dumps(content, indent=2) + "\n")


# --- runs ------------------------------------------------------------------------------------------------------------


def measure_shape(shape: Shape, arguments: argparse.Namespace) -> dict:
    """The record of one shape, for JSON. Raises AssertionError if the contenders do not give the same tokens."""
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        folder = shape.checkpoint(Path(made))
        jobs = make_jobs(arguments.requests or shape.num_requests, read_config(folder).vocab_size)
        cores = stack.enter_context(same_cores(arguments))
        contenders = {
            name: stack.enter_context(closing(contender))
            for name, contender in make_contenders(shape, folder, jobs, arguments, cores)
        }
        floor = GemmFloor(contenders["ours"].model)
        warm_up(contenders, jobs)
        turns = []
        for number in range(arguments.repeats):
            turns.append(take_turn(contenders, floor, jobs, number))
            print(turn_line(shape.label, number, turns[-1], arguments.timer), flush=True)
        outputs = compare_outputs(folder, jobs, [turn.runs for turn in turns], arguments.dtype)
        settings = {name: contender.settings for name, contender in contenders.items()}
        return summary(jobs, turns, contenders["ours"].steps, settings, outputs, arguments.dtype, arguments.timer)


class Cores(NamedTuple):
    """Numbers of cores; None where no process is bound to any."""

    same: list[int] | None  # as many as threads, for this process and vLLM
    all: list[int] | None


@contextmanager
def same_cores(arguments: argparse.Namespace) -> Iterator[Cores]:
    """Binds this process to vLLM's cores within the block; does nothing without vLLM."""
    if arguments.vllm is None or not hasattr(os, "sched_setaffinity"):
        yield Cores(None, None)
        return
    every = sorted(os.sched_getaffinity(0))
    same = every[-arguments.threads[0] :]
    bind(same)
    try:
        yield Cores(same, every)
    finally:
        bind(every)


def make_contenders(
    shape: Shape, folder: Path, jobs: Sequence[Job], arguments: argparse.Namespace, cores: Cores
) -> Iterator[tuple[str, Contender]]:
    """Yields (name, contender): ours, then those that the arguments ask for, all with the checkpoint in `folder`.

    They are made one after the other, so that the caller can close the earlier ones if one fails.
    """
    dtype, (threads, *more) = arguments.dtype, arguments.threads
    ours = our_arguments(jobs, shape.max_num_seqs, shape.max_num_batched_tokens)
    yield "ours", Ours(folder, ours, dtype=dtype)
    for number in more:
        yield f"ours_{number}_threads", live.ours(folder, dtype, ours, number, cores.all)
    if arguments.vllm is not None:
        limits = {name: ours[name] for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len")}
        yield "vllm", live.vllm(arguments.vllm, folder, dtype, limits, threads, cores.same, arguments.eager)
    if arguments.peers == "all":
        model = load_peer(folder, dtype)
        yield "static16", StaticBatches(model)
        continuous = ContinuousBatches(model, jobs, shape.peer_max_requests, shape.peer_max_batch_tokens)
        yield "transformers_cb", continuous


def warm_up(contenders: dict[str, Contender], jobs: Sequence[Job]) -> None:
    """Run every contender before measuring."""
    for contender in contenders.values():
        for _ in range(WARM_UPS):
            contender.generate(jobs)


def take_turn(contenders: dict[str, Contender], floor: GemmFloor, jobs: Sequence[Job], number: int) -> Turn:
    """Run every contender once, in the order of `turn_order`; the floor follows ours, whose products it repeats."""
    gc.collect()  # so that no contender collects the garbage of another turn
    runs = {}
    for name in turn_order(list(contenders), number):
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        seconds, outputs = timed(contenders[name].generate, jobs)
        runs[name] = Run(getattr(contenders[name], "seconds", seconds), outputs, load)
        if name == "ours":
            floor_seconds, _ = timed(floor.run, products_of(contenders[name].steps))
    return Turn(runs, floor_seconds)


def turn_order(names: list[str], number: int) -> list[str]:
    """Every second turn is reversed, so that of two neither is always first; each pair begins with the next one."""
    first = number // 2 % len(names)
    order = names[first:] + names[:first]
    return order[::-1] if number % 2 else order


# --- the same tokens -------------------------------------------------------------------------------------------------


def compare_outputs(folder: Path, jobs: Sequence[Job], turns: Sequence[dict[str, Run]], dtype: str) -> dict:
    """For the record. In bfloat16, where rounding decides between tokens, only the number of differing requests."""
    if dtype == "float32":
        rounded = check_same_outputs(folder, jobs, turns)
        alone = turns[0].keys() == {"ours"}
        return {"identical_outputs": None if alone else not rounded, "different_by_rounding": rounded}
    check_lengths(jobs, turns)
    ours = turns[0]["ours"].outputs
    different = {name: max(sum(map(tuple.__ne__, runs[name].outputs, ours)) for runs in turns) for name in turns[0]}
    return {"different_from_ours": different}


def check_lengths(jobs: Sequence[Job], turns: Sequence[dict[str, Run]]) -> None:
    """Check that every output has the requested length. Raises AssertionError."""
    for name, run in (item for runs in turns for item in runs.items()):
        for number, (job, said) in enumerate(zip(jobs, run.outputs, strict=True)):
            if len(said) != job.num_outputs:
                raise AssertionError(f"{name} gave request {number} {len(said)} tokens instead of {job.num_outputs}")


def check_same_outputs(
    folder: Path, jobs: Sequence[Job], turns: Sequence[dict[str, Run]], reference: str | None = None
) -> list[int]:
    """The numbers of the requests that got different tokens in float32, at a tie, which float64 shows.

    All are compared with `reference` in the first turn: by default transformers' static batches, otherwise ours.

    With a different number of rows, sums are rounded in a different order. So where two tokens are equal up to
    rounding, two correct engines may sample different ones. Raises AssertionError for any other difference.
    """
    check_lengths(jobs, turns)
    reference = reference or ("static16" if "static16" in turns[0] else "ours")
    expected = turns[0][reference].outputs
    exact, rounded = None, set()
    for name, run in (item for runs in turns for item in runs.items()):
        for number, (job, said, wanted) in enumerate(zip(jobs, run.outputs, expected, strict=True)):
            if said != wanted:
                exact = exact or load_model(folder, torch.float64, skip_tokenizer_init=True).model
                check_tie(exact, job, said, wanted, f"{name} gave request {number}")
                rounded.add(number)
    return sorted(rounded)


def check_tie(exact: Decoder, job: Job, said: tuple[int, ...], wanted: tuple[int, ...], who: str) -> None:
    """Check that both tokens where outputs part are the likeliest, up to rounding. `exact`: the model in float64."""
    place = next(i for i, (one, other) in enumerate(zip(said, wanted, strict=True)) if one != other)
    logits = last_logits(exact, job.prompt + list(wanted[:place]))  # [ids]
    behind = max((logits.max() - logits[token]).item() for token in (said[place], wanted[place]))
    share = behind / (logits.max() - logits.min()).item()
    if share > ROUNDING:
        raise AssertionError(
            f"{who} token {said[place]} as output {place} instead of {wanted[place]}; in float64 one of them is "
            f"{share:.1e} of the logits' spread below the likeliest, more than rounding in float32 ({ROUNDING:.0e})"
        )


@torch.inference_mode()
def last_logits(model: Decoder, token_ids: list[int]) -> torch.Tensor:
    """Logits [ids] after the last token, in one pass."""
    hidden = model(as_tensor(token_ids, model), positions(0, len(token_ids), model), CausalAttention(model.config))
    return model.logits(hidden[-1:])[0]
