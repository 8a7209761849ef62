"""What the decode kernel for a CPU loads: the same source, compiled for a number that notes each of its loads.

    out, traffic = counting.decode(q, keys, values, tables, lengths, version=1)

A CPU loads cache lines of 64 bytes and keeps those that it used last, so a load costs something only if its line is not
among them. This counts the lines that come into the first cache, as if all its `cache_bytes` held queries, keys and
values, and the oldest line went first. Its other contents, such as scores and block tables, are left out.
"""

import ctypes
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from minillm.kernels.building import build
from minillm.kernels.checks import Limits, check_decode, output_for
from minillm.kernels.cpu import FOLDER
from minillm.kernels.cuda.traffic import RECORD, Traffic

LINE = 64  # bytes
FIRST_CACHE = 32 << 10  # bytes, of most processors at least
LIMITS = Limits(
    kernels="the C++ kernels with their loads counted",
    instead="use float32 on a CPU",
    devices=("cpu",),
    dtypes=(torch.float32,),
    head_sizes=range(2, 513, 2),
)
OPTIONS = ("-std=c++17", "-O1", "-w", "-fPIC", "-shared")
COUNTED = """
#include <stdint.h>
#include <stdlib.h>
static uintptr_t* noted;
static int64_t count, room;
extern "C" uintptr_t* loads() { return noted; }
extern "C" int64_t num_loads() { return count; }
extern "C" void forget() { count = 0; }
struct Counted {
    float number;
    Counted() = default;
    Counted(float x) : number(x) {}
    operator float() const {
        if (count == room) noted = (uintptr_t*)realloc(noted, (room = room ? 2 * room : 1 << 16) * sizeof *noted);
        noted[count++] = (uintptr_t)this;
        return number;
    }
};
#define SCALAR Counted
"""


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    window: int | None = None,
    *,
    version: int = 2,
    cache_bytes: int = FIRST_CACHE,
) -> tuple[Tensor, Traffic]:
    """As `cpu.decode`, in float32 -> its result and what it loaded of "q", "keys" and "values".

    In the counts a request is a line that came into the cache, and a sector is that line.
    """
    check_decode(q, keys, values, tables, lengths, window, LIMITS)
    _, block_size, heads, head_size = keys.shape
    num_rows, num_heads, _ = q.shape
    out, tables, lengths = output_for(q, None), tables.int(), lengths.int()
    shape = f"#define HEAD_SIZE {head_size}\n#define GROUP {num_heads // heads}\n"
    files = "\n".join((FOLDER / name).read_text() for name in ("numbers.h", "paged_attention.cpp"))
    library = build(COUNTED + shape + files, OPTIONS)
    library.loads.restype, library.num_loads.restype = ctypes.c_void_p, ctypes.c_int64
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.forget()
    library.decode(
        pointer(q.data_ptr()), whole(q.stride(0)), pointer(keys.data_ptr()), pointer(values.data_ptr()),
        pointer(tables.data_ptr()), whole(tables.stride(0)), pointer(lengths.data_ptr()), pointer(out.data_ptr()),
        whole(num_rows), whole(heads), whole(block_size), whole(window or 0), version, 1,
    )  # fmt: skip
    places = np.empty(library.num_loads(), np.int64)
    if len(places):
        ctypes.memmove(places.ctypes.data, library.loads(), places.nbytes)
    records = np.zeros(len(places), RECORD)
    records["size"], records["occurrence"] = q.element_size(), fetches(places // LINE, cache_bytes // LINE)
    arrays = {"q": q, "keys": keys, "values": values}
    for number, array in enumerate(arrays.values()):
        begin, last = array.data_ptr(), array[(-1,) * array.dim()].data_ptr() if array.numel() else 0
        own = (begin <= places) & (places <= last)
        records["array"][own], records["address"][own] = number, places[own] - begin // LINE * LINE
    return out, Traffic(tuple(arrays), records, sector=LINE)


def fetches(lines: np.ndarray, room: int) -> np.ndarray:
    """For each load, the number of the fetch that brought its line, if the `room` lines used last stay."""
    kept: OrderedDict[int, int] = OrderedDict()  # line -> its fetch, the last one used at the end
    begins = np.flatnonzero(np.diff(lines, prepend=-1))  # loads of a line in a row are one use
    found, num_fetches = [], 0
    for line in lines[begins].tolist():
        if line not in kept:
            kept[line] = num_fetches
            num_fetches += 1
            if len(kept) > max(1, room):
                kept.popitem(last=False)
        kept.move_to_end(line)
        found.append(kept[line])
    return np.repeat(np.array(found, np.int64), np.diff(begins, append=len(lines)))
