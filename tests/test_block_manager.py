"""The block manager: allocation, prefix sharing, eviction, copy-on-write, swapping, and the check that finds a leak."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.costs.kv_bytes import blocks_needed
from minillm.engine import block_manager
from minillm.engine.block_manager import BlockManager, BlockManagerError, Prefix, same_prefix
from minillm.engine.request import Request
from minillm.errors import ConfigError
from minillm.runtime.plan import BlockMove
from minillm.sampling.params import SamplingParams

SIZE = 4
EIGHT = list(range(10, 18))  # two full blocks


def manager_of(num_blocks=9, **options):
    return BlockManager(num_blocks, SIZE, **options)


def request_of(name, token_ids, **options):
    return Request(name, token_ids, SamplingParams(max_tokens=50), **options)


def compute(manager, request, num_tokens=None):
    """Make room for the request's next tokens, pretend to compute them, commit; returns the growth."""
    num_tokens = num_tokens or request.num_tokens
    growth = manager.grow(request, num_tokens)
    if growth is not None:
        request.num_computed_tokens = num_tokens
        manager.commit(request)
    manager.check()
    return growth


def start(manager, request):
    """Begin a request and compute all its tokens; returns how many were cached."""
    cached = manager.allocate(request)
    request.num_computed_tokens = cached
    assert compute(manager, request) is not None
    return cached


def decode(manager, request, token_id=1):
    request.append(token_id)
    return compute(manager, request)


def used_cached_free(manager):
    return manager.usage.used, manager.usage.cached, manager.usage.free


def state(manager):
    """All there is to know of a manager, to see that nothing has changed."""
    return repr(
        (
            {name: list(table.block_ids) for name, table in manager._tables.items()},
            {name: list(table.block_ids) for name, table in manager._swapped.items()},
            manager._num_tables,
            manager._free,
            manager._free_host,
            list(manager._cached),
            [content and content.key for content in manager._content],
            manager._block_of_key,
        )
    )


# --- allocation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens, blocks", [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_needed_rounds_up(num_tokens, blocks):
    assert blocks_needed(num_tokens, SIZE) == blocks


def test_a_table_grows_a_block_at_a_time_and_comes_back_whole():
    manager = manager_of(enable_prefix_caching=False)
    request = request_of("a", [1, 2, 3])
    assert manager.allocate(request) == 0 and manager.table(request) == []
    assert manager.grow(request, 3) == (0, [1], ())
    request.num_computed_tokens = 3
    assert decode(manager, request) == (0, (), ())
    assert decode(manager, request) == (1, [2], ())
    assert manager.table(request) == [1, 2]
    assert used_cached_free(manager) == (2, 0, 6) and manager.usage.total == 9 and manager.num_free == 6
    manager.free(request)
    manager.free(request)
    assert used_cached_free(manager) == (0, 0, 8)
    assert manager.table(request) == ()
    manager.check()


def test_the_null_block_is_never_handed_out():
    manager = manager_of()
    request = request_of("a", range(32))
    start(manager, request)
    assert sorted(manager.table(request)) == list(range(1, 9))


def test_a_prompt_may_be_computed_in_chunks():
    manager = manager_of()
    request = request_of("a", range(11))
    manager.allocate(request)
    assert compute(manager, request, 3) == (0, [1], ())
    assert compute(manager, request, 9) == (1, [2, 3], ())
    assert compute(manager, request) == (0, (), ())
    assert manager.table(request) == [1, 2, 3]


def test_short_of_blocks_growing_changes_nothing():
    manager = manager_of(4)
    a, b = request_of("a", range(8)), request_of("b", range(20, 29))
    start(manager, a)
    manager.allocate(b)
    before = state(manager)
    assert manager.grow(b, 9) is None
    assert state(manager) == before
    assert manager.grow(b, 4) is not None


def test_can_allocate_counts_every_token_and_keeps_a_reserve():
    manager = manager_of(4)
    assert manager.can_allocate(request_of("a", range(12)))
    assert not manager.can_allocate(request_of("a", range(13)))
    assert manager.can_allocate(request_of("a", range(8)), reserve=1)
    assert not manager.can_allocate(request_of("a", range(9)), reserve=1)


