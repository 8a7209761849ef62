"""Chapter 8, the paged cache: how many blocks, whose they are, which content they share, which of them go first."""

import pickle
from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from typing import Any, NamedTuple

from minillm.checks.base import (
    Case,
    CheckFailed,
    as_list,
    call,
    describe,
    failure,
    is_number,
    realised,
    run_check,
    same_value,
)
from minillm.engine import block_manager

Block = tuple[int, ...]  # the tokens of a full block


def blocks_needed(function: Callable) -> None:
    """`blocks_needed(num_tokens, block_size)` -> blocks that hold so many tokens, the last one perhaps not full."""
    hints = {
        (7, 4): "7 tokens fill one block of 4, and 3 slots of a second one.",
        (8, 4): "8 tokens fill two blocks exactly: there is no third one.",
        (9, 4): "One token more than two blocks hold takes a third block.",
        (1, 16): "A single token takes a whole block.",
        (0, 16): "No tokens, no blocks.",
        (5, 1): "In blocks of one slot every token has its own.",
        (100_000, 16): "100,000 is 6,250 times 16: exactly so many blocks.",
        (100_001, 16): "One token more than 6,250 blocks hold takes another one.",
    }
    cases = [Case(args, block_manager.blocks_needed(*args), hint) for args, hint in hints.items()]
    run_check("blocks_needed", function, cases)


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
        _allocation([3], [6, 1, 8], 17, 16, "blocks_needed minus len(table) is how many to take."),
        _allocation([], [4], 4, 4, "One block is missing and one is free: that is just enough."),
        _allocation([6], [], 4, 4, "No block is free, but none is needed either."),
        _allocation([5, 2], [], 9, 4, "No block is free: return None."),
        _allocation([5], [7], 12, 4, "Too few: return None, and leave table and free as they were. So count first."),
        _allocation([9, 4], [1], 3, 4, "More blocks than needed is no harm: return the table as it is."),
    ]
    run_check("allocate", _observed(function), cases, same=_same_allocation, show=_show_allocation)


def _allocation(table: list[int], free: list[int], num_tokens: int, block_size: int, hint: str) -> Case:
    missing = max(0, block_manager.blocks_needed(num_tokens, block_size) - len(table))
    wanted = Wanted(table, free, len(table) + missing if missing <= len(free) else None)
    return Case((table, free, num_tokens, block_size), wanted, hint)


def _observed(function: Callable) -> Callable:
    """The reader's function, and the lists after the call. A None that cannot be meant stays one, for its hint."""

    def observed(table: list[int], free: list[int], num_tokens: int, block_size: int) -> Allocated | None:
        scarce = block_manager.blocks_needed(num_tokens, block_size) - len(table) >= len(free)
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


# --- prefix_hash -----------------------------------------------------------------------------------------------------

FIRST = ((1, 2), (3, 4))  # two blocks
MOST_BYTES = 256  # of a key, pickled, however long its prefix
MANY = 4096  # keys; of two bytes some would be the same


class Pair(NamedTuple):
    """Two chains of blocks: does the last one of each get the same key?"""

    one: Sequence[Block]
    other: Sequence[Block]
    same: bool
    hint: str


def prefix_hash(function: Callable) -> None:
    """`prefix_hash(parent, token_ids)` -> key of a block; the same if and only if all tokens up to its end are.

    `parent` is the key of the block before, None for the first one. Any key will do that a dict takes, and that does
    not grow with the prefix.
    """
    pairs = [
        Pair(FIRST[:1], FIRST[:1], True, "The same tokens behind the same parent always give the same key."),
        Pair(FIRST, FIRST, True, "The same tokens behind the same parent always give the same key."),
        Pair([(1, 2)], [(1, 3)], False, "Every token of the block goes into the key."),
        Pair([(1, 2)], [(2, 1)], False, "The order of the tokens counts: a sum is not enough."),
        Pair([(1, 23)], [(12, 3)], False, "Keep the tokens apart: as text 1,23 and 12,3 need the comma."),
        Pair([(0, 1)], [(256, 1)], False, "Token ids go far beyond 255: one byte each is too few."),
        Pair([(4_464, 1)], [(70_000, 1)], False, "Token ids go beyond 65,535: two bytes each are too few."),
        Pair(FIRST, [(9, 2), (3, 4)], False, "The key of the block before goes into this one's."),
        Pair(FIRST, FIRST[:1], False, "The second block of a text has another key than the first."),
        Pair([(1, 2), (1, 2)], [(1, 2)], False, "The same tokens at another place are another prefix."),
        Pair(FIRST, FIRST[::-1], False, "Blocks in another order are another prefix: adding up keys is not enough."),
        Pair([*FIRST, (5, 6)], [(9, 2), (3, 4), (5, 6)], False, "A chain: the first block goes into every later key."),
    ]
    for pair in pairs:
        _check_pair(function, pair)
    _check_growth(function)
    _check_distinct(function)
    print(f"✓ prefix_hash: {len(pairs) + 2} cases")


