"""Builds C++ into libraries that Python calls, with any compiler it finds, once per source.

Libraries are kept in ~/.cache/minillm/kernels (or below $XDG_CACHE_HOME), by source, flags and compiler.
"""

import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from minillm.errors import KernelError

NATIVE = ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",)


def build(text: str, options: Sequence[str], key: str = "") -> ctypes.CDLL:
    """The C++ source as a library, from the cache if it has been compiled before. `key`: what else it depends on.

    Raises KernelError if there is no compiler or it refuses the source.
    """
    command = [*compiler(), *options]
    name = hashlib.sha256("\0".join([*command, key, text]).encode()).hexdigest()[:24]
    path = _cache_folder() / f"{name}.so"
    if not path.exists():
        _compile(command, text, path)
    return ctypes.CDLL(str(path))


def compiler() -> list[str]:
    """The command that compiles C++. Raises KernelError where there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return [name]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]  # its c++ would first build the C++ library, for a minute
    raise KernelError(
        "no C++ compiler for the kernels: looked for $CXX, c++, g++ and clang++; install one, or pip install ziglang"
    )


def processor() -> str:
    """This machine's processor: code compiled only for it (`NATIVE`) must not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(command: list[str], text: str, path: Path) -> None:
    """Compile into a folder of its own: several processes may do so at once, and the last result stays."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, built = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(text)
        run = subprocess.run([*command, str(source), "-o", str(built)], capture_output=True, text=True)
        if run.returncode:
            raise KernelError(f"{' '.join(command)} refuses the kernels: {run.stderr.strip()}")
        built.replace(path)


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root, "minillm", "kernels")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
