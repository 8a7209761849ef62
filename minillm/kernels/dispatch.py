"""Which kernels a worker uses: five backends behind one signature, picked by device, dtype and shape.

    store_kv(keys, values, slots, k, v) -> None
    decode(q, keys, values, tables, lengths, window=None, *, out=None) -> Tensor
    prefill(q, keys, values, tables, query_starts, lengths, max_queries, window=None, *, out=None) -> Tensor

A backend is a module with these three functions and its `LIMITS`; it is imported when it is asked for. None of them
waits for the GPU, and their grids follow from shapes alone, so that CUDA graphs can be captured with them.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from minillm.errors import KernelError
from minillm.kernels.checks import Limits
from minillm.model import ModelConfig

ATTENTION_BACKENDS = ("auto", "reference", "cpu", "cuda", "triton", "flash")
FASTEST_FIRST = {"cpu": ("cpu", "reference"), "cuda": ("triton", "flash", "cuda", "reference")}  # by type of device


@dataclass(frozen=True)
class Backend:
    """The kernels a worker calls."""

    name: str
    module: str  # where its kernels are
    limits: Limits
    store_kv: Callable[..., None]
    decode: Callable[..., Tensor]
    prefill: Callable[..., Tensor]
    unchecked: Any  # decode and prefill again, without a look at arguments that are like those before; or None
    capturable: bool  # a CUDA graph may be made of them
    why: str  # one line: what was picked, and why what would be faster was not


def choose(
    wanted: str, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, block_size: int
) -> Backend:
    """The backend of this name, or for "auto" the fastest that takes this model, dtype, device and block size.

    Raises KernelError if there is no backend of that name, or it does not take one of them: the message says which.
    """
    if wanted not in ATTENTION_BACKENDS:
        raise KernelError(f"attention_backend {wanted!r} is not one of {', '.join(ATTENTION_BACKENDS)}")
    shape = _shape(config, dtype, device, block_size)
    if wanted != "auto":
        found = _backend(wanted, shape, device)
        if isinstance(found, str):
            raise KernelError(f"attention_backend {wanted!r}: {found}")
        return replace(found, why=f"{wanted}: asked for")
    return _fastest(shape, device)


def _shape(config: ModelConfig, dtype: torch.dtype, device: torch.device | str, block_size: int) -> tuple:
    """What `Limits.refusal` asks of."""
    group = config.num_attention_heads // config.num_key_value_heads
    return torch.device(device).type, dtype, config.head_dim, block_size, group


def _fastest(shape: tuple, device: torch.device | str) -> Backend:
    refusals = []
    for name in FASTEST_FIRST.get(shape[0], FASTEST_FIRST["cuda"]):
        found = _backend(name, shape, device)
        if isinstance(found, Backend):
            return replace(found, why="; ".join([f"{name}: the fastest that will do", *refusals]))
        refusals.append(f"not {name} ({found})")
    raise KernelError(f"no attention backend will do: {'; '.join(refusals)}")


def _backend(name: str, shape: tuple, device: torch.device | str) -> Backend | str:
    """The backend, or why it cannot be used."""
    try:
        module = importlib.import_module(f"minillm.kernels.{_MODULES.get(name, name)}")
    except ImportError as error:
        return f"it cannot be imported here ({error}); use another backend"
    refusal = module.LIMITS.refusal(*shape)
    if not refusal and hasattr(module, "unusable"):  # it is built or tried here, or fails in the middle of a step
        _, dtype, head_size, _, group = shape
        refusal = module.unusable(dtype, head_size, group, torch.device(device))
    return refusal or _of_module(name, module)


_MODULES = {"triton": "triton_kernels"}


def _of_module(name: str, module: ModuleType) -> Backend:
    return Backend(
        name=name,
        module=module.__name__,
        limits=module.LIMITS,
        store_kv=module.store_kv,
        decode=module.decode,
        prefill=module.prefill,
        unchecked=getattr(module, "unchecked", None),
        capturable=getattr(module, "CAPTURABLE", True),
        why="",
    )
