"""The server as a process: what it says when it starts, and how it ends."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.client import HTTPConnection

import pytest
import uvicorn

from minillm.errors import ConfigError
from minillm.serving import AsyncEngine, Metrics, ServerOptions, ServerProcess, serve
from minillm.serving import server as module
from minillm.serving.server import PatientProtocol, bound, throughput_line
from served import PATIENCE, soon
from test_async_serving import read, run
from test_llm_engine import TEN, make_engine

CODE = """
import sys
from minillm.engine import EngineConfig
from minillm.serving import ServerOptions, serve
sys.exit(serve("storyteller", ServerOptions(port=0), EngineConfig(worker="process", num_blocks=260)))
"""


class Process:
    """`minillm serve` as a child, with its log."""

    def __init__(self):
        self.child = subprocess.Popen([sys.executable, "-c", CODE], stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        soon(lambda: self.address or self.child.poll() is not None, within=3 * PATIENCE)
        self.worker = next(pid for pid in children(self.child.pid) if "worker_process" in command_of(pid))

    def _read(self):
        for line in self.child.stderr:
            self.log.append(line)

    @property
    def address(self):
        found = re.search(r"ready on http://(127.0.0.1:\d+)", "".join(self.log))
        return found and found[1]

    def request(self, method, path, **body):
        connection = HTTPConnection(self.address, timeout=PATIENCE)
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        return connection.getresponse()

    def story(self, max_tokens, **fields):
        body = {"prompt": "Once upon a time", "max_tokens": max_tokens, "ignore_eos": True, "stream": True} | fields
        return self.request("POST", "/v1/completions", **body)

    def end(self, *signals):
        for each in signals:
            self.child.send_signal(each)
        return self.child.wait(PATIENCE)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(each) for each in file.read().split()]


def command_of(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read().replace("\0", " ")
    except OSError:
        return ""


def events(response):
    return [line[6:] for line in response.read().decode().split("\n") if line.startswith("data: ")]


@pytest.fixture
def process():
    process = Process()
    try:
        yield process
        soon(lambda: not command_of(process.worker))  # no child is left, however it ended
    finally:
        if process.child.poll() is None:
            process.child.kill()
            process.child.wait()


def test_it_names_the_layers_serves_drains_and_exits_with_0(process):
    said = re.findall(r"\[layer (\d), ([\w ]+)\] ([\w:]+)", "".join(process.log))
    parts = [(int(layer), part) for layer, part, _ in said]
    assert list(dict.fromkeys(parts)) == [
        (1, "LLMEngine"),
        (3, "Worker"),
        (3, "CacheEngine"),
        (3, "kernels"),
        (2, "BlockManager"),
        (2, "Scheduler"),
        (1, "API server"),
        (1, "OpenAI server"),
    ]
    stream = process.story(400)
    stream.readline()  # it has begun
    process.child.send_signal(signal.SIGTERM)
    soon(lambda: "SIGTERM: 1 requests run" in "".join(process.log))
    refused = process.request("GET", "/health")
    assert refused.status == 503
    assert process.story(5).status == 503
    told = events(stream)
    assert told[-1] == "[DONE]" and json.loads(told[-2])["choices"][0]["finish_reason"] == "length"
    assert process.end() == 0
    assert "[layer 1, OpenAI server] ended" in process.log[-1]


def test_a_second_signal_ends_it_at_once(process):
    stream = process.story(2_000)
    stream.readline()
    process.child.send_signal(signal.SIGTERM)
    soon(lambda: "SIGTERM: 1" in "".join(process.log))
    began = time.monotonic()
    assert process.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 3.0


def test_a_killed_worker_leaves_a_server_that_says_so(process):
    streams = [process.story(2_000) for _ in range(3)]
    for stream in streams:
        stream.readline()
    os.kill(process.worker, signal.SIGKILL)
    for stream in streams:
        told = events(stream)
        assert told[-1] == "[DONE]" and "killed by signal 9" in json.loads(told[-2])["error"]["message"]
    assert process.request("GET", "/health").status == 503
    assert process.story(5).status == 503
    assert process.end(signal.SIGTERM) == 0


# --- parts -----------------------------------------------------------------------------------------------------------


def test_an_address_that_cannot_be_had_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(module, "LLMEngine", lambda *args, **named: pytest.fail("loaded"))
    monkeypatch.setattr(module, "log_to_stderr", lambda: None)
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .*--port"):
            serve("storyteller", ServerOptions(port=port), None)
    with pytest.raises(ConfigError, match="no.such.host"):
        serve("storyteller", ServerOptions(host="no.such.host.invalid"), None)


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await asyncio.sleep(0.3)
    await send({"type": "http.response.body", "body": b"ok"})


@contextmanager
def patient(monkeypatch, seconds, app=hello):
    monkeypatch.setattr(module, "HEAD_SECONDS", seconds)
    config = uvicorn.Config(app, port=0, http=PatientProtocol, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        soon(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join()


def test_a_head_that_does_not_come_closes_the_connection(monkeypatch):
    with patient(monkeypatch, 0.2) as where:
        for pieces in ([], [b"GET / HTTP/1.1\r\n"], [b"G", b"E", b"T", b" ", b"/", b" ", b"H", b"T", b"T", b"P"]):
            with socket.create_connection(where, timeout=PATIENCE) as client:
                for piece in pieces:
                    client.sendall(piece)
                    time.sleep(0.01)
                began = time.monotonic()
                assert client.recv(100) == b"" and time.monotonic() - began < 5.0


def test_an_answer_that_takes_longer_is_given_and_so_is_the_next(monkeypatch):
    with patient(monkeypatch, 0.2) as where:
        connection = HTTPConnection(*where, timeout=PATIENCE)
        for _ in range(2):
            connection.request("GET", "/")
            assert connection.getresponse().read() == b"ok"
        connection.close()


def test_a_client_that_does_not_read_is_cut_off_and_one_that_reads_slowly_is_not(monkeypatch):
    gone = threading.Event()

    async def flood(scope, receive, send):
        async def write():
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
                await asyncio.sleep(0)

        writing = asyncio.ensure_future(write())
        while (await receive())["type"] != "http.disconnect":
            pass
        writing.cancel()
        gone.set()

    monkeypatch.setattr(module, "WRITE_SECONDS", 0.5)
    with patient(monkeypatch, PATIENCE, flood) as where, socket.create_connection(where, timeout=PATIENCE) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        for _ in range(20):
            time.sleep(0.05)
            assert len(client.recv(10_000_000)) > 0
        assert not gone.is_set()
        assert gone.wait(PATIENCE)
        with suppress(ConnectionError):  # what the system still holds, then the end
            while client.recv(10_000_000):
                pass


def test_a_line_of_throughput_says_what_was_counted(checkpoint):
    metrics = Metrics()
    engine = AsyncEngine(make_engine(checkpoint("llama")), metrics=metrics)
    run(read(engine, "a", params=TEN))
    line = throughput_line(engine, metrics.counters)
    engine.shutdown()
    assert "prompt throughput 0.9 tokens/s, generation throughput 1.0 tokens/s, running 0, waiting 0" in line


def test_lines_come_while_something_happens_and_once_after(checkpoint, monkeypatch):
    monkeypatch.setattr(module, "LOG_EVERY", 0.05)
    lines = []
    monkeypatch.setattr(module, "say", lambda *line: lines.append(line))
    engine = AsyncEngine(make_engine(checkpoint("llama")), metrics=Metrics())

    async def main():
        task = asyncio.create_task(module.log_throughput(engine))
        await read(engine, "a", params=TEN)
        await asyncio.sleep(0.5)
        task.cancel()

    run(main())
    engine.shutdown()
    assert 2 <= len(lines) <= 4 and "generation throughput 0.0" in lines[-1][2]


# --- a server for as long as somebody needs it ---


def test_a_server_process_serves_and_ends(monkeypatch):
    monkeypatch.setenv("MINILLM_API_KEY", "a key for another server")
    with ServerProcess("storyteller", ["--num-blocks", "130"]) as child:
        connection = HTTPConnection(child.host, child.port, timeout=PATIENCE)
        connection.request("GET", "/v1/models", headers={"X-Request-Id": "who"})
        assert connection.getresponse().status == 200
        assert child.address == f"http://{child.host}:{child.port}" and child.address in "".join(child.log)
    assert child.close() == 0 and child.log[-1].endswith("[layer 1, OpenAI server] ended")
    assert any('who "GET /v1/models" 200' in line for line in child.log)
    assert not command_of(child.pid)


def test_a_server_process_ends_with_its_parent_however_that_ends():
    code = "import os, minillm.serving as s\nprint(s.ServerProcess().pid, flush=True)\nos.kill(os.getpid(), 9)"
    parent = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=120)
    assert parent.returncode == -9
    pid = int(parent.stdout)
    soon(lambda: "serve" not in command_of(pid) and "end_with_parent" not in command_of(pid))


def test_a_server_process_that_does_not_start_says_why():
    with pytest.raises(ConfigError, match="did not start: .*max_model_len"):
        ServerProcess("storyteller", ["--max-model-len", "1000000"])
