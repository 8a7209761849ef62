"""How much arithmetic and memory traffic a forward pass costs, counted from the shape alone.

A multiply-add counts as two operations (FLOP), as usual in the field. "Token-wise" is everything but attention:
the projections, the MLP and the output head. Predictions made here are lower bounds; the chapters put measurements
beside them. Source of the bounds: the roofline model (Williams, Waterman and Patterson 2009).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from minillm.costs.kv_bytes import kv_bytes_per_token
from minillm.costs.shapes import Card
from minillm.errors import ConfigError, Count, Positive, checked
from minillm.model import ModelConfig
from minillm.trace import StepEvent

MOST_STEPS = 2**20  # that `workload_seconds` computes one by one


@checked
def matmul_parameters(config: ModelConfig) -> int:
    """Weights that take part in a matrix product for every token: all layers' and, once, the output head's."""
    return num_layer_parameters(config) + config.vocab_size * config.hidden_size


@checked
def num_layer_parameters(config: ModelConfig) -> int:
    """Weights of the matrix products inside the layers, without the output head."""
    attention = config.hidden_size * (2 * config.query_size + 2 * config.key_value_size)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp)


@checked
def tokenwise_flops(config: ModelConfig, num_tokens: Count, num_logit_rows: Count = 1) -> int:
    """FLOP of the matrix products that treat tokens one by one; the output head runs for `num_logit_rows` of them."""
    head = config.vocab_size * config.hidden_size
    return 2 * num_tokens * num_layer_parameters(config) + 2 * num_logit_rows * head


@checked
def attention_flops(config: ModelConfig, score_entries: Count) -> int:
    """FLOP of QK^T and of weights times V over all layers and heads, for `score_entries` query-key pairs per head.

    A dense n x n pass has n^2 entries and costs 4 * n^2 * Hq * D per layer; a causal kernel that skips the upper
    triangle has n(n+1)/2.
    """
    return 4 * score_entries * config.query_size * config.num_hidden_layers


@checked
def naive_flops(config: ModelConfig, num_prompt_tokens: Count, num_output_tokens: Count) -> int:
    """FLOP of generating without a cache: pass i feeds all prompt + i tokens again, with dense scores."""
    begin, end = num_prompt_tokens, num_prompt_tokens + num_output_tokens
    tokens = sum_below(end) - sum_below(begin)
    squares = sum_of_squares_below(end) - sum_of_squares_below(begin)
    return tokenwise_flops(config, tokens, num_output_tokens) + attention_flops(config, squares)


@checked
def cached_flops(config: ModelConfig, num_prompt_tokens: Count, num_output_tokens: Count) -> int:
    """FLOP of generating with a KV cache: the prompt once, then one token per pass against all keys so far."""
    n, later = num_prompt_tokens, max(0, num_output_tokens - 1)  # passes after the prompt's
    prefill = tokenwise_flops(config, n) + attention_flops(config, n * n)
    return prefill + tokenwise_flops(config, later, later) + attention_flops(config, causal_entries(n, n + later))


class StepPrices(NamedTuple):
    """Seconds that a card needs at least for each part of a step; every time in this module is a sum of these.

    Token-wise part: the larger of reading the weights once and multiplying by them. Then attention: the larger of
    reading the cached keys and values and scoring them. For a single new token, scoring takes less time than reading; a
    prompt's scores are matrix products.
    """

    layers: float  # reading their weights, once per step
    head: float  # reading the output head's, in a step with logits
    token: float  # multiplying one token by the layers' weights
    logit_row: float  # the same by the head's
    key: float  # reading the keys and values of one token
    score: float  # one query-key pair per head

    @classmethod
    def of(cls, config: ModelConfig, card: Card, dtype_bytes: int) -> "StepPrices":
        """The prices of a model on a card, over all layers."""
        head = config.vocab_size * config.hidden_size
        return cls(
            layers=num_layer_parameters(config) * dtype_bytes / card.bandwidth,
            head=head * dtype_bytes / card.bandwidth,
            token=tokenwise_flops(config, 1, 0) / card.flops,
            logit_row=tokenwise_flops(config, 0, 1) / card.flops,
            key=kv_bytes_per_token(config, dtype_bytes) / card.bandwidth,
            score=attention_flops(config, 1) / card.flops,
        )

    def seconds(self, num_tokens: int, num_logit_rows: int, keys_read: int, score_entries: int) -> float:
        """Least time for one step; see `step_seconds`."""
        reading = self.layers + self.head if num_logit_rows else self.layers
        arithmetic = num_tokens * self.token + num_logit_rows * self.logit_row
        return max(reading, arithmetic) + max(keys_read * self.key, score_entries * self.score)


@checked
def step_seconds(
    config: ModelConfig,
    card: Card,
    num_tokens: Count,
    num_logit_rows: Count,
    cached_tokens: Count = 0,
    score_entries: Count = 0,
    dtype_bytes: Positive = 2,
) -> float:
    """Least time for one step, see `StepPrices`.

    `num_tokens` pass the layers and `num_logit_rows` of them the output head. The keys and values of `cached_tokens`
    are read, those of all requests summed and the step's own included; `score_entries` are query-key pairs per head.
    """
    prices = StepPrices.of(config, card, dtype_bytes)
    return prices.seconds(num_tokens, num_logit_rows, cached_tokens, score_entries)


@checked
def prefill_seconds(config: ModelConfig, card: Card, num_tokens: Count, dtype_bytes: Positive = 2) -> float:
    """Least time for the prompt's pass, with causal scores."""
    return step_seconds(config, card, num_tokens, 1, num_tokens, causal_entries(0, num_tokens), dtype_bytes)


