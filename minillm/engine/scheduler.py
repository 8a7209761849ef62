"""Who computes how many tokens in the next step: continuous batching under a token budget (Yu et al. 2022, Orca;
chunked prefill beside decodes: Agrawal et al. 2023, Sarathi).

A step is three calls, and the plan between them is plain data, so the same scheduler drives a real model, a simulator
and a worker in another process:

    plan = scheduler.schedule()
    output = executor.execute_model(plan)
    updates = scheduler.update(plan, output)
"""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from minillm.engine.queue import POLICIES, WaitingQueue
from minillm.engine.recorder import Recorder
from minillm.engine.request import Request
from minillm.errors import ConfigError, Positive, PromptError, check_choice, check_fields, check_number, checked
from minillm.runtime import ModelOutput, ScheduledRequest, SchedulerOutput
from minillm.trace import Trace

_new = tuple.__new__  # makes a NamedTuple in a third of the time; for the lines that run once a token


@dataclass(frozen=True)
class SchedulerConfig:
    """What a scheduler reads: the limits of a step."""

    max_num_seqs: Positive = 64  # requests that run at the same time
    max_num_batched_tokens: Positive = 512  # tokens pushed through the model in one step: the token budget
    max_model_len: Positive = 2048  # prompt and output tokens of one request
    scheduling_policy: str = "fcfs"  # "fcfs", "priority" or "sjf"
    ageing: float = 1.0  # rank units a waiting request gains a second (see WaitingQueue)
    enable_chunked_prefill: bool = True  # False: a prompt is computed in one step or waits

    def __post_init__(self):
        check_fields(self)
        self.check_limits()

    def check_limits(self) -> None:
        """Raises ConfigError for an unknown policy, or limits that contradict each other."""
        check_choice("scheduling_policy", self.scheduling_policy, POLICIES)
        check_number("ageing", self.ageing, "positive, or a request could wait for ever", lambda ageing: ageing > 0)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs ({self.max_num_seqs}): "
                "running requests would have to skip steps; raise the budget or lower max_num_seqs"
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"without chunked prefill a prompt of up to {self.max_model_len} tokens must fit one step of "
                f"{self.max_num_batched_tokens}; raise max_num_batched_tokens or enable chunked prefill"
            )


class RequestUpdate(NamedTuple):
    """What a step brought for one request."""

    request_id: str
    token_id: int | None  # None if it failed instead
    finish_reason: str | None


