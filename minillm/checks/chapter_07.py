"""Chapter 7, continuous batching: who computes what in a step, what it gains, whose turn it is, under how much load."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from minillm.checks.base import Case, CheckFailed, as_list, call, describe, failure, number_of, run_check
from minillm.costs import A100_80GB, LLAMA_2_7B
from minillm.engine import Request, Scheduler, SchedulerConfig
from minillm.runtime import SchedulerOutput
from minillm.simulation import Roofline, SimulatedExecutor, VirtualClock, lognormal, make_requests, report, run, uniform

Plan = dict[str, int]  # request id -> tokens to compute; a request that gets none is not in it


# --- schedule_step ---------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """What a scheduler made of the workload that is the puzzle."""

    num_steps: int
    makespan: float  # seconds
    longest_gap: float  # between two tokens of one request, seconds
    most_tokens: int  # in one step
    most_running: int


PUZZLE_CONFIG = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=4096)
MARGIN = 1.01  # times the reference's makespan and longest gap


def schedule_step(function: Callable) -> None:
    """`schedule_step(running, waiting, budget, max_num_seqs)` -> (id, num_tokens) pairs; then a puzzle to beat.

    The puzzle: the function schedules a whole workload on a virtual clock. It may break no limit, and must need no
    longer than the reference scheduler.
    """
    cases = list(_schedule_cases())
    for case in cases:
        got = call("schedule_step", function, case, describe)
        if _as_plan(got) != dict(case.expected):
            raise CheckFailed(failure("schedule_step", case, f"got       {describe(got)}", describe(case.expected)))
    yours, reference = _score(_ReadersScheduler(function)), _score(_reference())
    for name, hint in (
        ("makespan", "No token of the budget may stay free while somebody waits for it: cut prompts into chunks."),
        ("longest_gap", "Whoever is decoding gets its token in every step, before any prompt gets one."),
    ):
        mine, best = getattr(yours, name), getattr(reference, name)
        if mine > MARGIN * best:
            raise CheckFailed(
                "✗ schedule_step\n  call      the workload of the puzzle\n"
                f"  got       {name.replace('_', ' ')} {mine:.3f} s\n  expected  {best:.3f} s\n  hint      {hint}"
            )
    print(f"✓ schedule_step: {len(cases)} cases, and the puzzle:")
    print("             steps  makespan  longest gap  most tokens a step  most requests")
    for name, score in (("yours", yours), ("reference", reference)):
        times = f"{score.makespan:7.2f} s {score.longest_gap * 1000:9.1f} ms"
        print(f"  {name:9} {score.num_steps:6,} {times} {score.most_tokens:19,} {score.most_running:14}")


def _schedule_cases() -> Iterator[Case]:
    decodes_first = "First everybody who runs, one after the other: min(remaining, what is left of the budget)."
    cut = "A prompt that is longer than what is left of the budget gets what is left: a chunk."
    full = "Admit nobody beyond max_num_seqs, however much of the budget is left."
    yield Case(([("a", 1), ("b", 1)], [], 10, 4), [("a", 1), ("b", 1)], decodes_first)
    yield Case(([], [("c", 5)], 10, 4), [("c", 5)], "With nobody running, the first who waits is admitted.")
    yield Case(([], [("c", 25)], 10, 4), [("c", 10)], cut)
    yield Case(([("c", 15), ("a", 1)], [], 10, 4), [("a", 1), ("c", 9)], "Decodes come before the rest of a prompt.")
    yield Case(
        ([(f"r{i}", 1) for i in range(10)], [("A", 100), ("B", 200), ("C", 500), ("D", 400)], 1000, 16),
        [(f"r{i}", 1) for i in range(10)] + [("A", 100), ("B", 200), ("C", 500), ("D", 190)],
        "10 + 100 + 200 + 500 = 810, and D gets the 190 that are left.",
    )
    yield Case(([("a", 1), ("b", 1), ("c", 1)], [("d", 5)], 10, 3), [("a", 1), ("b", 1), ("c", 1)], full)
    yield Case(([("a", 1)], [("b", 2), ("c", 2), ("d", 2)], 10, 3), [("a", 1), ("b", 2), ("c", 2)], full)
    yield Case(
        ([("a", 1)], [("b", 9), ("c", 2)], 6, 4),
        [("a", 1), ("b", 5)],
        "First come, first served: c does not overtake b, even if it would fit.",
    )
    in_order = "Whoever runs goes before whoever waits, and each group keeps the order given."
    yield Case(([("a", 9)], [("b", 5)], 10, 4), [("a", 9), ("b", 1)], in_order)
    yield Case(([("a", 9), ("b", 5)], [], 10, 4), [("a", 9), ("b", 1)], in_order)
    nothing = "The budget is used up: c gets nothing, and is not in the plan."
    yield Case(([("a", 1), ("b", 1)], [("c", 4)], 2, 4), [("a", 1), ("b", 1)], nothing)
    yield Case(([], [], 10, 4), [], "Nothing to do is an empty list.")


def _as_plan(answer: Any) -> Plan | None:
    """The answer as id -> tokens, whatever container it came in and in whatever order; None if it is no plan."""
    pairs = as_list(answer.items() if isinstance(answer, dict) else answer)
    if not isinstance(pairs, list):
        return None
    plan: Plan = {}
    for pair in map(as_list, pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str) or pair[0] in plan:
            return None
        num_tokens = number_of(pair[1])
        if num_tokens is None or num_tokens % 1:
            return None
        plan[pair[0]] = int(num_tokens)
    return plan


class _ReadersScheduler(Scheduler):
    """Continuous batching in which the reader's function decides."""

    def __init__(self, function: Callable):
        super().__init__(PUZZLE_CONFIG, VirtualClock())
        self.function = function

    def _fill(self, plan: SchedulerOutput) -> None:
        """What the reader's function plans, after a look at the limits."""
        running = [(request.request_id, _remaining(request)) for request in self.running.values()]
        waiting = [(request.request_id, _remaining(request)) for *_, request in sorted(self.waiting._heap)]
        tokens = self._answer(running, waiting)
        queue = [request_id for request_id, _ in waiting]
        decodes_first = sorted(tokens, key=lambda request_id: request_id in queue)
        for request_id in decodes_first:
            request = self.running.get(request_id) or self._next_waiting()
            if request.request_id not in self.running:
                self._admit(plan, request)
            self._add(plan, request, tokens[request.request_id])

    def _answer(self, running: list, waiting: list) -> Plan:
        """The reader's plan; refused if it breaks a limit, overtakes, or leaves everybody idle."""
        budget, seats = self.config.max_num_batched_tokens, self.config.max_num_seqs
        case = Case((list(running), list(waiting), budget, seats), None, "")
        answer = call("schedule_step", self.function, case, describe)
        tokens, remaining = _as_plan(answer), dict(running + waiting)
        broken = None
        if tokens is None or not tokens.keys() <= remaining.keys():
            broken = "(id, num_tokens) pairs of the requests given, each of them once", "Use the ids you were given."
        elif any(not 0 < num <= remaining[request_id] for request_id, num in tokens.items()):
            broken = "for each request at most what remains of it", "min(remaining, what is left of the budget)."
        elif sum(tokens.values()) > budget:
            broken = f"at most {budget} tokens together", "Subtract each request's tokens from the budget."
        elif len(running) + sum(request_id in tokens for request_id, _ in waiting) > seats:
            broken = f"at most {seats} requests that run", "Those who run and do not compute count too."
        elif any(request_id in tokens for request_id, _ in list(waiting)[_admitted(tokens, waiting) :]):
            broken = "nobody overtakes in the queue", "Stop admitting at the first request that gets nothing."
        elif not tokens:
            broken = "somebody computes something", "While anybody runs or waits, an empty step would go on for ever."
        if broken is not None:
            rule, hint = broken
            told = failure("schedule_step", Case(case.args, rule, hint), f"got       {describe(answer)}", rule)
            raise CheckFailed(told)
        return tokens


