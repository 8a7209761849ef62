"""Where the memory of an engine goes, and how many blocks of cache that leaves room for.

A worker loads the weights and measures the worst step (`MemoryProfile`); `plan_cache` turns that into a
`MemoryLedger`, which always adds up. vLLM sizes its cache the same way (Kwon et al. 2023, PagedAttention).
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from minillm.costs.kv_bytes import blocks_needed, kv_bytes_per_token
from minillm.errors import ConfigError, Count, OutOfMemoryError, Positive, check_fields, check_number, checked
from minillm.model import ModelConfig

CPU_MEMORY_SHARE = 0.5  # of the memory available beside the weights; the rest is for other programs
CPU_POOL_BYTES = 4 * 2**30  # the largest pool in the machine's memory unless a size is given
ROOM_FOR_PREFIXES = 2  # on a card the pool has at most this many times what running requests use, to cache prefixes
NULL_BLOCKS = 1  # the block that stands for padding
HOST_SHARE = 0.25  # of the machine's available memory goes to swapped blocks at most, unless they are asked for
PINNED_PIECE = 2**28  # bytes of one piece of pinned memory: torch rounds each up to a power of two
MIB = 2**20
CGROUP = Path("/sys/fs/cgroup")  # a container's own limits


class MemoryProfile(NamedTuple):
    """What a worker measured after loading its weights; all sizes in bytes."""

    weights: int
    activations: int  # peak of the worst step beside weights, cache and masks
    masks: int  # of the worst step
    bytes_per_block: int  # keys and values of one block in all layers
    available: int  # what can still be allocated where the model runs
    host_available: int  # the same of the machine's own memory; on the CPU the same number
    card_bytes: int | None = None  # the whole card; None on the CPU
    num_ranks: int = 1  # that share the model; the sizes are per rank

    @classmethod
    def worst(cls, profiles: Sequence["MemoryProfile"]) -> "MemoryProfile":
        """One profile that is safe for every worker: the largest needs beside the least memory."""
        weights, activations, masks, block, available, host_available, *_ = zip(*profiles, strict=True)
        needed = map(max, (weights, activations, masks, block))
        return cls(*needed, min(available), min(host_available), profiles[0].card_bytes, profiles[0].num_ranks)

    @property
    def on_cpu(self) -> bool:
        """True if cache and swapped blocks come from the same memory."""
        return self.card_bytes is None

    def budget(self, gpu_memory_utilization: float) -> int:
        """Bytes an engine may use, weights included.

        On a card, `gpu_memory_utilization` of it, less what other programs hold; on the CPU, the weights and
        CPU_MEMORY_SHARE of what is available beside them.
        """
        if self.on_cpu:
            return self.weights + int(self.available * CPU_MEMORY_SHARE)
        return self.weights + self.available - (self.card_bytes - int(self.card_bytes * gpu_memory_utilization))

    def room(self, total: int) -> int:
        """Bytes of a budget that are left for the cache; 0 if even weights and activations do not fit."""
        return max(0, total - self.weights - self.activations - self.masks)


@dataclass(frozen=True)
class MemoryLedger:
    """The budget of an engine and what it is spent on; sizes in bytes. `str(ledger)` is the table printed at start."""

    total: int  # the budget
    weights: int
    activations: int  # peak of the worst step beside weights, cache and masks
    masks: int  # of the worst step
    bytes_per_block: int  # keys and values of one block in all layers
    num_blocks: int  # of the pool, the null block included
    block_size: int  # tokens per block
    num_host_blocks: int = 0  # for requests that are swapped out
    host_is_budget: bool = True  # the host blocks are paid from this budget: the model runs on the CPU
    num_ranks: int = 1  # that share the model; budget and sizes are per rank

    @property
    def cache(self) -> int:
        """Bytes of the pool."""
        return self.num_blocks * self.bytes_per_block

    @property
    def host_blocks(self) -> int:
        """Bytes of the host blocks, wherever they are; beside a card, the bytes allocated for them."""
        return host_bytes(self.num_host_blocks, self.bytes_per_block, pinned=not self.host_is_budget)

    @property
    def swap(self) -> int:
        """Bytes of this budget that the host blocks take; 0 beside a card."""
        return self.host_blocks if self.host_is_budget else 0

    @property
    def free(self) -> int:
        """What is left of the budget."""
        return self.total - sum(self.spent.values())

    @property
    def spent(self) -> dict[str, int]:
        """Name -> bytes of everything except the free part."""
        return {
            "weights": self.weights,
            "cache": self.cache,
            "swapped blocks": self.swap,
            "activations": self.activations,
            "masks": self.masks,
        }

    def check(self) -> None:
        """Raises OutOfMemoryError, which names the items, if more is spent than there is."""
        if self.free < 0:
            posts = ", ".join(f"{name} {mib(size)}" for name, size in self.spent.items() if size)
            raise OutOfMemoryError(
                f"{self.num_blocks} blocks do not fit: {posts} are {mib(self.total - self.free)} together; there are "
                f"{mib(self.total)}; lower num_blocks, num_host_blocks or max_num_batched_tokens, or free memory"
            )

    def __str__(self) -> str:
        where = "" if self.host_is_budget else f", {mib(self.host_blocks)} of host memory"
        notes = {"cache": f"{self.num_blocks:,} blocks of {self.block_size} tokens"}
        if self.num_host_blocks:
            notes["swapped blocks"] = f"{self.num_host_blocks:,} blocks{where}"
        posts = [(name, size) for name, size in self.spent.items() if size or name in notes]
        lines = [_line(f"  {name}", size, self.total, notes.get(name, "")) for name, size in posts]
        ranks = f"of each of {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        lines.insert(0, _line("memory", self.total, self.total, ranks))
        return "\n".join([*lines, _line("  free", self.free, self.total)])


def _line(name: str, size: int, total: int, note: str = "") -> str:
    return f"{name:<17}{mib(size):>15} {size / total:>7.1%}  {note}".rstrip()


def mib(size: int) -> str:
    """Bytes in MiB: 5242880 -> "5.0 MiB"."""
    return f"{size / MIB:,.1f} MiB"


# --- how many blocks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheLimits:
    """What the memory plan reads: how large the pool is to be."""

    max_num_seqs: Positive = 64  # requests that run at the same time
    max_model_len: Positive = 2048  # prompt and output tokens of one request
    block_size: Positive = 16  # tokens in a block of the cache
    num_blocks: Annotated[int, 2] | None = None  # the whole pool, with its null block; None = see `plan_cache`
    num_host_blocks: Count | None = 0  # for requests that are swapped out; None = see `plan_cache`
    gpu_memory_utilization: float = 0.9  # share of a card's memory that weights, activations and cache may take

    def __post_init__(self):
        check_fields(self)
        self.check_pool()

    def check_pool(self) -> None:
        """Raises ConfigError for an impossible share, or a pool smaller than the longest request."""
        utilization = self.gpu_memory_utilization
        check_number("gpu_memory_utilization", utilization, "a share of the card, in (0, 1]", lambda u: 0 < u <= 1)
        if self.num_blocks is not None and self.num_blocks < self.least_blocks:
            raise ConfigError(
                f"num_blocks is {self.num_blocks}, but one request of max_model_len = {self.max_model_len} tokens "
                f"needs {self.least_blocks}: {self.blocks_per_request} blocks of {self.block_size} tokens and the null "
                f"block; raise num_blocks to {self.least_blocks} or lower max_model_len"
            )

    @property
    def blocks_per_request(self) -> int:
        """Blocks of the longest request."""
        return blocks_needed(self.max_model_len, self.block_size)

    @property
    def least_blocks(self) -> int:
        """The smallest pool in which every request can run: the longest one by itself."""
        return self.blocks_per_request + NULL_BLOCKS

    def most_blocks(self, profile: MemoryProfile) -> int:
        """The largest pool by default.

        On the CPU, whose memory other programs use too: room for all running requests at their longest, CPU_POOL_BYTES
        at most, but always for one request. On a card, as much again for prefixes.
        """
        running = self.max_num_seqs * self.blocks_per_request + NULL_BLOCKS
        if profile.on_cpu:
            return max(self.least_blocks, min(running, CPU_POOL_BYTES // profile.bytes_per_block))
        return ROOM_FOR_PREFIXES * self.max_num_seqs * self.blocks_per_request + NULL_BLOCKS


def plan_cache(profile: MemoryProfile, limits: CacheLimits) -> MemoryLedger:
    """How many blocks the engine gets: `limits.num_blocks`, or as many as the budget holds, `most_blocks` at most.

    A given number of blocks may take all that is available. There are as many host blocks as blocks in the pool unless
    their number is given, but no more than HOST_SHARE of the available memory holds. Raises OutOfMemoryError, before
    the pool is allocated, if the given number does not fit, or if not even one request of `max_model_len` fits.
    """
    if limits.num_blocks is None:
        total = profile.budget(limits.gpu_memory_utilization)
        num_blocks = min(limits.most_blocks(profile), _blocks_that_fit(profile, limits, total))
        if num_blocks < limits.least_blocks:
            raise OutOfMemoryError(_too_small(profile, limits, total, num_blocks))
    else:
        total, num_blocks = profile.weights + profile.available, limits.num_blocks
    ledger = MemoryLedger(
        total=total,
        weights=profile.weights,
        activations=profile.activations,
        masks=profile.masks,
        bytes_per_block=profile.bytes_per_block,
        num_blocks=num_blocks,
        block_size=limits.block_size,
        num_host_blocks=_host_blocks(profile, num_blocks) if limits.num_host_blocks is None else limits.num_host_blocks,
        host_is_budget=profile.on_cpu,
        num_ranks=profile.num_ranks,
    )
    ledger.check()
    _check_host(profile, ledger)
    return ledger


def _blocks_that_fit(profile: MemoryProfile, limits: CacheLimits, total: int) -> int:
    blocks = profile.room(total) // profile.bytes_per_block
    if not profile.on_cpu:
        return blocks
    if limits.num_host_blocks is None:  # each block of the pool brings one for swapping
        return blocks // 2
    return max(0, blocks - limits.num_host_blocks)


def _host_blocks(profile: MemoryProfile, num_blocks: int) -> int:
    """As many as the pool has, or as many as fit in HOST_SHARE of the machine's memory."""
    share = int(profile.host_available * HOST_SHARE)
    sizes = range(num_blocks + 1)
    pinned = not profile.on_cpu
    return bisect_right(sizes, share, key=lambda number: host_bytes(number, profile.bytes_per_block, pinned)) - 1


