"""From what a client asks to what the engine takes: prompts as token ids, and SamplingParams."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

from minillm.errors import MiniLLMError, PromptError
from minillm.model import Tokenizer, encode, encode_chat
from minillm.sampling import SamplingParams
from minillm.serving.http_errors import APIError, from_engine
from minillm.serving.protocol import ChatRequest, CompletionRequest, Conversation, Message, Prompts, SamplingRequest

LONG = 2_000  # characters or tokens; more is turned into the other in a thread
OTHERWISE = {"temperature", "logit_bias", "max_tokens", "prompt_logprobs"}  # not passed to SamplingParams as they are
SAME = {field.name for field in fields(SamplingParams)} & SamplingRequest.model_fields.keys() - OTHERWISE


async def prompts_of(
    request: CompletionRequest | ChatRequest, tokenizer: Tokenizer | None, most_tokens: int
) -> list[dict]:
    """The engine's prompts, with their ids and the text that they came from. Raises APIError, 400."""
    if isinstance(request, ChatRequest):
        check_length(sum(map(length, request.messages)), tokenizer, most_tokens)
        text, token_ids = await encoded_chat(request, tokenizer)
        prompts = [{"prompt": text, "prompt_token_ids": token_ids}]
    else:
        prompts = await encoded(request.prompt, tokenizer, most_tokens, "prompt")
    salt = {} if request.cache_salt is None else {"cache_salt": request.cache_salt}
    return [{**prompt, **salt} for prompt in prompts]


def as_list(prompts: Prompts) -> list[str | list[int]]:
    """One prompt or several, in any form -> a list of prompts."""
    return prompts if isinstance(prompts, list) and not isinstance(prompts[0], int) else [prompts]


async def encoded(prompts: Prompts, tokenizer: Tokenizer | None, most_tokens: int, field: str) -> list[dict]:
    """Texts and token ids in any form -> the engine's prompts. `field` is where they were. Raises APIError, 400."""
    prompts = as_list(prompts)
    if tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise APIError(400, "this server has no tokenizer; give token ids", field)
    for prompt in prompts:
        if isinstance(prompt, str):
            check_length(len(prompt), tokenizer, most_tokens)

    def encode_all() -> list[dict]:
        return [
            {"prompt": prompt, "prompt_token_ids": encode(tokenizer, prompt)}
            if isinstance(prompt, str)
            else {"prompt_token_ids": prompt}
            for prompt in prompts
        ]

    try:
        return await in_thread(sum(map(len, prompts)), encode_all)
    except MiniLLMError as error:
        raise from_engine(error, prompt_field=field) from None


async def encoded_chat(chat: Conversation, tokenizer: Tokenizer | None) -> tuple[str, list[int]]:
    """A conversation in the model's template -> (text, ids). Raises APIError, 400, also for a model without one."""
    if tokenizer is None:
        raise APIError(400, "this server has no tokenizer, and so no chat template; send token ids to /v1/completions")
    options = chat.chat_template_kwargs or {}
    # such as a different template, which would be the client's own program
    if options and not arguments_of(tokenizer.apply_chat_template).isdisjoint(options):
        raise APIError(
            400, "chat_template_kwargs may only hold what the model's own template reads", "chat_template_kwargs"
        )

    def encode_messages() -> tuple[str, list[int]]:
        messages = [message.model_dump(exclude_unset=True) for message in chat.messages]
        if not any(isinstance(message["content"], list) for message in messages if "content" in message):
            return put_into_template(messages)
        try:
            return put_into_template(messages)
        except PromptError:  # most templates do not read parts
            return put_into_template([{**message, **joined(message)} for message in messages])

    def put_into_template(messages: Sequence[dict]) -> tuple[str, list[int]]:
        return encode_chat(
            tokenizer,
            messages,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            chat_template_kwargs=options,
        )

    try:
        return await asyncio.to_thread(encode_messages)  # the first one loads the template's language
    except MiniLLMError as error:
        if error.__cause__ is not None:  # a template's message may quote its input
            error = PromptError("the model's chat template refuses these messages; check their roles and order")
        raise from_engine(error, prompt_field="messages") from None


def arguments_of(function: Callable) -> set[str]:
    """The names of a function's arguments, `*args` and `**kwargs` included."""
    return {*inspect.signature(function).parameters, "self", "kwargs"}


def check_length(num_characters: int, tokenizer: Tokenizer | None, most_tokens: int) -> None:
    """Raises APIError, 400, for a text that cannot fit even if all its tokens were the longest possible.

    Encoding a megabyte takes seconds.
    """
    if tokenizer is not None and num_characters > most_tokens * longest_token(tokenizer):
        raise APIError(
            400, f"the prompt has {num_characters} characters, more than {most_tokens} tokens can have", "input_tokens"
        )


@cache
def longest_token(tokenizer: Tokenizer) -> int:
    """The characters of the longest token; a byte of a character counts as one."""
    return max(map(len, tokenizer.get_vocab()))


def length(message: Message) -> int:
    """About how many characters a message has."""
    content = message.content or ""
    return len(content) if isinstance(content, str) else sum(len(part.text) for part in content)


def joined(message: dict) -> dict:
    """The message with its content as one text: its parts, one per line, as vLLM joins them."""
    content = message.get("content")
    return {"content": "\n".join(part["text"] for part in content)} if isinstance(content, list) else {}


async def in_thread(size: int, function: Callable, *args, **named) -> Any:
    """Call the function and return its result; in a thread if its work would block the event loop for too long."""
    return function(*args, **named) if size <= LONG else await asyncio.to_thread(function, *args, **named)


def params_of(request: SamplingRequest, num_prompt_tokens: int, most_tokens: int) -> SamplingParams:
    """The sampling parameters of the request. `max_tokens` is cut to what the context, `most_tokens`, leaves for it.

    Raises APIError, 400, for values out of range, or if there is no room for an output.
    """
    wanted = getattr(request, "max_completion_tokens", None) or request.max_tokens
    if wanted is not None and wanted > most_tokens:
        raise APIError(400, f"max_tokens is above {most_tokens}, the context of this server's model", "max_tokens")
    room = most_tokens - num_prompt_tokens
    if room < 0:
        raise APIError(
            400, f"the prompt has {num_prompt_tokens} tokens; the model's context is {most_tokens}", "input_tokens"
        )
    if room == 0:
        raise APIError(
            400, f"the prompt fills the context of {most_tokens} tokens; max_tokens must be at least 1", "max_tokens"
        )
    try:
        return SamplingParams(
            **{name: getattr(request, name) for name in SAME},
            temperature=1.0 if request.temperature is None else request.temperature,
            logit_bias=request.logit_bias and {int(key): bias for key, bias in request.logit_bias.items()},
            logprobs=request.num_logprobs,
            max_tokens=min(room if wanted is None else wanted, room),
            prompt_logprobs=_of_the_prompt(request),
        )
    except MiniLLMError as error:
        raise from_engine(error, type(request).model_fields) from None


def _of_the_prompt(request: SamplingRequest) -> int | None:
    """How many log-probabilities of the prompt: an echo shows them as well."""
    asked = [request.prompt_logprobs, request.num_logprobs if getattr(request, "echo", False) else None]
    return max((number for number in asked if number is not None), default=None)
