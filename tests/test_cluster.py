"""Replicas on Ray Serve, as processes: `make test-cluster` runs this."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import yaml

from minillm import LLM, SamplingParams
from minillm.bench import recorded, replicas
from minillm.cli.main import main
from minillm.engine import ROUTERS, EngineConfig
from minillm.errors import ConfigError
from minillm.serving import ClusterOptions, ServerOptions
from served import STORY, Answered, ServedProcess, is_closed, soon
from test_faults import CHANGES, COMPLETIONS, CONTEXT, FAULTS, OPTIONS, Fault, Others, probe, undisturbed

pytestmark = pytest.mark.cluster
ray = pytest.importorskip("ray")

ROOT = Path(__file__).parents[1]
START, RECOVERY = 600.0, 240.0  # seconds: two cores may have other work
CLUSTER = [*OPTIONS, "--replicas=2", "--cpus-per-replica=0.5", "--router=round-robin"]
NOT_HERE = {"NaN in one row", "the clock jumps twelve years ahead, and back behind"}  # they change a process of its own
LONG = {"prompt": STORY, "max_tokens": CONTEXT - 9, "ignore_eos": True, "temperature": 0, "stream": True}


class Cluster(ServedProcess):
    """`minillm serve --replicas 2`."""

    def __init__(self, *options: str, changes: str = ""):
        super().__init__(*CLUSTER, *options, changes=changes, within=START)

    def by_replica(self) -> dict[str, dict[str, float]]:
        """Name -> the figures of this replica."""
        text, found = self.ask("GET", "/metrics").body.decode(), {}
        for name, replica, value in re.findall(r'^minillm:(\w+)\{[^}]*replica="(\w+)"\} (\S+)$', text, re.MULTILINE):
            found.setdefault(replica, {})[name] = float(value)
        return found

    def metrics(self) -> dict[str, float]:
        """The sums over the replicas."""
        total = Counter()
        for figures in self.by_replica().values():
            total.update(figures)
        return total

    def actors(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        found = []
        for each in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [each] if "".join(each.cmdline()).startswith("ray::ServeReplica") else []
        return found

    def end_and_look(self, *signals: int) -> int:
        """End it; no process of it is left."""
        children = self.process.children(recursive=True)
        code = self.end(*signals, within=RECOVERY)
        soon(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in children), 60)
        return code


@pytest.fixture(scope="module")
def server():
    with Cluster(changes=CHANGES) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=START) as client:
        yield client


@pytest.fixture(scope="module")
def expected():
    """The whole text of LONG."""
    params = SamplingParams(max_tokens=LONG["max_tokens"], ignore_eos=True)
    with LLM("storyteller", num_blocks=200, max_model_len=CONTEXT, verbose=False) as llm:
        return llm.generate(STORY, params, use_tqdm=False)[0].outputs[0].text


# --- minillm serve --replicas 2 --------------------------------------------------------------------------------------


def test_clients_get_what_one_engine_says_and_both_replicas_serve(client, server, expected):
    given = {
        "model": "storyteller",
        "prompt": STORY,
        "max_tokens": 24,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }

    def whole(_) -> str:
        return client.completions.create(**given).choices[0].text

    def streamed(_) -> str:
        return "".join(event.choices[0].text for event in client.completions.create(stream=True, **given))

    with ThreadPoolExecutor(8) as pool:
        texts = {*pool.map(whole, range(8)), *pool.map(streamed, range(8))}
    assert len(texts) == 1 and expected.startswith(texts.pop())
    assert [each["generation_tokens_total"] for each in server.by_replica().values()] == [8 * 24] * 2
    chat = client.chat.completions.create(
        model="storyteller", messages=[{"role": "user", "content": "Hello"}], max_tokens=5
    )
    assert chat.choices[0].message.content
    assert len(client.embeddings.create(model="storyteller", input=["A dog", "x"]).data) == 2
    usage = client.completions.create(**given | {"max_tokens": 3}).usage
    assert usage.completion_tokens == 3 and usage.prompt_tokens > 3


def test_errors_are_as_of_one_engine(client):
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="storyteller", prompt=STORY, max_tokens=0)
    assert wrong.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as wrong:  # the engine itself refuses this one
        client.completions.create(model="storyteller", prompt=STORY, extra_body={"priority": 1})
    assert "priority" in str(wrong.value) and "Traceback" not in str(wrong.value)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt=STORY)


@pytest.mark.parametrize("row", [row for row in FAULTS if row.name not in NOT_HERE], ids=lambda row: row.name)
def test_a_fault_harms_nobody_else(server, row: Fault):
    before = undisturbed(server)
    with Others(server, before[1]):
        row.happen(server)
    soon(server.is_quiet, RECOVERY)
    assert probe(server) == before[0]


def test_a_replica_killed_in_mid_stream_ends_its_streams_alone_and_another_comes(server, expected):
    names = set(server.by_replica())
    told: list[dict] = []
    threading.Thread(target=read_page, args=(server, told), daemon=True).start()
    soon(lambda: {each["replica"] for each in told} == names)
    streams = [server.send("POST", COMPLETIONS, LONG) for _ in range(6)]
    for stream in streams:
        stream.recv(1, socket.MSG_PEEK)
    victim = server.actors()[0]
    victim.kill()
    answers = [Answered(stream) for stream in streams]
    broken = [each for each in answers if "error" in each.events[-1]]
    assert len(broken) == 3
    for each in broken:
        error = each.events[-1]["error"]
        assert error["code"] == 503 and re.search(r"replica \w+ has ended", error["message"])
        assert expected.startswith("".join(event["choices"][0]["text"] for event in each.events[:-1]))
    assert {each.text for each in answers if each not in broken} == {expected}
    lost = {re.search(r"replica (\w+) has", each.events[-1]["error"]["message"])[1] for each in broken}
    assert len(lost) == 1 and lost < names
    for _ in range(4):  # while there is one
        assert server.ask("POST", COMPLETIONS, LONG | {"max_tokens": 3}).status == 200
    assert server.ask("GET", "/health").status == 200
    soon(lambda: len(server.by_replica()) == 2 and not lost & server.by_replica().keys(), RECOVERY)
    (new,) = server.by_replica().keys() - names
    for _ in range(2):
        assert server.ask("POST", COMPLETIONS, LONG | {"max_tokens": 3}).status == 200
    assert server.by_replica()[new]["generation_tokens_total"] == 3
    soon(lambda: {each["replica"] for each in told} == names | {new})
    assert all(next(iter(each)) == "replica" for each in told)
    assert [each["replica"] for each in told if "gone" in each] == [*lost]
    assert "format" in next(each for each in told if each["replica"] == new)
    for stream in streams:
        stream.close()


def read_page(server: Cluster, told: list[dict]) -> None:
    """What an open page is told, until the server ends."""
    with contextlib.suppress(httpx.HTTPError), httpx.stream("GET", f"{server.url}/live/events", timeout=None) as page:
        told.extend(json.loads(line[6:]) for line in page.iter_lines() if line.startswith("data: "))


def test_sigterm_under_load_drains_and_leaves_no_process():
    with Cluster("--drain-timeout=200") as server:
        streams = [server.send("POST", COMPLETIONS, LONG | {"max_tokens": 300}) for _ in range(12)]
        for stream in streams[:4]:
            stream.recv(1, socket.MSG_PEEK)
        server.child.send_signal(signal.SIGTERM)
        soon(lambda: "nothing new is taken" in server.log)
        assert [Answered(stream).events[-1]["choices"][0]["finish_reason"] for stream in streams] == ["length"] * 12
        assert server.end_and_look() == 0 and "Traceback" not in server.log
        for stream in streams:
            stream.close()


def test_a_server_that_is_killed_leaves_no_process():
    with Cluster() as server:
        stream = server.send("POST", COMPLETIONS, LONG)
        stream.recv(1, socket.MSG_PEEK)
        assert server.end_and_look(signal.SIGKILL) == -signal.SIGKILL
        assert is_closed(stream)
        stream.close()


def test_a_server_that_is_killed_while_it_starts_leaves_no_process():
    with subprocess.Popen([sys.executable, "-m", "minillm.cli.main", "serve", "--port=0", *CLUSTER]) as child:
        family = psutil.Process(child.pid).children
        soon(lambda: any("raylet" in each.name() for each in family(recursive=True)), START)
        children = family(recursive=True)
        child.kill()
    soon(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in children), 60)


def test_routers_are_measured_in_turns(tmp_path, capsys):
    file = tmp_path / "replicas.json"
    assert replicas.main(f"--system-prompts 2 --each 6 --turns 1 --rate 5 --json {file}".split()) == 0
    (turn,) = recorded.load(file)["parts"]["2"]["turns"]
    assert turn.keys() == set(ROUTERS)
    assert turn["prefix-aware"]["hits"] >= 2 * 4 * 256 / (12 * 288)  # but for the first two of each system prompt
    assert all(0 < each["ttft"]["p50"] <= each["ttft"]["p99"] < START for each in turn.values())
    assert "prefix-aware" in capsys.readouterr().out


def test_too_few_processors_are_told_before_anything_is_loaded(capsys):
    assert main(["serve", "--replicas=2", "--cpus-per-replica=1000", "--port=0"]) == 2
    assert "--cpus-per-replica" in capsys.readouterr().err.strip().splitlines()[-1]


# --- applications of Ray Serve ---------------------------------------------------------------------------------------

OPTIONS_HERE = ServerOptions(drain_timeout=100.0)
CONFIG = EngineConfig(num_blocks=200, max_model_len=CONTEXT, max_num_seqs=8)


@pytest.fixture(scope="module")
def cluster():
    """The module, with a Ray of its own."""
    from minillm.serving import cluster

    cluster.start_ray({"num_cpus": 0, "num_gpus": 0}, 0)
    yield cluster
    cluster.serve.shutdown()
    ray.shutdown()


async def ask(engine, request_id: str, max_tokens: int) -> int:
    """How many tokens come."""
    params, count = SamplingParams(max_tokens=max_tokens, ignore_eos=True), 0
    prompt = {"prompt_token_ids": [300 + int(request_id)] * 20}
    async for outputs in engine.generate_together([(request_id, prompt, params, 0)]):
        count += sum(len(part.token_ids) for output in outputs for part in output.outputs)
        assert all(output.prompt_token_ids == prompt["prompt_token_ids"] for output in outputs)
    return count


def run(cluster, **options):
    """Deploy replicas, or change how many there are; returns the handle."""
    options = ClusterOptions(cpus_per_replica=0.5, **options)
    replicas = cluster.replicas_of("storyteller", OPTIONS_HERE, CONFIG, options)
    return cluster.serve.run(replicas, name="test", route_prefix=None)


def test_scaling_down_loses_no_request(cluster):
    handle = run(cluster, replicas=2, router="round-robin")
    engine = cluster.cluster_engine(handle, handle.about.remote().result(), "round-robin")
    soon(lambda: len(engine.replicas()) == 2, RECOVERY)

    async def go() -> list[int]:
        tasks = [asyncio.create_task(ask(engine, str(i), 900)) for i in range(8)]
        while engine.num_running < 8:
            await asyncio.sleep(0.01)
        page = asyncio.create_task(read_all(engine))  # a page that is open does not keep a replica
        scaled = asyncio.create_task(asyncio.to_thread(run, cluster, replicas=1, router="round-robin"))
        number = 8
        while len(engine.replicas()) == 2:
            assert not scaled.done() or scaled.exception() is None, scaled.exception()
            tasks.append(asyncio.create_task(ask(engine, str(number), 2)))
            number += 1
            await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(ask(engine, str(number + i), 2)) for i in range(4)]
        found = await asyncio.gather(*tasks)
        await scaled
        page.cancel()
        return found

    async def read_all(engine):
        async for _ in engine.follow():
            pass

    found = asyncio.run(go())
    assert found == [900] * 8 + [2] * (len(found) - 8) and len(found) > 12
    soon(lambda: len(cluster.serve.status().applications["test"].deployments["Replica"].replica_states) == 1, RECOVERY)


def test_a_call_that_names_no_replica_is_routed_by_its_prefix(cluster):
    handle = run(cluster, replicas=2, router="prefix-aware")
    stream = handle.options(stream=True)
    engine = cluster.cluster_engine(handle, handle.about.remote().result(), "round-robin")
    soon(lambda: len(engine.replicas()) == 2, RECOVERY)

    async def go() -> dict[str, set[str]]:
        params = SamplingParams(max_tokens=2)
        for turn in range(4):
            for head in "wxyz":
                prompt = {"prompt_token_ids": [300 + ord(head)] * 40 + [turn]}
                async for _ in stream.generate_together.remote([(f"{head}-{turn}", prompt, params, 0)], "delta"):
                    pass
        return {
            name: {each.request_id[0] for each in (await engine.trace(name)).requests} for name in engine.replicas()
        }

    places = asyncio.run(go())
    assert Counter(head for heads in places.values() for head in heads if head in "wxyz") == Counter("wxyz")


def test_under_load_replicas_are_started(cluster):
    cluster.serve.delete("test")  # Ray waits ten minutes before it ends replicas that are not needed
    handle = run(cluster, replicas=1, max_replicas=2, target_requests=2.0)
    engine = cluster.cluster_engine(handle, handle.about.remote().result(), "power-of-two")

    async def go():
        number, tasks, deadline = 0, set(), time.monotonic() + RECOVERY
        while len(engine.replicas()) < 2:
            assert time.monotonic() < deadline
            while len(tasks) < 8:
                tasks.add(asyncio.create_task(ask(engine, str(number), 200)))
                number += 1
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=1)
            assert all(each.result() == 200 for each in done)
        await asyncio.gather(*tasks)

    soon(lambda: len(engine.replicas()) == 1, RECOVERY)
    asyncio.run(go())


def test_behind_rays_proxies_the_app_is_the_same(cluster, expected):
    args = {"replicas": 2, "num_blocks": 200, "max_model_len": CONTEXT, "cpus_per_replica": 0.5, "api_key": "key-1"}
    cluster.serve.shutdown()
    port = 18_000 + os.getpid() % 1000
    cluster.serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    cluster.serve.run(cluster.app(args), name="proxied")
    url, key = f"http://127.0.0.1:{port}", {"Authorization": "Bearer key-1"}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="key-1", max_retries=0, timeout=START) as client:
        given = {"model": "storyteller", "prompt": STORY, "temperature": 0, "extra_body": {"ignore_eos": True}}
        text = "".join(each.choices[0].text for each in client.completions.create(max_tokens=50, stream=True, **given))
        assert text and expected.startswith(text)
        with pytest.raises(openai.BadRequestError) as wrong:
            client.completions.create(max_tokens=0, **given)
        assert wrong.value.param == "max_tokens"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()
        with client.completions.create(max_tokens=900, stream=True, **given) as stream:
            next(iter(stream))
            soon(lambda: running(url) == 1)
        soon(lambda: running(url) == 0)
        assert [running(url) for _ in range(100)] == [0] * 100  # each asks both replicas at once
    assert httpx.get(f"{url}/").status_code == httpx.get(f"{url}/live/control", headers=key).status_code == 200
    cluster.serve.delete("proxied")


def running(url: str) -> float:
    """Requests that take part in steps, of all replicas."""
    text = httpx.get(f"{url}/metrics").text
    return sum(map(float, re.findall(r"^minillm:num_requests_running\{.*\} (\S+)$", text, re.MULTILINE)))


@pytest.mark.parametrize(
    ("args", "told"),
    [({"replica": 2}, "'replica'"), ({"max_num_seqs": 0}, "max_num_seqs"), ({"router": "x"}, "router")],
)
def test_wrong_args_are_told(args, told, cluster):
    with pytest.raises(ConfigError, match=told):
        cluster.app(args)


def test_the_yaml_of_the_readme_is_what_ray_takes(cluster):
    readme = (ROOT / "minillm/serving/README.md").read_text()
    from ray.serve.schema import ServeDeploySchema

    given = yaml.safe_load(re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)[1])
    (application,) = ServeDeploySchema.model_validate(given).applications
    assert application.import_path == "minillm.serving.cluster:app"
    assert isinstance(cluster.app(application.args), cluster.serve.Application)
