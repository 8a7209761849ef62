"""Continuous batching on a paged cache: blocks are handed out as tokens come, and taken back when they run out.

After Kwon et al. 2023 (PagedAttention), sections 4.3 to 4.5: memory is never reserved for tokens that may not come, so
it can run out in the middle. Then the request that the policy would serve last gives way: its blocks go to the others,
it waits again at its old place, and later its keys and values are computed again ("recompute") or copied back from
host memory ("swap"). Neither changes what it says.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from minillm.costs import blocks_needed
from minillm.engine.block_manager import BlockManager, Growth
from minillm.engine.request import PENDING_IDS, Request
from minillm.engine.scheduler import RequestUpdate, Scheduler, SchedulerConfig, _new
from minillm.errors import Positive, PromptError, check_choice, check_number, checked
from minillm.runtime import ModelOutput, ScheduledRequest, SchedulerOutput
from minillm.trace import Preemption

PREEMPTION_MODES = ("recompute", "swap")


class PagedScheduler(Scheduler):
    """`Scheduler` with a `BlockManager` behind it: a request computes only tokens that it has blocks for.

    Who is served first is the queue's order; who gives way is the same order from its end. A request is admitted when
    all its tokens of now find blocks and `watermark`, a share of the pool, is left over for those who run: else it
    would soon be the one to give way. Raises ConfigError for an unknown mode.
    """

    @checked
    def __init__(
        self,
        config: SchedulerConfig,
        block_manager: BlockManager,
        clock: Callable[[], float] | None = None,
        trace: bool = True,
        *,
        max_trace_steps: Positive | None = None,
        preemption_mode: str = "recompute",
        watermark: float = 0.01,
    ):
        super().__init__(config, clock, trace, max_trace_steps=max_trace_steps)
        check_choice("preemption_mode", preemption_mode, PREEMPTION_MODES)
        check_number("watermark", watermark, "a share of the pool, in [0, 1)", lambda share: 0 <= share < 1)
        self.block_manager = block_manager
        self.preemption_mode = preemption_mode
        self.num_reserved_blocks = math.ceil(watermark * block_manager.num_blocks)
        self._announced: set[str] = set()  # requests the executor has been told of
        self._forked: dict[str, Request] = {}  # wait with blocks of their parent's prompt
        self._void: list[str] = []  # lost their block tables since the last plan
        self._preemptions: list[Preemption] = []  # in the plan being made
        self._untraced: list[Preemption] = []  # in plans that failed: the next event tells of them

    # --- arrival and end ---

    @checked(error=PromptError)
    def add_request(self, request: Request) -> None:
        """Let a request wait for its turn, and with `params.n` > 1 as many.

        Its other outputs are requests of their own, "id.1" to "id.(n-1)", that join when the prompt has been computed.
        Raises PromptError if it can never run, or an id is taken.
        """
        request.children = children_of(request)
        for each in (request, *request.children):
            self.check(each)
        for each in (request, *request.children):
            self._arrive(each)
        self.waiting.push(request)

    @property
    def most_tokens(self) -> int:
        """As many as the pool holds, and one more: the last token is never fed back."""
        blocks = self.block_manager
        return min(super().most_tokens, (blocks.num_blocks - 1) * blocks.block_size + 1)

    def check(self, request: Request) -> None:
        """As in `BaseScheduler`: one that the pool cannot hold is refused."""
        super().check(request)
        blocks = self.block_manager
        needed = blocks_needed(request.num_tokens_at_most - 1, blocks.block_size)  # the last token is never fed back
        if needed > blocks.num_blocks - 1:
            raise PromptError(
                f"request {request.request_id!r} may need {needed} blocks for {request.num_tokens_at_most - 1} tokens "
                f"({request.num_prompt_tokens} prompt + max_tokens {request.params.max_tokens} - 1), the pool has "
                f"{blocks.num_blocks - 1} of {blocks.block_size} tokens; lower max_tokens or raise num_blocks"
            )

    def end_request(self, request_id: str, finish_reason: str, stop_reason: int | str | None = None) -> bool:
        """End a request from outside; "abort" ends the other outputs of its prompt as well.

        Once it has ended itself, its other outputs are requests like any other and are ended by their own ids.
        """
        request = self._requests.get(request_id)
        ended = super().end_request(request_id, finish_reason, stop_reason)
        if ended:
            self._forget(request)
            if finish_reason == "abort":
                for child in request.children:
                    if self._requests.get(child.request_id) is child:  # else it has ended, and its id is free
                        self.end_request(child.request_id, "abort")
            else:
                self._release_children(request)
        return ended

    def reset_prefix_cache(self) -> int:
        """Forget all cached prefixes; returns how many blocks became free with it."""
        return self.block_manager.reset_prefix_cache()

    def retract(self, plan: SchedulerOutput) -> None:
        """The step failed, nothing came of it: whoever took part waits again, and will be computed from its beginning.

        The executor may have carried out any part of the plan: it is told to forget the tables of all
        who were in it, and later everything again.
        """
        self._left += plan.finished_ids
        self._void += plan.preempted_ids
        self._untraced += self._preemptions
        involved = dict.fromkeys(each.request_id for each in (*plan.new_requests, *plan.scheduled))
        self._left += involved
        self._announced.difference_update(involved)
        for part in plan.scheduled:
            request = self.running.pop(part.request_id, None)
            if request is not None:
                self._start_over(request)
                self.waiting.push(request)
        for request_id in plan.preempted_ids:  # what was to be swapped out may be lost
            request = self._requests.get(request_id)
            if request is not None and self.block_manager.is_swapped(request):
                self._start_over(request)

    def _start_over(self, request: Request) -> None:
        self.block_manager.free(request)
        request.num_ever_computed = max(request.num_ever_computed, request.num_computed_tokens)
        request.num_computed_tokens = request.num_writable = 0

    def _forget(self, request: Request, bad: bool = False) -> None:
        """The request has ended."""
        self.block_manager.free(request, forget=bad)
        self._forked.pop(request.request_id, None)
        if request.request_id in self._announced:
            self._announced.discard(request.request_id)
            if request.request_id not in self.running:
                self._left.append(request.request_id)

    # --- the plan ---

    def schedule(self) -> SchedulerOutput:
        """Decide the next step; requests advance in `update`, once it has run.

        As in `Scheduler`: running requests first, then, unless one had to give way, new ones.
        """
        plan = self._new_plan()
        plan.preempted_ids, self._void = self._void, []
        self._preemptions = []
        slow = self._add_plain_decodes(plan)
        for request in slow:
            if request.request_id in self.running:  # else it has given way
                self._add(plan, request, self.config.max_num_batched_tokens - plan.num_tokens)
        if not self._preemptions:
            self._admit_waiting(plan)
        return plan

    def _add_plain_decodes(self, plan: SchedulerOutput) -> list[Request]:
        """Plan one token for every running request that needs no more than that: no new block, no end of a prompt.

        Returns the others, in order of admission. In the steady state all but one in `block_size` are planned here.
        """
        others, parts = [], plan.scheduled
        for request in self.running.values():
            start = request.num_computed_tokens
            num_prompt_tokens = request.num_prompt_tokens
            if request.num_tokens - start == 1 and num_prompt_tokens <= start < request.num_writable:
                token_ids = request.output_token_ids[start - num_prompt_tokens :] or PENDING_IDS
                parts.append(_new(ScheduledRequest, (request.request_id, start, token_ids, True, "decode", 0, (), 0)))
            else:
                others.append(request)
        plan.num_tokens = len(parts)
        return others

    def _admit_waiting(self, plan: SchedulerOutput) -> None:
        while (budget := self.config.max_num_batched_tokens - plan.num_tokens) > 0:
            request = self._next_waiting() if len(self.running) < self.config.max_num_seqs else None
            if request is None or not self._fits(request, budget) or not self._begin(plan, request):
                return
            self._add(plan, request, budget, whole_table=True)

    def _begin(self, plan: SchedulerOutput, request: Request) -> bool:
        """Make a waiting request a running one, with what is cached of its tokens; False if blocks are short."""
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
        if request.request_id not in self._announced:
            self._announced.add(request.request_id)
            if request.num_ever_computed == 0:  # else it is new only to an executor that had to forget it
                request.num_cached_tokens = request.num_computed_tokens
            plan.new_requests.append(request.announcement())
        self._set_milestone(request, request.num_computed_tokens)
        self.running[self.waiting.pop().request_id] = request
        return True

    def _has_room(self, request: Request) -> bool:
        reserve = self.num_reserved_blocks if self.running else 0
        if request.request_id in self._forked:
            return self.block_manager.num_free > reserve  # a copy of the last shared block is all it needs
        if self.block_manager.is_swapped(request):
            return self.block_manager.can_swap_in(request, reserve)
        return self.block_manager.can_allocate(request, reserve)

    def _add(self, plan: SchedulerOutput, request: Request, budget: int, whole_table: bool = False) -> int:
        """Plan the next tokens of a request, as many as budget and blocks allow; returns how many."""
        start, end = request.num_computed_tokens, request.num_tokens
        if end - start > budget:
            end = start + budget
        if end == start:
            return 0
        growth = self.block_manager.grow(request, end)
        if growth is None:
            growth = self._make_room(plan, request, end)
            if growth is None:
                return 0
        request.num_writable = len(self.block_manager.table(request)) * self.block_manager.block_size
        first_block, block_ids, moves = growth
        if moves:
            plan.block_moves += moves
        if whole_table:
            first_block, block_ids = 0, tuple(self.block_manager.table(request))
        token_ids = request.token_ids(start, end)
        num_recomputed = max(0, min(request.num_ever_computed, end) - start)
        why = "prefill" if start + num_recomputed < request.num_prompt_tokens else "decode"
        samples = end == request.num_tokens
        part = (request.request_id, start, token_ids, samples, why, first_block, block_ids, num_recomputed)
        plan.scheduled.append(ScheduledRequest(*part))
        plan.num_tokens += end - start
        return end - start

    # --- when blocks run out ---

    def _make_room(self, plan: SchedulerOutput, request: Request, end: int) -> Growth | None:
        """Let others give way until the request has blocks for its tokens before `end`; None if it gives way itself."""
        while (growth := self.block_manager.grow(request, end)) is None:
            if self._reclaim():
                continue
            victim = max(self.running.values(), key=self.waiting.order)
            self._preempt(plan, victim)
            if victim is request:
                return None
        return growth

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
        for i, part in enumerate(plan.scheduled):
            if part.request_id == request.request_id:
                plan.num_tokens -= len(part.token_ids)
                del plan.scheduled[i]
                break
        num_tokens, mode = request.num_computed_tokens, "recompute"
        move = self.block_manager.swap_out(request) if self.preemption_mode == "swap" and num_tokens else None
        if move is None:
            self._start_over(request)
        else:
            plan.block_moves.append(move)
            mode, request.num_writable = "swap", 0
        request.num_preemptions += 1
        plan.preempted_ids.append(request.request_id)
        traced_id = request.request_id if self._recorder is None else self._recorder.name(request.request_id)
        self._preemptions.append(Preemption(traced_id, mode, num_tokens))
        self.waiting.push(request)

    # --- what a step brought ---

    def update(self, plan: SchedulerOutput, output: ModelOutput) -> list[RequestUpdate]:
        """As in `BaseScheduler`. What failed is not kept in the prefix cache, nor what was computed from it."""
        for request_id in output.failed:
            request = self.running.get(request_id)
            if request is not None and request.finish_reason is None:
                self._release_children(request)
                self._forget(request, bad=True)
        return super().update(plan, output)

    def _set_milestone(self, request: Request, num_computed_tokens: int) -> None:
        """The next block filled, or the end of a prompt that other outputs wait for."""
        block_size = self.block_manager.block_size
        request.milestone = (num_computed_tokens // block_size + 1) * block_size
        if request.children and num_computed_tokens < request.num_prompt_tokens:
            request.milestone = min(request.milestone, request.num_prompt_tokens)

    def _pass_milestone(self, request: Request, num_computed_tokens: int) -> None:
        self.block_manager.commit(request, num_computed_tokens)
        if request.children and num_computed_tokens >= request.num_prompt_tokens:
            self._fork(request)
        self._set_milestone(request, num_computed_tokens)

    def _fork(self, parent: Request) -> None:
        """The prompt has been computed: its other outputs share its blocks, and compute its last token once more."""
        for child in parent.children:
            if child.queue_number is None and child.finish_reason is None:
                self.block_manager.fork(parent, child)
                parent.num_writable = 0  # its last block is shared now: it has to ask
                child.num_computed_tokens = child.num_prompt_tokens - 1
                self._forked[child.request_id] = child
                self.waiting.push(child)

    def _release_children(self, parent: Request) -> None:
        """The parent has ended before its prompt was computed: its other outputs go on without it."""
        for child in parent.children:
            if child.queue_number is None and child.finish_reason is None:
                self.waiting.push(child)

    def _leave(self, ended: list[str]) -> list[str]:
        for request_id in ended:
            request = self.running[request_id]
            self._forget(request)
        return super()._leave(ended)

    def _traced_memory(self, plan: SchedulerOutput) -> dict:
        preempted, self._untraced = (*self._untraced, *self._preemptions), []
        copies = [move for move in plan.block_moves if move.kind == "copy"]
        return {
            "preempted": tuple(preempted),
            "copied_blocks": tuple(pair for move in copies for pair in zip(move.sources, move.targets, strict=True)),
            "blocks": self.block_manager.usage,
        }


def children_of(request: Request) -> list[Request]:
    """The requests that make the second to the n-th output of the prompt; the i-th draws with seed + i."""
    children = []
    for i in range(1, request.params.n):
        seed = None if request.params.seed is None else request.params.seed + i
        children.append(
            Request(
                f"{request.request_id}.{i}",
                request.prompt_token_ids,
                replace(request.params, n=1, seed=seed, prompt_logprobs=None),
                eos_token_ids=request.eos_token_ids,
                arrival_time=request.arrival_time,
                priority=request.priority,
                predicted_output_tokens=request.predicted_output_tokens,
                cache_salt=request.cache_salt,
            )
        )
    return children
