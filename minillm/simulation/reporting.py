"""What a run achieved: throughput, latencies, goodput, waste. Read from a Trace, or gathered while the run goes on.

Times are seconds. TTFT runs from a request's arrival to its first token, ITL from one token to the next, E2E from the
arrival to the moment the request leaves the batch: in a static batch that is when the whole batch ends. A token's time
is the end of the step that computed it, not the moment it was delivered (see `minillm.trace.events`).
"""

import math
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from numbers import Real

import numpy as np

from minillm.engine import StepUpdate
from minillm.errors import ConfigError, checked, shown
from minillm.runtime import SchedulerOutput
from minillm.trace import Trace


@dataclass(frozen=True)
class SLO:
    """A service level objective: the limits within which a request counts as served well, in seconds."""

    ttft: float = math.inf
    itl: float = math.inf  # of a request's mean
    e2e: float = math.inf

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, Real) or not value > 0:
                raise ConfigError(f"the limit on {name} is {shown(value)}; it must be seconds, a positive number")

    def met_by(self, ttft: float, mean_itl: float, e2e: float) -> bool:
        """Whether a request with these times was served well."""
        return ttft <= self.ttft and mean_itl <= self.itl and e2e <= self.e2e


@dataclass(frozen=True)
class Spread:
    """How a time is spread over its samples; a percentile is the smallest sample that so many per cent do not exceed.

    All None without samples.
    """

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True)
class Report:
    """The figures of one run."""

    num_requests: int  # that arrived
    num_finished: int
    num_steps: int
    makespan: float  # seconds from the first arrival, or the first step that is kept, to the end of the last step
    output_tokens: int
    output_tokens_per_second: float
    requests_per_second: float  # finished ones
    goodput: float  # finished requests per second that met the SLO
    ttft: Spread
    itl: Spread
    e2e: Spread
    computed_tokens: int  # tokens pushed through the model, padding included
    useful_tokens: int  # those of them that were neither padding nor computed a second time
    mean_waiting: float  # requests waiting, averaged over the makespan
    slo: SLO
    dropped: str = ""  # what came before the reported steps, if these are the last of a longer run

    @property
    def utilisation(self) -> float:
        """Useful share of the computed tokens, 0 to 1."""
        return self.useful_tokens / self.computed_tokens if self.computed_tokens else 0.0

    def as_dict(self) -> dict:
        """Everything, for JSON; an SLO without limit is None."""
        slo = {name: None if math.isinf(value) else value for name, value in asdict(self.slo).items()}
        return asdict(self) | {"utilisation": self.utilisation, "slo": slo}

    def __str__(self) -> str:
        lines = [f"note          {self.dropped}"] if self.dropped else []
        lines += [
            f"requests      {self.num_finished} of {self.num_requests} finished in {self.makespan:.2f} s, "
            f"{self.num_steps} steps",
            f"throughput    {self.output_tokens_per_second:.1f} output tokens/s, {self.requests_per_second:.2f} "
            f"requests/s, goodput {self.goodput:.2f} requests/s",
            f"tokens        {self.computed_tokens} computed, {self.useful_tokens} useful ({self.utilisation:.1%})",
            f"mean waiting  {self.mean_waiting:.1f} requests",
            "              " + "".join(f"{name:>12}" for name in ("mean", "p50", "p90", "p99", "max")) + "   (ms)",
        ]
        for name in ("ttft", "itl", "e2e"):
            values = asdict(getattr(self, name)).values()
            cells = ("-" if value is None else f"{1000 * value:.2f}" for value in values)
            lines.append(f"{name.upper():14}" + "".join(f"{cell:>12}" for cell in cells))
        return "\n".join(lines)


@checked
def report(trace: Trace, slo: SLO = SLO()) -> Report:  # noqa: B008 - frozen
    """The figures of a finished run, or of its last steps if the trace has dropped the others.

    A request whose first token is not among those has no TTFT: it is left out there, and meets any limit on it.
    """
    builder = ReportBuilder(slo, trace.dropped)
    records = {record.request_id: record for record in trace.requests}
    for record in trace.requests:
        builder.arrive(record.request_id, record.arrival_time)
    if trace.dropped_steps and trace.steps:
        builder.begin_at(trace.steps[0].start_time)
    seen = set()
    for step in trace.steps:
        sampled = [part for part in step.scheduled for _ in range(part.num_sampled)]
        for part in sampled:
            if part.request_id not in seen and not trace.knows_first_token(records[part.request_id], part):
                builder.began_before(part.request_id)
            seen.add(part.request_id)
        ids = [part.request_id for part in sampled]
        builder.add_step(
            step.start_time, step.end_time, step.num_tokens, step.num_useful, ids, step.finished, step.num_waiting
        )
    return builder.report()


