"""Chapter 10, the loop that feeds one engine from many coroutines, and the coroutine that reads one request.

They run on an engine that computes nothing: a request has so many tokens, numbered from 1. It notes what each step
computed, and who called it when.
"""

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from minillm.checks.base import Case, NotWrittenYet, is_stub, run_check
from minillm.errors import PromptError

PATIENCE = 3.0  # seconds in which a case must have ended
IDLE_SECONDS = 0.05
MOST_LOOKS = 100  # for work, of an idle engine
REFUSED = "a prompt that is refused"


@dataclass(frozen=True)
class Script:
    """What happens in a case, and when."""

    text: str  # for the message
    lengths: tuple[tuple[str, int], ...]  # requests that are there from the beginning, and their tokens
    during: tuple[tuple[int, str, str, int], ...] = ()  # (in step, "join" | "abort" | "leave", request, tokens)
    refused: tuple[str, ...] = ()
    idle: bool = False  # nothing is wished for a while first
    stop_after: int = 0  # of stream_request: tokens after which the first request's reader goes
    cancel: bool = False  # it is cancelled while it waits for its next token

    def __repr__(self) -> str:
        return self.text


class Output(NamedTuple):
    """What the engine tells of a request after a step."""

    request_id: str
    number: int  # of its newest token, from 1
    finished: bool


class Params(NamedTuple):
    """As much of SamplingParams as this engine wants."""

    max_tokens: int


class Engine:
    """One that computes nothing. Made on the event loop's thread."""

    def __init__(self, script: Script):
        self.script, self.loop, self.thread = script, asyncio.get_running_loop(), threading.get_ident()
        self.requests: dict[str, list[int]] = {}  # id -> [tokens so far, tokens in the end]
        self.steps: list[tuple[str, ...]] = []  # who took part
        self.aborted: list[str] = []
        self.problem = ""  # the first thing that was done wrong
        self.num_looks, self.act = 0, lambda what, request_id, length: None
        self.wishes_only = False  # add_request and abort_request must come from a wish
        self.in_wish = self._in_step = False

    def has_unfinished_requests(self) -> bool:
        self.num_looks += 1
        return bool(self.requests)

    def add_request(self, request_id: str, prompt: str, params: Params, **others: Any) -> None:
        self._touched("add_request")
        if prompt == REFUSED:
            raise PromptError("this prompt is refused")
        self.requests[request_id] = [0, params.max_tokens]

    def abort_request(self, request_id: str) -> bool:
        self._touched("abort_request")
        self.aborted.append(request_id)
        return self.requests.pop(request_id, None) is not None

    def step(self) -> list[Output]:
        self._touched("step")
        if not self.requests:
            self._note("a step without a request")
        self._in_step = True
        self.steps.append(tuple(self.requests))
        time.sleep(0.001)
        for number, what, request_id, length in self.script.during:
            if number == len(self.steps):
                self._happens(what, request_id, length)
                time.sleep(0.005)  # in which the loop may do what it must not do yet
        outputs = []
        for request_id, counts in list(self.requests.items()):
            counts[0] += 1
            outputs.append(Output(request_id, counts[0], counts[0] == counts[1]))
            if counts[0] == counts[1]:
                del self.requests[request_id]
        self._in_step = False
        return outputs

    def _happens(self, what: str, request_id: str, length: int) -> None:
        """Somebody does something on the event loop, while the step computes."""
        if threading.get_ident() == self.thread:
            self._note("step() on the event loop's thread: nothing else can happen there meanwhile")
            self.loop.call_soon(self.act, what, request_id, length)
            return
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (self.act(what, request_id, length), done.set()))
        if not done.wait(PATIENCE):
            self._note("the event loop stood still during step()")

    def _touched(self, name: str) -> None:
        if self.wishes_only and name != "step" and not self.in_wish:
            self._note(f"{name}() was called outside any wish")
        if self._in_step:
            self._note(f"{name}() while a step was being computed")

    def _note(self, problem: str) -> None:
        self.problem = self.problem or problem


class Ran(NamedTuple):
    """What came of a case."""

    steps: tuple[tuple[str, ...], ...]
    read: dict[str, list]  # of each request, the numbers of its tokens, or the name of an error
    aborted: tuple[str, ...] = ()
    left: tuple[str, ...] = ()  # ids of queues that are still there in the end
    problem: str = ""


