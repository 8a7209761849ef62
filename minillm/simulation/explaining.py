"""Why one run of some requests took longer than another, from only the two traces.

A trace says when each step began and ended, what its tokens were computed for and, on an engine, when the device was
computing. Each run comes down to a few sums, and its time is a formula of them (`seconds_of`). Exchanging the sums
of one run for those of the other, one by one, gives a factor for each cause; `Decomposition` does so in all orders. So
the factors multiply exactly to the measured ratio, whatever the formula.

- padding: tokens computed because rows of a batch were made equally long;
- waiting: rows of requests that had their last token, computed on until their batch ended;
- memory: fewer requests side by side, so that each token carries more of a step's fixed cost;
  tokens computed again after a preemption; prompts computed that the other run shared;
- host: time per step in which nothing is computed;
- computing: what is left: how much longer the steps took than the prices of the other run's steps predict;
- arrivals: time in which there was no request; only if there was any such time.

A trace cannot tell why a batch was small. Too little memory, a limit on rows and few arrivals look the same; see
`TimeUse.somebody_waited`. Without a device's times, the host is only the time between steps, and the host's time inside
them counts as computing.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from minillm.errors import MiniLLMError, checked
from minillm.simulation.cost_model import non_negative_least_squares
from minillm.simulation.factors import Coalition, Decomposition
from minillm.trace import StepEvent, Trace

EXPLAINED = ("padding", "waiting", "memory", "host")  # by the trace
LEFT = "computing"


class ExplainError(MiniLLMError):
    """Two traces cannot be compared: of different requests, not finished, not complete, or empty."""


@dataclass(frozen=True)
class TimeUse:
    """What one run did with its time."""

    seconds: float  # from the first arrival to the end of the last step
    idle: float  # of them, with no request there
    computing: float
    steps: int
    useful: int  # tokens
    padding: int
    ended: int  # in rows of requests that had their last token
    recompute: int
    mean_requests: float  # per step, that still computed something
    somebody_waited: float  # share of the steps' time in which an arrived request took no part, 0 to 1

    @property
    def host(self) -> float:
        """Seconds in which there was a request but nothing was computed."""
        return max(0.0, self.seconds - self.idle - self.computing)

    @classmethod
    def of(cls, trace: Trace) -> "TimeUse":
        """The use of time in a trace with at least one step."""
        uses = [step.uses for step in trace.steps]
        rows = [len({part.request_id for part in step.scheduled if part.why != "padding"}) for step in trace.steps]
        durations = math.fsum(step.duration for step in trace.steps)
        waited = math.fsum(step.duration for step in trace.steps if step.num_waiting)
        return cls(
            trace.makespan,
            idle_seconds(trace),
            math.fsum(step.computing for step in trace.steps),
            len(uses),
            *map(sum, zip(*uses, strict=True)),
            mean_requests=sum(rows) / len(rows),
            somebody_waited=waited / durations if durations else 0.0,
        )


@dataclass(frozen=True)
class Explanation:
    """How much each cause contributes to the ratio of two runs' times. `explain` makes one."""

    a: TimeUse
    b: TimeUse
    decomposition: Decomposition  # its factors have their range over all orders; for `viz.Waterfall.of`
    price_error: float  # median relative error of the prices on the steps of b, which they were fitted to

    @property
    def ratio(self) -> float:
        """How many times as long a took as b, measured."""
        return self.a.seconds / self.b.seconds

    @property
    def factors(self) -> dict[str, float]:
        """Cause -> factor, the mean over all orders; their product is `ratio`."""
        return {factor.name: factor.shapley for factor in self.decomposition.factors}

    def __str__(self) -> str:
        lines = [f"{self.ratio:.2f} times as long: {self.a.seconds:.4g} s against {self.b.seconds:.4g} s"]
        for factor in self.decomposition.factors:
            lines.append(f"  {factor.name:10} {factor.shapley:6.2f}   {factor.low:.2f} to {factor.high:.2f} by order")
        lines += ["", f"  {'':22} {'a':>12} {'b':>12}"]
        for name, form in _SHOWN.items():
            lines.append(f"  {name:22} {form(self.a):>12} {form(self.b):>12}")
        return "\n".join([*lines, f"steps of b are priced with a median error of {self.price_error:.1%}"])


