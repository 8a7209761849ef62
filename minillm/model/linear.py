"""The matrix product of the decoder, and its packed form for a CPU.

Most of a CPU's decode step is products of a few rows with a large matrix. For these, oneDNN with the matrix in its own
layout is faster than what `F.linear` calls. Measured in float32 on one thread of an AMD EPYC (torch 2.13), F.linear
against packed, in milliseconds: 3072 x 576 with 4 rows 0.35 and 0.16, with 16 rows 0.89 and 0.61; 49152 x 576 with 4
rows 16.5 and 5.6. Small matrices get slower: the call costs 10 microseconds more. In bfloat16, on a processor that has
it (avx512_bf16), packing pays for all: 3072 x 576 with 4 rows 0.17 and 0.08, 384 x 128 with 4 rows 0.020 and 0.016.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_PACKED = 200_000  # numbers in a float32 matrix: packing pays for this many or more
_pointwise = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)  # None without oneDNN


class Linear(nn.Linear):
    """`nn.Linear` whose weight can be packed, once it is loaded and will not change."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("packed", None, persistent=False)

    def reset_parameters(self) -> None:
        """Random numbers, but not on the meta device: there torch loads its compiler to draw them, for a second."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight, self.bias) if self.packed is None else packed_linear(x, self.packed, self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws no numbers for a weight without memory; see `Linear.reset_parameters`."""

    def reset_parameters(self) -> None:
        """Random numbers, if there is memory for them."""
        if not self.weight.is_meta:
            super().reset_parameters()


def plain(linear: Linear) -> Callable[[Tensor], Tensor]:
    """The product without the module around it, whose weight must not change afterwards."""
    weight, packed, bias = linear.weight, linear.packed, linear.bias
    if packed is not None:
        return lambda x: packed_linear(x, packed, bias)
    return lambda x: F.linear(x, weight, bias)


def pack_linears(model: nn.Module) -> None:
    """Pack every `Linear` whose weight is large, and drop its plain form; no effect where packing does not pay."""
    for module in model.modules():
        if isinstance(module, Linear) and worth_packing(module.weight):
            module.packed = pack(module.weight)
            module.weight = None


def worth_packing(weight: Tensor) -> bool:
    """Whether `packed_linear` multiplies a weight faster: on a CPU with oneDNN, large float32 and all bfloat16 ones."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or _pointwise is None:
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and weight.numel() >= LEAST_PACKED


def pack(weight: Tensor) -> Tensor:
    """A copy of an [out, in] weight in oneDNN's layout, of the same size in bytes."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear with a packed weight."""
    return _pointwise(x, packed, bias, "none", [], "")
