"""Which blocks of cache hold which tokens: block tables, reference counts, prefix sharing, copy-on-write, swapping
(paging: Kwon et al. 2023, vLLM; keys of chained hashes as in vLLM's automatic prefix caching).

The cache is a pool of blocks of `block_size` tokens. A request's *block table* lists the blocks of its tokens in order,
so a request can grow as long as any block is free, wherever that lies. This module only keeps the accounts: the copies
to be made go to the executor as `BlockMove`s in the plan. No torch, no numpy.
"""

import functools
import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from minillm.costs import blocks_needed
from minillm.engine.request import Request
from minillm.errors import Count, Positive, check_whole, checked
from minillm.runtime import NULL_BLOCK, BlockMove
from minillm.trace import BlockUse

MOST_BLOCKS = 2**26  # the accounts of a block take about 100 bytes


class BlockManagerError(AssertionError):
    """The accounting contradicts itself, or was asked for the impossible: a bug, never the user's to fix."""


class Growth(NamedTuple):
    """How a block table changed: table[first_block:] = block_ids, empty if it did not. The moves come first."""

    first_block: int
    block_ids: Sequence[int]
    moves: Sequence[BlockMove]


NO_GROWTH = Growth(0, (), ())


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a full block: SHA-256 over the key of the block before it (the salt for the first) and its tokens."""
    return hashlib.sha256(parent + _packer(len(token_ids))(*token_ids)).digest()


@functools.cache
def _packer(num_numbers: int) -> Callable[..., bytes]:
    return struct.Struct(f"<{num_numbers}q").pack


class Prefix:
    """The tokens of one full block and, through `parent`, all before them: what the keys and values there depend on."""

    __slots__ = ("parent", "salt", "token_ids", "key")

    def __init__(self, parent: "Prefix | None", salt: str, token_ids: tuple[int, ...]):
        self.parent = parent
        self.salt = salt
        self.token_ids = token_ids
        # surrogatepass: a str without UTF-8 form is a salt like any other, and must not fail the step of all
        self.key = hash_block(salt.encode("utf-8", "surrogatepass") if parent is None else parent.key, token_ids)


def extend_prefixes(request: Request, num_blocks: int, block_size: int, make: Callable = Prefix) -> list[Prefix]:
    """The request's prefixes of at least `num_blocks` full blocks; each is made once in its life, as `Prefix` does."""
    prefixes = request.prefix_keys
    for start in range(len(prefixes) * block_size, num_blocks * block_size, block_size):
        token_ids = tuple(request.token_ids(start, start + block_size))
        prefixes.append(make(prefixes[-1] if prefixes else None, request.cache_salt, token_ids))
    return prefixes


def same_prefix(a: Prefix | None, b: Prefix | None) -> bool:
    """Whether two prefixes are of the same salt and token-identical from position 0; equal hashes do not suffice."""
    while a is not b:
        if a is None or b is None or a.token_ids != b.token_ids or a.salt != b.salt:
            return False
        a, b = a.parent, b.parent
    return True


class BlockTable:
    """The blocks of one request's tokens, in order: in the pool while it runs, in host memory while swapped out."""

    __slots__ = ("block_ids", "num_registered", "registers")

    def __init__(self, block_ids: list[int], num_registered: int, registers: bool):
        self.block_ids = block_ids
        self.num_registered = num_registered  # how many full blocks, from the first, were offered to the cache
        self.registers = registers


