"""How the next token is chosen from the logits."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.plan import TokenLogprobs
from minillm.sampling_params import SamplingParams


def make_generator(
    params: SamplingParams, device: torch.device | str = "cpu", num_drawn: int = 0
) -> torch.Generator | None:
    """The request's own source of randomness, behind its first `num_drawn` draws; None for greedy requests."""
    if params.greedy:
        return None
    generator = torch.Generator(device)
    generator.seed() if params.seed is None else generator.manual_seed(params.seed)
    for _ in range(num_drawn):
        _uniform(generator)
    return generator


def next_token_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """[..., V] logits -> [..., V] float32 probabilities that tokens are drawn with: 1 for the best if greedy.

    In this order, each on what the one before left: temperature, min-p, top-k, top-p.
    """
    logits = logits.float()
    if params.greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / params.temperature
    if params.min_p > 0:
        logits = _drop(logits, logits < logits.amax(-1, keepdim=True) + math.log(params.min_p))
    if 0 < params.top_k < logits.shape[-1]:
        logits = _drop(logits, logits < logits.topk(params.top_k).values[..., -1:])
    if params.top_p < 1:
        logits = _drop(logits, _outside_nucleus(logits, params.top_p))
    return logits.softmax(-1)


def _drop(logits: Tensor, dropped: Tensor) -> Tensor:
    return logits.masked_fill(dropped, -math.inf)


def _outside_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """True where the likelier tokens alone already reach `top_p`; the likeliest token is always inside."""
    sorted_probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = sorted_probabilities.cumsum(-1) - sorted_probabilities  # probability of all likelier tokens
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, before >= top_p)


def sample(logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator | None]) -> Tensor:
    """[R, V] logits of R requests -> [R] token ids, each by its own parameters and its own generator.

    A request's draws depend on its seed and its own logits alone, never on its neighbours in the batch.
    """
    token_ids = logits.argmax(-1)  # [R]
    for rows in _rows_of_one_distribution(params):
        probabilities = next_token_probabilities(logits[rows], params[rows[0]])  # [rows, V]
        token_ids[rows] = draw(probabilities, [generators[row] for row in rows])
    return token_ids


def _rows_of_one_distribution(params: Sequence[SamplingParams]) -> list[list[int]]:
    """The rows that are not greedy, those together whose probabilities are made the same way."""
    rows: dict[tuple, list[int]] = {}
    for row, each in enumerate(params):
        if not each.greedy:
            rows.setdefault((each.temperature, each.top_k, each.top_p, each.min_p), []).append(row)
    return list(rows.values())


def draw(probabilities: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    """[R, V] probabilities -> [R] token ids: where each request's own uniform number falls in its cumulated row."""
    cumulated = probabilities.double().cumsum(-1)  # [R, V]
    numbers = torch.cat([_uniform(each) for each in generators])
    fallen = numbers[:, None] * cumulated[:, -1:]  # [R, 1], below each row's end
    return torch.searchsorted(cumulated, fallen, right=True)[:, 0]  # never a token of probability 0


def _uniform(generator: torch.Generator) -> Tensor:
    """[1] a number in [0, 1): what a request draws for each of its tokens."""
    return torch.rand(1, generator=generator, dtype=torch.float64, device=generator.device)


def token_logprobs(logits: Tensor, params: Sequence[SamplingParams], token_ids: Tensor) -> dict[int, TokenLogprobs]:
    """[R, V] logits and the [R] tokens sampled from them -> row -> log-probabilities, of the rows that ask for them.

    They are those of the model itself, before temperature and filters, as in vLLM; float32 at least. A token's rank
    is 1 plus the number of likelier ones.
    """
    rows = [row for row, each in enumerate(params) if each.logprobs is not None]
    if not rows:
        return {}
    chosen = logits[rows]  # [A, V], A rows ask
    logprobs = chosen.to(torch.promote_types(chosen.dtype, torch.float32)).log_softmax(-1)
    sampled = logprobs.gather(-1, token_ids[rows, None])  # [A, 1]
    ranks = (logprobs > sampled).sum(-1) + 1
    most = min(max(params[row].logprobs for row in rows), logits.shape[-1])
    top = logprobs.topk(most, dim=-1)  # [A, most], likeliest first
    columns = zip(sampled[:, 0].tolist(), ranks.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return {
        row: TokenLogprobs(logprob, rank, top_ids[: params[row].logprobs], top_values[: params[row].logprobs])
        for row, (logprob, rank, top_ids, top_values) in zip(rows, columns, strict=True)
    }