class BaseScheduler:
    """What all ways of batching share: arrival, the end, taking in results, the trace. They differ in `schedule`."""

    @checked
    def __init__(
        self,
        config: SchedulerConfig,
        clock: Callable[[], float] | None = None,
        trace: bool = True,
        *,
        max_trace_steps: Positive | None = None,
    ):
        """`clock` tells seconds, by default those since the scheduler was made; requests arrive by the same clock.

        `trace` records the steps: the last `max_trace_steps`, or all.
        """
        self.config = config
        self.clock = seconds_from_now() if clock is None else clock
        self._host_time_at_zero = host_time_at_zero(self.clock)
        self.waiting = WaitingQueue(config.scheduling_policy, config.ageing)
        self.running: dict[str, Request] = {}  # in order of admission
        self.just_left: list[str] = []  # left the batch with a result in the last update
        self.last_end = -math.inf  # when the results of the last step were read
        self._last_traced_end = -math.inf  # of the step before
        self._recorder = Recorder(max_trace_steps) if trace else None
        self._requests: dict[str, Request] = {}  # all that have not ended
        self._left_by_abort: list[str] = []  # left with a result since the last update, freed by an abort
        self._left: list[str] = []  # have left the batch since the last plan
        self._step = 0

    @property
    def trace(self) -> Trace | None:
        """The log so far, which does not grow afterwards; None if none is kept. Events are made when somebody looks: a
        running engine has no time to.
        """
        return None if self._recorder is None else self._recorder.trace

    @checked(error=PromptError)
    def add_request(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises PromptError if it can never run or its id is taken, SamplingParamsError if `min_tokens` do not fit.
        """
        self.check(request)
        self._arrive(request)
        self.waiting.push(request)

    @property
    def most_tokens(self) -> int:
        """Prompt and output tokens that a request can have."""
        return self.config.max_model_len

    def check(self, request: Request) -> None:
        """Change nothing but a request without `max_tokens`: it gets as many as fit. Raises as `add_request` would."""
        request.limit(self.most_tokens)
        limit = self.config.max_model_len
        if request.num_tokens_at_most > limit:
            raise PromptError(
                f"request {request.request_id!r} may grow to {request.num_tokens_at_most} tokens "
                f"({request.num_prompt_tokens} prompt + max_tokens {request.params.max_tokens}), max_model_len is "
                f"{limit}; shorten the prompt or lower max_tokens"
            )
        request_id = request.request_id
        if request_id in self._requests or request_id in self.running or request_id in self._left_by_abort:
            raise PromptError(id_in_use(request_id))  # who has ended in a batch that goes on is not done with either

    def _arrive(self, request: Request) -> None:
        self._requests[request.request_id] = request
        if self._recorder is not None:
            self._recorder.arrive(request, self._step)

    def has_unfinished_requests(self) -> bool:
        """True while anything waits or runs."""
        return bool(self._requests)

    def num_waiting(self) -> int:
        """Requests that have arrived and do not run."""
        return len(self._requests) - len(self.running)

    @checked(error=PromptError)
    def abort_request(self, request_id: str) -> bool:
        """End a request without further output; False, and no effect, if it is unknown or has ended."""
        return self.end_request(request_id, "abort")

    def end_request(self, request_id: str, finish_reason: str, stop_reason: int | str | None = None) -> bool:
        """End a request from outside, with the reason given: "abort", or "stop" for a stop string in its text.

        False, and no effect, if it is unknown or has ended. Between two steps, or while one is computed.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        request.finish_reason, request.stop_reason = finish_reason, stop_reason
        if request_id in self.running:
            left = self._leave([request_id])
        else:
            left = []
            self._record_end(request)
        if finish_reason == "abort":
            self._left_by_abort += left
        elif left or finish_reason == "stop":  # it may have given way after the step that computed its last token
            self._record_late_end(request_id)
        return True

    def schedule(self) -> SchedulerOutput:
        """Decide the next step."""
        raise NotImplementedError

    def update(self, plan: SchedulerOutput, output: ModelOutput) -> list[RequestUpdate]:
        """Take in what a step computed; returns the new tokens in the plan's order.

        Requests that were aborted while the step ran are skipped.
        """
        updates, ended, discarded = [], [], set()
        running, token_of, failed = self.running, output.token_ids, output.failed
        now = self.last_end = self.clock()
        for part in plan.scheduled:
            request_id, start, token_ids, samples, _, _, _, _ = part
            request = running.get(request_id)
            if request is None or request.finish_reason is not None:
                discarded.add(request_id)  # aborted meanwhile; a new request of the same id would still be waiting
                continue
            if failed and request_id in failed:
                request.finish_reason, request.stop_reason = "error", failed[request_id]
                ended.append(request_id)
                discarded.add(request_id)
                updates.append(RequestUpdate(request_id, None, "error"))
                continue
            num_computed_tokens = start + len(token_ids)
            request.num_computed_tokens = num_computed_tokens
            if num_computed_tokens >= request.milestone:
                self._pass_milestone(request, num_computed_tokens)
            if samples:
                token_id = token_of[request_id]
                request.last_token_time = now
                if num_computed_tokens == request.num_prompt_tokens:
                    request.first_token_time = now
                if request.append(token_id):
                    ended.append(request_id)
                updates.append(_new(RequestUpdate, (request_id, token_id, request.finish_reason)))
        for request_id in ended:
            del self._requests[request_id]
        self.just_left = self._left_by_abort + (self._leave(ended) if ended else [])
        self._left_by_abort = []
        if self._recorder is not None:
            self._note_step(plan, output, discarded)
        return updates

    # --- the parts of a step ---

    def _new_plan(self) -> SchedulerOutput:
        plan = SchedulerOutput(self._step, self.clock(), finished_ids=self._left)
        self._left = []
        self._step += 1
        return plan

    def _add(self, plan: SchedulerOutput, request: Request, budget: int) -> int:
        """Plan the next tokens of a request, as many as the budget allows; returns how many."""
        start = request.num_computed_tokens
        end = min(request.num_tokens, start + budget)
        if end == start:
            return 0
        token_ids = request.token_ids(start, end)
        why = "prefill" if start < request.num_prompt_tokens else "decode"
        samples = end == request.num_tokens
        plan.scheduled.append(ScheduledRequest(request.request_id, start, token_ids, samples, why))
        plan.num_tokens += end - start
        return end - start

    def _pass_milestone(self, request: Request, num_computed_tokens: int) -> None:
        """At least `request.milestone` tokens have been computed; only schedulers that set milestones get here."""
        raise NotImplementedError

    def _next_waiting(self) -> Request | None:
        """The request whose turn it is, left in the queue; None if nobody waits. Drops aborted ones on the way."""
        while len(self.waiting):
            request = self.waiting.peek()
            if request.finish_reason is None:
                return request
            self.waiting.pop()
        return None

    def _admit(self, plan: SchedulerOutput) -> Request:
        """The next waiting request becomes a running one."""
        request = self.waiting.pop()
        self.running[request.request_id] = request
        plan.new_requests.append(request.announcement())
        return request

    def _leave(self, ended: list[str]) -> list[str]:
        """Requests have ended: take them out of the batch; returns those that left it with a result, not by abort."""
        left = [self.running.pop(request_id) for request_id in ended]
        self._left += ended
        for request in left:
            self._record_end(request)
        return [request.request_id for request in left if request.finish_reason != "abort"]

    # --- what the trace will say ---

    def _note_step(self, plan: SchedulerOutput, output: ModelOutput, discarded: Collection[str]) -> None:
        """Keep what the trace will say of the step.

        Steps in the trace do not overlap: one that was planned before the last one's end starts there. Nothing came of
        the parts of `discarded` requests.
        """
        zero = self._host_time_at_zero
        start = max(plan.start_time, self._last_traced_end)
        self._last_traced_end = self.last_end
        fields = {
            "start_time": start,
            "end_time": self.last_end,
            "num_waiting": self.num_waiting(),
            "score_entries": output.score_entries,
            "cached_tokens": sum([request.num_computed_tokens for request in self.running.values()]),
            "planned": None if start == plan.start_time else plan.start_time,
            "launched": plan.launched,
            "device": None if output.device_times is None else tuple(moment - zero for moment in output.device_times),
            **self._traced_memory(plan),
        }
        self._recorder.note(plan, discarded, self.just_left, fields)

    def _traced_memory(self, plan: SchedulerOutput) -> dict:
        """Further fields of the step's event."""
        return {}

    def _record_end(self, request: Request) -> None:
        """A request has ended, and left the batch if it was in it."""
        if self._recorder is not None:
            ran = request.num_computed_tokens > 0 or request.num_ever_computed > 0 or request.num_preemptions > 0
            self._recorder.end(request.request_id, ran)

    def _record_late_end(self, request_id: str) -> None:
        if self._recorder is not None:
            self._recorder.end_late(request_id)


def id_in_use(request_id: str) -> str:
    """Why a request of this id is refused."""
    return f"request id {request_id!r} is in use; give each request its own, or wait for the last output of that one"


def seconds_from_now() -> Callable[[], float]:
    """A clock that begins at 0."""
    began = time.perf_counter()
    return lambda: time.perf_counter() - began


def host_time_at_zero(clock: Callable[[], float]) -> float:
    """What time.perf_counter says when the clock says 0: devices tell their times by that."""
    now = clock()
    return time.perf_counter() - now


class Scheduler(BaseScheduler):
    """Continuous batching: requests join and leave between any two steps; a step costs O(requests it schedules).

    Running requests come first, in order of admission: each decodes one token or computes the next chunk of its
    prompt. What is left of the budget admits waiting requests in the order of the policy.
    """

    def schedule(self) -> SchedulerOutput:
        """Decide the next step; requests advance in `update`, once it has run.

        A prompt that did not fit used up the budget, so only the request admitted last can be inside its prompt: going
        through the running ones in order of admission serves the decodes first.
        """
        plan = self._new_plan()
        budget = self.config.max_num_batched_tokens
        for request in self.running.values():
            budget -= self._add(plan, request, budget)
        while budget > 0 and len(self.running) < self.config.max_num_seqs:
            request = self._next_waiting()
            if request is None or not self._fits(request, budget):
                break
            budget -= self._add(plan, self._admit(plan), budget)
        return plan

    def _fits(self, request: Request, budget: int) -> bool:
        return self.config.enable_chunked_prefill or request.num_tokens <= budget
