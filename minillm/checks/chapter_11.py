"""Chapter 11, why 24 times: a ratio explained from two traces, a setting for every factor, a benchmark read."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from minillm.checks.base import Case, CheckFailed, call, describe, failure, number_of, run_check, same_value
from minillm.engine import SchedulerConfig
from minillm.errors import MiniLLMError
from minillm.simulation import (
    BATCHING,
    EXPLAINED,
    Assumptions,
    Calibrated,
    Published,
    SimulatedExecutor,
    VirtualClock,
    WithHost,
    made_request,
    run,
)
from minillm.simulation import explain as explain_of_package
from minillm.trace import Trace
from minillm.viz import LoadPoint

# --- explain ---------------------------------------------------------------------------------------------------------

CLOSE = 0.04  # what a factor may be off: the answers are known by switching causes, the traces tell them nearly
PROMPTS = [5 + 37 * i % 60 for i in range(64)]
OUTPUTS = [3 + 23 * i % 40 for i in range(64)]
LINEAR = Calibrated(4e-3, 0.5e-3, 0, 0, 0, 0, 0, 0)  # seconds per step, and per token: arithmetic decides
FLAT = Calibrated(20e-3, 0.02e-3, 0, 0, 0, 0, 0, 0)  # reading the weights decides


@dataclass
class KnownTrace(Trace):
    """A trace with a short name for messages."""

    label: str = "a trace"

    def __repr__(self) -> str:
        return self.label

    def __deepcopy__(self, memo: dict) -> "KnownTrace":
        """The events in it cannot be changed."""
        return replace(self, requests=list(self.requests), steps=list(self.steps))


@dataclass(frozen=True)
class Known:
    """The measured ratio, and between which each factor lies: one value, or those of both orders."""

    ratio: float
    factors: Mapping[str, tuple[float, float]]


def explain(function: Callable) -> None:
    """`explain(trace_a, trace_b)` -> {"padding": …, "waiting": …, "memory": …, "host": …}, whose product is the ratio.

    The traces are simulated, so that what each cause is worth is known: it was switched on alone, or two of them were.
    """
    run_check("explain", function, _explain_cases(), same=_is_known, show=_show_factors, advise=_advise_factors)


def _trace(label: str, pairs: list, batching: str = "continuous", rows: int = 4, costs=LINEAR, host: float = 0.0):
    """One simulated run; requests are there from the beginning, so that somebody always waits for a place."""
    clock = VirtualClock()
    scheduler = BATCHING[batching](SchedulerConfig(rows, 1024, 512), clock)
    requests = [made_request(str(i), 0.0, *pair) for i, pair in enumerate(pairs)]
    trace = run(scheduler, SimulatedExecutor(WithHost(costs, host), clock), requests, clock)
    return KnownTrace(**vars(trace), label=f"<{label}>")


@cache
def _explain_cases() -> list[Case]:
    """Made once: they are a second of simulation."""
    return list(_known_runs())


def _known_runs() -> Iterator[Case]:
    both = list(zip(PROMPTS, OUTPUTS, strict=True))
    same_outputs, same_prompts = [(prompt, 12) for prompt in PROMPTS], [(16, output) for output in OUTPUTS]
    alike = _trace("static, 4 rows", both, "static")
    yield _single(None, alike, alike, "The same trace twice: every factor is 1. Divide each number of a by that of b.")
    yield _single(
        "padding",
        _trace("static, 4 rows, all outputs of 12 tokens", same_outputs, "static"),
        _trace("continuous, 4 rows, all outputs of 12 tokens", same_outputs),
        "Only padding differs here. Take its share of each step's seconds, not of all tokens: most padding is in a few "
        "long steps.",
    )
    yield _single(
        "waiting",
        _trace("static, 4 rows, all prompts of 16 tokens", 4 * same_prompts, "static", costs=FLAT),
        _trace("continuous, 4 rows, all prompts of 16 tokens", 4 * same_prompts, costs=FLAT),
        "Only waiting differs here: step.uses.ended are the tokens in rows of requests that have ended, "
        "step.uses.padding those beside tokens of requests that go on.",
    )
    yield _single(
        "memory",
        _trace("continuous, 2 rows", both, rows=2, costs=FLAT),
        _trace("continuous, 16 rows", both, rows=16, costs=FLAT),
        "Only the memory differs here: the seconds of useful tokens are what is left when the others are taken away.",
    )
    yield _single(
        "host",
        _trace("continuous, host 10 ms per step", both, host=10e-3),
        _trace("continuous, host 2 ms per step", both, host=2e-3),
        "Only the host differs here: all seconds over the seconds that were computed, in a and in b.",
    )
    yield _double({"memory": {"rows": 2}, "host": {"host": 10e-3}}, both)
    yield _double({"waiting": {"batching": "static"}, "memory": {"rows": 2}}, 4 * same_prompts)
    a = _trace("static, 2 rows, host 10 ms per step", both, "static", 2, FLAT, 10e-3)
    b = _trace("continuous, 16 rows, host 1 ms per step", both, "continuous", 16, FLAT, 1e-3)
    factors = {factor.name: factor for factor in explain_of_package(a, b).decomposition.factors}
    spans = {cause: (0.9 * factors[cause].low, 1.1 * factors[cause].high) for cause in EXPLAINED}
    hint = "All four at once: peel them off one after the other; each is seconds with it over seconds without it."
    yield Case((a, b), Known(a.makespan / b.makespan, spans), hint)


def _single(cause: str | None, a: KnownTrace, b: KnownTrace, hint: str) -> Case:
    """Of one cause, or none: it is the whole ratio."""
    ratio = a.makespan / b.makespan
    values = {each: ratio if each == cause else 1.0 for each in EXPLAINED}
    return Case((a, b), Known(ratio, {each: _near(value, value) for each, value in values.items()}), hint)


def _double(causes: Mapping[str, dict], pairs: list) -> Case:
    """Of two, each with what switches it on; from four runs: a cause is worth what it is alone, or beside the other."""
    one, other = causes
    traces = {}
    for present in ((), (one,), (other,), (one, other)):
        options = {"rows": 16} | {name: value for cause in present for name, value in causes[cause].items()}
        label = ", ".join(f"{name} {value}" for name, value in options.items())
        traces[frozenset(present)] = _trace(label, pairs, costs=FLAT, **options)
    seconds = {present: trace.makespan for present, trace in traces.items()}
    none, both = frozenset(), frozenset(causes)
    spans = {each: _near(1.0, 1.0) for each in EXPLAINED}
    for cause in causes:
        spans[cause] = _near(seconds[frozenset({cause})] / seconds[none], seconds[both] / seconds[both - {cause}])
    hint = f"Two causes at once, {one} and {other}: seconds with a cause over seconds without it, one by one."
    return Case((traces[both], traces[none]), Known(seconds[both] / seconds[none], spans), hint)


def _near(one: float, other: float) -> tuple[float, float]:
    return min(one, other) * (1 - CLOSE), max(one, other) * (1 + CLOSE)


def _factors(got: Any) -> dict[str, float] | None:
    """The reader's factors; None if these are no four numbers above 0 by the right names."""
    if not isinstance(got, Mapping) or set(got) != set(EXPLAINED):
        return None
    factors = {cause: number_of(got[cause]) for cause in EXPLAINED}
    return factors if all(value is not None and 0 < value < math.inf for value in factors.values()) else None


