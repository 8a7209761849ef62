"""The ladder of ways to generate: each function gives the same tokens as the one before, with less work.

All rungs share one loop; they differ in which tokens a forward pass gets and in its `attend`.
They make tokens and text of one output per prompt: `n`, `logprobs` and `prompt_logprobs` are for the engine.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from minillm.attention import Kernel, sdpa_attention
from minillm.engine import check_request
from minillm.errors import (
    Positive,
    PromptError,
    SamplingParamsError,
    check_items,
    check_prompt_ids,
    checked,
)
from minillm.ladder.attend import BlockDiagonalAttention, CachedAttention, CausalAttention
from minillm.ladder.kv_cache import KVCache
from minillm.model import Detokenizer, ModelConfig, Tokenizer
from minillm.sampling import SamplingParams, SamplingState, finish_reason, sample
from minillm.trace import RequestRecord, ScheduledTokens, StepEvent, Trace

REQUEST_ID = "req 0"  # the one request of a rung that runs one at a time


_takes = checked(skip=("prompt_token_ids", "prompts"))  # which `check_request` checks


@runtime_checkable
class Model(Protocol):
    """What a model needs: a Decoder has it, and a stand-in may have it too."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device

    def __call__(self, token_ids: Tensor, positions: Tensor, attend: Callable) -> Tensor:
        """[T] token ids at [T] positions -> [T, hidden]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, ids]."""


@dataclass(frozen=True)
class NewToken:
    """What `on_token` gets as soon as a token has been sampled."""

    token_id: int
    text: str  # text that has become final with this token; '' without a tokenizer
    time: float  # seconds on time.perf_counter's clock


@dataclass(frozen=True)
class Counters:
    """Work done, counted while it was done."""

    forward_passes: int
    tokens_computed: int  # tokens pushed through the model, over all passes
    score_entries: int  # query-key pairs scored, in one head of one layer


