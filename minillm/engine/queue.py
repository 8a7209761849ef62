"""The waiting requests, in the order of a scheduling policy: push and pop in O(log n)."""

import heapq
from collections.abc import Callable
from itertools import count
from operator import attrgetter

from minillm.engine.request import Request
from minillm.errors import check_choice, check_number

# Policy -> what it sorts by, a finite number; None: arrival only.
RANKS: dict[str, Callable[[Request], float] | None] = {
    "fcfs": None,
    "priority": attrgetter("priority"),
    "sjf": attrgetter("predicted_output_tokens"),
}
SCHEDULING_POLICIES = tuple(RANKS)


class WaitingQueue:
    """Requests ordered by policy: "fcfs" (arrival), "priority" (smaller first), "sjf" (shortest predicted job first).

    No request starves: its rank improves by `ageing` units (priority levels or predicted tokens) per second of
    waiting. All ranks improve at the same rate, so the order between two requests never changes and
    rank + ageing * arrival_time is a key that needs no updating. Equal keys go by order of arrival.
    """

    def __init__(self, policy: str = "fcfs", ageing: float = 1.0):
        self.policy = check_choice("scheduling_policy", policy, SCHEDULING_POLICIES)
        self.ageing = check_number("ageing", ageing, "positive, or a request could wait for ever", lambda a: a > 0)
        self._heap: list[tuple[float, int, Request]] = []
        self._arrivals = count()

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, request: Request) -> None:
        """Add a request: a new one goes behind its equals, a preempted one back to its old place."""
        if request.queue_number is None:
            request.queue_number = next(self._arrivals)
        heapq.heappush(self._heap, (*self.order(request), request))

    def peek(self) -> Request:
        """The request that is next; IndexError if none waits."""
        return self._heap[0][2]

    def pop(self) -> Request:
        """Take the request that is next; IndexError if none waits."""
        return heapq.heappop(self._heap)[2]

    def order(self, request: Request) -> tuple[float, int]:
        """What the policy sorts by, unique to the request: the smallest goes first, the largest is preempted first."""
        return self.key(request), request.queue_number

    def key(self, request: Request) -> float:
        """Smaller goes first."""
        rank = RANKS[self.policy]
        return request.arrival_time if rank is None else rank(request) + self.ageing * request.arrival_time
