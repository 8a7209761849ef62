"""A rank's part of a model that several processes hold together: tensor parallelism (Shoeybi et al. 2019, Megatron-LM).

q, k, v, gate and up are cut by columns of their output, in whole heads, so that a rank attends and gates without the
others. o and down are cut by rows, and the results of the ranks are summed, twice per layer. The embedding and the
output head are cut by ids of the vocabulary. Every rank has the whole norms. If there are fewer key-value heads than
ranks, several ranks hold the same one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from minillm.errors import ConfigError
from minillm.model.config import ModelConfig


class Cut(NamedTuple):
    """Which of `whole` rows or columns of a matrix a rank holds."""

    whole: int
    part: slice


@dataclass(frozen=True)
class Shard:
    """Which part this process holds, and the two functions by which it talks to the other ranks.

    All ranks call them at the same places, in the same order. Every rank gets the same bits from them.
    """

    rank: int = 0
    size: int = 1
    add_up: Callable[[Tensor], Tensor] | None = None  # a term of a sum -> the sum over all ranks; may be in place
    gather: Callable[[Tensor], Tensor] | None = None  # [R, n] -> [R, size * n], the columns of rank 0 first

    def config_of(self, config: ModelConfig) -> ModelConfig:
        """The shape of a rank's layers. Raises ConfigError if the model cannot be cut into `size` parts."""
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, self.size
        whole = {"num_attention_heads": heads, "intermediate_size": config.intermediate_size}
        for name, number in whole.items():
            if number % size:
                raise ConfigError(f"tensor_parallel_size is {size}, which does not divide {name} = {number}")
        if kv_heads % size and size % kv_heads:
            raise ConfigError(
                f"tensor_parallel_size is {size}, but num_key_value_heads = {kv_heads}: one must be a multiple of the "
                "other, so that each rank holds whole heads, or several ranks the same one"
            )
        return replace(
            config,
            num_attention_heads=heads // size,
            num_key_value_heads=max(1, kv_heads // size),
            intermediate_size=config.intermediate_size // size,
        )

    # --- what is cut where ---

    def vocab_rows(self, vocab_size: int) -> int:
        """Rows of the embedding that a rank has room for; beyond the vocabulary's end they are zeros."""
        return -(-vocab_size // self.size)

    def vocab(self, vocab_size: int) -> Cut:
        """The ids whose rows this rank holds."""
        rows = self.vocab_rows(vocab_size)
        first, end = (min(rows * rank, vocab_size) for rank in (self.rank, self.rank + 1))
        return Cut(vocab_size, slice(first, end))

    def evenly(self, whole: int) -> Cut:
        """One of `size` equal parts."""
        part = whole // self.size
        return Cut(whole, slice(self.rank * part, (self.rank + 1) * part))

    def key_values(self, config: ModelConfig) -> Cut:
        """The columns of k, or v, of the heads that this rank's queries attend to."""
        heads = max(1, config.num_key_value_heads // self.size)
        first = self.rank * config.num_key_value_heads // self.size
        return Cut(config.key_value_size, slice(first * config.head_dim, (first + heads) * config.head_dim))

    def once(self, whole: int) -> Cut:
        """A term that a sum over the ranks needs once: all of it on the first rank, nothing on the others."""
        return Cut(whole, slice(0, 0 if self.rank else whole))

    # --- what is computed in parts ---

    def embed(self, embedding: nn.Embedding, token_ids: Tensor) -> Tensor:
        """[T] token ids of the whole vocabulary -> [T, hidden]."""
        num_rows = len(embedding.weight)
        rows = token_ids - self.rank * num_rows
        of_others = (rows < 0) | (rows >= num_rows)
        return self.add_up(embedding(rows.clamp(0, num_rows - 1)).masked_fill(of_others[:, None], 0))

    def summed(self, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A product with a matrix that is cut by rows -> the product with the whole."""
        return lambda x: self.add_up(product(x))


WHOLE = Shard()
