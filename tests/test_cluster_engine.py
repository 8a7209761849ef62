"""Several engines behind a router, in one process: who gets a request, and what is left when one of them goes."""

import asyncio
import inspect
import json
import subprocess
import sys
import time
from contextlib import aclosing, contextmanager

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from minillm import SamplingParams
from minillm.engine import EngineConfig, LLMEngine, PrefixAware, RoundRobin, Router, make_router
from minillm.errors import ConfigError, PromptError, WorkerDiedError
from minillm.runtime import descendants, start_of
from minillm.serving import About, AsyncEngine, ClusterEngine, DrainingError, Metrics, ServedEngine, create_app
from minillm.serving import live as live_module
from served import served, soon
from test_async_serving import LONG, run, until
from test_llm_engine import CONFIG, PROMPT, TEN, alone, make_engine
from tiny_models import random_token_ids

NAMES = ("left", "right")


@contextmanager
def cluster(folder, router: Router | None = None, names=NAMES, **changes):
    """(cluster, name -> replica); the mapping may be changed."""
    replicas = {
        name: AsyncEngine(make_engine(folder, **changes), metrics=Metrics(model_name="tiny"), model_name="tiny")
        for name in names
    }
    every = list(replicas.values())
    engine = ClusterEngine(About.of(every[0]), lambda: dict(replicas), router or RoundRobin())
    try:
        yield engine, replicas
    finally:
        for each in every:
            each.shutdown()
    assert (engine.num_running, engine.num_waiting, +engine._loads) == (0, 0, {})


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("llama")


async def ask(engine, request_id, prompt=PROMPT, params=TEN, kind="delta"):
    """The token ids of an answer's first output."""
    token_ids = []
    prompt = prompt if isinstance(prompt, dict) else {"prompt_token_ids": prompt}
    async with aclosing(engine.generate_together([(request_id, prompt, params, 0)], kind)) as batches:
        async for outputs in batches:
            token_ids += outputs[0].outputs[0].token_ids
    return token_ids


async def who(replicas) -> dict[str, list[str]]:
    """Name -> the requests that this replica has recorded."""
    return {name: [each.request_id for each in (await engine.trace()).requests] for name, engine in replicas.items()}


def test_one_engine_and_a_cluster_have_what_the_server_asks_for():
    asked = {name: each for name, each in vars(ServedEngine).items() if not name.startswith("_")}
    assert len(asked) > 10
    for name, each in asked.items():
        for kind in (AsyncEngine, ClusterEngine):
            if inspect.isfunction(each):
                found = inspect.signature(getattr(kind, name)).parameters
                wanted = inspect.signature(each).parameters
                assert name == "control" or list(found) == list(wanted), (kind, name)
                assert inspect.iscoroutinefunction(getattr(kind, name)) == inspect.iscoroutinefunction(each)


# --- who gets a request ----------------------------------------------------------------------------------------------


def test_each_gets_what_it_would_get_alone_wherever_it_is_computed(folder):
    prompts = [random_token_ids(3 + i % 7, seed=i) for i in range(10)]
    expected = [alone(make_engine(folder), prompt, TEN) for prompt in prompts]

    async def main(engine, replicas):
        found = await asyncio.gather(*(ask(engine, str(i), prompt) for i, prompt in enumerate(prompts)))
        return found, await who(replicas)

    with cluster(folder) as (engine, replicas):
        found, places = run(main(engine, replicas))
    assert found == expected
    assert places == {"left": ["0", "2", "4", "6", "8"], "right": ["1", "3", "5", "7", "9"]}


def test_prompts_with_one_prefix_go_to_the_replica_that_has_it(folder):
    heads = [random_token_ids(12, seed=i) for i in range(4)]

    async def main(engine, replicas):
        for turn in range(3):
            for i, head in enumerate(heads):
                await ask(engine, f"{i}-{turn}", [*head, 1 + turn])
        return await who(replicas)

    with cluster(folder, PrefixAware(CONFIG.block_size)) as (engine, replicas):
        places = run(main(engine, replicas))
        hits = {name: each.metrics.counters["prefix_cache_hits"] for name, each in replicas.items()}
    for i in range(4):
        assert sum(any(each.startswith(f"{i}-") for each in ids) for ids in places.values()) == 1, places
    assert sum(hits.values()) == 4 * 2 * 12


def test_a_salt_is_part_of_the_prefix_and_a_text_has_none(folder):
    chosen = []

    class Noted(RoundRobin):
        def _choose(self, loads, token_ids, salt):
            chosen.append((dict(loads), list(token_ids), salt))
            return super()._choose(loads, token_ids, salt)

    async def main(engine):
        await ask(engine, "a", {"prompt_token_ids": PROMPT, "cache_salt": "mine"})
        with pytest.raises(PromptError):  # these replicas have no tokenizer
            async with aclosing(engine.generate_together([("b", "text", TEN, 0)])) as batches:
                await anext(batches)

    with cluster(folder, Noted()) as (engine, _):
        run(main(engine))
    idle = dict.fromkeys(NAMES, 0)
    assert chosen == [(idle, list(PROMPT), "mine"), (idle, [], "")]


