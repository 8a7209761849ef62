"""Paged attention in plain CUDA C++: the kernels to read. paged_attention.cu has them; this compiles and launches them.

On a GPU NVRTC compiles the source at run time (compiled.py). Without one the same source runs on the CPU, and what each
thread reads can be counted and drawn (emulator.py, traffic.py). For both, launches.py decides what is launched.
May import torch, numpy, `checks` and `errors`.
"""

import torch
from torch import Tensor

from minillm.kernels.checks import Limits
from minillm.kernels.cuda import launches
from minillm.kernels.cuda.compiled import run
from minillm.kernels.cuda.launches import GROUPS, HEAD_SIZES, MAX_SCORES, SCALARS, SOURCE, VERSIONS

__all__ = ["LIMITS", "MAX_SCORES", "SOURCE", "VERSIONS", "decode", "prefill", "store_kv"]

LIMITS = Limits(
    kernels="the CUDA C++ kernels",
    instead="use attention_backend='auto'",
    devices=("cuda",),
    dtypes=tuple(SCALARS),
    head_sizes=HEAD_SIZES,
    groups=GROUPS,
)


def store_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Write [T, Hkv, D] new keys and values into the pool of a layer, [N, block_size, Hkv, D], at [T] slots.

    A slot is block * block_size + offset; a token whose slot is negative is padding and is not written.
    Raises KernelError for what this kernel does not take.
    """
    for launch in launches.store_kv(keys, values, slots, k, v, LIMITS):
        run(launch)


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    window: int | None = None,
    *,
    version: int = 5,
    num_splits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """B requests with one new token each, [B, Hq, D] queries, read through [B, W] block tables -> [B, Hq, D].

    `lengths` [B]: keys each request has, the new token's included; 0 (padding) gives zeros. Only the last `window` are
    seen. `version`: 1 to 5, from naive to fast; 1 to 3 take MAX_SCORES keys at most. Version 5 splits the keys of a
    request and key head over `num_splits` blocks; the default depends only on shapes. `out` is written if given.
    Raises KernelError for what these kernels do not take.
    """
    options = window, version, num_splits, out, _processors(q.device), LIMITS
    out, planned = launches.decode(q, keys, values, tables, lengths, *options)
    for launch in planned:
        run(launch)
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
    """New tokens of B requests, one after the other in [T, Hq, D], read through [B, W] block tables -> [T, Hq, D].

    Request b has rows query_starts[b] .. query_starts[b + 1] - 1 of q and they are the last of its lengths[b] tokens:
    what is before them is the cached prefix. `max_queries`: no request has more. Each query sees itself and what is
    before it, `window` keys at most. Rows that see nothing are zeros; rows of no request are not written. `out` is
    written if given. Raises KernelError for what this kernel does not take.
    """
    options = max_queries, window, out, LIMITS
    out, planned = launches.prefill(q, keys, values, tables, query_starts, lengths, *options)
    for launch in planned:
        run(launch)
    return out


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the checks will refuse any other device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
