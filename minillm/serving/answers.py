"""From the engine's outputs to what clients get: one way for streams and for whole answers.

There is one answer per HTTP request. It gets the outputs of the request's prompts as they come, "delta" or
"final_only", and makes choices of them. It remembers only what the next part of the same choice needs.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from minillm.engine import CompletionOutput, Logprob, RequestOutput
from minillm.model import Tokenizer, token_texts
from minillm.serving.http_errors import APIError
from minillm.serving.protocol import (
    ChatLogprobs,
    ChatRequest,
    CompletionLogprobs,
    CompletionRequest,
    PromptLogprobList,
    SamplingRequest,
    TokenLogprob,
    Usage,
)

LEAST_LOGPROB = -9999.0  # instead of minus infinity, for which JSON has no number; as in vLLM


@dataclass
class Told:
    """What has been sent of a choice so far."""

    num_tokens: int = 0
    num_characters: int = 0  # of its tokens' texts: where the next one begins


class Answer:
    """The choices of one request, in the order of its prompts: n for the first, n for the second, and so on."""

    kind = chunk_kind = id_prefix = ""  # set by subclasses

    def __init__(self, request: SamplingRequest, request_id: str, model: str, tokenizer: Tokenizer | None):
        self.request, self.tokenizer = request, tokenizer
        self.head = {"id": f"{self.id_prefix}-{request_id}", "object": self.kind}
        self.head |= {"created": int(time.time()), "model": model}
        self._told: defaultdict[int, Told] = defaultdict(Told)  # by the index of the choice
        self._prompts: dict[int, RequestOutput] = {}  # the first output of each prompt: the only one about the prompt

    def whole(self, outputs: Mapping[int, RequestOutput]) -> dict:
        """The answer in one piece, from the last output of each prompt."""
        choices = [self._choice(*each) for place in sorted(outputs) for each in self._parts(place, outputs[place])]
        empty = {"service_tier": None, "system_fingerprint": None}
        return {**self.head, "choices": choices, "usage": self.usage(), **empty, **self._about_prompt()}

    def events(self, place: int, output: RequestOutput) -> Iterator[dict]:
        """The events of a stream for a new output of a prompt."""
        for index, part in self._parts(place, output):
            is_new = index not in self._told
            if not is_new and part.finish_reason is None and not part.token_ids and not part.text:
                continue
            opening = self._opening(index) if is_new else None
            if opening is not None:
                yield self._event([opening], self._about_prompt())
            choice = self._choice(index, part, streams=True)
            options = self.request.stream_options
            if options is not None and options.include_usage and options.continuous_usage_stats:
                num_prompt_tokens = len(output.prompt_token_ids)
                usage = usage_of(num_prompt_tokens, self._told[index].num_tokens, output.num_cached_tokens)
                yield self._event([choice], {"usage": usage})
            else:
                yield self._event([choice], {})

    def last_events(self) -> Iterator[dict]:
        """The events at the end of a stream."""
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield self._event([], {"usage": self.usage()})

    def usage(self) -> Usage:
        """Of all prompts and choices so far."""
        return usage_of(
            sum(len(first.prompt_token_ids) for first in self._prompts.values()),
            sum(told.num_tokens for told in self._told.values()),
            sum(first.num_cached_tokens for first in self._prompts.values()),
        )

    def _event(self, choices: list[dict], more: Mapping) -> dict:
        return {**self.head, "object": self.chunk_kind, "choices": choices, **more}

    def _parts(self, place: int, output: RequestOutput) -> Iterator[tuple[int, CompletionOutput]]:
        """(index of the choice, what is new in it). Raises APIError, 500, if the model has failed on one."""
        self._prompts.setdefault(place, output)
        for part in output.outputs:
            if part.finish_reason == "error":
                raise APIError(500, f"the model failed on this request: {part.stop_reason}")
            yield place * self.request.num_outputs + part.index, part

    def _prompt_of(self, index: int) -> RequestOutput:
        return self._prompts[index // self.request.num_outputs]

    def _choice(self, index: int, part: CompletionOutput, streams: bool = False) -> dict:
        raise NotImplementedError

    def _opening(self, index: int) -> dict | None:
        """The event of a choice before its text, if it has one."""
        return None

    def _about_prompt(self) -> dict:
        """Fields about the prompt, of an answer that has one prompt."""
        return {}


class CompletionAnswers(Answer):
    """A text is continued."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"
    request: CompletionRequest

    def _choice(self, index: int, part: CompletionOutput, streams: bool = False) -> dict:
        text, logprobs, prompt, told = part.text or "", None, self._prompt_of(index), self._told.get(index)
        echoes = self.request.echo and told is None
        if echoes:
            text = self._text_of(prompt) + text
        if self.request.logprobs is not None:
            logprobs = self._logprobs(index, part, prompt if echoes else None)
        self._told[index].num_tokens += len(part.token_ids)
        choice = {"index": index, "text": text, "logprobs": logprobs}
        choice |= {"finish_reason": part.finish_reason, "stop_reason": part.stop_reason}
        wanted = self.request.return_token_ids
        if wanted or not streams:
            choice["token_ids"] = part.token_ids if wanted else None
        if not streams or (wanted and told is None):
            choice["prompt_token_ids"] = prompt.prompt_token_ids if wanted else None
        if not streams:
            wanted = self.request.prompt_logprobs is not None
            choice["prompt_logprobs"] = prompt_logprobs(prompt) if wanted else None
        return choice

    def _text_of(self, prompt: RequestOutput) -> str:
        if prompt.prompt is not None or self.tokenizer is None:
            return prompt.prompt or ""
        return "".join(token_texts(self.tokenizer, prompt.prompt_token_ids))

    def _logprobs(self, index: int, part: CompletionOutput, prompt: RequestOutput | None) -> CompletionLogprobs:
        found: CompletionLogprobs = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        told = self._told[index]

        def add(text: str, logprob: float | None, top: dict[str, float] | None) -> None:
            found["text_offset"].append(told.num_characters)
            found["token_logprobs"].append(logprob)
            found["tokens"].append(text)
            found["top_logprobs"].append(top)
            told.num_characters += len(text)

        places = list(zip(part.token_ids, part.logprobs, strict=True))
        if prompt is not None:
            first, *rest = prompt.prompt_token_ids
            add("".join(token_texts(self.tokenizer, [first])) if self.tokenizer else named(first, None), None, None)
            places = [*zip(rest, prompt.prompt_logprobs[1:], strict=True), *places]
        for token_id, values in places:
            top = {}
            for each, value in list(values.items())[: self.request.logprobs + 1]:  # the token itself comes first
                top.setdefault(named(each, value), finite(value))  # two tokens may have one text
            add(named(token_id, values[token_id]), finite(values[token_id]), top)
        return found