def _last_key(function: Callable, chain: Sequence[Block]) -> Hashable:
    """The key of the last block, each made from the one before it."""
    return reduce(lambda parent, block: call("prefix_hash", function, _key_case(parent, block), describe), chain, None)


def _key_case(parent: Any, block: Block) -> Case:
    return Case((parent, block), "a key that a dict takes, such as bytes", "Return the digest: bytes, str or int.")


def _check_pair(function: Callable, pair: Pair) -> None:
    keys = [_last_key(function, chain) for chain in (pair.one, pair.other)]
    for key, chain in zip(keys, (pair.one, pair.other), strict=True):
        if not isinstance(key, Hashable):
            case = _key_case("…" if len(chain) > 1 else None, chain[-1])
            raise CheckFailed(failure("prefix_hash", case, f"got       {describe(key)}", case.expected))
    if (keys[0] == keys[1]) != pair.same:
        names = {True: "the same key", False: "two different keys"}
        _refuse(f"the last blocks of {_chain(pair.one)} and {_chain(pair.other)}", names[not pair.same], pair)


def _check_growth(function: Callable) -> None:
    key = _last_key(function, [(1, 2)] * 100)
    size = len(pickle.dumps(key))
    if size > MOST_BYTES:
        pair = Pair(
            (), (), False, "Hash what you have got: hashlib.sha256(…).digest() is 32 bytes, however long the text."
        )
        _refuse("the hundredth block of a text", f"a key of {size:,} bytes", pair, "a key as short as the first one's")


def _check_distinct(function: Callable) -> None:
    """Thousands of first blocks, and the same block behind each of them: as many keys."""
    firsts = [_last_key(function, [(number, 7)]) for number in range(MANY)]
    seconds = [call("prefix_hash", function, _key_case(first, (1, 2)), describe) for first in firsts]
    for what, keys in (("different blocks", firsts), ("the same block behind different ones", seconds)):
        if len(set(keys)) < MANY:
            pair = Pair((), (), False, "A key of one or two bytes, or digits, is soon used up: keep the whole digest.")
            _refuse(f"{MANY:,} times, {what}", f"{len(set(keys)):,} different keys", pair, f"{MANY:,} different keys")


def _refuse(what: str, got: str, pair: Pair, expected: str | None = None) -> None:
    expected = expected or ("the same key" if pair.same else "two different keys")
    raise CheckFailed(
        f"✗ prefix_hash\n  call      {what}\n  got       {got}\n  expected  {expected}\n  hint      {pair.hint}"
    )


def _chain(blocks: Sequence[Block]) -> str:
    return " ".join(f"[{', '.join(map(str, block))}]" for block in blocks)


# --- eviction_order --------------------------------------------------------------------------------------------------


def eviction_order(function: Callable) -> None:
    """`eviction_order(releases, held)` -> blocks in no table, the first to be handed out again first."""
    hints = {
        (((1, 2, 3),), ()): "Within a table the last block goes first: without block 1 nobody can find 2 and 3.",
        (((1, 2), (3, 4)), ()): "Least recently used first: the table that was given back first goes first.",
        (((1, 2, 3), (1, 2, 4)), ()): "Blocks 1 and 2 were last given back with the second table: that counts.",
        (((1, 2, 3), (1, 5)), (1,)): "Block 1 is still in somebody's table: it cannot go.",
        (((1, 2), (3,), (1, 2)), ()): "A table that was used once more moves to the end.",
        (((7, 3, 5), (7, 3, 6), (7, 2)), (3,)): "Each block counts by the last time that it was given back.",
        (((4,),), (4,)): "All that is left is in use: nothing can go.",
        ((), ()): "Nothing was given back, nothing can go.",
    }
    cases = []
    for (releases, held), hint in hints.items():
        args = [list(table) for table in releases], set(held)
        cases.append(Case(args, _eviction_order(*args), hint))
    run_check("eviction_order", function, cases)


def _eviction_order(releases: Sequence[Sequence[int]], held: set[int]) -> list[int]:
    order: dict[int, None] = {}
    for table in releases:
        for block in reversed(table):
            order.pop(block, None)  # what is given back again goes to the end
            order[block] = None
    return [block for block in order if block not in held]
