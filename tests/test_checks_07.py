"""Chapter 7's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

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


def schedule_waiting_first(running, waiting, budget, max_num_seqs):
    """In front of running prompts, behind the decodes."""
    decodes, prompts = ([pair for pair in running if (pair[1] == 1) == is_decode] for is_decode in (True, False))
    return _greedily(decodes + waiting[: max(0, max_num_seqs - len(running))] + prompts, budget)


def schedule_only_decodes_while_any_run(running, waiting, budget, max_num_seqs):
    return schedule(running, [] if running else waiting, budget, max_num_seqs)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (schedule_prompts_whole, "a chunk"),
        (schedule_prompts_first, "Decodes come before the rest of a prompt"),
        (schedule_in_order_of_admission, "Decodes come before the rest of a prompt"),
        (schedule_without_a_budget, "expected  [('c', 10)]"),
        (schedule_without_a_limit_of_requests, "Admit no request beyond max_num_seqs"),
        (schedule_overtaking, "First come, first served: D does not overtake C"),
        (schedule_only_decodes_while_any_run, "990 tokens of the budget stay free, and A gets none of them"),
        (schedule_waiting_first, "and each group keeps its order: a before b"),
        (lambda *args: None, "got       None"),
        (lambda *args: [request_id for request_id, _ in schedule(*args)], "got       ['a', 'b']"),
        (lambda running, waiting, budget, seats: running[5], "raised    IndexError"),
    ],
)
def test_schedule_step_refuses(wrong, told):
    assert told in message(checks.schedule_step, wrong)


def except_in_the_run(change):
    """Right in the single steps of the check (budgets of 2, 6, 10 and 1000), `change` in the whole run (256)."""

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
        (lambda plan, *_: [], "at least one token"),
        (lambda plan, *_: [(name, num + 300) for name, num in plan], "at most what remains"),
        (lambda plan, *_: [*plan, ("nobody", 1)], "Use the ids you were given"),
        (lambda plan, *_: plan + plan, "each of them once"),
        (lambda plan, running, waiting: running + waiting[: 8 - len(running)], "at most 256 tokens together"),
        (lambda plan, running, waiting: _greedily(running + waiting, 256), "at most 8 requests that run"),
    ],
    ids=["stingy", "one at a time", "prompts first", "idle", "too many", "unknown", "twice", "no budget", "no limit"],
)
def test_the_whole_run_refuses(change, told):
    assert told in message(checks.schedule_step, except_in_the_run(change))


# serve_continuously -------------------------------------------------------------------------------


def serve(prompts, max_tokens, budget, max_num_seqs, schedule, machine):
    """With a record for each request."""
    state = {name: {"ids": [*ids], "done": 0, "new": []} for name, ids in prompts.items()}
    waiting, running = list(prompts), []
    while waiting or running:
        left = {name: len(each["ids"]) - each["done"] for name, each in state.items()}
        plan = schedule([(n, left[n]) for n in running], [(n, left[n]) for n in waiting], budget, max_num_seqs)
        plan = dict(plan)
        tokens = machine.compute({n: state[n]["ids"][state[n]["done"] :][:num] for n, num in plan.items()})
        for name, num in plan.items():
            each = state[name]
            each["done"] += num
            if name in waiting:
                waiting.remove(name)
                running.append(name)
            if each["done"] < len(each["ids"]):
                continue
            each["ids"].append(tokens[name])
            each["new"].append(tokens[name])
            if tokens[name] in machine.eos_token_ids or len(each["new"]) >= max_tokens[name]:
                running.remove(name)
                machine.forget(name)
    return {name: tuple(each["new"]) for name, each in state.items()}


def serve_from_the_other_end(*args):
    """The order of the dict does not matter, and numpy's numbers are numbers."""
    return {name: np.array(ids) for name, ids in reversed(serve(*args).items())}


@pytest.mark.parametrize("right", [serve, serve_from_the_other_end])
def test_serve_continuously_accepts(right, capsys):
    assert passes(checks.serve_continuously, right, capsys)


class Changed:
    """A machine between the loop and the real one, to make a right loop wrong."""

    def __init__(self, machine, **changes):
        self.machine, self.changes = machine, changes

    def __getattr__(self, name):
        return self.changes.get(name) or getattr(self.machine, name)


def serve_on(change):
    """The right loop, on a machine that is changed."""
    return lambda *args: serve(*args[:-1], change(args[-1]))


def one_at_a_time(prompts, max_tokens, budget, max_num_seqs, schedule, machine):
    return {name: serve({name: ids}, max_tokens, budget, 1, schedule, machine)[name] for name, ids in prompts.items()}


def first_batch_first(prompts, max_tokens, budget, max_num_seqs, schedule, machine):
    """Static: the next batch when all of this one have ended."""
    names, outputs = list(prompts), {}
    while names:
        batch, names = names[:max_num_seqs], names[max_num_seqs:]
        chosen = {name: prompts[name] for name in batch}
        outputs |= serve(chosen, max_tokens, budget, max_num_seqs, schedule, machine)
    return outputs