def test_a_cached_prefix_needs_no_fresh_blocks_but_is_not_free_for_others():
    manager = manager_of(5)
    a = request_of("a", [*EIGHT, 1])
    start(manager, a)
    assert manager.can_allocate(request_of("b", [*EIGHT, 2, 3, 4, 5]))  # two shared, one fresh
    assert not manager.can_allocate(request_of("b", [*EIGHT, 2, 3, 4, 5, 6]))
    manager.free(a)
    assert used_cached_free(manager) == (0, 2, 2)
    assert manager.can_allocate(request_of("b", [*EIGHT, *range(8)]))  # two cached, two fresh
    assert not manager.can_allocate(request_of("b", [*EIGHT, *range(8)]), reserve=1)


def test_beginning_twice_is_refused_rather_than_leaking_the_first_table():
    manager = manager_of(num_host_blocks=2)
    request = request_of("a", [1, 2])
    start(manager, request)
    with pytest.raises(BlockManagerError, match="'a' has a block table"):
        manager.allocate(request)
    manager.swap_out(request)
    with pytest.raises(BlockManagerError, match="'a' has a block table"):
        manager.allocate(request)


@pytest.mark.parametrize(
    "arguments, message",
    [((1, 4), "num_blocks is 1"), ((4, 0), "block_size is 0"), ((4, 4, -1), "num_host_blocks is -1")],
)
def test_impossible_pools_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        BlockManager(*arguments[:2], **({"num_host_blocks": arguments[2]} if len(arguments) > 2 else {}))


def test_no_torch_no_numpy():
    code = "import sys, minillm.engine.block_manager; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- prefix sharing --------------------------------------------------------------------------------------------------


def test_a_common_prefix_is_shared_while_in_use_and_after():
    manager = manager_of()
    a, b, c = (request_of(name, [*EIGHT, last]) for name, last in zip("abc", range(3), strict=True))
    assert start(manager, a) == 0
    assert start(manager, b) == 8
    assert manager.table(b)[:2] == manager.table(a)[:2] and manager.table(b)[2] != manager.table(a)[2]
    manager.free(a)
    manager.free(b)
    assert used_cached_free(manager) == (0, 2, 6)
    assert start(manager, c) == 8
    assert used_cached_free(manager) == (3, 0, 5)


def test_a_partial_block_is_never_shared():
    manager = manager_of()
    a = request_of("a", EIGHT[:7])
    start(manager, a)
    assert start(manager, request_of("b", [*EIGHT[:7], 1, 2, 3])) == 4


def test_one_token_is_always_left_to_compute():
    manager = manager_of()
    start(manager, request_of("a", EIGHT))
    assert start(manager, request_of("b", EIGHT)) == 4
    assert start(manager, request_of("c", EIGHT[:4])) == 0


def test_the_output_is_shared_with_the_next_turn_of_a_conversation():
    manager = manager_of()
    a = request_of("a", EIGHT[:6])
    start(manager, a)
    for token_id in (7, 8, 9):
        decode(manager, a, token_id)
    manager.free(a)
    assert start(manager, request_of("b", [*EIGHT[:6], 7, 8, 1])) == 8


def test_the_first_block_registered_stays_the_shared_one():
    manager = manager_of()
    a, b = request_of("a", [*EIGHT, 1]), request_of("b", [*EIGHT, 2])
    manager.allocate(a)
    manager.allocate(b)
    compute(manager, a)
    compute(manager, b)
    assert not set(manager.table(a)) & set(manager.table(b))
    c = request_of("c", [*EIGHT, 3])
    start(manager, c)
    assert manager.table(c)[:2] == manager.table(a)[:2]
    manager.free(b)
    assert used_cached_free(manager) == (4, 0, 4)  # b's blocks were not registered: clean again


def test_a_chain_of_two_owners_is_followed():
    """b's first block is not registered, because a's is; its second one is, and is found behind a's first."""
    manager = manager_of()
    a, b = request_of("a", [*EIGHT[:4], 1]), request_of("b", [*EIGHT, 2])
    manager.allocate(a)
    manager.allocate(b)
    compute(manager, a)
    compute(manager, b)
    c = request_of("c", [*EIGHT, 3])
    assert start(manager, c) == 8
    assert manager.table(c)[:2] == [manager.table(a)[0], manager.table(b)[1]]


def test_a_chain_of_two_owners_is_compared_once(monkeypatch):
    compared = []
    monkeypatch.setattr(block_manager, "same_prefix", lambda a, b: compared.append(a is b) or same_prefix(a, b))
    manager = manager_of()
    a, b, c = (request_of("a", [*EIGHT[:4], 1]), request_of("b", [*EIGHT, 2]), request_of("c", [*EIGHT, 3]))
    for request in (a, b):
        manager.allocate(request)
    for request in (a, b):
        compute(manager, request)
    assert manager.can_allocate(c) and manager.allocate(c) == 8
    assert compared == [True, False, True, True]