_SHOWN = {
    "seconds computing": lambda use: f"{use.computing:.4g}",
    "seconds of the host": lambda use: f"{use.host:.4g}",
    "seconds idle": lambda use: f"{use.idle:.4g}",
    "steps": lambda use: f"{use.steps:,}",
    "requests in a step": lambda use: f"{use.mean_requests:.1f}",
    "somebody waited": lambda use: f"{use.somebody_waited:.0%}",
    "tokens useful": lambda use: f"{use.useful:,}",
    "tokens of padding": lambda use: f"{use.padding:,}",
    "tokens of ended rows": lambda use: f"{use.ended:,}",
    "tokens again": lambda use: f"{use.recompute:,}",
}


@checked
def explain(trace_a: Trace, trace_b: Trace) -> Explanation:
    """Why run a took longer than run b, which served the same requests and should be the faster one.

    The steps of b give a price per step, per token and per cached token. These price the steps of both, and `computing`
    is how much longer than that a's took. Requests are the same if as many have the same numbers of prompt and output
    tokens; their ids may differ. Raises ExplainError for a trace that is empty, has lost its beginning or has requests
    without an end, and for different requests.
    """
    check_same_requests(trace_a, trace_b)
    prices = _Prices.fit(trace_b)
    a, b = (_Account.of(trace, prices) for trace in (trace_a, trace_b))
    causes = (*EXPLAINED, LEFT, *(["arrivals"] if a.use.idle or b.use.idle else []))

    def seconds(coalition: Coalition) -> float:
        return seconds_of({cause: a if cause in coalition else b for cause in (*causes, "arrivals")})

    return Explanation(a.use, b.use, Decomposition.of(causes, seconds), prices.error)


# --- the same requests -----------------------------------------------------------------------------------------------


def check_same_requests(trace_a: Trace, trace_b: Trace) -> None:
    """Raises ExplainError unless both are complete runs of the same requests."""
    a, b = lengths_of("a", trace_a), lengths_of("b", trace_b)
    if a != b:
        only = [f"{count:,} only in {name}" for name, count in (("a", (a - b).total()), ("b", (b - a).total()))]
        example = next(iter((a - b) + (b - a)))
        raise ExplainError(
            f"the traces are of different requests: {' and '.join(only)}, such as one of {example[0]} prompt and "
            f"{example[1]} output tokens; give the traces of two runs of the same requests, with outputs as long"
        )


def lengths_of(name: str, trace: Trace) -> Counter[tuple[int, int]]:
    """How often each (prompt tokens, output tokens) is there. Raises ExplainError if the run is not complete."""
    if trace.dropped:
        raise ExplainError(f"trace {name} is not complete: {trace.dropped}; keep the whole run (max_trace_steps=None)")
    if not trace.requests or not any(step.computing > 0 for step in trace.steps):
        raise ExplainError(
            f"trace {name} has {len(trace.requests)} requests and {len(trace.steps)} steps, in which nothing took "
            "time; give the trace of a run"
        )
    finished = {each for step in trace.steps for each in step.finished}
    if unfinished := [each.request_id for each in trace.requests if each.request_id not in finished]:
        raise ExplainError(
            f"trace {name}: {len(unfinished)} of {len(trace.requests)} requests have not ended, such as "
            f"{unfinished[0]!r}; let the run go on until all have"
        )
    outputs: Counter[str] = Counter()
    for step in trace.steps:
        for part in step.scheduled:
            outputs[part.request_id] += part.num_sampled
    return Counter((each.num_prompt_tokens, outputs[each.request_id]) for each in trace.requests)


