"""The block tables and the pool of a paged run at every step, reconstructed from its Trace."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from minillm.trace import BlockUse, Preemption, ScheduledTokens, StepEvent, Trace
from minillm.viz.base import PictureError, plural

FATES = {
    "recompute": "preempted, {} to compute again",
    "swap": "swapped out, {} in host memory",
}


@dataclass(frozen=True)
class PoolState:
    """All block tables, and the contents of the pool's blocks, at one moment.

    Raises PictureError if a table names a block outside the pool, or is too short for its tokens.
    """

    block_size: int  # slots per block: tokens whose keys and values it can hold
    num_blocks: int  # of the whole pool, the null block included
    tables: Mapping[str, Sequence[int]]  # request id -> the physical block of each logical block
    num_tokens: Mapping[str, int]  # request id -> tokens that its blocks hold, those being written included
    written: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # written in this step, the end excluded
    cached: Sequence[int] = ()  # in no table, kept for requests with the same prefix; next to evict first
    contents: Mapping[int, tuple[str, int]] = field(default_factory=dict)  # cached block -> request and logical block
    fates: Mapping[str, str] = field(default_factory=dict)  # request -> status, by arrival; "" with a table
    ending: Sequence[str] = ()  # requests that end with this step
    copies: Sequence[tuple[int, int]] = ()  # blocks copied before the step: (from, to)
    num_null: int = 1  # blocks that stand for padding; the first of the pool

    def __post_init__(self):
        _check_block_size(self.block_size)
        if self.tables.keys() != self.num_tokens.keys():
            raise PictureError(
                f"tables are given of {list(self.tables)} and numbers of tokens of {list(self.num_tokens)}; "
                "every table needs both"
            )
        for request_id, table in self.tables.items():
            strange = [block for block in table if not self.num_null <= block < self.num_blocks]
            if strange:
                raise PictureError(
                    f"the table of {request_id!r} names block {strange[0]}; "
                    f"blocks that can be allocated are {self.num_null} to {self.num_blocks - 1}"
                )
            if self.num_tokens[request_id] > len(table) * self.block_size:
                raise PictureError(
                    f"{request_id!r} holds {plural(self.num_tokens[request_id], 'token')} in "
                    f"{plural(len(table), 'block')} of {self.block_size}; is block_size the one of the run?"
                )

    def owners(self, block: int) -> list[str]:
        """The requests whose tables contain a physical block; their number is its ref count."""
        return [request_id for request_id, table in self.tables.items() if block in table]

    def used(self) -> set[int]:
        """The blocks that are in a table."""
        return {block for table in self.tables.values() for block in table}

    def idle(self) -> set[int]:
        """The blocks that are free."""
        return set(range(self.num_null, self.num_blocks)) - self.used() - set(self.cached)

    def filled(self, block: int) -> int:
        """Slots of a physical block that hold a token."""
        if block in self.cached:
            return self.block_size
        return max((self._in_block(each, self.num_tokens[each], block) for each in self.owners(block)), default=0)

    def slots_written(self, block: int) -> tuple[int, int] | None:
        """The slots of a physical block that this step writes, the end excluded; None if it writes none."""
        for request_id, (start, end) in self.written.items():
            if block in self.tables.get(request_id, ()):
                slots = self._in_block(request_id, start, block), self._in_block(request_id, end, block)
                if slots[0] < slots[1]:
                    return slots
        return None

    def _in_block(self, request_id: str, position: int, block: int) -> int:
        """How many of the tokens before `position` lie in the block."""
        before = list(self.tables[request_id]).index(block) * self.block_size
        return min(max(position - before, 0), self.block_size)

    def content(self, block: int) -> tuple[str, int] | None:
        """The request and its logical block that a physical block holds; None if it holds nothing."""
        owners = self.owners(block)
        if owners:
            return owners[0], list(self.tables[owners[0]]).index(block)
        return self.contents.get(block)

    @property
    def use(self) -> BlockUse:
        """The number of used, cached, free and null blocks."""
        used, cached = len(self.used()), len(self.cached)
        return BlockUse(used, cached, self.num_blocks - self.num_null - used - cached, null=self.num_null)

    @property
    def num_empty(self) -> int:
        """Slots of used blocks that hold nothing: internal fragmentation."""
        return sum(self.block_size - self.filled(block) for block in self.used())

    @property
    def num_saved(self) -> int:
        """How many more blocks would be needed without sharing."""
        return sum(map(len, self.tables.values())) - len(self.used())


def pool_states(
    trace: Trace,
    block_size: int,
    *,
    tokens: Mapping[str, Sequence[str]] | None = None,
    num_blocks: int | None = None,
) -> list[PoolState]:
    """The pool during each step, requests that end with it included, and then the pool after the last step.

    With `tokens` (request id -> its tokens, prompt and output), blocks of the same content are recognised, and only the
    first is kept in the cache; without it, all contents count as different. `num_blocks` is read from the trace if it
    has it. Raises PictureError for a trace without block tables, and for a `block_size` that does not fit them.
    """
    replay = Replay(trace, block_size, tokens=tokens, num_blocks=num_blocks)
    during = []
    for index, step in enumerate(trace.steps):
        replay.begin(index)
        during.append(replay.state(step))
        replay.end(index)
    return [*during, replay.state()]


class Replay:
    """Goes through a trace and keeps the block tables: for each step in order `begin`, `state`, `end`.

    Some things are not in the trace. A forked request shows its table from its first step on. An aborted one loses its
    table one step after its last, or with its last if the result was discarded. After a failed step, which is not in
    the trace, a request keeps its old table until its next step.
    """

    def __init__(
        self,
        trace: Trace,
        block_size: int,
        *,
        tokens: Mapping[str, Sequence[str]] | None = None,
        num_blocks: int | None = None,
    ):
        if trace.dropped_steps:
            raise PictureError(
                f"{trace.dropped}, in which block tables began; record the run with a larger max_trace_steps"
            )
        named = [block for step in trace.steps for part in step.scheduled for block in part.block_ids]
        if not named:
            raise PictureError("the trace has no block tables; record it from a scheduler with a paged cache")
        _check_block_size(block_size)
        use = next((step.blocks for step in trace.steps if step.blocks is not None), None)
        self.trace, self.block_size, self._tokens = trace, block_size, tokens or {}
        self.num_blocks = num_blocks or (use.total if use else max(named) + 1)
        self.num_null = use.null if use else 1
        self.tables: dict[str, list[int]] = {}
        self.num_tokens: dict[str, int] = {}
        self.written: dict[str, tuple[int, int]] = {}
        self.fates = {record.request_id: "waiting" for record in trace.requests}
        self._references = Counter[int]()
        self._cached: dict[int, None] = {}  # the next to evict first
        self._registered: dict[object, int] = {}  # content -> the block registered for it
        self._content: dict[int, tuple[object, tuple[str, int]]] = {}  # block -> content, request, logical block
        self._swapped_in: set[str] = set()  # their blocks are not registered until another one is full
        self._lost, self._discarded = _never_seen_again(trace)

    def begin(self, index: int) -> None:
        """Begin step `index`: preemptions, changes of tables, tokens written."""
        step = self.trace.steps[index]
        self._lose(self._lost.get(index - 1, ()))
        for each in step.preempted:
            self._preempt(each)
        for part in step.scheduled:
            if part.why != "padding" or self.fates[part.request_id] != "finished":  # otherwise it had no table
                self._take_part(part)

    def end(self, index: int) -> None:
        """End step `index`: register full blocks by their content, and free the blocks of requests that ended."""
        step = self.trace.steps[index]
        self._lose(self._discarded.get(index, ()))
        for request_id, (start, end) in self.written.items():
            first, full = start // self.block_size, end // self.block_size
            if full > first:
                for each in range(0 if request_id in self._swapped_in else first, full):
                    self._register(request_id, each)
                self._swapped_in.discard(request_id)
        self.written = {}
        for request_id in step.finished:
            self._release(request_id)
            self.fates[request_id] = "finished"
        most = step.blocks.cached if step.blocks else 0
        for block in list(self._cached)[: max(0, len(self._cached) - most)]:
            del self._cached[block]
            del self._registered[self._content.pop(block)[0]]

    def state(self, step: StepEvent | None = None) -> PoolState:
        """The pool now; `step` is the running step."""
        return PoolState(
            self.block_size,
            self.num_blocks,
            {request_id: tuple(table) for request_id, table in self.tables.items()},
            dict(self.num_tokens),
            dict(self.written),
            tuple(self._cached),
            {block: self._content[block][1] for block in self._cached},
            dict(self.fates),
            step.finished if step else (),
            step.copied_blocks if step else (),
            self.num_null,
        )

    @property
    def num_empty(self) -> int:
        """Slots of used blocks that hold nothing; only the last block of a table can have any."""
        last = {self.tables[request_id][-1]: -count % self.block_size for request_id, count in self.num_tokens.items()}
        return sum(last.values())

    def _lose(self, aborted: Sequence[str]) -> None:
        for request_id in aborted:
            self._release(request_id)
            self.fates[request_id] = "aborted"

    def _preempt(self, preemption: Preemption) -> None:
        self._release(preemption.request_id)
        self.fates[preemption.request_id] = FATES[preemption.mode].format(plural(preemption.num_tokens, "token"))

    def _take_part(self, part: ScheduledTokens) -> None:
        request_id = part.request_id
        table = self.tables.setdefault(request_id, [])
        fate, self.fates[request_id] = self.fates[request_id], ""
        if part.first_block > len(table):
            raise PictureError(
                f"the trace changes the table of {request_id!r} from entry {part.first_block}, but it has {len(table)}"
            )
        if fate.startswith("swapped"):
            self._swapped_in.add(request_id)
        if part.block_ids:
            first_new = 0 if request_id in self._swapped_in else part.start // self.block_size
            self._change(table, part.first_block, part.block_ids, first_new)
        if part.end > len(table) * self.block_size:
            raise PictureError(
                f"{request_id!r} computes up to token {part.end} with {plural(len(table), 'block')} of "
                f"{self.block_size}; is block_size the one of the run?"
            )
        self.num_tokens[request_id] = part.end
        self.written[request_id] = (self.written.get(request_id, (part.start, 0))[0], part.end)

    def _change(self, table: list[int], first: int, block_ids: Sequence[int], first_new: int) -> None:
        """Set the entries from `first` on; from logical block `first_new` on, old contents are lost."""
        self._references.update(block_ids)
        dropped, table[first:] = table[first:], block_ids
        self._let_go(dropped)
        for index, block in enumerate(block_ids, start=first):
            self._cached.pop(block, None)
            if index >= first_new and block in self._content:
                del self._registered[self._content.pop(block)[0]]

    def _register(self, request_id: str, index: int) -> None:
        """Register a full block by its content, unless another block is registered for it."""
        block = self.tables[request_id][index]
        end = (index + 1) * self.block_size
        tokens = self._tokens.get(request_id, ())
        content = tuple(tokens[:end]) if len(tokens) >= end else block
        if block not in self._content and content not in self._registered:
            self._registered[content] = block
            self._content[block] = content, (request_id, index)

    def _release(self, request_id: str) -> None:
        """Free the request's blocks, the last first."""
        self._let_go(self.tables.pop(request_id, [])[::-1])
        self.num_tokens.pop(request_id, None)
        self.written.pop(request_id, None)
        self._swapped_in.discard(request_id)

    def _let_go(self, blocks: Sequence[int]) -> None:
        self._references.subtract(blocks)
        for block in blocks:
            if not self._references[block] and block in self._content:
                self._cached[block] = None


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise PictureError(f"block_size is {block_size}; a block holds at least 1 token")


def _never_seen_again(trace: Trace) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Aborted requests, by the step they were last seen in: they took part, did not end, and do not appear again.

    First those that were aborted after it; then those aborted while it was computed, whose part was discarded.
    """
    last = {}  # request id -> step, and whether its part was discarded
    for index, step in enumerate(trace.steps):
        last |= {each.request_id: (index, False) for each in step.preempted}
        last |= {part.request_id: (index, part.why == "padding") for part in step.scheduled}
    for step in trace.steps:
        for request_id in step.finished:
            last.pop(request_id, None)
    after: dict[int, list[str]] = {}
    during: dict[int, list[str]] = {}
    for request_id, (index, discarded) in last.items():
        if discarded:
            during.setdefault(index, []).append(request_id)
        elif index < len(trace.steps) - 1:
            after.setdefault(index, []).append(request_id)
    return after, during
