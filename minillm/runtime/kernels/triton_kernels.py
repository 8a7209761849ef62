"""Paged attention in Triton: the GPU's fast kernels, which the CPU can run too, in Triton's interpreter.

The pool of one layer is [num_blocks, block_size, Hkv, D], so the D numbers of a token's key in one head are neighbours
in memory: one row, the unit of all addresses below. Token t of a request lies at

    row(t) = (table[t // block_size] * block_size + t % block_size) * Hkv + head

A kernel is written for one *program*; a grid of them runs at once, each on one of the GPU's multiprocessors. Numbers of
rows of D loaded, for a request of n tokens in the cache, q of them new, Hq query heads and group = Hq / Hkv:

    store_kv   2 * q * Hkv                         and as many stored
    decode     2 * n * Hkv  (+ Hq queries)         every key and value once: a program serves all heads of a group
                                                   (one program a query head would load 2 * n * Hq: group times as many)
    combine    num_splits * Hq                     in float32; only splits that had something to look at
    prefill    2 * n * Hkv * ceil(q / TILE_QUERIES)   at most: a tile of queries shares what it loads, and stops at its
                                                   diagonal (one program a query would load 2 * n * Hq * q)

A table entry is one number more a key and tile. What is masked is not loaded, and a row that sees nothing is zeros:
NaN in blocks, block ends or table entries that are not a request's own never reach its output.

Taken: see DTYPES, HEAD_SIZES, BLOCK_SIZES and MAX_GROUP; anything else is a `KernelError` before a kernel starts.
Without a GPU set TRITON_INTERPRET=1 before Triton is first imported. The sizes of tiles are reasoned, not yet measured.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.errors import KernelError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # bfloat16 on a GPU only: the interpreter multiplies it wrongly
HEAD_SIZES = (16, 32, 64, 128)  # powers of two, because a tile's sides are; 16 is the least a tensor core multiplies
BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_GROUP = 16  # query heads that share a key head

TILE_ROWS = 64  # of a prefill tile: queries x heads of a group
DECODE_ROWS = 16  # of a decode tile: the heads of a group; what is over multiplies zeros, since a tensor core needs 16
TILE_KEYS = 64  # keys looked at together, from 64 / block_size blocks or from a part of one
MAX_SPLITS = 32
CPU_PROCESSORS = 8  # as if the interpreter had as many: enough to have splits to test


# --- what callers see ---


def store_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Write [T, Hkv, D] new keys and values into the pool of a layer, [N, block_size, Hkv, D], at [T] slots.

    A slot is block * block_size + offset; a token whose slot is negative is padding and is not written. That slots (and
    block tables) stay inside the pool is the caller's to know: looking would mean waiting for the GPU.
    Raises KernelError for what this kernel does not take.
    """
    _check_pool(keys, values)
    _check_rows("k", k, keys)
    _check_rows("v", v, keys)
    _check_integers("slots", slots, (len(k),), keys)
    if k.shape != v.shape or k.shape[1] != keys.shape[2]:
        raise KernelError(
            f"k {list(k.shape)} and v {list(v.shape)} do not fit a pool of {keys.shape[2]} heads; pass [T, Hkv, D] each"
        )
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
    out: Tensor | None = None,
) -> Tensor:
    """One new token each of B requests, [B, Hq, D] queries, looks through [B, W] block tables -> [B, Hq, D].

    `lengths` [B]: keys each request has, the new token's included; 0 (padding) gives zeros. `window`: only the last so
    many are seen. `num_splits` programs share the keys of a request and a key head; without one it follows from shapes
    alone, never from `lengths`, so that a captured CUDA graph holds for all lengths. `out` is written if given.
    Raises KernelError for what this kernel does not take.
    """
    group = _check_attention(q, keys, values, tables, window)
    _check_integers("lengths", lengths, (len(q),), keys)
    _check_integers("tables", tables, (len(q), tables.shape[-1]), keys)
    out = _output(q, out)
    num_requests, num_heads, head_size = q.shape
    block_size, num_kv_heads = keys.shape[1:3]
    splits = num_splits or splits_for(num_requests * num_kv_heads, tables.shape[1] * block_size, _processors(q))
    if not 1 <= splits <= MAX_SPLITS:
        raise KernelError(f"num_splits {num_splits}: pass 1 to {MAX_SPLITS}, or None to let the shapes decide")
    if num_requests == 0:
        return out
    parts, logs = out, out  # a single split writes the result itself and no logarithm
    if splits > 1:
        parts = torch.empty(num_requests, num_heads, splits, head_size, dtype=torch.float32, device=q.device)
        logs = torch.empty(num_requests, num_heads, splits, dtype=torch.float32, device=q.device)
    _decode_kernel[(num_requests, num_kv_heads, splits)](
        q, keys, values, tables, lengths, parts, logs, q.stride(0), tables.stride(0), _scale(head_size),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, D=head_size, BLOCK_SIZE=block_size, WINDOW=window or 0,
        NUM_SPLITS=splits, ROWS=DECODE_ROWS, KEYS=TILE_KEYS, PRECISION=_precision(q), num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(num_requests * num_heads,)](
            parts, logs, out, D=head_size, NUM_SPLITS=splits, SPLITS=triton.next_power_of_2(splits), num_warps=1
        )
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
    out: Tensor | None = None,
) -> Tensor:
    """New tokens of B requests, one after the other in [T, Hq, D], look through [B, W] block tables -> [T, Hq, D].

    Request b has rows query_starts[b] .. query_starts[b + 1] - 1 of q (`query_starts` [B + 1], often cu_seqlens) and
    they are the last of its lengths[b] tokens: what is before them is the cached prefix. `max_queries`: no request has
    more. Each query sees itself and what is before it, `window` keys at most. Rows that see nothing are zeros; give
    padding rows to a last request of length 0, because rows of no request are not written. `out` is written if given.
    Raises KernelError for what this kernel does not take.
    """
    group = _check_attention(q, keys, values, tables, window)
    num_requests = len(tables)
    _check_integers("tables", tables, (num_requests, tables.shape[-1]), keys)
    _check_integers("query_starts", query_starts, (num_requests + 1,), keys)
    _check_integers("lengths", lengths, (num_requests,), keys)
    if max_queries < 0:
        raise KernelError(f"max_queries {max_queries}: pass the most new tokens a request has, 0 or more")
    out = _output(q, out)
    block_size, num_kv_heads, head_size = keys.shape[1:]
    rows, tile_keys = _prefill_tile(q)
    num_tiles = triton.cdiv(max_queries, rows // group)
    if num_tiles and num_requests:
        _prefill_kernel[(num_tiles, num_kv_heads, num_requests)](
            q, keys, values, tables, query_starts, lengths, out, q.stride(0), tables.stride(0), _scale(head_size),
            NUM_KV_HEADS=num_kv_heads, GROUP=group, D=head_size, BLOCK_SIZE=block_size, WINDOW=window or 0,
            ROWS=rows, KEYS=tile_keys, PRECISION=_precision(q), num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def splits_for(num_programs: int, max_keys: int, processors: int) -> int:
    """Into how many parts to split each request's keys, so that two programs a processor have work.

    `num_programs` there would be without splitting; a split is not worth less than a tile of keys. Powers of two, so
    that few versions of the kernel are compiled.
    """
    wanted = min(2 * processors // max(1, num_programs), max_keys // TILE_KEYS, MAX_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


# --- kernels ---


@triton.jit
def _store_kernel(keys, values, slots, k, v, k_stride, v_stride, row_size, COLUMNS: tl.constexpr):
    """One token a program: its Hkv * D numbers lie together in k, in v and in the pool, so neighbours are read and
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
    """Online softmax: take in [ROWS, KEYS] scores (of base 2) and [KEYS, D] values.

    `best` is the largest score so far, `total` the sum of 2^(score - best) and `acc` that of the values so weighted.
    When a larger score comes, what is summed already counts for less: 2^(old best - new best) of it.
    """
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    base = tl.where(new_best == float("-inf"), 0.0, new_best)  # nothing seen yet: -inf - -inf would be NaN
    weights = tl.exp2(scores - base[:, None])
    rescale = tl.exp2(best - base)
    total = total * rescale + tl.sum(weights, axis=1)
    acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return new_best, total, acc


@triton.jit
def _decode_kernel(
    q, keys, values, tables, lengths, parts, logs, q_stride, table_stride, scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    NUM_SPLITS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One request, one key head and one split of its keys a program; its rows are the GROUP query heads that share
    the key head, so each key comes from memory once for all of them.
    """
    request = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, D)
    head = kv_head * GROUP + row
    real = row < GROUP

    # Tiles that hold a key to be seen, shared out evenly: split s takes tiles first + s * share, ...
    length = tl.load(lengths + request).to(tl.int32)
    start = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    first_tile = start // KEYS
    end_tile = tl.cdiv(length, KEYS)
    share = tl.cdiv(end_tile - first_tile, NUM_SPLITS)
    own_first = first_tile + split * share
    own_end = tl.minimum(own_first + share, end_tile)

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
    part = (request * NUM_KV_HEADS * GROUP + head) * NUM_SPLITS + split
    if NUM_SPLITS > 1:
        # A split without keys says so by -inf, and stores nothing that combine would read.
        tl.store(logs + part, tl.where(total == 0.0, float("-inf"), best + tl.log2(divisor)), mask=real)
        real = real & (own_first < own_end)
    tl.store(parts + part[:, None] * D + column[None, :], acc.to(parts.dtype.element_ty), mask=real[:, None])


@triton.jit
def _combine_kernel(parts, logs, out, D: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLITS: tl.constexpr):
    """One query head of one request a program: its NUM_SPLITS parts, neighbours in memory, each weighted by the share
    2^log of all exponentials that it has summed.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, D)
    log = tl.load(logs + row * NUM_SPLITS + split, mask=split < NUM_SPLITS, other=float("-inf"))
    used = log != float("-inf")  # true of NaN, which must come out
    best = tl.max(log, axis=0)
    weight = tl.where(used, tl.exp2(log - tl.where(best == float("-inf"), 0.0, best)), 0.0)
    part = tl.load(
        parts + (row * NUM_SPLITS + split[:, None]) * D + column[None, :], mask=used[:, None], other=0.0
    )  # [SPLITS, D]
    total = tl.sum(weight, axis=0)
    mean = tl.sum(part * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * D + column, mean.to(out.dtype.element_ty))


@triton.jit
def _prefill_kernel(
    q, keys, values, tables, query_starts, lengths, out, q_stride, table_stride, scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of neighbouring queries of one request and one key head a program: row r is query r // GROUP of the tile
    in head r % GROUP of the group, so all rows look at the same keys.
    """
    TILE_QUERIES: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    first_row = tl.load(query_starts + request).to(tl.int64)
    num_queries = (tl.load(query_starts + request + 1) - first_row).to(tl.int32)
    length = tl.load(lengths + request).to(tl.int32)
    first_query = tl.program_id(0) * TILE_QUERIES
    if first_query >= num_queries:
        return  # the grid is as long as the longest request

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
    # A window has two edges: then no tile is taken for whole.
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
        # 0 * NaN is NaN: a value that is not finite goes into the scores of those who see it, not into the product.
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


# True where the kernels run on the CPU, in Triton's interpreter. What was decorated says so for certain.
INTERPRETED = not isinstance(_store_kernel, triton.runtime.JITFunction)


# --- what is taken ---


def _check_attention(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, window: int | None) -> int:
    """Query heads that share a key head."""
    _check_pool(keys, values)
    _check_rows("q", q, keys)
    num_heads, num_kv_heads = q.shape[1], keys.shape[2]
    if num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
        raise KernelError(
            f"{num_heads} query heads over {num_kv_heads} key heads: the Triton kernels take 1 to {MAX_GROUP} whole "
            "query heads a key head; use kernels/reference.py"
        )
    if tables.ndim != 2:
        raise KernelError(f"tables of shape {list(tables.shape)}: pass [B, W]")
    if window is not None and window < 1:
        raise KernelError(f"window {window}: pass 1 key or more, or None for all")
    return num_heads // num_kv_heads


def _check_pool(keys: Tensor, values: Tensor) -> None:
    if keys.ndim != 4 or keys.shape != values.shape or not (keys.is_contiguous() and values.is_contiguous()):
        raise KernelError(
            f"pools of keys {list(keys.shape)} and values {list(values.shape)}: pass one layer each, contiguous, "
            "[num_blocks, block_size, Hkv, D]"
        )
    _check_device(keys)
    block_size, head_size = keys.shape[1], keys.shape[3]
    if block_size not in BLOCK_SIZES:
        raise KernelError(f"block_size {block_size}: the Triton kernels take {_listed(BLOCK_SIZES)}")
    if head_size not in HEAD_SIZES:
        raise KernelError(f"head size {head_size}: the Triton kernels take {_listed(HEAD_SIZES)}")
    if keys.dtype != values.dtype or keys.dtype not in DTYPES:
        raise KernelError(f"keys {keys.dtype}, values {values.dtype}: the Triton kernels take one of {_listed(DTYPES)}")


def _check_device(keys: Tensor) -> None:
    if INTERPRETED and keys.device.type != "cpu":
        raise KernelError(f"{keys.device}: Triton's interpreter is on; unset TRITON_INTERPRET to compile for the GPU")
    if not INTERPRETED and keys.device.type != "cuda":
        raise KernelError(
            f"{keys.device}: Triton compiles for CUDA devices; set TRITON_INTERPRET=1 before Python starts to run its "
            "kernels on the CPU, or use kernels/reference.py"
        )
    if INTERPRETED and keys.dtype == torch.bfloat16:
        raise KernelError("torch.bfloat16: Triton's interpreter multiplies it wrongly; use float32 or float16")


def _check_rows(name: str, x: Tensor, keys: Tensor) -> None:
    """[T, H, D] of the pool's dtype and device; tokens may lie apart (a slice of fused QKV), heads may not."""
    head_size = keys.shape[3]
    together = x.ndim == 3 and x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == head_size)
    if not together or x.shape[2] != head_size:
        raise KernelError(
            f"{name} of shape {list(x.shape)}, strides {list(x.stride())}: pass [T, heads, {head_size}] whose heads "
            "are neighbours in memory"
        )
    if x.dtype != keys.dtype or x.device != keys.device:
        raise KernelError(
            f"{name} is {x.dtype} on {x.device}, the pool {keys.dtype} on {keys.device}; they must be the same"
        )


def _check_integers(name: str, x: Tensor, shape: tuple[int, ...], keys: Tensor) -> None:
    if x.shape != shape or x.dtype not in (torch.int32, torch.int64) or x.device != keys.device or _is_strided(x):
        raise KernelError(
            f"{name}: {x.dtype} of shape {list(x.shape)}, strides {list(x.stride())}, on {x.device}; pass int32 or "
            f"int64 of shape {list(shape)}, stride 1, on {keys.device}"
        )


def _is_strided(x: Tensor) -> bool:
    return x.shape[-1] > 1 and x.stride(-1) != 1


def _output(q: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.shape != q.shape or out.dtype != q.dtype or out.device != q.device or not out.is_contiguous():
        raise KernelError(
            f"out: {out.dtype} of shape {list(out.shape)} on {out.device}; pass a contiguous {q.dtype} of shape "
            f"{list(q.shape)} on {q.device}"
        )
    return out


def _listed(values: tuple) -> str:
    return ", ".join(map(str, values))


# --- launch parameters ---


def _scale(head_size: int) -> float:
    """1 / sqrt(D), and log2(e) because 2^x is what a GPU computes fastest."""
    return math.log2(math.e) / math.sqrt(head_size)


def _precision(q: Tensor) -> str:
    """float32 is multiplied as such: TF32 would drop 13 of its 23 bits."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def _prefill_tile(q: Tensor) -> tuple[int, int]:
    """Rows and keys. float32 is multiplied without tensor cores; a tile of whole sides would not fit the registers."""
    return (TILE_ROWS // 2, TILE_KEYS // 2) if q.dtype == torch.float32 else (TILE_ROWS, TILE_KEYS)


def _processors(q: Tensor) -> int:
    if q.device.type == "cpu":
        return CPU_PROCESSORS
    return torch.cuda.get_device_properties(q.device).multi_processor_count
