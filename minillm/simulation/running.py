"""One loop for real runs and simulations: requests arrive by the clock, steps are made until all have ended."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from minillm.engine import Request, Scheduler, SchedulerConfig, StepUpdate
from minillm.errors import check_choice, checked
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
    requests: Iterable[Request],
    clock: Clock,
    *,
    figures: ReportBuilder | None = None,
    on_step: OnStep | None = None,
) -> Trace | None:
    """Let `requests` arrive at their times and compute until all have ended; returns the scheduler's trace.

    `clock` is the scheduler's; a simulated executor advances it, a real one lets it run. `figures` gathers a report
    without a trace. `on_step` is told of every step. Raises PromptError for a request that can never run.
    """
    pending = sorted(requests, key=lambda request: request.arrival_time)[::-1]  # the next one last, among equals too
    while pending or scheduler.has_unfinished_requests():
        while pending and pending[-1].arrival_time <= clock():
            request = pending.pop()
            scheduler.add_request(request)
            if figures is not None:
                for each in (request, *request.children):
                    figures.arrive(each.request_id, request.arrival_time)
        if not scheduler.has_unfinished_requests():
            clock.advance_to(pending[-1].arrival_time)
            continue
        plan = scheduler.schedule()
        updates = scheduler.update(plan, executor.execute_model(plan))
        if figures is not None:
            figures.add(plan, updates, scheduler.just_left, clock(), scheduler.num_waiting())
        if on_step is not None:
            on_step(plan, updates)
    return scheduler.trace


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