def prefix_of(*blocks, salt=""):
    prefix = None
    for block in blocks:
        prefix = Prefix(prefix, salt, tuple(block))
    return prefix


def test_prefixes_are_compared_to_their_beginning():
    assert same_prefix(prefix_of([1], [2], [3]), prefix_of([1], [2], [3]))
    assert same_prefix(None, None)
    others = [prefix_of([0], [2], [3]), prefix_of([1], [0], [3]), prefix_of([1], [2], [0]), prefix_of([2], [3])]
    for other in (*others, prefix_of([1], [2], [3], salt="x"), None):
        assert not same_prefix(prefix_of([1], [2], [3]), other)
        assert not same_prefix(other, prefix_of([1], [2], [3]))


def test_other_salts_share_nothing():
    manager = manager_of()
    start(manager, request_of("a", [*EIGHT, 1], cache_salt="x"))
    assert start(manager, request_of("b", [*EIGHT, 1], cache_salt="y")) == 0
    assert start(manager, request_of("c", [*EIGHT, 1], cache_salt="x")) == 8


def test_a_block_is_hashed_once_in_the_life_of_a_request(monkeypatch):
    hashed = []
    real = block_manager.hash_block
    monkeypatch.setattr(block_manager, "hash_block", lambda parent, ids: hashed.append(ids) or real(parent, ids))
    manager = manager_of()
    request = request_of("a", [*EIGHT, 1])
    for _ in range(3):
        manager.can_allocate(request)
    start(manager, request)
    manager.free(request)
    request.num_computed_tokens = 0
    assert start(manager, request) == 8
    assert hashed == [tuple(EIGHT[:4]), tuple(EIGHT[4:])]


def test_without_caching_nothing_is_hashed_kept_or_shared(monkeypatch):
    monkeypatch.setattr(block_manager, "hash_block", None)
    manager = manager_of(enable_prefix_caching=False)
    a = request_of("a", [*EIGHT, 1])
    assert start(manager, a) == 0
    assert start(manager, request_of("b", [*EIGHT, 1])) == 0
    manager.free(a)
    assert used_cached_free(manager) == (3, 0, 5)


@pytest.mark.parametrize("other, salt", [([9, *EIGHT[1:], 1], ""), ([9] * 4 + EIGHT[4:] + [1], ""), (EIGHT, "x")])
def test_with_a_constant_hash_tokens_and_salt_still_decide(monkeypatch, other, salt):
    monkeypatch.setattr(block_manager, "hash_block", lambda parent, token_ids: b"same")
    manager = manager_of()
    start(manager, request_of("a", [*EIGHT, 1]))
    assert start(manager, request_of("b", other, cache_salt=salt)) == 0
    assert start(manager, request_of("c", [*EIGHT, 2])) == 4  # one key: only the first block could be registered


def test_equal_blocks_behind_different_prefixes_are_not_shared(monkeypatch):
    """With a hash that ignores the parent, second blocks get one key, and only the chain distinguishes them."""
    monkeypatch.setattr(block_manager, "hash_block", lambda parent, token_ids: repr(token_ids).encode())
    manager = manager_of(20)
    start(manager, request_of("a", [1, 2, 3, 4, 9, 9, 9, 9, 0]))
    b = request_of("b", [5, 6, 7, 8, 9, 9, 9, 9, 0])
    start(manager, b)
    assert start(manager, request_of("c", [5, 6, 7, 8, 9, 9, 9, 9, 1])) == 4
    assert start(manager, request_of("d", [1, 2, 3, 4, 9, 9, 9, 9, 1])) == 8


tokens = st.integers(0, 1)
prompts = st.lists(st.tuples(st.lists(tokens, min_size=1, max_size=14), st.sampled_from(["", "s"])), max_size=6)


