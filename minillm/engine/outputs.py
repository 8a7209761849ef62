"""What the engine says about a request, as vLLM puts it, and the state from which that is made step by step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from minillm.engine.prompts import EncodedPrompt
from minillm.engine.request import Request
from minillm.model import Detokenizer, TokenDecoder, Tokenizer
from minillm.sampling import PromptLogprobs, TokenLogprobs

OutputKind = Literal["cumulative", "delta", "final_only"]  # all so far, what is new, or nothing before the end
OUTPUT_KINDS = ("cumulative", "delta", "final_only")


class Logprob(NamedTuple):
    """One token that could have stood at a place of an output."""

    logprob: float  # natural logarithm of its probability, before temperature and filters
    rank: int  # 1 is the likeliest token of the vocabulary; 1 plus the number of likelier ones
    decoded_token: str | None  # the text it adds, as `token_texts` has it; None without a tokenizer


@dataclass(slots=True)  # frozen ones are more than twice as expensive, and a step may make hundreds
class CompletionOutput:
    """One output of a request. For a request that streams: what is new in it."""

    index: int  # 0 to n - 1
    text: str | None  # None without a tokenizer; ends before a stop string or stop id
    token_ids: list[int]  # an eos or stop token included
    cumulative_logprob: float | None  # of all tokens sampled so far; None unless logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None  # one for each of token_ids: the sampled token and the likeliest ones
    finish_reason: str | None = None  # "stop", "length", "error" or "abort"; None while it runs
    stop_reason: int | str | None = None  # the stop id or stop string that matched; for "error", why


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds by the engine's clock, which begins at 0 when the engine is made.

    A token's time is when the results of its step had been read, as in the trace.
    """

    arrival_time: float
    first_token_time: float | None  # of the output that had one first; None before
    last_token_time: float | None  # of the newest token of all outputs; None before the first


@dataclass(slots=True)
class RequestOutput:
    """What is known of a request after a step."""

    request_id: str
    prompt: str | None  # None if token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]  # n of them; of a request that streams, those with anything new
    finished: bool  # all n have ended
    num_cached_tokens: int  # of the prompt, found in the prefix cache
    metrics: RequestMetrics
    # If asked for: one for each of prompt_token_ids, None for the first, which follows nothing. In "delta" outputs they
    # are returned once, with the first. What was not computed before a request failed is None.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class LogprobNamer:
    """Puts log-probabilities into the form of an output, position by position, with the texts of their tokens."""

    def __init__(self, tokenizer: Tokenizer | None, before: Sequence[int]):
        self._decoder = None if tokenizer is None else TokenDecoder(tokenizer, before, skip_special_tokens=False)

    def add(self, token_id: int, found: TokenLogprobs, final: bool) -> dict[int, Logprob]:
        """Returns the token at this position, then the likeliest ones by rank; a token is listed once.

        `final`: no token follows, so an unfinished character is included.
        """
        values = {token_id: (found.logprob, found.rank)}
        for rank, (top_id, logprob) in enumerate(zip(found.top_ids, found.top_logprobs, strict=True), start=1):
            values.setdefault(top_id, (logprob, rank))
        texts = [None] * len(values)
        if self._decoder is not None:
            texts = self._decoder.would_add(values, final=final)
            self._decoder.add(token_id)
        return {each: Logprob(*values[each], text) for each, text in zip(values, texts, strict=True)}


