"""Who computes how many tokens in the next step: continuous batching under a token budget (Yu et al. 2022, Orca;
chunked prefill beside decodes: Agrawal et al. 2023, Sarathi), on blocks of cache that are handed out as tokens come
(Kwon et al. 2023, PagedAttention, sections 4.3 to 4.5).

A step is three calls, and the plan between them is plain data, so the same scheduler drives a real model, a simulator
and a worker in another process:

    plan = scheduler.schedule()
    output = executor.execute_model(plan)
    updates = scheduler.update(plan, output)

With a depth of 2 a step is planned, and can be launched, before the tokens of the one before are read:

    host    |plan 1|plan 2|  read 1  |plan 3|  read 2  |plan 4| ...
    device         |----- step 1 ----|----- step 2 ----|----- step 3 ...

A plan needs to know how many tokens there are, not which. So a request's counts advance as soon as a step with it is
planned: the executor keeps what it has sampled. An end by length is known. An end by an eos or by the text is not known
beforehand: then one token of the next step is wasted.

The executor carries out plans in their order. This is why blocks of a request that has ended can be handed out at once,
though a step in flight still writes into them: their next owner writes later.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import NamedTuple

from minillm.costs import blocks_needed
from minillm.engine.block_manager import BlockManager, Growth
from minillm.engine.queue import SCHEDULING_POLICIES, WaitingQueue
from minillm.engine.recorder import MOST_IN_FLIGHT, Recorder
from minillm.engine.request import Request, output_id
from minillm.errors import (
    ConfigError,
    Positive,
    PromptError,
    check_choice,
    check_fields,
    check_number,
    checked,
)
from minillm.runtime import ModelOutput, ScheduledRequest, SchedulerOutput
from minillm.trace import Preemption, Trace

PREEMPTION_MODES = ("recompute", "swap")
ADMISSIONS = ("continuous", "static")  # what `Scheduler.batching` may be


class StepOrderError(AssertionError):
    """Plans were made, or their results taken in, out of order: a bug, never the user's to fix."""


@dataclass(frozen=True)
class SchedulerConfig:
    """What a scheduler reads: the limits of a step."""

    max_num_seqs: Positive = 64  # requests that run at the same time
    max_num_batched_tokens: Positive = 512  # tokens pushed through the model in one step: the token budget
    max_model_len: Positive = 2048  # prompt and output tokens of one request
    scheduling_policy: str = "fcfs"  # "fcfs", "priority" or "sjf"
    ageing: float = 1.0  # rank units a waiting request gains per second (see WaitingQueue)
    enable_chunked_prefill: bool = True  # False: a prompt is computed in one step or waits

    def __post_init__(self):
        check_fields(self)
        self.check_limits()

    def check_limits(self) -> None:
        """Raises ConfigError for an unknown policy, or limits that contradict each other."""
        check_choice("scheduling_policy", self.scheduling_policy, SCHEDULING_POLICIES)
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


@dataclass(frozen=True, slots=True)
class StepUpdate:
    """What a step brought. Iterating gives a `RequestUpdate` for each request.

    Few callers need an object per token, and making 256 of them takes 0.07 ms.
    """

    token_ids: Mapping[str, int | None]  # request id -> its token, None if it failed
    finish_reasons: Mapping[str, str]  # of those that ended

    def __len__(self) -> int:
        return len(self.token_ids)

    def __iter__(self) -> Iterator[RequestUpdate]:
        for request_id, token_id in self.token_ids.items():
            yield RequestUpdate(request_id, token_id, self.finish_reasons.get(request_id))


class InFlight(NamedTuple):
    """A plan whose results have not been taken in."""

    plan: SchedulerOutput
    requests: list[Request]  # of each part: another request may have its id by now
    preemptions: list[Preemption]