def _show(ran: Ran) -> str:
    if ran.problem:
        return ran.problem
    steps = " ".join("+".join(step) or "nobody" for step in ran.steps) or "none"
    read = "; ".join(f"{name} read {numbers}" for name, numbers in ran.read.items())
    aborted = f"; aborted {', '.join(ran.aborted)}" if ran.aborted else ""
    return f"steps {steps}; {read}{aborted}{f'; queues left: {chr(32).join(ran.left)}' if ran.left else ''}"


def _on_problem(got: Ran, case: Case) -> str | None:
    """What has been done wrong is told before what it led to."""
    if "event loop" in got.problem:
        return "`await asyncio.to_thread(engine.step)` computes on another thread, and the loop goes on meanwhile."
    if "outside any wish" in got.problem:
        return "Leave a wish, `wishes.put_nowait((request_id, function))`: only the loop that owns the engine calls it."
    if "while a step" in got.problem:
        return "The engine is touched between two steps alone: by the wishes, in run_engine."
    if "without a request" in got.problem:
        return "With nothing to compute, wait for the next wish: `await wishes.get()`."
    if "does not end" in got.problem:
        return "A loop that awaits nothing lets nobody else do anything; and whoever is cancelled must end."
    if "look" in got.problem:
        return "An idle loop must not ask again and again: `await wishes.get()` sleeps until there is a wish."
    return None


# --- run_engine ------------------------------------------------------------------------------------------------------


def run_engine(function: Callable) -> None:
    """`await run_engine(engine, wishes, queues)`: between two steps do all wishes, then make a step, and put each
    output into the queue of its request; with nothing to compute wait for a wish. It goes on until it is cancelled.

    `wishes` holds (request id, function without arguments): what it raises goes into the queue of the request. What is
    for a request without a queue is dropped.
    """
    _must_be_written("run_engine", function)
    cases = [
        _runs(
            Script("a has 3 tokens", (("a", 3),)),
            Ran((("a",),) * 3, {"a": [1, 2, 3]}),
            "Do the wish, make steps while engine.has_unfinished_requests(), hand each output over.",
        ),
        _runs(
            Script("a has 2 tokens, b has 3", (("a", 2), ("b", 3))),
            Ran((("a", "b"), ("a", "b"), ("b",)), {"a": [1, 2], "b": [1, 2, 3]}),
            "All wishes that are there are done before the step: both are in the first one.",
        ),
        _runs(
            Script("a has 4 tokens; b, 2 tokens, comes in step 2", (("a", 4),), ((2, "join", "b", 2),)),
            Ran((("a",), ("a",), ("a", "b"), ("a", "b")), {"a": [1, 2, 3, 4], "b": [1, 2]}),
            "Look for wishes after every step, not only when there is nothing else to do.",
        ),
        _runs(
            Script(
                "a and b have 4 tokens; in step 2 a's abort is wished", (("a", 4), ("b", 4)), ((2, "abort", "a", 0),)
            ),
            Ran((("a", "b"), ("a", "b"), ("b",), ("b",)), {"a": [1, 2], "b": [1, 2, 3, 4]}, aborted=("a",)),
            "An abort is a wish like others: after the step, before the next.",
        ),
        _runs(
            Script("a and b have 3 tokens; in step 2 a's reader leaves", (("a", 3), ("b", 3)), ((2, "leave", "a", 0),)),
            Ran((("a", "b"), ("a", "b"), ("b",)), {"a": [1], "b": [1, 2, 3]}, aborted=("a",)),
            "A reader who leaves takes its queue along; what the step still brings for it is dropped.",
        ),
        _runs(
            Script("bad is refused, a has 2 tokens", (("bad", 1), ("a", 2)), refused=("bad",)),
            Ran((("a",),) * 2, {"bad": ["PromptError"], "a": [1, 2]}),
            "A wish may raise: that goes into its request's queue, and nobody else hears of it.",
        ),
        _runs(
            Script(
                "a has 3 tokens; bad comes in step 2, is refused, and its reader has gone before",
                (("a", 3),),
                ((2, "join", "bad", 1), (2, "leave", "bad", 0)),
                refused=("bad",),
            ),
            Ran((("a",),) * 3, {"a": [1, 2, 3], "bad": []}, aborted=("bad",)),
            "An exception for a reader who has gone is dropped, like an output.",
        ),
        _runs(
            Script("nothing for a while, then a with 2 tokens", (("a", 2),), idle=True),
            Ran((("a",),) * 2, {"a": [1, 2]}),
            "With nothing to compute, wait for the next wish: `await wishes.get()`.",
        ),
    ]
    run_check("run_engine", _engine_run_by(function), cases, show=_show, same=_same, advise=_on_problem)


