"""The kernel table: paged attention of every backend, alone, beside the ceilings.

Decode is measured in bytes per second: keys and values of all requests, each counted once. Each call reads different
blocks, so that they are not in the card's cache. If the backend can be captured, calls are launched as one CUDA graph,
so that the host's launches do not count. Prefill is measured in operations per second of its causal scores. Every cell
is compared with the reference before it is timed.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.bench.gpu.scale import Scale
from minillm.bench.gpu.session import Session
from minillm.bench.gpu.timing import captured, device_seconds
from minillm.costs import blocks_needed, causal_entries
from minillm.kernels import dispatch, reference

BLOCK_SIZE = 16  # the engine's default
LARGE_BLOCK_SIZE = 256  # required by FlashAttention
CUDA_VERSIONS = (1, 2, 3, 4, 5)
LARGEST_ERROR = 0.03  # against the reference, as a share of its largest output: bfloat16 keeps 8 bits
MOST_ROTATIONS = 512  # calls with different inputs before the first ones are repeated
LEAST_ROTATIONS = 8  # launching a graph takes microseconds, which its calls share


class Variant(NamedTuple):
    """A row of the table: a backend, or one of its versions, with one block size."""

    label: str
    backend: str
    block_size: int
    options: dict


VARIANTS = (  # in the order of measuring, because time may run out
    Variant("triton", "triton", BLOCK_SIZE, {}),
    *(Variant(f"cuda, version {n}", "cuda", BLOCK_SIZE, {"version": n}) for n in CUDA_VERSIONS),
    Variant("triton, blocks of 256", "triton", LARGE_BLOCK_SIZE, {}),
    Variant("flash, blocks of 256", "flash", LARGE_BLOCK_SIZE, {}),
    Variant("reference", "reference", BLOCK_SIZE, {}),
)
PREFILL_VARIANTS = tuple(
    Variant(v.label, v.backend, v.block_size, {}) for v in VARIANTS if v.options in ({}, {"version": CUDA_VERSIONS[-1]})
)


def kernels(session: Session) -> None:
    """The part: decode for every batch and context, prefill, launch parameters of the Triton kernel."""
    part = session.part("kernels")
    part["shape"] = {
        "query_heads": session.scale.kernel_shape.num_attention_heads,
        "key_value_heads": session.scale.kernel_shape.num_key_value_heads,
        "head_size": session.scale.kernel_shape.head_dim,
    }
    bench = KernelBench(session.scale)
    decode, sweep, prefill = (part.setdefault(name, {}) for name in ("decode", "sweep", "prefill"))
    cases = list(itertools.product(session.scale.decode_batches, session.scale.decode_contexts))
    for variant in VARIANTS:
        session.log(f" {variant.label}")
        cells = decode.setdefault(variant.label, {})
        for case in cases:
            session.entry(cells, decode_name(case), partial(decode_cell, session, bench, variant, case))
    for variant in PREFILL_VARIANTS:
        session.log(f" {variant.label}")
        cells = prefill.setdefault(variant.label, {})
        for case in session.scale.prefill_cases:
            session.entry(cells, prefill_name(case), partial(prefill_cell, session, bench, variant, case))
    for case in session.scale.sweep_cases:
        session.log(f" triton, launch parameters, {decode_name(case)}")
        cells = sweep.setdefault(decode_name(case), {})
        if "refused" not in session.entry(cells, "default", partial(sweep_cell, session, bench, case, {})):
            for label, options in launches(session.scale):
                session.entry(cells, label, partial(sweep_cell, session, bench, case, options))


def decode_name(case: tuple[int, int]) -> str:
    return "{} x {}".format(*case)


def prefill_name(case: tuple[int, int, int]) -> str:
    return "{} x {} new, {} cached".format(*case)


# --- inputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeInputs:
    """One pool, and enough different calls on it that none finds its data in the card's cache."""

    keys: Tensor
    values: Tensor
    calls: list[tuple[Tensor, Tensor]]  # q [B, Hq, D] and tables [B, W]
    lengths: Tensor  # [B]
    out: Tensor

    @property
    def counted_bytes(self) -> int:
        """Bytes of one call: every key and value once."""
        width = 2 * self.keys[0, 0].numel() * self.keys.element_size()
        return int(self.lengths.sum()) * width


