"""The requests of the batch, one row each, and the inputs of a step: integers in one buffer, so that one copy brings
them all to the device.

The host fills the buffer through numpy views, the device reads it through tensor views at the same places. A request's
tokens and block table lie in its row on the device. Tokens are sent once; of the tables, only changed entries are.
On a CPU host and device are the same memory.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.costs import blocks_needed
from minillm.errors import ConfigError
from minillm.runtime.cache_engine import zeros
from minillm.runtime.plan import NULL_BLOCK, NewRequest, RunnerOptions, ScheduledRequest, SchedulerOutput
from minillm.sampling import SamplingState, to_device

ALIGNED = 16  # int64 numbers: where fields may begin, because Triton recompiles a kernel for other alignments
NO_SLOT = -1  # where the keys and values of padding go: nowhere
FEWEST_ROWS = 4  # that the CPU's matrix product takes at once: 2 or 3 rows run one by one, and 3 take longer than 4
HALVES = ("int32", "float32")  # two of them in an int64


def rows_computed(num_rows: int, device: torch.device) -> int:
    """How many rows a step is padded to. With 135M parameters on one CPU thread, 3 rows take 64 ms, 4 rows 41 ms."""
    return FEWEST_ROWS if device.type == "cpu" and 1 < num_rows < FEWEST_ROWS else num_rows


class Layout(NamedTuple):
    """How many of everything a step has."""

    num_tokens: int
    num_decodes: int  # requests with one new token; theirs are the first tokens
    num_chunks: int  # requests with several, one after the other
    num_sampled: int  # of the requests, those that get a token
    num_picked: int  # hidden states chosen for sampling; 0: all of them, as they are
    num_checked: int  # requests that get no token yet, and must only be finite

    @classmethod
    def of_decodes(cls, size: int) -> "Layout":
        """Requests with one new token each, that get another."""
        return cls(size, size, 0, size, 0, 0)


class StepInputs(NamedTuple):
    """The fields of the buffer: numpy arrays on the host, tensors on the device."""

    tokens: Any  # [T], where each token is in the flattened rows of tokens
    positions: Any  # [T], of each token in its own request
    slots: Any  # [T], block * block_size + offset: where its keys and values are stored
    decode_rows: Any  # [Bd]
    decode_lengths: Any  # [Bd], tokens with the new one
    chunk_rows: Any  # [Bc]
    chunk_starts: Any  # [Bc + 1], first token of each chunk, counted from the first chunk's
    chunk_lengths: Any  # [Bc], tokens with the new ones
    picked: Any  # [R or 0], the tokens whose hidden states are sampled from
    sampled: Any  # [R], where each new token goes in the flattened rows of tokens
    temperatures: Any  # [R], 0: greedy
    seeds: Any  # [R]
    draws: Any  # [R], the number of the output token, which selects the random number it is drawn with
    checked: Any  # [F], the tokens whose hidden states must be finite


class Field(NamedTuple):
    """Type and number of a field, and what fills the places without a request."""

    dtype: str
    count: str  # of Layout
    padding: str = "nothing"  # 0, "nowhere" or the place of the "spare row", which belongs to no request
    more: int = 0  # numbers beyond the count


FIELDS = StepInputs(
    tokens=Field("int64", "num_tokens", "spare token"),
    positions=Field("int64", "num_tokens"),
    slots=Field("int64", "num_tokens", "nowhere"),
    decode_rows=Field("int64", "num_decodes", "spare row"),
    decode_lengths=Field("int32", "num_decodes"),
    chunk_rows=Field("int64", "num_chunks", "spare row"),
    chunk_starts=Field("int32", "num_chunks", more=1),
    chunk_lengths=Field("int32", "num_chunks"),
    picked=Field("int64", "num_picked"),
    sampled=Field("int64", "num_sampled", "spare token"),
    temperatures=Field("float32", "num_sampled"),
    seeds=Field("int64", "num_sampled"),
    draws=Field("int64", "num_sampled"),
    checked=Field("int64", "num_checked"),
)


class Place(NamedTuple):
    """Where a field lies: int64 numbers start..end - 1 of the buffer, `count` of its own type."""

    start: int
    end: int
    count: int
    dtype: str


@lru_cache(maxsize=1024)
def places(layout: Layout) -> tuple[tuple[Place, ...], int]:
    """The place of each field, and how many int64 numbers all take."""
    found, end = [], 0
    for field in FIELDS:
        start, count = aligned(end), getattr(layout, field.count) + field.more
        end = start + (-(-count // 2) if field.dtype in HALVES else count)
        found.append(Place(start, end, count, field.dtype))
    return tuple(found), aligned(end)


def aligned(number: int) -> int:
    """The next place where a field may begin."""
    return -(-number // ALIGNED) * ALIGNED


def carve(buffer: np.ndarray | Tensor, layout: Layout) -> StepInputs:
    """The fields as views of a buffer of int64."""
    library = np if isinstance(buffer, np.ndarray) else torch
    return StepInputs(
        *(
            buffer[start:end].view(getattr(library, dtype))[:count] if dtype in HALVES else buffer[start:end]
            for start, end, count, dtype in places(layout)[0]
        )
    )


def carve_changes(buffer: np.ndarray | Tensor, layout: Layout, num_changes: int) -> tuple[Any, Any]:
    """Behind the fields: the entries of the flattened tables that changed, and their blocks. [U] int64, [U] int32."""
    library = np if isinstance(buffer, np.ndarray) else torch
    start = places(layout)[1]
    middle = start + aligned(num_changes)
    return buffer[start : start + num_changes], buffer[middle:].view(library.int32)[:num_changes]


def buffer_size(layout: Layout, num_changes: int) -> int:
    """int64 numbers of a buffer for this layout and these changes."""
    return places(layout)[1] + aligned(num_changes) + aligned(-(-num_changes // 2))


class Step(NamedTuple):
    """A step as the host has prepared it."""

    layout: Layout
    buffer: Tensor  # of this step only, on the host
    num_changes: int  # entries of the tables
    graph: int  # requests of the graph that the layout fits; 0: it fits none
    max_queries: int  # tokens of the longest chunk
    sampled_ids: Sequence[str]  # requests that get a token
    checked_ids: Sequence[str]  # requests that get none yet
    asking: Sequence[int]  # indices of those sampled with more than a temperature
    score_entries: int  # query-key pairs, in one head of one layer


class Batch:
    """What is remembered of the requests of the batch, and the steps made of plans.

    At most `options.max_num_seqs` requests of `options.max_model_len` tokens each; one row more is for padding.
    """

    def __init__(self, options: RunnerOptions, block_size: int, device: torch.device, run: Callable, is_mirrored: bool):
        """`run` hands work to the device. `is_mirrored`: the device has a copy of the tables, updated in order."""
        self.num_rows = options.max_num_seqs
        self.max_model_len = options.max_model_len
        self.block_size = block_size
        self.device = device
        self.run = run
        self.is_mirrored = is_mirrored
        self.max_blocks = blocks_needed(options.max_model_len, block_size)
        width = aligned(self.max_blocks)
        self.tables = zeros((self.num_rows + 1, width), torch.int32, "cpu").numpy()  # block tables, then null blocks
        self.device_tables = torch.from_numpy(self.tables)
        if self.is_mirrored:
            self.device_tables = zeros(self.tables.shape, torch.int32, device)
        # Prompt and output of every request, and room for the token that is sampled when the last position is computed.
        self.tokens = zeros((self.num_rows + 1, aligned(options.max_model_len + 1)), torch.int32, device)
        self.states: dict[str, SamplingState] = {}
        self.temperatures = np.zeros(self.num_rows, np.float32)
        self.seeds = np.zeros(self.num_rows, np.int64)
        self.num_prompt_tokens = np.zeros(self.num_rows, np.int64)
        self.asking = np.zeros(self.num_rows, bool)
        spare_token = self.num_rows * self.tokens.shape[1]
        padding = {"nothing": 0, "nowhere": NO_SLOT, "spare row": self.num_rows, "spare token": spare_token}
        self._padding = [padding[field.padding] for field in FIELDS]
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(self.num_rows))[::-1]
        self._changes: dict[int, int] = {}  # entry of the flattened tables -> block, since the last step

    def block_table(self, request_id: str) -> np.ndarray:
        """[W] the request's blocks in the order of its tokens, then null blocks."""
        return self.tables[self._row_of[request_id]]

    # --- requests come and go ---

    def remove(self, request_ids: Iterable[str]) -> None:
        """Forget requests; no effect for those that are not here."""
        for request_id in request_ids:
            row = self._row_of.pop(request_id, None)
            if row is not None:
                del self.states[request_id]
                self.tables[row] = NULL_BLOCK
                self._free_rows.append(row)

    def add(self, new: NewRequest, state: SamplingState) -> None:
        """Add a request; its tokens are handed to the device. Raises ConfigError if there is no room for it."""
        token_ids = [*new.prompt_token_ids, *new.output_token_ids]
        if not self._free_rows or len(token_ids) > self.max_model_len:
            raise ConfigError(
                f"request {new.request_id!r} has {len(token_ids)} tokens and is number {len(self._row_of) + 1} in the "
                f"batch; the runner was made for {self.num_rows} requests of {self.max_model_len} tokens; raise "
                "max_num_seqs or max_model_len of its RunnerOptions"
            )
        row = self._row_of[new.request_id] = self._free_rows.pop()
        self.states[new.request_id] = state
        self.tables[row] = NULL_BLOCK
        self.temperatures[row], self.seeds[row] = state.temperature, state.seed
        self.num_prompt_tokens[row], self.asking[row] = len(new.prompt_token_ids), state.asks
        own = self.tokens[row, : len(token_ids)]
        self.run(lambda: own.copy_(to_device(token_ids, self.device, torch.int32), non_blocking=True))

    def set_blocks(self, part: ScheduledRequest) -> None:
        """Store the blocks that came with a plan. Raises ConfigError for more than a row holds."""
        row, end = self._row_of[part.request_id], part.first_block + len(part.block_ids)
        if end > self.max_blocks:
            raise ConfigError(
                f"request {part.request_id!r} has {end} blocks, the runner was made for {self.max_blocks} blocks per "
                "request; raise max_model_len of its RunnerOptions"
            )
        if len(part.block_ids) == 1:  # nearly always; a slice is five times as expensive
            self.tables[row, part.first_block] = part.block_ids[0]
        else:
            self.tables[row, part.first_block : end] = part.block_ids
        if self.is_mirrored:
            first = row * self.tables.shape[1]
            self._changes.update(zip(range(first + part.first_block, first + end), part.block_ids, strict=True))

    # --- a step ---

    def prepare(self, plan: SchedulerOutput, graphs: Sequence[int] = ()) -> Step:
        """The inputs of a step. `graphs`: if all its requests have one new token and get another, it is padded to the
        first of these sizes that holds it.
        """
        others = sorted(plan.others, key=lambda part: part.num_tokens > 1)
        request_ids = [*plan.decodes, *(part.request_id for part in others)]
        starts = [*plan.decodes.values(), *(part.start for part in others)]
        rows = np.fromiter(map(self._row_of.__getitem__, request_ids), np.int64, len(request_ids))
        starts = np.fromiter(starts, np.int64, len(request_ids))
        if plan.num_tokens == len(request_ids) and all(part.samples for part in others):
            return self._decode_step(request_ids, rows, starts, graphs)
        num_decodes = len(plan.decodes)
        counts = np.array([1] * num_decodes + [part.num_tokens for part in others])
        samples = np.array([True] * num_decodes + [part.samples for part in others])
        return self._mixed_step(request_ids, rows, starts, counts, samples, int((counts == 1).sum()))

    def _decode_step(
        self, request_ids: Sequence[str], rows: np.ndarray, starts: np.ndarray, graphs: Sequence[int]
    ) -> Step:
        """One new token each, and each gets another: all hidden states are sampled from, in order."""
        graph = next((size for size in graphs if size >= len(rows)), 0)
        size = graph or rows_computed(len(rows), self.device)
        step, into = self._padded(Layout.of_decodes(size), num_rows=len(rows))
        self._fill_decodes(into, rows, starts)
        self._fill_sampling(into, rows, starts + 1)
        score_entries = int(starts.sum()) + len(starts)
        return step._replace(
            graph=graph, sampled_ids=request_ids, asking=self._asking(rows), score_entries=score_entries
        )

    def _mixed_step(
        self,
        request_ids: Sequence[str],
        rows: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
        samples: np.ndarray,
        n: int,
    ) -> Step:
        """The first `n` requests have one new token, the others several; some get a token and some do not yet."""
        ends, num_tokens, num_sampled = starts + counts, int(counts.sum()), int(samples.sum())
        padded, padded_sampled = (rows_computed(each, self.device) for each in (num_tokens, num_sampled))
        num_chunks = len(rows) - n + (padded > num_tokens)  # padding is a chunk of its own, without a request
        layout = Layout(padded, n, num_chunks, padded_sampled, padded_sampled, len(rows) - num_sampled)
        step, into = self._padded(layout)
        self._fill_decodes(into, rows[:n], starts[:n])
        self._fill_chunks(into, rows[n:], starts[n:], counts[n:])
        into.chunk_starts[len(rows) - n + 1 :] = padded - n
        self._fill_sampling(into, rows[samples], ends[samples])
        newest = counts.cumsum() - 1  # the last token of each request
        into.picked[:num_sampled] = newest[samples]
        into.checked[:] = newest[~samples]
        return step._replace(
            max_queries=int(counts[n:].max(initial=0)),
            sampled_ids=[request_ids[number] for number in np.flatnonzero(samples)],
            checked_ids=[request_ids[number] for number in np.flatnonzero(~samples)],
            asking=self._asking(rows[samples]),
            score_entries=int((counts * starts + counts * (counts + 1) // 2).sum()),
        )

    def _asking(self, rows: np.ndarray) -> Sequence[int]:
        return np.flatnonzero(self.asking[rows]).tolist()

    def _padded(self, layout: Layout, num_rows: int = 0) -> tuple[Step, StepInputs]:
        """A step of padding only, with the table entries that changed. Not padded if all its rows are tokens.

        Each step has a new pinned tensor: torch does not reuse a freed piece before the copies from it have been made,
        so no wait is needed.
        """
        changes, self._changes = self._changes, {}
        count = len(changes)
        buffer = torch.empty(buffer_size(layout, count), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        numbers = buffer.numpy()
        into = carve(numbers, layout)
        for field, view, padding in zip(FIELDS, into, self._padding, strict=True):
            if num_rows < layout.num_tokens or field.more:
                view[:] = padding
        if changes:
            entries, blocks = carve_changes(numbers, layout, count)
            entries[:] = np.fromiter(changes.keys(), np.int64, count)
            blocks[:] = np.fromiter(changes.values(), np.int64, count)
        return Step(layout, buffer, count, 0, 0, (), (), (), 0), into

    def _fill_decodes(self, into: StepInputs, rows: np.ndarray, starts: np.ndarray) -> None:
        """The requests with one new token."""
        count = len(rows)
        into.tokens[:count] = rows * self.tokens.shape[1] + starts
        into.positions[:count] = starts
        into.slots[:count] = self._slots(rows, starts)
        into.decode_rows[:count] = rows
        into.decode_lengths[:count] = starts + 1

    def _fill_chunks(self, into: StepInputs, rows: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> None:
        """The requests with several new tokens, after the others."""
        first = end = len(into.decode_rows)
        for number, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            begin, end = end, end + count
            positions = np.arange(start, start + count)
            into.tokens[begin:end] = row * self.tokens.shape[1] + positions
            into.positions[begin:end] = positions
            into.slots[begin:end] = self._slots(row, positions)
            into.chunk_rows[number] = row
            into.chunk_starts[number + 1] = end - first
            into.chunk_lengths[number] = start + count

    def _fill_sampling(self, into: StepInputs, rows: np.ndarray, ends: np.ndarray) -> None:
        """For requests that get a token and have `ends` already: where it goes, and how it is drawn."""
        count = len(rows)
        into.sampled[:count] = rows * self.tokens.shape[1] + ends
        into.temperatures[:count] = self.temperatures[rows]
        into.seeds[:count] = self.seeds[rows]
        into.draws[:count] = ends - self.num_prompt_tokens[rows]

    def _slots(self, rows: np.ndarray | int, positions: np.ndarray) -> np.ndarray:
        block_numbers, offsets = np.divmod(positions, self.block_size)
        return self.tables[rows, block_numbers] * self.block_size + offsets
