"""How much arithmetic and memory traffic a forward pass costs, counted from the shape alone.

A multiply-add counts as two operations (FLOP), the custom of the field. "Token-wise" is everything but attention:
the projections, the MLP and the output head. Predictions made here are lower bounds; the chapters put measurements
beside them. Source of the bounds: the roofline model (Williams, Waterman and Patterson 2009).
"""

import math
from collections.abc import Iterable

from minillm.config import ModelConfig
from minillm.kv_cache import kv_bytes_per_token
from minillm.shapes import Card
from minillm.trace import StepEvent


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that take part in a matrix product for every token: all layers' and, once, the output head's."""
    return num_layer_parameters(config) + config.vocab_size * config.hidden_size


def num_layer_parameters(config: ModelConfig) -> int:
    """Weights of the matrix products inside the layers, without the output head."""
    attention = config.hidden_size * (2 * config.query_size + 2 * config.key_value_size)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp)


def tokenwise_flops(config: ModelConfig, num_tokens: int, num_logit_rows: int = 1) -> int:
    """FLOP of the matrix products that treat each token alone; the output head runs for `num_logit_rows` of them."""
    head = config.vocab_size * config.hidden_size
    return 2 * num_tokens * num_layer_parameters(config) + 2 * num_logit_rows * head


def attention_flops(config: ModelConfig, score_entries: int) -> int:
    """FLOP of QK^T and of weights times V over all layers and heads, for `score_entries` query-key pairs a head.

    A dense n x n pass has n^2 entries and costs 4 * n^2 * Hq * D a layer; a causal kernel that skips the upper
    triangle has n(n+1)/2.
    """
    return 4 * score_entries * config.query_size * config.num_hidden_layers


def naive_flops(config: ModelConfig, num_prompt_tokens: int, num_output_tokens: int) -> int:
    """FLOP of generating without a cache: pass i feeds all prompt + i tokens again, with dense scores."""
    lengths = range(num_prompt_tokens, num_prompt_tokens + num_output_tokens)
    return sum(tokenwise_flops(config, n) + attention_flops(config, n * n) for n in lengths)


def cached_flops(config: ModelConfig, num_prompt_tokens: int, num_output_tokens: int) -> int:
    """FLOP of generating with a KV cache: the prompt once, then one token a pass against all keys so far."""
    n = num_prompt_tokens
    prefill = tokenwise_flops(config, n) + attention_flops(config, n * n)
    contexts = range(n + 1, n + num_output_tokens)  # keys seen by each later pass, its own included
    return prefill + sum(tokenwise_flops(config, 1) + attention_flops(config, keys) for keys in contexts)


def step_seconds(
    config: ModelConfig,
    card: Card,
    num_tokens: int,
    num_logit_rows: int,
    cached_tokens: int = 0,
    score_entries: int = 0,
    dtype_bytes: int = 2,
) -> float:
    """Least time for one step: the larger of reading the weights once and the arithmetic, and reading the cache.

    `num_tokens` pass the layers and `num_logit_rows` of them the output head. The keys and values of `cached_tokens`
    are read, those of all requests summed. `score_entries` query-key pairs a head count as arithmetic, for prompts,
    whose scores are matrix products; a single new token's are not counted: reading its cache takes longer.
    """
    head = config.vocab_size * config.hidden_size if num_logit_rows else 0
    reading = (num_layer_parameters(config) + head) * dtype_bytes / card.bandwidth
    flops = tokenwise_flops(config, num_tokens, num_logit_rows) + attention_flops(config, score_entries)
    cache = cached_tokens * kv_bytes_per_token(config, dtype_bytes) / card.bandwidth
    return max(reading, flops / card.flops) + cache


def prefill_seconds(config: ModelConfig, card: Card, num_tokens: int, dtype_bytes: int = 2) -> float:
    """Least time for the prompt's pass: the larger of its arithmetic (causal scores) and reading the weights once."""
    return step_seconds(config, card, num_tokens, 1, 0, causal_entries(0, num_tokens), dtype_bytes)


def decode_seconds(config: ModelConfig, card: Card, context: int, batch_size: int = 1, dtype_bytes: int = 2) -> float:
    """Least time for one decode step of `batch_size` requests with `context` cached tokens each.

    Weights are read once for the whole batch or, with a large one, arithmetic takes longer; each request's cache is
    read besides.
    """
    return step_seconds(config, card, batch_size, batch_size, batch_size * context, dtype_bytes=dtype_bytes)


def causal_entries(start: int, end: int) -> int:
    """Query-key pairs of the tokens at positions start .. end - 1, each of which sees itself and all before it."""
    return (end * (end + 1) - start * (start + 1)) // 2


def workload_seconds(
    config: ModelConfig, card: Card, lengths: Iterable[tuple[int, int]], dtype_bytes: int = 2
) -> float:
    """Least time for requests of (prompt, output) tokens if all run at once: the prompts, then decode step by step.

    The prompts' pass samples the first token of each; a request leaves with its last token. Whether their caches fit
    into the card's memory together is not asked.
    """
    lengths = list(lengths)
    entries = sum(causal_entries(0, prompt) for prompt, _ in lengths)
    prompts = sum(prompt for prompt, _ in lengths)
    seconds = step_seconds(config, card, prompts, len(lengths), 0, entries, dtype_bytes)
    for generated in range(1, max(outputs for _, outputs in lengths)):
        contexts = [prompt + generated for prompt, outputs in lengths if outputs > generated]
        seconds += step_seconds(config, card, len(contexts), len(contexts), sum(contexts), dtype_bytes=dtype_bytes)
    return seconds


def trace_seconds(config: ModelConfig, card: Card, steps: Iterable[StepEvent], dtype_bytes: int = 2) -> float:
    """Least time for the steps a run has taken, as they were batched there.

    More than `workload_seconds` by what the batching cost: steps that were not full, tokens computed again, weights
    read for prompts and prompts' cached beginnings read once a chunk.
    """
    seconds = 0.0
    for step in steps:
        chunks = [part for part in step.scheduled if part.num_tokens > 1]
        seconds += step_seconds(
            config,
            card,
            step.num_tokens,
            sum(part.num_sampled for part in step.scheduled),
            sum(part.end for part in step.scheduled if part.num_tokens == 1) + sum(part.start for part in chunks),
            sum(causal_entries(part.start, part.end) for part in chunks),
            dtype_bytes,
        )
    return seconds


def compute_bound_batch(card: Card, dtype_bytes: int = 2) -> int:
    """The smallest decode batch whose arithmetic takes at least as long as reading the weights: 2PB/F >= P*bytes/BW."""
    return math.ceil(card.flops * dtype_bytes / (2 * card.bandwidth))
