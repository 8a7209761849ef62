"""Chapter 7, continuous batching: who computes what in a step, the loop around it, and an order that wastes little."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

from minillm.checks.base import Case, CheckFailed, as_list, call, describe, failure, number_of, run_check, same_value
from minillm.costs import A100_80GB, LLAMA_2_7B
from minillm.engine import Request, Scheduler, SchedulerConfig
from minillm.runtime import SchedulerOutput
from minillm.simulation import Roofline, SimulatedExecutor, VirtualClock, course_requests, report, run

Plan = dict[str, int]  # request id -> tokens to compute; a request that gets none is not in it


# --- schedule_step ---------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """How a scheduler served the course's 64 requests."""

    num_steps: int
    makespan: float  # seconds
    longest_gap: float  # between two tokens of one request, seconds
    most_tokens: int  # in one step
    most_running: int


WORKLOAD_CONFIG = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=4096)
MARGIN = 1.01  # times the reference's makespan and longest gap


def schedule_step(function: Callable) -> None:
    """`schedule_step(running, waiting, budget, max_num_seqs)` -> (id, num_tokens) pairs; then a whole run.

    In the run the function schedules the course's 64 requests on a virtual clock. It may break no limit, and must need
    no longer than the reference scheduler.
    """
    cases = list(_schedule_cases())
    for case in cases:
        got = call("schedule_step", function, case, describe)
        if (plan := _as_plan(got)) != dict(case.expected):
            _, hint = _broken(plan, *case.args) or (None, _wasteful(plan, *case.args))
            case = replace(case, hint=hint or case.hint)
            raise CheckFailed(failure("schedule_step", case, f"got       {describe(got)}", describe(case.expected)))
    yours, reference = _score(_ReadersScheduler(function)), _score(_reference())
    for name, hint in (
        ("makespan", "No token of the budget may stay free while a prompt waits for it: cut prompts into chunks."),
        ("longest_gap", "Every decoding request gets its token in each step, before any prompt gets one."),
    ):
        mine, best = getattr(yours, name), getattr(reference, name)
        if mine > MARGIN * best:
            raise CheckFailed(
                "✗ schedule_step\n  call      the course's 64 requests, on a simulated A100\n"
                f"  got       {name.replace('_', ' ')} {mine:.3f} s\n  expected  {best:.3f} s\n  hint      {hint}"
            )
    print(f"✓ schedule_step: {len(cases)} cases, and the course's 64 requests:")
    print("             steps  makespan  longest gap  most tokens per step  most requests")
    for name, score in (("yours", yours), ("reference", reference)):
        times = f"{score.makespan:7.2f} s {score.longest_gap * 1000:9.1f} ms"
        print(f"  {name:9} {score.num_steps:6,} {times} {score.most_tokens:19,} {score.most_running:14}")


def _schedule_cases() -> Iterator[Case]:
    decodes_first = "Running requests come first: each gets min(remaining, what is left of the budget)."
    cut = "A prompt that is longer than what is left of the budget gets what is left: a chunk."
    full = "Admit no request beyond max_num_seqs, however much of the budget is left."
    yield Case(([("a", 1), ("b", 1)], [], 10, 4), [("a", 1), ("b", 1)], decodes_first)
    yield Case(([], [("c", 5)], 10, 4), [("c", 5)], "With nothing running, the first waiting request is admitted.")
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
    in_order = "Running requests go before waiting ones, and each group keeps the order given."
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
        super().__init__(WORKLOAD_CONFIG, VirtualClock())
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
        """The reader's plan; refused if it breaks a limit, overtakes, or schedules nothing."""
        budget, seats = self.config.max_num_batched_tokens, self.config.max_num_seqs
        case = Case((list(running), list(waiting), budget, seats), None, "")
        answer = call("schedule_step", self.function, case, describe)
        tokens = _as_plan(answer)
        broken = _broken(tokens, *case.args)
        if not (broken or tokens):
            broken = "at least one token", "While any request runs or waits, an empty step would repeat for ever."
        if broken is not None:
            rule, hint = broken
            told = failure("schedule_step", Case(case.args, rule, hint), f"got       {describe(answer)}", rule)
            raise CheckFailed(told)
        return tokens


def _broken(tokens: Plan | None, running: list, waiting: list, budget: int, seats: int) -> tuple[str, str] | None:
    """The rule that a plan breaks, and a hint; None if it breaks none."""
    remaining = dict(running + waiting)
    if tokens is None or not tokens.keys() <= remaining.keys():
        return "(id, num_tokens) pairs of the requests given, each of them once", "Use the ids you were given."
    if any(not 0 < num <= remaining[request_id] for request_id, num in tokens.items()):
        return "for each request at most what remains of it", "min(remaining, what is left of the budget)."
    if sum(tokens.values()) > budget:
        return f"at most {budget} tokens together", "Subtract each request's tokens from the budget."
    if len(running) + sum(request_id in tokens for request_id, _ in waiting) > seats:
        hint = "Admit no request beyond max_num_seqs. Running requests that compute nothing in this step count too."
        return f"at most {seats} requests that run", hint
    if any(request_id in tokens for request_id, _ in waiting[_admitted(tokens, waiting) :]):
        return "no request overtakes another in the queue", "Stop admitting at the first request that gets nothing."
    return None


