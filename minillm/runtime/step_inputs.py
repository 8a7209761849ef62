"""What a device must know of a step: integers in one buffer, so that one copy brings them all.

The host fills the buffer through numpy views, the device reads it through tensor views at the same places.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ALIGNED = 16  # int64 numbers: where fields may begin, because Triton compiles a kernel anew for other alignments
NO_SLOT = -1  # where the keys and values of padding go: nowhere
SPARE_ROW = None  # stands for the last row of the tables, which is nobody's
HALVES = ("int32", "float32")  # two of them in an int64


class Layout(NamedTuple):
    """How many of everything a step has."""

    num_tokens: int
    num_decodes: int  # requests with one new token; theirs are the first tokens
    num_chunks: int  # requests with several, one behind the other
    num_sampled: int  # of the requests, those that get a token
    num_picked: int  # hidden states chosen for sampling; 0: all of them, as they are
    num_checked: int  # requests that get no token yet, and must only be finite

    @classmethod
    def of_decodes(cls, size: int) -> "Layout":
        """Requests with one new token each, that get another."""
        return cls(size, size, 0, size, 0, 0)


class StepInputs(NamedTuple):
    """The fields of the buffer: numpy arrays on the host, tensors on the device."""

    token_ids: Any  # [T], or PENDING
    positions: Any  # [T], of each token in its own request
    slots: Any  # [T], block * block_size + offset: where its keys and values are stored
    decode_rows: Any  # [Bd], of the tables
    decode_lengths: Any  # [Bd], tokens with the new one
    chunk_rows: Any  # [Bc], of the tables
    chunk_starts: Any  # [Bc + 1], first token of each chunk, counted from the first chunk's
    chunk_lengths: Any  # [Bc], tokens with the new ones
    picked: Any  # [R or 0], the tokens whose hidden states are sampled from
    sampled_rows: Any  # [R], of the tables
    temperatures: Any  # [R], 0: greedy
    seeds: Any  # [R]
    draws: Any  # [R], the number of the output token: which of its random numbers a request draws it with
    checked: Any  # [F], the tokens whose hidden states must be finite


class Field(NamedTuple):
    """Type and number of a field, and what stands in the place of a request that is not there."""

    dtype: str
    count: str  # of Layout
    padding: int | None = 0
    more: int = 0  # numbers beyond the count


FIELDS = StepInputs(
    token_ids=Field("int64", "num_tokens"),
    positions=Field("int64", "num_tokens"),
    slots=Field("int64", "num_tokens", NO_SLOT),
    decode_rows=Field("int64", "num_decodes", SPARE_ROW),
    decode_lengths=Field("int32", "num_decodes"),
    chunk_rows=Field("int64", "num_chunks", SPARE_ROW),
    chunk_starts=Field("int32", "num_chunks", more=1),
    chunk_lengths=Field("int32", "num_chunks"),
    picked=Field("int64", "num_picked"),
    sampled_rows=Field("int64", "num_sampled", SPARE_ROW),
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
    """The place of each field, and the int64 numbers that all take."""
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
    """int64 numbers of a buffer for so much."""
    return places(layout)[1] + aligned(num_changes) + aligned(-(-num_changes // 2))


def new_buffer(layout: Layout, num_changes: int, spare_row: int, pinned: bool) -> Tensor:
    """A buffer on the host whose fields are all padding; its changes are not filled in.

    Pinned memory is a new tensor's every time: torch does not hand a freed piece out again before the copies from it
    have been made, so nobody needs to wait for those.
    """
    buffer = torch.empty(buffer_size(layout, num_changes), dtype=torch.int64, pin_memory=pinned)
    for field, view in zip(FIELDS, carve(buffer.numpy(), layout), strict=True):
        view[:] = spare_row if field.padding is SPARE_ROW else field.padding
    return buffer
