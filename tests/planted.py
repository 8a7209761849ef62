"""What the kernels' tests share: a module with a bug planted in its source, and the sizes that Triton compiles to."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType


def with_bug(module: ModuleType, right: str, wrong: str, folder: Path, count: int = 1) -> ModuleType:
    """The module with one of its expressions, which stands there `count` times, replaced."""
    source = Path(module.__file__).read_text()
    assert source.count(right) == count
    path = folder / "broken.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("broken", path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    return broken


def compiled(script: str) -> dict[str, list[str]]:
    """What a script that compiles kernels prints, without the interpreter: first word of a line -> its other words.

    Triton's compiler needs no GPU.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines()}
