"""The most memory that a piece of code held at one moment, measured."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.errors import check_device

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class PeakMemory:
    """Measures the most bytes of tensors alive at one moment inside a `with` block, of those made inside it.

        with PeakMemory() as memory:
            model(token_ids, positions, attend)
        memory.peak_bytes

    On the CPU every operation of this thread is watched, and a tensor counts from when it is returned until its storage
    is freed; memory that a fused kernel allocates and frees inside itself is not seen. On CUDA it is the difference
    that the allocator reports.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = check_device("device", device)
        self.peak_bytes = 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._watch = _StorageWatch()
            self._watch.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._watch.__exit__(*error)
            self.peak_bytes = self._watch.peak


class _StorageWatch(TorchDispatchMode):
    """Sees every operation; adds the storages it makes, and subtracts them when they are freed."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0  # bytes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: True would import torch's compiler at the first operation, wasting a second and 100 MiB."""
        return False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), COMPOSITE):
            with self:  # einsum, for one, is several operations: watch each of them
                return operation._op_dk(COMPOSITE, *args, **kwargs)  # not `decompose`, whose matmul loads sympy
        known = {storage._cdata for storage in _storages((args, kwargs))}
        result = operation(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in known:  # neither a view of an argument nor the argument itself
                known.add(storage._cdata)
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._uncount, storage.nbytes()).atexit = False

    def _uncount(self, num_bytes: int) -> None:
        self.alive -= num_bytes


def _storages(nested) -> list[torch.UntypedStorage]:
    """Storages of all tensors in there, except packed weights, which show none and are never made in a pass."""
    leaves = [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn]
    return [leaf.untyped_storage() for leaf in leaves]
