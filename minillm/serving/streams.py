"""Answers that take long are ended when their client goes; server-sent events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import pydantic_core
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minillm.engine import RequestOutput
from minillm.serving.answers import Answer
from minillm.serving.http_errors import APIError, from_engine

log = logging.getLogger("minillm.serving")

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client has disconnected."""


async def unless_gone(receive: Receive, work: Coroutine) -> Any:
    """Returns or raises what `work` does. Raises ClientGone, and cancels `work`, as soon as the client disconnects.

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
    """Cancel the tasks, and wait until their clean-up is done."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events: those of an answer's outputs, then [DONE]. A later error is an event as well. An error before
    the first event is raised, while the status can still be set.

    When the client goes, the outputs' source is closed, and with it the engine's requests are ended.
    """

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, outputs: AsyncGenerator[list[tuple[int, RequestOutput]]]):
        """`outputs` (place of the prompt, output) come in batches. A batch is sent at once."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer, self._outputs = answer, outputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except (ClientGone, OSError):
            return
        finally:
            await self._outputs.aclose()

    async def _send_all(self, send: Send) -> None:
        has_begun = False

        async def write(data: bytes, more_body: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more_body})

        try:
            async for batch in self._outputs:
                if not has_begun:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    has_begun = True
                data = b"".join([event(value) for each in batch for value in self._answer.events(*each)])
                if data:
                    await write(data)
            data = b"".join(map(event, self._answer.last_events()))
        except OSError:
            raise
        except Exception as error:
            if not has_begun:
                raise
            data = event(told(error))
        await write(data + DONE, more_body=False)


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + pydantic_core.to_json(value) + b"\n\n"


def told(error: Exception) -> dict:
    """The event for an error after an answer has begun."""
    known = from_engine(error)
    if known is None:
        log.error("a stream failed", exc_info=error)
        known = APIError(500, "the server failed on this request; its log says why")
    return known.answer
