"""What the other modules of this room do with tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def wide(logits: Tensor) -> torch.dtype:
    """The dtype to compute in: float32 at least, and float64 stays so."""
    return torch.promote_types(logits.dtype, torch.float32)


def likeliest(logits: Tensor, count: int) -> Tensor:
    """True for exactly `count` of [..., V] logits, unless there is NaN: the largest, of equal ones the first."""
    least = logits.topk(count).values[..., -1:]
    larger, equal = logits > least, logits == least
    return larger | (equal & (equal.cumsum(-1) <= count - larger.sum(-1, keepdim=True)))


def to_device(numbers: Sequence[float], device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    """[n] on the device. A GPU gets them from pinned memory, in its stream, without a wait."""
    host = torch.tensor(list(numbers), dtype=dtype, pin_memory=torch.device(device).type == "cuda")
    return host.to(device, non_blocking=True)
