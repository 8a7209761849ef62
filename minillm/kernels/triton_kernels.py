"""Paged attention in Triton: the fast kernels for a GPU, which Triton's interpreter can run on a CPU.

The pool of one layer is [num_blocks, block_size, Hkv, D], so the D numbers of a token's key in one head are neighbours
in memory: one row, the unit of all addresses below. Token t of a request lies at

    row(t) = (table[t // block_size] * block_size + t % block_size) * Hkv + head

A kernel is written for one *program*; a grid of them runs at once, each on one of the GPU's multiprocessors. Numbers of
rows of D loaded, for a request of n tokens in the cache, q of them new, Hq query heads and group = Hq / Hkv:

    store_kv   2 * q * Hkv                         and as many stored
    decode     2 * n * Hkv  (+ Hq queries)         every key and value once: a program serves all heads of a group
                                                   (one program per query head: 2 * n * Hq, group times as many)
    combine    splits * Hq                         in float32; nothing for a request whose keys were not split
    prefill    2 * n * Hkv * ceil(q / TILE_QUERIES)   at most: a tile of queries shares what it loads, and stops at its
                                                   diagonal (one program per query would load 2 * n * Hq * q)

A table entry is one more number per key and tile. What is masked is not loaded, and a row that sees nothing is zeros:
NaN in blocks, block ends or table entries that are not a request's own never reach its output.

Taken: see LIMITS; anything else is a `KernelError` before a kernel starts. Without a GPU set TRITON_INTERPRET=1 before
Triton is first imported. The sizes of tiles are reasoned, not yet measured.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.errors import KernelError
from minillm.kernels.checks import Limits, check_decode, check_prefill, check_store, output_for

HEAD_SIZES = (16, 32, 64, 128)  # powers of two, because a tile's sides are; 16 is the least a tensor core multiplies
BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_GROUP = 16  # query heads that share a key head

LEAST_SIDE = 16  # of a tile that a tensor core multiplies
TILE_ROWS = 64  # of a prefill tile: queries x heads of a group
DECODE_ROWS = 16  # of a decode tile: the heads of a group; the rest multiplies zeros, since a tensor core needs 16
TILE_KEYS = 64  # keys computed together, from 64 / block_size blocks or from a part of one


class Splits(NamedTuple):
    """How the keys of each request are split. It depends only on shapes, so that a captured CUDA graph holds for all
    lengths.
    """

    most: int  # that a request can have; 1: nothing is split
    wanted: int  # this many equal ones, so that all processors have work
    tiles: int  # none is longer: then there are more splits


class Launch(NamedTuple):
    """How an attention kernel is compiled; it changes the speed, not the result."""

    rows: int  # of a tile: queries x heads of a group; at least 16, and at least the group
    keys: int  # of a tile
    num_warps: int  # that share a program's work, 32 threads each
    num_stages: int  # tiles in flight at once: the next ones load while one is computed


# Compiled for an H200 (Triton 3.6, bfloat16, D = 128) this takes 96 registers per thread and 39 KiB of shared memory,
# with the 32 KiB of each program's next tile in flight. One of three stages goes to looking up the table, so 4 give
# the same code as 3, and 5 load two tiles ahead. Where keys are split it would take 168 registers. With fewer it spills
# 24 bytes per thread, and the intended number of programs runs at once.
DECODE_LAUNCH = Launch(DECODE_ROWS, TILE_KEYS, num_warps=4, num_stages=3)
PROGRAMS_A_PROCESSOR = 4  # at once
REGISTERS = 128  # per thread at most
SPLIT_KEYS = 1024  # of a request that one program reads, tile by tile; longer ones are split
MAX_SPLITS = 128
COMBINED = 16  # splits that are combined at once
LEAST_REQUESTS = 32  # searched at once, though there are fewer: 32 threads do it
CPU_PROCESSORS = 8  # pretended for the interpreter: enough to have splits to test


# --- what callers see ---


def store_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Write [T, Hkv, D] new keys and values into the pool of a layer, [N, block_size, Hkv, D], at [T] slots.

    A slot is block * block_size + offset; a token whose slot is negative is padding and is not written. The caller must
    keep slots and block tables inside the pool: checking here would mean waiting for the GPU.
    Raises KernelError for what this kernel does not take.
    """
    check_store(keys, values, slots, k, v, LIMITS)
    row_size = keys.shape[2] * keys.shape[3]
    if len(k):
        _store_kernel[(len(k),)](
            keys, values, slots, k, v, k.stride(0), v.stride(0), row_size, COLUMNS=triton.next_power_of_2(row_size)
        )  # fmt: skip


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    window: int | None = None,
    *,
    num_splits: int | None = None,
    launch: Launch = DECODE_LAUNCH,
    out: Tensor | None = None,
) -> Tensor:
    """B requests with one new token each, [B, Hq, D] queries, read through [B, W] block tables -> [B, Hq, D].

    `lengths` [B]: keys each request has, the new token's included; 0 (padding) gives zeros. Only the last `window` are
    seen. `num_splits` programs share the keys of a request and a key head, as equally as tiles allow; the default is
    that of `splits_for`. The grid never depends on `lengths`. `launch` changes only the speed. `out` is written if
    given. Raises KernelError for what this kernel does not take.
    """
    group = check_decode(q, keys, values, tables, lengths, window, LIMITS)
    _check_launch(launch, group)
    if num_splits is not None and not 1 <= num_splits <= MAX_SPLITS:
        raise KernelError(f"num_splits {num_splits}: pass 1 to {MAX_SPLITS}, or None to let the shapes decide")
    out = output_for(q, out)
    num_requests, num_heads, head_size = q.shape
    block_size, num_kv_heads = keys.shape[1:3]
    if num_requests == 0:
        return out
    max_keys = tables.shape[1] * block_size
    max_tiles = triton.cdiv(min(max_keys, window + launch.keys) if window else max_keys, launch.keys)
    if num_splits is None:
        splits = splits_for(num_requests * num_kv_heads, max_tiles, processors(q.device), launch.keys)
    else:
        splits = Splits(num_splits, num_splits, max_tiles)
    parts, logs, num_sharing, requests = out, out, 0, 0  # without splits, results are written directly
    if splits.most > 1:
        parts = torch.empty(num_requests, num_heads, splits.most, head_size, dtype=torch.float32, device=q.device)
        logs = torch.empty(num_requests, num_heads, splits.most, dtype=torch.float32, device=q.device)
        enough = triton.cdiv(PROGRAMS_A_PROCESSOR * processors(q.device), num_kv_heads)
        num_sharing = min(num_requests * (splits.most - 1), enough)
        requests = max(LEAST_REQUESTS, triton.next_power_of_2(num_requests))
    _decode_kernel[(num_kv_heads, num_sharing + num_requests)](
        q, keys, values, tables, lengths, out, parts, logs, q.stride(0), tables.stride(0), _scale(head_size),
        num_requests, *splits,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, D=head_size, BLOCK_SIZE=block_size, WINDOW=window or 0,
        REQUESTS=requests, ROWS=launch.rows, KEYS=launch.keys, PRECISION=_precision(q),
        num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=REGISTERS if requests else None,
    )  # fmt: skip
    if splits.most > 1:
        _combine_kernel[(num_requests * num_heads,)](
            parts, logs, lengths, out, *splits,
            NUM_HEADS=num_heads, D=head_size, WINDOW=window or 0, KEYS=launch.keys, SPLITS=COMBINED, num_warps=1,
        )  # fmt: skip
    return out


def prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    max_queries: int,
    window: int | None = None,
    *,
    launch: Launch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """New tokens of B requests, one after the other in [T, Hq, D], read through [B, W] block tables -> [T, Hq, D].

    Request b has rows query_starts[b] .. query_starts[b + 1] - 1 of q (`query_starts` [B + 1], often cu_seqlens) and
    they are the last of its lengths[b] tokens: what is before them is the cached prefix. `max_queries`: no request has
    more. Each query sees itself and what is before it, `window` keys at most. Rows that see nothing are zeros; give
    padding rows to a last request of length 0, because rows of no request are not written. `out` is written if given.
    Raises KernelError for what this kernel does not take.
    """
    group = check_prefill(q, keys, values, tables, query_starts, lengths, max_queries, window, LIMITS)
    launch = launch or prefill_launch(q.dtype)
    _check_launch(launch, group)
    out = output_for(q, out)
    block_size, num_kv_heads, head_size = keys.shape[1:]
    num_tiles, num_requests = triton.cdiv(max_queries, launch.rows // group), len(tables)
    if num_tiles and num_requests:
        _prefill_kernel[(num_tiles, num_kv_heads, num_requests)](
            q, keys, values, tables, query_starts, lengths, out, q.stride(0), tables.stride(0), _scale(head_size),
            NUM_KV_HEADS=num_kv_heads, GROUP=group, D=head_size, BLOCK_SIZE=block_size, WINDOW=window or 0,
            ROWS=launch.rows, KEYS=launch.keys, PRECISION=_precision(q),
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return out


def splits_for(num_programs: int, max_tiles: int, processors: int, tile_keys: int = TILE_KEYS) -> Splits:
    """How to split the keys of requests with up to `max_tiles` tiles each.

    `num_programs` there would be without splitting. If these are too few for all processors, each request is split so
    that there are enough. No split is longer than SPLIT_KEYS: otherwise one long request would delay many short ones.
    Two splits are not worth combining if one program could read as much.
    """
    wanted = max(1, min(PROGRAMS_A_PROCESSOR * processors // num_programs, max_tiles, MAX_SPLITS))
    tiles = max(1, SPLIT_KEYS // tile_keys, triton.cdiv(max_tiles, MAX_SPLITS))
    most = max(wanted, triton.cdiv(max_tiles, tiles))
    return Splits(1, 1, max_tiles) if wanted == 1 and most <= 2 else Splits(most, wanted, tiles)


# --- kernels ---
#
# Triton recompiles a kernel for numbers that are 1 or multiples of 16, and addresses that are multiples of 16. For
# arguments that differ from step to step, such as block tables, that is switched off: no later step waits to compile.


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _store_kernel(keys, values, slots, k, v, k_stride, v_stride, row_size, COLUMNS: tl.constexpr):
    """One token per program: its Hkv * D numbers lie together in k, in v and in the pool, so neighbours are read and
    written together.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    slot = tl.load(slots + token).to(tl.int64)  # 64 bits: a pool has more than 2^31 numbers
    stored = (column < row_size) & (slot >= 0)
    new_k = tl.load(k + token * k_stride + column, mask=stored)
    new_v = tl.load(v + token * v_stride + column, mask=stored)
    tl.store(keys + slot * row_size + column, new_k, mask=stored)
    tl.store(values + slot * row_size + column, new_v, mask=stored)


@triton.jit
def _row_offsets(table, position, present, head, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr):
    """Where the rows of [KEYS] positions begin in the pool. Only what is present is looked up: the rest of the table
    may hold anything.
    """
    block = tl.load(table + position // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
    slot = block * BLOCK_SIZE + position % BLOCK_SIZE
    return (slot * NUM_KV_HEADS + head) * D


@triton.jit
def _softmax_step(scores, v, best, total, acc, PRECISION: tl.constexpr):
    """Online softmax: add [ROWS, KEYS] scores (of base 2) and [KEYS, D] values.

    `best` is the largest score so far, `total` the sum of 2^(score - best) and `acc` that of the values so weighted.
    When a larger score comes, the sums so far are scaled by 2^(old best - new best).
    """
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    base = tl.where(new_best == float("-inf"), 0.0, new_best)  # nothing seen yet: -inf - -inf would be NaN
    weights = tl.exp2(scores - base[:, None])
    rescale = tl.exp2(best - base)
    total = total * rescale + tl.sum(weights, axis=1)
    acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return new_best, total, acc


@triton.jit(
    do_not_specialize=["table_stride", "num_requests", "most_splits", "wanted_splits", "split_tiles"],
    do_not_specialize_on_alignment=["tables", "lengths"],
)
def _decode_kernel(
    q, keys, values, tables, lengths, out, parts, logs, q_stride, table_stride, scale,
    num_requests, most_splits, wanted_splits, split_tiles,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    REQUESTS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One key head of one split of a request's keys per program. The last programs of the grid take the first split of
    each request. Those before them share all other splits, however many the lengths make: the work of long requests
    begins first, and short ones have no idle programs. REQUESTS, a power of two, is how many are searched at once for
    those splits; 0 if there are none.
    """
    kv_head = tl.program_id(0)
    place = tl.program_id(1)
    begin, end, step = 0, 1, 1
    num_sharing = 0
    if REQUESTS:
        num_sharing = tl.num_programs(1) - num_requests
        every = tl.arange(0, REQUESTS)
        looked_at = (every < num_requests) & (place < num_sharing)
        length = tl.load(lengths + every, mask=looked_at, other=0).to(tl.int32)
        further = tl.maximum(_splits(length, wanted_splits, split_tiles, WINDOW, KEYS)[3] - 1, 0)
        ends = tl.cumsum(further, axis=0)  # request r has the splits numbered ends[r - 1] .. ends[r] - 1
        if place < num_sharing:
            begin, end, step = place, tl.sum(further, axis=0), num_sharing
    for number in range(begin, end, step):
        request = place - num_sharing
        split = 0
        if REQUESTS:
            before = ends <= number
            if place < num_sharing:
                request = tl.sum(before.to(tl.int32), axis=0)
                split = 1 + number - tl.max(tl.where(before, ends, 0), axis=0)
        _decode_split(
            request, kv_head, split, q, keys, values, tables, lengths, out, parts, logs, q_stride, table_stride, scale,
            most_splits, wanted_splits, split_tiles, NUM_KV_HEADS, GROUP, D, BLOCK_SIZE, WINDOW, REQUESTS, ROWS, KEYS,
            PRECISION,
        )  # fmt: skip


@triton.jit
def _splits(length, wanted_splits, split_tiles, WINDOW: tl.constexpr, KEYS: tl.constexpr):
    """The first key to be seen and its tile, tiles per split, and splits: as many equal ones as wanted, or more if
    these would be longer than `split_tiles`.
    """
    start = tl.maximum(length - WINDOW, 0) if WINDOW else length * 0
    first_tile = start // KEYS
    num_tiles = tl.cdiv(length, KEYS) - first_tile
    share = tl.maximum(tl.minimum(tl.cdiv(num_tiles, wanted_splits), split_tiles), 1)
    return start, first_tile, share, tl.cdiv(num_tiles, share)


@triton.jit
def _decode_split(
    request, kv_head, split, q, keys, values, tables, lengths, out, parts, logs, q_stride, table_stride, scale,
    most_splits, wanted_splits, split_tiles,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    REQUESTS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows are the GROUP query heads that share the key head, so each key comes from memory once for all of them."""
    request = request.to(tl.int64)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, D)
    head = kv_head * GROUP + row
    real = row < GROUP

    length = tl.load(lengths + request).to(tl.int32)
    start, own_first, share, num_splits = _splits(length, wanted_splits, split_tiles, WINDOW, KEYS)
    own_end = tl.cdiv(length, KEYS)
    if REQUESTS:
        own_first += split * share
        own_end = tl.minimum(own_first + share, own_end)

    q_tile = tl.load(q + request * q_stride + head[:, None] * D + column[None, :], mask=real[:, None], other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    table = tables + request * table_stride
    for tile in range(own_first, own_end):
        position = tile * KEYS + tl.arange(0, KEYS)
        seen = (position >= start) & (position < length)
        offset = _row_offsets(table, position, seen, kv_head, NUM_KV_HEADS, BLOCK_SIZE, D)
        # [KEYS, D]: each row's D numbers are neighbours, rows lie where the table says. Not seen: not loaded, zeros.
        k = tl.load(keys + offset[:, None] + column[None, :], mask=seen[:, None], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        v = tl.load(values + offset[:, None] + column[None, :], mask=seen[:, None], other=0.0)
        best, total, acc = _softmax_step(scores, v, best, total, acc, PRECISION)

    divisor = tl.where(total == 0.0, 1.0, total)  # nothing seen: 0 / 1, not 0 / 0
    acc = acc / divisor[:, None]
    own = request * NUM_KV_HEADS * GROUP + head
    whole = real
    if REQUESTS:  # one split of several is for the combine kernel
        whole = real & (num_splits <= 1)
        part = own * most_splits + split
        tl.store(logs + part, best + tl.log2(divisor), mask=real & (num_splits > 1))
        tl.store(parts + part[:, None] * D + column[None, :], acc, mask=(real & (num_splits > 1))[:, None])
    tl.store(out + own[:, None] * D + column[None, :], acc.to(out.dtype.element_ty), mask=whole[:, None])


@triton.jit(
    do_not_specialize=["most_splits", "wanted_splits", "split_tiles"], do_not_specialize_on_alignment=["lengths"]
)
def _combine_kernel(
    parts, logs, lengths, out, most_splits, wanted_splits, split_tiles,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One query head of one request per program: the parts of its splits, neighbours in memory, each weighted by 2^log,
    its share of all exponentials.
    """
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row // NUM_HEADS).to(tl.int32)
    num_splits = _splits(length, wanted_splits, split_tiles, WINDOW, KEYS)[3]
    if num_splits <= 1:
        return  # the split has written the result itself
    column = tl.arange(0, D)
    first = row * most_splits
    best = float("-inf")
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    for chunk in range(0, num_splits, SPLITS):
        split = chunk + tl.arange(0, SPLITS)
        used = split < num_splits
        log = tl.load(logs + first + split, mask=used, other=float("-inf"))
        part = tl.load(parts + (first + split[:, None]) * D + column[None, :], mask=used[:, None], other=0.0)
        new_best = tl.maximum(best, tl.max(log, axis=0))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)  # nothing but scores of -inf: -inf - -inf is NaN
        weight = tl.exp2(log - base)  # NaN for NaN, which must reach the output
        rescale = tl.exp2(best - base)
        total = total * rescale + tl.sum(weight, axis=0)
        acc = acc * rescale + tl.sum(part * weight[:, None], axis=0)
        best = new_best
    mean = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * D + column, mean.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["tables", "query_starts", "lengths"])
def _prefill_kernel(
    q, keys, values, tables, query_starts, lengths, out, q_stride, table_stride, scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of neighbouring queries of one request and one key head per program: row r is query r // GROUP of the tile
    in head r % GROUP of the group, so all rows read the same keys.
    """
    TILE_QUERIES: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    first_row = tl.load(query_starts + request).to(tl.int64)
    num_queries = (tl.load(query_starts + request + 1) - first_row).to(tl.int32)
    length = tl.load(lengths + request).to(tl.int32)
    tile_of_queries = tl.cdiv(num_queries, TILE_QUERIES) - 1 - tl.program_id(0)  # the last one has the most keys
    if tile_of_queries < 0:
        return  # the grid is as long as the longest request
    first_query = tile_of_queries * TILE_QUERIES

    row = tl.arange(0, ROWS)
    column = tl.arange(0, D)
    query = first_query + row // GROUP
    real = (row < TILE_QUERIES * GROUP) & (query < num_queries)
    position = length - num_queries + query  # in the request; negative where there is padding
    # [ROWS, D]: GROUP rows of D that are neighbours, then the next token's, q_stride on.
    q_offset = (first_row + query) * q_stride + (kv_head * GROUP + row % GROUP) * D
    q_tile = tl.load(q + q_offset[:, None] + column[None, :], mask=real[:, None], other=0.0)

    # Keys from `start` on, up to the last query's own. Before the first query's diagonal, all rows see all keys.
    first_position = length - num_queries + first_query
    last_position = tl.minimum(first_position + TILE_QUERIES, length) - 1
    start = tl.maximum(first_position - WINDOW + 1, 0) if WINDOW else 0
    first_tile = start // KEYS
    end_tile = tl.cdiv(tl.maximum(last_position + 1, 0), KEYS)
    # A window has two edges: then no tile counts as whole.
    edge_tile = first_tile if WINDOW else tl.maximum(first_position + 1, 0) // KEYS

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    table = tables + request * table_stride
    for tile in range(first_tile, edge_tile):
        key = tile * KEYS + tl.arange(0, KEYS)
        offset = _row_offsets(table, key, key < length, kv_head, NUM_KV_HEADS, BLOCK_SIZE, D)
        k = tl.load(keys + offset[:, None] + column[None, :])
        scores = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION) * scale
        v = tl.load(values + offset[:, None] + column[None, :])
        best, total, acc = _softmax_step(scores, v, best, total, acc, PRECISION)
    for tile in range(edge_tile, end_tile):
        key = tile * KEYS + tl.arange(0, KEYS)
        present = (key >= start) & (key <= last_position)  # seen by some row of the tile
        offset = _row_offsets(table, key, present, kv_head, NUM_KV_HEADS, BLOCK_SIZE, D)
        k = tl.load(keys + offset[:, None] + column[None, :], mask=present[:, None], other=0.0)
        v = tl.load(values + offset[:, None] + column[None, :], mask=present[:, None], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION) * scale
        # 0 * NaN is NaN: a value that is not finite goes into the scores of queries that see it, not into the product.
        finite = tl.abs(v) < float("inf")
        broken = tl.max(tl.where(finite, 0, 1), axis=1)
        scores = tl.where(broken[None, :] == 1, float("nan"), scores)
        seen = present[None, :] & (key[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        best, total, acc = _softmax_step(scores, tl.where(finite, v, 0.0), best, total, acc, PRECISION)

    divisor = tl.where(total == 0.0, 1.0, total)  # nothing seen: 0 / 1, not 0 / 0
    acc = acc / divisor[:, None]
    out_offset = ((first_row + query) * NUM_KV_HEADS * GROUP + kv_head * GROUP + row % GROUP) * D
    tl.store(out + out_offset[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=real[:, None])


# True where the kernels run on the CPU, in Triton's interpreter: the type of a decorated one is certain.
INTERPRETED = not isinstance(_store_kernel, triton.runtime.JITFunction)

LIMITS = Limits(
    kernels="the kernels in Triton's interpreter" if INTERPRETED else "the Triton kernels",
    instead="unset TRITON_INTERPRET to compile them for a GPU"
    if INTERPRETED
    else "use the reference, or on the CPU set TRITON_INTERPRET=1 before Python starts",
    devices=("cpu",) if INTERPRETED else ("cuda",),
    # The interpreter multiplies bfloat16 wrongly.
    dtypes=(torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16),
    head_sizes=HEAD_SIZES,
    block_sizes=BLOCK_SIZES,
    groups=range(1, MAX_GROUP + 1),
)


# --- whether they run at all ---


@triton.jit
def _probe_kernel(numbers):
    tl.store(numbers, 7)


def unusable(dtype: torch.dtype, head_size: int, group: int, device: torch.device) -> str | None:
    """Why no Triton kernel can be launched on this GPU, found by launching one; None if it can."""
    return None if INTERPRETED else _failure(device)


@functools.cache
def _failure(device: torch.device) -> str | None:
    """The same, once per process and device: what is missing now is missing later."""
    try:
        answer = _probe(device)
    except Exception as error:  # of the C compiler, of its linker, of the driver, of Triton
        first_line = f"{error}".strip().partition("\n")[0]
        return (
            f"a first small launch of Triton failed ({type(error).__name__}: {first_line}); it needs a C compiler, "
            "Python.h and libcuda.so: install gcc and python3-dev, or use attention_backend='cuda'"
        )
    return None if answer == 7 else f"a first small launch of Triton wrote {answer} instead of 7"


def _probe(device: torch.device) -> int:
    """The number written by a kernel that should write 7. Waits for the device."""
    numbers = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        _probe_kernel[(1,)](numbers)
    return numbers.item()


# --- launch parameters ---


def _check_launch(launch: Launch, group: int) -> None:
    if (
        launch.rows < max(LEAST_SIDE, group)
        or launch.keys < LEAST_SIDE
        or launch.num_warps < 1
        or launch.num_stages < 1
    ):
        raise KernelError(
            f"{launch}: rows must be at least {LEAST_SIDE} and the group, here {group}; keys at least {LEAST_SIDE}; "
            "num_warps and num_stages at least 1"
        )


def _scale(head_size: int) -> float:
    """log2(e) / sqrt(D), because 2^x is what a GPU computes fastest."""
    return math.log2(math.e) / math.sqrt(head_size)


def _precision(q: Tensor) -> str:
    """float32 is multiplied in full: TF32 would drop 13 of its 23 bits."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def prefill_launch(dtype: torch.dtype) -> Launch:
    """float32 is multiplied without tensor cores; a tile of whole sides would not fit the registers."""
    if dtype == torch.float32:
        return Launch(TILE_ROWS // 2, TILE_KEYS // 2, num_warps=4, num_stages=2)
    return Launch(TILE_ROWS, TILE_KEYS, num_warps=4, num_stages=2)


@functools.cache
def processors(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
