"""The whole ladder in one run: from one token at a time to a paged engine in two processes, beside transformers.

    minillm bench ladder --shape storyteller --repeats 5 --simulate --json ladder.json --svg ladder.svg
    minillm bench ladder --show ladder.json

All rungs have the same weights and requests, and their tokens are compared. They take turns; factors are taken within a
turn, and their median is reported. Memory is part of the claim: every rung that batches has the same bytes of cache, by
default a quarter of what all requests need together. If every row reserves the longest request, only a few rows fit; as
blocks, the same bytes hold many requests. Prefix sharing is a pair of rungs whose requests share a prefix.
"""

import argparse
import gc
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from minillm.bench import ladder_predicted, ladder_report, recorded
from minillm.bench.contenders import Job, load_peer, make_jobs
from minillm.bench.engine import SHAPES as MODELS
from minillm.bench.engine import check_same_outputs, turn_order, write
from minillm.bench.ladder_rungs import (
    Alone,
    Budget,
    Paged,
    Rows,
    Rung,
    RungRun,
    TransformersBatches,
    TransformersContinuous,
)
from minillm.bench.measuring import surroundings
from minillm.bench.peer_process import TIMERS
from minillm.errors import MOST, ConfigError, ModelNotFoundError, check_options, check_whole
from minillm.ladder import generate_cached, generate_naive
from minillm.model import load_decoder, read_config
from minillm.simulation import COURSE_SEED

SCHEMA = 1
PREFIX_TOKENS = 128  # of the prefix that the requests of two rungs share, like a system prompt
WARM_UP_JOBS, WARM_UP_OUTPUTS = 4, 8
CALIBRATION_SEED = 1000  # and up: requests for fitting prices, never those that are served
DTYPE = torch.float32


@dataclass(frozen=True)
class Shape:
    """How many requests each rung serves; a slow rung serves only the first few, which the record says."""

    num_requests: int
    naive: int
    alone: int  # by the rung with a cache, one at a time
    calibration: int  # by the engine, for fitting prices; the other rungs serve a quarter of them


SHAPES = {
    "storyteller": Shape(64, 16, 64, 64),
    "smollm2": Shape(48, 3, 12, 24),
    "135m": Shape(48, 3, 12, 24),  # of random weights
}


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if arguments.show:
        show(recorded.load(arguments.show), arguments.svg)
        return 0
    record = {"schema": SCHEMA, "kind": "ladder"} | surroundings()
    record |= {"transformers": transformers.__version__, "parts": {}}
    for name in ("storyteller", "smollm2") if arguments.shape == "all" else [arguments.shape]:
        try:
            record["parts"][name] = measure_shape(name, arguments)
        except ModelNotFoundError as missing:
            if arguments.shape != "all":
                raise
            print(f"{name} is left out: {missing}")
    show(record, arguments.svg)
    write(arguments.json, record)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="minillm bench ladder", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="all", choices=[*SHAPES, "all"], help="all: storyteller and smollm2")
    parser.add_argument("--peers", default="all", choices=["all", "none"], help="none: without transformers")
    parser.add_argument("--requests", type=int, help="instead of the shape's own number")
    parser.add_argument("--budget", type=int, metavar="BYTES", help="of cache; by default a quarter of what all need")
    parser.add_argument("--repeats", type=int, default=5, help="turns; the median counts")
    parser.add_argument("--timer", default="wall", choices=list(TIMERS), help="of speeds and factors")
    parser.add_argument("--simulate", action="store_true", help="predict the same ladder with prices of this machine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the factors; with several shapes, of the first")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a run that --json wrote, and measure nothing")
    arguments = parser.parse_args(argv)
    check_options(arguments, at_least_one=("requests", "repeats"), files=("json", "svg"))
    if arguments.budget is not None:
        check_whole("--budget", arguments.budget, 1, MOST)
    return arguments


