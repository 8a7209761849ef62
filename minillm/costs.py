"""How much arithmetic and memory traffic a forward pass costs, counted from the shape alone.

A multiply-add counts as two operations (FLOP), the custom of the field. "Token-wise" is everything but attention:
the projections, the MLP and the output head. Predictions made here are lower bounds; the chapters put measurements
beside them. Source of the bounds: the roofline model (Williams, Waterman and Patterson 2009).
"""

from minillm.config import ModelConfig
from minillm.kv_cache import kv_bytes_per_token
from minillm.shapes import Card


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


def prefill_seconds(config: ModelConfig, card: Card, num_tokens: int, dtype_bytes: int = 2) -> float:
    """Least time for the prompt's pass: the larger of its arithmetic (causal scores) and reading the weights once."""
    scores = num_tokens * (num_tokens + 1) // 2
    flops = tokenwise_flops(config, num_tokens) + attention_flops(config, scores)
    return max(flops / card.flops, matmul_parameters(config) * dtype_bytes / card.bandwidth)


def decode_seconds(config: ModelConfig, card: Card, context: int, batch_size: int = 1, dtype_bytes: int = 2) -> float:
    """Least time for one decode step of `batch_size` requests with `context` cached tokens each.

    Weights are read once for the whole batch or, with a large one, arithmetic takes longer; each request's cache is
    read besides.
    """
    weights = matmul_parameters(config)
    reading = weights * dtype_bytes / card.bandwidth
    arithmetic = 2 * weights * batch_size / card.flops
    cache = batch_size * context * kv_bytes_per_token(config, dtype_bytes) / card.bandwidth
    return max(reading, arithmetic) + cache
