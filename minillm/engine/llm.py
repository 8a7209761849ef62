"""The engine for a program that has all its prompts: give them, get the outputs in the same order."""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minillm.engine.engine_config import EngineConfig
from minillm.engine.llm_engine import LLMEngine
from minillm.engine.outputs import OutputKind, RequestOutput
from minillm.engine.prompts import EncodedPrompt, Prompt, as_prompts
from minillm.engine.request import Request
from minillm.errors import ConfigError, MiniLLMError, PromptError, SamplingParamsError, check_items, check_kind, checked
from minillm.model import Decoder, Tokenizer, encode_chat
from minillm.sampling import SamplingParams
from minillm.trace import Trace

Message = Mapping  # {"role": …, "content": …}
Prepared = tuple[EncodedPrompt, Request]


class LLM:
    """A model with an engine around it. Also a context manager, which ends in `shutdown`.

        llm = LLM("storyteller", max_num_seqs=32)
        for output in llm.generate(["Once upon a time", "The fox"], SamplingParams(max_tokens=50)):
            print(output.outputs[0].text)

    Every prompt may be a str, token ids, {"prompt": text} or {"prompt_token_ids": ids}. All prompts of a call are
    checked before anything is computed: after PromptError, SamplingParamsError and ConfigError nothing has changed.
    WorkerDiedError means that the worker has ended, and with it every request.
    """

    @checked
    def __init__(
        self,
        model: str | Path | Decoder = "storyteller",
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        skip_tokenizer_init: bool = False,
        verbose: bool = True,
        **engine_arguments,
    ):
        """Load a model and reserve its cache; see `load_model`, and `EngineConfig` for the engine arguments.

        A Decoder that has been made already keeps its dtype and device; its prompts are token ids.

        `verbose` prints to stderr where the memory goes and which kernels compute. Same errors as `LLMEngine`;
        ConfigError for an engine argument that does not exist.
        """
        config = EngineConfig.from_arguments(**engine_arguments)
        self.engine = LLMEngine(
            model,
            dtype=dtype,
            device=device,
            revision=revision,
            config=config,
            skip_tokenizer_init=skip_tokenizer_init,
        )
        self._numbers = count()
        self._takers: dict[str, Callable[[RequestOutput], None]] = {}  # who gets the outputs of a request
        if verbose:
            print(f"{self.engine.ledger}\nkernels: {self.engine.executor.why}", file=sys.stderr)

    @property
    def trace(self) -> Trace | None:
        """Every step since the engine was made; None with `trace=False`."""
        return self.engine.trace

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's own; None with `skip_tokenizer_init`."""
        return self.engine.tokenizer

    def get_tokenizer(self) -> Tokenizer:
        """The model's own. Raises ConfigError with `skip_tokenizer_init`."""
        if self.tokenizer is None:
            raise ConfigError("there is no tokenizer; load without skip_tokenizer_init")
        return self.tokenizer

    # --- text ---

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Returns one output per prompt, in order. A list of whole numbers is one prompt.

        `sampling_params`: one for all, or one for each prompt; `priority`: one number for each, the smallest first. If
        anything fails or is interrupted, the requests of this call are ended and their blocks are free again. A request
        aborted through the engine meanwhile returns what it has so far, with the finish reason "abort".
        """
        prompts = as_prompts(prompts)
        params = self._one_each(sampling_params, len(prompts))
        check_kind("use_tqdm", use_tqdm, bool)
        priorities = [0] * len(prompts) if priority is None else check_kind("priority", priority, Sequence[int])
        if len(priorities) != len(prompts):
            raise ConfigError(f"{len(priorities)} priorities for {len(prompts)} prompts; give one for each")
        prepared = [self._prepare(*each) for each in zip(prompts, params, priorities, strict=True)]
        return self._run(prepared, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence | None = None,
        chat_template_kwargs: Mapping | None = None,
    ) -> list[RequestOutput]:
        """The model's answer to a conversation, a list of {"role": …, "content": …}, or to each of several.

        The messages go through the model's chat template, which gets `tools` and `chat_template_kwargs` unchanged.
        `add_generation_prompt` begins a new message for the answer; `continue_final_message` lets the answer go on with
        the last message instead, so only one of them may be True. Raises PromptError without a template or for messages
        that it does not take, ConfigError for arguments that contradict each other, and the errors of `generate`.
        """
        if self.tokenizer is None:
            raise PromptError("chat needs the tokenizer's chat template; load without skip_tokenizer_init")
        messages = check_items("messages", messages, "messages, [{'role': …, 'content': …}]", error=PromptError)
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = []
        for conversation in conversations:
            text, token_ids = encode_chat(
                self.tokenizer,
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
            )
            prompts.append(EncodedPrompt(token_ids, text))
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yields what is new after each step, as soon as it is there: the texts joined are the whole text.

        Closing or dropping the iterator early ends the request. If it is aborted through the engine, the last output
        has the finish reason "abort". Several streams may run side by side.
        """
        return self._stream(self._prepare(prompt, sampling_params))

    # --- vectors ---

    def encode(self, prompts: Prompt | Sequence[Prompt]) -> list[Tensor]:
        """One vector per prompt, in order: [hidden], the mean of its tokens' final hidden states, float32 at least.

        Computed on its own, beside the engine's requests, at most `max_num_batched_tokens` tokens at once. A prompt has
        at most `max_model_len` tokens. Raises PromptError.
        """
        prepared = [self.engine.prepare_encode(prompt) for prompt in as_prompts(prompts)]
        return [self.engine.encode(prompt) for prompt in prepared]

    # --- the end ---

    def shutdown(self) -> None:
        """End the worker; the LLM computes nothing any more. No effect the second time."""
        self.engine.shutdown()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()

    # --- parts ---

    def _one_each(
        self, params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [SamplingParams() if params is None else params] * num_prompts
        params = check_items("sampling_params", params, "SamplingParams", error=SamplingParamsError)
        if len(params) != num_prompts:
            raise SamplingParamsError(f"{len(params)} sampling parameters for {num_prompts} prompts; give one for each")
        return list(params)

    def _prepare(self, prompt: Prompt, params: SamplingParams | None, priority: int = 0) -> Prepared:
        request_ids = (f"req {number}" for number in self._numbers)
        request_id = next(each for each in request_ids if not self.engine.is_unfinished(each))
        return self.engine.prepare(request_id, prompt, params, priority)

    def _run(self, prepared: list[Prepared], use_tqdm: bool) -> list[RequestOutput]:
        """Add the requests, and compute until all have ended."""
        finished: dict[str, RequestOutput] = {}
        request_ids = [request.request_id for _, request in prepared]
        with tqdm(total=len(prepared), desc="requests", disable=not use_tqdm) as bar:

            def take(output: RequestOutput) -> None:
                finished[output.request_id] = output
                bar.update()

            try:
                now = self.engine.scheduler.clock()
                for each in prepared:
                    self._add(each, "final_only", take, now)
                while len(finished) < len(prepared):
                    self._step()
            finally:
                for request_id in request_ids:
                    self._end(request_id)
        return [finished[request_id] for request_id in request_ids]

    def _stream(self, prepared: Prepared) -> Iterator[RequestOutput]:
        request_id, inbox = prepared[1].request_id, deque()
        try:
            self._add(prepared, "delta", inbox.append)
            while True:
                while inbox:
                    output = inbox.popleft()
                    yield output
                    if output.finished:
                        return
                self._step()
        finally:
            self._end(request_id)

    def _add(
        self, prepared: Prepared, kind: OutputKind, take: Callable[[RequestOutput], None], now: float | None = None
    ) -> None:
        request_id = prepared[1].request_id
        self._takers[request_id] = take
        try:
            self.engine.add(prepared, kind, now, on_abort=self._hand_out)
        except MiniLLMError:  # an id in use belongs to another caller, who must not lose it
            del self._takers[request_id]
            raise

    def _step(self) -> None:
        """One step of the engine, for all calls in progress: streams may be interleaved with anything."""
        for output in self.engine.step():
            self._hand_out(output)

    def _hand_out(self, output: RequestOutput) -> None:
        take = self._takers.get(output.request_id)
        if take is not None:
            take(output)

    def _end(self, request_id: str) -> None:
        """End a request; of one that has ended by itself, only stop waiting for outputs."""
        if self._takers.pop(request_id, None) is not None:
            self.engine.abort_request(request_id)