class Scheduler:
    """Continuous batching: requests join and leave between any two steps; a step costs O(requests it schedules).

    Running requests come first, in order of admission: each decodes one token or computes the next chunk of its prompt.
    What is left of the budget admits waiting requests in the order of the policy.

    A request computes only tokens that it has blocks for. When blocks run out, the running request that the policy
    would serve last is preempted: it waits again at its old place, and later its keys and values are computed again
    ("recompute") or copied back from host memory ("swap"); neither changes its output. A request is admitted when there
    are blocks for all its current tokens and `watermark`, a share of the pool, is left over for running requests.
    Otherwise it would soon be preempted.
    """

    @checked
    def __init__(
        self,
        config: SchedulerConfig,
        clock: Callable[[], float] | None = None,
        trace: bool = True,
        *,
        block_manager: BlockManager | None = None,
        depth: Positive = 1,
        max_trace_steps: Positive | None = None,
        preemption_mode: str = "recompute",
        watermark: float = 0.01,
    ):
        """`clock` tells seconds, by default those since the scheduler was made; requests arrive by the same clock.

        Without a `block_manager` the cache is contiguous, a row for each running request: blocks of `max_model_len`
        tokens, one per request, which never run out. `depth`: plans that may be in flight, 1 or 2. `trace` records the
        steps: the last `max_trace_steps`, or all. Raises ConfigError for an unknown mode, depth or watermark.
        """
        check_choice("preemption_mode", preemption_mode, PREEMPTION_MODES)
        check_number("watermark", watermark, "a share of the pool, in [0, 1)", lambda share: 0 <= share < 1)
        check_choice("depth", depth, tuple(range(1, MOST_IN_FLIGHT + 1)))
        self.config = config  # may be replaced between two steps; running requests go on, whatever the new limits
        self.batching = "continuous"  # or "static", see `_may_join`
        self._batch_is_open = True  # when static: the batch may still be joined
        self.clock = seconds_from_now() if clock is None else clock
        self.depth = depth
        self.is_paged = block_manager is not None
        self.block_manager = block_manager or rows_of(config)
        self.preemption_mode = preemption_mode
        self.num_reserved_blocks = math.ceil(watermark * self.block_manager.num_blocks) if self.is_paged else 0
        self.waiting = WaitingQueue(config.scheduling_policy, config.ageing)
        self.running: dict[str, Request] = {}  # in order of admission; the executor knows these
        self.just_left: list[str] = []  # left the batch with a result in the last update
        self.last_end = -math.inf  # when the results of the last step were read
        self._unfinished: dict[str, Request] = {}
        self._forked: dict[str, Request] = {}  # wait with blocks of their parent's prompt
        self._in_flight: deque[InFlight] = deque()
        self._out_of_batch: list[str] = []  # since the last plan: the executor must forget them
        self._freed_by_abort: list[
            str
        ] = []  # left the batch with a result, since the last update, when another aborted
        self._preemptions: list[Preemption] = []  # in the plan being made, or whose results are taken in
        self._untraced_preemptions: list[Preemption] = []  # in plans that failed: the next event tells of them
        self.recorder = Recorder(max_trace_steps) if trace else None
        self._host_time_at_zero = host_time_at_zero(self.clock)
        self._last_traced_end = -math.inf  # of the step before
        self._next_step = 0

    @property
    def trace(self) -> Trace | None:
        """The log so far, which does not grow afterwards; None if none is kept. Events are made on request: making
        them costs a running engine time.
        """
        return None if self.recorder is None else self.recorder.trace

    def has_unfinished_requests(self) -> bool:
        """True while anything waits or runs."""
        return bool(self._unfinished)

    @property
    def num_unfinished(self) -> int:
        """Requests that have arrived and not ended, each further output of a prompt as one."""
        return len(self._unfinished)

    def unfinished_ids(self) -> tuple[str, ...]:
        """The same by their ids, in order of arrival."""
        return tuple(self._unfinished)

    def num_waiting(self) -> int:
        """Requests that have arrived and do not run."""
        return len(self._unfinished) - len(self.running)

    def reset_prefix_cache(self) -> int:
        """Forget all cached prefixes; returns how many blocks became free."""
        return self.block_manager.reset_prefix_cache()

    # --- requests come and go ---

    @checked(error=PromptError)
    def add_request(self, request: Request) -> None:
        """Queue a request, and with `params.n` > 1 its other outputs.

        These are requests of their own, "id.1" to "id.(n-1)", that join when the prompt has been computed.
        Raises PromptError if it can never run or an id is taken, SamplingParamsError if `min_tokens` do not fit.
        """
        request.children = children_of(request) if self.is_paged else []
        family = (request, *request.children)
        for each in family:
            self.check(each)
        for each in family:
            self._unfinished[each.request_id] = each
            if self.recorder is not None:
                self.recorder.arrive(each, self._next_step)
        self.waiting.push(request)

    def check(self, request: Request) -> None:
        """Raise what `add_request` would. Changes only a request without `max_tokens`: it gets as many as fit."""
        limit, blocks = self.config.max_model_len, self.block_manager
        num_blocks, block_size = blocks.num_blocks - 1, blocks.block_size
        request.limit(min(limit, num_blocks * block_size + 1))  # the last token is never fed back
        asked = f"{request.num_prompt_tokens} prompt + max_tokens {request.params.max_tokens}"
        if request.num_tokens_at_most > limit:
            raise PromptError(
                f"request {request.request_id!r} may grow to {request.num_tokens_at_most} tokens ({asked}), "
                f"max_model_len is {limit}; shorten the prompt or lower max_tokens"
            )
        needed = blocks_needed(request.num_tokens_at_most - 1, block_size)
        if needed > num_blocks:
            raise PromptError(
                f"request {request.request_id!r} may need {needed} blocks for {request.num_tokens_at_most - 1} tokens "
                f"({asked} - 1), the pool has {num_blocks} of {block_size} tokens; lower max_tokens or raise num_blocks"
            )
        request_id = request.request_id
        if request_id in self._unfinished or request_id in self.running or request_id in self._freed_by_abort:
            raise PromptError(id_in_use(request_id))  # also of one that has ended in a batch that goes on

    @checked(error=PromptError)
    def abort_request(self, request_id: str) -> bool:
        """End a request without further output; False, and no effect, if it is unknown or has ended."""
        return self.end_request(request_id, "abort")

    def end_request(self, request_id: str, finish_reason: str, stop_reason: int | str | None = None) -> bool:
        """End a request from outside, with the reason given: "abort", or "stop" for a stop string in its text.

        "abort" ends the other outputs of its prompt as well; once it has ended itself, they are requests like any other
        and are ended by their own ids. False, and no effect, if it is unknown or has ended. Between two steps, or while
        one is in flight.
        """
        request = self._unfinished.pop(request_id, None)
        if request is None:
            return False
        request.end(finish_reason, stop_reason)
        left = self._leave([request])
        if finish_reason == "abort":
            self._freed_by_abort += left
            for child in request.children:
                if self._unfinished.get(child.request_id) is child:  # else it has ended, and its id is free
                    self.end_request(child.request_id, "abort")
            return True
        if self.recorder is not None and (left or finish_reason == "stop"):
            self.recorder.end_late(request_id)  # its last token came before its text was read
        self._release_children(request)
        return True

    def _leave(self, ended: list[Request]) -> list[str]:
        """Requests have ended: they give back what they hold; returns those that left with a result, not by abort."""
        for request in ended:
            self._give_back(request)
            if self.running.get(request.request_id) is request:
                del self.running[request.request_id]
                self._out_of_batch.append(request.request_id)
        return [request.request_id for request in ended if request.finish_reason != "abort"]

    def _give_back(self, request: Request) -> None:
        self.block_manager.free(request)
        self._forked.pop(request.request_id, None)
        if self.recorder is not None:
            ran = request.num_computed_tokens > 0 or request.num_ever_computed > 0 or request.num_preemptions > 0
            self.recorder.end(request.request_id, ran)

    # --- the plan ---

    def schedule(self) -> SchedulerOutput:
        """Decide the next step; returns its plan. Requests count what it will compute as computed.

        A plan without parts is not in flight: there is nothing to compute. Raises StepOrderError if `depth` plans are
        in flight already.
        """
        if len(self._in_flight) == self.depth:
            raise StepOrderError(f"{self.depth} plans are in flight; update or retract them before the next")
        plan = SchedulerOutput(self._next_step, self.clock(), finished_ids=self._out_of_batch)
        self._next_step += 1
        self._out_of_batch, self._preemptions = [], []
        self._fill(plan)
        if plan.num_requests:
            request_ids = (*plan.decodes, *[part.request_id for part in plan.others])
            requests = list(map(self.running.__getitem__, request_ids))
            self._in_flight.append(InFlight(plan, requests, self._preemptions))
        else:
            self._retract(plan)  # what it would tell the executor, the next one tells
        return plan

    def _fill(self, plan: SchedulerOutput) -> None:
        """Running requests first, then, unless one had to be preempted, new ones."""
        for request in self._add_plain_decodes(plan):
            if request.request_id in self.running:  # else it has been preempted
                self._add(plan, request, max(0, self.config.max_num_batched_tokens - plan.num_tokens))
        if not self._preemptions and (self.batching == "continuous" or self._may_join()):
            self._admit_waiting(plan)
            self._batch_is_open = plan.num_tokens >= self.config.max_num_batched_tokens  # it was cut by the budget

    def _may_join(self) -> bool:
        """Static batching: none joins while one of the batch runs; places of ended requests stay empty until then.

        A batch that the budget has cut is filled further in the next step. Unlike the static batches of chapter 5 these
        compute no padding, and each request leaves with its own last token.
        """
        self._batch_is_open = self._batch_is_open or not self.running
        return self._batch_is_open

    def _add_plain_decodes(self, plan: SchedulerOutput) -> list[Request]:
        """Plan one token for every running request that needs no more than that: no new block, no end of a prompt.

        Returns the others, in order of admission. In the steady state all but one in `block_size` are planned here.
        """
        others, decodes = [], plan.decodes
        for request_id, request in self.running.items():
            start = request.num_computed_tokens
            if start < request.plain_until:
                decodes[request_id] = start
                request.num_computed_tokens = start + 1
                if start + 2 < request.num_tokens_at_most:
                    request.num_tokens = start + 2
            else:
                others.append(request)
        plan.num_tokens = len(decodes)
        return others

    def _admit_waiting(self, plan: SchedulerOutput) -> None:
        """A prompt that does not fit the budget uses it up: only the request admitted last can be inside its prompt."""
        while (budget := self.config.max_num_batched_tokens - plan.num_tokens) > 0:
            request = self._next_waiting() if len(self.running) < self.config.max_num_seqs else None
            if request is None or not self._fits(request, budget) or not self._admit(plan, request):
                return
            self._add(plan, request, budget, whole_table=True)

    def _next_waiting(self) -> Request | None:
        """The request whose turn it is, left in the queue; None if none waits. Drops aborted ones on the way."""
        while len(self.waiting):
            request = self.waiting.peek()
            if request.finish_reason is None:
                return request
            self.waiting.pop()
        return None

    def _fits(self, request: Request, budget: int) -> bool:
        return self.config.enable_chunked_prefill or request.num_tokens <= budget

    def _admit(self, plan: SchedulerOutput, request: Request) -> bool:
        """Make the next waiting request a running one, with what is cached of its tokens; False if blocks are short."""
        blocks = self.block_manager
        while not self._has_room(request):
            if self.running or not (self._reclaim(but=request) or self._reclaim()):
                return False
        if request.request_id in self._forked:
            del self._forked[request.request_id]
        elif blocks.is_swapped(request):
            plan.block_moves.append(blocks.swap_in(request))
        else:
            request.num_computed_tokens = blocks.allocate(request)
        if request.num_ever_computed == request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
        self._set_milestone(request, request.num_computed_tokens)
        self.waiting.pop()
        self.running[request.request_id] = request
        plan.new_requests.append(request.announcement())
        return True

    def _has_room(self, request: Request) -> bool:
        reserve = self.num_reserved_blocks if self.running else 0
        if request.request_id in self._forked:
            return self.block_manager.num_free > reserve  # a copy of the last shared block is all it needs
        if self.block_manager.is_swapped(request):
            return self.block_manager.can_swap_in(request, reserve)
        return self.block_manager.can_allocate(request, reserve)

    def _add(self, plan: SchedulerOutput, request: Request, budget: int, whole_table: bool = False) -> None:
        """Plan the next tokens of a request, as many as budget and blocks allow."""
        start = request.num_computed_tokens
        end = min(request.num_tokens, start + budget)
        if end == start:
            return
        growth = self.block_manager.grow(request, end) or self._make_room(plan, request, end)
        if growth is None:
            return
        table = self.block_manager.table(request)
        plan.block_moves += growth.moves
        first_block, block_ids = (0, tuple(table)) if whole_table else (growth.first_block, growth.block_ids)
        if not self.is_paged:
            block_ids = ()  # an executor with rows knows whose they are
        num_recomputed = max(0, min(request.num_ever_computed, end) - start)
        why = "prefill" if start + num_recomputed < request.num_prompt_tokens else "decode"
        samples = end == request.num_tokens
        part = (request.request_id, start, end - start, samples, why, first_block, block_ids, num_recomputed)
        plan.others.append(ScheduledRequest(*part))
        plan.num_tokens += end - start
        request.num_computed_tokens = end
        if samples and end + 1 < request.num_tokens_at_most:
            request.num_tokens = end + 1  # the new one counts, whichever it will be, unless it is the last possible
        if request.num_prompt_tokens <= end == request.num_tokens - 1:
            request.plain_until = min(len(table) * self.block_manager.block_size, request.num_tokens_at_most - 1)
        else:
            request.plain_until = 0

    # --- when blocks run out ---

    def _make_room(self, plan: SchedulerOutput, request: Request, end: int) -> Growth | None:
        """Preempt others until the request has blocks for its tokens before `end`; None if it is preempted itself."""
        while (growth := self.block_manager.grow(request, end)) is None:
            if self._reclaim():
                continue
            victim = max(self._preemptible(), key=self.waiting.order)
            self._preempt(plan, victim)
            if victim is request:
                return None
        return growth

    def _preemptible(self) -> Collection[Request]:
        """Those that run and may have blocks."""
        return self.running.values()

    def _reclaim(self, but: Request | None = None) -> bool:
        """Take back the blocks of the forked request that would be served last; False if there is none."""
        others = [request for request in self._forked.values() if request is not but]
        if not others:
            return False
        request = max(others, key=self.waiting.order)
        del self._forked[request.request_id]
        request.num_computed_tokens = 0  # what it shared was not computed for it
        self._start_over(request)
        return True

    def _preempt(self, plan: SchedulerOutput, request: Request) -> None:
        """The request leaves the batch, and the plan if it is in it already, and waits again where it stood."""
        del self.running[request.request_id]
        self._take_out(plan, request)
        num_tokens, mode = request.num_computed_tokens, "recompute"
        move = self.block_manager.swap_out(request) if self.preemption_mode == "swap" and num_tokens else None
        if move is None:
            self._start_over(request)
        else:
            plan.block_moves.append(move)
            mode, request.plain_until = "swap", 0
        request.num_preemptions += 1
        plan.preempted_ids.append(request.request_id)
        traced_id = request.request_id if self.recorder is None else self.recorder.name(request.request_id)
        self._preemptions.append(Preemption(traced_id, mode, num_tokens))
        self.waiting.push(request)

    def _take_out(self, plan: SchedulerOutput, request: Request) -> None:
        """The plan in the making computes nothing for this request."""
        part = next((part for part in plan.others if part.request_id == request.request_id), None)
        if part is not None:
            plan.others.remove(part)
        elif request.request_id in plan.decodes:
            part = ScheduledRequest(request.request_id, plan.decodes.pop(request.request_id), 1, True, "decode")
        else:
            return
        plan.num_tokens -= part.num_tokens
        request.num_computed_tokens = part.start
        if part.samples:
            request.num_tokens = part.end

    def _start_over(self, request: Request) -> None:
        """All it has computed is lost."""
        self.block_manager.free(request)
        request.num_ever_computed = max(request.num_ever_computed, request.num_computed_tokens)
        request.num_computed_tokens = request.plain_until = 0

    # --- what a step brought ---

    def update(self, plan: SchedulerOutput, output: ModelOutput) -> StepUpdate:
        """Take in what the oldest plan in flight computed; returns the new tokens, in the order of `output`.

        Requests that have ended since it was made are skipped, whatever has their ids now. What failed is not kept in
        the prefix cache, nor what was computed from it. Raises StepOrderError for any other plan.
        """
        if not self._in_flight or self._in_flight[0].plan is not plan:
            raise StepOrderError(f"the results of step {plan.step} are not the next to be taken in")
        _, requests, self._preemptions = self._in_flight[0]
        self.last_end = self.clock()
        token_ids, finish_reasons, ended, discarded = output.token_ids, {}, [], set()
        for request, num_computed_tokens, samples in self._append_plain(plan, requests, output):
            request_id = request.request_id
            if request.finish_reason is not None:
                discarded.add(request_id)
                continue
            if request_id in output.failed:
                request.end("error", output.failed[request_id])
                self.block_manager.free(request, forget=True)
                discarded.add(request_id)
            else:
                self._take_in(request, num_computed_tokens, token_ids[request_id] if samples else None)
            if request.finish_reason is not None:
                finish_reasons[request_id] = request.finish_reason
                ended.append(request)
        if discarded:
            ids = (*plan.decodes, *(part.request_id for part in plan.others))
            told = [each for each in ids if each in finish_reasons or each in token_ids and each not in discarded]
            token_ids = {each: token_ids.get(each) for each in told}
        for request in ended:
            del self._unfinished[request.request_id]
            self._release_children(request)
        self.just_left = self._freed_by_abort + (self._leave(ended) if ended else [])
        self._freed_by_abort = []
        self._in_flight.popleft()
        if self.recorder is not None:
            self._note_step(plan, output, discarded)
        return StepUpdate(token_ids, finish_reasons)

    def _append_plain(
        self, plan: SchedulerOutput, requests: list[Request], output: ModelOutput
    ) -> list[tuple[Request, int, bool]]:
        """Append the tokens of the decodes after which nothing else is to be done.

        Returns all other requests, how many of their tokens have been computed, and whether they sampled, in order.
        """
        others, now = [], self.last_end
        sampled = map(output.token_ids.get, plan.decodes)  # None for those that failed
        for request, start, token_id in zip(requests, plan.decodes.values(), sampled, strict=False):
            if start + 1 < request.plain_below and token_id not in request.ending_ids and token_id is not None:
                request.output_token_ids.append(token_id)
                request.last_token_time = now
            else:
                others.append((request, start + 1, True))
        behind = zip(requests[len(plan.decodes) :], plan.others, strict=True)
        return others + [(request, part.end, part.samples) for request, part in behind]

    def _take_in(self, request: Request, num_computed_tokens: int, token_id: int | None) -> None:
        """`num_computed_tokens` have been computed; the last one gave `token_id`, None inside the prompt."""
        if num_computed_tokens >= request.milestone and request.request_id in self.running:  # else preempted since
            self._pass_milestone(request, num_computed_tokens)
        if token_id is not None:
            request.last_token_time = self.last_end
            if num_computed_tokens == request.num_prompt_tokens:
                request.first_token_time = self.last_end
            request.append(token_id)

    def _set_milestone(self, request: Request, num_computed_tokens: int) -> None:
        """The next block filled, or the end of a prompt that other outputs wait for."""
        block_size = self.block_manager.block_size
        request.milestone = (num_computed_tokens // block_size + 1) * block_size
        if request.children and num_computed_tokens < request.num_prompt_tokens:
            request.milestone = min(request.milestone, request.num_prompt_tokens)
        request.plain_below = min(request.milestone, request.num_tokens_at_most - 1)

    def _pass_milestone(self, request: Request, num_computed_tokens: int) -> None:
        """At least `request.milestone` tokens have been computed."""
        self.block_manager.commit(request, num_computed_tokens)
        if request.children and num_computed_tokens >= request.num_prompt_tokens:
            self._fork(request)
        self._set_milestone(request, num_computed_tokens)

    def _fork(self, parent: Request) -> None:
        """The prompt has been computed: its other outputs share its blocks, and compute its last token once more."""
        for child in parent.children:
            if child.queue_number is None and child.finish_reason is None:
                self.block_manager.fork(parent, child)
                parent.plain_until = 0  # its last block is shared now: it needs `grow`
                child.num_computed_tokens = child.num_prompt_tokens - 1
                self._forked[child.request_id] = child
                self.waiting.push(child)

    def _release_children(self, parent: Request) -> None:
        """The parent has ended before its other outputs could share its prompt: they go on without it."""
        for child in parent.children:
            if child.queue_number is None and child.finish_reason is None:
                self.waiting.push(child)

    # --- when a step fails ---

    def retract(self, plan: SchedulerOutput) -> None:
        """A step failed, `plan` or another: all that are in flight are discarded.

        Their requests wait again and will be computed from the beginning. A later step needs what an earlier one
        computes, so they fail together. The executor may have carried out any part of them: it is told to forget all
        their requests.
        """
        for launched, requests, _ in reversed(self._in_flight):
            starts = (*launched.decodes.values(), *(part.start for part in launched.others))
            for request, start in zip(requests, starts, strict=True):
                if request.finish_reason is None:
                    request.num_tokens = request.num_known_tokens
                    request.num_computed_tokens = min(request.num_computed_tokens, start)
        while self._in_flight:
            newest, _, self._preemptions = self._in_flight.pop()
            self._retract(newest)

    def _retract(self, plan: SchedulerOutput) -> None:
        involved = dict.fromkeys(each.request_id for each in (*plan.new_requests, *plan.scheduled))
        self._out_of_batch += [*plan.finished_ids, *plan.preempted_ids, *involved]
        self._untraced_preemptions += self._preemptions
        for request_id in involved:
            request = self.running.pop(request_id, None)
            if request is not None:
                self._start_over(request)
                self.waiting.push(request)
        for request_id in plan.preempted_ids:  # what was to be swapped out may be lost
            request = self._unfinished.get(request_id)
            if request is not None and self.block_manager.is_swapped(request):
                self._start_over(request)

    # --- what the trace will say ---

    def _note_step(self, plan: SchedulerOutput, output: ModelOutput, discarded: Collection[str]) -> None:
        """Keep what the trace will say of the step.

        Steps in the trace do not overlap: one that was planned before the last one's end starts there. The parts of
        `discarded` requests were wasted.
        """
        zero = self._host_time_at_zero
        start = max(plan.start_time, self._last_traced_end)
        self._last_traced_end = self.last_end
        fields = {
            "start_time": start,
            "end_time": self.last_end,
            "num_waiting": self.num_waiting(),
            "score_entries": output.score_entries,
            "cached_tokens": sum(map(attrgetter("num_computed_tokens"), self.running.values())),
            "planned": None if start == plan.start_time else plan.start_time,
            "launched": plan.launched,
            "device": None if output.device_times is None else tuple(moment - zero for moment in output.device_times),
        }
        if self.is_paged:
            copies = [pair for move in plan.block_moves if move.kind == "copy" for pair in zip(*move[1:], strict=True)]
            fields["preempted"] = (*self._untraced_preemptions, *self._preemptions)
            fields["copied_blocks"] = tuple(copies)
            fields["blocks"] = self.block_manager.usage
        self._untraced_preemptions = []
        self.recorder.note(plan, discarded, self.just_left, fields)


def rows_of(config: SchedulerConfig) -> BlockManager:
    """A contiguous cache as blocks: one for each request that runs, as long as any request can get."""
    return BlockManager(1 + config.max_num_seqs, config.max_model_len, enable_prefix_caching=False)


def children_of(request: Request) -> list[Request]:
    """The requests that make the second to the n-th output of the prompt; the i-th draws with seed + i."""
    children = []
    for i in range(1, request.params.n):
        seed = None if request.params.seed is None else request.params.seed + i
        params = replace(request.params, n=1, seed=seed, prompt_logprobs=None)
        children.append(request.copy(request_id=output_id(request.request_id, i), params=params))
    return children


def id_in_use(request_id: str) -> str:
    """Why a request of this id is refused."""
    return f"request id {request_id!r} is in use; give each request its own, or wait for the last output of that one"


def seconds_from_now() -> Callable[[], float]:
    """A clock that begins at 0."""
    began = time.perf_counter()
    return lambda: time.perf_counter() - began


def host_time_at_zero(clock: Callable[[], float]) -> float:
    """What time.perf_counter says when the clock says 0: devices give times by that, simulated ones by the clock."""
    now = clock()
    return getattr(clock, "device_time_at_zero", time.perf_counter() - now)
