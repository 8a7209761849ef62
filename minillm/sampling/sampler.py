"""How the next token is chosen from the logits."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from minillm.sampling.params import SamplingParams, TokenLogprobs

NUCLEUS_ROUNDING = 1e-6  # logits in float32 do not say more exactly whether probabilities reach top_p
PROMPT_ROWS = 16  # hidden states of a prompt of which logits are made at once


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


class LogitsProcessor:
    """What one request asks for before its temperature; it counts the tokens that the request has.

    In vLLM's order: `min_tokens` (ending tokens get -infinity), `logit_bias`, then the penalties. All that it counts
    stays on the device, so that nobody waits for a token.
    """

    def __init__(self, new, num_ids: int, device: torch.device | str):
        """`new` says which tokens the request has already, of ids below `num_ids` and others, which have no logits."""

        def known(token_ids: Iterable[int]) -> list[int]:
            return [token_id for token_id in token_ids if token_id < num_ids]

        self.params = params = new.params
        self.num_sampled = new.num_sampled
        self._ending_ids = to_device(known(new.ending_ids) if params.min_tokens else [], device)
        biased = known(params.logit_bias or ())
        self._biased_ids = to_device(biased, device)
        self._biases = to_device([params.logit_bias[token_id] for token_id in biased], device, torch.float32)
        if params.penalizes:
            self._in_prompt = torch.zeros(num_ids, dtype=torch.bool, device=device)
            self._in_prompt.index_fill_(0, to_device(known(new.prompt_token_ids), device), True)
            self._counts = torch.zeros(num_ids, device=device)  # how often each token is in the output
            self.count(to_device(known(new.output_token_ids), device))

    def process(self, logits: Tensor) -> None:
        """Change the request's [V] logits in place; float32 or float64."""
        params = self.params
        if self.num_sampled < params.min_tokens:
            logits.index_fill_(0, self._ending_ids, -math.inf)
        if params.logit_bias:
            logits.index_add_(0, self._biased_ids, self._biases.to(logits.dtype))
        if params.penalizes:
            in_output = self._counts > 0
            repeated = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            logits.copy_(torch.where(self._in_prompt | in_output, repeated, logits))
            logits -= params.frequency_penalty * self._counts + params.presence_penalty * in_output

    def take(self, token_id: Tensor) -> None:
        """[1] the token that the request has got."""
        self.num_sampled += 1
        if self.params.penalizes:
            self.count(token_id.clamp(min=0))  # -1: it failed, and nothing comes of it

    def count(self, token_ids: Tensor) -> None:
        """[n] tokens that are in the output."""
        self._counts.index_add_(0, token_ids, torch.ones_like(token_ids, dtype=self._counts.dtype))


def make_processor(new, num_ids: int, device: torch.device | str = "cpu") -> LogitsProcessor | None:
    """None for a request whose logits are the model's own."""
    return LogitsProcessor(new, num_ids, device) if new.params.changes_logits else None


def processed(logits: Tensor, processors: Sequence[LogitsProcessor | None]) -> Tensor:
    """[R, V] logits -> the same, changed where a request asks for that."""
    rows = [row for row, each in enumerate(processors) if each is not None]
    if rows:
        logits = logits.to(_wide(logits), copy=True)
        for row in rows:
            processors[row].process(logits[row])
    return logits


def _wide(logits: Tensor) -> torch.dtype:
    """What they are computed in: float32 at least, and float64 stays so."""
    return torch.promote_types(logits.dtype, torch.float32)


def next_token_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """[..., V] logits -> [..., V] probabilities that tokens are drawn with, float32 at least: 1 for the best if greedy.

    In this order, each on what the one before left: temperature, min-p, top-k, top-p. Of equally likely tokens the one
    with the lowest id comes first: top-k keeps k at most, and top_k = 1 is greedy.
    """
    logits = logits.to(_wide(logits))
    if params.greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Temperature keeps their order, but rounding may make two of them equal: who is likelier is asked before.
    scaled = logits / params.temperature
    if params.min_p > 0:
        scaled = _drop(scaled, scaled < scaled.amax(-1, keepdim=True) + math.log(params.min_p))
    if 0 < params.top_k < logits.shape[-1]:
        scaled = _drop(scaled, ~(_likeliest(logits, params.top_k) | logits.isnan()))
    if params.top_p < 1:
        scaled = _drop(scaled, _outside_nucleus(logits, scaled, params.top_p))
    return scaled.softmax(-1)


