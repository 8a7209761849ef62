"""The engine: requests go in at any time, each step of the model brings some of them forward, outputs come out.

engine = LLMEngine("storyteller")
engine.add_request("a", "Once upon a time", SamplingParams(max_tokens=20))
while engine.has_unfinished_requests():
    for output in engine.step():
        ...
"""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from minillm.engine.block_manager import BlockManager
from minillm.engine.engine_config import EngineConfig
from minillm.engine.model_executor import ModelExecutor
from minillm.engine.outputs import OUTPUT_KINDS, Completion, OutputKind, RequestOutput, RequestState
from minillm.engine.prompts import EncodedPrompt, Prompt, check_request, check_token_ids, encode_prompt
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler, StepUpdate, id_in_use
from minillm.errors import (
    ConfigError,
    PromptError,
    SamplingParamsError,
    WorkerDiedError,
    check_choice,
    check_kind,
    check_seconds,
    check_text,
    checked,
)
from minillm.model import Decoder, load_decoder, load_tokenizer, locate, read_config
from minillm.runtime import PendingOutput, SchedulerOutput
from minillm.sampling import SamplingParams, TokenLogprobs
from minillm.trace import Trace


class LLMEngine:
    """Text or token ids in, `RequestOutput`s out: a scheduler, an executor and a tokenizer put together.

    Not for use from several threads at once.
    """

    @checked
    def __init__(
        self,
        model: str | Path | Decoder = "storyteller",
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        config: EngineConfig | None = None,
        skip_tokenizer_init: bool = False,
    ):
        """Load the model (see `load_model` for its name, `dtype`, `device`, `revision`) and reserve the pool.

        With `skip_tokenizer_init` prompts are token ids and outputs have no text. The same holds for a given Decoder:
        it computes in this process ("inline"), in its own dtype and on its own device. Raises the errors of
        `load_model`, ConfigError for arguments that contradict each other or the model, OutOfMemoryError if it does not
        fit.
        """
        given = isinstance(model, Decoder)
        if given:
            device = model.device
        else:
            model, dtype, device = locate(model, dtype, device, revision)
        self.tokenizer = None if given or skip_tokenizer_init else load_tokenizer(model)
        self.model_config = model.config if given else read_config(model, self.tokenizer)
        config = (config or EngineConfig()).resolved(self.model_config.max_position_embeddings, device)
        self.config = config
        if config.worker == "inline" and not given:
            model = load_decoder(model, self.model_config, dtype, device, pack=True)
            self.model_config = model.config
        self.model = model if isinstance(model, Decoder) else None  # None if it is in another process
        num_tokens = self.model_config.num_tokens
        self.executor = ModelExecutor.start(model, config, dtype=dtype, device=device, num_tokens=num_tokens)
        try:
            self.ledger = self.executor.reserve(config)
        except BaseException:  # Ctrl-C as well: leave no process behind
            self.executor.shutdown()
            raise
        block_manager = BlockManager(
            self.ledger.num_blocks,
            config.block_size,
            num_host_blocks=self.ledger.num_host_blocks,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.scheduler = Scheduler(
            config,
            trace=config.trace,
            block_manager=block_manager,
            depth=2 if config.async_scheduling else 1,
            max_trace_steps=config.max_trace_steps,
            preemption_mode=config.preemption_mode,
            watermark=config.watermark,
        )
        self._launched: deque[tuple[SchedulerOutput, PendingOutput]] = deque()  # steps whose tokens are not read yet
        self._states: dict[str, RequestState] = {}  # by their callers' ids, until all has ended and been returned
        self._completions: dict[str, tuple[RequestState, Completion]] = {}  # the same by the scheduler's ids
        self._silent: set[str] = set()  # the scheduler's ids of requests with nothing to do before they end
        self._pending_outputs: list[RequestOutput] = []  # of steps that were over when Ctrl-C came
        self._dead: WorkerDiedError | None = None  # why nothing can be computed any more

    @property
    def trace(self) -> Trace | None:
        """What happened so far, by the engine's clock (seconds since it was made); None if it is not recorded.

        The last `max_trace_steps` steps. It does not grow: ask again for what comes later.
        """
        return self.scheduler.trace

    def has_unfinished_requests(self) -> bool:
        """True while anything waits or runs."""
        return self.scheduler.has_unfinished_requests() or bool(self._pending_outputs)

    def is_unfinished(self, request_id: str) -> bool:
        """True, and its id in use, until all outputs of this request have ended and `step` has returned them."""
        return request_id in self._states

    # --- requests come and go ---

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        arrival_time: float | None = None,
        priority: int = 0,
        output_kind: OutputKind = "cumulative",
    ) -> None:
        """Queue a request. A smaller `priority` goes first if the policy uses it.

        `prompt`: a str, token ids, {"prompt": text} or {"prompt_token_ids": ids}. With a "cache_salt" in the last two,
        prefixes are shared only with requests of the same salt. `arrival_time`: by the engine's clock, now by default.
        An id can be used again once the last output of its request has been returned.
        `output_kind` says what `step` returns: all so far ("cumulative"), what is new ("delta"), or all at the end
        ("final_only", which saves work). Raises PromptError, SamplingParamsError or ConfigError, and then nothing has
        changed; WorkerDiedError after the worker's end.
        """
        self.add(self.prepare(request_id, prompt, params, priority), output_kind, arrival_time)

    def prepare(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0
    ) -> tuple[EncodedPrompt, Request]:
        """Check a request as `add_request` does and change nothing; returns what `add` takes."""
        self.check_alive()
        encoded, params = encode_prompt(prompt, self.tokenizer), SamplingParams() if params is None else params
        check_text("request_id", request_id, error=PromptError)
        self._check_id(request_id)
        check_kind("params", params, SamplingParams, error=SamplingParamsError)
        check_kind("priority", priority, int)
        if priority != 0 and self.config.scheduling_policy != "priority":
            raise ConfigError(
                f"priority is {priority}, which scheduling_policy {self.config.scheduling_policy!r} does not heed; "
                "make an engine with scheduling_policy='priority'"
            )
        check_request(self.model_config, encoded.token_ids, params, self.tokenizer)
        request = Request(
            request_id,
            encoded.token_ids,
            params,
            eos_token_ids=self.model_config.eos_token_ids,
            priority=priority,
            cache_salt=encoded.cache_salt,
        )
        self.scheduler.check(request)
        return encoded, request

    def _check_id(self, request_id: str) -> None:
        """Raises PromptError unless the id is free: its last output returned, whatever the scheduler still holds."""
        if request_id in self._states:
            raise PromptError(id_in_use(request_id))

    def add(
        self,
        prepared: tuple[EncodedPrompt, Request],
        output_kind: OutputKind = "cumulative",
        arrival_time: float | None = None,
        on_abort: Callable[[RequestOutput], None] | None = None,
    ) -> None:
        """Add a request that `prepare` has made; see `add_request`.

        If it is aborted, `on_abort` gets what `step` has not returned yet, the end included.
        """
        check_choice("output_kind", output_kind, OUTPUT_KINDS)
        now = self.scheduler.clock()
        arrival_time = now if arrival_time is None else check_seconds("arrival_time", arrival_time)
        if arrival_time > now:
            raise ConfigError(
                f"arrival_time is {arrival_time}, later than now, {now:.3f} by the engine's clock, which began when it "
                "was made; take the time from `scheduler.clock()`, or leave it out"
            )
        prompt, request = prepared
        self._check_id(request.request_id)
        request.arrival_time = arrival_time
        with HeldInterrupts():
            self.scheduler.add_request(request)
            state = RequestState(prompt, request, self.tokenizer, output_kind, on_abort)
            self._states[request.request_id] = state
            for completion in state.completions:
                self._completions[completion.request.request_id] = (state, completion)
                if not completion.hears_each_token:
                    self._silent.add(completion.request.request_id)

    def abort_request(self, request_id: str) -> bool:
        """End a request with all its outputs; `step` returns nothing more of it, and its id is free.

        False, and no effect, if no request has this id.
        """
        check_text("request_id", request_id, error=PromptError)
        with HeldInterrupts():
            state = self._states.pop(request_id, None)
            if state is None:
                return False
            pending = [output for output in self._pending_outputs if output.request_id == request_id]
            self._pending_outputs = [output for output in self._pending_outputs if output.request_id != request_id]
            unfinished = [completion for completion in state.completions if completion.finish_reason is None]
            for completion in unfinished:  # the ids of the others may belong to new requests by now
                self.scheduler.end_request(completion.request.request_id, "abort")
                self._forget(completion)
            if state.on_abort is not None:
                for output in (*pending, *state.aborted(unfinished)):
                    state.on_abort(output)
            return True

    def prepare_encode(self, prompt: Prompt) -> EncodedPrompt:
        """Check a prompt that is to become a vector; see `LLM.encode`."""
        self.check_alive()
        prompt = encode_prompt(prompt, self.tokenizer)
        check_token_ids(self.model_config, prompt.token_ids)
        most = self.config.max_model_len  # nothing is generated: a prompt may fill it
        if len(prompt.token_ids) > most:
            raise PromptError(f"the prompt has {len(prompt.token_ids)} tokens; encode takes max_model_len = {most}")
        return prompt

    def encode(self, prepared: EncodedPrompt) -> Tensor:
        """The vector of a prompt that `prepare_encode` has checked, [hidden]."""
        return self.executor.encode(prepared.token_ids)

    def reset_prefix_cache(self) -> int:
        """Forget all cached prefixes; returns how many blocks became free."""
        return self.scheduler.reset_prefix_cache()

    # --- a step ---

    def step(self) -> list[RequestOutput]:
        """Compute one step; returns outputs of the requests that got a token or ended, as their `output_kind` says.

        With asynchronous scheduling the next step is launched before this one is waited for. If the model raises, or
        Ctrl-C comes while it computes, no request has advanced: the next step computes again what they need. A later
        Ctrl-C is raised when the step is over, and the next call returns the outputs of both. Raises WorkerDiedError
        if the worker has ended: then every request has failed.
        """
        self.check_alive()
        with HeldInterrupts() as interrupts:
            while len(self._launched) < self.scheduler.depth and self._launch_next(interrupts):
                pass
            if self._launched:
                self._read_next(interrupts)
        told, self._pending_outputs = self._pending_outputs, []
        for output in told:
            if output.finished:
                del self._states[output.request_id]
        return told

    def _launch_next(self, interrupts: "HeldInterrupts") -> bool:
        """Plan a step and launch it; False if there is nothing to compute before the last one has been read."""
        if not self.scheduler.has_unfinished_requests():
            return False
        plan = self.scheduler.schedule()
        if not plan.num_requests:
            return False
        with self._retracting(plan):
            with interrupts.let_through():
                pending = self.executor.launch(plan)
            self._launched.append((plan, pending))
        plan.launched = self.scheduler.clock()
        return True

    def _read_next(self, interrupts: "HeldInterrupts") -> None:
        """Wait for the oldest step that was launched, and take in its results."""
        plan, pending = self._launched[0]
        with self._retracting(plan):
            with interrupts.let_through():
                output = pending.result()
            updates = self.scheduler.update(plan, output)
            self._launched.popleft()
        for request_id, found in output.prompt_logprobs.items():
            # Its id may be another request's by now. That one reads no cache and computes its whole prompt later: what
            # it gets here is replaced before it is returned.
            if request_id in self._completions:
                self._completions[request_id][0].take_prompt_logprobs(found)
        self._pending_outputs += self._outputs(self._changed(updates, output.logprobs))

    @contextmanager
    def _retracting(self, plan: SchedulerOutput) -> Iterator[None]:
        """If the block fails, Ctrl-C included, the step has not happened, nor has any that was launched after it."""
        try:
            yield
        except BaseException as error:
            self._launched.clear()
            self.scheduler.retract(plan)
            if isinstance(error, WorkerDiedError):
                self._end_all(error)
            raise

    def _changed(
        self, updates: StepUpdate, logprobs: Mapping[str, TokenLogprobs]
    ) -> dict[RequestState, list[Completion]]:
        """Pass the new tokens to the outputs concerned; returns those that may have something to report."""
        changed: dict[RequestState, list[Completion]] = {}
        for request_id, token_id in updates.token_ids.items():
            ended = request_id in updates.finish_reasons
            if request_id in self._silent and not ended:
                continue
            state, completion = self._completions[request_id]
            completion.take(token_id, logprobs.get(request_id))
            if completion.finish_reason is not None:
                if not ended:  # a stop string, which the scheduler cannot see
                    self.scheduler.end_request(request_id, completion.finish_reason, completion.stop_reason)
                self._forget(completion)
            changed.setdefault(state, []).append(completion)
        return changed

    def _outputs(self, changed: dict[RequestState, list[Completion]]) -> list[RequestOutput]:
        outputs = (state.output(completions) for state, completions in changed.items())
        return [output for output in outputs if output is not None]

    def _forget(self, completion: Completion) -> None:
        self._completions.pop(completion.request.request_id, None)
        self._silent.discard(completion.request.request_id)

    # --- the end ---

    def shutdown(self) -> None:
        """End every request and the worker. No effect the second time."""
        if self._dead is None:
            self._end_all(WorkerDiedError("this engine has been shut down; make a new one"))
        self.executor.shutdown()

    def _end_all(self, error: WorkerDiedError) -> None:
        self._dead = error
        self._launched.clear()
        self._pending_outputs.clear()
        for request_id in self._completions:
            self.scheduler.end_request(request_id, "error", str(error))
        self._states.clear()
        self._completions.clear()
        self._silent.clear()

    def check_alive(self) -> None:
        """Raises WorkerDiedError if nothing can be computed any more, after `shutdown` or the worker's end."""
        if self._dead is not None:
            raise WorkerDiedError(str(self._dead))

    def check_health(self) -> None:
        """Like `check_alive`, but also if the worker has ended and no step has noticed yet. From any thread."""
        self.check_alive()
        self.executor.check_alive()


class HeldInterrupts:
    """Until this block ends, Ctrl-C (SIGINT) is only noted; then KeyboardInterrupt is raised.

    No effect outside the main thread, the only one that Python interrupts, nor where the program has its own handler.

        with HeldInterrupts() as interrupts:
            change_this()
            with interrupts.let_through():
                wait_for_something_long()
            change_that()
    """

    def __init__(self):
        self._replaced = False  # the handler is ours
        self._holds = False
        self._came = False

    def __enter__(self) -> "HeldInterrupts":
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._hear)
            self._replaced = self._holds = True
        return self

    def __exit__(self, *error) -> None:
        if self._replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._replaced = False
        self._let_go()

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Within this block an interrupt is raised at once, also one that came before."""
        try:
            self._let_go()
            yield
        finally:
            self._holds = self._replaced

    def _let_go(self) -> None:
        self._holds = False
        if self._came:
            self._came = False
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self._holds:
            raise KeyboardInterrupt
        self._came = True
