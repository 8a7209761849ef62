"""Chapter 8, the paged cache: handing out blocks, sharing a prefix, preempting, and a scheduler that does all of it."""

import copy
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from minillm.checks.base import (
    Case,
    CheckFailed,
    as_list,
    call,
    describe,
    failure,
    is_number,
    number_of,
    realised,
    run_check,
    same_value,
)
from minillm.costs import blocks_needed
from minillm.simulation import course_requests

Name = str  # of a request


# --- allocate --------------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """What `allocate` was given, and how many blocks the table must have after it; None if there are too few."""

    table: list[int]
    free: list[int]
    num_blocks: int | None


class Allocated(NamedTuple):
    """What one call of `allocate` left behind."""

    returned: Any
    table: list[int]  # the list that was given
    free: list[int]  # the list that was given


def allocate(function: Callable) -> None:
    """`allocate(table, free, num_tokens, block_size)` -> the table with room for num_tokens; None if blocks are short.

    Any blocks of `free` will do, and they must be gone from it. If blocks are short, nothing may have changed.
    """
    cases = [
        _allocation([], [5, 2, 7], 7, 4, "7 tokens need two blocks of 4: take any two out of free, and return both."),
        _allocation([5, 2], [7, 1], 8, 4, "The blocks it has hold 8 tokens: take none, and return the table as it is."),
        _allocation([5, 2], [7, 1], 9, 4, "One more block, behind those it has. The old ones stay where they are."),
        _allocation([3], [6, 1, 8], 17, 16, "The blocks that 17 tokens need, minus len(table), is how many to take."),
        _allocation([], [4], 4, 4, "One block is missing and one is free: that is just enough."),
        _allocation([6], [], 4, 4, "No block is free, but none is needed either."),
        _allocation([5, 2], [], 9, 4, "No block is free: return None."),
        _allocation([5], [7], 12, 4, "Too few: return None, and leave table and free as they were. So count first."),
        _allocation([9, 4], [1], 3, 4, "More blocks than needed is no harm: return the table as it is."),
    ]
    run_check("allocate", _observed(function), cases, same=_same_allocation, show=_show_allocation)


def _allocation(table: list[int], free: list[int], num_tokens: int, block_size: int, hint: str) -> Case:
    missing = max(0, blocks_needed(num_tokens, block_size) - len(table))
    wanted = Wanted(table, free, len(table) + missing if missing <= len(free) else None)
    return Case((table, free, num_tokens, block_size), wanted, hint)


def _observed(function: Callable) -> Callable:
    """The reader's function, and the lists after the call. A None that cannot be meant stays one, for its hint."""

    def observed(table: list[int], free: list[int], num_tokens: int, block_size: int) -> Allocated | None:
        scarce = blocks_needed(num_tokens, block_size) - len(table) >= len(free)
        returned = realised(function(table, free, num_tokens, block_size))
        return None if returned is None and not scarce else Allocated(as_list(returned), table, free)

    return observed


def _same_allocation(got: Allocated, wanted: Wanted) -> bool:
    if wanted.num_blocks is None:
        return got.returned is None and got.table == wanted.table and sorted(got.free) == sorted(wanted.free)
    if not isinstance(got.returned, list) or len(got.returned) != wanted.num_blocks:
        return False
    held, new = got.returned[: len(wanted.table)], got.returned[len(wanted.table) :]
    if not same_value(held, wanted.table) or not all(map(is_number, new)):
        return False
    return sorted([*new, *got.free]) == sorted(wanted.free)


def _show_allocation(outcome: Allocated | Wanted) -> str:
    if isinstance(outcome, Allocated):
        return f"{describe(outcome.returned)}, and then table {outcome.table}, free {outcome.free}"
    if outcome.num_blocks is None:
        return f"None, and then table {outcome.table}, free {outcome.free}"
    taken = outcome.num_blocks - len(outcome.table)
    return f"{outcome.table} and {taken} of {outcome.free} behind it, and then {len(outcome.free) - taken} blocks free"


