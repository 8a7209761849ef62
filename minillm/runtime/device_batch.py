"""Prepares the inputs of a step on the host, in numpy: where every token comes from and goes to.

What the device keeps from step to step, block tables and each request's newest token, lies in the rows that the
`CacheEngine` gives to requests. Of the tables, only entries that changed are sent.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from torch import Tensor

from minillm.costs import blocks_needed
from minillm.errors import ConfigError
from minillm.runtime.cache_engine import CacheEngine
from minillm.runtime.plan import ScheduledRequest, SchedulerOutput
from minillm.runtime.step_inputs import Layout, StepInputs, carve, carve_changes, new_buffer
from minillm.sampling import SamplingState

TABLE_ALIGNED = 16  # entries that a row of the tables is a multiple of: Triton compiles anew for other strides


class Announced(NamedTuple):
    """What is remembered of a request until it ends."""

    sampling: SamplingState
    num_prompt_tokens: int


class Step(NamedTuple):
    """A step as the host has prepared it."""

    layout: Layout
    buffer: Tensor  # see `step_inputs`; of this step alone
    num_changes: int  # entries of the tables
    graph: int  # requests of the graph that the layout fits; 0: it fits none
    max_queries: int  # tokens of the longest chunk
    sampled_ids: Sequence[str]  # requests that get a token
    checked_ids: Sequence[str]  # requests that get none yet
    asking: bool  # some ask for more than a temperature
    score_entries: int  # query-key pairs, in one head of one layer


class DeviceBatch:
    """What the host remembers of every row, and the steps it makes of plans.

    There are `num_rows` requests at a time at most, of `max_model_len` tokens each, and one row more for padding.
    """

    def __init__(self, cache: CacheEngine, num_rows: int, max_model_len: int, pinned: bool):
        self.cache = cache
        self.num_rows = num_rows
        self.max_blocks = blocks_needed(max_model_len, cache.block_size)
        self.width = -(-self.max_blocks // TABLE_ALIGNED) * TABLE_ALIGNED  # of the device's tables
        self.pinned = pinned
        self.temperatures = np.zeros(num_rows, np.float32)
        self.seeds = np.zeros(num_rows, np.int64)
        self.num_prompt_tokens = np.zeros(num_rows, np.int64)
        self.asking = np.zeros(num_rows, bool)
        self._changes: dict[int, int] = {}  # entry of the flattened tables -> block, since the last step

    def follow(self, parts: Sequence[ScheduledRequest], requests: dict[str, Announced]) -> None:
        """Take note of the blocks that came with a plan, and of whose row is whose."""
        for part in parts:
            row, end = self.cache.rows[part.request_id], part.first_block + len(part.block_ids)
            if row >= self.num_rows or end > self.max_blocks:
                raise ConfigError(
                    f"request {part.request_id!r} is number {row + 1} of those at work and has {end} blocks; the "
                    f"runner was made for {self.num_rows} requests of {self.max_blocks} blocks; raise max_num_seqs or "
                    "max_model_len of its RunnerOptions"
                )
            first = row * self.width
            self._changes.update(zip(range(first + part.first_block, first + end), part.block_ids, strict=True))
            if part.first_block == 0:
                request = requests[part.request_id]
                self.temperatures[row] = request.sampling.temperature
                self.seeds[row] = request.sampling.seed
                self.num_prompt_tokens[row] = request.num_prompt_tokens
                self.asking[row] = request.sampling.asks

    def prepare(self, plan: SchedulerOutput, graphs: Sequence[int] = ()) -> Step:
        """The inputs of a step. `graphs`: if all its requests have one new token, get another and ask for no more than
        a temperature, it is padded to the first of these sizes that holds it.
        """
        decodes, chunks = plan.scheduled, []
        if plan.num_tokens > len(decodes):
            decodes = [part for part in plan.scheduled if len(part.token_ids) == 1]
            chunks = [part for part in plan.scheduled if len(part.token_ids) > 1]
        request_ids, starts, token_ids, samples, *_ = zip(*decodes, *chunks, strict=True)
        rows = np.fromiter(map(self.cache.rows.__getitem__, request_ids), np.int64, len(request_ids))
        starts = np.fromiter(starts, np.int64, len(rows))
        if chunks or not all(samples):
            return self._mixed_step(request_ids, rows, starts, token_ids, np.array(samples), len(decodes))
        return self._decode_step(request_ids, rows, starts, token_ids, graphs)

    def _decode_step(
        self, request_ids: Sequence[str], rows: np.ndarray, starts: np.ndarray, token_ids: tuple, graphs: Sequence[int]
    ) -> Step:
        """One new token each, and each gets another: hidden states are sampled from as they come."""
        asking = bool(self.asking[rows].any())
        graph = 0 if asking else next((size for size in graphs if size >= len(rows)), 0)
        step = self._padded(Layout.of_decodes(graph or len(rows)))
        into = carve(step.buffer.numpy(), step.layout)
        ends = self._fill_decodes(into, rows, starts, token_ids)
        self._fill_sampling(into, rows, ends)
        return step._replace(graph=graph, sampled_ids=request_ids, asking=asking, score_entries=int(ends.sum()))

    def _mixed_step(
        self, request_ids: tuple, rows: np.ndarray, starts: np.ndarray, token_ids: tuple, samples: np.ndarray, n: int
    ) -> Step:
        """The first `n` requests have one new token, the others several; some get a token and some do not yet."""
        counts = np.fromiter(map(len, token_ids), np.int64, len(rows))
        ends, num_sampled = starts + counts, int(samples.sum())
        layout = Layout(int(counts.sum()), n, len(rows) - n, num_sampled, num_sampled, len(rows) - num_sampled)
        step = self._padded(layout)
        into = carve(step.buffer.numpy(), layout)
        self._fill_decodes(into, rows[:n], starts[:n], token_ids[:n])
        self._fill_chunks(into, rows[n:], starts[n:], token_ids[n:])
        self._fill_sampling(into, rows[samples], ends[samples])
        newest = counts.cumsum() - 1  # the last token of each request
        into.picked[:] = newest[samples]
        into.checked[:] = newest[~samples]
        return step._replace(
            max_queries=int(counts[n:].max(initial=0)),
            sampled_ids=[request_ids[number] for number in np.flatnonzero(samples)],
            checked_ids=[request_ids[number] for number in np.flatnonzero(~samples)],
            asking=bool(self.asking[rows[samples]].any()),
            score_entries=int((counts * starts + counts * (counts + 1) // 2).sum()),
        )

    def _padded(self, layout: Layout) -> Step:
        """A step of padding alone, but for the table entries that changed."""
        changes, self._changes = self._changes, {}
        count = len(changes)
        buffer = new_buffer(layout, count, self.num_rows, self.pinned)
        entries, blocks = carve_changes(buffer.numpy(), layout, count)
        entries[:] = np.fromiter(changes.keys(), np.int64, count)
        blocks[:] = np.fromiter(changes.values(), np.int64, count)
        return Step(layout, buffer, count, 0, 0, (), (), False, 0)

    def _fill_decodes(self, into: StepInputs, rows: np.ndarray, starts: np.ndarray, token_ids: tuple) -> np.ndarray:
        """The requests with one new token; returns how many tokens each has with it."""
        count, ends = len(rows), starts + 1
        into.token_ids[:count] = np.fromiter(chain.from_iterable(token_ids), np.int64, count)
        into.positions[:count] = starts
        into.slots[:count] = self._slots(rows, starts)
        into.decode_rows[:count] = rows
        into.decode_lengths[:count] = ends
        return ends

    def _fill_chunks(self, into: StepInputs, rows: np.ndarray, starts: np.ndarray, token_ids: tuple) -> None:
        """The requests with several new tokens, behind the others."""
        first = end = len(into.decode_rows)
        for number, (row, start, ids) in enumerate(zip(rows, starts, token_ids, strict=True)):
            begin, end = end, end + len(ids)
            positions = np.arange(start, start + len(ids))
            into.token_ids[begin:end] = ids
            into.positions[begin:end] = positions
            into.slots[begin:end] = self._slots(row, positions)
            into.chunk_rows[number] = row
            into.chunk_starts[number + 1] = end - first
            into.chunk_lengths[number] = start + len(ids)

    def _fill_sampling(self, into: StepInputs, rows: np.ndarray, ends: np.ndarray) -> None:
        """Of the requests that get a token, which have so many already: how it is drawn."""
        count = len(rows)
        into.sampled_rows[:count] = rows
        into.temperatures[:count] = self.temperatures[rows]
        into.seeds[:count] = self.seeds[rows]
        into.draws[:count] = ends - self.num_prompt_tokens[rows]

    def _slots(self, rows: np.ndarray | int, positions: np.ndarray) -> np.ndarray:
        block_numbers, offsets = np.divmod(positions, self.cache.block_size)
        return self.cache.block_tables[rows, block_numbers] * self.cache.block_size + offsets
