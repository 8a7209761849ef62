"""One loop for real runs and simulations: requests arrive by the clock, steps are made until all have ended."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import NamedTuple, Protocol, runtime_checkable

from minillm.engine import Request, Scheduler, SchedulerConfig, StepUpdate
from minillm.errors import ConfigError, check_choice, check_kind, checked
from minillm.ladder import DynamicScheduler, StaticScheduler
from minillm.runtime import ModelOutput
from minillm.runtime import SchedulerOutput as Plan
from minillm.simulation.clock import RealClock, VirtualClock
from minillm.simulation.cost_model import CostModel
from minillm.simulation.executor import SimulatedExecutor
from minillm.simulation.reporting import SLO, Report, ReportBuilder, report
from minillm.trace import Trace

BATCHING: Mapping[str, type[Scheduler]] = {
    "static": StaticScheduler,
    "dynamic": DynamicScheduler,
    "continuous": Scheduler,
}
Clock = RealClock | VirtualClock
OnStep = Callable[[Plan, StepUpdate], None]


@runtime_checkable
class Executor(Protocol):
    """What computes a plan: a model, or a simulation of one."""

    def execute_model(self, plan: Plan) -> ModelOutput:
        """New tokens for the requests whose last planned token was computed."""


@checked
def run(
    scheduler: Scheduler,
    executor: Executor,
    requests: Iterable,
    clock: Clock,
    *,
    figures: ReportBuilder | None = None,
    on_step: OnStep | None = None,
) -> Trace | None:
    """Let `requests` arrive at their times and compute until all have ended; returns the scheduler's trace.

    An iterator of requests, in order of arrival, is read as time goes on; other iterables may be in any order.
    `clock` is the scheduler's; a simulated executor advances it, a real one lets it run. `figures` gathers a report
    without a trace. `on_step` is told of every step. Raises PromptError for a request that can never run.
    """
    arriving = in_order(requests)
    upcoming = next(arriving, None)
    while upcoming is not None or scheduler.has_unfinished_requests():
        while upcoming is not None and upcoming.arrival_time <= clock():
            request, upcoming = upcoming, next(arriving, None)
            scheduler.add_request(request)
            if figures is not None:
                for each in (request, *request.children):
                    figures.arrive(each.request_id, request.arrival_time)
        if not scheduler.has_unfinished_requests():
            if upcoming is not None:  # a scheduler may refuse the last one
                clock.advance_to(upcoming.arrival_time)
            continue
        plan = scheduler.schedule()
        updates = scheduler.update(plan, executor.execute_model(plan))
        if figures is not None:
            figures.add(plan, updates, scheduler.just_left, clock(), scheduler.num_waiting())
        if on_step is not None:
            on_step(plan, updates)
    return scheduler.trace


def in_order(requests: Iterable) -> Iterator[Request]:
    """`requests` in order of arrival. An iterator is not read ahead, so it has to be in that order.

    Raises ConfigError, at once or when it comes to it, for what is no request, and for an iterator in another order.
    """
    if not isinstance(requests, Iterator):
        requests = sorted(check_kind("requests", requests, Iterable[Request]), key=attrgetter("arrival_time"))
    return _in_order(requests)


def _in_order(requests: Iterable) -> Iterator[Request]:
    last = -math.inf
    for request in requests:
        check_kind("requests", request, Request)
        if request.arrival_time < last:
            raise ConfigError(
                f"request {request.request_id!r} arrives at {request.arrival_time} s, the one before it at {last} s; "
                "sort them, or give a list, which is sorted here"
            )
        last = request.arrival_time
        yield request


class BatchingRun(NamedTuple):
    """What one way of batching made of the requests."""

    trace: Trace
    report: Report
    requests: list[Request]  # with their outputs


@checked
def compare_batching(
    requests: Iterable[Request],
    config: SchedulerConfig,
    executor: CostModel | Callable[[], Executor],
    *,
    batching: Iterable[str] = tuple(BATCHING),
    slo: SLO = SLO(),  # noqa: B008 - frozen
) -> dict[str, BatchingRun]:
    """The same requests under static, dynamic and continuous batching.

    `executor`: a cost model simulates; a callable makes a real executor for each run, under a real clock. The requests
    given are left as they are: each run gets copies without output.
    """
    for way in batching:
        check_choice("batching", way, tuple(BATCHING))
    runs = {}
    for way in batching:
        clock = RealClock() if callable(executor) else VirtualClock()
        scheduler = BATCHING[way](config, clock)
        copies = [fresh(request) for request in requests]
        run(scheduler, executor() if callable(executor) else SimulatedExecutor(executor, clock), copies, clock)
        runs[way] = BatchingRun(scheduler.trace, report(scheduler.trace, slo), copies)
    return runs


def fresh(request: Request) -> Request:
    """The same request before anything was computed of it."""
    return request.copy()
