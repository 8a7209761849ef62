"""The card's ceilings: speed of copying memory and of multiplying matrices. All shares are relative to them."""

import statistics

import torch

from minillm.bench.gpu.scale import Scale
from minillm.bench.gpu.timing import device_seconds
from minillm.costs import Card

COPY_SECONDS = 0.2
GEMM_SECONDS = 1.0  # long enough for the clock to settle under the power limit
PRODUCTS = 4  # timed together, so that even the largest number of repeats takes that long


def copy_ceiling(scale: Scale) -> dict:
    """Bytes read and written per second when copying a buffer many times as large as the card's cache."""
    device = scale.torch_device
    source = torch.rand(scale.copy_bytes // 4, device=device)  # float32
    target = torch.empty_like(source)
    seconds = device_seconds(lambda: target.copy_(source), device, COPY_SECONDS)
    return {
        "buffer_bytes": scale.copy_bytes,
        "seconds": seconds,
        "bytes_per_second": 2 * scale.copy_bytes / statistics.median(seconds),
    }


def gemm_ceiling(scale: Scale) -> dict:
    """Operations per second of a square matrix product of normal random numbers: zeros would take less power."""
    device, side = scale.torch_device, scale.gemm_side
    a, b = (torch.randn(side, side, device=device).to(scale.dtype) for _ in range(2))
    out = torch.empty_like(a)

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=out)

    runs = device_seconds(products, device, GEMM_SECONDS if scale.is_full else 0.0)
    seconds = [run / PRODUCTS for run in runs]
    return {"side": side, "seconds": seconds, "flops": 2 * side**3 / statistics.median(seconds)}


def measured_card(name: str, copy: dict, gemm: dict, memory_bytes: int) -> Card:
    """The ceilings as a `Card` for `minillm.costs.roofline`."""
    return Card(f"{name}, measured", memory_bytes, copy["bytes_per_second"], gemm["flops"])