def show(record: dict, svg: Path | None) -> None:
    """Print a record, and draw its first shape if asked. Raises ConfigError for a record of a different kind."""
    if record["kind"] != "ladder":
        raise ConfigError(f"this is a record of the kind {record['kind']!r}; --show prints what bench ladder wrote")
    print(f"{record['machine']}; {record['date']}; torch {record['torch']}, transformers {record['transformers']}")
    for number, part in enumerate(record["parts"].values()):
        picture = ladder_report.waterfall(part)
        print(f"\n{ladder_report.table(part)}\n\n{picture.text()}")
        if part["predicted"]:
            print(f"\n{ladder_report.prediction_table(part['predicted'])}")
        if svg and number == 0:
            picture.save(svg)


# --- runs ------------------------------------------------------------------------------------------------------------


def measure_shape(name: str, arguments: argparse.Namespace) -> dict:
    """The record of one shape, for JSON. Raises AssertionError if the rungs do not give the same tokens."""
    shape, model = SHAPES[name], MODELS[name]
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        folder = model.checkpoint(Path(made))
        config = read_config(folder)
        jobs = make_jobs(arguments.requests or shape.num_requests, config.vocab_size)
        budget = Budget.of(jobs, config, DTYPE.itemsize, arguments.budget)
        rungs = {}
        for rung in make_rungs(name, folder, jobs, budget, arguments):
            rungs[rung.name] = stack.enter_context(closing(rung))
        for rung in rungs.values():
            warm_up(rung)
        prices, turns = ladder_predicted.Prices(arguments.timer), []
        for number in range(arguments.repeats):
            turns.append(take_turn(rungs, number))
            print(turn_line(model.label, number, turns[-1], arguments.timer), flush=True)
            if arguments.simulate:
                prices.calibrate(rungs, make_jobs(shape.calibration, config.vocab_size, CALIBRATION_SEED + number))
        rounded = compare_outputs(folder, rungs, turns)
        predicted = ladder_predicted.compare(rungs, turns, prices) if arguments.simulate else None
        needed = sum(job.num_tokens for job in jobs) * budget.bytes_per_token
        sizes = {"rows": budget.rows, "num_blocks": budget.num_blocks, "share": budget.num_bytes / needed}
        return {
            "label": model.label,
            "requests": len(jobs),
            "prompt_tokens": sum(len(job.prompt) for job in jobs),
            "output_tokens": sum(job.num_outputs for job in jobs),
            "dtype": str(DTYPE).removeprefix("torch."),
            "timer": arguments.timer,
            "repeats": arguments.repeats,
            "budget": asdict(budget) | sizes,
            "rungs": ladder_report.summary(rungs, turns, arguments.timer),
            "different_by_rounding": rounded,
            "predicted": predicted,
        }


def make_rungs(
    name: str, folder: Path, jobs: Sequence[Job], budget: Budget, arguments: argparse.Namespace
) -> Iterator[Rung]:
    """Yields all rungs in the table's order, one after the other, so that the caller can close earlier ones."""
    shape, limits = SHAPES[name], MODELS[name]
    model = load_decoder(
        folder, read_config(folder), DTYPE, "cpu", pack=True
    )  # the engine's own products, on all rungs
    paged = {"max_num_seqs": limits.max_num_seqs, "max_num_batched_tokens": limits.max_num_batched_tokens}
    naive, alone, tokens = jobs[: shape.naive], jobs[: shape.alone], limits.max_num_batched_tokens
    yield Alone(generate_naive, model, naive, budget, keeps=False).placed("naive", "naive", None)
    yield Alone(generate_cached, model, alone, budget, keeps=True).placed("cache", "cache", "naive")
    for before, batching, label in (
        ("cache", "static", "static batches"),
        ("static", "dynamic", "dynamic batches"),
        ("dynamic", "continuous", "continuous, rows"),
    ):
        yield Rows(batching, model, jobs, budget, tokens).placed(batching, label, before)
    reference = Paged(model, jobs, budget, paged, attention_backend="reference")
    yield reference.placed("paged", "paged, in torch", "continuous")
    yield Paged(model, jobs, budget, paged).placed("kernels", "paged, in C++", "paged")
    apart = Paged(folder, jobs, budget, paged, worker="process")  # which loads in float32, like all
    yield apart.placed("processes", "two processes", "kernels")
    begun = with_prefix(jobs, model.config.vocab_size)
    room = Budget.of(begun, model.config, DTYPE.itemsize, arguments.budget)
    yield Paged(model, begun, room, paged).placed("unshared", "with a prefix", None, is_aside=True)
    sharing = Paged(model, begun, room, paged, enable_prefix_caching=True)
    yield sharing.placed("shared", "prefix shared", "unshared", is_aside=True)
    if arguments.peers == "all":
        yield from transformers_rungs(folder, jobs, naive, alone, budget, limits)


