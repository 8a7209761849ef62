"""Chapter 7's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

import heapq

import numpy as np
import pytest

from check_answers import message, passes
from minillm import checks

# schedule_step ------------------------------------------------------------------------------------


def schedule(running, waiting, budget, max_num_seqs):
    """The right answer as one loop over all in their order."""
    in_order = [pair for pair in running if pair[1] == 1] + [pair for pair in running if pair[1] > 1]
    plan = []
    for request_id, remaining in in_order + waiting[: max(0, max_num_seqs - len(running))]:
        num_tokens = min(remaining, budget)
        if num_tokens:
            plan.append((request_id, num_tokens))
        budget -= num_tokens
    return plan


def schedule_with_a_dictionary(running, waiting, budget, max_num_seqs):
    """Another layout: a dict, the decodes served by a second pass, numpy numbers."""
    plan = dict.fromkeys([request_id for request_id, _ in running], 0)
    for is_decode in (True, False):
        for request_id, remaining in running:
            if (remaining == 1) == is_decode:
                plan[request_id] = np.int64(min(remaining, budget))
                budget -= plan[request_id]
    while waiting and budget > 0 and len(plan) < max_num_seqs:
        (request_id, remaining), waiting = waiting[0], waiting[1:]
        plan[request_id] = min(remaining, budget)
        budget -= plan[request_id]
    return {request_id: num_tokens for request_id, num_tokens in plan.items() if num_tokens}


def schedule_backwards(*args):
    """The order within the plan does not matter."""
    return tuple(reversed(schedule(*args)))


@pytest.mark.parametrize("right", [schedule, schedule_with_a_dictionary, schedule_backwards])
def test_schedule_step_accepts(right, capsys):
    assert passes(checks.schedule_step, right, capsys)


def test_schedule_step_shows_the_readers_run_beside_the_reference(capsys):
    checks.schedule_step(schedule)
    yours, reference = capsys.readouterr().out.splitlines()[2:]
    assert yours.split()[1:] == reference.split()[1:]
    assert (yours.split()[0], reference.split()[0]) == ("yours", "reference")


def schedule_prompts_whole(running, waiting, budget, max_num_seqs):
    plan = schedule(running, [], budget, max_num_seqs)
    left = budget - sum(num_tokens for _, num_tokens in plan)
    for request_id, remaining in waiting[: max_num_seqs - len(running)]:
        if remaining <= left:
            plan.append((request_id, remaining))
            left -= remaining
    return plan


def schedule_prompts_first(running, waiting, budget, max_num_seqs):
    prompts = [pair for pair in running if pair[1] > 1] + waiting[: max(0, max_num_seqs - len(running))]
    return _greedily(prompts + [pair for pair in running if pair[1] == 1], budget)


def schedule_in_order_of_admission(running, waiting, budget, max_num_seqs):
    return _greedily(running + waiting[: max(0, max_num_seqs - len(running))], budget)


def _greedily(pairs, budget):
    plan = []
    for request_id, remaining in pairs:
        if min(remaining, budget):
            plan.append((request_id, min(remaining, budget)))
        budget -= min(remaining, budget)
    return plan


def schedule_without_a_budget(running, waiting, budget, max_num_seqs):
    return list(running) + waiting[: max(0, max_num_seqs - len(running))]


def schedule_without_a_limit_of_requests(running, waiting, budget, max_num_seqs):
    return schedule(running, waiting, budget, 10**6)


def schedule_overtaking(running, waiting, budget, max_num_seqs):
    plan = schedule(running, [], budget, max_num_seqs)
    left = budget - sum(num_tokens for _, num_tokens in plan)
    return plan + _greedily(sorted(waiting, key=lambda pair: pair[1])[: max_num_seqs - len(running)], left)


def schedule_only_decodes_while_any_run(running, waiting, budget, max_num_seqs):
    return schedule(running, [] if running else waiting, budget, max_num_seqs)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (schedule_prompts_whole, "a chunk"),
        (schedule_prompts_first, "Decodes come before the rest of a prompt"),
        (schedule_in_order_of_admission, "Decodes come before the rest of a prompt"),
        (schedule_without_a_budget, "expected  [('c', 10)]"),
        (schedule_without_a_limit_of_requests, "Admit nobody beyond max_num_seqs"),
        (schedule_overtaking, "D gets the 190 that are left"),
        (schedule_only_decodes_while_any_run, "D gets the 190 that are left"),
        (lambda *args: None, "got       None"),
        (lambda *args: [request_id for request_id, _ in schedule(*args)], "got       ['a', 'b']"),
        (lambda running, waiting, budget, seats: running[5], "raised    IndexError"),
    ],
)
def test_schedule_step_refuses(wrong, told):
    assert told in message(checks.schedule_step, wrong)


def except_in_the_puzzle(change):
    """Right in the single steps of the check (budgets of 2, 6, 10 and 1000), `change` in the puzzle (256)."""

    def function(running, waiting, budget, max_num_seqs):
        plan = schedule(running, waiting, budget, max_num_seqs)
        return change(plan, running, waiting) if budget == 256 else plan

    return function


def without_chunks(plan, running, waiting):
    return schedule(running, waiting if not running else [], 256, 8)


def stingy(plan, running, waiting):
    return schedule(running, waiting, 20, 8)


def prompts_first(plan, running, waiting):
    return schedule_prompts_first(running, waiting, 256, 8)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (stingy, "cut prompts into chunks"),
        (without_chunks, "got       makespan"),
        (prompts_first, "got       longest gap"),
        (lambda plan, *_: [], "somebody computes something"),
        (lambda plan, *_: [(name, num + 300) for name, num in plan], "at most what remains"),
        (lambda plan, *_: [*plan, ("nobody", 1)], "Use the ids you were given"),
        (lambda plan, *_: plan + plan, "each of them once"),
        (lambda plan, running, waiting: running + waiting[: 8 - len(running)], "at most 256 tokens together"),
        (lambda plan, running, waiting: _greedily(running + waiting, 256), "at most 8 requests that run"),
    ],
    ids=["stingy", "one at a time", "prompts first", "idle", "too many", "unknown", "twice", "no budget", "no limit"],
)
def test_the_puzzle_refuses(change, told):
    assert told in message(checks.schedule_step, except_in_the_puzzle(change))


# tokens_static, steps_continuous -------------------------------------------------------------------


def tokens_by_counting(lengths, batch_size):
    """Step by step, row by row."""
    lengths, computed = list(lengths), 0
    while lengths:
        batch, lengths = lengths[:batch_size], lengths[batch_size:]
        while any(left > 0 for left in batch):
            computed += len(batch)
            batch = [left - 1 for left in batch]
    return computed


def tokens_in_one_line(lengths, size):
    return np.sum([len(lengths[i : i + size]) * max(lengths[i : i + size]) for i in range(0, len(lengths), size)])


@pytest.mark.parametrize("right", [tokens_by_counting, tokens_in_one_line])
def test_tokens_static_accepts(right, capsys):
    assert passes(checks.tokens_static, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda lengths, size: sum(lengths), "until the longest has ended"),
        (lambda lengths, size: tokens_by_counting(sorted(lengths), size), "Sorting is not allowed"),
        (lambda lengths, size: tokens_by_counting(lengths, size) // size, "got       3"),  # steps
        (lambda lengths, size: size * sum(max(lengths[i : i + size]) for i in range(0, len(lengths), size)), "one row"),
        (lambda lengths, size: len(lengths) * max(lengths), "2 * 9 + 2 * 3"),
    ],
    ids=["useful", "sorted", "steps", "full last batch", "one batch"],
)
def test_tokens_static_refuses(wrong, told):
    assert told in message(checks.tokens_static, wrong)


def steps_by_simulation(lengths, batch_size):
    """Step by step."""
    waiting, running, steps = list(lengths), [], 0
    while waiting or running:
        while waiting and len(running) < batch_size:
            running.append(waiting.pop(0))
        running = [left - 1 for left in running if left > 1]
        steps += 1
    return steps


def steps_with_a_heap(lengths, batch_size):
    free = [0] * batch_size
    for length in lengths:
        heapq.heappush(free, heapq.heappop(free) + length)
    return float(max(free))


@pytest.mark.parametrize("right", [steps_by_simulation, steps_with_a_heap])
def test_steps_continuous_accepts(right, capsys):
    assert passes(checks.steps_continuous, right, capsys)


def steps_in_turn(lengths, batch_size):
    """Places by turns instead of the one that is free."""
    return max((sum(lengths[place::batch_size]) for place in range(batch_size)), default=0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda lengths, size: sum(max(lengths[i : i + size]) for i in range(0, len(lengths), size)), "9 is busy"),
        (lambda lengths, size: -(-sum(lengths) // size), "nothing is gained on the longest"),
        (lambda lengths, size: max([*lengths, -(-sum(lengths) // size)], default=0), "begins when the second has"),
        (steps_in_turn, "9 is busy"),
        (lambda lengths, size: steps_by_simulation(sorted(lengths, reverse=True), size), "The third begins when"),
    ],
    ids=["static", "perfect", "bound", "by turns", "sorted"],
)
def test_steps_continuous_refuses(wrong, told):
    assert told in message(checks.steps_continuous, wrong)


# sjf_order ----------------------------------------------------------------------------------------


def order_by_repeated_minimum(requests, now, ageing):
    left, ids = list(requests), []
    while left:
        best = min(left, key=lambda request: request[2] - ageing * (now - request[1]))
        left.remove(best)
        ids.append(best[0])
    return tuple(ids)


@pytest.mark.parametrize(
    "right",
    [
        order_by_repeated_minimum,
        lambda requests, now, ageing: [r[0] for r in sorted(requests, key=lambda r: r[2] + ageing * r[1])],
    ],
    ids=["minimum", "without now"],
)
def test_sjf_order_accepts(right, capsys):
    assert passes(checks.sjf_order, right, capsys)


def by(score):
    return lambda requests, now, ageing: [r[0] for r in sorted(requests, key=lambda r: score(r, now, ageing))]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (by(lambda r, now, ageing: r[2]), "strong ageing"),
        (by(lambda r, now, ageing: r[1]), "Hardly any ageing"),
        (by(lambda r, now, ageing: r[2] + ageing * (now - r[1])), "strong ageing"),
        (by(lambda r, now, ageing: r[2] - ageing * r[1]), "strong ageing"),
        (by(lambda r, now, ageing: (r[2] - ageing * (now - r[1]), [-ord(r[0])])), "stay in the order given"),
        (lambda requests, now, ageing: requests, "got       [('a'"),
    ],
    ids=["no ageing", "fcfs", "wrong sign", "arrival only", "unstable", "not the ids"],
)
def test_sjf_order_refuses(wrong, told):
    assert told in message(checks.sjf_order, wrong)


# load_at_slo --------------------------------------------------------------------------------------


def load_by_first_break(rates, p99_ttft, slo):
    broken = [place for place, ttft in enumerate(p99_ttft) if ttft > slo]
    kept = rates[: broken[0]] if broken else rates
    return kept[-1] if kept else 0.0


def load_with_numpy(rates, p99_ttft, slo):
    good = np.cumprod(np.array(p99_ttft) <= slo)
    return np.max(np.array(rates) * good)


@pytest.mark.parametrize("right", [load_by_first_break, load_with_numpy])
def test_load_at_slo_accepts(right, capsys):
    assert passes(checks.load_at_slo, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda rates, ttft, slo: max([r for r, t in zip(rates, ttft, strict=True) if t <= slo], default=0), "lucky"),
        (lambda rates, ttft, slo: max([r for r, t in zip(rates, ttft, strict=True) if t < slo], default=0), "use <="),
        (lambda rates, ttft, slo: max([r for r, t in zip(rates, ttft, strict=True) if t <= slo]), "raised"),
        (lambda rates, ttft, slo: sum(t <= slo for t in ttft), "expected  4.0"),
        (lambda rates, ttft, slo: next((r for r, t in zip(rates, ttft, strict=True) if t > slo), 0), "got       8.0"),
    ],
    ids=["any", "strictly", "none", "place", "first break"],
)
def test_load_at_slo_refuses(wrong, told):
    assert told in message(checks.load_at_slo, wrong)