class Completion:
    """One output of a request while it grows.

    The list of tokens is the request's own. The text is decoded token by token only for a stream or a stop string;
    otherwise once, at the end.
    """

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None, streams: bool):
        params = request.params
        self.index = index
        self.request = request
        self.streams = streams
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._detokenizer = Detokenizer.for_request(tokenizer, params, request.prompt_token_ids)
        self._reads_all = tokenizer is not None and (streams or len(params.stop_strings) > 0)
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._namer = None if params.logprobs is None else LogprobNamer(tokenizer, request.prompt_token_ids)
        self._cumulative_logprob = 0.0
        self._news = ""  # text that has become final since the last `delta`
        self._num_told = 0  # tokens that the deltas so far contain

    @property
    def hears_each_token(self) -> bool:
        """Whether it has something to do with each token, not only at the end."""
        return self.streams or self._reads_all or self._logprobs is not None

    def take(self, token_id: int | None, logprobs: TokenLogprobs | None) -> None:
        """Take note of the token the request has just got, if any, and of its end if that has come."""
        self.finish_reason, self.stop_reason = self.request.finish_reason, self.request.stop_reason
        if token_id is not None and self._logprobs is not None:
            self._logprobs.append(self._namer.add(token_id, logprobs, final=self.finish_reason is not None))
            self._cumulative_logprob += logprobs.logprob
        if self._detokenizer is None:
            return
        if self._reads_all:
            self._news += self._detokenizer.take([] if token_id is None else [token_id], self.finish_reason)
        elif self.finish_reason is not None:
            self._news += self._detokenizer.take(self.request.output_token_ids, self.finish_reason)
        if self._detokenizer.stopped_by is not None:
            self.finish_reason, self.stop_reason = "stop", self._detokenizer.stopped_by

    def cumulative(self) -> CompletionOutput:
        """All of it so far."""
        text = None if self._detokenizer is None else self._detokenizer.text
        return self._output(text, 0)

    def delta(self) -> CompletionOutput:
        """What is new since the last `delta`."""
        text, self._news = None if self._detokenizer is None else self._news, ""
        output = self._output(text, self._num_told)
        self._num_told = len(self.request.output_token_ids)
        return output

    def _output(self, text: str | None, first: int) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=self.request.output_token_ids[first:],
            cumulative_logprob=None if self._logprobs is None else self._cumulative_logprob,
            logprobs=None if self._logprobs is None else self._logprobs[first:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class RequestState:
    """A request of the engine's caller with its n outputs."""

    def __init__(
        self,
        prompt: EncodedPrompt,
        request: Request,
        tokenizer: Tokenizer | None,
        output_kind: OutputKind,
        on_abort: "Callable[[RequestOutput], None] | None" = None,
    ):
        self.request = request
        self.on_abort = on_abort
        self.prompt = prompt
        self.output_kind = output_kind
        self._tokenizer = tokenizer
        streams = output_kind != "final_only"
        self.completions = [
            Completion(index, each, tokenizer, streams) for index, each in enumerate([request, *request.children])
        ]
        self._num_unfinished = len(self.completions)
        self._prompt_entries: dict[int, TokenLogprobs] = {}  # by position
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # the same as they are returned

    def take_prompt_logprobs(self, found: PromptLogprobs) -> None:
        """Add those of a part of the prompt; a part that is computed again replaces what was there."""
        if self.request.params.prompt_logprobs is not None:
            self._prompt_entries.update(enumerate(found.entries, start=found.start))

    def _tell_prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """A request has its first output when its prompt has been computed: all is known then."""
        if self.request.params.prompt_logprobs is None:
            return None
        if self._prompt_logprobs is None:
            self._prompt_logprobs = list(self._named_prompt())
        elif self.output_kind == "delta":
            return None
        return self._prompt_logprobs

    def _named_prompt(self) -> Iterator[dict[int, Logprob] | None]:
        token_ids, found = self.prompt.token_ids, self._prompt_entries
        namer = LogprobNamer(self._tokenizer, token_ids[:1])
        for position, token_id in enumerate(token_ids):
            final = position == len(token_ids) - 1
            yield namer.add(token_id, found[position], final) if position in found else None

    def output(self, changed: Sequence[Completion]) -> RequestOutput | None:
        """The output after a step that brought something for `changed`; None before the end for "final_only"."""
        self._num_unfinished -= sum(completion.finish_reason is not None for completion in changed)
        finished = self._num_unfinished == 0
        if self.output_kind == "delta":
            outputs = [completion.delta() for completion in changed]
        elif finished or self.output_kind == "cumulative":
            outputs = [completion.cumulative() for completion in self.completions]
        else:
            return None
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.token_ids,
            outputs=outputs,
            finished=finished,
            num_cached_tokens=self.request.num_cached_tokens,
            metrics=self._metrics(),
            prompt_logprobs=self._tell_prompt_logprobs(),
        )

    def aborted(self, unfinished: Sequence[Completion]) -> Iterator[RequestOutput]:
        """Yields the output of a request whose last completions were aborted; nothing if all had ended before."""
        for completion in unfinished:
            completion.take(None, None)
        if unfinished:
            yield self.output(unfinished)

    def _metrics(self) -> RequestMetrics:
        requests = [completion.request for completion in self.completions if completion.request.output_token_ids]
        return RequestMetrics(
            arrival_time=self.request.arrival_time,
            first_token_time=min([request.first_token_time for request in requests], default=None),
            last_token_time=max([request.last_token_time for request in requests], default=None),
        )
