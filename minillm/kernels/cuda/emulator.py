"""The CUDA C++ kernels on the CPU: the same source, compiled as C++ behind cuda_on_cpu.h, every access noted.

    out, traffic = Emulator().run("decode", q, keys, values, tables, lengths, version=1)

`store_kv`, `decode` and `prefill` here take what those of the package take, with tensors on the CPU. A thread that
reads or writes outside the arrays, or a barrier that not all threads reach, raises a KernelError that says where.
It needs a C++ compiler, see `building`.
"""

import ctypes
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from minillm.errors import KernelError
from minillm.kernels.building import build
from minillm.kernels.checks import Limits
from minillm.kernels.cuda import launches
from minillm.kernels.cuda.compiled import KERNEL_NAME
from minillm.kernels.cuda.launches import GROUPS, HEAD_SIZES, SCALARS, SOURCE, THREADS, Launch
from minillm.kernels.cuda.traffic import RECORD, Traffic, joined

LIMITS = Limits(
    kernels="the emulated CUDA C++ kernels",
    instead="on a GPU the compiled ones run, minillm.kernels.cuda",
    devices=("cpu",),
    dtypes=tuple(SCALARS),
    head_sizes=HEAD_SIZES,
    groups=GROUPS,
)
PROCESSORS = 8  # pretended: enough to have splits
BACKWARDS = -1  # an order of a block's threads

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
# Quick to compile; and a + b * c is two roundings, whatever the processor could do.
OPTIONS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fno-sanitize=all")
OPEN_SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
CALL = """extern "C" void call_{name}(void** values) {{ cpu::call({name}, values); }}
extern "C" int arguments_of_{name}() {{ return cpu::num_arguments({name}); }}
"""
GAP = 1 << 16  # bytes between arrays, so that a run over the end of one does not reach the next
ALIGNMENT = 256  # of arrays, as a GPU's allocator aligns them


@dataclass(frozen=True)
class Emulator:
    """Runs kernels of a source, by default our own.

    Warps of a block, and threads of a warp, take turns from number `order` on, or BACKWARDS. A kernel whose result
    depends on it lacks a barrier.
    """

    source: str = SOURCE
    order: int = 0  # or BACKWARDS

    def run(self, function: str, *arguments, **options) -> tuple[Tensor | None, Traffic]:
        """Call "store_kv", "decode" or "prefill" by name -> its result and what it loaded and stored."""
        out, planned = getattr(self, f"_plan_{function}")(*arguments, **options)
        return out, joined([self._launch(launch, recording=True) for launch in planned])

    def store_kv(self, *arguments) -> None:
        self._execute(self._plan_store_kv(*arguments))

    def decode(self, *arguments, **options) -> Tensor:
        return self._execute(self._plan_decode(*arguments, **options))

    def prefill(self, *arguments, **options) -> Tensor:
        return self._execute(self._plan_prefill(*arguments, **options))

    def _execute(self, plan: tuple[Tensor | None, list[Launch]]) -> Tensor | None:
        out, planned = plan
        for launch in planned:
            self._launch(launch, recording=False)
        return out

    def _launch(self, launch: Launch, recording: bool) -> Traffic:
        source = launch.specialisation.source(self.source)
        block = THREADS, 1, 1
        return emulate(
            source, launch.kernel, launch.grid, block, launch.arguments, launch.shared_bytes, self.order, recording
        )

    def _plan_store_kv(self, keys, values, slots, k, v):
        return None, launches.store_kv(keys, values, slots, k, v, LIMITS)

    def _plan_decode(
        self, q, keys, values, tables, lengths, window=None, *, version=5, num_splits=None, out=None
    ) -> tuple[Tensor, list[Launch]]:
        options = window, version, num_splits, out, PROCESSORS, LIMITS
        return launches.decode(q, keys, values, tables, lengths, *options)

    def _plan_prefill(
        self, q, keys, values, tables, query_starts, lengths, max_queries, window=None, *, out=None
    ) -> tuple[Tensor, list[Launch]]:
        return launches.prefill(q, keys, values, tables, query_starts, lengths, max_queries, window, out, LIMITS)


store_kv, decode, prefill, run = Emulator().store_kv, Emulator().decode, Emulator().prefill, Emulator().run


