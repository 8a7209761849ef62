"""What is launched: a call of store_kv, decode or prefill becomes one or two kernels of paged_attention.cu.

The same launches go to a GPU (compiled.py) or to the emulation on the CPU (emulator.py). Whatever the kernels do not
take is refused here, before anything is allocated.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.errors import KernelError
from minillm.kernels.checks import Limits, check_decode, check_prefill, check_store, output_for

SOURCE = Path(__file__).with_name("paged_attention.cu").read_text()

SCALARS = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
INDICES = {torch.int32: "int", torch.int64: "long long"}
HEAD_SIZES = (16, 32, 64, 128)  # a team of 32 threads at most loads a row, 16 bytes each
GROUPS = range(1, 9)  # the queries and sums of a group are in registers, 255 per thread
VERSIONS = (1, 2, 3, 4, 5)

THREADS = 128  # per block; the kernels rely on it
ROWS = 16  # of a prefill block: queries x heads of a group
MAX_SCORES = 8192  # versions 1 to 3: 32 of the 48 KiB of shared memory that a block has by default
MAX_SPLITS = 32
KEYS_A_SPLIT = 64  # fewer are not worth a split
BLOCKS_A_PROCESSOR = 4  # of 128 threads: what fits its registers


class Specialisation(NamedTuple):
    """What the kernels are compiled for."""

    scalar: str  # of SCALARS
    index: str  # of INDICES
    head_size: int
    block_size: int
    group: int

    def source(self, text: str = SOURCE) -> str:
        """The kernels, or a changed `text` of them, with the macros they need in front; lines keep their numbers."""
        macros = zip(("SCALAR", "INDEX", "HEAD_SIZE", "BLOCK_SIZE", "GROUP"), self, strict=True)
        return "".join(f"#define {name} {value}\n" for name, value in macros) + f'#line 1 "paged_attention.cu"\n{text}'


class Launch(NamedTuple):
    """One kernel over one grid of blocks, each of THREADS threads."""

    kernel: str
    specialisation: Specialisation
    grid: tuple[int, int, int]
    arguments: dict[str, Tensor | int]  # in the kernel's order
    shared_bytes: int = 0  # of the array whose size the source leaves open


def store_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor, limits: Limits) -> list[Launch]:
    """What writes [T, Hkv, D] keys and values into the pool of a layer."""
    check_store(keys, values, slots, k, v, limits)
    _check_aligned(keys=keys, values=values, k=k, v=v)
    if not len(k):
        return []
    specialisation = _specialisation(keys, slots, group=1)
    arguments = {"keys": keys, "values": values, "slots": slots, "k": k, "v": v}
    sizes = {"k_stride": k.stride(0), "v_stride": v.stride(0), "row_size": k.shape[1] * k.shape[2]}
    return [Launch("store_kv", specialisation, (len(k), 1, 1), arguments | sizes)]


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    window: int | None,
    version: int,
    num_splits: int | None,
    out: Tensor | None,
    processors: int,
    limits: Limits,
) -> tuple[Tensor, list[Launch]]:
    """The launches for one new token each of B requests, and where the result will be.

    Without `num_splits`, version 5 splits so that `processors` have work; a single split is version 4.
    """
    group = check_decode(q, keys, values, tables, lengths, window, limits)
    _check_aligned(q=q, keys=keys, values=values)
    max_keys = tables.shape[1] * keys.shape[1]
    num_blocks = len(q) * keys.shape[2]
    splits = num_splits or (splits_for(num_blocks, max_keys, processors) if version == 5 else 1)
    _check_version(version, num_splits, splits, min(max_keys, window or max_keys))
    out = output_for(q, out)
    if not len(q):
        return out, []
    pool = {"q": q, "keys": keys, "values": values, "tables": tables, "lengths": lengths.to(tables.dtype)}
    sizes = {"q_stride": q.stride(0), "table_stride": tables.stride(0), "window": window or 0}
    specialisation = _specialisation(keys, tables, group)
    if splits > 1:
        return out, _split(specialisation, pool, sizes, out, splits)
    kernel = "decode_v4" if version == 5 else f"decode_v{version}"
    heads = q.shape[1] if version < 4 else keys.shape[2]
    scores = 4 * min(max_keys, window or max_keys) if version < 4 else 0
    return out, [Launch(kernel, specialisation, (len(q), heads, 1), pool | {"out": out} | sizes, scores)]


def prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    max_queries: int,
    window: int | None,
    out: Tensor | None,
    limits: Limits,
) -> tuple[Tensor, list[Launch]]:
    """The launches for the new tokens of B requests, and where the result will be."""
    group = check_prefill(q, keys, values, tables, query_starts, lengths, max_queries, window, limits)
    _check_aligned(q=q, keys=keys, values=values)
    out = output_for(q, out)
    if not (max_queries and len(tables)):
        return out, []
    integers = {"query_starts": query_starts.to(tables.dtype), "lengths": lengths.to(tables.dtype)}
    arguments = {"q": q, "keys": keys, "values": values, "tables": tables} | integers | {"out": out}
    sizes = {"q_stride": q.stride(0), "table_stride": tables.stride(0), "window": window or 0}
    grid = -(-max_queries // (ROWS // group)), keys.shape[2], len(tables)
    return out, [Launch("prefill", _specialisation(keys, tables, group), grid, arguments | sizes)]


def splits_for(num_blocks: int, max_keys: int, processors: int) -> int:
    """Into how many parts to split each request's keys, given the blocks without splitting.

    It depends on shapes, never on lengths, so that a captured CUDA graph holds for all lengths.
    """
    return max(1, min(BLOCKS_A_PROCESSOR * processors // max(1, num_blocks), max_keys // KEYS_A_SPLIT, MAX_SPLITS))


def _split(
    specialisation: Specialisation, pool: dict[str, Tensor], sizes: dict[str, int], out: Tensor, splits: int
) -> list[Launch]:
    num_requests, num_heads, head_size = out.shape
    parts = torch.empty(num_requests, num_heads, splits, head_size, dtype=torch.float32, device=out.device)
    logs = torch.empty(num_requests, num_heads, splits, dtype=torch.float32, device=out.device)
    grid = num_requests, pool["keys"].shape[2], splits
    combine = {"parts": parts, "logs": logs, "out": out, "num_splits": splits}
    return [
        Launch("decode_v5", specialisation, grid, pool | {"parts": parts, "logs": logs} | sizes),
        Launch("combine", specialisation, (num_requests * num_heads, 1, 1), combine),
    ]


def _specialisation(keys: Tensor, indices: Tensor, group: int) -> Specialisation:
    return Specialisation(SCALARS[keys.dtype], INDICES[indices.dtype], keys.shape[3], keys.shape[1], group)


def _check_version(version: int, num_splits: int | None, splits: int, num_scores: int) -> None:
    if version not in VERSIONS:
        raise KernelError(f"version {version}: there are {', '.join(map(str, VERSIONS))}")
    if version < 5 and num_splits not in (None, 1):
        raise KernelError(f"num_splits {num_splits}: version {version} does not split; use version 5")
    if not 1 <= splits <= MAX_SPLITS:
        raise KernelError(f"num_splits {num_splits}: pass 1 to {MAX_SPLITS}, or None to let the shapes decide")
    if version < 4 and num_scores > MAX_SCORES:
        raise KernelError(
            f"{num_scores} keys per request: version {version} keeps a score of each in shared memory, {MAX_SCORES} at "
            "most; use version 4 or 5"
        )


def _check_aligned(**tensors: Tensor) -> None:
    """Loads of 16 bytes must begin at a multiple of 16."""
    for name, x in tensors.items():
        apart = x.stride(0) * x.element_size() if len(x) > 1 else 0
        if x.numel() and (x.data_ptr() % 16 or apart % 16):
            raise KernelError(
                f"{name} begins at address {x.data_ptr()} and its rows are {apart} bytes apart: the CUDA C++ kernels "
                "load 16 bytes at once; pass multiples of 16"
            )