def test_the_load_is_every_output_in_progress_and_falls_again(folder):
    three = SamplingParams(max_tokens=25, ignore_eos=True, n=3, temperature=1.0, seed=1)

    async def main(engine, replicas):
        for each in replicas.values():
            await each.control(paused=True)
        tasks = [asyncio.create_task(ask(engine, f"{i}", params=params)) for i, params in enumerate((three, LONG))]
        await until(lambda: all(each.num_waiting for each in replicas.values()))
        before = dict(engine._loads), engine.num_waiting, engine.num_running
        for each in replicas.values():
            await each.control(paused=False)
        await until(lambda: engine.num_running == 2)
        await asyncio.gather(*tasks)
        return before

    with cluster(folder) as (engine, replicas):
        assert run(main(engine, replicas)) == ({"left": 3, "right": 1}, 2, 0)


def test_a_reader_that_leaves_ends_its_request_where_it_runs(folder):
    async def main(engine, replicas):
        batches = engine.generate_together([("a", {"prompt_token_ids": PROMPT}, LONG, 0)])
        await anext(batches)
        assert engine.num_running == 1
        await batches.aclose()
        await until(lambda: all(each.num_running == 0 and each.cache_usage == 0 for each in replicas.values()))

    with cluster(folder) as (engine, replicas):
        run(main(engine, replicas))


def test_abort_finds_the_replica(folder):
    async def main(engine):
        task = asyncio.create_task(ask(engine, "a", params=LONG))
        await until(lambda: engine.num_running)
        assert await engine.abort("a") is True and await engine.abort("b") is False
        assert len(await task) < 25

    with cluster(folder) as (engine, _):
        run(main(engine))


def test_a_vector_comes_from_the_least_loaded(folder):
    async def main(engine, replicas):
        async with aclosing(engine.generate_together([("a", {"prompt_token_ids": PROMPT}, LONG, 0)])) as batches:
            await anext(batches)
            asked = []
            replicas["left"].encode = lambda prompt: asked.append(prompt)
            return await engine.encode({"prompt_token_ids": PROMPT}), asked

    with cluster(folder) as (engine, replicas):
        vector, asked = run(main(engine, replicas))
    assert vector.dtype == torch.float64 and vector.ndim == 1 and asked == []


# --- replicas that go ------------------------------------------------------------------------------------------------


def test_a_lost_replica_ends_its_streams_alone_and_a_new_one_takes_its_place(folder):
    expected = alone(make_engine(folder), PROMPT, LONG)

    async def main(engine, replicas):
        tasks = [asyncio.create_task(ask(engine, str(i), params=LONG)) for i in range(4)]
        await until(lambda: engine.num_running == 4)
        replicas["left"].shutdown()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert await asyncio.gather(*(ask(engine, f"new {i}", params=LONG) for i in range(3))) == [expected] * 3
        replicas["third"] = AsyncEngine(make_engine(folder))
        del replicas["left"]
        assert await asyncio.gather(*(ask(engine, f"newer {i}", params=LONG) for i in range(4))) == [expected] * 4
        places = await who(replicas)
        replicas["third"].shutdown()
        return found, places

    with cluster(folder) as (engine, replicas):
        found, places = run(main(engine, replicas))
        assert engine._lost == set()
    assert [type(each) for each in found] == [WorkerDiedError, list, WorkerDiedError, list]
    assert found[1] == found[3] == expected
    assert sorted(map(len, places.values())) == [2, 7]


class Dead:
    """A replica that is lost as soon as it is asked."""

    def __init__(self, error: Exception):
        self.error, self.num_asked = error, 0

    async def generate_together(self, requests, output_kind="delta"):
        self.num_asked += 1
        raise self.error
        yield

    async def control(self, **changes):
        raise self.error


def test_what_has_not_begun_is_sent_to_another_replica_but_once(folder):
    """A request that ends replicas must not end them all."""

    async def main(engine, replicas, dead):
        alive = dict(replicas)
        replicas.clear()
        replicas |= {f"dead {i}": each for i, each in enumerate(dead[:1])} | alive
        assert len(await ask(engine, "a")) == 10 and dead[0].num_asked == 1
        assert len(await ask(engine, "b")) == 10 and dead[0].num_asked == 1  # it is not asked again
        replicas |= {f"dead {i}": each for i, each in enumerate(dead)}
        del replicas["dead 0"], replicas["left"], replicas["right"]
        with pytest.raises(WorkerDiedError, match="gone"):
            await ask(engine, "c")
        assert sum(each.num_asked for each in dead[1:]) == 2

    with cluster(folder) as (engine, replicas):
        run(main(engine, replicas, [Dead(WorkerDiedError("gone")) for _ in range(4)]))


