"""The kernels of a step in C++ for a CPU, built at first use for this processor and one shape of model.

`store_kv`, `decode`, `prefill` are those of all backends (see `reference`), `add_rms_norm`, `norm_rotate_store`,
`silu_mul` and `sample_rows` the small operations of `ops`; operations.cpp and paged_attention.cpp say what each reads
and writes. Where they can, they share torch's threads: one pool for products and kernels.
"""

import ctypes
import functools
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from minillm.errors import KernelError
from minillm.kernels.building import NATIVE, build, processor
from minillm.kernels.checks import (
    Limits,
    check_add_rms_norm,
    check_decode,
    check_norm_rotate_store,
    check_prefill,
    check_sample_rows,
    check_silu_mul,
    check_store,
    output_for,
)
from minillm.sampling import GREEDY_BELOW

__all__ = [
    "add_rms_norm",
    "decode",
    "norm_rotate_store",
    "prefill",
    "sample_rows",
    "silu_mul",
    "store_kv",
    "unusable",
    "without_threads",
]

SCALARS = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16"}
LIMITS = Limits(
    kernels="the C++ kernels for a CPU",
    instead="use attention_backend='reference'",
    devices=("cpu",),
    dtypes=tuple(SCALARS),
    head_sizes=range(2, 513, 2),
)
CAPTURABLE = False  # there is nothing to record: a launch is a call
FOLDER = Path(__file__).parent
# Sums may be reordered to fit vectors. Not -ffast-math: NaN must get through, and be found in the logits.
OPTIONS = (
    "-std=c++17", "-O3", *NATIVE, "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
    "-freciprocal-math", "-fPIC", "-shared",
)  # fmt: skip
THREADS = "-fopenmp"
OPERATIONS = {  # p: a tensor, i: a whole number of 64 bits, n: one of 32, f: a float32
    "add_rms_norm": "ppppfiin",
    "silu_mul": "ppiin",
    "sample_rows": "pppppiifn",
    "store_kv": "pppppiiii",
}
ATTENTION = {
    "norm_rotate_store": "pppfppppppiin",
    "decode": "pipppippiiiinn",
    "prefill": "pipppipppiiiiin",
}
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "n": ctypes.c_int, "f": ctypes.c_float}


def unusable(
    dtype: torch.dtype, head_size: int | None = None, group: int | None = None, device: torch.device | None = None
) -> str | None:
    """Why there are no kernels for this shape of model on this machine; None if there are, and then they are built.

    Without a shape: the operations that do not depend on heads.
    """
    try:
        _library(dtype)
        if head_size is not None:
            _library(dtype, head_size, group)
    except (KernelError, OSError, RuntimeError) as error:  # RuntimeError: no home folder to keep it in
        return str(error)
    return None


@functools.cache
def without_threads() -> str:
    """Why the kernels compute in one thread, whatever the number of torch's; "" if they share its threads.

    The loader takes libraries of GNU's OpenMP for one, by their name: the one that torch has loaded serves both.
    """
    try:
        ctypes.CDLL("libgomp.so.1", os.RTLD_NOLOAD)
    except OSError:
        return "kernels in one thread: torch's are not those of GNU's OpenMP"
    try:
        build(_text(torch.float32, "operations.cpp"), (*OPTIONS, THREADS), processor())
    except (KernelError, OSError):
        return "kernels in one thread: the compiler here has no threads that are torch's"
    return ""


@functools.cache
def _library(dtype: torch.dtype, *shape: int) -> ctypes.CDLL:
    """The operations, or for a head size and group the attention."""
    options = OPTIONS if without_threads() else (*OPTIONS, THREADS)
    library = build(_text(dtype, "paged_attention.cpp" if shape else "operations.cpp", *shape), options, processor())
    for name, arguments in (ATTENTION if shape else OPERATIONS).items():
        function = getattr(library, name)
        function.argtypes = [TYPES[each] for each in arguments]
        function.restype = None
    return library


def _text(dtype: torch.dtype, source: str, *shape: int) -> str:
    """A source as it is compiled: its fixed numbers, number types, and the file itself."""
    macros = zip(("SCALAR", "HEAD_SIZE", "GROUP"), (SCALARS[dtype], *shape), strict=False)
    defined = "".join(f"#define {name} {value}\n" for name, value in macros)
    return defined + "".join(f'#line 1 "{name}"\n{(FOLDER / name).read_text()}' for name in ("numbers.h", source))


def _int32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.int32 else x.to(torch.int32)


# --- attention, as in `reference` ---


def store_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """See `reference.store_kv`; a token whose slot is negative writes nothing."""
    check_store(keys, values, slots, k, v, LIMITS)
    _store_kv(keys, values, slots, k, v)