def emulate(
    source: str,
    kernel: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: dict[str, Tensor | int],
    shared_bytes: int = 0,
    order: int = 0,
    recording: bool = True,
) -> Traffic:
    """Run any `extern "C" __global__` kernel that reads and writes through `load` and `store`.

    `arguments` in the kernel's order, by the names for messages and traffic; tensors are written in place.
    Raises KernelError if the source does not compile or a thread breaks a rule (see cuda_on_cpu.h).
    """
    library = _compiled(source)
    function = getattr(library, f"call_{kernel}", None)
    if function is None:
        raise KernelError(f"kernel {kernel!r} is not in the source; it has {', '.join(KERNEL_NAME.findall(source))}")
    if (taken := getattr(library, f"arguments_of_{kernel}")()) != len(arguments):
        raise KernelError(f"{len(arguments)} arguments, {', '.join(arguments)}: kernel {kernel!r} takes {taken}")
    if shared_bytes > 48 << 10 or not 1 <= block[0] * block[1] * block[2] <= 1024:
        raise KernelError(
            f"a block of {block} threads with {shared_bytes} bytes of shared memory: pass 1024 threads and 49152 bytes "
            "at most"
        )
    memory = _Memory({name: x for name, x in arguments.items() if isinstance(x, Tensor)})
    values = [
        ctypes.c_void_p(memory.begin[name]) if isinstance(x, Tensor) else ctypes.c_int(x)
        for name, x in arguments.items()
    ]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    three = ctypes.c_uint * 3
    message = library.emulate(
        function, pointers, three(*grid), three(*block), memory.arrays, len(memory.arrays), order, recording
    )
    if message:
        raise KernelError(f"{kernel}, {message.decode()}")
    memory.copy_back()
    return Traffic(tuple(memory.begin), _records(library))


def _records(library: ctypes.CDLL) -> np.ndarray:
    count = library.num_recorded()
    if not count:
        return np.empty(0, RECORD)
    return np.frombuffer((ctypes.c_char * (count * RECORD.itemsize)).from_address(library.recorded()), RECORD).copy()


# --- global memory ---


class _Array(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("item_bytes", ctypes.c_int32),
        ("stored", ctypes.c_int32),
        ("name", ctypes.c_char * 32),
    ]


class _Memory:
    """Copies of tensors, far apart from each other, so that their ends can be guarded."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        spans = [_span(x) for x in tensors.values()]
        self.buffer = np.empty(sum(spans) + (len(spans) + 1) * (GAP + ALIGNMENT), np.uint8)
        self.begin: dict[str, int] = {}
        place = self.buffer.ctypes.data
        rows = []
        for (name, x), span in zip(tensors.items(), spans, strict=True):
            begin = -(-(place + GAP) // ALIGNMENT) * ALIGNMENT + x.storage_offset() * x.element_size() % ALIGNMENT
            ctypes.memmove(begin, x.data_ptr(), span)
            self.begin[name] = begin
            rows.append(_Array(begin, begin + span, x.element_size(), 0, name.encode()))
            place = begin + span
        self.arrays = (_Array * len(rows))(*rows)

    def copy_back(self) -> None:
        for array, x in zip(self.arrays, self.tensors.values(), strict=True):
            if array.stored:
                ctypes.memmove(x.data_ptr(), array.begin, array.end - array.begin)


def _span(x: Tensor) -> int:
    """Bytes from a tensor's first number to its last."""
    if x.device.type != "cpu":
        raise KernelError(f"{x.device}: the emulator reads tensors on the CPU; call .cpu() first")
    if not x.numel():
        return 0
    return (sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()


# --- compiling ---


@functools.cache
def _compiled(source: str) -> ctypes.CDLL:
    """The source as a library, from the cache if this source has been compiled before."""
    kernels = KERNEL_NAME.findall(source)
    calls = "".join(CALL.format(name=name) for name in kernels)
    body = OPEN_SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(cpu::dynamic_shared);", source)
    text = f'{HEADER.read_text()}\n#line 1 "kernel.cu"\n{body}\n{calls}'
    library = build(text, OPTIONS)
    library.emulate.restype = ctypes.c_char_p
    library.recorded.restype = ctypes.c_void_p
    library.num_recorded.restype = ctypes.c_long
    return library
