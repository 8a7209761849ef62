"""The forms a prompt may have, made one: token ids, the text they came from if any, and a salt for prefix sharing."""

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from minillm.errors import PromptError, check_prompt_ids, check_text, shown
from minillm.text import encode

Prompt = str | Sequence[int] | Mapping  # a Mapping is vLLM's {"prompt": …} or {"prompt_token_ids": …}
PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


class EncodedPrompt(NamedTuple):
    """A prompt as the engine takes it."""

    token_ids: list[int]
    text: str | None = None  # None if token ids were given
    cache_salt: str = ""  # prefixes are shared among requests of the same salt only


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None) -> EncodedPrompt:
    """Any form of one prompt -> token ids. Raises PromptError for what is no prompt, and for text without a tokenizer.

    A mapping holds "prompt" (text) or "prompt_token_ids", then "prompt" only says what they mean; and "cache_salt" if
    it likes.
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


def _encode_mapping(prompt: Mapping, tokenizer: PreTrainedTokenizerBase | None) -> EncodedPrompt:
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
