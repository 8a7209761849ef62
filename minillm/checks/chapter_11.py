"""Chapter 11, why 24 times: a ratio explained from two traces, a setting for every factor, a benchmark read."""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from minillm.checks.base import Case, CheckFailed, call, describe, failure, number_of, run_check, same_value
from minillm.costs import A100_80GB, LLAMA_2_7B
from minillm.engine import BlockManager, Request, Scheduler, SchedulerConfig
from minillm.errors import MiniLLMError
from minillm.sampling import SamplingParams
from minillm.simulation import (
    BATCHING,
    EXPLAINED,
    Assumptions,
    Calibrated,
    Published,
    Roofline,
    SimulatedExecutor,
    VirtualClock,
    WithHost,
    made_request,
    run,
)
from minillm.trace import Trace
from minillm.viz import LoadPoint

# --- explain ---------------------------------------------------------------------------------------------------------

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


def explain(function: Callable) -> None:
    """`explain(trace_a, trace_b)` -> {"padding": …, "waiting": …, "memory": …, "host": …}, whose product is the ratio.

    The traces are simulated: first with one cause alone, then with several. The factors must be those of the rule, in
    its order of layers.
    """
    run_check("explain", function, _explain_cases(), same=_is_close, show=_show_factors, advise=_advise_factors)


def _layers(trace: Trace) -> dict[str, float]:
    """Of a run, from the outside in: each layer over what it encloses, and the seconds left in the end."""
    computing = sum(step.computing for step in trace.steps)
    waiting = sum(step.computing * step.uses.ended / step.num_tokens for step in trace.steps)
    padding = sum(step.computing * step.uses.padding / step.num_tokens for step in trace.steps)
    busy = computing - waiting
    return {
        "host": trace.makespan / computing,
        "waiting": computing / busy,
        "padding": busy / (busy - padding),
        "memory": busy - padding,
    }


def _trace(
    label: str,
    pairs: list,
    batching: str = "continuous",
    rows: int = 4,
    costs=LINEAR,
    host: float = 0.0,
    at: float = 0.0,
    num_blocks: int | None = None,
):
    """One simulated run; all requests arrive together, so that somebody always waits for a place."""
    clock = VirtualClock()
    paged = {"block_manager": BlockManager(num_blocks, 16, enable_prefix_caching=False)} if num_blocks else {}
    scheduler = BATCHING[batching](SchedulerConfig(rows, 1024, 512), clock, **paged)
    requests = [made_request(str(i), at, *pair) for i, pair in enumerate(pairs)]
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
    yield _pair(alike, alike, "The same trace twice: every factor is 1. Divide each number of a by that of b.")
    yield _pair(
        _trace("static, 4 rows, all outputs of 12 tokens", same_outputs, "static"),
        _trace("continuous, 4 rows, all outputs of 12 tokens", same_outputs),
        "Only padding differs here. Take its share of each step's seconds, not of all tokens: most padding is in a few "
        "long steps.",
    )
    yield _pair(
        _trace("static, 4 rows, all prompts of 16 tokens", 4 * same_prompts, "static", costs=FLAT),
        _trace("continuous, 4 rows, all prompts of 16 tokens", 4 * same_prompts, costs=FLAT),
        "Only waiting differs here: step.uses.ended are the tokens in rows of requests that have ended, "
        "step.uses.padding those beside tokens of requests that go on.",
    )
    yield _pair(
        _trace("continuous, 2 rows", both, rows=2, costs=FLAT),
        _trace("continuous, 16 rows", both, rows=16, costs=FLAT),
        "Only the memory differs here: the seconds of useful tokens are what is left when the others are taken away.",
    )
    yield _pair(
        _trace("continuous, host 10 ms per step", both, host=10e-3),
        _trace("continuous, host 2 ms per step", both, host=2e-3),
        "Only the host differs here: all seconds over the seconds that were computed, in a and in b.",
    )
    yield _pair(
        _trace("continuous, 4 rows, all arrive after 5 s", both, at=5.0),
        _trace("continuous, 4 rows", both),
        "The same run, 5 s later: the makespan begins with the first arrival.",
    )
    yield _pair(
        _trace("continuous, 16 rows, preempted in 32 blocks", both, rows=16, num_blocks=32),
        _trace("continuous, 16 rows", both, rows=16),
        "Here tokens are computed again, step.uses.recompute. They are neither padding nor waiting: they stay in "
        "what is left.",
    )
    yield _pair(
        _trace("static, 2 rows", both, "static", 2),
        _trace("continuous, 16 rows", both, rows=16),
        "Waiting and padding at once. Waiting is the outer layer: all computing seconds over those without ended rows. "
        "Padding comes after it: these over what is left.",
    )
    yield _pair(
        _trace("static, 2 rows, host 10 ms per step", both, "static", 2, FLAT, 10e-3),
        _trace("continuous, 16 rows, host 1 ms per step", both, "continuous", 16, FLAT, 1e-3),
        "All four at once: peel them off one after the other; each is seconds with it over seconds without it.",
    )


def _pair(a: KnownTrace, b: KnownTrace, hint: str) -> Case:
    of_a, of_b = _layers(a), _layers(b)
    return Case((a, b), {cause: of_a[cause] / of_b[cause] for cause in EXPLAINED}, hint)


def _factors(got: Any) -> dict[str, float] | None:
    """The reader's factors; None if these are no four numbers above 0 by the right names."""
    if not isinstance(got, Mapping) or set(got) != set(EXPLAINED):
        return None
    factors = {cause: number_of(got[cause]) for cause in EXPLAINED}
    return factors if all(value is not None and 0 < value < math.inf for value in factors.values()) else None


