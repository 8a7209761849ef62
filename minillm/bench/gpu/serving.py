"""The serving parts: W1, W2, W3 and the ablation. Whole workloads through our engine and through others.

A speed is output tokens per second of the whole run, including the time for prompts. Our speed is compared with what
the measured ceilings allow: for the workload if all requests ran at once from the first step
(`costs.workload_seconds`), and for the actual steps (`costs.trace_seconds`).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import transformers

from minillm import costs
from minillm.bench.contenders import Contender, Job, Ours, our_arguments
from minillm.bench.gpu import peers
from minillm.bench.gpu.models import random_decoder
from minillm.bench.gpu.session import SPEED, Session
from minillm.bench.gpu.workloads import TEMPERATURE, totals, w1_jobs, w2_jobs, w3_jobs
from minillm.model import ModelConfig
from minillm.trace import StepEvent

WARM_UP_TOKENS = 4
WARM_UP_REQUESTS = 64
CUTS = (8, 4, 2)  # if time is short, a peer's outputs are this many times shorter; the first is a pilot run
OURS = "minillm"
SHARE_OF_OURS = 0.5  # our largest share of a comparison's time; the rest is for the others
FIRST_VARIANT = "all on"
CUT_SPEEDS = "output_tokens_per_second_with_cut_outputs"  # total output tokens -> speed


# --- the parts -------------------------------------------------------------------------------------------------------


class Other(NamedTuple):
    """A peer that has not been started yet."""

    make: Callable[[], Contender]
    batch_size: int | None = None  # for static batches, each as long as its longest output


def w1(session: Session) -> None:
    """nano-vllm's workload on two shapes: ours, transformers' static batches and continuous batching, outside peers."""
    part = session.part("w1")
    jobs = w1_jobs(session.scale)
    part["workload"] = described(jobs)
    shapes = session.scale.w1_shapes
    for number, (name, shape) in enumerate(shapes.items()):
        with session.share_of_time(1 / (len(shapes) - number)):
            compare(session, part.setdefault(name, {}), shape, jobs, w1_others(session, shape, jobs))


def w1_others(session: Session, shape: ModelConfig, jobs: Sequence[Job]) -> dict[str, Other]:
    """The other engines in W1. Peers from the command line come first: they are the main comparison."""
    scale = session.scale
    large, *small = (static(session, shape, jobs, size) for size in scale.static_batches)
    make = partial(peers.continuous_peer, shape, jobs, scale)
    continuous = {"transformers continuous batching": Other(make)}
    others = outside(session, shape, jobs) | large | continuous
    for each in small:
        others |= each
    return others


def w2(session: Session) -> None:
    """One request on the large shape: how near decode comes to reading the weights once per token."""
    part = session.part("w2")
    name, shape = session.scale.large_shape
    jobs = w2_jobs(session.scale)
    part["workload"] = described(jobs)
    part["tokens_per_second_of_reading_weights"] = 1 / costs.step_seconds(
        shape, session.card, 1, 1, dtype_bytes=session.scale.dtype.itemsize
    )
    others = outside(session, shape, jobs) | static(session, shape, jobs, 1)
    compare(session, part.setdefault(name, {}), shape, jobs, others)


def w3(session: Session) -> None:
    """Anyscale's workload on the large shape: continuous batching against static batches as large as fit."""
    part = session.part("w3")
    name, shape = session.scale.large_shape
    jobs = w3_jobs(session.scale)
    part["workload"] = described(jobs)
    size = part.setdefault("static_batch", peers.largest_static_batch(shape, jobs, session.scale))
    others = static(session, shape, jobs, size)
    compare(session, part.setdefault(name, {}), shape, jobs, others)


def ablation(session: Session) -> None:
    """W1 on its first shape with one thing changed at a time."""
    part = session.part("ablation")
    jobs = w1_jobs(session.scale)
    part["workload"] = described(jobs)
    (name, shape), *_ = session.scale.w1_shapes.items()
    entries = part.setdefault(name, {})
    variants = ablation_variants(session)
    for number, (label, changes) in enumerate(variants.items()):
        with session.share_of_time(1 / (len(variants) - number)):
            session.entry(entries, label, lambda changes=changes: run_ours(session, shape, jobs, changes))
    for label in variants:
        if SPEED in entries[label] and SPEED in entries[FIRST_VARIANT]:
            entries[label]["speed_of_all_on"] = entries[label][SPEED] / entries[FIRST_VARIANT][SPEED]
    session.save()