class BlockManager:
    """Hands out the blocks of the pool and of host memory, and takes them back.

    Every block but the null block is in exactly one state: *used*, in at least one table; *cached*, in none, but its
    content is registered under its key and will be shared with a request that begins with the same tokens; *free*.
    Cached blocks are handed out when no free one is left, the least recently used first.

    Only full blocks are registered, and nothing is ever written into a block that is registered or in two tables:
    `grow` makes room for writing, and copies or un-registers what stands in the way.
    """

    @checked
    def __init__(
        self,
        num_blocks: int,
        block_size: Positive = 16,
        *,
        num_host_blocks: Count = 0,
        enable_prefix_caching: bool = True,
    ):
        """`num_blocks` is the whole pool, null block included. Raises ConfigError for a pool that can hold nothing."""
        check_whole("num_blocks", num_blocks, 2, MOST_BLOCKS)  # the null block and at least one more
        check_whole("num_host_blocks", num_host_blocks, 0, MOST_BLOCKS)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_host_blocks = num_host_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self._tables: dict[str, BlockTable] = {}
        self._swapped: dict[str, BlockTable] = {}
        self._num_tables = [0] * num_blocks  # the reference count: tables a block is in
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # handed out from the end
        self._free_host = list(range(num_host_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._content: list[Prefix | None] = [None] * num_blocks  # what a block is registered as
        self._block_of_key: dict[bytes, int] = {}

    # --- a request's table from beginning to end ---

    def can_allocate(self, request: Request, reserve: int = 0) -> bool:
        """Whether all tokens the request has now (`num_tokens`) would find blocks, with `reserve` blocks left over."""
        hits = self._cached_prefix(request)
        idle_hits = sum(self._num_tables[block] == 0 for block in hits)  # count as free until they are taken
        fresh = blocks_needed(request.num_tokens, self.block_size) - len(hits)
        return fresh + idle_hits + reserve <= self.num_free

    def allocate(self, request: Request) -> int:
        """Begin a request's table with the cached blocks that its tokens begin with; returns how many tokens they hold.

        At least one token is left to compute: the logits after the last one are needed. Takes no fresh block.
        """
        hits = self._cached_prefix(request)
        self._begin(request, BlockTable(hits, len(hits), self.enable_prefix_caching))
        return len(hits) * self.block_size

    def grow(self, request: Request, num_tokens: int) -> Growth | None:
        """Make room to write the tokens `request.num_computed_tokens` .. num_tokens-1; None if blocks are short.

        A block to be written that is in another table too is replaced by a copy; the last table that it is in keeps it.
        If None, nothing has changed.
        """
        block_ids = self._tables[request.request_id].block_ids
        first, end = request.num_computed_tokens // self.block_size, blocks_needed(num_tokens, self.block_size)
        held = len(block_ids)
        if first == held == end - 1 and (self._free or self._cached):  # a decode, nearly always
            block_ids.append(self._take())
            return Growth(held, block_ids[held:], ())
        own, shared = [], []  # of the blocks it has and will write
        for i in range(first, min(held, end)):
            (shared if self._num_tables[block_ids[i]] > 1 else own).append(i)
        if len(shared) + max(end - held, 0) > self.num_free:
            return None
        # What its only holder writes anew is un-registered rather than copied: that takes no block, so the last holder
        # can always go on, and no other request finds it before commit registers it again.
        if own:
            self._unregister(block_ids[i] for i in own)
        moves = [self._copy(block_ids, shared)] if shared else ()
        block_ids += [self._take() for _ in range(held, end)]
        first_changed = shared[0] if shared else held
        if first_changed == len(block_ids):
            return NO_GROWTH
        return Growth(first_changed, block_ids[first_changed:], moves)

    def commit(self, request: Request, num_computed_tokens: int | None = None) -> None:
        """Register the blocks that the request's computed tokens fill, so that later requests can share them.

        `num_computed_tokens` says how many are known to be computed, where the request's own count runs ahead.
        If the same content is registered already, that block stays the one that is shared.
        """
        table = self._tables[request.request_id]
        if num_computed_tokens is None:
            num_computed_tokens = request.num_computed_tokens
        full = num_computed_tokens // self.block_size
        if full <= table.num_registered or not table.registers:
            return
        prefixes = extend_prefixes(request, full, self.block_size)
        for i in range(table.num_registered, full):
            if prefixes[i].key not in self._block_of_key:
                self._register(table.block_ids[i], prefixes[i])
        table.num_registered = full

    def free(self, request: Request, *, forget: bool = False) -> None:
        """Give the request's blocks back, in the pool or in host memory; no effect if it has none.

        The last block goes first, so that a prefix stays in the cache longer than its continuations. `forget`: the
        content is bad; whatever of it is registered must not be shared any more.
        """
        table = self._tables.pop(request.request_id, None)
        if table is not None:
            if forget:
                self._unregister(table.block_ids)
            self._release(table.block_ids)
        swapped = self._swapped.pop(request.request_id, None)
        if swapped is not None:
            self._free_host += reversed(swapped.block_ids)

    def fork(self, parent: Request, child: Request) -> None:
        """Let a child share the parent's blocks of their common prompt, the last one included even if not full.

        The parent must have computed the whole prompt. Whoever writes into the last block first gets a copy (`grow`).
        """
        source = self._tables[parent.request_id]
        shared = source.block_ids[: blocks_needed(child.num_prompt_tokens, self.block_size)]
        unwritten = (child.num_prompt_tokens - 1) // self.block_size  # blocks before the one that the child recomputes
        child.prefix_keys = parent.prefix_keys[:unwritten]
        self._begin(child, BlockTable(shared, unwritten, source.registers))

    # --- host memory ---

    def swap_out(self, request: Request) -> BlockMove | None:
        """Move the blocks of the request's computed tokens to host memory; None, and no change, if that is too small.

        Shared blocks are copied like the others: what other tables do with theirs no longer matters.
        """
        table = self._tables[request.request_id]
        sources = table.block_ids[: blocks_needed(request.num_computed_tokens, self.block_size)]
        if len(sources) > len(self._free_host):
            return None
        targets = [self._free_host.pop() for _ in sources]
        del self._tables[request.request_id]
        self._release(table.block_ids)
        table.block_ids = targets
        self._swapped[request.request_id] = table
        return BlockMove("swap_out", sources, targets)

    def can_swap_in(self, request: Request, reserve: int = 0) -> bool:
        """Whether all tokens the swapped request has now would find blocks, with `reserve` blocks left over."""
        return blocks_needed(request.num_tokens, self.block_size) + reserve <= self.num_free

    def swap_in(self, request: Request) -> BlockMove:
        """Move a swapped request's blocks back into the pool, in the order of its tokens. Ask `can_swap_in` first."""
        sources = self._swapped[request.request_id].block_ids
        if len(sources) > self.num_free:
            raise BlockManagerError(f"{len(sources)} blocks to swap in, {self.num_free} free; ask can_swap_in first")
        table = self._swapped.pop(request.request_id)
        targets = [self._take() for _ in sources]
        self._free_host += reversed(sources)
        # Nothing is registered, because what they were before may have been evicted: the next commit offers all again.
        self._tables[request.request_id] = BlockTable(targets, 0, table.registers)
        return BlockMove("swap_in", sources, list(targets))

    def is_swapped(self, request: Request) -> bool:
        """Whether the request's computed tokens are in host memory."""
        return request.request_id in self._swapped

    # --- the pool as a whole ---

    def table(self, request: Request) -> Sequence[int]:
        """The request's blocks in the order of its tokens; empty if it has none in the pool. Read, do not keep."""
        table = self._tables.get(request.request_id)
        return () if table is None else table.block_ids

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out: free ones, and cached ones that would be evicted."""
        return len(self._free) + len(self._cached)

    @property
    def usage(self) -> BlockUse:
        """Who holds the blocks now."""
        used = self.num_blocks - 1 - self.num_free
        return BlockUse(used=used, cached=len(self._cached), free=len(self._free))

    def reset_prefix_cache(self) -> int:
        """Share nothing that has been computed so far; returns how many blocks became free.

        Requests keep their tables. What they compute builds on forgotten blocks, so they register nothing until they
        start over.
        """
        num_freed = len(self._cached)
        self._free += self._cached
        self._cached.clear()
        self._unregister(list(self._block_of_key.values()))
        for table in (*self._tables.values(), *self._swapped.values()):
            table.registers = False
        return num_freed

    def check(self) -> None:
        """Raise BlockManagerError if a block is lost, in two states, or miscounted, or the maps of keys disagree."""
        states = Counter([NULL_BLOCK, *self._free, *self._cached])
        held = Counter(block for table in self._tables.values() for block in table.block_ids)
        states.update(held.keys())
        _check_states("pool", states, self.num_blocks, self.usage)
        host = Counter(block for table in self._swapped.values() for block in table.block_ids)
        num_swapped = sum(host.values())
        host.update(self._free_host)
        numbers = f"free {len(self._free_host)} + swapped {num_swapped} of {self.num_host_blocks}"
        _check_states("host", host, self.num_host_blocks, numbers)
        for block in range(self.num_blocks):
            if self._num_tables[block] != held[block]:
                raise BlockManagerError(
                    f"block {block} is in {held[block]} tables, its reference count is {self._num_tables[block]}"
                )
        for request_id, table in (*self._tables.items(), *self._swapped.items()):
            if len(set(table.block_ids)) != len(table.block_ids):
                raise BlockManagerError(f"the table of {request_id!r} holds a block twice: {table.block_ids}")
        self._check_keys()

    # --- parts ---

    def _begin(self, request: Request, table: BlockTable) -> None:
        if request.request_id in self._tables or request.request_id in self._swapped:
            raise BlockManagerError(f"request {request.request_id!r} has a block table; free it before it starts again")
        self._tables[request.request_id] = table
        for block in table.block_ids:
            if self._num_tables[block] == 0:
                del self._cached[block]
            self._num_tables[block] += 1

    def _copy(self, block_ids: list[int], shared: list[int]) -> BlockMove:
        """Copy-on-write: put fresh blocks in the place of the shared ones."""
        sources = [block_ids[i] for i in shared]
        targets = [self._take() for _ in shared]
        for i, source, target in zip(shared, sources, targets, strict=True):
            self._num_tables[source] -= 1
            block_ids[i] = target
        return BlockMove("copy", sources, targets)

    def _take(self) -> int:
        """Hand out a block for one table: a free one, else the cached one that was used least recently."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._unregister([block])
        self._num_tables[block] = 1
        return block

    def _release(self, block_ids: Sequence[int]) -> None:
        """A table gives its blocks up, the last one first."""
        for block in reversed(block_ids):
            self._num_tables[block] -= 1
            if self._num_tables[block] == 0:
                if self._content[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def _cached_prefix(self, request: Request) -> list[int]:
        """The registered blocks that the request's tokens begin with, leaving at least one token to compute.

        Empty if the request asks for log-probabilities of its prompt: they are made while the prompt is computed.
        """
        finds = self.enable_prefix_caching and request.params.prompt_logprobs is None
        return list(self._hits(request)) if finds else []

    def _hits(self, request: Request) -> Iterator[int]:
        most = (request.num_tokens - 1) // self.block_size
        parent = None  # what the previous hit is registered as
        for prefix in extend_prefixes(request, most, self.block_size)[:most]:
            block = self._block_of_key.get(prefix.key)
            if block is None:
                return
            found = self._content[block]
            if found is not prefix:
                if found.token_ids != prefix.token_ids or found.salt != prefix.salt:
                    return
                if not same_prefix(found.parent, parent):
                    return
                found.parent = parent  # equal: the next comparison ends here, so that a chain is walked once
            parent = found
            yield block

    def _register(self, block: int, prefix: Prefix) -> None:
        self._content[block] = prefix
        self._block_of_key[prefix.key] = block

    def _unregister(self, block_ids: Iterable[int]) -> None:
        for block in block_ids:
            if self._content[block] is not None:
                del self._block_of_key[self._content[block].key]
                self._content[block] = None

    def _check_keys(self) -> None:
        registered = {block: content.key for block, content in enumerate(self._content) if content is not None}
        by_key = {block: key for key, block in self._block_of_key.items()}
        if registered != by_key or len(by_key) != len(self._block_of_key):
            raise BlockManagerError(
                f"{len(registered)} blocks have content, {len(self._block_of_key)} keys have a block; they differ at "
                f"blocks {sorted(block for block, _ in registered.items() ^ by_key.items())}"
            )
        idle = {block for block in registered if self._num_tables[block] == 0}
        if idle != set(self._cached):
            raise BlockManagerError(
                f"blocks {sorted(idle)} are registered and in no table, {sorted(self._cached)} are in the cache's list"
            )


def _check_states(name: str, states: Counter, num_blocks: int, numbers: object) -> None:
    """Every block of 0 .. num_blocks-1 is counted exactly once."""
    missing = sorted(set(range(num_blocks)) - states.keys())
    extra = {block: count for block, count in states.items() if count != 1 or not 0 <= block < num_blocks}
    if missing or extra:
        raise BlockManagerError(
            f"{name} of {num_blocks} blocks: {missing} are lost, {extra} are counted more than once or do not exist "
            f"({numbers})"
        )
