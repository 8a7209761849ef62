"""Chapter 8's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

import hashlib
import struct

import numpy as np
import pytest

from check_answers import message, passes
from minillm import checks
from minillm.checks.base import NotWrittenYet

# blocks_needed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right",
    [
        lambda num_tokens, block_size: -(-num_tokens // block_size),
        lambda num_tokens, block_size: np.int64(num_tokens // block_size) + (num_tokens % block_size > 0),
        lambda num_tokens, block_size: len(range(0, num_tokens, block_size)),
    ],
    ids=["ceil", "numpy", "range"],
)
def test_blocks_needed_accepts(right, capsys):
    assert passes(checks.blocks_needed, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda num_tokens, block_size: num_tokens // block_size, "3 slots of a second one"),
        (lambda num_tokens, block_size: num_tokens // block_size + 1, "there is no third one"),
        (lambda num_tokens, block_size: round(num_tokens / block_size), "takes a third block"),
        (lambda num_tokens, block_size: num_tokens / block_size, "got       1.75"),
        (lambda num_tokens, block_size: max(1, -(-num_tokens // block_size)), "No tokens, no blocks"),
        (lambda num_tokens, block_size: None, "got       None"),
    ],
    ids=["floor", "one more", "rounded", "not whole", "at least one", "nothing"],
)
def test_blocks_needed_refuses(wrong, told):
    assert told in message(checks.blocks_needed, wrong)


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


# prefix_hash --------------------------------------------------------------------------------------


def key_by_text(parent, token_ids):
    return hashlib.sha256(repr((parent, tuple(token_ids))).encode()).digest()


def key_by_bytes(parent, token_ids):
    return hashlib.blake2b((parent or b"") + struct.pack(f"<{len(token_ids)}q", *token_ids), digest_size=16).digest()


def key_as_text(parent, token_ids):
    return hashlib.md5(f"{parent}:{','.join(map(str, token_ids))}".encode()).hexdigest()


@pytest.mark.parametrize(
    "right", [key_by_text, key_by_bytes, key_as_text, lambda parent, token_ids: hash((parent, tuple(token_ids)))]
)
def test_prefix_hash_accepts(right, capsys):
    assert passes(checks.prefix_hash, right, capsys)


def sha(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda parent, token_ids: key_by_text(None, token_ids), "The key of the block before"),
        (lambda parent, token_ids: hash((parent, sum(token_ids))), "The order of the tokens counts"),
        (lambda parent, token_ids: hash((parent, frozenset(token_ids))), "The order of the tokens counts"),
        (lambda parent, token_ids: hash((parent, token_ids[0])), "Every token of the block"),
        (lambda parent, token_ids: sha(parent or b"", "".join(map(str, token_ids)).encode()), "Keep the tokens apart"),
        (lambda parent, token_ids: sha(parent or b"", bytes(each % 256 for each in token_ids)), "far beyond 255"),
        (lambda parent, token_ids: sha(parent or b"", bytes(token_ids)), "raised    ValueError"),
        (lambda parent, token_ids: hash((parent, *(each % 65_536 for each in token_ids))), "beyond 65,535"),
        (lambda parent, token_ids: (parent or 0) + hash(tuple(token_ids)), "adding up keys is not enough"),
        (lambda parent, token_ids: (parent, tuple(token_ids)), "a key of"),
        (lambda parent, token_ids: [parent, token_ids], "got       [None, (1, 2)]"),
        (lambda parent, token_ids: object(), "got       two different keys"),
        (lambda parent, token_ids: None, "got       None"),
    ],
    ids=[
        "no parent", "sum", "set", "first token", "joined", "one byte", "small bytes", "two bytes", "added", "grows",
        "list", "never the same", "nothing",
    ],
)  # fmt: skip
def test_prefix_hash_refuses(wrong, told):
    assert told in message(checks.prefix_hash, wrong)


# eviction_order -----------------------------------------------------------------------------------


def order_by_time(releases, held):
    """Number every release, and sort by the last number of each block."""
    times = {}
    for table in releases:
        for block in table[::-1]:
            times[block] = max(times.values(), default=0) + 1
    return sorted(times.keys() - held, key=times.get)


def order_from_the_end(releases, held):
    """Go backwards through everything; the first time that a block is seen is its last release."""
    seen = []
    while releases:
        for block in releases.pop():
            if block not in seen:
                seen.append(block)
    return tuple(block for block in reversed(seen) if block not in held)


@pytest.mark.parametrize("right", [order_by_time, order_from_the_end])
def test_eviction_order_accepts(right, capsys):
    assert passes(checks.eviction_order, right, capsys)


def first_release_counts(releases, held):
    order = [block for table in releases for block in reversed(table)]
    return [block for block in dict.fromkeys(order) if block not in held]


def heads_first(releases, held):
    order = {}
    for table in releases:
        for block in table:
            order.pop(block, None)
            order[block] = None
    return [block for block in order if block not in held]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (first_release_counts, "last given back with the second table"),
        (heads_first, "without block 1 nobody can find"),
        (lambda releases, held: order_by_time(releases[::-1], held), "given back first goes first"),
        (lambda releases, held: order_by_time(releases, held)[::-1], "the last block goes first"),
        (lambda releases, held: order_by_time(releases, set()), "still in somebody's table"),
        (lambda releases, held: sorted({block for table in releases for block in table} - held), "expected  [3, 2, 1]"),
        (lambda releases, held: [b for table in releases for b in reversed(table) if b not in held], "Blocks 1 and 2"),
        (lambda releases, held: set(order_by_time(releases, held)), "got       {1, 2, 3}"),
        (lambda releases, held: None, "got       None"),
    ],
    ids=["first", "heads", "newest", "reversed", "held", "sorted", "twice", "a set", "nothing"],
)
def test_eviction_order_refuses(wrong, told):
    assert told in message(checks.eviction_order, wrong)


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
    [checks.blocks_needed, checks.allocate, checks.prefix_hash, checks.eviction_order],
    ids=lambda c: c.__name__,
)
def test_a_stub_is_told_to_write(check):
    def stub(*_):
        raise NotImplementedError

    with pytest.raises(NotWrittenYet, match="not written yet"):
        check(stub)
