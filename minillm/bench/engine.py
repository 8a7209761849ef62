"""The paged engine beside transformers: the same weights, the same requests, greedy, float32, one thread, real runs.

    minillm bench engine --json engine.json
    minillm bench engine --scheduler

The contenders take turns, so that what disturbs the machine disturbs all; ratios are taken within a turn, and their
median counts. They must give the same tokens.
"""

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from minillm.bench import scheduler_cost
from minillm.bench.contenders import (
    BLOCK_SIZE,
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
from minillm.bench.measuring import TIMERS, surroundings
from minillm.errors import check_options
from minillm.ladder import CausalAttention, as_tensor, positions
from minillm.model import Decoder, load_model, read_config
from minillm.storyteller import CHECKPOINT_DIR
from minillm.trace import StepEvent

ROUNDING = 5e-5  # of the spread of the logits: ten times the largest error measured in float32 on these shapes
PEERS = ("static16", "transformers_cb")


@dataclass(frozen=True)
class Shape:
    """A model and the workload to serve it; the limits of a step are each contender's best of those tried."""

    label: str
    num_requests: int
    checkpoint: Callable[[Path], Path]  # given an empty folder to write to, where the checkpoint is
    max_num_seqs: int
    max_num_batched_tokens: int
    peer_max_requests: int
    peer_max_batch_tokens: int


SHAPES = {
    "storyteller": Shape("storyteller", 64, lambda _: CHECKPOINT_DIR, 64, 512, 16, 64),
    "135m": Shape("135M shape", 16, lambda folder: write_random_checkpoint(SHAPE_135M, folder), 64, 512, 16, 256),
}


class Run(NamedTuple):
    """One real run of a contender."""

    seconds: dict[str, float]  # on each timer
    outputs: list[tuple[int, ...]]


class Turn(NamedTuple):
    """Every contender once."""

    runs: dict[str, Run]
    floor: dict[str, float]  # seconds of the matrix products alone, on each timer


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if arguments.scheduler:
        result = scheduler_cost.measure(arguments.repeats, arguments.timer)
        print(scheduler_cost.table(result))
        write(arguments.json, {"scheduler": result} | surroundings())
        return 0
    shapes = {}
    for name in SHAPES if arguments.shape == "all" else [arguments.shape]:
        shapes[name] = measure_shape(SHAPES[name], arguments)
        print(table(SHAPES[name].label, shapes[name]))
    write(arguments.json, {"shapes": shapes, "transformers": transformers.__version__} | surroundings())
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="minillm bench engine", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="all", choices=[*SHAPES, "all"])
    parser.add_argument("--peers", default="all", choices=["all", "none"], help="none: ours alone")
    parser.add_argument("--requests", type=int, help="instead of the shape's own number")
    parser.add_argument("--repeats", type=int, default=5, help="turns; the median counts")
    parser.add_argument("--timer", default="wall", choices=list(TIMERS), help="cpu: undisturbed by other programs")
    parser.add_argument("--scheduler", action="store_true", help="what a step costs besides the model, alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    check_options(arguments, at_least_one=("requests", "repeats"), files=("json",))
    return arguments


def write(file: Path | None, content: dict) -> None:
    if file is not None:
        file.write_text(json.dumps(content, indent=2) + "\n")


# --- runs ------------------------------------------------------------------------------------------------------------


def measure_shape(shape: Shape, arguments: argparse.Namespace) -> dict:
    """The record of one shape, for JSON. Raises AssertionError if the contenders do not give the same tokens."""
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        folder = shape.checkpoint(Path(made))
        jobs = make_jobs(arguments.requests or shape.num_requests, read_config(folder).vocab_size)
        contenders = {
            name: stack.enter_context(closing(contender))
            for name, contender in make_contenders(shape, folder, jobs, arguments.peers == "all").items()
        }
        floor = GemmFloor(contenders["ours"].model)
        warm_up(contenders, jobs)
        turns = []
        for number in range(arguments.repeats):
            turns.append(take_turn(contenders, floor, jobs, number))
            print(turn_line(shape.label, number, turns[-1], arguments.timer), flush=True)
        rounded = check_same_outputs(folder, jobs, [turn.runs for turn in turns])
        settings = {name: contender.settings for name, contender in contenders.items()}
        return summary(jobs, turns, contenders["ours"].steps, settings, rounded, arguments.timer)


def make_contenders(shape: Shape, folder: Path, jobs: Sequence[Job], with_peers: bool) -> dict[str, Contender]:
    """Ours and, if wanted, transformers' two, all with the checkpoint in `folder`."""
    arguments = our_arguments(jobs, shape.max_num_seqs, shape.max_num_batched_tokens)
    contenders = {"ours": Ours(folder, arguments)}
    if with_peers:
        model = load_peer(folder)
        continuous = ContinuousBatches(model, jobs, shape.peer_max_requests, shape.peer_max_batch_tokens)
        contenders |= {"static16": StaticBatches(model), "transformers_cb": continuous}
    return contenders


def warm_up(contenders: dict[str, Contender], jobs: Sequence[Job]) -> None:
    """Let everybody have run once before it counts, on the beginning of the workload."""
    for contender in contenders.values():
        contender.generate([Job(job.prompt, 4) for job in jobs[:4]])


def take_turn(contenders: dict[str, Contender], floor: GemmFloor, jobs: Sequence[Job], number: int) -> Turn:
    """Every contender once, each turn beginning with another one; the floor right after ours, which it repeats."""
    gc.collect()  # so that nobody pays for what another turn left behind
    names = list(contenders)
    first = number % len(names)
    runs = {}
    for name in names[first:] + names[:first]:
        seconds, outputs = timed(lambda name=name: contenders[name].generate(jobs))
        runs[name] = Run(seconds, outputs)
        if name == "ours":
            products = products_of(contenders[name].steps)
            floor_seconds, _ = timed(lambda products=products: floor.run(products))
    return Turn(runs, floor_seconds)


def timed(work: Callable[[], object]) -> tuple[dict[str, float], object]:
    """Seconds on each timer, and what `work` returned."""
    began = {name: read() for name, read in TIMERS.items()}
    result = work()
    return {name: read() - began[name] for name, read in TIMERS.items()}, result


# --- the same tokens -------------------------------------------------------------------------------------------------


def check_same_outputs(folder: Path, jobs: Sequence[Job], turns: Sequence[dict[str, Run]]) -> list[int]:
    """The numbers of the requests that float32 gave other tokens: at a tie, which is shown in float64.

    Sums over another number of rows are rounded in another order, so where two tokens are equal but for rounding, two
    right engines may say different ones. Raises AssertionError for any other difference.
    """
    expected = turns[0].get("static16", turns[0]["ours"]).outputs
    exact, rounded = None, set()
    for name, run in (item for runs in turns for item in runs.items()):
        for number, (job, said, wanted) in enumerate(zip(jobs, run.outputs, expected, strict=True)):
            if len(said) != job.num_outputs:
                raise AssertionError(f"{name} gave request {number} {len(said)} tokens instead of {job.num_outputs}")
            if said != wanted:
                exact = exact or load_model(folder, torch.float64, skip_tokenizer_init=True).model
                check_tie(exact, job, said, wanted, f"{name} gave request {number}")
                rounded.add(number)
    return sorted(rounded)


def check_tie(exact: Decoder, job: Job, said: tuple[int, ...], wanted: tuple[int, ...], who: str) -> None:
    """Where two outputs part, both tokens are the likeliest but for rounding. `exact` is the model in float64."""
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
    """[ids] logits after the last of the tokens, in one pass."""
    hidden = model(as_tensor(token_ids, model), positions(0, len(token_ids), model), CausalAttention(model.config))
    return model.logits(hidden[-1:])[0]


# --- results ---------------------------------------------------------------------------------------------------------


def summary(
    jobs: Sequence[Job],
    turns: Sequence[Turn],
    steps: Sequence[StepEvent],
    settings: dict,
    rounded: list[int],
    timer: str,
) -> dict:
    """The record: a dictionary for JSON. `steps` are those of one run of ours, `rounded` the requests at a tie."""
    seconds = {name: [turn.runs[name].seconds for turn in turns] for name in settings}
    seconds["gemm_floor"] = [turn.floor for turn in turns]
    read = {name: [run[timer] for run in runs] for name, runs in seconds.items()}
    ratios = {f"ratio_{name}": ratio(read[name], read["ours"]) for name in PEERS if name in read}
    return ratios | {
        "gemm_floor_share": ratio(read["gemm_floor"], read["ours"])["median"],
        "cache_waste": cache_waste(steps),
        "requests": len(jobs),
        "prompt_tokens": sum(len(job.prompt) for job in jobs),
        "output_tokens": sum(job.num_outputs for job in jobs),
        "steps": len(steps),
        "identical_outputs": not rounded if ratios else None,  # None: there was nobody to compare with
        "different_by_rounding": rounded,  # ties in float64
        "timer": timer,  # of the ratios
        "seconds": seconds,
        "settings": settings,
    }


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict:
    """How many times the time of `faster`, turn by turn; the median of those."""
    repeats = [slow / fast for slow, fast in zip(slower, faster, strict=True)]
    return {"median": statistics.median(repeats), "repeats": repeats}


def cache_waste(steps: Sequence[StepEvent]) -> dict[str, float]:
    """Slots that are handed out and hold no token, as shares of those in handed-out blocks and of the whole pool.

    Means over the steps after which any block is handed out. Only without prefix sharing, which lets one slot hold a
    token of several requests.
    """
    filled = [step for step in steps if step.blocks.used]
    empty = [step.blocks.used - step.cached_tokens / BLOCK_SIZE for step in filled]  # in blocks
    return {
        "of_blocks": statistics.mean(e / step.blocks.used for e, step in zip(empty, filled, strict=True)),
        "of_pool": statistics.mean(e / step.blocks.total for e, step in zip(empty, filled, strict=True)),
    }


def turn_line(label: str, number: int, turn: Turn, timer: str) -> str:
    """What a turn took, printed as soon as it is over."""
    seconds = {name: run.seconds[timer] for name, run in turn.runs.items()} | {"gemm_floor": turn.floor[timer]}
    return f"{label}, turn {number + 1}: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())


def table(label: str, result: dict) -> str:
    """The record for people."""
    ours = result["settings"]["ours"]
    lines = [
        f"{label}: {result['requests']} requests, {result['prompt_tokens']} prompt and {result['output_tokens']} "
        f"output tokens; ours took {result['steps']} steps of at most {ours['max_num_seqs']} requests and "
        f"{ours['max_num_batched_tokens']} tokens",
        f"{'':18}{'output tokens/s':>16}{'seconds':>9}{'of CPU':>9}",
    ]
    for name, runs in result["seconds"].items():
        wall, cpu = (statistics.median(each[timer] for each in runs) for timer in ("wall", "cpu"))
        speed = result["output_tokens"] / {"wall": wall, "cpu": cpu}[result["timer"]]
        lines.append(f"{name:18}{speed:>16.0f}{wall:>9.2f}{cpu:>9.2f}")
    for name in PEERS:
        if f"ratio_{name}" in result:
            times = result[f"ratio_{name}"]
            repeats = ", ".join(f"{value:.2f}" for value in times["repeats"])
            lines.append(f"{name} takes {times['median']:.2f} times as long as ours (median of {repeats})")
    lines.append(f"share of the GEMM floor reached: {result['gemm_floor_share']:.1%}")
    waste = result["cache_waste"]
    lines.append(
        f"cache slots handed out that hold no token: {waste['of_blocks']:.1%} of those handed out, "
        f"{waste['of_pool']:.1%} of the pool"
    )
    if result["identical_outputs"] is not None:
        lines.append(f"outputs: {same_outputs(result['different_by_rounding'])}")
    return "\n".join(lines)


def same_outputs(rounded: Sequence[int]) -> str:
    if not rounded:
        return "identical in every token"
    return (
        f"identical but for float64 ties that float32 rounded differently, in requests {', '.join(map(str, rounded))}"
    )
