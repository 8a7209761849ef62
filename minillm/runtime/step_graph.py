"""CUDA graphs: a step recorded once and replayed by one call, and how many requests each is recorded for.

A decode step is about ten kernels per layer, and launching one from Python takes longer than a small one runs. A graph
is the whole list, launched at once, with the addresses and shapes of the recording. So the inputs must lie where they
lay then, and a step of fewer requests is padded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minillm.runtime.device_queue import on_device

FINE_UP_TO = 16  # powers of two below, equal steps above
LEAST_STEP = 16  # padding rows are cheap while reading the weights dominates; a recording takes time and memory


def bucket_sizes(most: int) -> list[int]:
    """The numbers of requests that graphs are recorded for: 1, 2, 4, 8, 16, then every 16, up to `most` itself.

    Above 256 the distance is an eighth of the power of two below them: at most that share is padding.
    """
    sizes, size = [], 1
    while size < most:
        sizes.append(size)
        size += size if size < FINE_UP_TO else max(LEAST_STEP, (1 << size.bit_length() - 1) // 8)
    return [*sizes, most]


class HostGraph:
    """The CPU's twin of a graph: a replay calls the function again, on what lies in the same places."""

    def __init__(self, compute: Callable[[], Tensor]):
        self._compute = compute

    def replay(self) -> Tensor:
        """Returns what the function computes from what lies there now."""
        return self._compute()


class CudaGraph:
    """A recording of one call. Recordings that share a `pool` use the same memory: only one may be replayed at a time.

    The function must not wait for the device, and from the host it may use only what was known at the recording. It
    runs once before, so that kernels are compiled and libraries loaded outside the recording.
    """

    def __init__(self, compute: Callable[[], Tensor], pool: tuple[int, int]):
        compute()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = compute()

    def replay(self) -> Tensor:
        """Launch all that was recorded; returns its result, valid until the next replay of a graph of the pool."""
        self._graph.replay()
        return self._output


def record(computes: dict[int, Callable[[], Tensor]], device: torch.device) -> dict[int, HostGraph | CudaGraph]:
    """A graph for each size, smallest first. The largest is recorded first: the others fit in the memory it took."""
    if device.type == "cpu":
        return {size: HostGraph(computes[size]) for size in sorted(computes)}
    with on_device(device):
        pool = torch.cuda.graph_pool_handle()
        graphs = {size: CudaGraph(computes[size], pool) for size in sorted(computes, reverse=True)}
    return dict(sorted(graphs.items()))


def free_bytes(device: torch.device) -> int:
    """Bytes free on a GPU, after torch has returned its unused memory; 0 on a CPU, where it is not needed."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