def _runs(script: Script, expected: Ran, hint: str) -> Case:
    return Case((script,), expected, hint)


def _same(got: Ran, expected: Ran) -> bool:
    return got == expected


def _engine_run_by(function: Callable) -> Callable:
    def observed(script: Script) -> Ran:
        async def main() -> Ran:
            engine, wishes, queues = Engine(script), asyncio.Queue(), {}
            kept: dict[str, asyncio.Queue] = {}

            def act(what: str, request_id: str, length: int) -> None:
                if what == "join":
                    prompt = REFUSED if request_id in script.refused else "a prompt"
                    kept[request_id] = queues[request_id] = asyncio.Queue()
                    add = lambda: engine.add_request(request_id, prompt, Params(length))  # noqa: E731
                    wishes.put_nowait((request_id, add))
                    return
                if what == "leave":
                    del queues[request_id]
                wishes.put_nowait((request_id, lambda: engine.abort_request(request_id)))

            engine.act = act
            task = asyncio.ensure_future(_coroutine(function(engine, wishes, queues)))
            if script.idle:
                await asyncio.sleep(IDLE_SECONDS)
                if engine.num_looks > MOST_LOOKS:
                    engine.problem = f"{engine.num_looks} looks for work in {IDLE_SECONDS} s with nothing to do"
            for request_id, length in script.lengths:
                act("join", request_id, length)
            await _settled(engine, wishes, task)
            await _cancelled(task)
            read = {name: _numbers(queue) for name, queue in kept.items()}
            return Ran(tuple(engine.steps), read, tuple(engine.aborted), problem=engine.problem)

        return _on_a_loop(main)

    return observed


def _numbers(queue: asyncio.Queue) -> list:
    items = [queue.get_nowait() for _ in range(queue.qsize())]
    return [each.number if isinstance(each, Output) else type(each).__name__ for each in items]


# --- stream_request --------------------------------------------------------------------------------------------------


def stream_request(function: Callable) -> None:
    """`async for output in stream_request(engine, wishes, queues, request_id, prompt, params)`: its outputs as they
    come, the last one with `finished`; an error from its queue is raised.

    However it ends, its queue is gone then; if it ends before the request has, it wishes for its abort.
    """
    _must_be_written("stream_request", function)
    cases = [
        _streams(
            Script("a has 3 tokens", (("a", 3),)),
            {"a": [1, 2, 3]},
            (),
            "Make a queue, wish for add_request, and yield what comes until an output is finished.",
        ),
        _streams(
            Script("a has 2 tokens, b has 4", (("a", 2), ("b", 4))),
            {"a": [1, 2], "b": [1, 2, 3, 4]},
            (),
            "Each request has a queue of its own: queues[request_id].",
        ),
        _streams(
            Script("a and b have 9 tokens; a's reader stops after 2", (("a", 9), ("b", 9)), stop_after=2),
            {"a": [1, 2], "b": [1, 2, 3, 4, 5, 6, 7, 8, 9]},
            ("a",),
            "A reader who stops ends the generator at its `yield`: `finally` is the place for the abort.",
        ),
        _streams(
            Script("a has 3 tokens, b has 4; a's reader stops after its last", (("a", 3), ("b", 4)), stop_after=3),
            {"a": [1, 2, 3], "b": [1, 2, 3, 4]},
            (),
            "A reader need not come back after the last output: the request is over *before* that is yielded.",
        ),
        _streams(
            Script("a and b have 9 tokens; a is cancelled after 1", (("a", 9), ("b", 9)), stop_after=1, cancel=True),
            {"a": [1], "b": [1, 2, 3, 4, 5, 6, 7, 8, 9]},
            ("a",),
            "Cancelled, `await queue.get()` raises CancelledError, and `finally` runs: the abort belongs there.",
        ),
        _streams(
            Script("bad is refused, a has 2 tokens", (("bad", 1), ("a", 2)), refused=("bad",)),
            {"bad": ["PromptError"], "a": [1, 2]},
            (),
            "What comes out of the queue may be an exception: raise it. Then there is nothing to abort.",
        ),
    ]
    run_check("stream_request", _read_by(function), cases, show=_show_read, same=_same_read, advise=_on_problem)


