"""Launches on a GPU: the source is compiled by NVRTC, which comes with torch for CUDA, once per specialisation.

The first launch of a specialisation compiles for a second or two; it must not be inside the capture of a CUDA graph.
"""

import ctypes
import functools
import re
from pathlib import Path

import torch

from minillm.errors import KernelError
from minillm.kernels.cuda.launches import THREADS, Launch, Specialisation

KERNEL_NAME = re.compile(r'extern "C" __global__ void (\w+)\(')


def run(launch: Launch) -> None:
    """Launch on the current stream of the GPU where the arguments are; returns without waiting."""
    device = next(iter(launch.arguments.values())).device
    with torch.cuda.device(device):
        kernel = _kernels(launch.specialisation, torch.cuda.current_device())[launch.kernel]
        arguments = list(launch.arguments.values())
        kernel(grid=launch.grid, block=(THREADS, 1, 1), args=arguments, shared_mem=launch.shared_bytes)


@functools.cache
def _kernels(specialisation: Specialisation, device: int) -> dict:
    """Name -> kernel, loaded on this GPU."""
    from torch.cuda._utils import _cuda_load_module

    major, minor = torch.cuda.get_device_capability(device)
    source = specialisation.source()
    return _cuda_load_module(compile_for_gpu(source, f"sm_{major}{minor}"), KERNEL_NAME.findall(source))


def compile_for_gpu(source: str, architecture: str) -> bytes:
    """The machine code (cubin) of the kernels in `source` for GPUs like "sm_90". Needs NVRTC, but no GPU.

    torch.cuda._compile_kernel is not used because it needs the headers of the CUDA toolkit.
    Raises KernelError without NVRTC, or with the compiler's messages.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    _check(
        nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"paged_attention.cu", 0, None, None)
    )
    try:
        options = (ctypes.c_char_p * 2)(f"--gpu-architecture={architecture}".encode(), b"--std=c++17")
        if nvrtc.nvrtcCompileProgram(program, len(options), options):
            log = _bytes(nvrtc, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise KernelError(f"NVRTC refuses the kernels for {architecture}: {log.decode(errors='replace')}")
        return _bytes(nvrtc, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC for torch's own CUDA version: beside torch, or the system's, or the toolkit's."""
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0] if torch.version.cuda else '13'}"
    beside_torch = Path(torch.__file__).parent.parent.glob(f"nvidia/*/lib/{name}")
    for path in (*beside_torch, Path("/usr/local/cuda/lib64", name), Path(name)):
        try:
            for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))  # NVRTC asks for it by name, and finds it if it is loaded already
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise KernelError(
        f"{name}, which compiles the CUDA C++ kernels, is not found; install nvidia-cuda-nvrtc or the CUDA toolkit, or "
        "use attention_backend='triton'"
    )


def _bytes(nvrtc: ctypes.CDLL, size_of, read, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, read(program, buffer))
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise KernelError(f"NVRTC: {nvrtc.nvrtcGetErrorString(result).decode()}")