def ablation_variants(session: Session) -> dict[str, dict]:
    """Label -> engine arguments that differ from the first variant's."""
    backends = {f"backend {name}": {"attention_backend": name} for name in ("cuda", "triton")}
    backends["backend flash, blocks of 256"] = {"attention_backend": "flash", "block_size": 256}
    blocks = {f"blocks of {size}": {"block_size": size} for size in session.scale.ablation_blocks}
    return {
        FIRST_VARIANT: {},
        "no CUDA graphs": {"enforce_eager": True},
        "no overlap": {"async_scheduling": False},
        "no fused operations": {"fused_ops": False},
        **backends,
        **blocks,
    }


# --- ours ------------------------------------------------------------------------------------------------------------


def compare(
    session: Session,
    entries: dict,
    shape: ModelConfig,
    jobs: Sequence[Job],
    others: dict[str, Other],
) -> None:
    """Our engine and then every peer; each entry has the ratio to ours for the same requests and output lengths.

    Exception: a peer with static batches may run only some of them, which then represent all.
    """
    cuts = CUTS if any(runs_at_once(jobs, other.batch_size) for other in others.values()) else ()
    with session.share_of_time(SHARE_OF_OURS):
        own = session.entry(entries, OURS, lambda: run_ours(session, shape, jobs, {}, cuts))
    for number, (name, other) in enumerate(others.items()):
        with session.share_of_time(1 / (len(others) - number)):
            record = session.entry(entries, name, lambda other=other: run_peer(session, other, jobs))
        if SPEED in record and SPEED in own:
            speed = own[CUT_SPEEDS].get(str(record["output_tokens"]), own[SPEED])
            record["minillm_is_faster_by"] = speed / record[SPEED]
    session.save()


def run_ours(
    session: Session, shape: ModelConfig, jobs: Sequence[Job], changes: dict, cuts: Sequence[int] = ()
) -> dict:
    """Our engine, the requested number of times; fewer if time is short, but at least once.

    Before that, once with outputs cut by each of `cuts`, for peers that have no time for the whole workload.
    """
    arguments = engine_arguments(session, jobs) | changes
    model = random_decoder(shape, session.scale.dtype, session.scale.torch_device)
    with closing(Ours(model, arguments, TEMPERATURE)) as engine:
        engine.generate(falling_outputs(jobs))
        cut = [timed_runs(engine, shortened(jobs, divisor), 1, session) for divisor in cuts]
        record = timed_runs(engine, jobs, session.repeats, session)
        return (
            record
            | roofline(session, shape, jobs, engine.steps, statistics.median(record["seconds"]))
            | {
                CUT_SPEEDS: {str(each["output_tokens"]): each[SPEED] for each in cut},
                "steps": len(engine.steps),
                "preemptions": sum(len(step.preempted) for step in engine.steps),
                "step_on_device_share": step_on_device_share(engine.steps),
                "kernels": engine.kernels,
                "settings": engine.settings,
            }
        )


def falling_outputs(jobs: Sequence[Job]) -> list[Job]:
    """The warm-up of our engine: decode batches from WARM_UP_REQUESTS down, as kernels depend on the batch size."""
    numbered = enumerate(jobs[:WARM_UP_REQUESTS], start=WARM_UP_TOKENS)
    return [Job(job.prompt, min(number, job.num_outputs)) for number, job in numbered]


def roofline(
    session: Session, shape: ModelConfig, jobs: Sequence[Job], steps: Sequence[StepEvent], seconds: float
) -> dict:
    """The least time at the measured ceilings, beside the seconds of a run with these `steps`."""
    card, bytes_each = session.card, session.scale.dtype.itemsize
    lengths = [(len(job.prompt), job.num_outputs) for job in jobs]
    least = costs.workload_seconds(shape, card, lengths, bytes_each)
    return {
        "roofline_seconds": least,
        "roofline_seconds_of_its_steps": costs.trace_seconds(shape, card, steps, bytes_each),
        "roofline_share": least / seconds,
        "roofline_output_tokens_per_second": totals(jobs)[1] / least,
    }


def step_on_device_share(steps: Sequence[StepEvent]) -> float | None:
    """The share of a run's time in which a step was on the device; None if the engine does not record it.

    A step counts from the copy of its inputs to its last kernel. If it is launched kernel by kernel, this includes gaps
    in which the device waits for the next launch: events cannot separate them.
    """
    times = [step.device for step in steps]
    if None in times:
        return None
    return sum(end - begin for begin, end in times) / (times[-1][1] - times[0][0])


def engine_arguments(session: Session, jobs: Sequence[Job]) -> dict:
    """The largest useful pool, and the scale's step size; all else is the engine's default."""
    arguments = our_arguments(jobs, min(session.scale.max_num_seqs, len(jobs)), session.scale.max_num_batched_tokens)
    del arguments["num_blocks"]
    return arguments | {"gpu_memory_utilization": peers.GPU_MEMORY_UTILIZATION}


# --- peers -----------------------------------------------------------------------------------------------------------