# --- begin_table -----------------------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """A pool with a prefix cache."""

    block_of: dict[Hashable, int]  # key of a full block -> where its content is
    count: dict[int, int]  # block -> tables that it is in; absent or 0: in none
    free: list[int]  # blocks without content


class Begun(NamedTuple):
    """What one call of `begin_table` returned, and the pool after it."""

    table: Any
    num_found: Any
    pool: Pool


def begin_table(function: Callable) -> None:
    """`begin_table(keys, num_tokens, block_of, count, free, block_size)` -> (table, tokens found), or None.

    Then a stream of prompts: the check counts the tokens that are computed and the blocks that are used.
    """
    shared = {"a": 3, "ab": 7, "abc": 5}
    cases = [
        _beginning(
            "xy",
            11,
            Pool({}, {}, [4, 9, 6]),
            "Nothing is cached: three fresh blocks, no token found; register full ones.",
        ),
        _beginning("xy", 11, Pool(shared, {}, [4, 9, 6]), "No key of this prompt is in block_of."),
        _beginning(
            "abx", 13, Pool(shared, {3: 1, 7: 1, 5: 1}, [4, 9]), "Two keys are found, so 8 tokens; two are new."
        ),
        _beginning("ab", 9, Pool(shared, {3: 2, 7: 1, 5: 0}, [4]), "A found block is in one more table: count it."),
        _beginning(
            "ab",
            10,
            Pool({"ab": 7}, {}, [4, 2, 1]),
            "At the first missing key stop looking. A key keeps the block it has.",
        ),
        _beginning(
            "ab", 8, Pool(shared, {}, [4, 2]), "One token must be computed: the block of the last is not shared."
        ),
        _beginning("abx", 13, Pool(shared, {3: 1, 7: 1}, [4]), "Blocks are short: return None and change nothing."),
        _beginning("x", 6, Pool({}, {}, [4, 2]), "The second block is not full: it has no key and is not registered."),
        _beginning("", 3, Pool({}, {}, [4]), "A prompt of less than a block has no key."),
    ]
    for case in cases:
        got = call("begin_table", _begun_by(function), case, _show_begun)
        if got != case.expected and (wrong := _difference(got, case.expected)):
            raise CheckFailed(failure("begin_table", case, f"got       {_show_begun(got)}", f"{wrong}"))
    _serve_prompts(function)
    print(
        f"✓ begin_table: {len(cases)} cases, and 200 prompts: {_computed_of(_begin_table)} of {TOKENS} tokens computed"
    )


def _beginning(letters: str, num_tokens: int, pool: Pool, hint: str) -> Case:
    keys = [letters[: end + 1] for end in range(len(letters))]
    args = keys, num_tokens, *pool, 4
    return Case(args, _begun_by(_begin_table)(*map(_copied, args)), hint)


def _copied(value: Any) -> Any:
    return value.copy() if hasattr(value, "copy") else value


def _begun_by(function: Callable) -> Callable:
    def begun(keys: list, num_tokens: int, block_of: dict, count: dict, free: list, block_size: int) -> Begun:
        answer = as_list(realised(function(keys, num_tokens, block_of, count, free, block_size)))
        pool = Pool(block_of, {block: num for block, num in count.items() if num}, free)
        if isinstance(answer, list) and len(answer) == 2:
            return Begun(as_list(answer[0]), number_of(answer[1]), pool)
        return Begun(answer, None, pool)

    return begun


