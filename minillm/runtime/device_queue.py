"""Handing work to a device without waiting for it, and knowing when it got there.

A GPU works through what it is handed in order; whoever hands it over goes on at once. `CudaQueue` is torch's current
stream seen that way, `HostQueue` the same on a CPU, where handing over is doing.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch


class HostQueue:
    """Work is done when it is handed in; a mark is the time at that moment."""

    def run(self, work: Callable[[], None]) -> None:
        """Do this after everything handed in before."""
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


class Anchor(NamedTuple):
    """An event of the device whose time on time.perf_counter is known."""

    event: torch.cuda.Event
    time: float  # seconds


class CudaQueue:
    """The current stream of a CUDA device. Marks are events with times.

    An event knows only how long ago another one was. The first is timed with the device at rest; each one that is
    waited for then times the next, because a distance is float32 milliseconds and long ones are coarse.
    """

    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.synchronize(device)
        event = self.mark()
        event.synchronize()
        self._anchor = Anchor(event, time.perf_counter())

    def run(self, work: Callable[[], None]) -> None:
        """Hand the work in: whatever it launches comes after all that was launched before."""
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
    """Where Triton launches, and events and graphs are recorded: on this GPU, whichever the process used last."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def queue_for(device: torch.device) -> Queue:
    """The queue of a device."""
    return CudaQueue(device) if device.type == "cuda" else HostQueue()
