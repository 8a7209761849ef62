"""Chapter 10's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

import asyncio
import math
import threading
from contextlib import suppress
from itertools import takewhile

import pytest

from check_answers import message, passes
from minillm import checks
from minillm.checks.base import NotWrittenYet
from minillm.errors import PromptError

# sse_events ---------------------------------------------------------------------------------------


def sse_events(chunks):
    kept, data = b"", []
    for chunk in chunks:
        *lines, kept = (kept + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r").decode()
            if line.startswith("data:"):
                data.append(line[5:].removeprefix(" "))
            elif not line and data:
                event, data = "\n".join(data), []
                if event == "[DONE]":
                    return
                yield event


class Events:
    """The same as an iterator, with a bytearray and one byte after the other."""

    def __init__(self, chunks):
        self.bytes = (byte for chunk in chunks for byte in chunk)

    def __iter__(self):
        return self

    def __next__(self):
        line, data = bytearray(), []
        for byte in self.bytes:
            if byte != 10:
                line.append(byte)
                continue
            field, _, value = line.decode().rstrip("\r").partition(":")
            if field == "data":
                data.append(value[1:] if value[:1] == " " else value)
            if not line.strip(b"\r") and data:
                if data == ["[DONE]"]:
                    raise StopIteration
                return "\n".join(data)
            line.clear()
        raise StopIteration


@pytest.mark.parametrize("right", [sse_events, Events])
def test_sse_events_accepts(right, capsys):
    assert passes(checks.sse_events, right, capsys)


def line_by_line(chunks):
    """Takes every chunk for whole lines."""
    for chunk in chunks:
        for line in chunk.decode().split("\n"):
            if line == "data: [DONE]":
                return
            if line.startswith("data: "):
                yield line[6:]


def all_at_once(chunks):
    return list(sse_events(list(chunks)))


def a_generator_that_reads_all_first(chunks):
    yield from sse_events([b"".join(chunks)])


def decodes_chunks(chunks):
    return sse_events(chunk.decode().encode() for chunk in chunks)


def ignores_errors(chunks):
    return sse_events(chunk.decode(errors="ignore").encode() for chunk in chunks)


def splits_lines(chunks):
    return sse_events(chunk.replace("\u2028".encode(), b"\n") for chunk in chunks)


def goes_on_after_done(chunks):
    for event in sse_events(chunk.replace(b"[DONE]", b"[DONE!") for chunk in chunks):
        if event != "[DONE!":
            yield event


def done_anywhere(chunks):
    for event in sse_events(chunks):
        if "[DONE]" in event:
            return
        yield event


def with_the_rest(chunks):
    """Gives what has no end as an event too."""
    data = b"".join(chunks)
    yield from sse_events([data + b"\n"])


def an_event_per_data_line(chunks):
    for event in sse_events(chunks):
        yield from event.split("\n")


def strips(chunks):
    return (event.strip() for event in sse_events(chunks))


def no_crlf(chunks):
    return (event for event in sse_events(chunk.replace(b"\r", b"#") for chunk in chunks))


def bytes_not_text(chunks):
    return (event.encode() for event in sse_events(chunks))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (line_by_line, "may be cut anywhere"),
        (all_at_once, "before the next chunk is read"),
        (a_generator_that_reads_all_first, "before the next chunk is read"),
        (decodes_chunks, "decode whole lines"),
        (ignores_errors, "decode whole lines"),
        (splits_lines, "split at \\n alone"),
        (goes_on_after_done, "return at once"),
        (done_anywhere, "[DONE] and nothing else"),
        (with_the_rest, "before the next chunk is read"),
        (an_event_per_data_line, "Several data lines are one event"),
        (strips, "One blank behind the colon goes"),
        (no_crlf, "may end with \\r\\n"),
        (bytes_not_text, "that is an event"),
        (lambda chunks: None, "got       None"),
    ],
)
def test_sse_events_refuses(wrong, told):
    assert told in message(checks.sse_events, wrong)


# admission ----------------------------------------------------------------------------------------


def admission(num_requests, most, ended):
    if num_requests < most:
        return None
    pace = max(1, sum(seconds < 10 for seconds in ended)) / 10
    return min(60, max(1, math.ceil(num_requests / 2 / pace)))


def counts_one_if_the_list_is_empty(num_requests, most, ended):
    if num_requests < most:
        return None
    recent = sum(seconds < 10 for seconds in ended) if ended else 1
    return min(60, max(1, math.ceil(5 * num_requests / recent)))


@pytest.mark.parametrize(
    "right", [admission, lambda *args: None if admission(*args) is None else admission(*args) * 1.0]
)
def test_admission_accepts(right, capsys):
    assert passes(checks.admission, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda n, most, ended: None if n <= most else admission(n, most, ended), "16 run or wait already"),
        (lambda n, most, ended: None, "got       None"),
        (lambda n, most, ended: admission(n, most, ended) or 0, "return None, and the request is taken"),
        (lambda n, most, ended: None if n < most else 1, "Half of them end"),
        (lambda n, most, ended: None if n != most else admission(n, most, ended), "full above `most`"),
        (lambda n, most, ended: None if n < most else n / 2 * 10 / max(1, len(ended)), "round up"),
        (lambda n, most, ended: admission(n, most, [0.0] * len(ended)), "less than 10 s ago count"),
        (lambda n, most, ended: None if n < most else math.ceil(n * 5 / sum(s < 10 for s in ended)), "count one"),
        (lambda n, most, ended: admission(n, most, takewhile(lambda s: s < 10, ended)), "has no order that counts"),
        (lambda n, most, ended: admission(n, most, [s - 1e-9 for s in ended]), "exactly 10 s ago does not count"),
        (counts_one_if_the_list_is_empty, "though some did before: count one"),
        (lambda n, most, ended: None if n < most else admission(n // 2 * 2, 0, ended), "4.5, not 4"),
        (lambda n, most, ended: None if n < most else max(1, math.ceil(n * 5 / max(1, len(ended)))), "count"),
        (
            lambda n, most, ended: None if n < most else admission(n if n > 60 else most, 0, ended),
            "not half of `most`",
        ),
    ],
)
def test_admission_refuses(wrong, told):
    assert told in message(checks.admission, wrong)


# run_engine ---------------------------------------------------------------------------------------


def loop(step=asyncio.to_thread, guarded=True, known=True, careful=True):
    """The loop with some of what it needs left out."""

    async def run_engine(engine, wishes, queues):
        while True:
            while not wishes.empty() or not engine.has_unfinished_requests():
                request_id, wish = await wishes.get()
                try:
                    wish()
                except Exception as error:
                    if not guarded:
                        raise
                    if not careful or request_id in queues:
                        queues[request_id].put_nowait(error)
            for output in await step(engine.step):
                if not known or output.request_id in queues:
                    queues[output.request_id].put_nowait(output)

    return run_engine


async def on_a_thread_of_its_own(engine, wishes, queues):
    """A task for the wishes, which wait for a lock; steps on one thread."""
    between, work = asyncio.Lock(), asyncio.Event()

    async def do_wishes():
        while True:
            request_id, wish = await wishes.get()
            async with between:
                with suppress(KeyError):
                    try:
                        wish()
                    except Exception as error:
                        queues[request_id].put_nowait(error)
                if engine.has_unfinished_requests():
                    work.set()
            if wishes.empty():
                await asyncio.sleep(0)

    wisher = asyncio.create_task(do_wishes())
    try:
        while True:
            await work.wait()
            async with between:
                outputs = await asyncio.get_running_loop().run_in_executor(None, engine.step)
                for output in outputs:
                    queue = queues.get(output.request_id)
                    _ = queue and queue.put_nowait(output)
                if not engine.has_unfinished_requests():
                    work.clear()
            for _ in range(3):
                await asyncio.sleep(0)
    finally:
        wisher.cancel()


@pytest.mark.parametrize("right", [loop(), on_a_thread_of_its_own], ids=["loop", "two tasks"])
def test_run_engine_accepts(right, capsys):
    assert passes(checks.run_engine, right, capsys)


async def on_the_loop(step):
    return step()


async def polls(engine, wishes, queues):
    while True:
        await asyncio.sleep(0)
        while not wishes.empty():
            request_id, wish = wishes.get_nowait()
            try:
                wish()
            except Exception as error:
                if request_id in queues:
                    queues[request_id].put_nowait(error)
        if engine.has_unfinished_requests():
            for output in await asyncio.to_thread(engine.step):
                if output.request_id in queues:
                    queues[output.request_id].put_nowait(output)


async def steps_of_nobody(engine, wishes, queues):
    request_id, wish = await wishes.get()
    wish()
    while True:
        for output in await asyncio.to_thread(engine.step):
            queues[output.request_id].put_nowait(output)


async def one_wish_per_step(engine, wishes, queues):
    while True:
        if not wishes.empty() or not engine.has_unfinished_requests():
            (await wishes.get())[1]()
        for output in await asyncio.to_thread(engine.step):
            if output.request_id in queues:
                queues[output.request_id].put_nowait(output)


async def does_wishes_during_a_step(engine, wishes, queues):
    while True:
        while not wishes.empty() or not engine.has_unfinished_requests():
            (await wishes.get())[1]()
        step = asyncio.ensure_future(asyncio.to_thread(engine.step))
        while not step.done():
            await asyncio.sleep(0)
            while not wishes.empty():
                wishes.get_nowait()[1]()
        for output in step.result():
            if output.request_id in queues:
                queues[output.request_id].put_nowait(output)


async def ends_when_idle(engine, wishes, queues):
    while not wishes.empty() or engine.has_unfinished_requests():
        while not wishes.empty():
            request_id, wish = wishes.get_nowait()
            try:
                wish()
            except PromptError as error:
                if request_id in queues:
                    queues[request_id].put_nowait(error)
        for output in await asyncio.to_thread(engine.step):
            if output.request_id in queues:
                queues[output.request_id].put_nowait(output)


async def takes_wishes_when_idle(engine, wishes, queues):
    while True:
        if not engine.has_unfinished_requests():
            (await wishes.get())[1]()
            while not wishes.empty():
                wishes.get_nowait()[1]()
        for output in await asyncio.to_thread(engine.step):
            queues[output.request_id].put_nowait(output)


async def never_awaits(engine, wishes, queues):
    stop = threading.Event()
    while not stop.wait(0.5):
        pass


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (loop(step=on_the_loop), "on the event loop's thread"),
        (takes_wishes_when_idle, "Look for wishes after every step"),
        (loop(guarded=False), "raised    PromptError"),
        (loop(known=False), "raised    KeyError: 'a'"),
        (loop(careful=False), "raised    KeyError: 'bad'"),
        (polls, "looks for work in"),
        (steps_of_nobody, "a step without a request"),
        (one_wish_per_step, "both are in the first one"),
        (does_wishes_during_a_step, "while a step was being computed"),
        (ends_when_idle, "wait for the next wish"),
        (lambda engine, wishes, queues: None, "raised    TypeError: run_engine must be an `async def`"),
    ],
)
def test_run_engine_refuses(wrong, told):
    assert told in message(checks.run_engine, wrong)


def test_a_loop_that_awaits_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("minillm.checks.chapter_10_loop.PATIENCE", 0.05)
    assert "it does not end" in message(checks.run_engine, never_awaits)


# stream_request -----------------------------------------------------------------------------------


async def stream_request(engine, wishes, queues, request_id, prompt, params):
    queue = queues[request_id] = asyncio.Queue()
    wishes.put_nowait((request_id, lambda: engine.add_request(request_id, prompt, params)))
    is_over = False
    try:
        while not is_over:
            output = await queue.get()
            is_over = isinstance(output, Exception) or output.finished
            if isinstance(output, Exception):
                raise output
            yield output
    finally:
        del queues[request_id]
        if not is_over:
            wishes.put_nowait((request_id, lambda: engine.abort_request(request_id)))


class Reader:
    """The same as a class, which an `async for` takes too."""

    def __init__(self, *args):
        self.outputs = stream_request(*args)

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await anext(self.outputs)

    async def aclose(self):
        await self.outputs.aclose()


@pytest.mark.parametrize("right", [stream_request, Reader])
def test_stream_request_accepts(right, capsys):
    assert passes(checks.stream_request, right, capsys)


def reader(cleans=True, aborts="unless over", raises=True, own=True, abort_at_once=False):
    """The coroutine with some of what it needs left out."""

    async def stream(engine, wishes, queues, request_id, prompt, params):
        queue = queues.setdefault("all", asyncio.Queue())
        queues[request_id] = queue = asyncio.Queue() if own else queue
        wishes.put_nowait((request_id, lambda: engine.add_request(request_id, prompt, params)))
        is_over = False
        try:
            while not is_over:
                output = await queue.get()
                if isinstance(output, Exception):
                    is_over = True
                    if raises:
                        raise output
                    return
                is_over = output.finished
                yield output
        finally:
            queues.pop("all", None)
            if cleans:
                queues.pop(request_id, None)
            if aborts == "always" or (aborts == "unless over" and not is_over):
                if abort_at_once:
                    engine.abort_request(request_id)
                else:
                    wishes.put_nowait((request_id, lambda: engine.abort_request(request_id)))

    return stream


async def no_finally(engine, wishes, queues, request_id, prompt, params):
    queue = queues[request_id] = asyncio.Queue()
    wishes.put_nowait((request_id, lambda: engine.add_request(request_id, prompt, params)))
    while True:
        output = await queue.get()
        if isinstance(output, Exception):
            del queues[request_id]
            raise output
        if output.finished:
            del queues[request_id]
        yield output
        if output.finished:
            return


async def over_after_the_yield(engine, wishes, queues, request_id, prompt, params):
    """A reader who does not come back after the last output gets it aborted."""
    queue = queues[request_id] = asyncio.Queue()
    wishes.put_nowait((request_id, lambda: engine.add_request(request_id, prompt, params)))
    is_over = False
    try:
        while not is_over:
            output = await queue.get()
            if isinstance(output, Exception):
                is_over = True
                raise output
            yield output
            is_over = output.finished
    finally:
        del queues[request_id]
        if not is_over:
            wishes.put_nowait((request_id, lambda: engine.abort_request(request_id)))


async def only_when_cancelled(engine, wishes, queues, request_id, prompt, params):
    outputs = reader(aborts="never")(engine, wishes, queues, request_id, prompt, params)
    try:
        async for output in outputs:
            yield output
    except asyncio.CancelledError:
        wishes.put_nowait((request_id, lambda: engine.abort_request(request_id)))
        raise
    finally:
        await outputs.aclose()


async def a_list(engine, wishes, queues, request_id, prompt, params):
    return [each async for each in stream_request(engine, wishes, queues, request_id, prompt, params)]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (reader(cleans=False), "queues left: a"),
        (reader(aborts="never"), "`finally` is the place for the abort"),
        (reader(aborts="always"), "aborted a"),
        (reader(abort_at_once=True), "abort_request() was called outside any wish"),
        (over_after_the_yield, "the request is over *before* that is yielded"),
        (reader(raises=False), "may be an exception"),
        (reader(own=False), "a queue of its own"),
        (no_finally, "`finally` is the place for the abort"),
        (only_when_cancelled, "`finally` is the place for the abort"),
        (a_list, "raised    TypeError: it is no asynchronous generator"),
    ],
)
def test_stream_request_refuses(wrong, told):
    assert told in message(checks.stream_request, wrong)


# stubs --------------------------------------------------------------------------------------------


async def a_stub(*args):
    raise NotImplementedError("write a_stub")


@pytest.mark.parametrize("check", [checks.run_engine, checks.stream_request], ids=lambda check: check.__name__)
def test_what_is_not_written_yet_is_told_so(check):
    with pytest.raises(NotWrittenYet, match=rf"✗ {check.__name__}: not written yet"):
        check(a_stub)


# take ---------------------------------------------------------------------------------------------


def test_take_accepts(capsys):
    assert passes(checks.take, lambda tokens, ahead: sum(ahead) + tokens < 4_300, capsys)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (lambda tokens, ahead: True, "the number of prompts ahead, or their tokens"),
        (lambda tokens, ahead: False, "got       0 in time"),
        (lambda tokens, ahead: len(ahead) < 12, "the number of prompts ahead, or their tokens"),
        (lambda tokens, ahead: sum(ahead) + tokens < 8_000, "A long prompt delays all"),
        (lambda tokens, ahead: tokens < 500, "the number of prompts ahead, or their tokens"),
        (lambda tokens, ahead: len(ahead), "True or False"),
        (lambda tokens, ahead: None, "True or False"),
    ],
)
def test_take_refuses(rule, told):
    assert told in message(checks.take, rule)
