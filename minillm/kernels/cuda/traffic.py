"""What a kernel's accesses to global memory cost, counted as a GPU's memory system serves them.

The 32 threads of a warp execute a load together; that is one *request*. Memory delivers whole *sectors* of 32 bytes, so
a request costs as many as its threads' addresses touch, however few of their bytes are used. Nsight Compute calls the
quotient "sectors/request"; at 4 bytes per thread, 4 is the least, unless threads share an address, and 32 the most.

Nothing is counted as cached: a sector that is asked for twice counts twice. `unique_bytes` is the least that must come
from memory, with a perfect cache.
"""

from dataclasses import dataclass

import numpy as np

WARP = 32
SECTOR = 32  # bytes

# One access of one thread. `address`: bytes from the array's start, or if that is a slice, from the multiple of 256
# below it, as a GPU aligns what it allocates: sectors begin at 0, 32, ... `occurrence`: accesses that the thread had
# made from this line of the source before; `array`: index into Traffic.names.
RECORD = np.dtype(
    [
        ("address", "i8"),
        ("block", "i4"),
        ("thread", "i4"),
        ("line", "i4"),
        ("occurrence", "i4"),
        ("array", "i2"),
        ("size", "i2"),
        ("stored", "i4"),
    ]
)


@dataclass(frozen=True)
class Counts:
    """Some of a kernel's loads, or stores, added up."""

    num_loads: int  # of single threads; or stores
    requests: int  # of warps
    sectors: int  # each request's own, added up
    bytes_asked: int  # different bytes of a request, added up: threads that share an address ask once
    unique_bytes: int  # different bytes of all
    sector: int = SECTOR  # bytes

    @property
    def bytes_moved(self) -> int:
        return self.sector * self.sectors

    @property
    def efficiency(self) -> float:
        """Share of the moved bytes that were asked for."""
        return self.bytes_asked / self.bytes_moved if self.sectors else 1.0

    @property
    def sectors_per_request(self) -> float:
        return self.sectors / self.requests if self.requests else 0.0


@dataclass(frozen=True)
class Traffic:
    """All accesses of one or more kernels. `records` is an array of RECORD, in the order in which they were made."""

    names: tuple[str, ...]  # of the arrays
    records: np.ndarray
    sector: int = SECTOR  # bytes that memory delivers together; a CPU's are its cache lines

    def loads(self, *names: str) -> Counts:
        """Counts of the loads from these arrays, or from all."""
        return _count(self.records_of(*names), self.sector)

    def stores(self, *names: str) -> Counts:
        """Counts of the stores to these arrays, or to all."""
        return _count(self.records_of(*names, stored=True), self.sector)

    def records_of(self, *names: str, stored: bool = False) -> np.ndarray:
        """The single loads (or stores) from these arrays, or from all."""
        records = self.records[(self.records["stored"] != 0) == stored]
        if not names:
            return records
        return records[np.isin(records["array"], [self.names.index(name) for name in names])]


def joined(parts: list[Traffic]) -> Traffic:
    """The traffic of kernels that ran one after the other; an array of one name is one array."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.names))
    records, next_block = [], 0
    for part in parts:
        own = part.records.copy()
        own["array"] = np.array([names.index(name) for name in part.names], "i2")[own["array"]]
        own["block"] += next_block
        next_block = own["block"].max(initial=next_block - 1) + 1
        records.append(own)
    return Traffic(names, np.concatenate(records) if records else np.empty(0, RECORD))


def request_ids(records: np.ndarray) -> np.ndarray:
    """For each access a number, the same for all accesses of one request of a warp."""
    return _packed(records["block"], records["thread"] // WARP, records["line"], records["occurrence"])


def _count(records: np.ndarray, sector: int) -> Counts:
    if not len(records):
        return Counts(0, 0, 0, 0, 0, sector)
    arrays = int(records["array"].max()) + 1
    room = -(-(int(records["address"].max()) + 1) // sector) * sector  # bytes of the largest array, in whole sectors
    place = records["array"] * np.int64(room) + records["address"]
    # A number per access that grows with request, array, address and size: sorting brings equal ones together.
    accesses = np.sort(_packed(request_ids(records), place, records["size"], spans=(arrays * room, _SIZES)))
    asked = accesses[np.diff(accesses, prepend=-1) != 0] % _SIZES
    # Every access is aligned to its size, 16 bytes at most, so it lies in one sector.
    sectors = _different(accesses // (sector * _SIZES))
    requests = _different(accesses // (arrays * room * _SIZES))
    return Counts(len(records), requests, sectors, int(asked.sum()), _unique_bytes(records), sector)


_SIZES = 32  # more than any access has bytes


def _different(ascending: np.ndarray) -> int:
    return 1 + int(np.count_nonzero(np.diff(ascending)))


def _unique_bytes(records: np.ndarray) -> int:
    total = 0
    for array in np.unique(records["array"]):
        own = records[records["array"] == array]
        touched = np.zeros(own["address"].max() + 16, bool)
        for size in np.unique(own["size"]):
            begin = own["address"][own["size"] == size]
            for byte in range(size):
                touched[begin + byte] = True
        total += int(touched.sum())
    return total


def _packed(first: np.ndarray, *others: np.ndarray, spans: tuple[int, ...] | None = None) -> np.ndarray:
    """One number for each row of columns of whole numbers, in the order of the columns; `spans`: of the others."""
    packed = first.astype(np.int64)
    for column, span in zip(others, spans or [int(column.max()) + 1 for column in others], strict=True):
        if (int(packed.max()) + 1) * span >= 1 << 63:
            packed = np.unique(packed, return_inverse=True)[1]
        packed = packed * span + column
    return packed