def one_too_many(prompts, max_tokens, *others):
    return serve(prompts, {name: num + 1 for name, num in max_tokens.items()}, *others)


def one_too_few(prompts, max_tokens, *others):
    return serve(prompts, {name: max(1, num - 1) for name, num in max_tokens.items()}, *others)


def with_the_prompt(prompts, *others):
    return {name: [*prompts[name], *ids] for name, ids in serve(prompts, *others).items()}


def without_the_prompt(prompts, max_tokens, budget, max_num_seqs, schedule, machine):
    return machine.compute({name: [ids[-1]] for name, ids in prompts.items()})


def serve_by(scheduled):
    """The right loop, with what it hands to the schedule changed."""

    def loop(prompts, max_tokens, budget, max_num_seqs, schedule, machine):
        return serve(prompts, max_tokens, budget, max_num_seqs, lambda *args: schedule(*scheduled(*args)), machine)

    return loop


def counts_every_row(prompts, max_tokens, budget, max_num_seqs, schedule, machine):
    """Takes the row of a chunk for a new token."""
    tokens = {name: list(ids) for name, ids in prompts.items()}
    computed, running, waiting = dict.fromkeys(prompts, 0), [], list(prompts)
    while running or waiting:
        lists = [[(name, len(tokens[name]) - computed[name]) for name in names] for names in (running, waiting)]
        plan = dict(schedule(*lists, budget, max_num_seqs))
        new = {name: tokens[name][computed[name] : computed[name] + num] for name, num in plan.items()}
        for name, token in machine.compute(new).items():
            computed[name] += plan[name]
            if name in waiting:
                waiting.remove(name)
                running.append(name)
            tokens[name].append(token)
            if len(tokens[name]) == len(prompts[name]) + max_tokens[name]:
                running.remove(name)
                machine.forget(name)
    return {name: tokens[name][len(prompts[name]) :] for name in prompts}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (one_at_a_time, "All three share each pass"),
        (first_batch_first, "another one may run in the next pass"),
        (one_too_many, "'once' has 2 new tokens, and max_tokens allows 1"),
        (one_too_few, "'once' ends after 3 tokens, and may have 4"),
        (with_the_prompt, "The answer of 'once' begins with its prompt"),
        (without_the_prompt, "compute each token once"),
        (counts_every_row, "row of an earlier chunk"),
        (serve_on(lambda machine: Changed(machine, forget=lambda name: None)), "Call machine.forget(id)"),
        (serve_on(lambda machine: Changed(machine, eos_token_ids=[-1])), "goes on behind 0, which is one of"),
        (serve_by(lambda running, *others: (running[::-1], *others)), "in this order: these run, all others wait"),
        (serve_by(lambda running, waiting, *others: ([], running + waiting, *others)), "these run, all others wait"),
        (lambda *args: list(serve(*args).values()), "got       {}"),
        (lambda *args: None, "got       None"),
    ],
    ids=[
        "alone",
        "static",
        "one more",
        "one less",
        "prompt too",
        "last token",
        "chunks",
        "keeps caches",
        "no eos",
        "order",
        "all wait",
        "a list",
        "nothing",
    ],
)
def test_serve_continuously_refuses(wrong, told):
    assert told in message(checks.serve_continuously, wrong)


# queue_order --------------------------------------------------------------------------------------


def shortest_first(lengths, places):
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def until_too_late(lengths, places):
    """Shortest first, but a long answer starts when it could not end in time any more."""
    end, left, free, order = max(max(lengths), sum(lengths) / places), shortest_first(lengths, places), [0] * places, []
    while left:
        free.sort()
        late = free[0] + lengths[left[0]] + lengths[left[-1]] > end
        order.append(left.pop(-1 if late else 0))
        free[0] += lengths[order[-1]]
    return order


@pytest.mark.parametrize("right", [until_too_late, lambda *args: np.array(until_too_late(*args))])
def test_queue_order_accepts(right, capsys):
    assert passes(checks.queue_order, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda lengths, places: list(range(len(lengths))), "beside empty places"),
        (shortest_first, "got       534 steps"),
        (lambda *args: shortest_first(*args)[::-1], "got       mean end in step 313.5"),
        (lambda *args: shortest_first(*args)[-6:] + shortest_first(*args)[:-6], "beside empty places"),
        (lambda *args: shortest_first(*args)[1:], "from 0 to 63 exactly once"),
        (lambda *args: [*shortest_first(*args), 0], "from 0 to 63 exactly once"),
        (lambda lengths, places: sorted(lengths), "from 0 to 63 exactly once"),
        (lambda lengths, places: None, "got       None"),
    ],
    ids=["fcfs", "sjf", "longest", "six long first", "one missing", "one twice", "lengths", "nothing"],
)
def test_queue_order_refuses(wrong, told):
    assert told in message(checks.queue_order, wrong)
