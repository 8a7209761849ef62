"""Seconds of work on a device: from CUDA events on a GPU, otherwise from the wall clock."""

import time
from collections.abc import Callable

import torch

LEAST_REPEATS = 3
MOST_REPEATS = 200


def device_seconds(work: Callable[[], object], device: torch.device, seconds: float = 0.05) -> list[float]:
    """Seconds of each of several runs of `work`, which only launches: as many runs as fit into `seconds`, at least 3.

    It runs once before, and the first measured run begins on an idle device.
    """
    work()
    synchronize(device)
    once = _run(work, device)
    repeats = min(MOST_REPEATS, max(LEAST_REPEATS, int(seconds / max(once, 1e-9))))
    if device.type != "cuda":
        return [_run(work, device) for _ in range(repeats)]
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:  # all are launched before the first wait, so that the device is never idle
        begin.record()
        work()
        end.record()
    synchronize(device)
    return [begin.elapsed_time(end) / 1000 for begin, end in marks]


def _run(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work` as a CUDA graph, whose launch takes the host little time; on other devices `work` itself.

    It runs once before the capture, which must not contain compilation or first allocations.
    """
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
