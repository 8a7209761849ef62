"""`minillm doctor`: a page on what this machine can run, and what to do about each "no".

A check returns what it found, or raises `Lacking` with advice. Any other exception is also a "no", because the page is
for machines on which anything may fail.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from minillm.errors import KernelError

LEAST_PYTHON = (3, 11)
LEAST_MEMORY = 2**30  # bytes: torch, a chapter and the storyteller
SIGNS = "–×→·…∞µ↓⇥∅↵⇤␣—←≤"  # beyond ASCII, in figures and in the names of tokens
SMALLEST = 'extern "C" __global__ void nothing() {}'


class Lacking(Exception):
    """Something is missing on this machine; with advice."""

    def __init__(self, found: str, advice: str):
        super().__init__(found)
        self.advice = advice


class Check(NamedTuple):
    """A line of the page."""

    name: str
    find: Callable[[], str]  # returns what was found; raises if it is missing or unusable
    needed: bool  # by the course; only then does a "no" make `minillm doctor` fail


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options."""


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print the page. Returns 1 if something that the course needs is missing, else 0."""
    answers = [answer(check) for check in CHECKS]
    for check, (is_there, text) in zip(CHECKS, answers, strict=True):
        print(f"{'yes' if is_there else 'no ':3}  {check.name:20}{text}")
    found = [is_there for is_there, _ in answers]
    missing = [check.name for check, is_there in zip(CHECKS, found, strict=True) if check.needed and not is_there]
    print(f"\nThe course cannot run without: {', '.join(missing)}." if missing else "\nThe course runs here.")
    return 1 if missing else 0


def answer(check: Check) -> tuple[bool, str]:
    """Whether the check succeeds, and its text for the page: a line, and after a "no" the advice."""
    try:
        return True, check.find()
    except Exception as error:
        found, advice = " ".join(str(error).split()), getattr(error, "advice", "run `make setup` again")
        if isinstance(error, KernelError):  # the advice follows the cause
            found, _, advice = found.partition("; ")
        return False, f"{found or type(error).__name__}\n{'':25}-> {advice}"


# --- needed by the course ---


def python() -> str:
    """Python's version."""
    version = sys.version.split()[0]
    if sys.version_info < LEAST_PYTHON:
        raise Lacking(version, "install Python 3.11 or newer, then: make setup PYTHON=python3.12")
    return version


def torch_version() -> str:
    """torch's version, if it can be imported and computes."""
    import torch

    assert torch.ones(2).sum() == 2
    return torch.__version__


def memory() -> str:
    """The free memory."""
    from minillm.costs import available_memory, mib

    free = available_memory()
    if free < LEAST_MEMORY:
        raise Lacking(f"{mib(free)} free", f"close something: a chapter may take {mib(LEAST_MEMORY)}")
    return f"{mib(free)} free"


def fonts() -> str:
    """The font of the figures, which must have all characters that they use."""
    from matplotlib import font_manager, rc_context

    from minillm.viz import STYLE

    with rc_context(STYLE):
        path = font_manager.findfont(font_manager.FontProperties(), fallback_to_default=False)
    missing = [sign for sign in SIGNS if ord(sign) not in font_manager.get_font(path).get_charmap()]
    if missing:
        raise Lacking(f"{path} lacks {' '.join(missing)}", "pip install --force-reinstall matplotlib, which brings one")
    return os.path.basename(path)


def shipped_model() -> str:
    """Load the storyteller."""
    from minillm.model import load_model

    model = load_model("storyteller").model
    return f"storyteller, {sum(each.numel() for each in model.parameters()):,} parameters"


# --- optional ---


def compiler() -> str:
    """The command that compiles C++: for the CPU's kernels and the emulation of the CUDA kernels."""
    from minillm.kernels import compiler as command

    return " ".join(command())


def cpu_kernels() -> str:
    """Whether the CPU's kernels compile."""
    return _backend("cpu", "float32", "cpu")


def cuda() -> str:
    """Each GPU, and the driver."""
    import torch

    from minillm.bench import driver_version

    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
        raise Lacking(
            f"torch, built for {built}, sees none",
            "no chapter needs one; for an NVIDIA GPU install its driver, and torch for CUDA (pytorch.org)",
        )
    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    free = [torch.cuda.mem_get_info(number)[0] / 2**30 for number in range(len(cards))]
    names = (f"{card.name} ({size:.1f} GiB free)" for card, size in zip(cards, free, strict=True))
    return f"{', '.join(names)}; driver {driver_version()}, CUDA {torch.version.cuda}"


def triton() -> str:
    """Triton's version, and on a GPU whether it can launch a kernel; without a GPU there is only its interpreter."""
    import torch

    if importlib.util.find_spec("triton") is None:
        raise Lacking("not installed", "chapter 9 skips its cells; on Linux x86_64: pip install -e '.[triton]'")
    version = importlib.metadata.version("triton")
    if not torch.cuda.is_available():
        return f"{version}, in its interpreter (there is no GPU to launch on)"
    return f"{version}; {_backend('triton', 'bfloat16', 'cuda')}"


def nvrtc() -> str:
    """Whether NVRTC compiles a kernel, which chapter 9 needs for CUDA C++ on a GPU."""
    from minillm.kernels import compile_for_gpu

    compile_for_gpu(SMALLEST, "sm_80")
    return "compiles CUDA C++"


def _backend(name: str, dtype: str, device: str) -> str:
    """Compile or launch the kernels of a backend. Raises KernelError with advice."""
    import torch

    from minillm.costs import QWEN3_0_6B
    from minillm.kernels import choose

    choose(name, QWEN3_0_6B, getattr(torch, dtype), device, 16)
    return "its kernels work"


CHECKS = (
    Check("Python", python, True),
    Check("torch", torch_version, True),
    Check("free memory", memory, True),
    Check("fonts of figures", fonts, True),
    Check("shipped model", shipped_model, True),
    Check("C++ compiler", compiler, False),
    Check("kernels for the CPU", cpu_kernels, False),
    Check("CUDA device", cuda, False),
    Check("Triton", triton, False),
    Check("NVRTC", nvrtc, False),
)