class ChatAnswers(Answer):
    """A message is answered."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl"
    request: ChatRequest

    def _opening(self, index: int) -> dict:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _choice(self, index: int, part: CompletionOutput, streams: bool = False) -> dict:
        self._told[index].num_tokens += len(part.token_ids)
        logprobs = self._logprobs(part) if self.request.logprobs else None
        end = {"logprobs": logprobs, "finish_reason": part.finish_reason, "stop_reason": part.stop_reason}
        token_ids = part.token_ids if self.request.return_token_ids else None
        if streams:
            ids = {} if token_ids is None else {"token_ids": token_ids}
            return {"index": index, "delta": {"content": part.text or ""}, **end, **ids}
        message = {"role": "assistant", "content": part.text or "", "tool_calls": []}
        message |= dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
        return {"index": index, "message": message, **end, "token_ids": token_ids}

    def _logprobs(self, part: CompletionOutput) -> ChatLogprobs:
        content = []
        for token_id, values in zip(part.token_ids, part.logprobs, strict=True):
            likeliest = sorted(values.items(), key=lambda item: item[1].rank)[: self.request.num_logprobs]
            top = [token_logprob(*each) for each in likeliest]
            content.append({**token_logprob(token_id, values[token_id]), "top_logprobs": top})
        return {"content": content}

    def _about_prompt(self) -> dict:
        prompt, request = self._prompts[0], self.request
        ids = prompt.prompt_token_ids if request.return_token_ids else None
        if request.stream:
            return {} if ids is None else {"prompt_token_ids": ids}
        logprobs = prompt_logprobs(prompt) if request.prompt_logprobs is not None else None
        return {"prompt_logprobs": logprobs, "prompt_token_ids": ids}


def usage_of(num_prompt_tokens: int, num_tokens: int, num_cached_tokens: int) -> Usage:
    """The numbers of tokens as clients get them."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


def finite(value: Logprob) -> float:
    """Its logarithm as a number that JSON can hold."""
    return max(value.logprob, LEAST_LOGPROB)


def named(token_id: int, value: Logprob | None) -> str:
    """A token's text, or without a tokenizer its id."""
    text = None if value is None else value.decoded_token
    return f"token_id:{token_id}" if text is None else text


def token_logprob(token_id: int, value: Logprob) -> TokenLogprob:
    """One token in the form of chat answers."""
    text = named(token_id, value)
    return {"token": text, "logprob": finite(value), "bytes": list(text.encode())}


def prompt_logprobs(output: RequestOutput) -> PromptLogprobList:
    """Those of a prompt, with numbers that JSON can hold."""
    return [
        None
        if place is None
        else {each: {**value._asdict(), "logprob": finite(value)} for each, value in place.items()}
        for place in output.prompt_logprobs
    ]