def _wasteful(tokens: Plan, running: list, waiting: list, budget: int, seats: int) -> str | None:
    """What is wrong with a plan that breaks no limit: a request goes out of turn, or tokens of the budget stay free."""
    in_turn = sorted(running, key=lambda pair: pair[1] > 1) + waiting[: max(0, seats - len(running))]
    cut = next((i for i, (request_id, remaining) in enumerate(in_turn) if tokens.get(request_id, 0) < remaining), None)
    if cut is None:
        return None
    (name, remaining), left = in_turn[cut], budget - sum(tokens.values())
    for later, _ in in_turn[cut + 1 :]:
        if later not in tokens:
            continue
        if name in dict(waiting):
            return f"First come, first served: {later} does not overtake {name}."
        if remaining == 1:
            return f"Decodes come before the rest of a prompt: {name} gets its token before {later} gets any."
        return f"Running requests go before waiting ones, and each group keeps its order: {name} before {later}."
    if left and remaining > left:
        return f"{left} tokens of the budget stay free. A prompt that is too long for them gets {left} tokens: a chunk."
    return f"{left} tokens of the budget stay free, and {name} gets none of them." if left else None


def _admitted(tokens: Plan, waiting: Sequence[tuple[str, int]]) -> int:
    """How many at the head of the queue get tokens."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] in tokens, waiting))


def _remaining(request: Request) -> int:
    return request.num_tokens - request.num_computed_tokens


def _reference() -> Scheduler:
    return Scheduler(WORKLOAD_CONFIG, VirtualClock())


def _score(scheduler: Scheduler) -> Score:
    """The course's 64 requests, 40 a second, on a card that need not be there."""
    requests = course_requests(arrivals="poisson", rate=40.0)
    clock = scheduler.clock
    trace = run(scheduler, SimulatedExecutor(Roofline(LLAMA_2_7B, A100_80GB), clock), requests, clock)
    most_tokens = max(step.num_tokens for step in trace.steps)
    most_running = max(len(step.scheduled) for step in trace.steps)
    figures = report(trace)
    return Score(figures.num_steps, figures.makespan, figures.itl.max, most_tokens, most_running)


# --- serve_continuously ----------------------------------------------------------------------------------------------

END = 0  # the counting machine's end-of-sequence token
MANY_PASSES = 1000


class Served(NamedTuple):
    """What a serving loop returned, and what the machine counted meanwhile."""

    outputs: dict[str, list[int]] | None
    num_passes: int
    num_tokens: int  # computed, over all passes
    num_caches: int  # still held at the end


