"""Which kernels a worker uses: five backends behind one signature, picked by device, dtype and shape.

    store_kv(keys, values, slots, k, v) -> None
    decode(q, keys, values, tables, lengths, window=None, *, out=None) -> Tensor
    prefill(q, keys, values, tables, query_starts, lengths, max_queries, window=None, *, out=None) -> Tensor

A backend is a module with these three functions and its `LIMITS`; it is imported when it is asked for. None of them
waits for the GPU, and their grids depend only on shapes, so that CUDA graphs can be captured with them. A step calls
them through `Backend.prepare`, once, and `Backend.attend`, in every layer; the model gets a `PagedAttention`.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.errors import KernelError
from minillm.kernels.checks import Limits
from minillm.model import Heads, ModelConfig, Operations

ATTENTION_BACKENDS = ("auto", "reference", "cpu", "cuda", "triton", "flash")
FASTEST_FIRST = {"cpu": ("cpu", "reference"), "cuda": ("triton", "flash", "cuda", "reference")}  # by type of device


Pool = tuple[Tensor, Tensor]  # keys and values of one layer, [num_blocks, block_size, Hkv, D] each


class AttentionInputs(NamedTuple):
    """Where the T tokens of a step lie in the paged cache: requests with one new token first, then the chunks.

    Whole numbers of 32 or 64 bits, all on the pool's device. A row of padding has slot -1, and length 0 if it is among
    the requests with one token. Padding after the chunks must be the rows of a last chunk of length 0.
    """

    slots: Tensor  # [T], where each token's keys and values are stored: block * block_size + offset
    num_decodes: int  # Bd: this many first rows are of requests with one new token
    decode_tables: Tensor  # [Bd, W] block tables
    decode_lengths: Tensor  # [Bd] keys each has, its new one included
    chunk_tables: Tensor  # [Bc, W] block tables of requests with several new tokens
    chunk_starts: Tensor  # [Bc + 1] first row of each, counted from the first row after the decodes; then the end
    chunk_lengths: Tensor  # [Bc] keys each has, its new ones included
    max_queries: int  # new tokens of a chunk, at most


@dataclass(frozen=True)
class Backend:
    """The kernels a worker calls."""

    name: str
    limits: Limits
    kernels: Any  # the module: store_kv, decode, prefill
    unchecked: Any  # the same without checks, for layers that are like the first
    prepare: Callable[[AttentionInputs, Pool, ModelConfig], Any]  # inputs, a layer's pool -> the state for `attend`
    capturable: bool  # a CUDA graph may be made of them
    reads_whole_blocks: bool  # unwritten places must be finite, although they do not count
    why: str  # one line: what was picked, and why nothing faster was

    def attend(self, layer: int, q: Tensor, pool: Pool, state: Any, window: int | None) -> Tensor:
        """[T, Hq, D] -> [T, Hq, D], where the new keys and values have been stored already."""
        if not isinstance(state, AttentionInputs):
            return state.attend(q, *pool, window)
        kernels, split, num_rows = self.kernels if layer == 0 else self.unchecked, state.num_decodes, q.shape[0]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        decodes = state.decode_tables, state.decode_lengths, window
        if split == num_rows:
            kernels.decode(q, *pool, *decodes, out=out)
            return out
        if split:
            kernels.decode(q[:split], *pool, *decodes, out=out[:split])
        chunks = state.chunk_tables, state.chunk_starts, state.chunk_lengths, state.max_queries, window
        kernels.prefill(q[split:], *pool, *chunks, out=out[split:])
        return out


class PagedAttention:
    """The `attend` of a paged step: new tokens go into blocks, and queries read through block tables."""

    def __init__(self, backend: Backend, config: ModelConfig, pools: Sequence[Pool], inputs: AttentionInputs):
        """`pools`: those of every layer."""
        self.backend = backend
        self.config = config
        self.pools = pools
        self.slots = inputs.slots
        self.state = backend.prepare(inputs, pools[0], config)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, Hq, D] queries, [T, Hkv, D] new keys and values -> [T, Hq, D]."""
        self.backend.kernels.store_kv(*self.pools[layer], self.slots, k, v)
        return self.attend(layer, q)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """[T, Hq, D] -> [T, Hq, D], where the new keys and values have been stored already."""
        return self.backend.attend(layer, q, self.pools[layer], self.state, self.config.sliding_window(layer))


