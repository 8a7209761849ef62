"""The probabilities the model itself gave to tokens, before anything that a request asks for."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from minillm.sampling.params import SamplingParams, TokenLogprobs
from minillm.sampling.tensors import likeliest, wide

PROMPT_ROWS = 16  # hidden states of a prompt whose logits are computed at once


def token_logprobs(logits: Tensor, params: Sequence[SamplingParams], token_ids: Tensor) -> dict[int, TokenLogprobs]:
    """[R, V] logits and the [R] tokens sampled from them -> row -> log-probabilities, of the rows that ask for them.

    They are those of the model itself, before processors, temperature and filters, as in vLLM; float32 at least.
    """
    rows = [row for row, each in enumerate(params) if each.logprobs is not None]
    if not rows:
        return {}
    found = _logprobs(logits[rows], token_ids[rows], [params[row].logprobs for row in rows])
    return dict(zip(rows, found, strict=True))


def prompt_logprobs(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, token_ids: Tensor, num_top: int
) -> list[TokenLogprobs]:
    """[P, hidden] hidden states within a prompt and the [P] tokens that follow them -> the log-probabilities of these.

    `logits_of` makes logits of hidden states, `PROMPT_ROWS` at a time: those of a whole prompt would take much memory.
    """
    found = []
    for rows, following in zip(hidden.split(PROMPT_ROWS), token_ids.split(PROMPT_ROWS), strict=True):
        found += _logprobs(logits_of(rows), following, [num_top] * len(rows))
    return found


def _logprobs(logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """[A, V] logits, [A] tokens, how many of the likeliest to list per row -> log-probabilities of each row.

    A token's rank is 1 plus the number of likelier ones: equally likely ones have the same, which is the best of their
    places. The likeliest are listed in falling order, of equally likely ones the lower id first.
    """
    # A row that is not finite belongs to a request that fails: its result here is discarded.
    logprobs = logits.to(wide(logits)).log_softmax(-1).nan_to_num(nan=-math.inf, neginf=-math.inf)
    chosen = logprobs.gather(-1, token_ids[:, None])  # [A, 1]
    ranks = (logprobs > chosen).sum(-1) + 1
    most = min(max(counts), logits.shape[-1])
    top_ids = likeliest(logprobs, most).nonzero()[:, 1].view(-1, most) if most else token_ids.new_zeros(len(logits), 0)
    values, order = logprobs.gather(-1, top_ids).sort(dim=-1, descending=True, stable=True)  # [A, most]
    columns = (chosen[:, 0], ranks, top_ids.gather(-1, order), values)
    return [
        TokenLogprobs(logprob, rank, ids[:count], logprobs[:count])
        for logprob, rank, ids, logprobs, count in zip(*(each.tolist() for each in columns), counts, strict=True)
    ]
