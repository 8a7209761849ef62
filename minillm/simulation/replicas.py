"""Several simulated replicas of one engine behind a router: whose cache holds a prompt, and how long it waits.

Each replica has a scheduler, a pool of blocks and a clock of its own, the same code as everywhere. Their steps and the
arrivals are gone through in the order of time, so a router knows of a request's end when its last step has ended.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from minillm.costs import what_fits
from minillm.engine import BlockManager, Prefix, Request, Router, Scheduler, SchedulerConfig, extend_prefixes, id_in_use
from minillm.errors import Positive, PromptError, checked
from minillm.simulation.clock import VirtualClock
from minillm.simulation.cost_model import Roofline
from minillm.simulation.executor import SimulatedExecutor
from minillm.simulation.reporting import SLO, Report, ReportBuilder
from minillm.simulation.running import in_order

BLOCK_SIZE = 16
MOST_PREFIXES = 1 << 16  # blocks, used last by any prompt, that need no hashing when the next prompt has them


class Replica:
    """One engine of the simulation."""

    @checked
    def __init__(self, cost_model: Roofline, config: SchedulerConfig, num_blocks: Positive | None = None):
        """`num_blocks`: of its pool; by default what the weights leave on the card."""
        if num_blocks is None:
            room = what_fits(cost_model.config, cost_model.card.memory_bytes)
            num_blocks = 1 + room.num_tokens // BLOCK_SIZE
        self.clock = VirtualClock()
        self.executor = SimulatedExecutor(cost_model, self.clock)
        self.scheduler = Scheduler(config, self.clock, trace=False, block_manager=BlockManager(num_blocks, BLOCK_SIZE))
        self.ended: list[str] = []  # in the step that ends at `clock()`
        self.is_awake = False  # a step of it is still to end


@dataclass(frozen=True)
class ReplicasReport:
    """What several replicas made of the requests."""

    report: Report  # of all together
    prompt_tokens: int
    cached_tokens: int  # of those: found in the cache of the replica that got the request
    num_routed: tuple[int, ...]  # requests of each replica

    @property
    def hit_share(self) -> float:
        """Cached share of the prompts' tokens, 0 to 1."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def as_dict(self) -> dict:
        """Everything, for JSON."""
        routed = {"num_routed": self.num_routed, "hit_share": self.hit_share}
        return (
            self.report.as_dict() | {"prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens} | routed
        )

    def __str__(self) -> str:
        fewest, most = min(self.num_routed), max(self.num_routed)
        return (
            f"replicas      {len(self.num_routed)}, each with {fewest} to {most} requests; {self.hit_share:.1%} of the "
            f"prompts' tokens found in a cache\n{self.report}"
        )


@checked
def run_replicas(
    replicas: Iterable[Replica],
    router: Router,
    requests: Iterable,
    slo: SLO = SLO(),  # noqa: B008 - frozen
) -> ReplicasReport:
    """Let `requests` arrive at their times, send each where the router says, and compute until all have ended.

    An iterator of requests, in order of arrival, is read as time goes on, and an ended request is not kept: so memory
    does not limit their number. Other iterables may be in any order. Raises PromptError for a request that can never
    run or whose id is in use, and ConfigError if there is no replica.
    """
    replicas = list(replicas)
    loads, figures = dict.fromkeys(range(len(replicas)), 0), ReportBuilder(slo)
    arriving = in_order(requests)
    upcoming = next(arriving, None)
    make_prefix = lru_cache(MOST_PREFIXES)(Prefix)
    routed = [0] * len(replicas)
    under_way: dict[str, Request | None] = {}  # None for the second to the n-th output of a prompt
    prompt_tokens = cached_tokens = 0
    events: list[tuple[float, int]] = []  # when a step of a replica ends, or the first one of it begins
    while upcoming is not None or events:
        if upcoming is not None and (not events or upcoming.arrival_time <= events[0][0]):
            request, upcoming = upcoming, next(arriving, None)
            number = router.choose(loads, request.prompt_token_ids, request.cache_salt)
            replica = replicas[number]
            routed[number] += 1
            if not replica.is_awake:
                replica.clock.advance_to(request.arrival_time)
                replica.is_awake = True
                heapq.heappush(events, (replica.clock(), number))
            extend_prefixes(request, request.num_prompt_tokens // BLOCK_SIZE, BLOCK_SIZE, make_prefix)
            replica.scheduler.add_request(request)
            for each in (request, *request.children):
                if each.request_id in under_way:
                    raise PromptError(id_in_use(each.request_id))
                loads[number] += 1
                under_way[each.request_id] = request if each is request else None
                figures.arrive(each.request_id, request.arrival_time)
            continue
        _, number = heapq.heappop(events)
        replica = replicas[number]
        for request_id in replica.ended:
            request = under_way.pop(request_id)
            loads[number] -= 1
            if request is not None:  # outputs of the same prompt share its blocks, whatever the router did
                prompt_tokens += request.num_prompt_tokens
                cached_tokens += request.num_cached_tokens
        replica.ended = []
        replica.is_awake = replica.scheduler.has_unfinished_requests()
        if replica.is_awake:
            plan = replica.scheduler.schedule()
            updates = replica.scheduler.update(plan, replica.executor.execute_model(plan))
            replica.ended = list(replica.scheduler.just_left)
            waiting = replica.scheduler.num_waiting()
            figures.add(plan, updates, replica.ended, replica.clock(), waiting)
            heapq.heappush(events, (replica.clock(), number))
    return ReplicasReport(figures.report(), prompt_tokens, cached_tokens, tuple(routed))