def idle_seconds(trace: Trace) -> float:
    """Time before and between steps in which every request that had arrived had ended."""
    arrivals = sorted(record.arrival_time for record in trace.requests)
    now, arrived, ended, idle = min(arrivals, default=0.0), 0, 0, 0.0
    for step in trace.steps:
        while arrived < len(arrivals) and arrivals[arrived] <= now:
            arrived += 1
        if arrived == ended and arrived < len(arrivals):
            idle += max(0.0, min(step.start_time, arrivals[arrived]) - now)
        ended += len(step.finished)
        now = max(now, step.end_time)
    return idle


# --- the account of a run --------------------------------------------------------------------------------------------


def keys_read(step: StepEvent) -> int:
    """Cached tokens that the requests of a step attend to, each request's own."""
    return sum({part.request_id: part.end for part in step.scheduled if part.why != "padding"}.values())


@dataclass(frozen=True)
class _Prices:
    """Seconds of a step, of each of its tokens, and of each cached token that it reads."""

    step: float
    token: float
    key: float
    error: float

    def seconds(self, step: StepEvent) -> float:
        return self.step + self.token * step.num_tokens + self.key * keys_read(step)

    @classmethod
    def fit(cls, trace: Trace) -> "_Prices":
        """Prices fitted to a trace's steps by least squares of relative errors, without steps three times as long."""
        steps = [step for step in trace.steps if step.computing > 0]
        first = cls._fit(steps)
        calm = [step for step in steps if step.computing <= 3 * first.seconds(step)]
        return cls._fit(calm or steps)

    @classmethod
    def _fit(cls, steps: list[StepEvent]) -> "_Prices":
        rows = [[count / step.computing for count in (1, step.num_tokens, keys_read(step))] for step in steps]
        fitted = cls(*non_negative_least_squares(rows, [1.0] * len(rows)), error=0.0)
        error = median(abs(fitted.seconds(step) / step.computing - 1) for step in steps)
        return cls(fitted.step, fitted.token, fitted.key, error)


@dataclass(frozen=True)
class _Account:
    """A run as sums over its steps; seconds are at the fitted prices."""

    use: TimeUse
    priced: float  # of all steps
    padding: float  # of tokens of padding
    ended: float  # of rows of ended requests
    ended_steps: float  # steps saved if other requests had had those rows

    @classmethod
    def of(cls, trace: Trace, prices: _Prices) -> "_Account":
        """The sums of a trace. Without padding a step is shorter. The row of an ended request costs its share of the
        whole step if a waiting request could have it; otherwise only its tokens.
        """
        priced, padding, ended, ended_steps = [], [], [], []
        for step in trace.steps:
            uses, seconds = step.uses, prices.seconds(step)
            missed = min(uses.ended, step.num_waiting)
            share = missed / max(1, step.num_tokens - uses.padding)
            priced.append(seconds)
            padding.append(prices.token * uses.padding)
            ended.append(share * (seconds - padding[-1]) + (1 - share) * prices.token * (uses.ended - missed))
            ended_steps.append(share)
        return cls(TimeUse.of(trace), *map(math.fsum, (priced, padding, ended, ended_steps)))

    @property
    def slowness(self) -> float:
        """Seconds computed / priced."""
        return self.use.computing / self.priced

    @property
    def host_per_step(self) -> float:
        """Seconds."""
        return self.use.host / self.use.steps

    def layers(self, slowness: float, host: float) -> Iterator[float]:
        """Seconds of the run for this slowness of its steps and this host time per step: of all, then without rows of
        ended requests, then without padding too.
        """
        seconds = slowness * self.priced + host * self.use.steps
        yield seconds
        seconds -= slowness * self.ended + host * self.ended_steps
        yield seconds
        yield seconds - slowness * self.padding


def seconds_of(runs: dict[str, _Account]) -> float:
    """The time of a run that takes each cause from one of `runs`; from a single run, its own time."""
    slowness, host = runs[LEFT].slowness, runs["host"].host_per_step
    *_, least = runs["memory"].layers(slowness, host)
    with_ended, without_ended, _ = runs["waiting"].layers(slowness, host)
    _, with_padding, without_padding = runs["padding"].layers(slowness, host)
    return runs["arrivals"].use.idle + least * with_ended / without_ended * with_padding / without_padding
