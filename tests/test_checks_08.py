"""Chapter 8's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

import numpy as np
import pytest

from check_answers import message, passes
from minillm import checks
from minillm.checks import chapter_08
from minillm.checks.base import NotWrittenYet
from minillm.engine import BlockManager, Scheduler, SchedulerConfig
from minillm.simulation import SimulatedExecutor, VirtualClock, course_requests, preset, run

# allocate -----------------------------------------------------------------------------------------


def needed(table, num_tokens, block_size):
    return -(-num_tokens // block_size) - len(table)


def allocate(table, free, num_tokens, block_size):
    """A new list, blocks from the end of free."""
    missing = needed(table, num_tokens, block_size)
    return None if missing > len(free) else table + [free.pop() for _ in range(missing)]


def allocate_in_place(table, free, num_tokens, block_size):
    """The list it was given, blocks from the beginning of free."""
    missing = max(0, needed(table, num_tokens, block_size))
    if missing > len(free):
        return None
    table += free[:missing]
    del free[:missing]
    return table


def allocate_and_sort(table, free, num_tokens, block_size):
    """A tuple, the smallest blocks first, and free in another order than before."""
    missing = max(0, needed(table, num_tokens, block_size))
    if missing > len(free):
        return None
    free.sort()
    taken, free[:] = free[:missing], free[missing:]
    return (*table, *taken)


@pytest.mark.parametrize("right", [allocate, allocate_in_place, allocate_and_sort])
def test_allocate_accepts(right, capsys):
    assert passes(checks.allocate, right, capsys)


def allocate_one_by_one(table, free, num_tokens, block_size):
    """Takes blocks before it knows that there are enough."""
    table = list(table)
    while len(table) * block_size < num_tokens:
        if not free:
            return None
        table.append(free.pop())
    return table


def allocate_without_taking(table, free, num_tokens, block_size):
    missing = max(0, needed(table, num_tokens, block_size))
    return None if missing > len(free) else table + free[:missing]


def allocate_anew(table, free, num_tokens, block_size):
    blocks = -(-num_tokens // block_size)
    return None if blocks > len(free) else [free.pop() for _ in range(blocks)]


def allocate_in_front(table, free, num_tokens, block_size):
    missing = needed(table, num_tokens, block_size)
    return None if missing > len(free) else [free.pop() for _ in range(missing)] + table


def allocate_always_one(table, free, num_tokens, block_size):
    return None if not free else [*table, free.pop()]


def allocate_and_cut(table, free, num_tokens, block_size):
    grown = allocate(table, free, num_tokens, block_size)
    return grown and grown[: -(-num_tokens // block_size)]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (allocate_one_by_one, "So count first"),
        (allocate_without_taking, "take any two out of free"),
        (allocate_anew, "The blocks it has hold 8 tokens"),
        (allocate_in_front, "behind those it has"),
        (allocate_always_one, "need two blocks"),
        (allocate_and_cut, "More blocks than needed"),
        (lambda table, free, *_: table + [free.pop() for _ in range(len(free))], "need two blocks"),
        (lambda table, free, num, size: table + [free.pop() for _ in range(needed(table, num, size))], "return None"),
        (lambda *_: None, "does it end with `return`"),
        (lambda *args: len(allocate(*args) or ()), "got       2, and then"),
    ],
    ids=["one by one", "not taken", "anew", "in front", "one", "cut", "all", "no check", "nothing", "number"],
)
def test_allocate_refuses(wrong, told):
    assert told in message(checks.allocate, wrong)


# begin_table --------------------------------------------------------------------------------------


def begin(keys, num_tokens, block_of, count, free, block_size):
    """The longest prefix by trying from the end; fresh blocks from the beginning of free."""
    found = 0
    while found < (num_tokens - 1) // block_size and found < len(keys) and keys[found] in block_of:
        found += 1
    missing = needed([], num_tokens, block_size) - found
    if len(free) < missing:
        return None
    table = [block_of[key] for key in keys[:found]] + free[:missing]
    del free[:missing]
    for place, block in enumerate(table):
        count.setdefault(block, 0)
        count[block] += 1
        if place < len(keys) and keys[place] not in block_of:
            block_of[keys[place]] = block
    return table, found * block_size


def begin_as_a_list(*args):
    answer = begin(*args)
    return None if answer is None else [np.array(answer[0]), np.int64(answer[1])]


@pytest.mark.parametrize("right", [begin, begin_as_a_list])
def test_begin_table_accepts(right, capsys):
    assert passes(checks.begin_table, right, capsys)


def with_change(change):
    """The right answer, and something done to it or to the pool afterwards."""

    def function(keys, num_tokens, block_of, count, free, block_size):
        answer = begin(keys, num_tokens, block_of, count, free, block_size)
        return answer and change(answer, keys, block_of, count, free)

    return function


def finds_all(keys, num_tokens, *others):
    return begin(keys, num_tokens + 1 if num_tokens % 4 == 0 else num_tokens, *others)


def does_not_stop(keys, num_tokens, block_of, count, free, block_size):
    """Takes what is found behind a missing key, too."""
    wanted = [key for key in keys[: (num_tokens - 1) // block_size] if key in block_of]
    return begin(wanted + [key for key in keys if key not in wanted], num_tokens, block_of, count, free, block_size)


def counts_before_it_knows(keys, num_tokens, block_of, count, free, block_size):
    for key in keys:
        if key in block_of:
            count[block_of[key]] = count.get(block_of[key], 0) + 1
    answer = begin(keys, num_tokens, block_of, dict(count), free, block_size)
    for block in () if answer is None else answer[0][answer[1] // block_size :]:
        count[block] = 1
    return answer


def shares_nothing(keys, num_tokens, block_of, count, free, block_size):
    return begin(keys, num_tokens, {}, count, free, block_size)


def registers_what_is_not_full(keys, num_tokens, block_of, count, free, block_size):
    return begin([*keys, "more"], num_tokens, block_of, count, free, block_size)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (finds_all, "One token must be computed"),
        (does_not_stop, "At the first missing key stop"),
        (counts_before_it_knows, "count"),
        (shares_nothing, "block_of"),
        (registers_what_is_not_full, "block_of"),
        (with_change(lambda answer, *_: answer[0]), "0 tokens found"),
        (with_change(lambda answer, keys, block_of, count, free: count.clear() or answer), "count"),
        (with_change(lambda answer, keys, block_of, count, free: free.append(answer[0][-1]) or answer), "out of free"),
        (with_change(lambda answer, *_: (answer[0][::-1], answer[1])), "block_of"),
        (lambda *_: None, "got       None"),
    ],
    ids=["all", "no stop", "early", "nothing", "not full", "table", "no count", "not taken", "order", "none"],
)
def test_begin_table_refuses(wrong, told):
    assert told in message(checks.begin_table, wrong)


# make_room ----------------------------------------------------------------------------------------


def room(name, num_tokens, running, tables, free, block_size):
    """Without a helper: frees first, then takes."""
    gone = []
    while name in running and needed(tables[name], num_tokens, block_size) > len(free):
        gone.append(running.pop())
        free.extend(tables[gone[-1]])
        tables[gone[-1]] = []
    if name in running:
        tables[name].extend(free.pop(0) for _ in range(max(0, needed(tables[name], num_tokens, block_size))))
    return tuple(gone)


@pytest.mark.parametrize("right", [room, lambda *args: iter(room(*args))], ids=["tuple", "iterator"])
def test_make_room_accepts(right, capsys):
    assert passes(checks.make_room, right, capsys)


def room_of_the_first(name, num_tokens, running, tables, free, block_size):
    running.reverse()
    gone = room(name, num_tokens, running, tables, free, block_size)
    running.reverse()
    return gone


def room_without_itself(name, num_tokens, running, tables, free, block_size):
    others = [each for each in running if each != name]
    gone = room(name, num_tokens, [name, *others], tables, free, block_size)
    running[:] = [each for each in running if each not in gone]
    return gone


def room_once(name, num_tokens, running, tables, free, block_size):
    if needed(tables[name], num_tokens, block_size) <= len(free):
        return room(name, num_tokens, running, tables, free, block_size)
    victim = running.pop()
    free += tables.pop(victim)
    return [victim]


def room_and_blocks_lost(name, num_tokens, running, tables, free, block_size):
    held = sum(map(len, tables.values())) + len(free)
    gone = room(name, num_tokens, running, tables, free, block_size)
    del free[: held and len(gone)]
    return gone


def room_for_all(name, num_tokens, running, tables, free, block_size):
    """Preempts all that came later, needed or not."""
    gone = []
    while running[-1] != name:
        gone.append(running.pop())
        free += tables.pop(gone[-1])
    return gone + list(room(name, num_tokens, running, tables, free, block_size))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (room_of_the_first, "C came last"),
        (room_without_itself, "C itself came last"),
        (room_once, "Then A takes one"),
        (room_and_blocks_lost, "its blocks go back to free"),
        (room_for_all, "nobody is preempted"),
        (lambda *args: len(room(*args)), "got       0"),
        (lambda *args: room(*args) and None, "got       None"),
    ],
    ids=["first", "never itself", "once", "lost", "all", "number", "nothing"],
)
def test_make_room_refuses(wrong, told):
    assert told in message(checks.make_room, wrong)


# schedule_paged -----------------------------------------------------------------------------------


def paged(running, waiting, tables, free, budget, max_num_seqs, block_size):
    """A dict for the plan; blocks for the whole chunk at once."""
    plan, gone, order = {}, [], [name for name, *_ in running]
    for name, computed, remaining in running:
        num = min(budget - sum(plan.values()), remaining)
        if num > 0 and name not in gone:
            gone += room(name, computed + num, order, tables, free, block_size)
            plan |= {name: np.int64(num)} if name in order else {}
    if gone:
        return plan, gone
    for name, num_tokens in waiting:
        left = budget - sum(plan.values())
        if left <= 0 or len(order) >= max_num_seqs or needed([], num_tokens, block_size) > len(free):
            break
        plan[name] = min(left, num_tokens)
        order.append(name)
        tables[name] = [free.pop(0) for _ in range(needed([], plan[name], block_size))]
    return plan, gone


def paged_as_lists(*args):
    plan, gone = paged(*args)
    return [(list(pair) for pair in plan.items()), tuple(gone)]


@pytest.mark.parametrize("right", [paged, paged_as_lists])
def test_schedule_paged_accepts(right, capsys):
    assert passes(checks.schedule_paged, right, capsys)


@pytest.mark.parametrize(("num_blocks", "budget"), chapter_08.RUNS)
def test_the_checks_machine_and_the_engine_count_the_same(num_blocks, budget):
    lengths = [(request.num_prompt_tokens, request.params.max_tokens) for request in course_requests()]
    counted = chapter_08.paged_run(paged, lengths, num_blocks, budget)
    config, clock = SchedulerConfig(chapter_08.SEATS, budget, 4096), VirtualClock()
    manager = BlockManager(num_blocks + 1, chapter_08.SIZE, enable_prefix_caching=False)
    scheduler = Scheduler(config, clock, block_manager=manager, watermark=0)
    steps = run(scheduler, SimulatedExecutor(preset("Llama-2-7B", "a100"), clock), course_requests(), clock).steps
    preemptions = sum(len(step.preempted) for step in steps)
    assert counted[:3] == (len(steps), sum(step.num_tokens for step in steps), preemptions)


def changed(**others):
    """The right scheduler with some of what it is given changed."""
    names = ["running", "waiting", "tables", "free", "budget", "max_num_seqs", "block_size"]
    return lambda *args: paged(*[others.get(name, lambda x: x)(arg) for name, arg in zip(names, args, strict=True)])


def overtakes(running, waiting, tables, free, budget, max_num_seqs, block_size):
    waiting.sort(key=lambda pair: pair[1])
    return paged(running, waiting, tables, free, budget, max_num_seqs, block_size)


def admits_in_spite_of_preemption(running, waiting, tables, free, budget, max_num_seqs, block_size):
    plan, gone = paged(running, waiting, tables, free, budget, max_num_seqs, block_size)
    for name, num_tokens in waiting if gone else ():
        if needed([], num_tokens, block_size) <= len(free):
            tables[name] = [free.pop() for _ in range(needed([], num_tokens, block_size))]
            return plan | {name: num_tokens}, gone
    return plan, gone


def leaves_running_requests_out(running, waiting, tables, free, budget, max_num_seqs, block_size):
    """Never preempts: a request without a block computes nothing."""
    plan = {}
    for name, computed, remaining in running:
        missing = needed(tables[name], computed + remaining, block_size)
        if missing <= len(free):
            tables[name] += [free.pop() for _ in range(max(0, missing))]
            plan[name] = remaining
    return plan, []


def preempts_the_first(running, waiting, tables, free, budget, max_num_seqs, block_size):
    """The longest request makes room, not the youngest."""
    plan, gone, alive = {}, [], [name for name, *_ in running]
    for name, computed, remaining in running:
        num = min(budget - sum(plan.values()), remaining)
        while name in alive and needed(tables[name], computed + num, block_size) > len(free):
            gone.append(alive.pop(0))
            free += tables.pop(gone[-1])
        if name in alive and num:
            tables[name] += [free.pop() for _ in range(max(0, needed(tables[name], computed + num, block_size)))]
            plan[name] = num
    plan = {name: num for name, num in plan.items() if name in alive}
    if gone:
        return plan, gone
    return paged(running, waiting, tables, free, budget, max_num_seqs, block_size)


def admits_a_chunk(running, waiting, tables, free, budget, max_num_seqs, block_size):
    """Asks for the blocks of the tokens that are computed now."""
    plan, gone = paged(running, waiting, tables, free, budget, max_num_seqs, block_size)
    left = budget - sum(plan.values())
    for name, num_tokens in [pair for pair in waiting if pair[0] not in plan][:1]:
        num = min(left, num_tokens, block_size * len(free))
        if num and not gone and len(running) + len(plan.keys() & dict(waiting).keys()) < max_num_seqs:
            tables[name] = [free.pop() for _ in range(needed([], num, block_size))]
            plan[name] = num
    return plan, gone


def exceeds_the_budget(running, waiting, tables, free, budget, max_num_seqs, block_size):
    """Running requests get all that remains of them."""
    return paged(running, waiting, tables, free, budget + sum(left for *_, left in running), max_num_seqs, block_size)


def admits_with_the_whole_table(running, waiting, tables, free, budget, max_num_seqs, block_size):
    """Takes blocks for the whole prompt, whatever part of it is computed."""
    plan, gone = paged(running, waiting, tables, free, budget, max_num_seqs, block_size)
    for name, num_tokens in waiting:
        if name in plan:
            tables[name] += [free.pop() for _ in range(needed(tables[name], num_tokens, block_size))]
    return plan, gone


def takes_no_blocks(running, waiting, tables, free, *others):
    return paged(running, waiting, tables, list(free), *others)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (changed(budget=lambda budget: budget // 2), "while budget, places and free blocks last"),
        (changed(budget=lambda budget: 2 * budget), "at most 256 tokens together"),
        (changed(max_num_seqs=lambda seats: 2 * seats), "Admit no request beyond max_num_seqs"),
        (changed(waiting=lambda waiting: waiting[:1]), "59 tokens for req 1, which waits"),
        (overtakes, "tokens for req"),
        (preempts_the_first, "Preempt the request that was admitted last"),
        (admits_a_chunk, "only if all tokens find free blocks: req"),
        (admits_in_spite_of_preemption, "waits in front of all others"),
        (leaves_running_requests_out, "41 tokens for req 0, which waits"),
        (exceeds_the_budget, "min(remaining, budget left)"),
        (admits_with_the_whole_table, "no block for a token that is not computed yet"),
        (takes_no_blocks, "Take a block out of free"),
        (lambda *args: paged(*args)[0], "Return two things"),
        (lambda *args: None, "got       None"),
        (lambda running, *_: running[3], "raised    IndexError"),
    ],
    ids=[
        "half",
        "double",
        "seats",
        "one",
        "overtakes",
        "first out",
        "a chunk",
        "admits",
        "no preemption",
        "more than the budget",
        "whole table",
        "not taken",
        "plan",
        "none",
        "error",
    ],
)
def test_schedule_paged_refuses(wrong, told):
    assert told in message(checks.schedule_paged, wrong)


# choose_victim ------------------------------------------------------------------------------------


def once_first(idle, now):
    return sorted(idle, key=lambda each: (each[2] > 1, each[1], -each[3]))[0][0]


def uses_over_age(idle, now):
    return np.int64(min(idle, key=lambda each: (each[2] / (now - each[1] + 1), -each[3]))[0])


@pytest.mark.parametrize("right", [once_first, uses_over_age])
def test_choose_victim_accepts(right, capsys):
    assert passes(checks.choose_victim, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda idle, now: min(idle, key=lambda each: (each[1], -each[3]))[0], "got       2,574 blocks"),
        (lambda idle, now: min(idle, key=lambda each: (each[2], each[1], -each[3]))[0], "dead in the afternoon"),
        (lambda idle, now: max(idle, key=lambda each: each[3])[0], "at most 2,393"),
        (lambda idle, now: idle[0], "a block of the list"),
        (lambda idle, now: 99, "a block of the list"),
        (lambda idle, now: None, "got       None"),
    ],
    ids=["lru", "lfu", "deepest", "tuple", "unknown", "nothing"],
)
def test_choose_victim_refuses(wrong, told):
    assert told in message(checks.choose_victim, wrong)


def test_allocate_says_which_helper_is_missing():
    def blocks_needed(num_tokens, block_size):
        raise NotImplementedError("write blocks_needed")

    def solution(table, free, num_tokens, block_size):
        missing = blocks_needed(num_tokens, block_size) - len(table)
        return None if missing > len(free) else table + [free.pop() for _ in range(missing)]

    with pytest.raises(NotWrittenYet, match="allocate: it calls blocks_needed, which is not written yet"):
        checks.allocate(solution)


# all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [checks.allocate, checks.begin_table, checks.make_room, checks.schedule_paged, checks.choose_victim],
    ids=lambda c: c.__name__,
)
def test_a_stub_is_told_to_write(check):
    def stub(*_):
        raise NotImplementedError

    with pytest.raises(NotWrittenYet, match="not written yet"):
        check(stub)