def test_replicas_that_drain_lose_no_request(folder):
    draining = [Dead(DrainingError("it ends")) for _ in range(3)]

    async def main(engine, replicas):
        replicas |= {f"draining {i}": each for i, each in enumerate(draining)}
        del replicas["right"]
        assert [len(await ask(engine, str(i))) for i in range(8)] == [10] * 8
        assert [each.num_asked for each in draining] == [1, 1, 1]

    with cluster(folder) as (engine, replicas):
        run(main(engine, replicas))


def test_an_error_of_the_request_is_its_own(folder):
    async def main(engine, replicas):
        with pytest.raises(PromptError):
            await ask(engine, "a", [1] * 1000)
        assert len(engine.replicas()) == 2

    with cluster(folder) as (engine, replicas):
        run(main(engine, replicas))


def test_without_a_replica_it_says_so(folder):
    async def main(engine, replicas):
        for each in replicas.values():
            each.shutdown()
        for ask_for in (ask(engine, "a"), engine.encode(PROMPT), engine.control(), engine.exposition()):
            with pytest.raises(WorkerDiedError):
                await ask_for
        replicas.clear()
        for ask_for in (ask(engine, "a"), engine.encode(PROMPT), engine.check_health(), engine.control()):
            with pytest.raises(WorkerDiedError, match="no replica is left"):
                await ask_for

    with cluster(folder) as (engine, replicas):
        run(main(engine, replicas))


@pytest.mark.parametrize("in_time", [True, False])
def test_drain_takes_nothing_new_and_waits_as_long_as_it_may(folder, in_time):
    async def main(engine, replicas):
        for each in replicas.values():
            await each.control(paused=not in_time)
        tasks = [asyncio.create_task(ask(engine, str(i), params=LONG)) for i in range(4)]
        await until(lambda: all(each.num_running + each.num_waiting == 2 for each in replicas.values()))
        drained = asyncio.create_task(engine.drain(20 if in_time else 0.05))
        await asyncio.sleep(0)
        for refused in (ask(engine, "late"), engine.check_health()):
            with pytest.raises(DrainingError):
                await refused
        await drained
        return [len(each) for each in await asyncio.gather(*tasks)]

    with cluster(folder) as (engine, replicas):
        assert run(main(engine, replicas)) == [25 if in_time else 0] * 4


# --- all of them -----------------------------------------------------------------------------------------------------


def test_settings_are_those_of_all(folder):
    async def main(engine, replicas):
        before = await engine.control()
        assert await engine.control(max_num_seqs=2) == before | {"max_num_seqs": 2}
        assert [await each.control() for each in replicas.values()] == [before | {"max_num_seqs": 2}] * 2
        with pytest.raises(ConfigError, match="max_num_seqs"):
            await engine.control(max_num_seqs=500)

    with cluster(folder) as (engine, replicas):
        run(main(engine, replicas))


def test_each_replica_has_its_trace(folder):
    async def main(engine, replicas):
        await asyncio.gather(*(ask(engine, str(i)) for i in range(4)))
        for wrong in (None, "third"):
            with pytest.raises(ConfigError, match="left"):
                await engine.trace(wrong)
        found = await engine.trace("right")
        assert found == await replicas["right"].trace() and len(found.requests) == 2
        with pytest.raises(ConfigError, match="leave the name out"):
            await replicas["right"].trace("right")
        del replicas["left"]
        assert await engine.trace() == found

    with cluster(folder) as (engine, replicas):
        run(main(engine, replicas))


def test_metrics_tell_the_replica_and_each_family_once(folder):
    async def main(engine):
        await asyncio.gather(*(ask(engine, str(i)) for i in range(3)))
        return await engine.exposition()

    with cluster(folder) as (engine, replicas):
        text, kind = run(main(engine))
        single = replicas["left"].metrics.exposition()[0].decode()
    assert kind.startswith("text/plain")
    families = list(text_string_to_metric_families(text.decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names)) == len(list(text_string_to_metric_families(single))) > 20
    assert text.decode().count("# TYPE minillm:generation_tokens_total counter\n") == 1
    samples = {(each.name, each.labels["replica"]): each for family in families for each in family.samples}
    assert {replica for _, replica in samples} == set(NAMES)
    tokens = {name: samples["minillm:generation_tokens_total", name] for name in NAMES}
    assert {name: each.value for name, each in tokens.items()} == {"left": 20, "right": 10}
    assert tokens["left"].labels == {"model_name": "tiny", "engine": "0", "replica": "left"}