def _begin_table(keys: list, num_tokens: int, block_of: dict, count: dict, free: list, block_size: int) -> tuple | None:
    found = []
    for key in keys[: (num_tokens - 1) // block_size]:
        if key not in block_of:
            break
        found.append(block_of[key])
    missing = blocks_needed(num_tokens, block_size) - len(found)
    if missing > len(free):
        return None
    table = found + [free.pop() for _ in range(missing)]
    for block in table:
        count[block] = count.get(block, 0) + 1
    for key, block in zip(keys, table, strict=False):
        block_of.setdefault(key, block)
    return table, len(found) * block_size


def _difference(got: Begun, expected: Begun) -> str | None:
    """What is expected where a right answer differs in more than which free blocks it took; None if it does not."""
    if expected.table is None:
        same = got.table is None and sorted(got.pool.free) == sorted(expected.pool.free)
        same = same and got.pool.count == expected.pool.count and got.pool.block_of == expected.pool.block_of
        return None if same else "None, and block_of, count and free as they were"
    if not isinstance(got.table, list) or len(got.table) != len(expected.table) or got.num_found != expected.num_found:
        return f"a table of {len(expected.table)} blocks, {expected.num_found} tokens found"
    num_found = expected.num_found // 4
    fresh = got.table[num_found:]
    if got.table[:num_found] != expected.table[:num_found]:
        return f"a table that begins with the found blocks {expected.table[:num_found]}"
    if sorted([*fresh, *got.pool.free]) != sorted([*expected.table[num_found:], *expected.pool.free]):
        return f"{len(fresh)} blocks taken out of free"
    renamed = dict(zip(expected.table, got.table, strict=True))
    count = {renamed.get(block, block): num for block, num in expected.pool.count.items()}
    if got.pool.count != count:
        return f"count {count}"
    block_of = {key: renamed.get(block, block) for key, block in expected.pool.block_of.items()}
    return None if got.pool.block_of == block_of else f"block_of {block_of}"


def _show_begun(begun: Begun) -> str:
    found = "" if begun.num_found is None else f", {begun.num_found} tokens found"
    return f"{describe(begun.table)}{found}; then count {begun.pool.count}, free {begun.pool.free}"


TOKENS = 200 * 45  # of the prompts in the stream: 10 blocks of 4 each, and 5 tokens more


def _prompts() -> list[list[Hashable]]:
    """Keys of 200 prompts. Each begins with one of four system prompts of 8 blocks."""
    rng = random.Random(8)
    prompts = []
    for number in range(200):
        system = rng.randrange(4)
        prompts.append([(system, place) for place in range(8)] + [(number, place) for place in range(8, 11)])
    return prompts


def _computed_of(function: Callable) -> int:
    """Tokens that are computed for the stream, with up to 6 requests at once."""
    pool, tables, computed = Pool({}, {}, list(range(1, 4 * 200))), [], 0
    for keys in _prompts():
        table, num_found = function(keys, 45, *pool, 4)
        tables.append(list(table))
        computed += 45 - int(num_found)
        if len(tables) == 6:
            _end_table(tables.pop(0), pool)
    return computed


def _end_table(table: Sequence[int], pool: Pool) -> None:
    """A request ends: a registered block keeps its content, another one is free when no table has it."""
    registered = set(pool.block_of.values())
    for block in table:
        pool.count[block] -= 1
        if pool.count[block] == 0 and block not in registered:
            pool.free.append(block)


def _serve_prompts(function: Callable) -> None:
    case = Case(("…",), "", "Count every table that a block is in, and find each beginning that is registered.")
    try:
        got = _computed_of(function)
    except Exception as error:
        told = f"raised    {type(error).__name__}: {error}".splitlines()[0]
        raise CheckFailed(failure("begin_table", case, told, "200 prompts served")) from error
    if got != (expected := _computed_of(_begin_table)):
        told = f"got       {got} of {TOKENS} tokens computed"
        raise CheckFailed(failure("begin_table", case, told, f"{expected} of {TOKENS}"))


# --- make_room -------------------------------------------------------------------------------------------------------


class Room(NamedTuple):
    """What one call of `make_room` returned, and what it left behind."""

    preempted: Any
    running: list[Name]
    tables: dict[Name, list[int]]
    free: list[int]


def make_room(function: Callable) -> None:
    """`make_room(name, num_tokens, running, tables, free, block_size)` -> ids of those preempted, in that order."""
    abc = {"A": [5, 2], "B": [3], "C": [7, 1]}
    cases = [
        _room("A", 8, abc, [], "A's two blocks hold 8 tokens: nobody is preempted."),
        _room("A", 9, abc, [4], "One block is missing and one is free: nobody is preempted."),
        _room("A", 9, abc, [], "C came last: it leaves `running`, and its blocks go back to free. Then A takes one."),
        _room("A", 17, abc, [], "Three blocks are missing. C gives back two, so B is preempted too."),
        _room("B", 9, abc, [], "C came last, and two blocks are what B needs."),
        _room("C", 9, abc, [], "C itself came last: it is preempted, and gets no block."),
        _room("B", 13, abc, [4], "C's two blocks and the free one are enough."),
        _room("A", 21, abc, [4], "Preempt one at a time, and only as long as blocks are short."),
    ]
    run_check("make_room", _room_by(function), cases, same=_same_room, show=_show_room)


def _room(name: Name, num_tokens: int, tables: dict, free: list[int], hint: str) -> Case:
    args = name, num_tokens, list(tables), {each: list(table) for each, table in tables.items()}, list(free), 4
    return Case(args, _room_by(_make_room)(name, num_tokens, list(tables), _tables(args[3]), list(free), 4), hint)


def _tables(tables: dict[Name, Iterable[int]]) -> dict[Name, list[int]]:
    return {name: list(table) for name, table in tables.items() if list(table)}


def _room_by(function: Callable) -> Callable:
    def room(name: Name, num_tokens: int, running: list, tables: dict, free: list, block_size: int) -> Room | None:
        answer = realised(function(name, num_tokens, running, tables, free, block_size))
        return None if answer is None else Room(as_list(answer), list(running), _tables(tables), free)

    return room


def _make_room(name: Name, num_tokens: int, running: list, tables: dict, free: list, block_size: int) -> list[Name]:
    preempted = []
    while name in running:
        missing = blocks_needed(num_tokens, block_size) - len(tables[name])
        if missing <= len(free):
            tables[name] += [free.pop() for _ in range(missing)]
            break
        victim = running.pop()
        free += tables.pop(victim)
        preempted.append(victim)
    return preempted


def _same_room(got: Room, expected: Room) -> bool:
    if not same_value(got.preempted, expected.preempted) or not same_value(got.running, expected.running):
        return False
    sizes = [{name: len(table) for name, table in room.tables.items()} for room in (got, expected)]
    blocks = [
        Counter([*room.free, *(block for table in room.tables.values() for block in table)]) for room in (got, expected)
    ]
    grown = {name: table[: len(got.tables.get(name, ()))] for name, table in expected.tables.items()}
    kept = all(got.tables[name][:1] == table[:1] for name, table in grown.items()) if sizes[0] == sizes[1] else False
    return sizes[0] == sizes[1] and blocks[0] == blocks[1] and kept


def _show_room(room: Room) -> str:
    return f"{describe(room.preempted)}; then running {room.running}, tables {room.tables}, free {room.free}"


# --- schedule_paged --------------------------------------------------------------------------------------------------


class PagedRun(NamedTuple):
    """What a scheduler with blocks made of a workload."""

    num_steps: int
    num_tokens: int  # computed, those computed again included
    num_preemptions: int
    most_blocks: int  # used at the same time
    most_running: int


SIZE, SEATS = 16, 32  # of the runs: tokens per block, requests at once
RUNS = ((400, 256), (128, 256), (48, 256), (128, 64))  # blocks, tokens per step


def schedule_paged(function: Callable) -> None:
    """`schedule_paged(running, waiting, tables, free, budget, max_num_seqs, block_size)` -> (plan, preempted ids).

    A machine serves the course's 64 requests with it: in a large pool, in small ones, with a small budget.
    """
    lengths = [(request.num_prompt_tokens, request.params.max_tokens) for request in course_requests()]
    lines = []
    for num_blocks, budget in RUNS:
        got, expected = (paged_run(each, lengths, num_blocks, budget) for each in (function, _schedule_paged))
        for name, (mine, wanted, hint) in {
            "preemptions": (
                got.num_preemptions,
                expected.num_preemptions,
                "Preempt when blocks are short. Admit in turn, and only if all tokens of the request find blocks.",
            ),
            "tokens computed": (
                got.num_tokens,
                expected.num_tokens,
                "Whoever is preempted computes all of its tokens again.",
            ),
            "steps": (
                got.num_steps,
                expected.num_steps,
                "Admit waiting requests while budget, places and blocks allow.",
            ),
        }.items():
            if mine != wanted:
                case = Case((f"64 requests, {num_blocks} blocks of {SIZE}, budget {budget}",), wanted, hint)
                raise CheckFailed(failure("schedule_paged", case, f"got       {mine:,} {name}", f"{wanted:,} {name}"))
        lines.append("  {:6} {:7} {:6,} {:9,} {:12} {:12} {:13}".format(num_blocks, budget, *got))
    print(f"✓ schedule_paged: {len(RUNS)} runs of the course's 64 requests")
    print("  blocks  budget  steps    tokens  preemptions  most blocks  most requests", *lines, sep="\n")


def paged_run(function: Callable, lengths: Sequence[tuple[int, int]], num_blocks: int, budget: int) -> PagedRun:
    """Serve requests of these (prompt, output) lengths; every plan is checked against budget, places and blocks."""
    total = {f"req {i}": prompt for i, (prompt, _) in enumerate(lengths)}  # tokens that are known
    most = {f"req {i}": prompt + output - 1 for i, (prompt, output) in enumerate(lengths)}  # the last is never computed
    computed, tables, free = dict.fromkeys(total, 0), {}, list(range(num_blocks, 0, -1))
    running, waiting, order = [], list(total), list(total).index
    steps = tokens = preemptions = most_blocks = most_running = 0
    while running or waiting:
        lists = [(name, computed[name], total[name] - computed[name]) for name in running]
        case = Case((lists, [(name, total[name]) for name in waiting], tables, free, budget, SEATS, SIZE), None, "")
        plan, preempted = _planned(function, case, num_blocks)
        for name in preempted:
            running.remove(name)
            computed[name] = 0
        running += [name for name in waiting if name in plan]
        waiting = sorted([*(name for name in waiting if name not in plan), *preempted], key=order)
        steps, tokens, preemptions = steps + 1, tokens + sum(plan.values()), preemptions + len(preempted)
        most_blocks, most_running = max(most_blocks, num_blocks - len(free)), max(most_running, len(running))
        for name, num in plan.items():
            computed[name] += num
            if computed[name] == most[name]:
                running.remove(name)
                free += tables.pop(name)
            elif computed[name] == total[name]:
                total[name] += 1
    return PagedRun(steps, tokens, preemptions, most_blocks, most_running)


def _planned(function: Callable, case: Case, num_blocks: int) -> tuple[dict[Name, int], list[Name]]:
    """The function's plan and whom it preempts; refused if a limit is broken, or a block is lost or held twice."""
    running, waiting, tables, free, budget, seats, size = case.args
    before = Case(copy.deepcopy(case.args), None, "")  # for the message: tables and free are about to change
    answer = _called(function, case, before)
    plan, preempted = _as_plan(answer)
    remaining = {name: left for name, _, left in running} | dict(waiting)
    done = {name: num for name, num, _ in running}
    held = Counter([*free, *(block for table in tables.values() for block in table)])
    broken = None
    if plan is None or not plan.keys() <= remaining.keys():
        broken = "a plan of (id, num_tokens) pairs, and a list of preempted ids", "Return two things: plan, preempted."
    elif not set(preempted) <= done.keys() or set(preempted) & plan.keys() or len(set(preempted)) < len(preempted):
        broken = "preempted ids that ran, each once, and none of them in the plan", "Plan only who still runs."
    elif any(not 0 < num <= remaining[name] for name, num in plan.items()) or sum(plan.values()) > budget:
        broken = f"at most what remains of each, at most {budget} tokens together", "min(remaining, budget left)."
    elif len(running) - len(preempted) + len(plan.keys() - done.keys()) > seats:
        broken = f"at most {seats} requests that run", "Admit no request beyond max_num_seqs."
    elif any(len(tables.get(name, ())) * size < done.get(name, 0) + num for name, num in plan.items()):
        broken = "a block for every token that is computed", "Grow the table before you plan the tokens."
    elif any(len(tables[name]) > blocks_needed(done.get(name, 0) + num, size) for name, num in plan.items()):
        broken = (
            "no block for a token that is not computed yet",
            "A request may be admitted with a part of its prompt.",
        )
    elif any(tables.get(name) for name in preempted):
        broken = "no blocks in the tables of preempted requests", "Their blocks go back to free."
    elif len(held) != num_blocks or set(held.values()) != {1}:
        broken = "each block either free or in one table", "Take a block out of free when you put it into a table."
    elif preempted and plan.keys() - done.keys():
        broken = "nobody admitted in a step that preempts", "Who is preempted waits in front of all others."
    else:
        broken = _against_the_rules(plan, preempted, before.args)
    if broken is not None:
        before = Case(before.args, broken[0], broken[1])
        raise CheckFailed(failure("schedule_paged", before, f"got       {describe(answer)}", broken[0]))
    return plan, preempted


def _against_the_rules(plan: dict[Name, int], preempted: list[Name], args: tuple) -> tuple[str, str] | None:
    """How a plan within all limits differs from the one that the rules give, and a hint; None if it does not."""
    running, waiting, *_ = args
    wanted, victims = _schedule_paged(*copy.deepcopy(args))
    wanted = dict(wanted)
    if set(preempted) != set(victims):
        hint = "Preempt the request that was admitted last, one at a time, and only as long as blocks are short."
        return (f"{victims} preempted" if victims else "nobody preempted: no block is short"), hint
    for name, computed, remaining in running:
        if plan.get(name) != wanted.get(name):
            hint = (
                f"{name} runs, has {computed} tokens computed and {remaining} to compute: min(remaining, budget left)."
            )
            return f"{wanted.get(name, 0)} tokens for {name}", hint
    for name, num_tokens in waiting:
        if name in plan and name not in wanted:
            blocks = blocks_needed(num_tokens, args[-1])
            hint = f"Admit in order, and only if all tokens find free blocks: {name} needs {blocks} for {num_tokens}."
            return f"{name} not admitted", hint
        if plan.get(name) != wanted.get(name):
            hint = "Admit waiting requests in order, while budget, places and free blocks last."
            return f"{wanted[name]} tokens for {name}, which waits", hint
    return None


def _called(function: Callable, case: Case, before: Case) -> Any:
    """The function on the machine's own tables and free list: it is meant to change them."""
    lists, shared = [list(each) for each in case.args[:2]], case.args[2:]
    told = Case(before.args, ([], []), "See the rules, one after the other.")
    return call("schedule_paged", lambda *_: function(*lists, *shared), told, describe)


def _as_plan(answer: Any) -> tuple[dict[Name, int] | None, list[Name]]:
    parts = as_list(answer)
    if not isinstance(parts, list) or len(parts) != 2:
        return None, []
    pairs, preempted = as_list(parts[0].items() if isinstance(parts[0], dict) else parts[0]), as_list(parts[1])
    if not isinstance(pairs, list) or not isinstance(preempted, list):
        return None, []
    plan = {}
    for pair in map(as_list, pairs):
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] in plan or number_of(pair[1]) is None:
            return None, []
        plan[pair[0]] = int(number_of(pair[1]))
    return plan, preempted