def _is_close(got: Any, expected: dict[str, float]) -> bool:
    factors = _factors(got)
    return factors is not None and all(
        math.isclose(factors[cause], value, rel_tol=1e-6) for cause, value in expected.items()
    )


def _show_factors(answer: Any) -> str:
    factors = _factors(answer)
    if factors is None:
        return describe(answer)
    shown = ", ".join(f"{cause} {value:.2f}" for cause, value in factors.items())
    return f"{shown}; product {math.prod(factors.values()):.4f}"


def _advise_factors(got: Any, case: Case) -> str | None:
    factors = _factors(got)
    if factors is None:
        return f"Return a dict with one number above 0 for each of {', '.join(EXPLAINED)}."
    if not math.isclose(math.prod(factors.values()), math.prod(case.expected.values()), rel_tol=1e-6):
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
    yield Case((0.4, b, a), "b", "The one called a has no point within 0.4 s: it serves 0, and the other one 1.")


def _open(*points: tuple[float, float, float]) -> list[LoadPoint]:
    return [LoadPoint("open", *point) for point in points]


# --- engine_arguments, the puzzle ------------------------------------------------------------------------------------

ROOM, LONGEST = 6_000, 1_024  # tokens of cache; tokens of a row
FASTER, STALL = 7.8, 0.02  # times static batching; seconds, the longest gap between two tokens of an answer
ARGUMENTS = ("max_num_seqs", "max_num_batched_tokens", "block_size", "enable_prefix_caching", "watermark")


class Arguments(NamedTuple):
    """What a run with some arguments came to."""

    factor: float  # static batching's makespan over its own
    longest_gap: float  # seconds


def engine_arguments(function: Callable) -> None:
    """`engine_arguments()` -> a dict of arguments of the engine; those left out keep their defaults.

    The puzzle: with room for 6,000 tokens, 7.8 times as fast as static batches, and no gap of more than 20 ms. 150
    chats behind four system prompts of 200 tokens, all there at once, on a simulated A100 with Llama-2-7B; twice.
    """
    lines = []
    for seed in (1, 2):
        case = Case((), f"a dict with some of {', '.join(ARGUMENTS)}", "Return a dict, such as {'block_size': 32}.")
        arguments = call("engine_arguments", function, case, describe)
        if not isinstance(arguments, Mapping) or not arguments.keys() <= set(ARGUMENTS):
            raise CheckFailed(failure("engine_arguments", case, f"got       {describe(arguments)}", case.expected))
        case = replace(case, expected=f"{FASTER:g} times static batches, no gap above {1000 * STALL:g} ms")
        try:
            got = served_with(dict(arguments), seed)
        except MiniLLMError as error:
            case = replace(case, hint="The engine refuses these arguments: the message names the limit.")
            raise CheckFailed(failure("engine_arguments", case, f"raised    {error}", case.expected)) from error
        came = f"{got.factor:.2f} times static batches, longest gap {1000 * got.longest_gap:.0f} ms"
        if got.longest_gap > STALL:
            hint = (
                "A long gap is a preempted request, or a pass with a large piece of a prompt. Which argument bounds it?"
            )
        else:
            hint = "More requests at once: share beginnings, and waste fewer slots of the last blocks."
        if got.longest_gap > STALL or got.factor < FASTER:
            raise CheckFailed(failure("engine_arguments", replace(case, hint=hint), f"got       {came}", case.expected))
        lines.append(f"  {came}")
    print("✓ engine_arguments: 2 workloads within both budgets", *lines, sep="\n")


def served_with(arguments: dict[str, Any], seed: int) -> Arguments:
    """Both runs of a workload. Raises ConfigError or PromptError for arguments with which none is possible."""
    options = {"max_num_seqs": 256, "max_num_batched_tokens": 512, "block_size": 16, "watermark": 0.01}
    options |= {"enable_prefix_caching": False} | arguments
    watermark = options.pop("watermark")
    caching, size = options.pop("enable_prefix_caching"), options.pop("block_size")
    num_blocks = ROOM // size if isinstance(size, int) and size > 0 else 1  # another size is refused
    blocks = BlockManager(num_blocks, size, enable_prefix_caching=caching)
    clock = VirtualClock()
    limits = SchedulerConfig(**options, max_model_len=LONGEST)
    trace = _chats_served(Scheduler(limits, clock, block_manager=blocks, watermark=watermark), seed)
    gaps = (gap for request in trace.requests for gap in trace.inter_token_latencies(request.request_id))
    return Arguments(_static_makespan(seed) / trace.makespan, max(gaps))


@cache
def _static_makespan(seed: int) -> float:
    """Seconds of static batches, in rows for the longest request."""
    limits = SchedulerConfig(ROOM // LONGEST, LONGEST, LONGEST)
    return _chats_served(BATCHING["static"](limits, VirtualClock()), seed).makespan


def _chats_served(scheduler: Scheduler, seed: int) -> Trace:
    executor = SimulatedExecutor(Roofline(LLAMA_2_7B, A100_80GB), scheduler.clock)
    return run(scheduler, executor, _chats(seed), scheduler.clock)


def _chats(seed: int) -> list[Request]:
    """150 requests: one of four system prompts, a question of its own, and an answer of 4 to 300 tokens."""
    rng, chats = random.Random(seed), []
    for number in range(150):
        which = rng.randrange(4)
        system = [1_000 * which + place for place in range(200)]
        question = [rng.randrange(10_000, 20_000) for _ in range(rng.randint(10, 400 if rng.random() < 0.2 else 60))]
        params = SamplingParams(max_tokens=min(300, 4 + int(rng.lognormvariate(4, 0.9))), ignore_eos=True)
        chats.append(Request(f"chat {number}", system + question, params))
    return chats
