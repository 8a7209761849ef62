"""Asynchronous scheduling: the next step is launched before the last one is read, and every request says the same."""

from collections import Counter

import pytest

from minillm.engine.async_scheduler import AsyncScheduler, InFlight
from minillm.engine.block_manager import BlockManager
from minillm.engine.paged_scheduler import PREEMPTION_MODES, PagedScheduler
from minillm.engine.scheduler import SchedulerConfig
from minillm.runtime.plan import PENDING, ModelOutput
from minillm.simulation.clock import VirtualClock
from minillm.simulation.workload import made_request
from test_engine_machine import EngineMachine, FakeExecutor, StepFailed, run

# --- the engine's promises, with a step in flight --------------------------------------------------------------------


class AsyncMachine(EngineMachine):
    """As `EngineMachine`; between two rules one step may be in flight, and while it is, the next one is planned."""

    scheduler_class = AsyncScheduler
    executor_class = FakeExecutor
    policy = "fcfs"

    def __init__(self):
        super().__init__()
        self.discarded = Counter()  # parts of a request that were computed for nothing
        self.stopped = set()  # requests that were stopped from outside, at any moment

    def schedule(self):
        scheduler, advance = self.scheduler, type(self.scheduler)._advance

        def checked(plan):
            super(AsyncMachine, self).check_parts(plan)
            return advance(scheduler, plan)

        scheduler._advance = checked  # parts are checked before the requests go on as if they had been computed
        plan = super().schedule()
        self.seen["planned with one unread"] += len(self.launched)
        self.seen["pending"] += sum(PENDING in part.token_ids for part in plan.scheduled)
        self.seen["gave way with one unread"] += len(self.launched) * len(plan.preempted_ids)
        return plan

    def check_parts(self, plan):
        for part in plan.scheduled:
            request = self.scheduler.running[part.request_id]
            assert request.num_computed_tokens == part.start + len(part.token_ids)
            assert request.num_tokens - request.num_known_tokens <= len(self.launched) + 1

    def check_limits(self, plan):
        if self.launched and not plan.scheduled:
            self.seen["nothing to launch"] += 1
        else:
            super().check_limits(plan)

    def compute(self, plan, meanwhile=lambda: None):
        """Launch the plan, and then read the one before; if there is nothing to launch, read what there is."""
        if plan.scheduled:
            self.launch(plan)
        meanwhile()
        if len(self.launched) == 2 or not plan.scheduled:
            self.read()

    def go_on_to(self, plan):
        while self.launched[0].plan is not plan:
            self.read()
        behind = self.schedule()
        if behind.scheduled:
            self.launch(behind)

    def take_in(self, launched):
        for part, request in zip(launched.plan.scheduled, launched.requests, strict=True):
            if request.finish_reason is not None:
                self.discarded[request] += 1
                self.seen["discarded"] += 1
                self.seen["discarded, and the id in use again"] += part.request_id in self.expected
            else:
                self.seen["read after giving way"] += part.request_id not in self.scheduler.running
        super().take_in(launched)
        for request in set(launched.requests) - self.stopped:
            if request.finish_reason in ("length", "stop", "error"):
                assert self.discarded[request] <= (request.finish_reason != "length")

    def stop(self, which):
        before = {expected.request for expected in self.expected.values()}
        super().stop(which)
        self.stopped |= before - {expected.request for expected in self.expected.values()}

    def fail(self, plan, which):
        """At the launch, with the one before unread; or when it is computed: then one more has been launched."""
        if not plan.scheduled:
            return self.compute(plan)
        self.executor.fail_after = which // 2 + which % 2  # block tables come first, and with them nothing fails
        with pytest.raises(StepFailed):
            self.executor.execute_model(plan)
        if which % 2:
            while self.launched:
                self.read()
            self.carry_out_behind_a_failed_step(self.scheduler.schedule())
        involved = {part.request_id for part in plan.scheduled}
        involved |= {part.request_id for launched in self.launched for part in launched.plan.scheduled}
        self.seen["failed with one unread"] += len(self.launched)
        self.launched.clear()
        self.scheduler.retract(plan)
        self.seen["failed step"] += 1
        assert not involved & set(self.scheduler.running)

    def carry_out_behind_a_failed_step(self, plan):
        """Whatever comes of it, and however far it gets, it must not touch what others have."""
        try:
            self.executor.execute_model(plan)
        except (AssertionError, LookupError):
            self.seen["failed behind a failed step"] += 1
        else:
            self.seen["carried out behind a failed step"] += 1


PATHS = {"planned with one unread", "pending", "gave way with one unread", "read after giving way", "discarded"}
PATHS |= {"discarded, and the id in use again", "nothing to launch", "failed step", "failed with one unread"}
PATHS |= {"carried out behind a failed step", "failed behind a failed step"}
PATHS |= {"chunk", "prefix hit", "copy", "length", "stop", "error", "abort", "reset"}


