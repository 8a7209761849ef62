"""How the next token is drawn: with noise that depends only on a request's seed, the number of the token and its id.

Noise from a counter, not from a generator's state, can be made by any program for any single token. So a request's
tokens depend on its own logits and seed, not on its neighbours in the batch, the device, or whether it was interrupted.
"""

import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.sampling.filters import filtered
from minillm.sampling.params import GREEDY_BELOW, SamplingParams
from minillm.sampling.processors import LogitsProcessor
from minillm.sampling.tensors import to_device, wide

PHILOX_ROUNDS = 10
PHILOX_FACTORS = 0xD2511F53, 0xCD9E8D57
PHILOX_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
LOW_HALF = 0xFFFFFFFF  # of 64 bits
NOISE_STRIDE = 512  # between the four ids whose noise one count makes: a GPU's program reads 512 neighbours four times


class SamplingState(NamedTuple):
    """What is kept of a request so that its tokens can be sampled."""

    params: SamplingParams
    temperature: float  # 0 if greedy
    seed: int  # without one, a unique one
    processor: LogitsProcessor | None  # None: its logits are the model's own
    asks: bool  # for more than a temperature

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        num_ids: int,
        device: torch.device | str = "cpu",
        *,
        prompt_token_ids: Iterable[int] = (),
        output_token_ids: Iterable[int] = (),
        ending_ids: Iterable[int] = (),
    ) -> "SamplingState":
        """The state of a request that has these tokens, for logits of `num_ids` ids; `ending_ids` are eos and stop ids.

        Prompt and output matter only if its `params` penalize, `ending_ids` only with `min_tokens`.
        """
        processor = None
        if params.changes_logits:
            tokens = {"prompt_token_ids": prompt_token_ids, "output_token_ids": output_token_ids}
            processor = LogitsProcessor(params, num_ids, device, **tokens, ending_ids=ending_ids)
        return cls(
            params,
            temperature=0.0 if params.greedy else params.temperature,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            processor=processor,
            asks=params.logprobs is not None or params.filters or processor is not None,
        )


def sample_rows(logits: Tensor, temperatures: Tensor, seeds: Tensor, draws: Tensor) -> Tensor:
    """[R, V] logits of R requests -> [R] token ids, drawn from softmax(logits / temperature) in one pass.

    The largest of logits / temperature + Gumbel noise is a draw from the softmax (Gumbel 1954; Maddison et al. 2014):
    no sum, no sorting, no second pass. `temperatures` [R] float32, below GREEDY_BELOW for the likeliest token, the
    first of several. `seeds` and `draws` [R] int64: the noise depends only on them and the token id. `draws` are the
    numbers of the requests' output tokens, from 0. Returns -1 for a row that has NaN or +infinity.
    """
    best, token_ids = logits.max(-1)
    drawing = temperatures >= GREEDY_BELOW
    columns = (logits, temperatures, seeds, draws)
    if not logits.is_cpu:  # asking which rows draw would be a wait
        drawn = _draw(logits, torch.where(drawing, temperatures, 1), seeds, draws)
        token_ids = torch.where(drawing, drawn, token_ids)
    elif len(rows := drawing.numpy().nonzero()[0]) == len(logits):
        token_ids = _draw(*columns)
    elif len(rows):
        places = token_ids.new_tensor(rows)
        token_ids.index_copy_(0, places, _draw(*(each.index_select(0, places) for each in columns)))
    return token_ids.masked_fill_(~(best < torch.inf), -1)


def _draw(logits: Tensor, temperatures: Tensor, seeds: Tensor, draws: Tensor) -> Tensor:
    scores = logits.to(wide(logits)) / temperatures[:, None]  # [R, V]
    return scores.add_(gumbel_noise(seeds, draws, logits.shape[-1])).argmax(-1)


