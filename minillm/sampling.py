"""How the next token is chosen from the logits, and when a request stops."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.errors import SamplingParamsError


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for. Greedy unless `temperature` is set; names and meanings are vLLM's."""

    temperature: float = 0.0  # 0 = greedy; otherwise logits are divided by it
    top_k: int = 0  # keep the k most likely tokens; 0 or -1 = all
    top_p: float = 1.0  # keep the smallest set of tokens whose probabilities reach p (Holtzman et al. 2020)
    min_p: float = 0.0  # drop tokens less likely than min_p times the likeliest (Nguyen et al. 2024)
    max_tokens: int = 256  # output tokens at most
    stop: tuple[str, ...] = ()  # strings that end the output and are cut from it; one string is accepted too
    stop_token_ids: tuple[int, ...] = ()  # ids that end the output, like eos; the id itself is kept
    ignore_eos: bool = False  # go on after an eos token, up to max_tokens
    seed: int | None = None  # of this request's own generator; None = a fresh one

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SamplingParamsError(f"temperature is {self.temperature}; use 0 for greedy or a positive number")
        if self.top_k < -1:
            raise SamplingParamsError(f"top_k is {self.top_k}; use a positive number, or 0 or -1 for no limit")
        if not 0 < self.top_p <= 1:
            raise SamplingParamsError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise SamplingParamsError(f"min_p is {self.min_p}; it must lie in [0, 1]")
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise SamplingParamsError(
                f"max_tokens is {self.max_tokens!r}; ask for a whole number of tokens, at least 1"
            )
        if any(text == "" for text in self.stop):
            raise SamplingParamsError("stop holds an empty string, which would end every output at once; remove it")

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature == 0.0


def make_generator(params: SamplingParams, device: torch.device | str = "cpu") -> torch.Generator | None:
    """The request's own source of randomness; None for greedy requests, which need none."""
    if params.greedy:
        return None
    generator = torch.Generator(device)
    generator.seed() if params.seed is None else generator.manual_seed(params.seed)
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
    for row, (request_params, generator) in enumerate(zip(params, generators, strict=True)):
        if not request_params.greedy:
            probabilities = next_token_probabilities(logits[row], request_params)
            token_ids[row] = torch.multinomial(probabilities, 1, generator=generator)[0]
    return token_ids