@pytest.mark.parametrize("preemption_mode", PREEMPTION_MODES)
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_engine_keeps_its_promises_with_a_step_in_flight(policy, preemption_mode):
    seen = Counter()
    machine = type("Machine", (AsyncMachine,), {"policy": policy, "preemption_mode": preemption_mode, "seen": seen})
    run(machine, 80)
    paths = PATHS | ({"swap_out", "swap_in"} if preemption_mode == "swap" else set())
    assert paths <= set(+seen), f"the machine did not get everywhere: {paths - set(+seen)}, {seen}"


def test_a_parent_that_gives_way_before_its_fork_leaves_nobody_behind():
    """Its prompt has been computed in the step that nobody has read when it is swapped out."""
    machine = type("M", (AsyncMachine,), {"policy": "priority", "preemption_mode": "swap", "seen": Counter()})()
    machine.begin(2, 4, 12, False, "SHA-256", 4, 0, True, 0)
    machine.add(2, 0, 2, [], 2, 2, 0, [{"arrival_time": 0}] * 2, 0, "", ())
    machine.run_to_the_end()
    machine.patch.undo()
    assert machine.seen["swap_in"] and machine.seen["length"] == 4, machine.seen


# --- planted bugs ----------------------------------------------------------------------------------------------------


class CommitsWhatIsInFlight(AsyncScheduler):
    def _advance(self, plan):
        requests = super()._advance(plan)
        for request in requests:
            self.block_manager.commit(request, min(request.num_computed_tokens, request.num_known_tokens))
        return requests


class GoesByTheId(AsyncScheduler):
    def update(self, plan, output):
        _, requests, preemptions = self._in_flight[0]
        now = [self._requests.get(request.request_id, request) for request in requests]
        self._in_flight[0] = InFlight(plan, now, preemptions)
        return super().update(plan, output)


class LeavesThePlaceholderAfterAFailure(AsyncScheduler):
    def retract(self, plan):
        while self._in_flight:
            PagedScheduler.retract(self, self._in_flight.pop().plan)


class RetractsTheFailedPlanAlone(AsyncScheduler):
    def retract(self, plan):
        PagedScheduler.retract(self, plan)
        self._in_flight.clear()


class PlansBeyondTheLastToken(AsyncScheduler):
    def _advance(self, plan):
        requests = super()._advance(plan)
        for request, part in zip(requests, plan.scheduled, strict=True):
            request.num_tokens += part.samples and request.num_tokens == request.num_computed_tokens
        return requests


class ForgetsWhoGaveWay(AsyncScheduler):
    def _end_requests(self, ended):
        return super()._end_requests([request for request in ended if request.request_id in self.running])


class LosesWhatAnEmptyPlanSays(AsyncScheduler):
    def schedule(self):
        plan = super().schedule()
        if not plan.scheduled:
            self._left.clear()
            self._void.clear()
        return plan


class CountsTheStepInFlight(AsyncScheduler):
    """Registers blocks, and forks, by what the next step will have computed."""

    def _pass_milestone(self, request, num_computed_tokens):
        super()._pass_milestone(request, request.num_computed_tokens)


class FeedsTheNeighboursToken(FakeExecutor):
    def execute_model(self, plan):
        output = super().execute_model(plan)
        names = list(output.token_ids)
        shifted = [output.token_ids[name] for name in names[1:] + names[:1]]
        self.last = output._replace(token_ids=dict(zip(names, shifted, strict=True)))
        return output


PLANTED = [(broken, "recompute") for broken in (CommitsWhatIsInFlight, GoesByTheId, LeavesThePlaceholderAfterAFailure)]
PLANTED += [(broken, "recompute") for broken in (RetractsTheFailedPlanAlone, PlansBeyondTheLastToken)]
PLANTED += [(broken, "recompute") for broken in (ForgetsWhoGaveWay, CountsTheStepInFlight, FeedsTheNeighboursToken)]
PLANTED += [(LosesWhatAnEmptyPlanSays, "swap")]


@pytest.mark.parametrize("broken, preemption_mode", PLANTED)
def test_every_planted_bug_is_found(broken, preemption_mode):
    part = "executor_class" if issubclass(broken, FakeExecutor) else "scheduler_class"
    machine = type("BrokenMachine", (AsyncMachine,), {part: broken, "preemption_mode": preemption_mode})
    with pytest.raises((AssertionError, LookupError)):
        run(machine, 1000)


def test_a_request_knows_when_its_first_and_its_last_token_were_read():
    clock = VirtualClock()
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=4)
    scheduler = AsyncScheduler(config, BlockManager(9, 4), clock=clock)
    request = made_request("a", 0.0, 6, 3)
    scheduler.add_request(request)
    times, launched = [], [scheduler.schedule()]
    while launched:
        plan = scheduler.schedule()
        launched += [plan] if plan.scheduled else []
        clock.advance(1.0)
        plan = launched.pop(0)
        scheduler.update(plan, ModelOutput({part.request_id: 7 for part in plan.scheduled if part.samples}, 0))
        times.append((request.first_token_time, request.last_token_time))
    assert times == [(None, None), (2.0, 2.0), (2.0, 3.0), (2.0, 4.0)]
    assert [step.planned for step in scheduler.trace.steps] == [None, 0.0, 1.0, 2.0]
