"""Processes of the operating system: which one a number means, what a process has started, and its end.

Without torch: the process that watches another one stays small.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

FAMILY_EVERY = 0.5  # seconds between looks at what a process has started
FAREWELL = 3.0  # seconds in which what a lost process had started may end by itself


def is_gone(pid: int, start: int) -> bool:
    """Whether the process with this id that started then has ended; another process may have its id now."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is another user's
        pass
    return start_of(pid) != start


def start_of(pid: int) -> int:
    """When a process started, in clock ticks since the machine did; 0 if it has ended, and without /proc."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])  # field 22 of proc(5); the second, a name, may hold spaces


def end_family_with(parent: int) -> None:
    """The life of a process beside `parent`, its child: when `parent` is gone, whatever it had started is ended.

    Ray's own agents may outlive a Ray whose starter was killed. A number that another process has meanwhile is left.
    """
    family: dict[int, int] = {}  # process -> when it started
    while os.getppid() == parent:
        family.update((pid, start_of(pid)) for pid in descendants(parent) - {os.getpid()})
        time.sleep(FAMILY_EVERY)
    for pid in list(family):  # what these have started since the last look
        family.update((each, start_of(each)) for each in descendants(pid))
    time.sleep(FAREWELL)
    for pid, start in family.items():
        if start and start_of(pid) == start:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> set[int]:
    """The processes that `pid` has started, and those that these have; none without /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found, waiting = set(), [pid]
    while waiting:
        waiting.extend(set(new := children.get(waiting.pop(), [])) - found)
        found.update(new)
    return found