@settings(deadline=None, derandomize=True)
@given(prompts, st.integers(1, 4), st.sampled_from(["real", "constant", "tokens"]), st.booleans())
def test_shared_means_token_identical_from_position_zero(requests, block_size, hashing, in_use):
    hashes = {
        "real": block_manager.hash_block,
        "constant": lambda parent, ids: b"",
        "tokens": lambda parent, ids: repr(ids).encode(),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_manager, "hash_block", hashes[hashing])
        manager = BlockManager(100, block_size)
        written = {}  # block -> (salt, all tokens up to its end)
        for i, (prompt, salt) in enumerate(requests):
            request = request_of(str(i), prompt, cache_salt=salt)
            cached = start(manager, request)
            assert cached % block_size == 0 and cached < len(prompt)
            for j, block in enumerate(manager.table(request)):
                history = (salt, tuple(prompt[: (j + 1) * block_size]))
                if j < cached // block_size:
                    assert written[block] == history
                written[block] = history
            if hashing == "real":
                seen = {(s, tuple(p[:n])) for p, s in requests[:i] for n in range(block_size, len(p) + 1, block_size)}
                most = range(block_size, len(prompt), block_size)
                assert cached == max((n for n in most if (salt, tuple(prompt[:n])) in seen), default=0)
            if not in_use:
                manager.free(request)
        manager.check()


# --- eviction --------------------------------------------------------------------------------------------------------


def test_clean_blocks_are_taken_before_cached_ones():
    manager = manager_of(6)
    a = request_of("a", [*EIGHT, 1])
    start(manager, a)
    manager.free(a)
    assert used_cached_free(manager) == (0, 2, 3)
    b = request_of("b", range(50, 62))
    start(manager, b)
    assert used_cached_free(manager) == (3, 2, 0)


def test_the_tail_of_a_prefix_is_evicted_before_its_head():
    manager = manager_of(4)
    a = request_of("a", range(12))
    start(manager, a)
    manager.free(a)
    assert used_cached_free(manager) == (0, 3, 0)
    b = request_of("b", [50])
    start(manager, b)
    manager.free(b)
    assert start(manager, request_of("c", range(12))) == 8


def test_the_least_recently_used_prefix_is_evicted_first():
    manager = manager_of(4)
    a, b, c = (request_of(name, [name_id] * 4 + [0]) for name, name_id in (("a", 1), ("b", 2), ("c", 3)))
    for request in (a, b):
        start(manager, request)
        manager.free(request)
    a.num_computed_tokens = 0
    assert start(manager, a) == 4  # used again: b is the oldest now
    manager.free(a)
    start(manager, c)  # takes the clean block and one cached one
    manager.free(c)
    assert manager.can_allocate(a)
    for request, cached in ((b, 0), (a, 4)):
        request.num_computed_tokens = 0
        assert manager.allocate(request) == cached
        manager.free(request)


def test_an_evicted_block_is_not_found_any_more():
    manager = manager_of(3)
    a = request_of("a", [*EIGHT[:4], 1])
    start(manager, a)
    manager.free(a)
    b = request_of("b", range(50, 58))
    start(manager, b)
    assert manager.allocate(request_of("c", [*EIGHT[:4], 1])) == 0
    manager.check()


def test_reset_forgets_all_and_says_what_became_free():
    manager = manager_of()
    a, b = request_of("a", [*EIGHT, 1]), request_of("b", [1, 2, 3, 4, 5])
    start(manager, a)
    start(manager, b)
    manager.free(a)
    assert manager.reset_prefix_cache() == 2
    manager.check()
    assert used_cached_free(manager) == (2, 0, 6)
    assert start(manager, request_of("c", [1, 2, 3, 4, 6])) == 0
    assert manager.reset_prefix_cache() == 0


def test_what_builds_on_forgotten_blocks_is_not_shared_later():
    """A request across a reset computes its second block from the first, which was to be forgotten."""
    manager = manager_of(num_host_blocks=2)
    a, b = request_of("a", [*EIGHT, 1]), request_of("b", [*EIGHT[:4], 2])
    manager.allocate(a)
    compute(manager, a, 4)
    manager.swap_out(a)
    manager.reset_prefix_cache()
    manager.swap_in(a)
    compute(manager, a)
    assert start(manager, b) == 0  # a's first block is not offered again, b's is
    c = request_of("c", [*EIGHT, 3])
    assert manager.allocate(c) == 4  # nor is a's second one
    manager.free(c)
    manager.free(a)
    a.num_computed_tokens = 0
    assert start(manager, a) == 4  # restarted, it registers again: from b's first block
    assert start(manager, request_of("d", [*EIGHT, 4])) == 8


