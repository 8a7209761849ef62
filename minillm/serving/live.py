"""Routes below /live, for the page: what happens in the engine as it happens, and the engine's controls."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from minillm.errors import ConfigError
from minillm.serving.async_engine import DrainingError, SlowReaderError
from minillm.serving.bodies import read_body
from minillm.serving.served_engine import ServedEngine
from minillm.trace import trace_lines

CONTROLS = ("paused", "step", "max_num_seqs", "max_num_batched_tokens", "batching")
MOST_BYTES = 4096  # of a body here
BODY_SECONDS = 10.0  # in which it must have arrived
LOOK_EVERY = 1.0  # seconds from one look at which replicas there are to the next
NOT_KEPT = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nor buffered by a proxy


def router(engine: ServedEngine) -> APIRouter:
    """GET /live/events, /live/trace and /live/control, and POST /live/control."""
    routes = APIRouter(prefix="/live", tags=["page"])

    @routes.get("/events", response_class=StreamingResponse, responses={200: {"content": {"text/event-stream": {}}}})
    async def events() -> StreamingResponse:
        """The lines of a trace's file as events, for as long as the engine runs."""
        return StreamingResponse(_events(engine), media_type="text/event-stream", headers=NOT_KEPT)

    @routes.get("/trace", response_class=StreamingResponse, responses={200: {"content": {"application/jsonl": {}}}})
    async def trace(replica: str | None = None) -> StreamingResponse:
        """What has been recorded, as a file that `minillm trace` reads; by one of several replicas."""
        lines = await asyncio.to_thread(trace_lines, await engine.trace(replica))
        return StreamingResponse((line + "\n" for line in lines), media_type="application/jsonl", headers=NOT_KEPT)

    @routes.get("/control")
    async def state() -> JSONResponse:
        """The engine's settings."""
        return JSONResponse(await engine.control())

    @routes.post("/control")
    async def control(http: Request) -> JSONResponse:
        """Change settings: a JSON object with some of paused, step, max_num_seqs, max_num_batched_tokens, batching."""
        return JSONResponse(await engine.control(**changes_in(await read_body(http, MOST_BYTES, BODY_SECONDS))))

    return routes


async def _events(engine: ServedEngine) -> AsyncIterator[str]:
    """A browser that lags behind is disconnected, and reconnects by itself."""
    try:
        async for records in engine.follow():
            yield "".join([f"data: {json.dumps(record)}\n\n" for record in records])
    except (DrainingError, SlowReaderError):
        return


async def merge_feeds(replicas: Callable[[], Mapping[str, ServedEngine]]) -> AsyncIterator[list[dict]]:
    """What `AsyncEngine.follow` tells of each replica, as one feed: every record says whose it is, as "replica".

    `replicas` gives those of now by their names, and is asked again and again: a new one is followed from its header
    on; {"replica": name, "gone": True} comes when one is no longer there, or its feed has ended for whatever reason.
    Raises what `replicas` raises, and SlowReaderError for one who lags behind.
    """
    news, readers, left, look_at = asyncio.Queue(1), {}, set(), 0.0

    async def read(name: str, engine: ServedEngine) -> None:
        told = False
        try:
            async with aclosing(engine.follow()) as feed:
                async for records in feed:
                    await news.put([{"replica": name, **record} for record in records])
                    told = True
        except SlowReaderError:
            raise
        except Exception:  # one that is lost fails in many ways; the others go on
            pass
        if told:
            await news.put([{"replica": name, "gone": True}])

    try:
        while True:
            for name, reader in list(readers.items()):
                if reader.done():
                    readers.pop(name).result()
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + LOOK_EVERY
                now = replicas()
                new = {name: engine for name, engine in now.items() if name not in readers}
                readers |= {name: asyncio.create_task(read(name, engine)) for name, engine in new.items()}
                for name in readers.keys() - now.keys():
                    readers.pop(name).cancel()
                    left.add(name)
                    yield [{"replica": name, "gone": True}]
            try:
                records = await asyncio.wait_for(news.get(), LOOK_EVERY)
            except TimeoutError:
                continue
            if records[0]["replica"] not in left:
                yield records
    finally:
        for reader in readers.values():
            reader.cancel()
        await asyncio.gather(*readers.values(), return_exceptions=True)


def changes_in(body: bytes) -> dict:
    """The settings in a body. Raises ConfigError if it is not a JSON object of settings."""
    try:
        changes = json.loads(body)
    except (ValueError, RecursionError):
        changes = None
    if not isinstance(changes, dict) or not changes.keys() <= set(CONTROLS):
        raise ConfigError(f"the body must be a JSON object with some of {', '.join(CONTROLS)}")
    return changes