def _schedule_paged(
    running: list, waiting: list, tables: dict, free: list, budget: int, max_num_seqs: int, block_size: int
) -> tuple[list, list]:
    plan, preempted, alive = [], [], [name for name, _, _ in running]
    for name, computed, remaining in running:
        num = min(remaining, budget)
        if num and name in alive:
            preempted += _make_room(name, computed + num, alive, tables, free, block_size)
            if name in alive:
                plan.append((name, num))
                budget -= num
    for name, num_tokens in [] if preempted else waiting:
        if not budget or len(alive) == max_num_seqs or blocks_needed(num_tokens, block_size) > len(free):
            break
        num = min(num_tokens, budget)
        tables[name] = [free.pop() for _ in range(blocks_needed(num, block_size))]
        alive.append(name)
        plan.append((name, num))
        budget -= num
    return plan, preempted


# --- choose_victim, the puzzle ---------------------------------------------------------------------------------------


class Idle(NamedTuple):
    """A cached block that is in no table, as `choose_victim` sees it."""

    block: int
    last_used: int  # number of the prompt that used it last
    times_used: int
    depth: int  # blocks before it in its text


POOL, SAVED = 40, 0.07  # blocks; the share of LRU's tokens that must be saved


def choose_victim(function: Callable) -> None:
    """`choose_victim(idle, now)` -> the block to evict, of a list of (block, last_used, times_used, depth).

    The puzzle: serve three streams of 450 prompts from 40 blocks, with 7 % fewer computed blocks than LRU.
    """
    lines = []
    for seed in (1, 2, 3):
        stream = prompt_stream(seed)
        lru, got = blocks_computed(stream, least_recently_used), blocks_computed(stream, _checked_choice(function))
        most = int((1 - SAVED) * lru)
        lines.append(f"  {sum(map(len, stream)):6,} {lru:8,} {got:8,} of at most {most:,}")
        if got > most:
            hint = (
                "Most blocks are never used a second time. What was used in the morning may be dead in the afternoon."
            )
            case = Case((f"stream {seed} of 450 prompts",), most, hint)
            raise CheckFailed(failure("choose_victim", case, f"got       {got:,} blocks computed", f"at most {most:,}"))
    print("✓ choose_victim: 3 streams within the budget\n  blocks      LRU    yours", *lines, sep="\n")