def test_bad_content_is_forgotten_and_good_content_is_not():
    manager = manager_of()
    a, b = request_of("a", [*EIGHT, 1]), request_of("b", [1, 2, 3, 4, 5])
    start(manager, a)
    start(manager, b)
    manager.free(a, forget=True)
    manager.free(b)
    manager.check()
    assert used_cached_free(manager) == (0, 1, 7)
    assert manager.allocate(request_of("c", [*EIGHT, 1])) == 0
    assert manager.allocate(request_of("d", [1, 2, 3, 4, 5])) == 4


def test_bad_content_that_another_table_holds_is_not_found_by_a_third():
    manager = manager_of()
    a, b = request_of("a", [*EIGHT, 1]), request_of("b", [*EIGHT, 2])
    start(manager, a)
    start(manager, b)
    manager.free(b, forget=True)
    manager.check()
    assert manager.allocate(request_of("c", [*EIGHT, 3])) == 0
    for token_id in range(4):
        decode(manager, a, token_id)  # fills a block and offers it, but not again what it had offered before
    assert manager.allocate(request_of("d", [*EIGHT, 3])) == 0
    manager.free(a)
    assert manager.usage.cached == 1


# --- fork and copy-on-write ------------------------------------------------------------------------------------------


def forked(manager, prompt, num_children=1):
    """A parent with its prompt computed and its first token sampled, and children as the scheduler starts them."""
    parent = request_of("p", prompt)
    children = [request_of(f"p.{i + 1}", prompt) for i in range(num_children)]
    start(manager, parent)
    for child in children:
        manager.fork(parent, child)
        child.num_computed_tokens = child.num_prompt_tokens - 1
    manager.check()
    parent.append(100)
    return parent, *children


def test_children_share_every_block_of_the_prompt():
    manager = manager_of()
    parent, *children = forked(manager, [*EIGHT, 1], 3)
    assert [manager.table(child) for child in children] == [manager.table(parent)] * 3
    assert manager.usage.used == 3


def test_a_shared_partial_block_is_copied_when_written_and_the_last_holder_keeps_it():
    manager = manager_of()
    parent, first, last = forked(manager, [*EIGHT, 1], 2)
    original = manager.table(parent)[2]
    assert compute(manager, parent) == (2, [4], [BlockMove("copy", [original], [4])])
    assert compute(manager, first) == (2, [5], [BlockMove("copy", [original], [5])])
    assert compute(manager, last) == (0, (), ())
    assert [manager.table(request)[2] for request in (parent, first, last)] == [4, 5, original]
    assert all(manager.table(request)[:2] == manager.table(parent)[:2] for request in (first, last))
    assert manager.usage.used == 5


def test_a_copy_and_a_fresh_block_come_together():
    manager = manager_of()
    parent, _ = forked(manager, [*EIGHT, 1, 2, 3])
    for token_id in (101, 102):
        parent.append(token_id)
    assert manager.grow(parent, 14) == (2, [4, 5], [BlockMove("copy", [3], [4])])
    manager.check()


def test_short_of_blocks_nothing_is_copied():
    manager = manager_of(4)
    parent, child = forked(manager, [*EIGHT, 1])
    before = state(manager)
    assert manager.grow(parent, 10) is None
    assert state(manager) == before
    manager.free(child)
    assert manager.grow(parent, 10) == (0, (), ())


def test_a_shared_full_block_is_copied_too_and_the_copy_is_not_registered_twice():
    manager = manager_of()
    parent, child = forked(manager, EIGHT)
    assert manager.usage.used == 2
    assert compute(manager, child) == (1, [3], [BlockMove("copy", [2], [3])])
    assert compute(manager, parent) == (2, [4], ())
    other = request_of("c", [*EIGHT, 5])
    assert start(manager, other) == 8
    assert manager.table(other)[:2] == manager.table(parent)[:2]


def test_the_only_holder_of_a_registered_block_writes_it_unregistered():
    """The parent is gone; while the child writes the last prompt block anew nobody may find it, afterwards anybody."""
    manager = manager_of(4)
    parent, child = forked(manager, EIGHT)
    manager.free(parent)
    blocks = list(manager.table(child))
    assert manager.grow(child, 8) == (0, (), ())
    manager.check()
    assert manager.table(child) == blocks
    early, late = request_of("early", [*EIGHT, 5]), request_of("late", [*EIGHT, 6])
    assert manager.allocate(early) == 4
    manager.free(early)
    child.num_computed_tokens = 8
    manager.commit(child)
    assert manager.allocate(late) == 8
    assert manager.table(late) == blocks
    manager.check()