@checked
def decode_seconds(
    config: ModelConfig, card: Card, context: Count, batch_size: Positive = 1, dtype_bytes: Positive = 2
) -> float:
    """Least time for one decode step of `batch_size` requests with `context` cached tokens each.

    Weights are read once for the whole batch or, with a large one, arithmetic takes longer; each request's cache is
    read besides.
    """
    contexts = batch_size * context
    return step_seconds(config, card, batch_size, batch_size, contexts, contexts, dtype_bytes)


@checked
def causal_entries(start: Count, end: Count) -> int:
    """Query-key pairs of the tokens at positions start .. end - 1, each of which sees itself and all before it."""
    if start > end:
        raise ConfigError(f"there are no tokens from {start} to {end}; use start <= end")
    return sum_below(end + 1) - sum_below(start + 1)


@checked
def workload_seconds(
    config: ModelConfig, card: Card, lengths: Iterable[tuple[Count, Positive]], dtype_bytes: Positive = 2
) -> float:
    """Least time for requests of (prompt, output) tokens if all run at once: the prompts, then decode step by step.

    The prompts' pass samples the first token of each; a request leaves with its last token. It is not checked whether
    their caches fit into the card's memory together.
    """
    longest = max((outputs for _, outputs in lengths), default=0)
    if not 1 <= longest <= MOST_STEPS:
        raise ConfigError(f"the longest of {len(lengths)} outputs has {longest} tokens; give 1 to {MOST_STEPS}")
    prices = StepPrices.of(config, card, dtype_bytes)
    entries = sum(causal_entries(0, prompt) for prompt, _ in lengths)
    prompts = sum(prompt for prompt, _ in lengths)
    seconds = prices.seconds(prompts, len(lengths), prompts, entries)
    for generated in range(1, longest):
        contexts = [prompt + generated for prompt, outputs in lengths if outputs > generated]
        seconds += prices.seconds(len(contexts), len(contexts), sum(contexts), sum(contexts))
    return seconds


@checked
def trace_seconds(config: ModelConfig, card: Card, steps: Iterable[StepEvent], dtype_bytes: Positive = 2) -> float:
    """Least time for the steps a run has taken, as they were batched there.

    More than `workload_seconds` by the cost of the batching: steps that were not full, recomputed tokens, weights read
    for prompts, and prompts' cached beginnings read once per chunk.
    """
    prices = StepPrices.of(config, card, dtype_bytes)
    return sum(
        prices.seconds(
            step.num_tokens,
            sum(part.num_sampled for part in step.scheduled),
            sum(part.end for part in step.scheduled),
            sum(causal_entries(part.start, part.end) for part in step.scheduled),
        )
        for step in steps
    )


@checked
def compute_bound_batch(card: Card, dtype_bytes: Positive = 2) -> int:
    """The smallest decode batch whose arithmetic takes at least as long as reading the weights: 2PB/F >= P*bytes/BW."""
    return math.ceil(card.flops * dtype_bytes / (2 * card.bandwidth))


def sum_below(n: int) -> int:
    """0 + 1 + ... + (n - 1)."""
    return n * (n - 1) // 2


def sum_of_squares_below(n: int) -> int:
    """0 + 1 + 4 + ... + (n - 1)^2."""
    return n * (n - 1) * (2 * n - 1) // 6
