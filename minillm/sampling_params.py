"""What a request asks of sampling, and when it is finished. No torch: the scheduler reads these too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.errors import SamplingParamsError

MOST_LOGPROBS = 20  # as in vLLM
GREEDY_BELOW = 1e-5  # temperatures that would overflow float32 logits, and sample the likeliest token anyway


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for. Greedy unless `temperature` is set; names and meanings are vLLM's."""

    temperature: float = 0.0  # 0 = greedy; otherwise logits are divided by it
    top_k: int = 0  # keep the k most likely tokens; 0 or -1 = all
    top_p: float = 1.0  # keep the smallest set of tokens whose probabilities reach p (Holtzman et al. 2020)
    min_p: float = 0.0  # drop tokens less likely than min_p times the likeliest (Nguyen et al. 2024)
    max_tokens: int = 256  # output tokens at most
    stop: str | Sequence[str] = ()  # strings that end the output and are cut from it; one alone needs no list
    stop_token_ids: Sequence[int] = ()  # ids that end the output, like eos; the id itself is kept
    ignore_eos: bool = False  # go on after an eos token, up to max_tokens
    seed: int | None = None  # of this request's own generator; None = a fresh one
    n: int = 1  # outputs for the same prompt; the i-th is seeded with seed + i
    logprobs: int | None = None  # log-probabilities of so many likeliest tokens beside each sampled one; None = none

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SamplingParamsError(f"temperature is {self.temperature}; use 0 for greedy or a positive number")
        if not _is_whole(self.top_k) or self.top_k < -1:
            raise SamplingParamsError(f"top_k is {self.top_k!r}; use a positive whole number, or 0 or -1 for no limit")
        if not 0 < self.top_p <= 1:
            raise SamplingParamsError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise SamplingParamsError(f"min_p is {self.min_p}; it must lie in [0, 1]")
        if not _is_whole(self.max_tokens) or self.max_tokens < 1:
            raise SamplingParamsError(
                f"max_tokens is {self.max_tokens!r}; ask for a whole number of tokens, at least 1"
            )
        if self.seed is not None and not (_is_whole(self.seed) and -(2**63) <= self.seed < 2**63):
            raise SamplingParamsError(f"seed is {self.seed!r}; use a whole number of 64 bits, or None")
        if not _is_whole(self.n) or self.n < 1:
            raise SamplingParamsError(f"n is {self.n!r}; ask for a whole number of outputs, at least 1")
        if self.n > 1 and self.greedy:
            raise SamplingParamsError(f"n is {self.n}, but greedy outputs are all the same; set a temperature or n = 1")
        if self.seed is not None and self.seed + self.n > 2**63:
            raise SamplingParamsError(f"seed {self.seed} + {self.n - 1} for the last of n = {self.n} is beyond 64 bits")
        if self.logprobs is not None and not (_is_whole(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS):
            raise SamplingParamsError(
                f"logprobs is {self.logprobs!r}; use a whole number from 0 to {MOST_LOGPROBS}, or None"
            )
        if isinstance(self.stop_token_ids, str) or not all(map(_is_whole, self.stop_token_ids)):
            raise SamplingParamsError(
                f"stop_token_ids is {self.stop_token_ids!r}; give whole numbers, and texts in stop instead"
            )
        if wrong := [text for text in self.stop_strings if not isinstance(text, str)]:
            raise SamplingParamsError(f"stop holds {wrong[0]!r}, which is no str; ids belong in stop_token_ids")
        if any(text == "" for text in self.stop_strings):
            raise SamplingParamsError("stop holds an empty string, which would end every output at once; remove it")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever form it was given in."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def finish_reason(
    token_ids: Sequence[int], params: SamplingParams, eos_token_ids: Sequence[int]
) -> tuple[str | None, int | None]:
    """Whether the newest output token ends the request: (finish reason, stop id that matched), (None, None) if not.

    "stop" for an eos token (unless `ignore_eos`) or one of `stop_token_ids`, "length" at `max_tokens`. Stop strings
    need text and are found by the `Detokenizer`. `token_ids` are the output tokens only, the newest one included.
    """
    newest = token_ids[-1]
    if newest in params.stop_token_ids:
        return "stop", newest
    if newest in eos_token_ids and not params.ignore_eos:
        return "stop", None
    if len(token_ids) >= params.max_tokens:
        return "length", None
    return None, None