def host_bytes(num_blocks: int, bytes_per_block: int, pinned: bool) -> int:
    """Bytes of `num_blocks` host blocks in the machine's memory: keys and values apart, and if pinned, in `pieces`."""
    if not pinned:
        return num_blocks * bytes_per_block
    half = bytes_per_block // 2
    return 2 * sum(1 << (number * half - 1).bit_length() for number in pieces(num_blocks, half))


def pieces(num_blocks: int, block_bytes: int) -> list[int]:
    """Blocks in each piece of pinned memory: one large piece could take twice what it holds, see PINNED_PIECE."""
    full = max(1, PINNED_PIECE // block_bytes)
    return [min(full, num_blocks - first) for first in range(0, num_blocks, full)]


def _too_small(profile: MemoryProfile, limits: CacheLimits, total: int, num_blocks: int) -> str:
    share = f"gpu_memory_utilization = {limits.gpu_memory_utilization} of the card"
    if profile.on_cpu:
        share = f"the weights and {CPU_MEMORY_SHARE:.0%} of the available memory"
    return (
        f"a request of max_model_len = {limits.max_model_len} tokens needs a pool of {limits.least_blocks} blocks, "
        f"{mib(limits.least_blocks * profile.bytes_per_block)}; the budget of {mib(total)} ({share}) holds "
        f"{num_blocks} beside weights of {mib(profile.weights)}, activations of {mib(profile.activations)} and masks "
        f"of {mib(profile.masks)}; lower max_model_len or max_num_batched_tokens, or give it more memory"
    )


def _check_host(profile: MemoryProfile, ledger: MemoryLedger) -> None:
    """Swapped blocks beside a card come from the machine's own memory."""
    if not ledger.host_is_budget and ledger.host_blocks > profile.host_available:
        raise OutOfMemoryError(
            f"{ledger.num_host_blocks} host blocks need {mib(ledger.host_blocks)}, the machine has "
            f"{mib(profile.host_available)} available; lower num_host_blocks"
        )


# --- the machine -----------------------------------------------------------------------------------------------------


def available_memory() -> int:
    """Bytes of the machine's memory that can be allocated without swapping, within the limit of a container.

    All memory where the system does not tell (macOS). Raises ConfigError if it tells neither.
    """
    try:
        available = _kernel_number(Path("/proc/meminfo"), "MemAvailable:") * 1024
    except OSError:
        available = _physical_memory()
    try:
        limit = int((CGROUP / "memory.max").read_text())
        held = int((CGROUP / "memory.current").read_text()) - _kernel_number(CGROUP / "memory.stat", "inactive_file")
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available
    return max(0, min(available, limit - held))


def _kernel_number(path: Path, key: str) -> int:
    """The number after `key` in one of the kernel's tables. Raises OSError if there is none."""
    for line in path.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise OSError(f"{path} has no {key}")


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError) as error:
        raise ConfigError("this system does not tell how much memory it has; use Linux or macOS") from error