def _store_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    slots = slots.long()
    _library(keys.dtype).store_kv(
        keys.data_ptr(), values.data_ptr(), slots.data_ptr(), k.data_ptr(), v.data_ptr(),
        len(k), keys.shape[2] * keys.shape[3], k.stride(0), v.stride(0),
    )  # fmt: skip


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    window: int | None = None,
    *,
    version: int = 2,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.decode`. `version` 1 reads each key once for every query head, 2 once for all that share it."""
    check_decode(q, keys, values, tables, lengths, window, LIMITS)
    out = output_for(q, out)
    _decode(q, keys, values, tables, lengths, window, version=version, out=out)
    return out


def _decode(q, keys, values, tables, lengths, window, *, version: int = 2, out: Tensor) -> None:
    tables, lengths = _int32(tables), _int32(lengths)
    _, block_size, heads, head_size = keys.shape
    num_rows, num_heads, _ = q.shape
    _library(keys.dtype, head_size, num_heads // heads).decode(
        q.data_ptr(), q.stride(0), keys.data_ptr(), values.data_ptr(), tables.data_ptr(), tables.stride(0),
        lengths.data_ptr(), out.data_ptr(), num_rows, heads, block_size, window or 0, version, torch.get_num_threads(),
    )  # fmt: skip


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
    """See `reference.prefill`."""
    check_prefill(q, keys, values, tables, query_starts, lengths, max_queries, window, LIMITS)
    out = output_for(q, out)
    _prefill(q, keys, values, tables, query_starts, lengths, max_queries, window, out=out)
    return out


def _prefill(q, keys, values, tables, query_starts, lengths, max_queries, window, *, out: Tensor) -> None:
    tables, query_starts, lengths = _int32(tables), _int32(query_starts), _int32(lengths)
    _, block_size, heads, head_size = keys.shape
    num_rows, num_heads, _ = q.shape
    _library(keys.dtype, head_size, num_heads // heads).prefill(
        q.data_ptr(), q.stride(0), keys.data_ptr(), values.data_ptr(), tables.data_ptr(), tables.stride(0),
        query_starts.data_ptr(), lengths.data_ptr(), out.data_ptr(), num_rows, len(tables), heads, block_size,
        window or 0, torch.get_num_threads(),
    )  # fmt: skip


# --- the small operations, as in `ops` ---


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.add_rms_norm`. Raises KernelError."""
    check_add_rms_norm(x, residual, weight, LIMITS)
    return _add_rms_norm(x, residual, weight, eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _library(x.dtype).add_rms_norm(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), eps, *x.shape, torch.get_num_threads()
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `ops.silu_mul`. Raises KernelError."""
    check_silu_mul(gate_up, LIMITS)
    return _silu_mul(gate_up)


def _silu_mul(gate_up: Tensor) -> Tensor:
    num_tokens, both = gate_up.shape
    out = torch.empty(num_tokens, both // 2, dtype=gate_up.dtype)
    _library(gate_up.dtype).silu_mul(gate_up.data_ptr(), out.data_ptr(), num_tokens, both // 2, torch.get_num_threads())
    return out


def sample_rows(logits: Tensor, temperatures: Tensor, seeds: Tensor, draws: Tensor) -> Tensor:
    """See `sampling.sample_rows`; the same ids, unless two scores are equal up to rounding. Raises KernelError."""
    check_sample_rows(logits, temperatures, seeds, draws, LIMITS)
    return _sample_rows(logits, temperatures, seeds, draws)


def _sample_rows(logits: Tensor, temperatures: Tensor, seeds: Tensor, draws: Tensor) -> Tensor:
    token_ids = torch.empty(len(logits), dtype=torch.int64)
    _library(logits.dtype).sample_rows(
        *(each.data_ptr() for each in (logits, temperatures, seeds, draws, token_ids)), *logits.shape, GREEDY_BELOW,
        torch.get_num_threads(),
    )  # fmt: skip
    return token_ids


def norm_rotate_store(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """See `ops.norm_rotate_store`. Raises KernelError."""
    check_norm_rotate_store(qkv, num_heads, num_kv_heads, q_weight, k_weight, rotation, slots, keys, values, LIMITS)
    return _norm_rotate_store(qkv, num_heads, num_kv_heads, q_weight, k_weight, eps, rotation, slots, keys, values)


def _norm_rotate_store(qkv, num_heads, num_kv_heads, q_weight, k_weight, eps, rotation, slots, keys, values) -> Tensor:
    head_size, num_tokens, slots = keys.shape[3], qkv.shape[0], slots.long()
    q = torch.empty(num_tokens, num_heads, head_size, dtype=qkv.dtype)
    weights = (None, None) if q_weight is None else (q_weight.data_ptr(), k_weight.data_ptr())
    _library(keys.dtype, head_size, num_heads // num_kv_heads).norm_rotate_store(
        qkv.data_ptr(), *weights, eps, rotation[0].data_ptr(), rotation[1].data_ptr(), slots.data_ptr(), q.data_ptr(),
        keys.data_ptr(), values.data_ptr(), num_tokens, num_kv_heads, torch.get_num_threads(),
    )  # fmt: skip
    return q


# The same without checks: layers are alike, and arguments that fit the first fit all.
unchecked = SimpleNamespace(
    store_kv=_store_kv,
    decode=_decode,
    prefill=_prefill,
    add_rms_norm=_add_rms_norm,
    silu_mul=_silu_mul,
    norm_rotate_store=_norm_rotate_store,
    sample_rows=_sample_rows,
)
