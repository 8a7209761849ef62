"""How much memory a forward pass needs besides weights and cache: measured while it runs, and calculated beforehand.

The calculation knows two moments of a layer at which most is alive: in attention, the table of scores; in the MLP, its
wide middle. Layers run one after the other, so a deep model needs no more at its peak than a shallow one.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.config import ModelConfig
from minillm.errors import ConfigError, Positive, check_device, checked

MASK_BYTES = 1  # a bool
SCORE_TABLES = 3  # `attention_weights` holds three at once: scores, masked scores, and the softmax of these


class PeakMemory:
    """Measures the most bytes of tensors alive at one moment inside a `with` block, of those made inside it.

        with PeakMemory() as memory:
            model(token_ids, positions, attend)
        memory.peak_bytes

    On the CPU every operation of this thread is watched, and a tensor counts from when it is returned until its
    storage is freed; what a fused kernel allocates and frees inside itself is not seen. On CUDA it is the difference
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
    """Sees every operation; counts the storages it makes, and uncounts them when they die."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0  # bytes

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation._can_decompose():  # einsum, for one, is several operations: watch each of them
            with self:
                result = operation.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
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
    """Of all tensors in there, but for packed weights, which show no storage and are never made in a pass."""
    leaves = [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn]
    return [leaf.untyped_storage() for leaf in leaves]


@dataclass(frozen=True)
class ActivationBytes:
    """What one chunk needs besides weights and cache, in bytes. Either attention or the MLP is the peak, never both."""

    attention_tokens: int  # token-wise: the stream, queries, keys and values of the chunk's tokens
    scores: int  # tables of chunk x keys scores, and keys repeated for them; 0 in a fused kernel
    mask: int  # one bool a query-key pair; 0 in a fused kernel
    mlp_tokens: int  # token-wise: the stream and the wide middle of the MLP

    @property
    def attention(self) -> int:
        """Alive at once in attention."""
        return self.attention_tokens + self.scores + self.mask

    @property
    def total(self) -> int:
        """The peak: the larger of the two moments."""
        return max(self.attention, self.mlp_tokens)


@checked
def activation_bytes(
    config: ModelConfig, chunk_size: Positive, num_keys: Positive, dtype_bytes: Positive = 2, *, fused: bool = False
) -> ActivationBytes:
    """Bytes a pass over `chunk_size` tokens needs when they look at `num_keys` tokens, their own included.

    By default for the readable kernel, `masked_attention`. `fused` is for a kernel that never writes a table of scores
    to memory (FlashAttention, Dao et al. 2022). Norms and the few rows of logits are left out.
    Raises ConfigError for a chunk of no tokens, more tokens than keys, or bytes below 1.
    """
    if chunk_size > num_keys:
        raise ConfigError(f"a chunk of {chunk_size} tokens looks at {num_keys} keys; use 1 <= chunk_size <= num_keys")
    stream = 2 * config.hidden_size  # the residual stream and its normalised copy
    projected = config.query_size + 2 * config.key_value_size
    rotated = config.query_size + config.key_value_size
    middle = 4 * config.intermediate_size  # gate, up, silu(gate), and the product
    scores = SCORE_TABLES * config.num_attention_heads * chunk_size * num_keys + num_keys * config.query_size
    return ActivationBytes(
        attention_tokens=chunk_size * (stream + projected + rotated) * dtype_bytes,
        scores=0 if fused else scores * dtype_bytes,
        mask=0 if fused else chunk_size * num_keys * MASK_BYTES,
        mlp_tokens=chunk_size * (stream + middle) * dtype_bytes,
    )


@checked
def chunk_that_fits(
    config: ModelConfig, free_bytes: int, num_prompt_tokens: Positive, dtype_bytes: Positive = 2, *, fused: bool = False
) -> int:
    """The whole prompt if it fits in one pass, else the largest power of two whose last, dearest chunk fits.

    `free_bytes` is what is left beside the weights *and the cache of the whole prompt*: chunking makes neither smaller.
    Raises ConfigError if there is no prompt, or not even chunks of one token fit.
    """
    powers = [2**power for power in range(num_prompt_tokens.bit_length()) if 2**power < num_prompt_tokens]
    for chunk_size in [num_prompt_tokens, *reversed(powers)]:
        if activation_bytes(config, chunk_size, num_prompt_tokens, dtype_bytes, fused=fused).total <= free_bytes:
            return chunk_size
    least = activation_bytes(config, 1, num_prompt_tokens, dtype_bytes, fused=fused).total
    raise ConfigError(
        f"chunks of a single token need {least:,} bytes beside weights and cache, {free_bytes:,} are free; "
        "shorten the prompt, use a smaller model, or free memory"
    )


def to_device(numbers: Sequence[float], device: torch.device | str, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """[n] on the device. A GPU gets them from pinned memory, in its stream: nobody waits for it here."""
    host = torch.tensor(list(numbers), dtype=dtype, pin_memory=torch.device(device).type == "cuda")
    return host.to(device, non_blocking=True)
