"""Answers that take long: several requests of the engine as one, ended when the client goes; server-sent events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import pydantic_core
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minillm.engine import RequestOutput
from minillm.serving.http_errors import APIError, from_engine

log = logging.getLogger("minillm.serving")

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Coroutine) -> Any:
    """What `work` returns or raises. Raises ClientGone, with `work` cancelled, as soon as the client disconnects.

    The request's body must have been read.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await ended(task, gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def ended(*tasks: asyncio.Task) -> None:
    """Cancel them, and wait until what they do in the end is done."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def together(sources: Sequence[AsyncIterator[RequestOutput]]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """(which source, its output) of all sources as they come. What one raises is raised, and ends the others."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for output in source:
                yield 0, output
        return
    arrived = asyncio.Queue(1)  # whoever reads slowly leaves the outputs with the engine, which bounds them

    async def read(place: int, source: AsyncIterator[RequestOutput]) -> None:
        try:
            async with aclosing(source):
                async for output in source:
                    await arrived.put((place, output))
        except Exception as error:
            await arrived.put((place, error))

    readers = [asyncio.ensure_future(read(*each)) for each in enumerate(sources)]
    left = len(sources)
    try:
        while left:
            place, output = await arrived.get()
            if isinstance(output, Exception):
                raise output
            yield place, output
            left -= output.finished
    finally:
        await ended(*readers)


class EventStream(Response):
    """Server-sent events: one for each value, then [DONE]. An error in the middle is an event as well.

    When the client goes, the values' source is closed, and with it the engine's requests are ended.
    """

    media_type = "text/event-stream"

    def __init__(self, values: AsyncIterator[dict], source: AsyncGenerator):
        """`source` is where the values come from; it is closed in the end, whatever happens."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._values, self._source = values, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except (ClientGone, OSError):
            return
        finally:
            await self._source.aclose()

    async def _send_all(self, send: Send) -> None:
        async def write(data: bytes, more_body: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more_body})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._values):
            try:
                async for value in self._values:
                    await write(event(value))
            except OSError:
                raise
            except Exception as error:
                await write(event(told(error)))
        await write(DONE, more_body=False)


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + pydantic_core.to_json(value) + b"\n\n"


def told(error: Exception) -> dict:
    """What a client is told of an error after its answer has begun."""
    known = from_engine(error)
    if known is None:
        log.error("a stream failed", exc_info=error)
        known = APIError(500, "the server failed on this request; its log says why")
    return known.answer