def test_a_block_the_parent_has_filled_further_is_not_the_childs_content():
    """The parent filled and registered the block they share; alone with it, the child must not pass it off as its."""
    manager = manager_of()
    parent = request_of("p", [1, 2])
    start(manager, parent)
    for token_id in (100, 101):
        decode(manager, parent, token_id)
    child = request_of("p.1", [1, 2])
    manager.fork(parent, child)
    child.num_computed_tokens = 1
    manager.free(parent)
    compute(manager, child)
    for token_id in (200, 201, 202):
        decode(manager, child, token_id)
    manager.check()
    assert manager.allocate(request_of("x", [1, 2, 100, 101, 5])) == 0
    assert manager.allocate(request_of("y", [1, 2, 200, 201, 5])) == 4


def test_a_table_longer_than_what_is_written_pays_for_copies_all_the_same():
    manager = manager_of(4)
    _, child = forked(manager, range(12))
    child.num_computed_tokens = 4
    assert manager.num_free == 0
    assert manager.grow(child, 8) is None


def test_the_prompt_is_hashed_once_for_all_its_children(monkeypatch):
    hashed = []
    real = block_manager.hash_block
    monkeypatch.setattr(block_manager, "hash_block", lambda parent, ids: hashed.append(ids) or real(parent, ids))
    manager = manager_of(12)
    for child in forked(manager, [*EIGHT, 1], 2)[1:]:
        compute(manager, child)
        for token_id in (2, 3, 4):
            decode(manager, child, token_id)
    assert hashed == [tuple(EIGHT[:4]), tuple(EIGHT[4:]), (1, 2, 3, 4), (1, 2, 3, 4)]


def test_children_of_a_parent_from_before_a_reset_register_nothing():
    manager = manager_of()
    parent = request_of("p", EIGHT)
    start(manager, parent)
    manager.reset_prefix_cache()
    child = request_of("p.1", EIGHT)
    manager.fork(parent, child)
    child.num_computed_tokens = 7
    manager.free(parent)
    compute(manager, child)
    manager.free(child)
    assert manager.usage.cached == 0


def test_children_outlive_their_parent_and_all_blocks_come_back():
    manager = manager_of(enable_prefix_caching=False)
    requests = forked(manager, [*EIGHT, 1], 2)
    for request in requests:
        manager.free(request)
        manager.check()
    assert used_cached_free(manager) == (0, 0, 8)


# --- host memory -----------------------------------------------------------------------------------------------------


def test_a_swapped_request_comes_back_in_the_order_of_its_tokens():
    manager = manager_of(num_host_blocks=4)
    a = request_of("a", range(10))
    start(manager, a)
    a.append(5)
    out = manager.swap_out(a)
    assert out.kind == "swap_out" and list(out.sources) == [1, 2, 3] and len(set(out.targets)) == 3
    manager.check()
    assert manager.is_swapped(a) and manager.table(a) == () and manager.usage.used == 0
    assert manager.can_swap_in(a)
    back = manager.swap_in(a)
    assert back.kind == "swap_in" and list(back.sources) == list(out.targets)
    assert list(back.targets) == manager.table(a) and not manager.is_swapped(a)
    assert decode(manager, a) == (0, (), ())
    manager.free(a)
    manager.check()
    assert manager.num_free == 8


def test_only_blocks_of_computed_tokens_move():
    manager = manager_of(num_host_blocks=1)
    a = request_of("a", range(12))
    manager.allocate(a)
    compute(manager, a, 4)
    assert manager.grow(a, 12) is not None
    assert list(manager.swap_out(a).sources) == [1]
    assert manager.usage.used == 0
    manager.check()


def test_shared_blocks_are_copied_out_and_stay_with_the_others():
    manager = manager_of(num_host_blocks=6)
    a, b = request_of("a", [*EIGHT, 1]), request_of("b", [*EIGHT, 2])
    start(manager, a)
    start(manager, b)
    of_a = list(manager.table(a))
    move = manager.swap_out(b)
    assert list(move.sources)[:2] == of_a[:2]
    assert manager.table(a) == of_a and manager.usage.used == 3
    manager.swap_in(b)
    manager.check()
    assert not set(manager.table(b)) & set(of_a)


