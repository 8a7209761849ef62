"""Static and dynamic batching, behind the same `schedule` and `update` as continuous batching.

Both fill a rectangle: one row a request, every row padded to the longest. They differ in when the rectangle changes.
"""

from minillm.engine import BaseScheduler
from minillm.runtime import SchedulerOutput


class StaticScheduler(BaseScheduler):
    """A batch is formed, padded to its longest prompt, and kept until its last request has ended.

    Up to `max_num_seqs` waiting requests make a batch; nobody joins it later, and the rows of requests that have ended
    are computed on as padding. Results return when the batch does, so a short request waits for the longest.
    """

    def schedule(self) -> SchedulerOutput:
        """The whole batch, or if there is none a new one."""
        plan = self._new_plan()
        if not self.running:
            while len(self.running) < self.config.max_num_seqs and self._next_waiting() is not None:
                self._admit(plan)
        fill_rectangle(plan, self)
        return plan

    def num_waiting(self) -> int:
        """Requests that have arrived and are not in the batch; who has ended in it is neither."""
        return len(self._requests) - sum(request.finish_reason is None for request in self.running.values())

    def _leave(self, ended: list[str]) -> list[str]:
        """Nobody leaves before everybody can."""
        if any(request.finish_reason is None for request in self.running.values()):
            return []
        return super()._leave(list(self.running))


class DynamicScheduler(BaseScheduler):
    """The batch is formed anew, and padded anew, whenever a request leaves it or joins it.

    Requests that decode one token are padded to the longest prompt that joins in the same step: one prompt of n tokens
    in a batch of B costs (n - 1)(B - 1) pads.
    """

    def schedule(self) -> SchedulerOutput:
        """Everybody who runs, and as many of the waiting as there are rows."""
        plan = self._new_plan()
        while len(self.running) < self.config.max_num_seqs and self._next_waiting() is not None:
            self._admit(plan)
        fill_rectangle(plan, self)
        return plan


def fill_rectangle(plan: SchedulerOutput, scheduler: BaseScheduler) -> None:
    """One row a running request, all as long as the longest has tokens to compute."""
    for request in scheduler.running.values():
        if request.finish_reason is None:
            scheduler._add(plan, request, budget=request.num_tokens)
        else:
            plan.padding_rows.append(request.request_id)
    plan.row_length = max((len(part.token_ids) for part in plan.scheduled), default=None)
