"""The page's routes: what happens in the engine as it happens, its trace as a file, and its controls."""

import asyncio
import json

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from httpx import ASGITransport, AsyncClient

from minillm.errors import MiniLLMError
from minillm.serving import AsyncEngine, SlowReaderError
from minillm.serving import live as module
from minillm.serving.live import router
from minillm.trace import load_trace, records_of
from test_async_serving import read, run
from test_llm_engine import THREE, make_engine


@pytest.fixture(scope="module")
def engine(checkpoint):
    engine = AsyncEngine(make_engine(checkpoint("llama")))
    yield engine
    engine.shutdown()


def client(engine) -> AsyncClient:
    app = FastAPI()
    app.include_router(router(engine))

    @app.exception_handler(MiniLLMError)
    async def refused(request, error):
        return JSONResponse({"message": str(error)}, 400)

    return AsyncClient(transport=ASGITransport(app), base_url="http://test")


def test_the_engine_is_set_and_says_how(engine):
    async def main():
        async with client(engine) as http:
            before = (await http.get("/live/control")).json()
            changed = (await http.post("/live/control", json={"max_num_seqs": 2, "batching": "static"})).json()
            assert changed == before | {"max_num_seqs": 2, "batching": "static"}
            for body in (
                b"",
                b"[]",
                b"{",
                b"7",
                b"[" * 4_000,
                b'{"max_num_seqs": 5}',
                b'{"max_num_seqs": 2.0}',
                b'{"max_num_seqs": NaN}',
                b'{"batching": "x"}',
                b'{"paused": "yes"}',
                b'{"step": -1}',
                b'{"other": 1}',
                b"\xff",
            ):
                answer = await http.post("/live/control", content=body)
                assert answer.status_code == 400, body
            long = await http.post("/live/control", content=b'{"paused": ' + b" " * 5_000 + b"true}")
            assert long.status_code == 413
            assert (await http.get("/live/control")).json() == changed
            await http.post("/live/control", json={"max_num_seqs": 4, "batching": "continuous"})
            assert (await http.get("/live/control")).json() == before

    run(main())


def test_a_body_that_does_not_end_is_not_collected(engine):
    sent = []

    async def endless():
        while True:
            sent.append(1)
            yield b" " * 1_000

    async def main():
        async with client(engine) as http:
            return (await http.post("/live/control", content=endless())).status_code

    assert run(main()) == 413 and len(sent) < 10


def test_the_trace_is_a_file_that_can_be_read(engine, tmp_path):
    async def main():
        await asyncio.gather(read(engine, "a"), read(engine, "b", params=THREE))
        async with client(engine) as http:
            return (await http.get("/live/trace")).text, await engine.trace()

    text, trace = run(main())
    (tmp_path / "trace").write_text(text)
    assert load_trace(tmp_path / "trace") == trace
    assert {"a", "b", "b.1", "b.2"} <= {record.request_id for record in trace.requests}


def test_events_are_the_records_of_the_trace_and_what_comes_next(engine):
    async def main():
        before = list(records_of(await engine.trace()))
        events = module._events(engine)
        first = await anext(events)
        await engine.control(paused=True)
        second = await anext(events)
        await engine.control(paused=False)
        await events.aclose()
        return before, first, second

    before, first, second = run(main())
    assert first.endswith("\n\n") and all(line.startswith("data: ") for line in first.strip().split("\n\n"))
    header, config, *records = [json.loads(each.removeprefix("data: ")) for each in first.strip().split("\n\n")]
    assert header == before[0] | {"live": True} and config["config"]["paused"] is False
    assert records == before[1:]
    assert json.loads(second.removeprefix("data: "))["config"]["paused"] is True


def test_the_feeds_of_replicas_that_come_and_go_are_one(checkpoint, monkeypatch):
    monkeypatch.setattr(module, "LOOK_EVERY", 0.05)
    one, two, three = (AsyncEngine(make_engine(checkpoint("llama"))) for _ in range(3))
    replicas = {"one": one, "two": two}

    async def main():
        told = {name: [] for name in ("one", "two", "three")}
        feed = module.merge_feeds(lambda: replicas)

        async def until(name, kind):
            """Read on until that replica has told such a record, and return it."""
            while not told[name] or kind not in told[name][-1]:
                for record in await anext(feed):
                    told[record.pop("replica")].append(record)
            return told[name][-1]

        await until("one", "config")
        await until("two", "config")
        await asyncio.gather(read(one, "a"), read(two, "b"))
        await until("one", "step")
        await until("two", "step")
        replicas["three"] = three
        assert (await until("three", "config"))["config"]["paused"] is False
        del replicas["two"]
        two.shutdown()
        assert await until("two", "gone") == {"gone": True}
        await read(one, "c")
        await until("one", "step")
        await feed.aclose()
        return told

    async def slow():
        raise SlowReaderError("2 outputs were left unread")
        yield

    async def read_slowly():
        one.follow = slow
        async for _ in module.merge_feeds(lambda: replicas):
            pass

    try:
        told = run(main())
        with pytest.raises(SlowReaderError):
            run(read_slowly())
    finally:
        for engine in (one, two, three):
            engine.shutdown()
    assert all("format" in records[0] for records in told.values())
    ids = {name: [each["request"]["request_id"] for each in told[name] if "request" in each] for name in told}
    assert ids == {"one": ["a", "c"], "two": ["b"], "three": []} and not one._subscribers