def _is_known(got: Any, expected: Known) -> bool:
    factors = _factors(got)
    if factors is None or not math.isclose(math.prod(factors.values()), expected.ratio, rel_tol=1e-6):
        return False
    return all(low <= factors[cause] <= high for cause, (low, high) in expected.factors.items())


def _show_factors(answer: Any) -> str:
    if isinstance(answer, Known):
        spans = (
            f"{cause} {low / (1 - CLOSE):.2f}" + (f" to {high / (1 + CLOSE):.2f}" if high / low > 1.1 else "")
            for cause, (low, high) in answer.factors.items()
        )
        return f"{', '.join(spans)}; product {answer.ratio:.4f}"
    factors = _factors(answer)
    if factors is None:
        return describe(answer)
    shown = ", ".join(f"{cause} {value:.2f}" for cause, value in factors.items())
    return f"{shown}; product {math.prod(factors.values()):.4f}"


def _advise_factors(got: Any, case: Case) -> str | None:
    factors = _factors(got)
    if factors is None:
        return f"Return a dict with one number above 0 for each of {', '.join(EXPLAINED)}."
    if not math.isclose(math.prod(factors.values()), case.expected.ratio, rel_tol=1e-6):
        return (
            "The product of the factors must be trace_a.makespan / trace_b.makespan: each is seconds with a cause over "
            "seconds without it, and the last one is what is left."
        )
    return None


# --- setting_with ----------------------------------------------------------------------------------------------------

WITHIN = 1.15  # times the factor asked for
TRIED = 100  # requests
MAY_CHANGE = ("lengths", "rows", "reserved_tokens", "gpu_memory_utilization")


