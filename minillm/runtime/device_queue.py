"""Handing work to a device without waiting for it, and knowing when it got there.

A GPU carries out its work in order, and the caller goes on at once. `CudaQueue` is torch's current stream seen that
way. `HostQueue` is the same on a CPU, where work is done as it is handed over, in as many threads as there are free
cores (`FreeCores`).
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

LOOK_EVERY = 0.25  # seconds between looks at other processes; the system counts in hundredths
CALM_LOOKS = 2  # in a row, before steps use more cores again
TOLERATED = 0.3  # of a core that others may use
LEAST_WORK = 0.25  # of a core: a process that has used less since the last look has rested
STATISTICS = Path("/proc/stat")  # Linux's


class HostQueue:
    """Work is done when it is handed in; a mark is the time at that moment."""

    def __init__(self):
        self.cores = FreeCores()

    def run(self, work: Callable[[], None]) -> None:
        """Do this after everything handed in before."""
        with self.cores.as_threads():
            work()

    def mark(self) -> "Mark":
        """A place in the order of the work."""
        mark = Mark()
        self.run(mark.pass_by)
        return mark

    def wait(self, began: "Mark", ended: "Mark") -> tuple[float, float]:
        """Wait until the second mark has been passed; when both were, in seconds on time.perf_counter."""
        return began.passed_at, ended.passed_at


class Mark:
    """A place in the work of a `HostQueue`, and when it was passed."""

    passed_at = float("nan")

    def pass_by(self) -> None:
        """Note the time."""
        self.passed_at = time.perf_counter()


class FreeCores:
    """How many threads work is done in on a CPU: no more than there are cores that no other process uses.

    OpenMP's threads wait for each other after every product. If one of them has to wait for a core, all do: with other
    jobs on two cores, a step in two threads took 2 to 6 times as long as in one, whether they spin or sleep meanwhile.
    """

    def __init__(self):
        self._usable = math.inf  # cores, for work that begins now
        self._calm = 0  # looks in a row that found more
        self._seen = look()

    @contextmanager
    def as_threads(self) -> Iterator[None]:
        """Within this block torch and the kernels use a thread per free core, at most as many as torch had."""
        given = torch.get_num_threads()
        threads = given if given == 1 else int(min(given, self.usable()))
        if threads == given:
            yield
            return
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(given)

    def usable(self) -> float:
        """Cores, 1 at least, for work that begins now. Fewer as soon as others need cores, more once they are idle."""
        before = self._seen
        if before is not None and time.perf_counter() - before.time >= LOOK_EVERY:
            now = self._seen = look()
            seconds = now.time - before.time
            has_rested = now.own - before.own < seconds * LEAST_WORK
            others = (now.others - before.others) / seconds
            if has_rested:  # what they did meanwhile may be over: who needs a core now?
                others = min(now.running, look().running) - 1
            free = max(1, math.floor(len(own_cores()) - others + TOLERATED))
            self._calm = self._calm + 1 if free > self._usable else 0
            if has_rested or free < self._usable or self._calm == CALM_LOOKS:
                self._usable, self._calm = free, 0
        return self._usable


class Look(NamedTuple):
    """What the cores that this process may run on have done since the machine started."""

    time: float  # on time.perf_counter
    own: float  # seconds that they worked for this process
    others: float  # seconds that they worked for anything else
    running: int  # threads that run or wait for a core at this moment, on all cores, the caller among them


def look() -> Look | None:
    """What the cores have done. None where the system does not tell: all cores count as free then."""
    try:
        lines = STATISTICS.read_text().splitlines()
    except OSError:
        return None
    cores, ticks, running, own = own_cores(), 0, 1, time.process_time()
    for name, *counts in map(str.split, lines):
        if name in cores:
            user, nice, system, _, _, interrupts, soft_interrupts, stolen, *_ = map(int, counts)
            ticks += user + nice + system + interrupts + soft_interrupts + stolen
        elif name == "procs_running":
            running = int(counts[0])
    return Look(time.perf_counter(), own, ticks / os.sysconf("SC_CLK_TCK") - own, running)


def own_cores() -> set[str]:
    """Those that this process may run on, by their names in Linux's statistics."""
    return {f"cpu{number}" for number in os.sched_getaffinity(0)}


class Anchor(NamedTuple):
    """An event of the device whose time on time.perf_counter is known."""

    event: torch.cuda.Event
    time: float  # seconds


class CudaQueue:
    """The current stream of a CUDA device. Marks are events with times.

    An event tells only the time since another event. The first is timed with the device idle; then each one that is
    waited for times the next, because the difference is float32 milliseconds and long ones are coarse.
    """

    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.synchronize(device)
        event = self.mark()
        event.synchronize()
        self._anchor = Anchor(event, time.perf_counter())

    def run(self, work: Callable[[], None]) -> None:
        """Do the work now: what it launches comes after all that was launched before."""
        with on_device(self.device):
            work()

    def mark(self) -> torch.cuda.Event:
        """A place in the order of the work."""
        with on_device(self.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event

    def wait(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> tuple[float, float]:
        """Wait until the second mark has been passed; when both were, in seconds on time.perf_counter."""
        ended.synchronize()
        start, end = (self._anchor.time + self._anchor.event.elapsed_time(each) / 1e3 for each in (began, ended))
        self._anchor = Anchor(ended, end)
        return start, end


Queue = HostQueue | CudaQueue


def on_device(device: torch.device) -> AbstractContextManager:
    """Within this context Triton launches, and events and graphs are recorded, on this GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def queue_for(device: torch.device) -> Queue:
    """The queue of a device."""
    return CudaQueue(device) if device.type == "cuda" else HostQueue()