def gumbel_noise(seeds: Tensor, draws: Tensor, num_ids: int) -> Tensor:
    """[R] seeds and numbers of draws -> [R, num_ids] float32 noise, the same for the same three numbers.

    The noise of a number u in (0, 1) is -log(-log(1 - u)): large noise comes from small u, where float32 is finest.
    """
    counts = torch.arange(-(-num_ids // (4 * NOISE_STRIDE)) * NOISE_STRIDE, device=seeds.device)
    bits = philox(counts, seeds[:, None], draws[:, None]).float()  # [4, R, counts]
    minus_u = bits.add_(0.5).mul_(-(2.0**-32)).clamp_(min=-1 + 2.0**-24)  # rounding must not make it -1
    noise = minus_u.log1p_().neg_().log_().neg_()
    return noise.unflatten(-1, (-1, NOISE_STRIDE)).permute(1, 2, 0, 3).flatten(1)[:, :num_ids]


def philox(counts: Tensor, seeds: Tensor, draws: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011): four words of 32 random bits each, int64, for (counts, draws) under a seed.

    The counter is (counts, 0, low and high half of draws), the key both halves of the seed. Counts [N], the others
    [R, 1] -> [4, R, N].
    """
    factors, steps = (_column(each, seeds.device) for each in (PHILOX_FACTORS, PHILOX_KEY_STEPS))
    key = torch.stack((seeds, seeds >> 32))
    counts, draws = torch.broadcast_tensors(counts, draws)
    multiplied, others = torch.stack((counts, draws)) & LOW_HALF, torch.stack((torch.zeros_like(draws), draws >> 32))
    for _ in range(PHILOX_ROUNDS):  # both multiplications at once: on a CPU, the number of calls is the cost
        products = (multiplied * factors).flip(0)  # wraps at 64 bits: both halves stay right
        # Above their low halves, key and others hold bits that do not belong there; they are cut off here.
        multiplied = (products >> 32).bitwise_xor_(others).bitwise_xor_(key).bitwise_and_(LOW_HALF)
        others, key = products, key + steps
    return torch.stack((multiplied, others & LOW_HALF), dim=1).flatten(0, 1)


def _column(pair: tuple[int, int], device: torch.device) -> Tensor:
    """[2, 1, 1] filled where it is used: a copy from the host would have to be waited for."""
    return torch.stack([torch.full((1, 1), each, device=device) for each in pair])


def sample(
    logits: Tensor,
    states: Sequence[SamplingState],
    draws: Sequence[int] | Tensor,
    sample_rows: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = sample_rows,
) -> Tensor:
    """[R, V] logits of R requests -> [R] token ids, which their processors count; -1 for a row that is not finite.

    `draws` [R] are the numbers of the requests' output tokens, 0 for the first. Nothing waits for the device, and the
    logits stay as they are.
    """
    device = logits.device
    draws = draws if isinstance(draws, Tensor) else to_device(draws, device)
    processors = {row: state.processor for row, state in enumerate(states) if state.processor}
    rows_by_filter = _rows_by_filter(states)
    changed = logits.to(wide(logits), copy=True) if processors or rows_by_filter else logits
    for row, processor in processors.items():
        processor.process(changed[row], draws[row])
    for rows in rows_by_filter:
        places = to_device(rows, device)
        changed.index_copy_(0, places, filtered(changed.index_select(0, places), states[rows[0]].params))
    temperatures = to_device([state.temperature for state in states], device, torch.float32)
    token_ids = sample_rows(changed, temperatures, to_device([state.seed for state in states], device), draws)
    for row, processor in processors.items():
        processor.count(token_ids[row : row + 1])
    return token_ids


def _rows_by_filter(states: Sequence[SamplingState]) -> list[list[int]]:
    """The rows whose requests filter, grouped by filter."""
    rows: dict[tuple, list[int]] = {}
    for row, (params, *_) in enumerate(states):
        if params.filters:
            rows.setdefault((params.temperature, params.top_k, params.top_p, params.min_p), []).append(row)
    return list(rows.values())