def setting_with(function: Callable) -> None:
    """`setting_with(factor)` -> `simulation.Assumptions` with which the published factor comes out as about that.

    Asked for 24 and for 3. Lengths, rows of the baseline, tokens reserved for each and the card's share may change.
    """
    hints = {
        24.0: "A batch of few rows makes the baseline slow. With few rows equal lengths raise the factor more.",
        3.0: "Give the baseline many rows, as somebody who knows the lengths can, and requests that are nearly alike.",
    }
    found = []
    for factor, hint in hints.items():
        case = Case((factor,), f"a factor from {factor / WITHIN:.1f} to {factor * WITHIN:.1f}", hint)
        got = call("setting_with", function, case, str)
        if not isinstance(got, Assumptions):
            case = replace(case, hint="Return an Assumptions: Assumptions(rows=4), for example.")
            raise CheckFailed(failure("setting_with", case, f"got       {describe(got)}", "Assumptions"))
        if got != replace(Assumptions(), **{name: getattr(got, name) for name in MAY_CHANGE}):
            case = replace(case, hint=f"Change {', '.join(MAY_CHANGE)} only: the launches are the machine's.")
            raise CheckFailed(failure("setting_with", case, "got       other launches", "those of Assumptions()"))
        try:
            total = Published("13b", got, num_requests=TRIED).total
        except MiniLLMError as error:
            raise CheckFailed(failure("setting_with", case, f"raised    {error}", case.expected)) from error
        if not factor / WITHIN <= total <= factor * WITHIN:
            raise CheckFailed(failure("setting_with", case, f"got       a factor of {total:.2f}", case.expected))
        found.append(f"{total:.1f}")
    print(f"✓ setting_with: {len(found)} cases, factors of {' and '.join(found)}")


# --- better_within ---------------------------------------------------------------------------------------------------


def better_within(function: Callable) -> None:
    """`better_within(limit, a, b)` -> "a" or "b", which serves more within the latency limit; None if nobody can tell.

    `a` and `b` are lists of `viz.LoadPoint`. Points that serve less than 0.9 of what is offered do not count.
    """
    run_check("better_within", function, _better_cases(), same=lambda got, expected: got == expected or (
        expected is not None and same_value(got, expected)
    ))  # fmt: skip


def _better_cases() -> Iterator[Case]:
    a = _open((1, 1, 0.3), (2, 2, 0.5), (4, 3.9, 1.6), (8, 5, 9))
    b = _open((1, 1, 0.6), (2, 2, 0.7), (4, 4, 0.9), (8, 7.8, 1.4))
    yield Case((2.0, a, b), "b", "Within 2 s, a serves 3.9 requests per second and b 7.8.")
    late = _open((1.5, 1.5, 0.4), (3, 3, 0.8))
    yield Case((0.5, a, late), "a", "Exactly the limit is within it: a serves 2 requests per second at 0.5 s.")
    yield Case((2.0, b, a), "a", "The answer is the argument's name: here the better one is called a.")
    slow_rates = _open((0.5, 0.5, 0.2), (1, 1, 0.25))
    yield Case(
        (2.0, a, slow_rates),
        "a",
        "The other was measured at low rates only, where any system is quick. Compare what is served within the limit, "
        "not the latencies.",
    )
    saturated = _open((2, 2, 0.6), (6, 4.5, 1.9))
    yield Case(
        (2.0, a, saturated),
        "a",
        "Where 4.5 of 6 are served a queue grows: in a longer run the latency would be above any limit. Leave out "
        "points with served < 0.9 * offered.",
    )
    yield Case((2.0, _open((10, 9, 1.0)), _open((8, 8, 1.0))), "a", "9 of 10 are 0.9 of what was offered: that counts.")
    closed = [LoadPoint("closed", None, served, latency) for served, latency in ((3, 0.2), (9, 0.4), (12, 0.7))]
    yield Case(
        (2.0, a, closed),
        None,
        "In a closed loop clients wait for their answers, so that no queue grows: open and closed cannot be compared.",
    )
    other = [LoadPoint("closed", None, served, latency) for served, latency in ((4, 0.3), (8, 2.5))]
    yield Case((2.0, closed, other), "a", "Two closed loops can be compared; nothing is offered there, so all count.")
    yield Case((0.1, a, b), None, "Nobody is within 0.1 s: there is no better one.")


def _open(*points: tuple[float, float, float]) -> list[LoadPoint]:
    return [LoadPoint("open", *point) for point in points]