def _checked_choice(function: Callable) -> Callable:
    def choice(idle: list[Idle], now: int) -> int:
        case = Case(([tuple(each) for each in idle[:3]] + ["…"], now), "a block of the list", "Return idle[i][0].")
        told = call("choose_victim", lambda *_: function([tuple(each) for each in idle], now), case, describe)
        if number_of(told) not in {each.block for each in idle}:
            raise CheckFailed(failure("choose_victim", case, f"got       {describe(told)}", case.expected))
        return int(number_of(told))

    return choice


def least_recently_used(idle: list[Idle], now: int) -> int:
    """The rule of the engine; of blocks used equally long ago the deepest goes first."""
    return min(idle, key=lambda each: (each.last_used, -each.depth)).block


def prompt_stream(seed: int) -> list[list[str]]:
    """450 prompts, each a list of block contents: questions behind system prompts, chats that go on, long documents.

    After 150 prompts, and again after 300, other system prompts are in use.
    """
    rng, chats, prompts = random.Random(seed), {}, []
    for number in range(450):
        kind = rng.random()
        if kind < 0.55:
            system = f"{3 * number // 450}.{rng.choices(range(3), (8, 4, 2))[0]}"
            prompts.append([f"system {system}.{place}" for place in range(6)] + [f"question {number}"])
        elif kind < 0.7:
            chat = rng.randrange(3)
            chats[chat] = [*chats.get(chat, []), f"chat {chat}.{number}"]
            prompts.append(chats[chat])
            if len(chats[chat]) > 10:
                chats[chat] = []
        else:
            prompts.append([f"document {number}.{place}" for place in range(rng.randint(6, 16))])
    return prompts


def blocks_computed(stream: Sequence[Sequence[str]], choose: Callable[[list[Idle], int], int]) -> int:
    """Blocks that are computed for a stream, one prompt after the other, from a pool of 40 that begins empty."""
    cache, free, computed = {}, list(range(POOL)), 0  # cache: prefix -> Idle
    for now, contents in enumerate(stream):
        prefixes = [tuple(contents[: end + 1]) for end in range(len(contents))]
        found = 0
        while found < len(prefixes) - 1 and prefixes[found] in cache:
            found += 1
        computed += len(prefixes) - found
        held = set(prefixes)
        for depth, prefix in enumerate(prefixes):
            if prefix not in cache:
                if not free:
                    victim = choose([idle for each, idle in cache.items() if each not in held], now)
                    gone = next(each for each, idle in cache.items() if idle.block == victim)
                    free.append(cache.pop(gone).block)
                cache[prefix] = Idle(free.pop(), now, 0, depth)
            cache[prefix] = cache[prefix]._replace(last_used=now, times_used=cache[prefix].times_used + 1)
    return computed