def test_the_feed_says_first_whose_record_it_is_and_who_has_gone(folder, monkeypatch):
    monkeypatch.setattr(live_module, "LOOK_EVERY", 0.05)

    async def main(engine, replicas):
        feed, found = engine.follow(), []
        while {each["replica"] for each in found} != set(NAMES):
            found += await anext(feed)
        del replicas["left"]  # it still runs: so it is when a replica drains
        while "gone" not in found[-1]:
            found += await anext(feed)
        await ask(engine, "a")
        while "step" not in found[-1]:
            found += await anext(feed)
        await feed.aclose()
        return found

    with cluster(folder) as (engine, replicas):
        left = replicas["left"]
        found = run(main(engine, replicas))
        assert not left._subscribers
    assert all(next(iter(each)) == "replica" for each in found)
    assert [each["replica"] for each in found if "gone" in each] == ["left"] and found[-1]["replica"] == "right"


# --- behind the server -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def storytellers():
    config = EngineConfig(num_blocks=200, max_model_len=512)
    replicas = {name: AsyncEngine(LLMEngine("storyteller", config=config), metrics=Metrics()) for name in NAMES}
    yield replicas
    for each in replicas.values():
        each.shutdown()


def test_the_server_answers_with_replicas_as_with_one(storytellers):
    engine = ClusterEngine(About.of(storytellers["left"]), lambda: storytellers, make_router("prefix-aware", 16))
    body = {"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0}

    def texts(url):
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
        whole = [httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(2)]
        streamed = httpx.post(f"{url}/v1/completions", json=body | {"stream": True}).text
        events = [json.loads(each[6:]) for each in streamed.split("\n\n")[:-2]]
        return (
            whole,
            "".join(each["choices"][0]["text"] for each in events),
            httpx.post(f"{url}/v1/chat/completions", json=chat).json()["choices"][0]["message"],
            httpx.post(f"{url}/v1/embeddings", json={"input": "A dog"}).json()["data"],
            httpx.post(f"{url}/tokenize", json={"prompt": "A dog"}).json(),
            [
                httpx.get(f"{url}{path}").status_code
                for path in ("/health", "/metrics", "/", "/live/control", "/v1/models")
            ],
            httpx.post(f"{url}/v1/completions", json=body | {"max_tokens": 0}).status_code,
        )

    with served(create_app(storytellers["right"])) as url:
        expected = texts(url)
        assert httpx.get(f"{url}/live/trace").status_code == 200
    with served(create_app(engine)) as url:
        assert texts(url) == expected
        assert httpx.get(f"{url}/live/trace").status_code == 400
        assert httpx.get(f"{url}/live/trace", params={"replica": "left"}).status_code == 200
        assert 'replica="right"' in httpx.get(f"{url}/metrics").text
    assert len(set(expected[0])) == 1


def test_a_stream_of_a_lost_replica_ends_with_an_error_event():
    config = EngineConfig(num_blocks=200, max_model_len=512)
    replicas = {name: AsyncEngine(LLMEngine("storyteller", config=config)) for name in NAMES}
    engine = ClusterEngine(About.of(replicas["left"]), lambda: replicas, RoundRobin())
    body = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "stream": True}
    try:
        with served(create_app(engine)) as url, httpx.Client(timeout=60) as client:
            with (
                client.stream("POST", f"{url}/v1/completions", json=body) as first,
                client.stream("POST", f"{url}/v1/completions", json=body) as second,
            ):
                lines = [first.iter_lines(), second.iter_lines()]
                assert all(next(each).startswith("data: {") for each in lines)
                replicas["left"].shutdown()
                told = [[line for line in each if line] for each in lines]
            assert json.loads(told[0][-2][6:])["error"]["code"] == 503 and told[0][-1] == "data: [DONE]"
            assert json.loads(told[1][-2][6:])["choices"][0]["finish_reason"] == "length"
            assert client.post(f"{url}/v1/completions", json=body | {"max_tokens": 3}).status_code == 200
    finally:
        for each in replicas.values():
            each.shutdown()


def test_what_a_lost_process_had_started_ends_and_nothing_else():
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    watch = "[sys.executable, '-c', 'import os; from minillm.runtime import end_family_with; "
    watch += "end_family_with(os.getppid())']"
    starter = subprocess.Popen([sys.executable, "-c", f"{code}subprocess.Popen({watch}); time.sleep(600)"])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        soon(lambda: len(descendants(starter.pid)) == 2, 60)
        family = {pid: start_of(pid) for pid in descendants(starter.pid)}
        time.sleep(3)  # the watch has begun
        starter.kill()
        starter.wait()
        soon(lambda: not any(start_of(pid) == start for pid, start in family.items()), 60)
        assert other.poll() is None
    finally:
        starter.kill(), other.kill()
        starter.wait(), other.wait()