@dataclass(frozen=True)
class MemoryFit:
    """How a model and its cache share a card; all sizes in bytes."""

    card_bytes: int
    weight_bytes: int
    bytes_per_token: int
    reserved_bytes: int  # kept for activations and the framework

    @property
    def cache_bytes(self) -> int:
        """Bytes left for the cache, as an engine plans its memory; 0 if not even the weights fit."""
        sizes = {"weights": self.weight_bytes, "activations": self.reserved_bytes, "masks": 0, "host_available": 0}
        available, block = self.card_bytes - self.weight_bytes, self.bytes_per_token
        profile = MemoryProfile(**sizes, bytes_per_block=block, available=available, card_bytes=self.card_bytes)
        return profile.room(profile.budget(gpu_memory_utilization=1.0))

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values fit, over all requests together."""
        return self.cache_bytes // self.bytes_per_token

    @checked
    def num_requests(self, tokens_each: Positive) -> int:
        """Requests of `tokens_each` tokens (prompt and output) that fit at once."""
        return self.num_tokens // tokens_each


@checked
def what_fits(
    config: ModelConfig, card_bytes: Positive, *, dtype_bytes: Positive = 2, reserved_share: float = 0.1
) -> MemoryFit:
    """What a card of `card_bytes` holds of the model: weights, then as many tokens of cache as fit in the rest.

    `reserved_share` of the card is kept free for activations, as vLLM's gpu_memory_utilization = 0.9 does.
    Raises ConfigError if a size is not positive or the share is outside [0, 1).
    """
    check_number("reserved_share", reserved_share, "a share of the card, in [0, 1)", lambda share: 0 <= share < 1)
    return MemoryFit(
        card_bytes=card_bytes,
        weight_bytes=config.num_parameters * dtype_bytes,
        bytes_per_token=kv_bytes_per_token(config, dtype_bytes),
        reserved_bytes=int(card_bytes * reserved_share),
    )
