"""What a request asks of sampling, and when it is finished. No torch: the scheduler reads these too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from minillm.errors import (
    SamplingParamsError,
    check_flag,
    check_items,
    check_number,
    check_text,
    check_whole,
    shown,
)

MOST_LOGPROBS = 20  # as in vLLM
GREEDY_BELOW = 1e-5  # temperatures that would overflow float32 logits, and sample the likeliest token anyway


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for. Greedy unless `temperature` is set; names and meanings are vLLM's.

    None stands for "not given" in every field. Numbers of numpy become Python's, `stop` and `stop_token_ids` tuples;
    anything iterable is read once. Raises SamplingParamsError for what is out of range or of another type.
    """

    temperature: float = 0.0  # 0 = greedy; otherwise logits are divided by it
    top_k: int = 0  # keep the k most likely tokens, of equally likely ones the lower ids; 0 or -1 = all
    top_p: float = 1.0  # keep the smallest set of tokens whose probabilities reach p (Holtzman et al. 2020)
    min_p: float = 0.0  # drop tokens less likely than min_p times the likeliest (Nguyen et al. 2024)
    presence_penalty: float = 0.0  # subtracted from the logit of every token that is in the output; -2 to 2
    frequency_penalty: float = 0.0  # subtracted once for every occurrence; -2 to 2
    repetition_penalty: float = 1.0  # of tokens in prompt or output: divides logits above 0, multiplies others
    logit_bias: Mapping[int, float] | None = None  # token id -> what is added to its logit
    min_tokens: int = 0  # output tokens before an eos or stop id can be sampled, or a stop string ends the output
    max_tokens: int | None = None  # output tokens at most; None = as many as fit
    stop: str | Sequence[str] = ()  # strings that end the output and are cut from it; a single one needs no list
    stop_token_ids: Sequence[int] = ()  # ids that end the output, like eos; the id is kept, but not its text
    include_stop_str_in_output: bool = False  # True: the text ends after the stop string or stop id, not before it
    ignore_eos: bool = False  # go on after an eos token, up to max_tokens
    seed: int | None = None  # of this request's own random numbers; None = a unique one
    n: int = 1  # outputs for the same prompt; the i-th is seeded with seed + i
    logprobs: int | None = None  # how many likeliest tokens to list with each sampled one; None = none
    prompt_logprobs: int | None = None  # the same for each token of the prompt but the first

    def __post_init__(self):
        for name, default, check in _FIELDS:
            value = getattr(self, name)
            if value is not default and (type(value) is not type(default) or value != default):
                value = default if value is None else check(name, value)
                # A frozen dataclass has no other way to store the plain form.
                object.__setattr__(self, name, value)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError(
                f"min_tokens is {self.min_tokens}, above max_tokens = {self.max_tokens}; lower it or raise max_tokens"
            )
        if self.n > 1 and self.greedy:
            raise SamplingParamsError(f"n is {self.n}, but greedy outputs are all the same; set a temperature or n = 1")
        if self.seed is not None and self.seed + self.n > 2**63:
            raise SamplingParamsError(f"seed {self.seed} + {self.n - 1} for the last of n = {self.n} is beyond 64 bits")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever form it was given in."""
        return self.stop

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def filters(self) -> bool:
        """True if some tokens cannot be drawn although their probability is above 0."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalizes(self) -> bool:
        """True if logits depend on which tokens the request has already."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def changes_logits(self) -> bool:
        """True if something happens to the model's logits before the temperature."""
        return self.penalizes or bool(self.logit_bias) or self.min_tokens > 0


# --- checks of the fields: each returns the plain form of what was given ---


def _whole(least: int, most: int | None = None, hint: str = "") -> Callable:
    def check(name: str, value: object) -> int:
        return check_whole(name, value, least, most, hint=hint, error=SamplingParamsError)

    return check


def _number(wanted: str, accepts: Callable[[float], bool]) -> Callable:
    def check(name: str, value: object) -> float:
        return check_number(name, value, wanted, accepts, error=SamplingParamsError)

    return check


def _flag(name: str, value: object) -> bool:
    return check_flag(name, value, error=SamplingParamsError)


