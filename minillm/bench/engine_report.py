"""The results of `minillm bench engine`: as a dictionary for JSON, and as text."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from minillm.bench.contenders import BLOCK_SIZE, Job
from minillm.bench.peer_process import TIMERS
from minillm.trace import StepEvent


class Run(NamedTuple):
    """One real run of a contender."""

    seconds: dict[str, float]  # on each timer
    outputs: list[tuple[int, ...]]
    load: float | None = None  # of the machine, in the minute before; None if unknown


class Turn(NamedTuple):
    """One run of every contender."""

    runs: dict[str, Run]
    floor: dict[str, float]  # seconds of only the matrix products, on each timer


def summary(
    jobs: Sequence[Job],
    turns: Sequence[Turn],
    steps: Sequence[StepEvent],
    settings: dict,
    outputs: dict,
    dtype: str,
    timer: str,
) -> dict:
    """The record, a dictionary for JSON. `steps`: of one run of ours; `outputs`: the result of `compare_outputs`."""
    seconds = {name: [turn.runs[name].seconds for turn in turns] for name in settings}
    seconds["gemm_floor"] = [turn.floor for turn in turns]

    def times_ours(name: str, timer: str) -> dict:
        return ratio(*([run[timer] for run in seconds[who]] for who in (name, "ours")))

    peers = [name for name in settings if name != "ours"]
    return (
        {f"ratio_{name}": times_ours(name, timer) for name in peers}
        | {
            "ratios_of_user_time": {name: times_ours(name, "user") for name in peers},
            "gemm_floor_share": times_ours("gemm_floor", timer)["median"],
            "cache_waste": cache_waste(steps),
            "requests": len(jobs),
            "prompt_tokens": sum(len(job.prompt) for job in jobs),
            "output_tokens": sum(job.num_outputs for job in jobs),
            "steps": len(steps),
            "dtype": dtype,
            "timer": timer,  # of the ratios
            "seconds": seconds,
            "load": {name: [turn.runs[name].load for turn in turns] for name in settings},  # as each run began
            "settings": settings,
        }
        | outputs
    )


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict:
    """The time relative to that of `faster`, per turn, and the median."""
    repeats = [slow / fast for slow, fast in zip(slower, faster, strict=True)]
    return {"median": statistics.median(repeats), "repeats": repeats}


def cache_waste(steps: Sequence[StepEvent]) -> dict[str, float]:
    """Slots of used blocks that hold no token, as shares of the slots in used blocks and of the whole pool.

    Means over the steps after which any block is used. Only without prefix sharing, with which one slot can hold a
    token of several requests.
    """
    filled = [step for step in steps if step.blocks.used]
    empty = [step.blocks.used - step.cached_tokens / BLOCK_SIZE for step in filled]  # in blocks
    return {
        "of_blocks": statistics.mean(e / step.blocks.used for e, step in zip(empty, filled, strict=True)),
        "of_pool": statistics.mean(e / step.blocks.total for e, step in zip(empty, filled, strict=True)),
    }


def turn_line(label: str, number: int, turn: Turn, timer: str) -> str:
    """The times of a turn, printed when it is over."""
    seconds = {name: run.seconds[timer] for name, run in turn.runs.items()} | {"gemm_floor": turn.floor[timer]}
    loads = [run.load for run in turn.runs.values() if run.load is not None]
    load = f"; load {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    return f"{label}, turn {number + 1}: " + ", ".join(f"{name} {each:.2f} s" for name, each in seconds.items()) + load


def table(label: str, result: dict) -> str:
    """The record as text."""
    ours = result["settings"]["ours"]
    lines = [
        f"{label} in {result['dtype']}: {result['requests']} requests, {result['prompt_tokens']} prompt and "
        f"{result['output_tokens']} output tokens; ours took {result['steps']} steps of at most "
        f"{ours['max_num_seqs']} requests and {ours['max_num_batched_tokens']} tokens",
        f"{'':18}{'output tokens/s':>16}{'seconds':>9}{'of CPU':>9}{'of it user':>12}",
    ]
    for name, runs in result["seconds"].items():
        times = {timer: statistics.median(each[timer] for each in runs) for timer in TIMERS}
        speed = result["output_tokens"] / times[result["timer"]]
        lines.append(f"{name:18}{speed:>16.0f}{times['wall']:>9.2f}{times['cpu']:>9.2f}{times['user']:>12.2f}")
    for name, user in result["ratios_of_user_time"].items():
        times = result[f"ratio_{name}"]
        repeats = ", ".join(f"{value:.2f}" for value in times["repeats"])
        lines.append(
            f"{name} takes {times['median']:.2f} times as long as ours (median of {repeats}), "
            f"and {user['median']:.2f} times the user CPU time"
        )
    lines.append(f"share of the GEMM floor reached: {result['gemm_floor_share']:.1%}")
    waste = result["cache_waste"]
    lines.append(
        f"cache slots handed out that hold no token: {waste['of_blocks']:.1%} of those handed out, "
        f"{waste['of_pool']:.1%} of the pool"
    )
    if result.get("identical_outputs") is not None:
        lines.append(f"outputs: {same_outputs(result['different_by_rounding'])}")
    for name, number in result.get("different_from_ours", {}).items():
        lines.append(f"outputs of {name} that differ from those of our first turn: {number} of {result['requests']}")
    return "\n".join(lines)


def same_outputs(rounded: Sequence[int]) -> str:
    if not rounded:
        return "identical in every token"
    return (
        f"identical but for float64 ties that float32 rounded differently, in requests {', '.join(map(str, rounded))}"
    )
