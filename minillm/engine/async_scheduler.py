"""Asynchronous scheduling: a step is planned, and can be launched, before the tokens of the one before are known.

    host    |plan 1|plan 2|  read 1  |plan 3|  read 2  |plan 4| ...
    device         |----- step 1 ----|----- step 2 ----|----- step 3 ...

A plan needs to know how many tokens there are, not which. So a request counts on as soon as a step with it is planned,
and the token that will be sampled there goes into the next plan as PENDING: the executor puts in what it has sampled.
Nobody knows beforehand that a request ends with an eos, or by its text: then the step after it computes one token for
nothing. An end by length is known.

The executor carries out plans in their order. This is why blocks of a request that has ended can be handed out at once,
though a step in flight still writes into them: their next owner writes later.
"""

from collections import deque
from typing import NamedTuple

from minillm.engine.paged_scheduler import PagedScheduler
from minillm.engine.recorder import MOST_IN_FLIGHT
from minillm.engine.request import Request
from minillm.engine.scheduler import RequestUpdate, _new
from minillm.runtime import ModelOutput, SchedulerOutput
from minillm.trace import Preemption


class StepOrderError(AssertionError):
    """Plans were made, or their results taken in, out of order: a bug, never the user's to fix."""


class InFlight(NamedTuple):
    """A plan whose results have not been taken in."""

    plan: SchedulerOutput
    requests: list[Request]  # one a part: under its id there may be another by now
    preemptions: list[Preemption]


class AsyncScheduler(PagedScheduler):
    """`PagedScheduler` whose `schedule` can be called once more before `update`.

    From `schedule` on a plan is in flight; `update` takes plans in their order. When one is made, at most one other may
    be in flight.
    """

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self._in_flight: deque[InFlight] = deque()

    def schedule(self) -> SchedulerOutput:
        """Decide the next step. A plan without parts is not in flight: there is nothing to launch."""
        if len(self._in_flight) == MOST_IN_FLIGHT:
            raise StepOrderError(f"{MOST_IN_FLIGHT} plans are in flight; update or retract them before the next")
        plan = super().schedule()
        if plan.scheduled:
            self._in_flight.append(InFlight(plan, self._advance(plan), self._preemptions))
        else:
            super().retract(plan)  # what it says to the executor, the next one says
        return plan

    def _advance(self, plan: SchedulerOutput) -> list[Request]:
        """Count as if the step had been computed; returns the request of each part."""
        requests, running = [], self.running
        for request_id, start, token_ids, samples, _, _, _, _ in plan.scheduled:
            request = running[request_id]
            end = start + len(token_ids)
            request.num_computed_tokens = end
            if samples and end + 1 < request.num_tokens_at_most:
                request.num_tokens = end + 1
            requests.append(request)
        return requests

    def update(self, plan: SchedulerOutput, output: ModelOutput) -> list[RequestUpdate]:
        """Take in what the oldest plan in flight brought; returns the new tokens in its order.

        Requests that have ended since it was made are skipped, whatever has their ids now.
        """
        if not self._in_flight or self._in_flight[0].plan is not plan:
            raise StepOrderError(f"the results of step {plan.step} are not the next to be taken in")
        _, requests, self._preemptions = self._in_flight[0]
        updates, ended, discarded = [], [], set()
        running, token_of, failed = self.running, output.token_ids, output.failed
        now = self.last_end = self.clock()
        for request, part in zip(requests, plan.scheduled, strict=True):
            request_id, start, token_ids, samples, _, _, _, _ = part
            if request.finish_reason is not None:
                discarded.add(request_id)
                continue
            if failed and request_id in failed:
                self._fail(request, failed[request_id])
                ended.append(request)
                discarded.add(request_id)
                updates.append(RequestUpdate(request_id, None, "error"))
                continue
            num_computed_tokens = start + len(token_ids)
            if num_computed_tokens >= request.milestone and request_id in running:  # else it has given way
                self._pass_milestone(request, num_computed_tokens)
            if samples:
                token_id = token_of[request_id]
                request.last_token_time = now
                if num_computed_tokens == request.num_prompt_tokens:
                    request.first_token_time = now
                if request.fill_in(token_id):
                    ended.append(request)
                updates.append(_new(RequestUpdate, (request_id, token_id, request.finish_reason)))
        self.just_left = self._left_by_abort + self._end_requests(ended)
        self._left_by_abort = []
        self._in_flight.popleft()
        if self._recorder is not None:
            self._note_step(plan, output, discarded)
        return updates

    def _fail(self, request: Request, why: str) -> None:
        request.finish_reason, request.stop_reason = "error", why
        self._release_children(request)
        self._forget(request, bad=True)

    def _end_requests(self, ended: list[Request]) -> list[str]:
        """Let go of requests that have ended, those too that have given way since; returns their ids."""
        ids = [request.request_id for request in ended]
        for request in ended:
            del self._requests[request.request_id]
            self._release_children(request)  # it may have given way when its prompt had been computed, and not forked
            if request.request_id not in self.running:
                self._forget(request)
                self._record_end(request)
        self._leave([request_id for request_id in ids if request_id in self.running])
        return ids

    def retract(self, plan: SchedulerOutput) -> None:
        """A step failed, `plan` or another: nothing comes of all that are in flight. See `PagedScheduler.retract`.

        A later step needs what an earlier one computes, so that they fail together. It may have been carried out behind
        the failed one all the same: an executor takes in the block tables of a plan before anything of it can fail, and
        so what the later one wrote went into blocks of requests that are retracted here.
        """
        for launched, requests, _ in reversed(self._in_flight):
            for request, part in zip(requests, launched.scheduled, strict=True):
                if request.finish_reason is None:
                    request.num_tokens = request.num_known_tokens
                    request.num_computed_tokens = min(request.num_computed_tokens, part.start)
        while self._in_flight:
            newest, _, self._preemptions = self._in_flight.pop()
            super().retract(newest)