def _streams(script: Script, read: dict[str, list], aborted: tuple[str, ...], hint: str) -> Case:
    return Case((script,), Ran((), read, aborted), hint)


def _same_read(got: Ran, expected: Ran) -> bool:
    """Which steps there were is the engine's; here it counts what was read, aborted and left behind."""
    return got._replace(steps=()) == expected


def _show_read(ran: Ran) -> str:
    return _show(ran) if ran.problem else _show(ran._replace(steps=())).removeprefix("steps none; ")


def _read_by(function: Callable) -> Callable:
    def observed(script: Script) -> Ran:
        async def main() -> Ran:
            engine, wishes, queues = Engine(script), asyncio.Queue(), {}
            read: dict[str, list] = {name: [] for name, _ in script.lengths}

            def outputs_of(request_id: str, length: int) -> Any:
                prompt = REFUSED if request_id in script.refused else "a prompt"
                outputs = function(engine, wishes, queues, request_id, prompt, Params(length))
                if inspect.iscoroutine(outputs):
                    outputs.close()
                    raise TypeError("it is no asynchronous generator: `yield` each output")
                return outputs

            async def reader(request_id: str, length: int, most: int) -> None:
                try:
                    async with aclosing(outputs_of(request_id, length)) as outputs:
                        async for output in outputs:
                            read[request_id].append(output.number)
                            if len(read[request_id]) == most and not script.cancel:
                                return
                            if len(read[request_id]) == most:
                                asyncio.current_task().cancel()  # when it waits for the next one
                except PromptError as error:
                    read[request_id].append(type(error).__name__)

            engine.wishes_only = True
            server = asyncio.ensure_future(_serve(engine, wishes, queues))
            (first, length), *others = script.lengths
            readers = [asyncio.ensure_future(reader(first, length, script.stop_after))]
            readers += [asyncio.ensure_future(reader(name, length, 0)) for name, length in others]
            for each in readers:
                with suppress(asyncio.CancelledError):
                    await asyncio.wait_for(asyncio.shield(each), PATIENCE)
            await _settled(engine, wishes, server)
            await _cancelled(server)
            return Ran(tuple(engine.steps), read, tuple(engine.aborted), tuple(queues), engine.problem)

        return _on_a_loop(main)

    return observed


async def _serve(engine: Engine, wishes: asyncio.Queue, queues: dict) -> None:
    """What `run_engine` has to do."""
    while True:
        while not wishes.empty() or not engine.has_unfinished_requests():
            request_id, wish = await wishes.get()
            engine.in_wish = True
            try:
                wish()
            except Exception as error:
                if request_id in queues:
                    queues[request_id].put_nowait(error)
            engine.in_wish = False
        for output in await asyncio.to_thread(engine.step):
            if output.request_id in queues:
                queues[output.request_id].put_nowait(output)


# --- coroutines of the reader's, run to their end --------------------------------------------------------------------


def _must_be_written(name: str, function: Callable) -> None:
    """A stub of an asynchronous function would only fail inside a loop."""
    if is_stub(function):
        raise NotWrittenYet(f"✗ {name}: not written yet. Replace the `raise NotImplementedError` above.")


def _coroutine(made: Any) -> Coroutine:
    if not inspect.isawaitable(made):
        raise TypeError("run_engine must be an `async def` without `yield`")
    return made


async def _settled(engine: Engine, wishes: asyncio.Queue, task: asyncio.Task) -> None:
    """Until nothing is wished for and nothing computed, or no more result can follow."""
    deadline = time.monotonic() + PATIENCE
    calm = 0
    while calm < 5 and not task.done() and time.monotonic() < deadline:
        await asyncio.sleep(0.002)
        calm = calm + 1 if wishes.empty() and not engine.requests else 0


async def _cancelled(task: asyncio.Task) -> None:
    """End it; raises what it has raised itself."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.shield(task), PATIENCE)


def _on_a_loop(main: Callable[[], Coroutine]) -> Ran:
    """Run it on an event loop of a thread of its own: the notebook's thread has one already."""
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result["ran"] = asyncio.run(main())
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(4 * PATIENCE)
    if thread.is_alive() or isinstance(result.get("error"), TimeoutError):
        return Ran((), {}, problem="nothing: it does not end")
    if "error" in result:
        raise result["error"]
    return result["ran"]
