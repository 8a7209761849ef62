"""One engine, many coroutines: the engine computes on a thread of its own, the only one that touches it. Coroutines
send it what to do ("wishes"), and each reads the outputs of its request.

    async_engine = AsyncEngine(LLMEngine("storyteller"))
    async for output in async_engine.generate("a", "Once upon a time", SamplingParams(max_tokens=20)):
        print(output.outputs[0].text, end="")

    event loop   |generate|..........|read a, b|......|read a, b|
                      | wish     outputs ^        outputs ^
    engine       |....|add|--- step 1 ---|--- step 2 ---|--- step 3

Between two steps the thread carries out the wishes, in order of arrival. After a step all its outputs go to the event
loop in one call: waking the loop once for each of 64 requests would take longer than the step.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from torch import Tensor

from minillm.costs import MemoryLedger
from minillm.engine import (
    ADMISSIONS,
    EngineConfig,
    LLMEngine,
    NotedStep,
    OutputKind,
    Prompt,
    RequestOutput,
    encode_prompt,
    output_id,
)
from minillm.errors import (
    ConfigError,
    Count,
    MiniLLMError,
    Positive,
    WorkerDiedError,
    check_choice,
    check_flag,
    check_whole,
    checked,
    shown,
)
from minillm.model import ModelConfig, Tokenizer
from minillm.sampling import SamplingParams
from minillm.trace import RequestRecord, Trace, record_of, records_of

log = logging.getLogger(__name__)
LONG_TEXT = 2_000  # characters; longer prompts become tokens on a thread of the pool, so that no step waits for them
MOST_FAILED_STEPS = 3  # in a row, before the requests concerned are ended
MOST_SINGLE_STEPS = 1_000  # of a paused engine, asked for at once
KEPT_STEPS = 200  # that a new subscriber gets
MOST_UNREAD_NEWS = 2_000  # steps that a subscriber may lag behind
PACE_SECONDS = 10.0  # over which it is measured how fast requests end
LOOK_EVERY = 0.01  # seconds between checks whether all has ended, while draining


class QueueFullError(MiniLLMError):
    """The queue is full; after `retry_after` seconds, a whole number, there should be room again."""

    def __init__(self, message: str, retry_after: int = 1):
        super().__init__(message)
        self.retry_after = retry_after


class DrainingError(RuntimeError):
    """The engine finishes what it has begun and takes nothing new."""


class SlowReaderError(RuntimeError):
    """A reader left too many outputs unread, so its request was ended."""


class StepFailedError(RuntimeError):
    """The model failed in several steps in a row; the requests in progress have ended."""


def retry_after(num_requests: int, ended: Sequence[float]) -> int:
    """Whole seconds, 1 to 60, until half of `num_requests` have ended, at the pace of the last PACE_SECONDS.

    `ended` is how many seconds ago requests have ended; at least one is taken to have ended in that time.
    """
    recent = sum(seconds < PACE_SECONDS for seconds in ended)
    return min(60, max(1, math.ceil(num_requests / 2 * PACE_SECONDS / max(1, recent))))


class AsyncEngine:
    """An `LLMEngine` for coroutines. It takes the engine over: no other code may call it afterwards."""

    @checked
    def __init__(
        self,
        engine: LLMEngine,
        *,
        max_queue: Count = 256,
        max_unread: Positive = 1024,
        metrics=None,
        model_name: str = "storyteller",
    ):
        """`max_queue`: requests that may wait beside the `max_num_seqs` that can run. `max_unread`: outputs of a
        request that may be unread before it is ended. `metrics` gets every step and output (see `Metrics`).

        Raises ConfigError for an engine that keeps no trace: metrics and page are made from it.
        """
        if not engine.config.trace:
            raise ConfigError("trace is False; a served engine needs it for metrics, and keeps max_trace_steps at most")
        self._engine = engine
        self.max_queue, self.max_unread = max_queue, max_unread
        self.metrics, self.model_name = metrics, model_name
        self._wishes: SimpleQueue[tuple[Callable[[], None], Reply | None]] = SimpleQueue()
        self._lock = threading.Lock()  # so that no wish is added after the last check for them
        self._ended: WorkerDiedError | None = None  # why no more wishes are taken
        self._draining = False
        # What follows belongs to the engine's thread only.
        self._readers: dict[str, Inbox] = {}
        self._subscribers: dict[Inbox, None] = {}
        self._to_tell: dict[asyncio.AbstractEventLoop, list[tuple[Reply, Any]]] = {}
        self._to_encode: deque[tuple[Answer, Prompt]] = deque()
        self._paused, self._steps_allowed = False, 0
        self._num_failed_steps = 0
        self._last_step: int | None = None
        self._stop = False
        self._ends: deque[float] = deque(maxlen=256)  # when the last requests ended
        self._recorder = engine.scheduler.recorder
        if metrics is not None:
            metrics.watch(self)
        self._recorder.news()  # it keeps them from here on
        self._thread = threading.Thread(target=self._run, name="minillm-engine", daemon=True)
        self._thread.start()

    # --- its state; from any thread ---

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's own; None with `skip_tokenizer_init`."""
        return self._engine.tokenizer

    @property
    def config(self) -> EngineConfig:
        """The configuration at the start; `control` returns the current limits."""
        return self._engine.config

    @property
    def model_config(self) -> ModelConfig:
        """The model's shape."""
        return self._engine.model_config

    @property
    def ledger(self) -> MemoryLedger:
        """Where the memory went."""
        return self._engine.ledger

    @property
    def kernels(self) -> str:
        """Which kernels compute, and why."""
        return self._engine.executor.why

    def clock(self) -> float:
        """Seconds since the engine was made, as in the trace."""
        return self._engine.scheduler.clock()

    @property
    def num_running(self) -> int:
        """Requests that take part in steps."""
        return len(self._engine.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that have been taken and do not run."""
        return self._engine.scheduler.num_waiting()

    @property
    def cache_usage(self) -> float:
        """Share of the pool's blocks that are in a block table."""
        usage = self._engine.scheduler.block_manager.usage
        return usage.used / (usage.total - usage.null)

    # --- requests; on an event loop ---

    async def generate(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        output_kind: OutputKind = "delta",
    ) -> AsyncIterator[RequestOutput]:
        """Yields what `LLMEngine.step` returns for a request, until it is finished; arguments as of `add_request`.

        Outputs that were not fetched in time are merged. Closing the iterator, or cancelling the task that waits for
        it, ends the request with all its outputs before the next step. Waiting for the first output raises, before
        anything is allocated, the errors of `add_request`, QueueFullError and DrainingError; waiting for any raises
        WorkerDiedError, SlowReaderError and StepFailedError. An aborted request's last finish reason is "abort".
        """
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        if isinstance(text, str) and len(text) > LONG_TEXT:
            self._check_open()
            prompt = await asyncio.to_thread(encode_prompt, prompt, self.tokenizer)
        requests = [(request_id, prompt, params, priority)]
        async with aclosing(self.generate_together(requests, output_kind)) as batches:
            async for outputs in batches:
                for output in outputs:
                    yield output

    async def generate_together(
        self, requests: Sequence[tuple[str, Prompt, SamplingParams | None, int]], output_kind: OutputKind = "delta"
    ) -> AsyncIterator[list[RequestOutput]]:
        """Several requests (id, prompt, params, priority) for one reader: yields all outputs since it last asked, the
        deltas of a request merged. An error in one ends all; otherwise as `generate`.
        """
        arrival_time = self.clock()
        self._check_open()
        inbox = Inbox(self.max_unread * len(requests), len(requests), merges=output_kind == "delta")
        inbox.on_slow = partial(self._wish_if_open, partial(self._abandon, inbox))
        self._wish(partial(self._add, inbox, requests, output_kind, arrival_time), inbox)
        try:
            while not inbox.has_ended:
                yield await inbox.get()
        finally:
            inbox.closed = True
            if inbox.num_unfinished > 0:
                self._wish_if_open(partial(self._abandon, inbox))

    async def encode(self, prompt: Prompt) -> Tensor:
        """One vector for a prompt, see `LLM.encode`. It is computed between two steps, never two of them in a row.

        Raises PromptError, DrainingError, WorkerDiedError.
        """
        self._check_open()
        prepared = await asyncio.to_thread(self._engine.prepare_encode, prompt)
        answer = Answer()
        self._wish(lambda: self._to_encode.append((answer, prepared)), answer)
        return await answer.future

    async def abort(self, request_id: str) -> bool:
        """End a request; its reader is told. False if no request has this id."""
        return await self._ask(lambda: self._engine.abort_request(request_id))

    async def check_health(self) -> None:
        """Raises WorkerDiedError if nothing can be computed any more, DrainingError if nothing new is taken."""
        if self._ended is not None:
            raise WorkerDiedError(str(self._ended))
        self._engine.check_health()
        self._check_draining()

    # --- what a teacher or an operator does with the whole engine ---

    async def control(
        self,
        *,
        paused: bool | None = None,
        step: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        batching: str | None = None,
    ) -> dict:
        """Change the engine's settings between two steps; returns them, as the "config" of `subscribe`.

        `paused` halts it; `step` is how many steps a halted one computes. The limits may be lower than those it was
        started with; running requests go on, so the limits hold once enough have ended. With `batching` "static" no
        request joins a batch before its last request has ended. Raises ConfigError, and then nothing has changed.
        """

        limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        limits = {name: value for name, value in limits.items() if value is not None}

        def change() -> dict:
            for name, value in limits.items():
                check_whole(name, value, 1, getattr(self.config, name), hint="what the engine was started with")
            if batching is not None:
                check_choice("batching", batching, ADMISSIONS)
            if paused is not None:
                check_flag("paused", paused)
            if step is not None:
                check_whole("step", step, 1, MOST_SINGLE_STEPS)
            scheduler, before = self._engine.scheduler, self._state()
            scheduler.config = replace(scheduler.config, **limits)
            scheduler.batching = batching or scheduler.batching
            if paused is not None and paused != self._paused:
                self._paused, self._steps_allowed = paused, 0
            if step is not None and self._paused:
                self._steps_allowed += step
            if self._state() != before:
                self._publish([{"config": self._state()}])
            return self._state()

        return await self._ask(change)

    async def trace(self, replica: str | None = None) -> Trace:
        """What is recorded so far; no step waits for it to be made. Raises ConfigError if a replica is named."""
        if replica is not None:
            raise ConfigError(f"replica is {shown(replica)}; there is one engine here: leave the name out")
        return await asyncio.to_thread(await self._ask(self._recorder.snapshot))

    async def exposition(self) -> tuple[bytes, str] | None:
        """The figures of `metrics` as text, and its content type."""
        return None if self.metrics is None else await asyncio.to_thread(self.metrics.exposition)

    async def subscribe(self) -> AsyncIterator[dict]:
        """Yields what happens, as it does: the lines of a trace's file, for as long as the engine runs.

        They are the header; {"config": …} as of `control`, again after every change; {"request": …} and {"step": …},
        beginning with the last KEPT_STEPS; {"aborted": [request ids]}, which a trace does not have; and {"tokens":
        {"request_id", "step", "texts"}} of requests whose outputs are "delta". Raises SlowReaderError if the reader
        lags behind, DrainingError at the end.
        """
        async for records in self.follow():
            for record in records:
                yield record

    async def follow(self) -> AsyncIterator[list[dict]]:
        """The same, with all lines of one step together."""
        inbox = Inbox(MOST_UNREAD_NEWS)
        inbox.on_slow = partial(self._wish_if_open, partial(self._subscribers.pop, inbox, None))
        self._wish(partial(self._follow, inbox), inbox)
        try:
            (make, state, unfinished), *news = await inbox.get()
            header, *records = await asyncio.to_thread(lambda: list(records_of(make())))
            gone = missing(records, unfinished)
            yield [header | {"live": True}, {"config": state}, *records, *([{"aborted": gone}] if gone else [])]
            while True:
                for each in news:
                    yield each
                news = await inbox.get()
        finally:
            inbox.closed = True
            self._wish_if_open(partial(self._subscribers.pop, inbox, None))

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests, and return when all have ended; those that have not after `timeout_s` are aborted."""
        self._draining = True
        deadline = time.monotonic() + timeout_s
        try:
            await self._ask(self._go_on)
            while self._readers and time.monotonic() < deadline:
                await asyncio.sleep(LOOK_EVERY)
            await self._ask(self._abort_all)
        except WorkerDiedError:
            return  # the worker's end has ended all requests

    def shutdown(self) -> None:
        """End every request, the thread, and the engine. No effect the second time."""

        def stop() -> None:
            self._stop = True

        self._wish_if_open(stop)
        self._thread.join()

    # --- wishes: from any thread to the engine's ---

    def _wish(self, what: Callable[[], None], reply: "Reply | None" = None) -> None:
        """Have something done between two steps. Raises WorkerDiedError if the thread has ended."""
        with self._lock:
            if self._ended is not None:
                raise WorkerDiedError(str(self._ended))
            self._wishes.put((what, reply))

    def _wish_if_open(self, what: Callable[[], None]) -> None:
        try:
            self._wish(what)
        except WorkerDiedError:
            return

    async def _ask(self, function: Callable[[], Any]) -> Any:
        """Call the function between two steps; returns or raises what it does."""
        answer = Answer()
        self._wish(lambda: self._tell(answer, function()), answer)
        return await answer.future

    def _check_open(self) -> None:
        self._engine.check_alive()
        self._check_draining()
        scheduler = self._engine.scheduler
        most = self.max_queue + scheduler.config.max_num_seqs
        num_requests = scheduler.num_unfinished
        if num_requests >= most:
            if self.metrics is not None:
                self.metrics.count_rejection()
            now = time.monotonic()
            seconds = retry_after(num_requests, [now - end for end in list(self._ends)])
            raise QueueFullError(
                f"{num_requests} requests run or wait, {most} may (max_num_seqs {scheduler.config.max_num_seqs} + "
                f"max_queue {self.max_queue}); try again in {seconds} s",
                seconds,
            )

    def _check_draining(self) -> None:
        if self._draining:
            raise DrainingError("the server is shutting down and takes no new requests; send this one elsewhere")

    # --- the engine's thread ---

    def _run(self) -> None:
        reason = WorkerDiedError("the engine has been shut down; start a new one")
        try:
            while not self._stop:
                self._do_wishes()
                self._encode_next()
                if self._may_step():
                    self._step()
                self._note_news()
                self._hand_over()
        except BaseException as error:  # a bug of ours: no reader may wait for ever
            log.exception("the engine's thread has failed")
            reason = WorkerDiedError(
                f"the engine's thread has failed ({type(error).__name__}: {error}); start it again"
            )
        with self._lock:
            self._ended = reason
        while not self._wishes.empty():
            _, reply = self._wishes.get()
            if reply is not None:
                self._tell(reply, WorkerDiedError(str(reason)))
        self._fail_all(reason)
        for reply in (*self._subscribers, *(answer for answer, _ in self._to_encode)):
            self._tell(reply, WorkerDiedError(str(reason)))
        self._hand_over()
        self._engine.shutdown()

    def _may_step(self) -> bool:
        if self._stop or not self._has_work():
            return False
        if self._paused:
            self._steps_allowed -= 1
        return True

    def _has_work(self) -> bool:
        return self._engine.has_unfinished_requests() and (not self._paused or self._steps_allowed > 0)

    def _do_wishes(self) -> None:
        """Carry out all wishes; without work to do, wait for the next."""
        must_wait = not self._has_work() and not self._to_encode
        while True:
            try:
                what, reply = self._wishes.get(must_wait)
            except Empty:
                return
            must_wait = False
            try:
                what()
            except Exception as error:
                if reply is None:
                    raise
                self._tell(reply, error)

    def _add(self, inbox: "Inbox", requests: Sequence[tuple], output_kind: OutputKind, arrival_time: float) -> None:
        """Add all before the next step: otherwise a static batch would begin with only the first of them."""
        for request in requests if not inbox.closed else ():
            self._check_open()
            prepared = self._engine.prepare(*request)
            self._engine.add(prepared, output_kind, arrival_time, on_abort=self._take_aborted)
            self._readers[request[0]] = inbox

    def _encode_next(self) -> None:
        """Compute one vector, however many wait: requests go on meanwhile. None for a caller that has gone."""
        while self._to_encode:
            answer, prepared = self._to_encode.popleft()
            if not answer.future.done():
                try:
                    self._tell(answer, self._engine.encode(prepared))
                except Exception as error:
                    self._tell(answer, error)
                return

    def _abandon(self, inbox: "Inbox") -> None:
        """End requests that have lost their reader. Their ids may belong to new requests by now."""
        for request_id in [each for each, reader in self._readers.items() if reader is inbox]:
            self._engine.abort_request(request_id)

    def _go_on(self) -> None:
        self._paused = False

    def _abort_all(self) -> None:
        for request_id in list(self._readers):
            self._engine.abort_request(request_id)
        for inbox in self._subscribers:
            self._tell(inbox, DrainingError("the engine has finished all that it had begun"))
        self._subscribers.clear()

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except WorkerDiedError as error:
            log.error("%s", error)
            self._fail_all(error)
            return
        except Exception as error:
            self._step_has_failed(error)
            return
        self._num_failed_steps = 0
        self._note_news()
        if self._subscribers:
            self._publish([{"tokens": each} for output in outputs for each in self._texts(output)])
        for output in outputs:
            self._take(output)

    def _step_has_failed(self, error: Exception) -> None:
        """The step has had no effect, and the next one tries again, a limited number of times."""
        self._num_failed_steps += 1
        log.error("step failed (%d of %d in a row)", self._num_failed_steps, MOST_FAILED_STEPS, exc_info=error)
        if self._num_failed_steps < MOST_FAILED_STEPS:
            return
        for request_id, inbox in list(self._readers.items()):
            self._tell(inbox, StepFailedError(f"the model failed {MOST_FAILED_STEPS} times: {error}"))
            self._engine.abort_request(request_id)
        self._num_failed_steps = 0

    def _note_news(self) -> None:
        """Pass what is new in the trace to the metrics and to subscribers."""
        news = self._recorder.news()
        if self.metrics is not None:
            self.metrics.take_news(news)
        for each in news:
            if isinstance(each, NotedStep):
                self._last_step = each.step
        if self._subscribers:
            self._publish([_line(each) for each in news])

    def _take_aborted(self, output: RequestOutput) -> None:
        self._note_news()  # the metrics may not know of its arrival yet
        if self._num_failed_steps == MOST_FAILED_STEPS:  # not ended by its reader
            for part in output.outputs:
                part.finish_reason = "error" if part.finish_reason == "abort" else part.finish_reason
        names = [self._recorder.name(output_id(output.request_id, part.index)) for part in output.outputs]
        self._publish([{"aborted": names}])
        self._take(output)

    def _take(self, output: RequestOutput) -> None:
        """Pass an output to its reader and to the metrics."""
        inbox = self._readers.get(output.request_id)
        if self.metrics is not None and inbox is not None:
            self.metrics.take_output(output, self._recorder.name, is_delta=inbox.merges)
        if output.finished:
            self._ends.append(time.monotonic())
            self._readers.pop(output.request_id, None)
        if inbox is not None:
            self._tell(inbox, output)

    def _fail_all(self, error: Exception) -> None:
        if self.metrics is not None:
            self.metrics.fail_all()
        readers, self._readers = self._readers, {}
        for inbox in readers.values():
            self._tell(inbox, type(error)(str(error)))

    def _tell(self, reply: "Reply", what: Any) -> None:
        self._to_tell.setdefault(reply.loop, []).append((reply, what))

    def _hand_over(self) -> None:
        """Deliver everything, in one call per event loop."""
        told, self._to_tell = self._to_tell, {}
        for loop, items in told.items():
            try:
                loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:  # the loop is closed, and its readers are gone
                gone = {reply for reply, _ in items}
                for request_id in [each for each, inbox in self._readers.items() if inbox in gone]:
                    self._engine.abort_request(request_id)
                for inbox in gone:
                    self._subscribers.pop(inbox, None)

    # --- what subscribers get ---

    def _state(self) -> dict:
        scheduler, config = self._engine.scheduler, self._engine.config
        return {
            "model": self.model_name,
            "max_num_seqs": scheduler.config.max_num_seqs,
            "max_num_batched_tokens": scheduler.config.max_num_batched_tokens,
            "most_num_seqs": config.max_num_seqs,
            "most_num_batched_tokens": config.max_num_batched_tokens,
            "block_size": config.block_size,
            "num_blocks": self._engine.ledger.num_blocks,
            "batching": scheduler.batching,
            "paused": self._paused,
            "scheduling_policy": config.scheduling_policy,
            "preemption_mode": config.preemption_mode,
        }

    def _follow(self, inbox: "Inbox") -> None:
        self._check_draining()
        self._note_news()  # the others get it now, and this one in what follows
        self._subscribers[inbox] = None
        unfinished = {self._recorder.name(each) for each in self._engine.scheduler.unfinished_ids()}
        self._tell(inbox, (self._recorder.snapshot(KEPT_STEPS), self._state(), unfinished))

    def _texts(self, output: RequestOutput) -> Iterator[dict]:
        """The tokens that a step brought for a request, if its outputs are deltas."""
        inbox = self._readers.get(output.request_id)
        for part in output.outputs if inbox is not None and inbox.merges else ():
            name = self._recorder.name(output_id(output.request_id, part.index))
            yield {"request_id": name, "step": self._last_step, "texts": [part.text]}

    def _publish(self, records: list[dict]) -> None:
        for inbox in self._subscribers if records else ():
            self._tell(inbox, records)


def missing(records: list[dict], unfinished: set[str]) -> list[str]:
    """The requests of a trace that neither ended in one of its steps nor are in progress."""
    known = {each["request"]["request_id"] for each in records if "request" in each}
    ended = {request_id for each in records if "step" in each for request_id in each["step"].get("finished", ())}
    return sorted(known - ended - unfinished)


def _line(event: RequestRecord | NotedStep) -> dict:
    """As in a file of the trace."""
    if isinstance(event, NotedStep):
        return {"step": record_of(event.write())}
    return {"request": record_of(event)}


# --- on the event loop -----------------------------------------------------------------------------------------------


def _deliver(items: list[tuple["Reply", Any]]) -> None:
    for reply, what in items:
        reply.take(what)


class Answer:
    """One result, for one coroutine of this event loop."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.future = self.loop.create_future()

    def take(self, what: Any) -> None:
        if self.future.done():  # the caller was cancelled
            return
        if isinstance(what, Exception):
            self.future.set_exception(what)
        else:
            self.future.set_result(what)


class Inbox:
    """What a coroutine of this event loop has not read yet: at most `most`, then SlowReaderError takes their place."""

    def __init__(self, most: int, num_requests: int = 1, merges: bool = False):
        """`merges`: outputs of a request that are read together are merged."""
        self.loop = asyncio.get_running_loop()
        self.most, self.merges = most, merges
        self.closed = False  # its reader has gone
        self.is_over = False  # nothing more will come
        self.on_slow: Callable[[], None] | None = None
        self.num_unfinished = num_requests  # of the requests that it is for
        self._items: list = []
        self._waiter: asyncio.Future | None = None

    @property
    def has_ended(self) -> bool:
        """True if nothing more will come and all has been read."""
        return self.is_over and not self._items

    def take(self, what: Any) -> None:
        if self.closed or self.is_over:
            return
        if len(self._items) >= self.most:
            self._items.clear()
            what = SlowReaderError(f"{self.most} outputs were left unread; read faster, or do not stream")
            self.on_slow()
        if isinstance(what, RequestOutput):
            self.num_unfinished -= what.finished
        self.is_over = self.num_unfinished == 0 or isinstance(what, Exception)
        self._items.append(what)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> list:
        """All that has come; waits for something. Raises an item that is an exception once those before it are read."""
        while not self._items:
            self._waiter = self.loop.create_future()
            await self._waiter
        self._waiter = None
        items, self._items = self._items, []
        if isinstance(items[-1], Exception):  # nothing comes after one
            if len(items) == 1:
                raise items[0]
            self._items = [items.pop()]
        if self.merges and len(items) > 1:
            outputs: dict[str, RequestOutput] = {}
            for item in items:
                first = outputs.get(item.request_id)
                outputs[item.request_id] = item if first is None else merged(first, item)
            return list(outputs.values())
        return items


Reply = Answer | Inbox


def merged(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Two consecutive deltas of a request as one."""
    parts = {part.index: part for part in first.outputs}
    for new in second.outputs:
        part = parts.setdefault(new.index, new)
        if part is not new:
            new.text = None if new.text is None else part.text + new.text
            new.token_ids = part.token_ids + new.token_ids
            new.logprobs = None if new.logprobs is None else part.logprobs + new.logprobs
            parts[new.index] = new
    second.outputs = list(parts.values())
    if second.prompt_logprobs is None:
        second.prompt_logprobs = first.prompt_logprobs
    return second