def _drop(logits: Tensor, dropped: Tensor) -> Tensor:
    return logits.masked_fill(dropped, -math.inf)


def _likeliest(logits: Tensor, count: int) -> Tensor:
    """True for exactly so many of [..., V] logits, unless there is NaN: the largest, of equal ones the first."""
    least = logits.topk(count).values[..., -1:]
    larger, equal = logits > least, logits == least
    return larger | (equal & (equal.cumsum(-1) <= count - larger.sum(-1, keepdim=True)))


def _outside_nucleus(logits: Tensor, scaled: Tensor, top_p: float) -> Tensor:
    """True where the likelier tokens alone already reach `top_p`; the likeliest token is always inside."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    probabilities = scaled.double().softmax(-1).gather(-1, order)
    before = probabilities.cumsum(-1) - probabilities  # probability of all likelier tokens
    reached = before >= top_p * (1 - NUCLEUS_ROUNDING)
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, reached)


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator | None],
    processors: Sequence[LogitsProcessor | None] = (),
) -> Tensor:
    """[R, V] logits of R requests -> [R] token ids, each by its own parameters, generator and processor.

    A request's draws depend on its seed and its own logits alone, never on its neighbours in the batch.
    """
    logits = processed(logits, processors)
    token_ids = logits.argmax(-1)  # [R]
    for rows in _rows_of_one_distribution(params):
        probabilities = next_token_probabilities(logits[rows], params[rows[0]])  # [rows, V]
        token_ids[rows] = draw(probabilities, [generators[row] for row in rows])
    take(token_ids, processors)
    return token_ids


def take(token_ids: Tensor, processors: Sequence[LogitsProcessor | None]) -> None:
    """Let the processors of R requests count the [R] tokens that these have got."""
    for row, processor in enumerate(processors):
        if processor is not None:
            processor.take(token_ids[row : row + 1])


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
    """[P, hidden] hidden states within a prompt and the [P] tokens that follow them -> what the model gave to these.

    `logits_of` makes logits of hidden states, `PROMPT_ROWS` at a time: those of a whole prompt would take much memory.
    """
    found = []
    for rows, following in zip(hidden.split(PROMPT_ROWS), token_ids.split(PROMPT_ROWS), strict=True):
        found += _logprobs(logits_of(rows), following, [num_top] * len(rows))
    return found


def _logprobs(logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """[A, V] logits, [A] tokens, how many of the likeliest to tell in each row -> log-probabilities of each row.

    A token's rank is 1 plus the number of likelier ones: equally likely ones have the same, which is the best of their
    places. The likeliest are listed in falling order, of equally likely ones the lower id first.
    """
    # A row that is not finite is of a request that fails: whatever is said of it here, nobody hears it.
    logprobs = logits.to(_wide(logits)).log_softmax(-1).nan_to_num(nan=-math.inf, neginf=-math.inf)
    chosen = logprobs.gather(-1, token_ids[:, None])  # [A, 1]
    ranks = (logprobs > chosen).sum(-1) + 1
    most = min(max(counts), logits.shape[-1])
    top_ids = _likeliest(logprobs, most).nonzero()[:, 1].view(-1, most) if most else token_ids.new_zeros(len(logits), 0)
    values, order = logprobs.gather(-1, top_ids).sort(dim=-1, descending=True, stable=True)  # [A, most]
    columns = (chosen[:, 0], ranks, top_ids.gather(-1, order), values)
    return [
        TokenLogprobs(logprob, rank, ids[:count], logprobs[:count])
        for logprob, rank, ids, logprobs, count in zip(*(each.tolist() for each in columns), counts, strict=True)
    ]


def to_device(numbers: Sequence[float], device: torch.device | str, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """[n] on the device. A GPU gets them from pinned memory, in its stream: nobody waits for it here."""
    host = torch.tensor(list(numbers), dtype=dtype, pin_memory=torch.device(device).type == "cuda")
    return host.to(device, non_blocking=True)