def _admitted(tokens: Plan, waiting: Sequence[tuple[str, int]]) -> int:
    """How many at the head of the queue get tokens."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] in tokens, waiting))


def _remaining(request: Request) -> int:
    return request.num_tokens - request.num_computed_tokens


def _reference() -> Scheduler:
    return Scheduler(PUZZLE_CONFIG, VirtualClock())


def _score(scheduler: Scheduler) -> Score:
    """Sixty requests, long prompts among them, on a card that need not be there."""
    requests = make_requests(60, lognormal(60, 1.2, 1500), uniform(4, 60), arrivals="poisson", rate=40.0, seed=7)
    clock = scheduler.clock
    trace = run(scheduler, SimulatedExecutor(Roofline(LLAMA_2_7B, A100_80GB), clock), requests, clock)
    most_tokens = max(step.num_tokens for step in trace.steps)
    most_running = max(len(step.scheduled) for step in trace.steps)
    figures = report(trace)
    return Score(figures.num_steps, figures.makespan, figures.itl.max, most_tokens, most_running)


# --- static against continuous ---------------------------------------------------------------------------------------


def tokens_static(function: Callable) -> None:
    """`tokens_static(lengths, batch_size)` -> computed tokens of static batches: everybody waits for the longest."""
    hints = {
        ((3, 3, 3), 3): "Three rows for three steps.",
        ((1, 2, 9), 3): "All rows are computed until the longest has ended: 3 rows for 9 steps.",
        ((1, 9, 2, 3), 2): "Two batches, in the order given: 2 * 9 + 2 * 3. Sorting is not allowed.",
        ((5, 4, 7), 2): "The last batch has only one row: 2 * 5 + 1 * 7.",
        ((4,), 8): "One request makes a batch of one row.",
        ((8, 1, 1, 1, 8, 1, 1, 1), 4): "One long request in each batch keeps three rows of padding.",
        ((), 4): "No requests, no tokens.",
    }
    cases = [
        Case((list(lengths), size), _tokens_static(lengths, size), hint) for (lengths, size), hint in hints.items()
    ]
    run_check("tokens_static", function, cases)


def _tokens_static(lengths: Sequence[int], batch_size: int) -> int:
    batches = [lengths[first : first + batch_size] for first in range(0, len(lengths), batch_size)]
    return sum(len(batch) * max(batch) for batch in batches)


def steps_continuous(function: Callable) -> None:
    """`steps_continuous(lengths, batch_size)` -> steps if whoever waits takes a free place at once."""
    hints = {
        ((3, 3, 3), 3): "All fit: as many steps as the longest has tokens.",
        ((1, 2, 9), 3): "Nobody waits, so nothing is gained on the longest: 9 steps.",
        ((1, 9, 2, 3), 2): "9 is busy in one place; 1, 2 and 3 follow each other in the other: 6 steps. Then 9 ends.",
        ((5, 4, 7), 2): "The third begins when the second has ended: 4 + 7.",
        ((2, 2, 2), 1): "One place: one after the other.",
        ((8, 1, 1, 1, 8, 1, 1, 1), 4): "The second 8 begins after 1 step, and ends after 9.",
        ((6, 5, 4, 3, 2, 1, 9), 3): "Give the next request to the place that is free first.",
        ((), 4): "No requests, no steps.",
    }
    cases = [
        Case((list(lengths), size), _steps_continuous(lengths, size), hint) for (lengths, size), hint in hints.items()
    ]
    run_check("steps_continuous", function, cases)


def _steps_continuous(lengths: Sequence[int], batch_size: int) -> int:
    """Each request goes to the place that becomes free first."""
    free_at = [0] * batch_size
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + length)
    return max(free_at)


# --- whose turn, and how much load -----------------------------------------------------------------------------------


def sjf_order(function: Callable) -> None:
    """`sjf_order(requests, now, ageing)` -> ids of (id, arrival_time, predicted_tokens) in the order of their turns."""
    arrived = [("a", 0.0, 300), ("b", 4.0, 20), ("c", 5.0, 100)]
    cases = [
        Case((arrived, 10.0, 1e-6), ["b", "c", "a"], "Hardly any ageing: the shortest predicted output goes first."),
        Case((arrived, 10.0, 1000.0), ["a", "b", "c"], "With strong ageing whoever has waited longest goes first."),
        Case(
            (arrived, 10.0, 60.0),
            ["b", "a", "c"],
            "Scores at 10 s: a 300 - 60 * 10 = -300, b 20 - 60 * 6 = -340, c 100 - 60 * 5 = -200: smallest first.",
        ),
        Case(([("x", 2.0, 50), ("y", 1.0, 50), ("z", 3.0, 50)], 9.0, 2.0), ["y", "x", "z"], "Equal jobs: by arrival."),
        Case(
            ([("x", 1.0, 50), ("y", 1.0, 50), ("z", 1.0, 49)], 9.0, 2.0),
            ["z", "x", "y"],
            "Equal scores stay in the order given: sort with a stable sort, such as sorted().",
        ),
        Case(([], 3.0, 1.0), [], "Nobody waits."),
    ]
    run_check("sjf_order", function, cases)


def load_at_slo(function: Callable) -> None:
    """`load_at_slo(rates, p99_ttft, slo)` -> the last rate up to which every p99 TTFT is within the SLO; 0 if none."""
    rates = [1.0, 2.0, 4.0, 8.0]
    cases = [
        Case((rates, [0.1, 0.2, 0.5, 3.0], 1.0), 4.0, "0.5 s at a load of 4 keeps the promise, 3.0 s at 8 does not."),
        Case((rates, [0.1, 0.2, 1.0, 3.0], 1.0), 4.0, "Exactly the SLO is within it: use <=."),
        Case((rates, [0.1, 0.2, 0.3, 0.4], 1.0), 8.0, "If every load keeps the promise, it is the last one measured."),
        Case((rates, [2.0, 3.0, 4.0, 5.0], 1.0), 0, "If not even the smallest load keeps it, the answer is 0."),
        Case(
            (rates, [0.1, 1.4, 0.8, 3.0], 1.0),
            1.0,
            "Beyond the first load that breaks the SLO nothing counts: a lucky run at 4 does not mend that at 2.",
        ),
        Case(([5.0], [0.2], 0.5), 5.0, "The answer is one of the rates, not its place in the list."),
    ]
    run_check("load_at_slo", function, cases)
