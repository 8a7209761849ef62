"""Static and dynamic batching, behind the same `schedule` and `update` as continuous batching.

Both fill a rectangle: one row a request, every row padded to the longest. They differ in when the rectangle changes.
"""

from minillm.engine import Request, Scheduler
from minillm.runtime import SchedulerOutput


class StaticScheduler(Scheduler):
    """A batch is formed, padded to its longest prompt, and kept until its last request has ended.

    Up to `max_num_seqs` waiting requests make a batch; nobody joins it later, and the rows of requests that have ended
    are computed on as padding. Results return when the batch does, so a short request waits for the longest.
    """

    def _fill(self, plan: SchedulerOutput) -> None:
        """The whole batch, or if there is none a new one."""
        if not self.running:
            admit_all(plan, self)
        fill_rectangle(plan, self)

    def num_waiting(self) -> int:
        """Requests that have arrived and are not in the batch; who has ended in it is neither."""
        return len(self._unfinished) - sum(request.finish_reason is None for request in self.running.values())

    def _leave(self, ended: list[Request]) -> list[str]:
        """Nobody leaves the batch before everybody can."""
        left = super()._leave([request for request in ended if request.request_id not in self.running])
        if any(request.finish_reason is None for request in self.running.values()):
            return left
        return left + super()._leave(list(self.running.values()))


class DynamicScheduler(Scheduler):
    """The batch is formed anew, and padded anew, whenever a request leaves it or joins it.

    Requests that decode one token are padded to the longest prompt that joins in the same step: one prompt of n tokens
    in a batch of B costs (n - 1)(B - 1) pads.
    """

    def _fill(self, plan: SchedulerOutput) -> None:
        """Everybody who runs, and as many of the waiting as there are rows."""
        admit_all(plan, self)
        fill_rectangle(plan, self)


def admit_all(plan: SchedulerOutput, scheduler: Scheduler) -> None:
    """As many of those who wait as there are rows."""
    while len(scheduler.running) < scheduler.config.max_num_seqs:
        request = scheduler._next_waiting()
        if request is None:
            return
        scheduler._admit(plan, request)


def fill_rectangle(plan: SchedulerOutput, scheduler: Scheduler) -> None:
    """One row a running request, all as long as the longest has tokens to compute."""
    for request in scheduler.running.values():
        if request.finish_reason is None:
            scheduler._add(plan, request, budget=request.num_tokens)
        else:
            plan.padding_rows.append(request.request_id)
    plan.row_length = max((part.num_tokens for part in plan.others), default=None)