def test_a_swapped_prefix_is_offered_to_the_cache_again():
    manager = manager_of(4, num_host_blocks=3)
    a = request_of("a", [*EIGHT, 1])
    start(manager, a)
    manager.swap_out(a)
    other = request_of("other", range(50, 62))
    start(manager, other)  # evicts what a left behind
    manager.free(other, forget=True)
    manager.swap_in(a)
    decode(manager, a)
    manager.free(a)
    assert manager.allocate(request_of("b", [*EIGHT, 2])) == 8


def test_short_of_host_memory_nothing_moves():
    manager = manager_of(num_host_blocks=2)
    a = request_of("a", range(9))
    start(manager, a)
    before = state(manager)
    assert manager.swap_out(a) is None
    assert state(manager) == before


def test_a_request_is_not_swapped_in_where_it_could_not_go_on():
    manager = manager_of(4, num_host_blocks=3)
    a, b = request_of("a", range(8)), request_of("b", range(50, 54))
    start(manager, a)
    a.append(1)  # needs a third block
    manager.swap_out(a)
    assert manager.can_swap_in(a) and not manager.can_swap_in(a, reserve=1)
    start(manager, b)
    assert not manager.can_swap_in(a)
    decode(manager, b)
    before = state(manager)
    with pytest.raises(BlockManagerError, match="2 blocks to swap in, 1 free"):
        manager.swap_in(a)
    assert state(manager) == before


def test_a_request_freed_while_swapped_gives_host_blocks_back():
    manager = manager_of(num_host_blocks=3)
    a = request_of("a", range(9))
    start(manager, a)
    manager.swap_out(a)
    manager.free(a)
    manager.free(a)
    manager.check()
    assert not manager.is_swapped(a)
    a.num_computed_tokens = 0
    start(manager, a)
    assert manager.swap_out(a) is not None


# --- the check -------------------------------------------------------------------------------------------------------


def test_the_check_finds_every_planted_corruption():
    def lose_a_block(m):
        m._free.pop()

    def free_twice(m):
        m._free.append(m._free[0])

    def free_the_null_block(m):
        m._free.append(0)

    def free_a_used_block(m):
        m._free.append(m.table(a)[0])

    def free_a_cached_block(m):
        m._free.append(next(iter(m._cached)))

    def miss_a_reference(m):
        m._num_tables[m.table(a)[0]] -= 1

    def count_a_reference_twice(m):
        m._num_tables[m.table(a)[0]] += 1

    def drop_an_entry(m):
        m._tables["a"].block_ids.pop()

    def repeat_an_entry(m):
        block_ids = m._tables["a"].block_ids
        m._num_tables[block_ids[2]] -= 1
        m._num_tables[block_ids[0]] += 1
        m._free.append(block_ids[2])
        block_ids[2] = block_ids[0]

    def lose_a_host_block(m):
        m._free_host.pop()

    def free_a_host_block_twice(m):
        m._free_host.append(m._swapped["s"].block_ids[0])

    def forget_a_key(m):
        m._block_of_key.popitem()

    def forget_a_content(m):
        m._content[m.table(a)[0]] = None

    def point_two_keys_at_a_block(m):
        m._block_of_key[b"stale"] = m.table(a)[0]

    def keep_a_cached_block_without_content(m):
        m._unregister([next(iter(m._cached))])

    def make_a_cached_block_free(m):
        m._free.append(m._cached.popitem()[0])

    corruptions = [value for name, value in locals().items() if callable(value)]
    assert len(corruptions) == 16
    for corrupt in corruptions:
        manager = manager_of(12, num_host_blocks=4)
        a, b, s = request_of("a", [*EIGHT, 1]), request_of("b", range(50, 55)), request_of("s", range(70, 75))
        for request in (a, b, s):
            start(manager, request)
        manager.free(b)
        manager.swap_out(s)
        manager.check()
        corrupt(manager)
        with pytest.raises(BlockManagerError) as caught:
            manager.check()
        assert any(letter.isdigit() for letter in str(caught.value)), corrupt.__name__
        told = {miss_a_reference: "reference count", count_a_reference_twice: "reference count"}
        told[repeat_an_entry] = "holds a block twice"
        assert told.get(corrupt, "") in str(caught.value)


def test_the_check_prints_the_numbers():
    manager = manager_of()
    start(manager, request_of("a", EIGHT))
    block = manager._free.pop()
    with pytest.raises(BlockManagerError, match=rf"pool of 9 blocks: \[{block}\] are lost.*used=3, cached=0, free=5"):
        manager.check()
