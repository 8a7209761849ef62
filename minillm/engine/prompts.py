"""Any form of a prompt becomes one: token ids, the text they came from if any, and a salt for prefix sharing."""

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from minillm.errors import PromptError, SamplingParamsError, check_kind, check_prompt_ids, check_text, shown
from minillm.model import ModelConfig, Tokenizer, encode
from minillm.sampling import SamplingParams, limited

Prompt = str | Sequence[int] | Mapping  # a Mapping is vLLM's {"prompt": …} or {"prompt_token_ids": …}
PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


class EncodedPrompt(NamedTuple):
    """A prompt as the engine takes it."""

    token_ids: list[int]
    text: str | None = None  # None if token ids were given
    cache_salt: str = ""  # prefixes are shared among requests of the same salt only


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> EncodedPrompt:
    """Any form of one prompt -> token ids. Raises PromptError for what is no prompt, and for text without a tokenizer.

    A mapping holds "prompt" (text) or "prompt_token_ids", and "cache_salt" if given. Beside ids, "prompt" is only
    returned as their text.
    """
    if isinstance(prompt, EncodedPrompt):
        return prompt
    if isinstance(prompt, Mapping):
        return _encode_mapping(prompt, tokenizer)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise PromptError(
                f"the prompt is the text {prompt[:20]!r}, but there is no tokenizer (skip_tokenizer_init); "
                "give token ids"
            )
        return EncodedPrompt(encode(tokenizer, prompt), prompt)
    return EncodedPrompt(check_prompt_ids(prompt))


def _encode_mapping(prompt: Mapping, tokenizer: Tokenizer | None) -> EncodedPrompt:
    for key in prompt:
        if key not in PROMPT_KEYS:
            raise PromptError(f"a prompt has no key {shown(key)}; there are {', '.join(PROMPT_KEYS)}")
    salt = check_text("cache_salt", prompt.get("cache_salt", ""), error=PromptError)
    if "prompt_token_ids" in prompt:
        text = prompt.get("prompt")
        if text is not None:
            check_text("prompt", text, error=PromptError)
        return EncodedPrompt(check_prompt_ids(prompt["prompt_token_ids"]), text, salt)
    text = prompt.get("prompt")
    if not isinstance(text, str):
        raise PromptError(
            f"the prompt {shown(dict(prompt))} needs 'prompt' (a str) or 'prompt_token_ids' (a list of ids)"
        )
    return encode_prompt(text, tokenizer)._replace(cache_salt=salt)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, in any form -> a list of prompts. A list of whole numbers is one prompt.

    Raises PromptError for a list of both prompts and numbers.
    """
    if isinstance(prompts, str | Mapping | EncodedPrompt) or not isinstance(prompts, Sequence):
        return [prompts]
    numbers = [_is_whole(each) for each in prompts]
    if any(numbers) and not all(numbers):
        place = numbers.index(True)
        raise PromptError(
            f"prompt {place} is the number {shown(prompts[place])} among other prompts; put its ids in a list"
        )
    return [prompts] if prompts and all(numbers) else list(prompts)


def _is_whole(value: object) -> bool:
    try:
        operator.index(value)  # arrays have `__index__` too, and raise unless they are a single whole number
    except (TypeError, RuntimeError, ValueError):
        return False
    return True


def check_request(
    config: ModelConfig,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    tokenizer: object | None,
) -> SamplingParams:
    """Returns the parameters of the request; without `max_tokens` it gets as many as fit the model's context.

    Raises PromptError or SamplingParamsError if it cannot be served.
    """
    check_kind("params", params, SamplingParams, error=SamplingParamsError)
    check_token_ids(config, prompt_token_ids)
    num_prompt_tokens, context = len(prompt_token_ids), config.max_position_embeddings
    if num_prompt_tokens >= context:
        raise PromptError(
            f"the prompt has {num_prompt_tokens} tokens, the model's context is {context}, prompt and output together; "
            f"shorten the prompt to at most {context - 1}"
        )
    params = limited(params, num_prompt_tokens, context)
    if num_prompt_tokens + params.max_tokens > context:
        raise PromptError(
            f"{num_prompt_tokens} prompt tokens and max_tokens = {params.max_tokens} do not fit the model's context of "
            f"{context}; ask for at most {context - num_prompt_tokens}"
        )
    if params.stop_strings and tokenizer is None:
        raise SamplingParamsError("stop strings need a tokenizer; pass one, or use stop_token_ids")
    unknown = [token_id for token_id in params.logit_bias or () if token_id >= config.vocab_size]
    if unknown:
        raise SamplingParamsError(
            f"logit_bias has token id {unknown[0]}, which is outside the vocabulary of {config.vocab_size} ids"
        )
    return params


def check_token_ids(config: ModelConfig, token_ids: Sequence[int]) -> None:
    """Raises PromptError if there are none, or some that the model does not know."""
    token_ids = check_prompt_ids(token_ids)
    if len(token_ids) == 0:
        raise PromptError("the prompt is empty; give at least one token id")
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < config.vocab_size:
            raise PromptError(
                f"token id {token_id} at position {position} is outside the vocabulary of {config.vocab_size} ids"
            )