class KernelBench:
    """Random pools of the largest case, one per block size, made at first use."""

    def __init__(self, scale: Scale):
        self.scale = scale
        self._pools: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def generator(self) -> torch.Generator:
        """The source of all random inputs."""
        return torch.Generator(self.scale.torch_device).manual_seed(0)

    def pool(self, block_size: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [N, block_size, Hkv, D]; block 0 is the null block."""
        if block_size not in self._pools:
            self._pools.clear()  # only one is kept
            scale, shape = self.scale, self.scale.kernel_shape
            most = max(b * blocks_needed(c, block_size) for b in scale.decode_batches for c in scale.decode_contexts)
            most = max(most, *(b * blocks_needed(n + c, block_size) for b, n, c in scale.prefill_cases))
            size = (1 + most, block_size, shape.num_key_value_heads, shape.head_dim)
            self._pools[block_size] = self.random(*size), self.random(*size)
        return self._pools[block_size]

    def random(self, *size: int) -> Tensor:
        """Normal numbers in the scale's dtype."""
        return torch.empty(size, dtype=self.scale.dtype, device=self.scale.torch_device).normal_(
            generator=self.generator
        )

    def tables(self, num_calls: int, num_requests: int, num_blocks: int, block_size: int) -> Iterator[Tensor]:
        """[B, W] tables of random blocks, call by call; no two requests of a call share a block.

        A block is repeated only after all others have been used.
        """
        total = len(self.pool(block_size)[0]) - 1
        per_call = num_requests * num_blocks
        for _ in range(math.ceil(num_calls / (total // per_call))):
            order = 1 + torch.randperm(total, device=self.scale.torch_device, generator=self.generator)
            whole = order[: total // per_call * per_call].to(torch.int32)
            yield from whole.view(-1, num_requests, num_blocks)

    def decode_inputs(self, case: tuple[int, int], block_size: int) -> DecodeInputs:
        """Calls of one batch size and context, enough that the card's cache does not hold the data of the next."""
        num_requests, context = case
        shape, device = self.scale.kernel_shape, self.scale.torch_device
        keys, values = self.pool(block_size)
        call_bytes = 2 * num_requests * context * keys[0, 0].numel() * keys.element_size()
        enough = math.ceil(self.scale.rotated_bytes / call_bytes)
        num_calls = min(MOST_ROTATIONS, max(LEAST_ROTATIONS, enough))
        tables = itertools.islice(
            self.tables(num_calls, num_requests, blocks_needed(context, block_size), block_size), num_calls
        )
        size = (num_requests, shape.num_attention_heads, shape.head_dim)
        return DecodeInputs(
            keys,
            values,
            [(self.random(*size), table) for table in tables],
            torch.full((num_requests,), context, dtype=torch.int32, device=device),
            torch.empty(size, dtype=self.scale.dtype, device=device),
        )


# --- cells -----------------------------------------------------------------------------------------------------------


def backend_of(scale: Scale, variant: Variant) -> dispatch.Backend:
    """The backend of a variant. Raises KernelError with the reason if it cannot be used here."""
    return dispatch.choose(variant.backend, scale.kernel_shape, scale.dtype, scale.torch_device, variant.block_size)


def decode_cell(session: Session, bench: KernelBench, variant: Variant, case: tuple[int, int]) -> dict:
    """One cell of the decode table."""
    backend = backend_of(session.scale, variant)
    inputs = bench.decode_inputs(case, variant.block_size)
    return measured_decode(session, inputs, partial(backend.kernels.decode, **variant.options), backend.capturable)


def measured_decode(
    session: Session, inputs: DecodeInputs, decode: Callable[..., Tensor], capturable: bool = True
) -> dict:
    """Bytes per second of `decode` and its share of the copy ceiling. Raises AssertionError if its result is wrong."""
    device = session.scale.torch_device
    error = decode_error(inputs, decode)

    def all_calls() -> None:
        for q, tables in inputs.calls:
            decode(q, inputs.keys, inputs.values, tables, inputs.lengths, out=inputs.out)

    work = captured(all_calls, device) if capturable else all_calls
    seconds = [each / len(inputs.calls) for each in device_seconds(work, device, session.scale.cell_seconds)]
    speed = inputs.counted_bytes / statistics.median(seconds)
    return {
        "seconds": seconds,
        "calls_with_other_inputs": len(inputs.calls),
        "launched": "as one CUDA graph" if capturable and device.type == "cuda" else "one by one",
        "bytes": inputs.counted_bytes,
        "bytes_per_second": speed,
        "share_of_copy": speed / session.card.bandwidth,
        "largest_difference": error,
    }


def decode_error(inputs: DecodeInputs, decode: Callable[..., Tensor]) -> float:
    """The largest difference to the reference in the first call, as a share of the largest output."""
    q, tables = inputs.calls[0]
    inputs.out.fill_(float("nan"))  # so that an unwritten row is found
    arguments = (q, inputs.keys, inputs.values, tables, inputs.lengths)
    return compared(decode(*arguments, out=inputs.out), reference.decode(*arguments))


def compared(out: Tensor, expected: Tensor) -> float:
    """The largest relative difference. Raises AssertionError for NaN, and if it is more than rounding."""
    difference = ((out.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    if not difference <= LARGEST_ERROR:
        raise AssertionError(
            f"differs from the reference by {difference:.3f} of its largest output, more than {LARGEST_ERROR}"
        )
    return difference


def sweep_cell(session: Session, bench: KernelBench, case: tuple[int, int], options: dict) -> dict:
    """The Triton decode kernel with other launch parameters."""
    return decode_cell(session, bench, Variant("", "triton", BLOCK_SIZE, options), case)


def launches(scale: Scale) -> Iterator[tuple[str, dict]]:
    """Labels and options of the launches to try beside the default."""
    from minillm.kernels import DECODE_LAUNCH

    for keys, num_warps, num_stages in itertools.product(*scale.sweep_launches):
        launch = DECODE_LAUNCH._replace(keys=keys, num_warps=num_warps, num_stages=num_stages)
        usual = (num_stages == DECODE_LAUNCH.num_stages) + (num_warps == DECODE_LAUNCH.num_warps)
        if usual and launch != DECODE_LAUNCH:
            yield f"{keys} keys, {num_warps} warps, {num_stages} stages", {"launch": launch}
    for splits in scale.sweep_splits:
        yield f"default, {splits} splits", {"num_splits": splits}


def prefill_cell(session: Session, bench: KernelBench, variant: Variant, case: tuple[int, int, int]) -> dict:
    """One cell of the prefill table."""
    backend = backend_of(session.scale, variant)
    scale, (num_requests, new, cached) = session.scale, case
    device, shape = scale.torch_device, scale.kernel_shape
    tables = next(bench.tables(1, num_requests, blocks_needed(new + cached, variant.block_size), variant.block_size))
    starts = torch.arange(0, (num_requests + 1) * new, new, dtype=torch.int32, device=device)
    lengths = torch.full((num_requests,), new + cached, dtype=torch.int32, device=device)
    q = bench.random(num_requests * new, shape.num_attention_heads, shape.head_dim)
    arguments = (q, *bench.pool(variant.block_size), tables, starts, lengths, new)
    out = torch.full_like(q, float("nan"))
    error = compared(backend.kernels.prefill(*arguments, out=out), reference.prefill(*arguments))
    seconds = device_seconds(lambda: backend.kernels.prefill(*arguments, out=out), device, scale.cell_seconds)
    flops = 4 * num_requests * causal_entries(cached, cached + new) * shape.query_size
    speed = flops / statistics.median(seconds)
    return {
        "seconds": seconds,
        "flops": flops,
        "flops_per_second": speed,
        "share_of_gemm": speed / session.card.flops,
        "largest_difference": error,
    }
