"""Which tokens may be drawn at all: min-p, top-k and top-p."""

import math

import torch
from torch import Tensor

from minillm.sampling.params import SamplingParams
from minillm.sampling.tensors import likeliest, wide

NUCLEUS_ROUNDING = 1e-6  # float32 logits cannot tell more exactly whether probabilities reach top_p


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """[..., V] logits -> the same, float32 at least, at -infinity where a token may not be drawn. Greedy drops nothing.

    In this order, each on what the one before left, judged after temperature: min-p, top-k, top-p. Of equally likely
    tokens the one with the lowest id comes first: top-k keeps k at most, and top_k = 1 is greedy.
    """
    logits = logits.to(wide(logits))
    if not params.filters:
        return logits
    # Temperature keeps their order, but rounding may make two of them equal: so they are compared before it.
    kept = logits
    if params.min_p > 0:
        scaled = logits / params.temperature
        kept = _drop(kept, scaled < scaled.amax(-1, keepdim=True) + math.log(params.min_p))
    if 0 < params.top_k < logits.shape[-1]:
        kept = _drop(kept, ~(likeliest(logits, params.top_k) | logits.isnan()))
    if params.top_p < 1:
        kept = _drop(kept, _outside_nucleus(logits, kept / params.temperature, params.top_p))
    return kept


def next_token_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """[..., V] logits -> [..., V] probabilities that tokens are drawn with: 1 for the likeliest if greedy."""
    if params.greedy:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits, dtype=wide(logits)).scatter_(-1, best, 1.0)
    return (filtered(logits, params) / params.temperature).softmax(-1)


def _drop(logits: Tensor, dropped: Tensor) -> Tensor:
    return logits.masked_fill(dropped, -math.inf)


def _outside_nucleus(logits: Tensor, scaled: Tensor, top_p: float) -> Tensor:
    """True where the likelier tokens by themselves reach `top_p`; the likeliest token is always inside."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    probabilities = scaled.double().softmax(-1).gather(-1, order)
    before = probabilities.cumsum(-1) - probabilities  # probability of all likelier tokens
    reached = before >= top_p * (1 - NUCLEUS_ROUNDING)
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, reached)