def transformers_rungs(folder: Path, jobs, naive, alone, budget: Budget, limits) -> Iterator[Rung]:
    """The rungs of transformers."""
    peer = load_peer(folder)
    without = TransformersBatches(peer, naive, budget, 1, use_cache=False)
    yield without.placed("transformers_naive", "HF no cache", None)
    cached = TransformersBatches(peer, alone, budget, 1)
    yield cached.placed("transformers_cache", "HF cache", "transformers_naive")
    static = TransformersBatches(peer, jobs, budget, budget.rows)
    yield static.placed("transformers_static", "HF static", "transformers_cache")
    manager = TransformersContinuous(peer, jobs, budget, limits.peer_max_requests, limits.peer_max_batch_tokens)
    yield manager.placed("transformers_cb", "HF continuous", "transformers_static")


def with_prefix(jobs: Sequence[Job], vocab_size: int) -> list[Job]:
    """The same requests with a common prefix."""
    rng = random.Random(COURSE_SEED)
    prefix = [rng.randrange(vocab_size) for _ in range(PREFIX_TOKENS)]
    return [Job(prefix + job.prompt, job.num_outputs) for job in jobs]


def warm_up(rung: Rung) -> None:
    """Run a rung before measuring: the first few requests, a few tokens of each."""
    every = rung.jobs
    rung.jobs = [Job(job.prompt, min(job.num_outputs, WARM_UP_OUTPUTS)) for job in every[:WARM_UP_JOBS]]
    try:
        rung.run()
    finally:
        rung.jobs = every


def take_turn(rungs: Mapping[str, Rung], number: int) -> dict[str, RungRun]:
    """Run every rung once, in the order of `turn_order`; prints progress on stderr."""
    gc.collect()  # so that no rung collects the garbage of another turn
    runs = {}
    for name in turn_order(list(rungs), number):
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        runs[name] = rungs[name].run()._replace(load=load)
        print(f"turn {number + 1}, {name}: {runs[name].seconds['wall']:.1f} s", file=sys.stderr, flush=True)
    return runs


def turn_line(label: str, number: int, turn: Mapping[str, RungRun], timer: str) -> str:
    """The times of a turn, printed when it is over."""
    seconds = ", ".join(f"{name} {run.seconds[timer]:.2f}" for name, run in turn.items())
    loads = [run.load for run in turn.values() if run.load is not None]
    return f"{label}, turn {number + 1}, seconds: {seconds}" + (
        f"; load {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    )


def compare_outputs(folder: Path, rungs: Mapping[str, Rung], turns: Sequence[Mapping[str, RungRun]]) -> list[int]:
    """The requests that got different tokens in float32, at a tie. Raises AssertionError for any other difference.

    Rungs that serve the same requests are compared with each other; a rung that serves the first few, with all that
    serve them.
    """
    rounded = set()
    for is_aside in (False, True):
        names = [name for name, rung in rungs.items() if rung.is_aside == is_aside]
        for number in {len(rungs[name].jobs) for name in names}:
            compared = [name for name in names if len(rungs[name].jobs) >= number]
            jobs = rungs[compared[0]].jobs[:number]
            cut = [{name: run[name]._replace(outputs=run[name].outputs[:number]) for name in compared} for run in turns]
            rounded.update(check_same_outputs(folder, jobs, cut, reference=compared[-1]))
    return sorted(rounded)
