"""The results of `minillm bench ladder`: as a dictionary for JSON, as text, and as a waterfall."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from minillm.bench.contenders import BLOCK_SIZE
from minillm.bench.ladder_rungs import Rung, RungRun
from minillm.simulation import spread
from minillm.trace import Trace
from minillm.viz import Waterfall, text_table

KIB = 1024
PERCENTILES = ("p50", "p99")
YARDSTICK = "transformers_static"  # every speed is also compared with this one's
MAIN = "naive"  # the first rung of the waterfall
Turn = Mapping[str, RungRun]


def summary(rungs: Mapping[str, Rung], turns: Sequence[Turn], timer: str) -> dict:
    """The record of every rung, by name."""
    return {name: rung_record(name, rungs, turns, timer) for name, rung in rungs.items()}


def rung_record(name: str, rungs: Mapping[str, Rung], turns: Sequence[Turn], timer: str) -> dict:
    rung, runs = rungs[name], [turn[name] for turn in turns]
    one, budget = runs[0], rung.budget
    tokens = sum(job.num_outputs for job in rung.jobs)
    return {
        "label": rung.label,
        "before": rung.before,
        "requests": len(rung.jobs),
        "prompt_tokens": sum(len(job.prompt) for job in rung.jobs),
        "output_tokens": tokens,
        "output_tokens_per_second": statistics.median(tokens / run.seconds[timer] for run in runs),
        "over_before": factor(rung.before, name, rungs, turns, timer),
        "over_first": over_first(name, rungs, turns, timer),
        "over_" + YARDSTICK: factor(YARDSTICK, name, rungs, turns, timer) if not rung.is_aside else None,
        "computed_tokens": one.computed_tokens,
        "steps": one.steps,
        "cache": {"budget": budget.num_bytes, "set_aside": rung.set_aside} | cache_use(one.trace, rung),
        "ttft": latencies([times[:1] for times in run.token_times] for run in runs),
        "itl": latencies(
            [[b - a for a, b in zip(times, times[1:], strict=False)] for times in run.token_times] for run in runs
        ),
        "seconds": [run.seconds for run in runs],
        "load": [run.load for run in runs],
        "settings": dict(rung.settings),
    }


# --- factors ---------------------------------------------------------------------------------------------------------


def factor(before: str | None, name: str, rungs: Mapping[str, Rung], turns: Sequence[Turn], timer: str) -> dict | None:
    """A rung's useful tokens per second relative to those of `before`: per turn, and the median.

    If one of them served only the first few requests, and the other served one at a time, only those are compared.
    `same_requests` is False if that is impossible: then each side counts with its own requests.
    """
    if before is None or before not in rungs:
        return None
    counts = requests_compared(rungs[before], rungs[name])
    speeds = [
        [speed(rungs[each], turn[each].seconds_of_first(number)[timer], number) for turn in turns]
        for each, number in zip((before, name), counts, strict=True)
    ]
    repeats = [after / earlier for earlier, after in zip(*speeds, strict=True)]
    same = counts[0] == counts[1]
    return {"median": statistics.median(repeats), "repeats": repeats, "same_requests": same, "requests": counts[1]}


def requests_compared(one: Rung, other: Rung) -> tuple[int, int]:
    """How many requests of each rung count when both are compared."""
    least = min(len(one.jobs), len(other.jobs))
    if all(len(rung.jobs) == least or rung.is_alone for rung in (one, other)):
        return least, least
    return len(one.jobs), len(other.jobs)


def speed(rung: Rung, seconds: float, num_jobs: int) -> float:
    """Useful output tokens per second of the first `count` jobs."""
    return sum(job.num_outputs for job in rung.jobs[:num_jobs]) / seconds


def over_first(name: str, rungs: Mapping[str, Rung], turns: Sequence[Turn], timer: str) -> float | None:
    """The product of the factors up to this rung; None for a rung that is not on the way from the first."""
    product, here = 1.0, rungs[name]
    if here.is_aside:
        return None
    while here.before is not None:
        product *= factor(here.before, here.name, rungs, turns, timer)["median"]
        here = rungs[here.before]
    return product


# --- memory and latency ----------------------------------------------------------------------------------------------


def cache_use(trace: Trace | None, rung: Rung) -> dict:
    """Bytes reserved for running requests, bytes used by keys and values of their tokens, and the difference.

    Means over the steps after which anything is reserved. A request that has ended and waits for its batch still counts
    as running. None if unknown. With shared prefixes the used bytes are None, because a slot counts for several
    requests.
    """
    if trace is None:
        return {"reserved": None, "used": None, "wasted": None}
    per_token = rung.budget.bytes_per_token
    reserved, used = [], []
    for step in trace.steps:
        if step.blocks is not None:
            tokens = step.blocks.used * BLOCK_SIZE
        else:
            held = {part.request_id for part in step.scheduled}.difference(step.finished)
            tokens = sum(map(rung.reserves, held))
        if tokens:
            reserved.append(tokens * per_token)
            used.append(step.cached_tokens * per_token)
    if rung.shares:
        return {"reserved": peak_and_mean(reserved), "used": None, "wasted": None}
    wasted = [most - some for most, some in zip(reserved, used, strict=True)]
    return {"reserved": peak_and_mean(reserved), "used": peak_and_mean(used), "wasted": peak_and_mean(wasted)}


def peak_and_mean(values: Sequence[float]) -> dict[str, float]:
    return {"peak": max(values, default=0), "mean": statistics.mean(values) if values else 0}


def latencies(runs) -> dict[str, float | None]:
    """Percentiles in seconds: medians over the runs."""
    spreads = [spread(Counter(value for values in run for value in values)) for run in runs]
    if spreads[0].p50 is None:
        return dict.fromkeys(PERCENTILES)
    return {name: statistics.median(getattr(each, name) for each in spreads) for name in PERCENTILES}


# --- text ------------------------------------------------------------------------------------------------------------


def table(result: dict) -> str:
    """The record of one shape as text."""
    budget, rungs = result["budget"], result["rungs"]
    lines = [
        f"{result['label']}: {result['requests']} requests, {result['prompt_tokens']} prompt and "
        f"{result['output_tokens']} output tokens, greedy, {result['dtype']}; useful tokens per second of "
        f"{result['timer']} time, medians of {result['repeats']}",
        text_table(HEADER, [row(each) for each in rungs.values()]),
        "",
        f"cache for the rungs that batch: {budget['num_bytes']:,} bytes, {budget['share']:.0%} of what all requests "
        f"need together. That is {budget['rows']} rows of {budget['longest']} tokens, or {budget['num_blocks']} "
        f"blocks of {BLOCK_SIZE}",
        text_table(MEMORY_HEADER, [memory_row(each) for each in rungs.values()]),
        "",
        *notes(rungs),
        f"outputs: {outputs_text(result['different_by_rounding'])}",
    ]
    return "\n".join(lines)


HEADER = [
    "", "tokens/s", "over before", "over first", "over static HF", "computed", "steps", "TTFT p50", "p99", "ITL p50",
    "p99 (ms)",
]  # fmt: skip
MEMORY_HEADER = ["KiB, mean / peak", "set aside", "reserved", "used", "wasted", "of reserved"]


def row(record: dict) -> list[str]:
    """One line of the table."""
    before, yardstick = record["over_before"], record["over_" + YARDSTICK]
    latency = [*record["ttft"].values(), *record["itl"].values()]
    return [
        record["label"],
        f"{record['output_tokens_per_second']:.1f}",
        "-" if before is None else f"{before['median']:.2f}" + " *" * (not before["same_requests"]),
        "-" if record["over_first"] is None else f"{record['over_first']:.1f}",
        "-" if yardstick is None else f"{yardstick['median']:.2f}" + " *" * (not yardstick["same_requests"]),
        str(record["computed_tokens"]),
        str(record["steps"]),
        *("-" if value is None else f"{1000 * value:.1f}" for value in latency),
    ]


def memory_row(record: dict) -> list[str]:
    """One line of the table of memory."""
    cache = record["cache"]
    wasted, reserved = cache["wasted"], cache["reserved"]
    return [
        record["label"],
        f"{cache['set_aside'] / KIB:.0f}",
        *map(mean_and_peak, (reserved, cache["used"], wasted)),
        f"{wasted['mean'] / reserved['mean']:.0%}" if wasted and reserved["mean"] else "-",
    ]


def mean_and_peak(figures: dict | None) -> str:
    return "-" if figures is None else f"{figures['mean'] / KIB:.0f} / {figures['peak'] / KIB:.0f}"


def notes(rungs: Mapping[str, dict]) -> list[str]:
    """Notes on the tables."""
    most = max(record["requests"] for record in rungs.values())
    few = [record for record in rungs.values() if record["requests"] < most]
    lines = [
        f"{each['label']}: the first {each['requests']} requests only, with {each['prompt_tokens']} prompt and "
        f"{each['output_tokens']} output tokens; its figures are of those"
        for each in few
    ]
    if few:
        lines.append("* not the same requests on both sides; without it a factor is of the same requests, in one turn")
    lines.append("over first: the product of the factors on the way from the first rung")
    lines.append(
        "set aside: allocated, or the most that may be held; reserved: for requests that run; used: holds a token"
    )
    if "transformers_cb" in rungs:
        lines.append("transformers' continuous batching does not say which of its blocks hold tokens")
    return lines


def outputs_text(rounded: Sequence[int]) -> str:
    if not rounded:
        return "every rung gave the same tokens"
    numbers = ", ".join(map(str, rounded))
    return (
        f"every rung gave the same tokens, but for ties in float64 that float32 rounded otherwise, requests {numbers}"
    )


def prediction_table(predicted: dict) -> str:
    """The simulator beside the measured ladder."""
    rows = []
    for record in predicted["rungs"].values():
        speeds = record["seconds"]
        cells = [record["label"], f"{speeds['measured']:.2f}", f"{speeds['predicted']:.2f}", f"{speeds['error']:+.1%}"]
        each = record["over_before"]
        if each is None:
            cells += ["-", "-", "-"]
        else:
            cells += [f"{each['measured']:.2f}", f"{each['predicted']:.2f}", f"{each['error']:+.1%}"]
        rows.append(cells)
    header = ["", "seconds", "predicted", "error", "over before", "predicted", "error"]
    lines = [
        f"the simulator with prices of this machine, fitted to other requests ({predicted['timer']} time)",
        text_table(header, rows),
        f"median error of a factor {predicted['median_error']:.1%}, of the seconds "
        f"{predicted['median_error_of_seconds']:.1%}",
        f"not predicted: {', '.join(predicted['left_out'])}",
    ]
    return "\n".join(lines)


# --- the picture -----------------------------------------------------------------------------------------------------


def waterfall(result: dict, guesses: Mapping[str, float | None] | None = None) -> Waterfall:
    """The waterfall of one shape's record, from the first rung to the last, with the range of each factor over repeats.

    `guesses`: rung name -> a guess of its factor over the rung before.
    """
    rungs = result["rungs"]
    steps, here = [], max((name for name in rungs if rungs[name]["over_first"]), key=lambda name: way(rungs, name))
    last = here
    while (before := rungs[here]["before"]) is not None:
        found = rungs[here]["over_before"]
        steps.append((rungs[here]["label"], found["median"], min(found["repeats"]), max(found["repeats"])))
        here = before
    return Waterfall(
        steps[::-1],
        first=rungs[here]["label"],
        last=f"all: {rungs[last]['output_tokens_per_second']:.0f} tokens/s",
        title=f"{result['label']}: times as fast, rung by rung",
        unit="times as fast",
        spread="over the repeats",
        good_above=True,
        guesses={rungs[name]["label"]: guess for name, guess in (guesses or {}).items()},
    )


def way(rungs: Mapping[str, dict], name: str) -> int:
    """The number of rungs before this one on the way from the first of ours; -1 if it is not on that way."""
    length = 0
    while rungs[name]["before"] is not None:
        name, length = rungs[name]["before"], length + 1
    return length if name == MAIN else -1


def relative(predicted: float, measured: float) -> dict[str, float]:
    """The relative error of a prediction."""
    return {"measured": measured, "predicted": predicted, "error": predicted / measured - 1}


def median_error(pairs: Sequence[dict | None]) -> float:
    """The median of those that are not None; NaN if there are none."""
    errors = [abs(each["error"]) for each in pairs if each is not None]
    return statistics.median(errors) if errors else math.nan