@dataclass(frozen=True)
class GenerationResult:
    """One finished request. `token_ids` holds the output only, an eos or stop token included."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None  # None without a tokenizer; ends before a stop string or stop id
    finish_reason: str  # "stop": eos, stop id or stop string; "length": max_tokens
    stop_reason: int | str | None  # the stop id or stop string that matched; None for eos and length
    counters: Counters
    trace: Trace


@dataclass(frozen=True)
class Pass:
    """One forward pass: what came out and what it cost."""

    logits: Tensor | None  # [V], of the last token; None while the prompt is not complete
    start: int  # position of the first token computed
    num_tokens: int  # tokens computed
    score_entries: int  # query-key pairs scored, in one head of one layer
    cached_tokens: int  # tokens held in a cache afterwards


@_takes
@torch.inference_mode()
def generate_naive(
    model: Model,
    prompt_token_ids: Sequence[int],
    params: SamplingParams = SamplingParams(),
    *,
    tokenizer: Tokenizer | None = None,
    on_token: Callable[[NewToken], None] | None = None,
    kernel: Kernel = sdpa_attention,
) -> GenerationResult:
    """Feed the whole sequence again for every token. Raises PromptError or SamplingParamsError before any work."""

    def forward(token_ids: list[int]) -> Pass:
        attend = CausalAttention(model.config, kernel)
        hidden = model(as_tensor(token_ids, model), positions(0, len(token_ids), model), attend)  # [T, hidden]
        return Pass(model.logits(hidden[-1]), 0, len(token_ids), attend.score_entries, cached_tokens=0)

    return _generate(model, forward, prompt_token_ids, params, tokenizer, on_token)


@_takes
def generate_cached(
    model: Model,
    prompt_token_ids: Sequence[int],
    params: SamplingParams = SamplingParams(),
    *,
    tokenizer: Tokenizer | None = None,
    on_token: Callable[[NewToken], None] | None = None,
    kernel: Kernel = sdpa_attention,
) -> GenerationResult:
    """Keep keys and values: the prompt in one pass, then one new token per pass. Same errors as `generate_naive`."""
    prompt_token_ids = check_prompt_ids(prompt_token_ids)
    whole_prompt = max(1, len(prompt_token_ids))
    return generate_chunked(
        model, prompt_token_ids, params, chunk_size=whole_prompt, tokenizer=tokenizer, on_token=on_token, kernel=kernel
    )


@_takes
@torch.inference_mode()
def generate_chunked(
    model: Model,
    prompt_token_ids: Sequence[int],
    params: SamplingParams = SamplingParams(),
    *,
    chunk_size: Positive,
    tokenizer: Tokenizer | None = None,
    on_token: Callable[[NewToken], None] | None = None,
    kernel: Kernel = sdpa_attention,
) -> GenerationResult:
    """Compute the prompt in ceil(n / chunk_size) passes, each under a rectangular mask, then one new token per pass.

    Same tokens as `generate_cached`; the largest pass, and so the peak of activation memory, is bounded by the chunk.
    Raises ConfigError for a chunk of no tokens, and the errors of `generate_naive`.
    """
    prompt_token_ids = check_prompt_ids(prompt_token_ids)
    params = check_request(model.config, prompt_token_ids, params, tokenizer)
    capacity = len(prompt_token_ids) + params.max_tokens - 1  # the last token sampled is never fed back
    cache = KVCache(model.config, capacity, model.dtype, model.device)

    def forward(token_ids: list[int]) -> Pass:
        start = cache.length
        new = token_ids[start : start + chunk_size]
        attend = CachedAttention(model.config, cache, kernel)
        hidden = model(as_tensor(new, model), positions(start, start + len(new), model), attend)  # [T, hidden]
        cache.advance(len(new))
        logits = model.logits(hidden[-1]) if cache.length == len(token_ids) else None
        return Pass(logits, start, len(new), attend.score_entries, cache.length)

    return _generate(model, forward, prompt_token_ids, params, tokenizer, on_token)


@_takes
@torch.inference_mode()
def generate_ragged(
    model: Model,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    *,
    dense: bool = True,
    tokenizer: Tokenizer | None = None,
    kernel: Kernel = sdpa_attention,
) -> list[GenerationResult]:
    """Several prompts at once without padding: one row of tokens, positions that restart, a block-diagonal mask.

    No cache: every unfinished sequence is fed again in each pass. `dense` scores all pairs of the row under the mask,
    otherwise only each prompt's own pairs. The results share one trace, and their counters are those of all together.
    Raises PromptError or SamplingParamsError before any work; `params` is one for all or one per prompt.
    """
    prompts = check_items("prompts", prompts, "prompts", error=PromptError)
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    if len(params) != len(prompts):
        raise SamplingParamsError(f"{len(params)} sampling parameters for {len(prompts)} prompts; give one for each")
    prompts = [check_prompt_ids(prompt) for prompt in prompts]
    params = [check_request(model.config, *each, tokenizer) for each in zip(prompts, params, strict=True)]
    outputs = [OutputBuilder(model.config, own, tokenizer, prompt) for prompt, own in zip(prompts, params, strict=True)]
    states = [_sampling_state(model, *each) for each in zip(prompts, params, strict=True)]
    began = time.perf_counter()
    trace = Trace([RequestRecord(f"req {i}", 0.0, len(prompt)) for i, prompt in enumerate(prompts)])
    while running := [i for i, output in enumerate(outputs) if output.finish_reason is None]:
        start_time = time.perf_counter() - began
        sequences = {i: prompts[i] + outputs[i].token_ids for i in running}
        logits, score_entries = _ragged_pass(model, list(sequences.values()), dense, kernel)
        draws = [len(outputs[i].token_ids) for i in running]
        for i, token_id in zip(running, _sample(logits, [states[i] for i in running], draws), strict=True):
            outputs[i].append(token_id)
        why = "recompute" if trace.steps else "prefill"
        event = StepEvent(
            step=len(trace.steps),
            start_time=start_time,
            end_time=time.perf_counter() - began,
            scheduled=tuple(ScheduledTokens(f"req {i}", 0, len(ids), why, 1) for i, ids in sequences.items()),
            finished=tuple(f"req {i}" for i in running if outputs[i].finish_reason is not None),
            score_entries=score_entries,
        )
        trace.steps.append(event)
    return [output.result(prompt, trace) for output, prompt in zip(outputs, prompts, strict=True)]


def _ragged_pass(model: Model, sequences: list[list[int]], dense: bool, kernel: Kernel) -> tuple[Tensor, int]:
    """All sequences one after the other -> (logits [R, V] of each one's last token, score entries)."""
    lengths = [len(sequence) for sequence in sequences]
    attend = BlockDiagonalAttention(model.config, lengths, dense, kernel)
    row = as_tensor([token_id for sequence in sequences for token_id in sequence], model)  # [sum of lengths]
    restarting = torch.cat([positions(0, length, model) for length in lengths])  # [sum of lengths]
    last_rows = torch.tensor(lengths, device=model.device).cumsum(0) - 1
    return model.logits(model(row, restarting, attend)[last_rows]), attend.score_entries


def _generate(
    model: Model,
    forward: Callable[[list[int]], Pass],
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    tokenizer: Tokenizer | None,
    on_token: Callable[[NewToken], None] | None,
) -> GenerationResult:
    """The loop that all rungs share: forward pass, sample, append, until something stops it."""
    prompt = check_prompt_ids(prompt_token_ids)
    params = check_request(model.config, prompt, params, tokenizer)
    output = OutputBuilder(model.config, params, tokenizer, prompt)
    state = _sampling_state(model, prompt, params)
    began = time.perf_counter()
    trace = Trace(requests=[RequestRecord(REQUEST_ID, 0.0, len(prompt))])
    while output.finish_reason is None:
        start_time = time.perf_counter()
        done = forward(prompt + output.token_ids)
        if done.logits is not None:
            (token_id,) = _sample(done.logits[None], [state], [len(output.token_ids)])
            text = output.append(token_id)
        now = time.perf_counter()
        trace.steps.append(_step_event(trace, done, start_time - began, now - began, output.finish_reason))
        if done.logits is not None and on_token is not None:
            on_token(NewToken(token_id, text, now))
    return output.result(prompt, trace)


def _sampling_state(model: Model, prompt: Sequence[int], params: SamplingParams) -> SamplingState:
    config, ending_ids = model.config, (*params.stop_token_ids, *model.config.eos_token_ids)
    return SamplingState.of(
        params, config.num_sampled_ids, model.device, prompt_token_ids=prompt, ending_ids=ending_ids
    )


def _sample(logits: Tensor, states: Sequence[SamplingState], draws: Sequence[int]) -> list[int]:
    """[R, V] logits -> R token ids. Raises FloatingPointError if a row is not finite."""
    token_ids = sample(logits, states, draws).tolist()
    if min(token_ids) < 0:
        raise FloatingPointError("what the model computed is not finite: no token can be sampled")
    return token_ids


def _step_event(trace: Trace, done: Pass, start_time: float, end_time: float, finish_reason: str | None) -> StepEvent:
    """Describe a pass for the trace."""
    computed_before = trace.steps[-1].scheduled[-1].end if trace.steps else 0
    if done.start < computed_before:
        why = "recompute"
    else:
        why = "prefill" if done.start < trace.requests[0].num_prompt_tokens else "decode"
    return StepEvent(
        step=len(trace.steps),
        start_time=start_time,
        end_time=end_time,
        scheduled=(ScheduledTokens(REQUEST_ID, done.start, done.num_tokens, why, int(done.logits is not None)),),
        finished=() if finish_reason is None else (REQUEST_ID,),
        score_entries=done.score_entries,
        cached_tokens=done.cached_tokens,
    )


class OutputBuilder:
    """Collects the output tokens of one request and knows when it is finished."""

    def __init__(
        self,
        config: ModelConfig,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int] = (),
    ):
        self.params = params
        self.eos_token_ids = config.eos_token_ids
        self.detokenizer = Detokenizer.for_request(tokenizer, params, prompt_token_ids)
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def append(self, token_id: int) -> str:
        """Take the newest token; return the text that has become final with it."""
        self.token_ids.append(token_id)
        self.finish_reason, self.stop_reason = finish_reason(self.token_ids, self.params, self.eos_token_ids)
        if self.detokenizer is None:
            return ""
        text = self.detokenizer.take([token_id], self.finish_reason)
        if self.detokenizer.stopped_by is not None:
            self.finish_reason, self.stop_reason = "stop", self.detokenizer.stopped_by
        return text

    def result(self, prompt: list[int], trace: Trace) -> GenerationResult:
        """Everything about the finished request."""
        counters = Counters(
            forward_passes=len(trace.steps),
            tokens_computed=sum(step.num_tokens for step in trace.steps),
            score_entries=sum(step.score_entries for step in trace.steps),
        )
        text = None if self.detokenizer is None else self.detokenizer.text
        return GenerationResult(
            tuple(prompt), tuple(self.token_ids), text, self.finish_reason, self.stop_reason, counters, trace
        )


def as_tensor(token_ids: Sequence[int], model: Model) -> Tensor:
    """[T] token ids on the model's device."""
    return torch.tensor(token_ids, dtype=torch.long, device=model.device)


def positions(start: int, end: int, model: Model) -> Tensor:
    """[end - start] consecutive positions on the model's device."""
    return torch.arange(start, end, device=model.device)
