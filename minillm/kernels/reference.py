"""Paged attention in plain torch: it runs everywhere, and faster kernels are compared with it.

The pool of one layer is [num_blocks, block_size, Hkv, D]; a token's *slot* is block * block_size + offset. Attention
gathers a request's blocks in the order of its block table and calls torch's fused attention on what it gathered.

There are two entries. `store_kv`, `decode` and `prefill` take block tables and lengths, like all backends, and read
only a request's own tokens. `prepare` is for a CPU without a compiler: masks and indices are made once per step for all
layers, and whole blocks are read. There masked numbers must be finite: 0 * NaN is NaN.

Measured on the CPU: many requests of one length in a single call are fastest as long as the gathered bytes fit the
second-level cache. Hence `groups_of`: neighbours in length together, GROUP_BYTES at most.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.attention import fused_attention, visible, zero_or_minus_infinity
from minillm.costs import blocks_needed
from minillm.kernels.checks import Limits, check_decode, check_prefill, check_store, output_for
from minillm.kernels.dispatch import AttentionInputs, Pool
from minillm.model import ModelConfig

LIMITS = Limits(
    kernels="the kernels in torch",
    instead="use one of those",
    devices=("cpu", "cuda"),
    dtypes=(torch.float32, torch.float64, torch.float16, torch.bfloat16),
)
READS_WHOLE_BLOCKS = True
GROUP_BYTES = 1 << 20  # of keys and values gathered at once, where the lengths are known
SLICE_BYTES = 1 << 26  # the same where they are on the device, and only the width of the block tables is known


# --- one signature for all backends ---


def store_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Write [T, Hkv, D] new keys and values into the pool of a layer, [N, block_size, Hkv, D], at [T] slots.

    A token whose slot is negative is padding: for it slot 0, in the null block, is rewritten unchanged.
    Raises KernelError for arguments that do not fit each other.
    """
    check_store(keys, values, slots, k, v, LIMITS)
    real, slots = (slots >= 0)[:, None, None], slots.clamp(min=0).long()
    for pool, new in ((keys, k), (values, v)):
        rows = pool.flatten(0, 1)  # [N * block_size, Hkv, D]
        rows.index_copy_(0, slots, torch.where(real, new, rows.index_select(0, slots)))


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    window: int | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """B requests with one new token each, [B, Hq, D] queries, read through [B, W] block tables -> [B, Hq, D].

    `lengths` [B]: keys each request has, the new token's included; 0 (padding) gives zeros. Only the last `window` are
    seen. What lies after a request's end, in its table and in its last block, may be anything. `out` is written if
    given. Raises KernelError for arguments that do not fit each other.
    """
    check_decode(q, keys, values, tables, lengths, window, LIMITS)
    out = output_for(q, out)
    row_bytes = 2 * tables.shape[1] * keys[:1].nbytes
    step = max(1, SLICE_BYTES // max(1, row_bytes))
    for first in range(0, len(q), step):
        rows = slice(first, first + step)
        out[rows] = _decode_rows(q[rows], keys, values, tables[rows], lengths[rows], window)
    return out


def prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    max_queries: int,
    window: int | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """New tokens of B requests, one after the other in [T, Hq, D], read through [B, W] block tables -> [T, Hq, D].

    Request b has rows query_starts[b] .. query_starts[b + 1] - 1 of q (`query_starts` [B + 1]), the last of its
    lengths[b] tokens. Each is computed by itself, so `max_queries` is not used. A query whose position would be
    negative is padding, as are rows of no request: they give zeros. `out` is written if given.
    Raises KernelError for arguments that do not fit each other.
    """
    check_prefill(q, keys, values, tables, query_starts, lengths, max_queries, window, LIMITS)
    if not len(tables):
        return output_for(q, out).zero_()
    row = torch.arange(len(q), device=q.device)
    request = torch.searchsorted(query_starts.long(), row, right=True) - 1  # [T]; B for rows after the last request
    inside = request < len(tables)
    request = request.clamp(max=len(tables) - 1)
    from_end = query_starts[1:].index_select(0, request) - row  # 1 for a request's last row
    seen = lengths.index_select(0, request) - from_end + 1
    seen = seen.clamp(min=0) * inside  # [T] keys up to each query's own
    return decode(q, keys, values, tables.index_select(0, request), seen, window, out=out)


def _decode_rows(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, window: int | None
) -> Tensor:
    block_size = keys.shape[1]
    seen = visible(lengths[:, None] - 1, tables.shape[1] * block_size, window)  # [B, 1, W * block_size]
    k, v = gather_kv(keys, values, tables * seen[:, 0].unflatten(-1, (-1, block_size)).any(-1))
    k, v = (x.masked_fill(~seen[..., None], 0) for x in (k, v))
    out = _one_query_each(q, k, v, zero_or_minus_infinity(seen, q.dtype)[:, None])
    return out.masked_fill((lengths < 1)[:, None, None], 0)


# --- with indices and masks made once per step: on a CPU, where lengths can be read ---


def prepare(inputs: AttentionInputs, pool: Pool, config: ModelConfig) -> "AttentionInputs | MaskedStep":
    """Masks and groups of a step, for all layers; on a GPU, where reading lengths would be a wait, the inputs."""
    return MaskedStep(inputs, pool, config) if inputs.slots.is_cpu else inputs


class Call(NamedTuple):
    """What every layer does once: some of the step's queries attend to the tokens in some blocks."""

    rows: Tensor | slice
    tables: Tensor  # [B, W] block tables
    masks: dict[int | None, Tensor]  # additive, one for each window there is


class MaskedStep:
    """A step's calls: requests with one new token in groups of similar length, then chunk by chunk.

    `mask_bytes`: the size of all masks.
    """

    def __init__(self, inputs: AttentionInputs, pool: Pool, config: ModelConfig):
        self.block_size, self.dtype = pool[0].shape[1], pool[0].dtype
        self.windows = {config.sliding_window(layer) for layer in range(config.num_hidden_layers)}
        self.group = config.num_attention_heads // config.num_key_value_heads  # query heads that share a key head
        self.block_bytes = 2 * pool[0][0].nbytes
        self.mask_bytes = 0
        self.decodes = list(self._decodes(inputs.decode_tables, inputs.decode_lengths.tolist()))
        self.chunks = list(self._chunks(inputs))

    def _decodes(self, tables: Tensor, lengths: list[int]) -> Iterator[Call]:
        order = sorted((row for row, length in enumerate(lengths) if length), key=lengths.__getitem__)  # no padding
        widths = [blocks_needed(lengths[row], self.block_size) for row in order]
        for first, end, width in groups_of(widths, self.block_bytes):
            rows = torch.tensor(order[first:end])
            positions = torch.tensor([lengths[row] - 1 for row in order[first:end]])
            masks = self._masks(positions[:, None, None], width)  # [B, 1, 1, W * block_size]
            yield Call(rows, tables.index_select(0, rows)[:, :width], masks)

    def _chunks(self, inputs: AttentionInputs) -> Iterator[Call]:
        starts = [inputs.num_decodes + start for start in inputs.chunk_starts.tolist()]
        for table, first, end, length in zip(
            inputs.chunk_tables, starts, starts[1:], inputs.chunk_lengths.tolist(), strict=False
        ):
            if length:
                positions = torch.arange(length - (end - first), length).repeat(self.group)[None, None]
                table = table[: blocks_needed(length, self.block_size)]
                masks = self._masks(positions, len(table))  # [1, 1, group * Tq, W * block_size]
                yield Call(slice(first, end), table[None], masks)

    def _masks(self, positions: Tensor, num_blocks: int) -> dict[int | None, Tensor]:
        masks = {
            window: zero_or_minus_infinity(visible(positions, num_blocks * self.block_size, window), self.dtype)
            for window in self.windows
        }
        self.mask_bytes += sum(mask.nbytes for mask in masks.values())
        return masks

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """[T, Hq, D] -> [T, Hq, D]; zeros for padding."""
        out = torch.zeros_like(q)
        for rows, tables, masks in self.decodes:
            found = _one_query_each(q.index_select(0, rows), *gather_kv(keys, values, tables), masks[window])
            out.index_copy_(0, rows, found)
        for rows, tables, masks in self.chunks:
            k, v = gather_kv(keys, values, tables)  # [1, Hkv, W * block_size, D]
            out[rows] = fused_attention(q[None, rows], k, v, masks[window])[0]
        return out


def gather_kv(keys: Tensor, values: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Through [B, W] block tables, keys and values in the order of the tokens, [B, Hkv, W * block_size, D] each."""
    chosen = tables.flatten()
    shape = (tables.shape[0], -1, *keys.shape[2:])
    k, v = keys.index_select(0, chosen).view(shape), values.index_select(0, chosen).view(shape)
    return k.transpose(1, 2), v.transpose(1, 2)


def _one_query_each(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[B, Hq, D] queries, [B, Hkv, K, D] keys and values, additive [B, 1, 1, K] -> [B, Hq, D].

    Query heads that share a key head are rows of one longer query.
    """
    q = q.unflatten(1, (k.shape[1], -1))  # [B, Hkv, group, D]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, -1, q.shape[2], -1))
    return out.flatten(1, 2)


class Group(NamedTuple):
    """Neighbouring rows whose requests are attended to in one call."""

    first: int
    end: int
    width: int  # blocks gathered of each: those of the longest


def groups_of(widths: Sequence[int], block_bytes: int) -> list[Group]:
    """Cut rows, in rising order of the blocks they read, into groups of at most GROUP_BYTES gathered.

    `block_bytes`: keys and values of a block in one layer. A request that is larger by itself is a group of its own.
    """
    groups, end = [], len(widths)
    while end > 0:
        width = max(1, widths[end - 1])
        first = max(0, end - max(1, GROUP_BYTES // (width * block_bytes)))
        groups.append(Group(first, end, width))
        end = first
    return groups[::-1]
