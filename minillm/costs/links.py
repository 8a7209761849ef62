"""What several cards must tell each other when they hold one model together, and how long the link between them takes.

The cut is Megatron's (Shoeybi et al. 2019, "Megatron-LM"): two sums over all cards per layer, of one vector per token.
The sum is taken in a ring (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations"). Like all times here these are the least: nothing is lost to kernels, and nothing overlaps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from minillm.costs.roofline import decode_seconds, step_seconds
from minillm.costs.shapes import Card
from minillm.errors import ConfigError, Count, Positive, check_fields, checked
from minillm.model import ModelConfig, Shard

SUMS_PER_LAYER = 2  # behind the attention's output matrix, and behind the MLP's


@dataclass(frozen=True)
class Link:
    """What joins two cards: bytes per second in one direction, and seconds before the first byte of a message comes."""

    name: str
    bandwidth: float
    latency: float

    def __post_init__(self):
        check_fields(self)
        if self.bandwidth <= 0 or self.latency < 0:
            raise ConfigError(f"link {self.name!r} needs a bandwidth above 0 and a latency of at least 0")


# Bandwidths are data-sheet numbers, halved where the sheet counts both directions. No sheet has latencies: they are
# assumed, for the first two in the order of what NCCL assumes when it chooses an algorithm (its file tuning.cc).
NVLINK_3 = Link("NVLink", 300e9, 4e-6)  # an A100's twelve links: 600 GB/s
PCIE_4 = Link("PCIe 4", 32e9, 5e-6)  # 16 lanes: 64 GB/s
ETHERNET_100G = Link("Ethernet", 12.5e9, 25e-6)  # 100 Gbit/s, TCP
LINKS = (NVLINK_3, PCIE_4, ETHERNET_100G)  # those that chapters compare


@checked
def all_reduce_bytes(config: ModelConfig, num_tokens: Count = 1, dtype_bytes: Positive = 2) -> int:
    """Bytes of the vectors that are summed over the cards in a pass of `num_tokens`, all layers together.

    Left out: the sum of the embeddings, and the gathering of the sampled rows' logits, each once per pass.
    """
    return SUMS_PER_LAYER * config.num_hidden_layers * num_tokens * config.hidden_size * dtype_bytes


@checked
def all_reduce_seconds(num_bytes: Count, num_ranks: Positive, link: Link) -> float:
    """Seconds until each of `num_ranks` cards has the sum of vectors of `num_bytes`, in a ring.

    2 (n - 1) rounds: each vector is cut into n pieces, and in a round each card sends one piece to its neighbour.
    """
    return 2 * (num_ranks - 1) * (link.latency + num_bytes / num_ranks / link.bandwidth)


@checked
def tensor_parallel_seconds(
    config: ModelConfig,
    card: Card,
    link: Link,
    num_ranks: Positive,
    num_tokens: Count,
    num_logit_rows: Count,
    cached_tokens: Count = 0,
    score_entries: Count = 0,
    dtype_bytes: Positive = 2,
) -> float:
    """Least time for one step of a model that `num_ranks` cards hold together; see `step_seconds`.

    A card's part of the step, then the sums one after another. Raises ConfigError if the model cannot be cut so.
    """
    shard = Shard(size=num_ranks)
    part = replace(shard.config_of(config), vocab_size=shard.vocab_rows(config.vocab_size), num_tokens=None)
    computing = step_seconds(part, card, num_tokens, num_logit_rows, cached_tokens, score_entries, dtype_bytes)
    num_sums = SUMS_PER_LAYER * config.num_hidden_layers
    return computing + num_sums * all_reduce_seconds(num_tokens * config.hidden_size * dtype_bytes, num_ranks, link)


@checked
def tensor_parallel_pays_up_to(
    config: ModelConfig, card: Card, link: Link, context: Count, num_ranks: Positive = 2, most: Positive = 4096
) -> int:
    """The largest decode batch up to which `num_ranks` cards are faster with one model than with a replica each.

    Replicas share the batch. 0 if tensor parallelism is slower already at `num_ranks` requests, at most `most`.
    """

    def gains(share: int) -> bool:
        batch = share * num_ranks
        keys = batch * context
        together = tensor_parallel_seconds(config, card, link, num_ranks, batch, batch, keys, keys)
        return together < decode_seconds(config, card, context, share)

    return num_ranks * _last(gains, most // num_ranks)


def _last(holds: Callable[[int], bool], most: int) -> int:
    """The last number from 1 on up to which it holds, 0 if not even for 1."""
    return next((number - 1 for number in range(1, most + 1) if not holds(number)), most)
