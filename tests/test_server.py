"""The server as a process: what it says when it starts, and how it ends."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.client import HTTPConnection

import psutil
import pytest
import uvicorn

from minillm.errors import ConfigError
from minillm.serving import AsyncEngine, Metrics, ServerOptions, ServerProcess, connections, serve
from minillm.serving import server as module
from minillm.serving.connections import PatientProtocol
from minillm.serving.server import bound, throughput_line
from served import PATIENCE, Answered, ServedProcess, soon
from test_async_serving import read, run
from test_llm_engine import TEN, make_engine


def test_it_names_the_layers_serves_drains_and_exits_with_0():
    with ServedProcess("--worker=process", "--num-blocks=260") as server:
        said = re.findall(r"\[layer (\d), ([\w ]+)\] ([\w:]+)", server.log)
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
        with server.story(400) as stream:
            stream.recv(1, socket.MSG_PEEK)  # it has begun
            server.child.send_signal(signal.SIGTERM)
            soon(lambda: "SIGTERM: 1 requests run" in server.log)
            assert server.ask("GET", "/health").status == 503
            with server.story(5) as refused:
                assert Answered(refused).status == 503
            assert Answered(stream).events[-1]["choices"][0]["finish_reason"] == "length"
        worker = server.worker
        assert server.end() == 0
        assert not worker.is_running() and "[layer 1, OpenAI server] ended" in server.lines[-1]


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
    monkeypatch.setattr(connections, "HEAD_SECONDS", seconds)
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

    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.5)
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
    soon(lambda: not psutil.pid_exists(child.pid))


def test_a_server_process_ends_with_its_parent_however_that_ends():
    code = "import os, minillm.serving as s\nprint(s.ServerProcess().pid, flush=True)\nos.kill(os.getpid(), 9)"
    parent = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=120)
    assert parent.returncode == -9
    pid = int(parent.stdout)
    soon(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_a_server_process_that_does_not_start_says_why():
    with pytest.raises(ConfigError, match="did not start: .*max_model_len"):
        ServerProcess("storyteller", ["--max-model-len", "1000000"])