class CountingMachine:
    """Stands in for the model: a request's next token depends on all its tokens so far, and every token is counted.

    It has what the machine of the notebook has, `compute`, `forget` and `eos_token_ids`, and watches the schedule.
    """

    eos_token_ids = (END,)

    def __init__(self, prompts: Mapping[str, Sequence[int]], max_num_seqs: int):
        self.prompts, self.max_num_seqs = prompts, max_num_seqs
        self.caches: dict[str, list[int]] = {}  # request id -> the tokens computed so far
        self.num_passes = self.num_tokens = 0

    def compute(self, new_tokens: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """One pass. Raises ValueError if the tokens are not the next ones of their requests."""
        if not new_tokens or not all(new_tokens.values()):
            raise ValueError("a pass needs at least one token for each request in it")
        if self.num_passes == MANY_PASSES:
            raise ValueError(f"{MANY_PASSES} passes, and the loop does not end")
        for request_id, token_ids in new_tokens.items():
            cache = self.caches.setdefault(request_id, [])
            for token_id in token_ids:
                if token_id != (expected := self._next(request_id, cache)):
                    told = f"the token behind {len(cache)} computed ones of {request_id!r} is {expected}"
                    raise ValueError(f"{told}, not {describe(token_id)}; compute each token once")
                cache.append(int(token_id))
                self.num_tokens += 1
        if len(self.caches) > self.max_num_seqs:
            raise ValueError(f"{len(self.caches)} requests hold a cache, the limit is {self.max_num_seqs}: forget")
        self.num_passes += 1
        return {request_id: self._next(request_id, self.caches[request_id], predict=True) for request_id in new_tokens}

    def schedule(self, running: list, waiting: list, budget: int, max_num_seqs: int) -> list[tuple[str, int]]:
        """The course's own step. Raises ValueError if one who waits has a cache, or the running ones changed places."""
        running, waiting = list(running), list(waiting)
        names, held = [name for name, _ in running], list(self.caches)  # in order of admission
        if names != [name for name in held if name in names] or any(name in held for name, _ in waiting):
            told = f"running is {describe(names)}, and tokens were computed of {describe(held)}"
            raise ValueError(f"{told}, in this order: these run, all others wait")
        return _schedule(running, waiting, budget, max_num_seqs)

    def forget(self, request_id: str) -> None:
        """Drop the cache of a request that has ended. Raises KeyError if there is none."""
        del self.caches[request_id]

    def _next(self, request_id: str, cache: Sequence[int], predict: bool = False) -> int:
        """The token behind those in the cache: the prompt's, or the one that the machine predicts."""
        prompt = self.prompts[request_id]
        if len(cache) < len(prompt) and not predict:
            return prompt[len(cache)]
        return (sum(place * token_id for place, token_id in enumerate(cache, start=3)) + len(cache)) % 61


def serve_continuously(function: Callable) -> None:
    """`serve_continuously(prompts, max_tokens, budget, max_num_seqs, schedule, machine)` -> new tokens of each request.

    `schedule` is the course's own `schedule_step`; `machine` counts. A loop must compute each token once, in as few
    passes as the schedule allows, and leave no cache behind.
    """
    seven = [11, 4, 9, 2, 17, 5, 8]
    three = {"once": seven, "capital": [7, 3, 12, 6, 1], "name": [3, 14, 2, 6, 9]}
    many = {f"req {i}": [1 + (7 * i + j) % 22 for j in range(3 + 5 * i % 11)] for i in range(9)}
    last_row = "The last row of a prompt gives the first new token; the row of an earlier chunk gives none that counts."
    leave = "A request leaves with its last token, and another one may run in the next pass."
    cases = [
        (({"once": seven}, {"once": 1}, 16, 4), "One token wanted: the pass over the prompt already gives it."),
        (({"once": seven}, {"once": 4}, 16, 4), "After the prompt, each pass computes the newest token alone."),
        (({"once": seven}, {"once": 4}, 4, 4), last_row),
        ((three, dict.fromkeys(three, 5), 64, 3), "All three share each pass."),
        ((three, {"once": 2, "capital": 9, "name": 4}, 64, 2), leave),
        ((many, {name: 3 + 7 * i % 10 for i, name in enumerate(many)}, 8, 3), leave),
        ((many, dict.fromkeys(many, 200), 16, 4), f"A request ends with a token of machine.eos_token_ids, here {END}."),
    ]
    run_check(
        "serve_continuously",
        _served_by(function),
        [Case(args, _served_by(_serve)(*args), hint) for args, hint in cases],
        same=lambda got, expected: same_value(list(got), list(expected)) and got.outputs == expected.outputs,
        show=_show_served,
        advise=_fault_of_loop,
    )


def _served_by(function: Callable) -> Callable:
    """The loop with a machine of its own."""

    def served(prompts: dict, max_tokens: dict, budget: int, max_num_seqs: int) -> Served | None:
        machine = CountingMachine({name: list(ids) for name, ids in prompts.items()}, max_num_seqs)
        answer = function(prompts, max_tokens, budget, max_num_seqs, machine.schedule, machine)
        if answer is None:
            return None
        pairs = answer.items() if isinstance(answer, Mapping) else []
        outputs = {name: list(map(number_of, ids)) for name, ids in ((name, as_list(ids)) for name, ids in pairs)}
        return Served(outputs, machine.num_passes, machine.num_tokens, len(machine.caches))

    return served


def _fault_of_loop(got: Served | None, case: Case) -> str | None:
    """What a loop did wrong, where its outputs or its counts show it."""
    if got is None:
        return None
    if got.outputs == case.expected.outputs:
        return "Call machine.forget(id) as soon as a request has ended." if got.num_caches else None
    prompts, max_tokens, *_ = case.args
    for name, wanted in case.expected.outputs.items():
        ids = got.outputs.get(name) or []
        if ids[: len(prompts[name])] == list(prompts[name]):
            return f"The answer of {name!r} begins with its prompt: return the new tokens alone."
        if len(ids) > len(wanted) and ids[: len(wanted)] == wanted:
            if len(wanted) < max_tokens[name]:
                return f"{name!r} goes on behind {wanted[-1]}, which is one of machine.eos_token_ids."
            return f"{name!r} has {len(ids)} new tokens, and max_tokens allows {len(wanted)}."
        if ids and ids == wanted[: len(ids)] and len(ids) < len(wanted):
            return f"{name!r} ends after {len(ids)} tokens, and may have {len(wanted)}."
    return None


def _show_served(served: Served | None) -> str:
    if served is None:
        return "None"
    counted = f"{served.num_passes} passes, {served.num_tokens} tokens computed, {served.num_caches} caches left"
    return f"{describe(served.outputs)}; {counted}"


def _schedule(running: list, waiting: list, budget: int, max_num_seqs: int) -> list[tuple[str, int]]:
    """(id, num_tokens) pairs, as the reader's `schedule_step` gives them."""
    plan = []
    for request_id, remaining in sorted(running, key=lambda pair: pair[1] > 1) + waiting[: max_num_seqs - len(running)]:
        if budget:
            plan.append((request_id, min(remaining, budget)))
            budget -= plan[-1][1]
    return plan


def _serve(prompts: dict, max_tokens: dict, budget: int, max_num_seqs: int, schedule: Callable, machine: Any) -> dict:
    tokens, computed = {name: list(ids) for name, ids in prompts.items()}, dict.fromkeys(prompts, 0)
    running, waiting = [], list(prompts)
    while running or waiting:
        lists = [[(name, len(tokens[name]) - computed[name]) for name in names] for names in (running, waiting)]
        plan = dict(schedule(*lists, budget, max_num_seqs))
        running += [name for name in waiting if name in plan]
        waiting = [name for name in waiting if name not in plan]
        new = {name: tokens[name][computed[name] : computed[name] + num] for name, num in plan.items()}
        for name, token in machine.compute(new).items():
            computed[name] += plan[name]
            if computed[name] == len(tokens[name]):
                tokens[name].append(token)
                if token in machine.eos_token_ids or len(tokens[name]) == len(prompts[name]) + max_tokens[name]:
                    running.remove(name)
                    machine.forget(name)
    return {name: tokens[name][len(prompts[name]) :] for name in prompts}


# --- queue_order, the puzzle -----------------------------------------------------------------------------------------

MORE = 1.1  # how much longer than the best of each: the budget of the puzzle


class Queue(NamedTuple):
    """How an order of admission serves requests: each decodes one token per step, in the place that is free first."""

    num_steps: int
    mean_end: float  # the mean of the steps in which the requests end


def queue_order(function: Callable) -> None:
    """`queue_order(lengths, places)` -> the numbers 0, 1, ... of the requests in the order of their admission.

    The puzzle: `steps` until all have ended may be at most 1.1 times the fewest that are possible, and the mean step in
    which a request ends at most 1.1 times that of shortest first, on three workloads.
    """
    lines = []
    for seed in (7, 1, 2):
        lengths = [request.params.max_tokens for request in course_requests(seed=seed)]
        case = Case((lengths, 8), "an order of all 64 requests", "Return each number from 0 to 63 exactly once.")
        order = as_list(call("queue_order", function, case, describe))
        if not isinstance(order, list) or sorted(filter(lambda each: each is not None, map(number_of, order))) != list(
            range(len(lengths))
        ):
            raise CheckFailed(failure("queue_order", case, f"got       {describe(order)}", case.expected))
        got, best = served_in(lengths, [int(each) for each in order], 8), _budget(lengths, 8)
        lines.append(
            f"  {got.num_steps:5} of at most {best.num_steps}  {got.mean_end:9.1f} of at most {best.mean_end:.1f}"
        )
        if got.num_steps > best.num_steps:
            hint = "The last long answers run on beside empty places: start a long answer before it is too late."
            _over(case, f"{got.num_steps} steps", f"at most {best.num_steps} steps", hint)
        if got.mean_end > best.mean_end:
            hint = "Short answers wait behind long ones: start a long answer only when it cannot wait any longer."
            _over(case, f"mean end in step {got.mean_end:.1f}", f"at most {best.mean_end:.1f}", hint)
    print("✓ queue_order: 3 workloads within both budgets\n  steps               mean end", *lines, sep="\n")


def served_in(lengths: Sequence[int], order: Sequence[int], places: int) -> Queue:
    """Count the steps of an order of admission."""
    free_at, ends = [0] * places, []
    for number in order:
        first = free_at.index(min(free_at))
        free_at[first] += lengths[number]
        ends.append(free_at[first])
    return Queue(max(free_at), sum(ends) / len(ends))


def _budget(lengths: Sequence[int], places: int) -> Queue:
    """1.1 times the fewest steps that are possible, and 1.1 times the mean end of shortest first."""
    fewest = max(max(lengths), math.ceil(sum(lengths) / places))
    shortest_first = sorted(range(len(lengths)), key=lengths.__getitem__)
    return Queue(int(MORE * fewest), MORE * served_in(lengths, shortest_first, places).mean_end)


def _over(case: Case, got: str, expected: str, hint: str) -> None:
    raise CheckFailed(failure("queue_order", Case(case.args, expected, hint), f"got       {got}", expected))
