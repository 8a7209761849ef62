"""Runs the benchmark in a child process and, if that dies, continues with the remaining entries in a new one.

An illegal read in a kernel, a crash in a compiler or a hang ends the whole process. The record says which entry was
being measured; the next process skips it and measures the others.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from minillm.bench import recorded
from minillm.errors import ConfigError

DEVICE_LOST = 75  # exit code of a process whose device became unusable
LEAST_STALL = 120.0  # seconds
SHARE_OF_A_STALL = 0.5  # of the budget
POLL = 0.5  # seconds
START = 20.0  # seconds to load Python, torch and transformers in a new process


def supervise(argv: Sequence[str], file: Path, budget: float, resume: bool) -> int:
    """Measure with the options `argv` into `file`; the exit code of the last process.

    `budget`: seconds for all processes together. `resume`: the file already exists. A process that does not change the
    file for half of the budget, but at least two minutes, is assumed to hang and is killed.
    """
    end = time.perf_counter() + budget
    while True:
        before, left = num_entries(file), max(1.0, end - START - time.perf_counter())
        options = [*argv, "--json", str(file), "--budget", f"{left:.0f}", *["--resume"] * resume]
        code = run_child(child_command(options), file, max(LEAST_STALL, SHARE_OF_A_STALL * budget))
        if code != DEVICE_LOST and code >= 0:  # below 0: ended by a signal
            return code
        if num_entries(file) == before or time.perf_counter() > end:
            print(f"ended early: the process that measures ended with {code}", file=sys.stderr)
            return 1
        print(f"the process that measures ended with {code}; a new one continues", flush=True)
        resume = True


def child_command(options: Sequence[str]) -> list[str]:
    """The command line that measures in its own process."""
    return [sys.executable, "-m", "minillm.cli.main", "bench", "gpu", *options, "--unsupervised"]


def run_child(command: Sequence[str], file: Path, stall: float) -> int:
    """Run to the end, or until the file has not changed for `stall` seconds; the exit code."""
    sys.stdout.flush()
    changed, last = time.perf_counter(), modified(file)
    with subprocess.Popen(command) as child:
        while child.poll() is None:
            time.sleep(POLL)
            if modified(file) != last:
                changed, last = time.perf_counter(), modified(file)
            if time.perf_counter() - changed > stall:
                child.kill()
        return child.returncode


def modified(file: Path) -> int:
    """When the file was last written; 0 if it does not exist."""
    return file.stat().st_mtime_ns if file.exists() else 0


def num_entries(file: Path) -> int:
    """The number of entries in the record, failed ones included."""
    try:
        return count(recorded.read(file)["parts"])
    except ConfigError:
        return 0


def count(node: object) -> int:
    """The number of dictionaries inside a dictionary, at any depth."""
    return sum(1 + count(value) for value in node.values() if isinstance(value, dict))
