"""The physical side of the paged cache: the pool's tensors, and moving whole blocks.

The block manager, above, decides which request has which block; this carries out the plans.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minillm.costs import blocks_needed, kv_bytes_per_token, pieces
from minillm.errors import ConfigError
from minillm.model import ModelConfig
from minillm.runtime.plan import BlockMove, ScheduledRequest
from minillm.sampling import to_device


class CacheEngine:
    """Pools of keys and values, [L, num_blocks, block_size, Hkv, D] each, and as many host blocks as asked for.

    Host blocks are lists of [L, block_size, Hkv, D]: a whole block lies together, so that it crosses in one copy.
    For a GPU they are pinned, so that the copy is asynchronous. Everything starts as zeros.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        num_host_blocks: int = 0,
    ):
        if num_blocks < 2 or block_size < 1 or num_host_blocks < 0:
            raise ConfigError(
                f"num_blocks {num_blocks}, block_size {block_size}, num_host_blocks {num_host_blocks}: no such pool; "
                "it needs the null block and one more, of 1 token or more"
            )
        block = (block_size, config.num_key_value_heads, config.head_dim)
        self.config = config
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (config.num_hidden_layers, num_blocks, *block)
        self.keys = zeros(shape, dtype, device)
        self.values = zeros(shape, dtype, device)
        self.layers = list(zip(self.keys, self.values, strict=True))  # of each layer, its two pools
        host_block = (config.num_hidden_layers, *block)
        self.host_keys = host_zeros(num_host_blocks, host_block, dtype, device)
        self.host_values = host_zeros(num_host_blocks, host_block, dtype, device)

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values that a block holds, over all layers."""
        return kv_bytes_per_token(config, dtype.itemsize) * block_size

    @property
    def num_bytes(self) -> int:
        """Bytes of the pool on the device, used or not."""
        return self.keys.nbytes + self.values.nbytes

    # --- whole blocks ---

    def move(self, move: BlockMove) -> None:
        """Copy whole blocks, in all layers. On a GPU, in the order of its stream and without waiting."""
        for pool, host in ((self.keys, self.host_keys), (self.values, self.host_values)):
            if move.kind == "swap_in":
                shape = (len(move.sources), len(pool), *pool.shape[2:])
                blocks = torch.empty(shape, dtype=pool.dtype, device=pool.device)
                for block, source in zip(blocks, move.sources, strict=True):
                    block.copy_(host[source], non_blocking=True)
            else:
                blocks = pool.index_select(1, to_device(move.sources, pool.device)).transpose(0, 1)  # [n, L, ...]
            if move.kind == "swap_out":
                for block, target in zip(blocks.contiguous(), move.targets, strict=True):
                    host[target].copy_(block, non_blocking=True)
            else:
                pool.index_copy_(1, to_device(move.targets, pool.device), blocks.transpose(0, 1))

    def clear(self, part: ScheduledRequest, table: Sequence[int]) -> None:
        """Zero the blocks that this part added to the request's table, where nothing is stored yet.

        A kernel that masks reads whole blocks, and their last owners may have left values there that are not finite.
        """
        first, num_stored = divmod(part.start, self.block_size)
        if num_stored and first >= part.first_block:  # shared until now, or swapped in
            for pool in (self.keys, self.values):
                pool[:, table[first], num_stored:] = 0
        first = max(part.first_block, blocks_needed(part.start, self.block_size))
        new_blocks = table[first : part.first_block + len(part.block_ids)]
        if new_blocks:
            for pool in (self.keys, self.values):
                pool.index_fill_(1, to_device(new_blocks, pool.device), 0)


def host_zeros(num_blocks: int, block: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """Blocks of zeros in host memory, pinned if `device` is a GPU."""
    if torch.device(device).type != "cuda":
        return list(zeros((num_blocks, *block), dtype, "cpu"))
    sizes = pieces(num_blocks, math.prod(block) * dtype.itemsize)
    return [each for size in sizes for each in torch.zeros((size, *block), dtype=dtype, pin_memory=True)]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor of zeros. On the CPU a page takes memory only when it is written; torch.zeros writes all pages."""
    if torch.device(device).type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