def _texts(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else check_items(name, value, "texts", error=SamplingParamsError)
    for place, text in enumerate(texts):
        check_text(f"{name}[{place}]", text, hint="ids belong in stop_token_ids", error=SamplingParamsError)
    if "" in texts:
        raise SamplingParamsError(f"{name} holds an empty string, which would end every output at once; remove it")
    return texts


def _ids(name: str, value: object) -> tuple[int, ...]:
    token_ids = check_items(name, value, "token ids; texts belong in stop", error=SamplingParamsError)
    return tuple(
        check_whole(f"{name}[{place}]", each, 0, error=SamplingParamsError) for place, each in enumerate(token_ids)
    )


def _biases(name: str, value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise SamplingParamsError(f"{name} is {shown(value)}; it must be a dict from token ids to numbers")
    token_ids = [check_whole(f"a token id in {name}", each, 0, error=SamplingParamsError) for each in value]
    return {each: _bias(f"{name}[{each}]", bias) for each, bias in zip(token_ids, value.values(), strict=True)}


_bias = _number("a number from -1e30 to 1e30", lambda x: abs(x) <= 1e30)
_penalty = _number("a number from -2 to 2", lambda x: -2 <= x <= 2)
_num_logprobs = _whole(0, MOST_LOGPROBS, "or None for none")

_CHECKS = {
    "temperature": _number("0 for greedy or a positive number", lambda x: x >= 0),
    "top_k": _whole(-1, hint="0 or -1 for no limit"),
    "top_p": _number("a number in (0, 1]", lambda x: 0 < x <= 1),
    "min_p": _number("a number in [0, 1]", lambda x: 0 <= x <= 1),
    "presence_penalty": _penalty,
    "frequency_penalty": _penalty,
    "repetition_penalty": _number("a positive number from 1e-30 to 1e30; 1 for none", lambda x: 1e-30 <= x <= 1e30),
    "logit_bias": _biases,
    "min_tokens": _whole(0),
    "max_tokens": _whole(1, hint="or None for as many as fit"),
    "stop": _texts,
    "stop_token_ids": _ids,
    "include_stop_str_in_output": _flag,
    "ignore_eos": _flag,
    "seed": _whole(-(2**63), 2**63 - 1, "which is 64 bits, or None"),
    "n": _whole(1),
    "logprobs": _num_logprobs,
    "prompt_logprobs": _num_logprobs,
}
_FIELDS = [(field.name, field.default, _CHECKS[field.name]) for field in fields(SamplingParams)]


# --- how long an output may get ---


def limited(params: SamplingParams, num_prompt_tokens: int, most_tokens: int) -> SamplingParams:
    """The same with a number for `max_tokens`: None becomes what `most_tokens` leave after the prompt, at least 1.

    Raises SamplingParamsError if `min_tokens` does not fit.
    """
    if params.max_tokens is not None:
        return params
    return replace(params, max_tokens=max(1, most_tokens - num_prompt_tokens))


def finish_reason(
    token_ids: Sequence[int], params: SamplingParams, eos_token_ids: Sequence[int]
) -> tuple[str | None, int | None]:
    """Whether the newest output token ends the request: (finish reason, stop id that matched), (None, None) if not.

    "stop" for an eos token (unless `ignore_eos`) or one of `stop_token_ids`, after the first `min_tokens`; "length" at
    `max_tokens`. Stop strings need text and are found by the `Detokenizer`. `token_ids` are only the output tokens, the
    newest one included.
    """
    newest = token_ids[-1]
    if len(token_ids) >= params.min_tokens:
        if newest in params.stop_token_ids:
            return "stop", newest
        if newest in eos_token_ids and not params.ignore_eos:
            return "stop", None
    if params.max_tokens is not None and len(token_ids) >= params.max_tokens:
        return "length", None
    return None, None


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one place of an output: of the token sampled there and of the likeliest ones."""

    logprob: float  # of the sampled token
    rank: int  # of the sampled token; 1 is the likeliest
    top_ids: Sequence[int]  # likeliest first
    top_logprobs: Sequence[float]


class PromptLogprobs(NamedTuple):
    """Log-probabilities of consecutive tokens of a prompt."""

    start: int  # position of the first of them
    entries: Sequence[TokenLogprobs]