def static(session: Session, shape: ModelConfig, jobs: Sequence[Job], batch_size: int) -> dict[str, Other]:
    """transformers' `generate`."""
    make = partial(peers.static_peer, shape, jobs, session.scale, batch_size)
    return {f"transformers generate, batches of {batch_size}": Other(make, batch_size)}


def outside(session: Session, shape: ModelConfig, jobs: Sequence[Job]) -> dict[str, Other]:
    """The peers named on the command line."""
    return {path: Other(partial(peers.outside_peer, path, shape, jobs, session.scale)) for path in session.peers}


def run_peer(session: Session, other: Other, jobs: Sequence[Job]) -> dict:
    """A peer on as much of the workload as there is time for; the record says how much.

    A pilot run predicts the time of the whole: for static batches it is the first batch, for others the whole workload
    with shortened outputs.
    """
    with closing(other.make()) as peer:
        warm_up(peer, jobs)
        pilot, *larger = subsets(jobs, other.batch_size)
        record = timed_runs(peer, pilot, 1, session)
        seconds_per_token = record["seconds"][0] / totals(pilot)[1]
        subset = affordable(larger, seconds_per_token, session.seconds_left)
        if subset is not None:
            record = timed_runs(peer, subset, session.repeats, session)
        return record | {
            "subset": name_of_subset(subset or pilot, jobs),
            "version": getattr(peer, "version", transformers.__version__),
            "settings": peer.settings,
        }


def subsets(jobs: Sequence[Job], batch_size: int | None) -> list[Sequence[Job]]:
    """Parts of the workload in growing order: first a pilot, last the whole workload.

    For static batches, parts are whole batches instead of shortened outputs.
    """
    if runs_at_once(jobs, batch_size):
        return [*(shortened(jobs, divisor) for divisor in CUTS), jobs]
    return [jobs[:end] for end in range(batch_size, len(jobs), batch_size)] + [jobs]


def runs_at_once(jobs: Sequence[Job], batch_size: int | None) -> bool:
    """Whether the peer gets all requests at once, not batch by batch."""
    return batch_size is None or batch_size >= len(jobs)


def affordable(parts: Sequence[Sequence[Job]], seconds_per_token: float, seconds: float) -> Sequence[Job] | None:
    """The largest part that should finish within `seconds`; None if there is none."""
    fitting = [part for part in parts if totals(part)[1] * seconds_per_token <= seconds]
    return fitting[-1] if fitting else None


def shortened(jobs: Sequence[Job], divisor: int) -> list[Job]:
    """The same prompts with shorter outputs."""
    return [Job(job.prompt, max(1, job.num_outputs // divisor)) for job in jobs]


def name_of_subset(subset: Sequence[Job], jobs: Sequence[Job]) -> str:
    """The part of the workload that was run, in words."""
    if len(subset) < len(jobs):
        return f"the first {len(subset)} of {len(jobs)} requests"
    share = totals(jobs)[1] / totals(subset)[1]
    return "all" if share == 1 else f"all {len(jobs)} requests, outputs cut to 1/{share:.1f} of their length"


# --- runs ------------------------------------------------------------------------------------------------------------


def warm_up(contender: Contender, jobs: Sequence[Job]) -> None:
    """Run it once before measuring: the first prompts, a few tokens."""
    contender.generate([Job(job.prompt, min(WARM_UP_TOKENS, job.num_outputs)) for job in jobs[:4]])


def timed_runs(contender: Contender, jobs: Sequence[Job], repeats: int, session: Session) -> dict:
    """Runs while there is time for one more, at least one. Raises AssertionError for wrong output lengths."""
    seconds = []
    while not seconds or (len(seconds) < repeats and max(seconds) < session.seconds_left):
        began = time.perf_counter()
        outputs = contender.generate(jobs)
        seconds.append(time.perf_counter() - began)
        check_lengths(outputs, jobs)
    prompt_tokens, output_tokens = totals(jobs)
    return {
        "seconds": seconds,
        "requests": len(jobs),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        SPEED: output_tokens / statistics.median(seconds),
    }


def check_lengths(outputs: Sequence[Sequence[int]], jobs: Sequence[Job]) -> None:
    """Raises AssertionError if an output has more or fewer tokens than the workload says."""
    if len(outputs) != len(jobs):
        raise AssertionError(f"{len(outputs)} outputs for {len(jobs)} requests")
    for number, (output, job) in enumerate(zip(outputs, jobs, strict=True)):
        if len(output) != job.num_outputs:
            raise AssertionError(f"request {number} got {len(output)} tokens instead of {job.num_outputs}")


def described(jobs: Sequence[Job]) -> dict:
    """A workload, for the record."""
    prompt_tokens, output_tokens = totals(jobs)
    return {
        "requests": len(jobs),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "longest_output": max(job.num_outputs for job in jobs),
        "temperature": TEMPERATURE,
        "eos": "ignored",
    }