def fused(module: Any) -> Operations:
    """The small operations of a module (`ops`, `cpu`, `triton_ops`), for `Decoder.bound` and with `PagedAttention`."""

    def attend_heads(qkv: Tensor, heads: Heads, rotation: tuple[Tensor, Tensor], attend: PagedAttention) -> Tensor:
        layer, *cut = heads
        q = module.norm_rotate_store(qkv, *cut, rotation, attend.slots, *attend.pools[layer])  # [T, Hq, D]
        return attend.attend(layer, q)

    return Operations(attend_heads, module.add_rms_norm, module.silu_mul)


def choose(
    wanted: str, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, block_size: int
) -> Backend:
    """The backend of this name, or for "auto" the fastest that takes this model, dtype, device and block size.

    Raises KernelError if there is no backend of that name, or names the one of these that it does not take.
    """
    if wanted not in ATTENTION_BACKENDS:
        raise KernelError(f"attention_backend {wanted!r} is not one of {', '.join(ATTENTION_BACKENDS)}")
    shape = _shape(config, dtype, device, block_size)
    if wanted != "auto":
        found = _backend(wanted, shape, device)
        if isinstance(found, str):
            raise KernelError(f"attention_backend {wanted!r}: {found}")
        return replace(found, why="; ".join([f"{wanted}: asked for", *filter(None, [found.why])]))
    return _fastest(shape, device)


def _shape(config: ModelConfig, dtype: torch.dtype, device: torch.device | str, block_size: int) -> tuple:
    """The arguments of `Limits.refusal`."""
    group = config.num_attention_heads // config.num_key_value_heads
    return torch.device(device).type, dtype, config.head_dim, block_size, group


def _fastest(shape: tuple, device: torch.device | str) -> Backend:
    refusals = []
    for name in FASTEST_FIRST.get(shape[0], FASTEST_FIRST["cuda"]):
        found = _backend(name, shape, device)
        if isinstance(found, Backend):
            told = [f"{name}: the fastest that works here", *refusals, *filter(None, [found.why])]
            return replace(found, why="; ".join(told))
        refusals.append(f"not {name} ({found})")
    raise KernelError(f"no attention backend will do: {'; '.join(refusals)}")


def _backend(name: str, shape: tuple, device: torch.device | str) -> Backend | str:
    """The backend, or why it cannot be used."""
    try:
        module = importlib.import_module(f"minillm.kernels.{_MODULES.get(name, name)}")
    except ImportError as error:
        return f"it cannot be imported here ({error}); use another backend"
    refusal = module.LIMITS.refusal(*shape)
    if not refusal and hasattr(module, "unusable"):  # built or tried here, not in the middle of a step
        _, dtype, head_size, _, group = shape
        refusal = module.unusable(dtype, head_size, group, torch.device(device))
    return refusal or _of_module(name, module)


_MODULES = {"triton": "triton_kernels"}


def _of_module(name: str, module: ModuleType) -> Backend:
    return Backend(
        name=name,
        limits=module.LIMITS,
        kernels=module,
        unchecked=getattr(module, "unchecked", module),
        prepare=getattr(module, "prepare", lambda inputs, pool, config: inputs),
        capturable=getattr(module, "CAPTURABLE", True),
        reads_whole_blocks=getattr(module, "READS_WHOLE_BLOCKS", False),
        why=getattr(module, "without_threads", str)(),
    )