class ReportBuilder:
    """Gathers the figures step by step. It keeps 32 bytes per finished request and 16 per step, for the percentiles."""

    def __init__(self, slo: SLO = SLO(), dropped: str = ""):  # noqa: B008 - frozen
        self.slo = slo
        self.dropped = dropped
        self._under_way: dict[str, _Progress] = {}
        self._ttft, self._itl, self._e2e = Tally(), Tally(), Tally()  # of seconds
        self._num_requests = self._num_finished = self._num_good = 0
        self._num_steps = self._output_tokens = self._computed = self._useful = 0
        self._waiting_seconds = 0.0  # waiting requests times seconds
        self._begin, self._end = math.inf, -math.inf

    def arrive(self, request_id: str, arrival_time: float) -> None:
        """A request has arrived."""
        self._under_way[request_id] = _Progress(arrival_time)
        self._num_requests += 1
        self._begin = min(self._begin, arrival_time)

    def begin_at(self, moment: float) -> None:
        """Start the reported time here, whenever the requests arrived."""
        self._begin = moment

    def began_before(self, request_id: str) -> None:
        """Note that this request's first token came before the first step."""
        self._under_way[request_id].knows_first_token = False

    def add(self, plan: SchedulerOutput, updates: StepUpdate, left: Iterable[str], end: float, waiting: int) -> None:
        """Add a step of a run without a trace: its plan, updates, the requests that left, its end, how many wait."""
        sampled = [each for each, token_id in updates.token_ids.items() if token_id is not None]
        useful = plan.num_tokens - sum(part.num_recomputed for part in plan.others)
        self.add_step(plan.start_time, end, plan.num_computed_tokens, useful, sampled, left, waiting)

    def add_step(
        self,
        start: float,
        end: float,
        computed: int,
        useful: int,
        sampled: Iterable[str],
        finished: Iterable[str],
        waiting: int,
    ) -> None:
        """Add a step: tokens computed and useful, requests with new tokens, those that left, how many wait."""
        self._num_steps += 1
        self._computed += computed
        self._useful += useful
        self._waiting_seconds += waiting * (end - start)
        self._end = max(self._end, end)  # of several replicas
        for request_id in sampled:
            progress = self._under_way[request_id]
            if progress.num_tokens:
                self._itl.add(end - progress.last_token)
            else:
                progress.first_token = end
                if progress.knows_first_token:
                    self._ttft.add(end - progress.arrival)
            progress.last_token = end
            progress.num_tokens += 1
        for request_id in finished:
            self._finish(self._under_way.pop(request_id), end)

    def _finish(self, progress: "_Progress", end: float) -> None:
        if not progress.num_tokens:
            return  # aborted before its first token
        self._num_finished += 1
        self._output_tokens += progress.num_tokens
        e2e = end - progress.arrival
        self._e2e.add(e2e)
        ttft = progress.first_token - progress.arrival if progress.knows_first_token else 0.0
        self._num_good += self.slo.met_by(ttft, progress.mean_itl, e2e)

    def report(self) -> Report:
        """The figures so far."""
        makespan = max(0.0, self._end - self._begin) if self._num_steps else 0.0
        output_tokens = self._output_tokens + sum(progress.num_tokens for progress in self._under_way.values())
        rate = 1 / makespan if makespan else 0.0
        return Report(
            num_requests=self._num_requests,
            num_finished=self._num_finished,
            num_steps=self._num_steps,
            makespan=makespan,
            output_tokens=output_tokens,
            output_tokens_per_second=output_tokens * rate,
            requests_per_second=self._num_finished * rate,
            goodput=self._num_good * rate,
            ttft=self._ttft.spread(),
            itl=self._itl.spread(),
            e2e=self._e2e.spread(),
            computed_tokens=self._computed,
            useful_tokens=self._useful,
            mean_waiting=self._waiting_seconds * rate,
            slo=self.slo,
            dropped=self.dropped,
        )


class _Progress:
    """The times of one request in progress."""

    __slots__ = ("arrival", "knows_first_token", "first_token", "last_token", "num_tokens")

    def __init__(self, arrival: float):
        self.arrival = arrival
        self.knows_first_token = True
        self.first_token = self.last_token = 0.0
        self.num_tokens = 0

    @property
    def mean_itl(self) -> float:
        """Mean time between tokens; 0 for a single token."""
        return (self.last_token - self.first_token) / max(1, self.num_tokens - 1)


class Tally:
    """Numbers, and how often each came: 16 bytes for each that differs from the one before it."""

    def __init__(self):
        self._values, self._times = array("d"), array("Q")

    def add(self, value: float) -> None:
        """The value came once more."""
        if self._values and self._values[-1] == value:
            self._times[-1] += 1
        else:
            self._values.append(value)
            self._times.append(1)

    def spread(self) -> Spread:
        """Mean and percentiles so far."""
        return _spread(np.array(self._values), np.array(self._times))


def spread(counts: Counter) -> Spread:
    """Mean and percentiles of values counted as value -> how often."""
    return _spread(np.array([*counts.keys()], dtype=float), np.array([*counts.values()], dtype=np.uint64))


def _spread(values: np.ndarray, times: np.ndarray) -> Spread:
    """values [V], each times [V] often."""
    if not times.any():
        return Spread(None, None, None, None, None)
    values, kinds = np.unique(values, return_inverse=True)
    seen = np.bincount(kinds, weights=times)  # whole numbers, exact as floats
    mean = math.fsum(values * seen) / seen.sum()
    seen = seen.cumsum()
    ranks = [math.ceil(seen[-1] * per_cent / 100) for per_cent in (50, 90, 99)]
    return Spread(*map(float, (mean, *values[np.searchsorted(seen, ranks)], values[-1])))
