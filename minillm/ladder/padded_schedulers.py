"""Static, dynamic and merging batching, behind the same `schedule` and `update` as continuous batching.

All three fill a rectangle: one row per request, every row padded to the longest. They differ in when the rectangle
changes, and in which requests share a pass with a prompt.
"""

from minillm.engine import Request, Scheduler
from minillm.runtime import SchedulerOutput


class StaticScheduler(Scheduler):
    """A batch is formed, padded to its longest prompt, and kept until its last request has ended.

    Up to `max_num_seqs` waiting requests make a batch. No request joins it later, and the rows of ended requests are
    still computed, as padding. Results return when the batch does, so a short request waits for the longest.
    """

    def _fill(self, plan: SchedulerOutput) -> None:
        """Plan the whole batch, or if there is none a new one."""
        forms_batch = not self.running
        compute_rows(plan, self)
        join_rows(plan, self, only_forked=not forms_batch)

    def num_waiting(self) -> int:
        """Requests that have arrived and are not in the batch; those that have ended in it do not count."""
        return len(self._unfinished) - sum(request.finish_reason is None for request in self.running.values())

    def _leave(self, ended: list[Request]) -> list[str]:
        """No request leaves the batch before all can; blocks of a paged cache are given back at once."""
        if self.is_paged:
            for request in ended:
                self.block_manager.free(request)
        left = super()._leave([request for request in ended if request.request_id not in self.running])
        if any(request.finish_reason is None for request in self.running.values()):
            return left
        return left + super()._leave(list(self.running.values()))

    def _preemptible(self) -> list[Request]:
        """Those of the batch that have not ended: a row of padding holds no blocks."""
        return [request for request in self.running.values() if request.finish_reason is None]


class DynamicScheduler(Scheduler):
    """The batch is formed anew, and padded anew, whenever a request leaves it or joins it.

    Requests that decode one token are padded to the longest prompt that joins in the same step: one prompt of n tokens
    in a batch of B costs (n - 1)(B - 1) pads.
    """

    def _fill(self, plan: SchedulerOutput) -> None:
        """Plan all running requests, and as many of the waiting as there are rows."""
        compute_rows(plan, self)
        join_rows(plan, self)


class MergingScheduler(Scheduler):
    """Requests that join compute their prompts in a pass of their own; then they are rows of the batch like all others.

    No decode is padded to a prompt. The price is more passes: no request decodes in a pass that computes prompts, so
    all running requests wait for it. Prompts that join in the same pass are padded to the longest of them.
    """

    def _fill(self, plan: SchedulerOutput) -> None:
        """Plan only requests that join; if none can, all running requests."""
        join_rows(plan, self)
        if not plan.others:
            compute_rows(plan, self)


def compute_rows(plan: SchedulerOutput, scheduler: Scheduler) -> None:
    """Plan one row per running request, as long as its tokens to compute."""
    for request in list(scheduler.running.values()):
        if request.finish_reason is not None:
            plan.padding_rows.append(request.request_id)
        elif request.request_id in scheduler.running:  # else it has been preempted
            scheduler._add(plan, request, budget=request.num_tokens)
    pad_rows(plan)


def join_rows(plan: SchedulerOutput, scheduler: Scheduler, only_forked: bool = False) -> None:
    """Admit as many waiting requests as there are rows and memory; `only_forked`: other outputs of a running prompt.

    No request joins in a step that had to preempt.
    """
    while len(scheduler.running) < scheduler.config.max_num_seqs and not plan.preempted_ids:
        request = scheduler._next_waiting()
        if request is None or (only_forked and request.request_id not in scheduler._forked):
            break
        if not scheduler._admit(plan, request):
            break
        scheduler._add(plan, request, budget=request.num_tokens, whole_table=True)
    pad_rows(plan)


def pad_rows(plan: SchedulerOutput) -> None:
    """Pad all rows to the longest one's tokens to compute."""
    plan.row_length = max((part.num_tokens for part in plan.others), default=None)
