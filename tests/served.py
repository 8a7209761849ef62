"""A server for as long as a test needs it, on a free port of this machine: an app in this process, or `minillm serve`
in one of its own.
"""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse

import psutil
import uvicorn
from fastapi import FastAPI

PATIENCE = 30.0  # seconds until something that should happen soon is called a failure
STORY = "Once upon a time"


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app's address, http://127.0.0.1:PORT."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, name="test-server")
    thread.start()
    try:
        soon(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def soon(happened, within: float = PATIENCE) -> None:
    """Wait until `happened()`; fails if it takes too long."""
    deadline = time.monotonic() + within
    while not happened():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.002)


# --- as a process ----------------------------------------------------------------------------------------------------

# The command itself. SIGUSR1 makes it say what lives in it; the event loop, whose thread hears it, is then between two
# callbacks. The threads of pools stay once they have been made, so that they are no leak.
CHILD = """
import asyncio, json, os, signal, socket, sys, threading, time
from minillm.cli.main import main

def tidy():
    pass

def tell(number, frame):
    tasks = sorted(task.get_coro().__qualname__ for task in asyncio.all_tasks())
    threads = sorted(each.name for each in threading.enumerate())
    threads = [name for name in threads if not name.startswith(("asyncio_", "uvloop_", "AnyIO"))]
    tidy()
    line = "ALIVE " + json.dumps([tasks, threads, sys.getallocatedblocks()]) + "\\n"
    os.write(2, line.encode())  # sys.stderr may be in the middle of a line of the log

signal.signal(signal.SIGUSR1, tell)
{changes}
sys.exit(main(["serve", "--port", "0", *sys.argv[1:]]))
"""


class ServedProcess:
    """`minillm serve` with these options, ready; `changes` are lines of Python that come first."""

    def __init__(self, *options: str, changes: str = "", within: float = 4 * PATIENCE):
        command = [sys.executable, "-c", CHILD.replace("{changes}", changes), *options]
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.process = psutil.Process(self.child.pid)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        found = re.compile(r"ready on http://([\d.]+):(\d+)")
        soon(lambda: found.search(self.log) or self.child.poll() is not None, within)
        assert self.child.poll() is None, self.log
        host, port = found.search(self.log).groups()
        self.address, self.url = (host, int(port)), f"http://{host}:{port}"

    def __enter__(self) -> "ServedProcess":
        return self

    def __exit__(self, *error) -> None:
        """Nothing is left of it, however it ended."""
        children = self.process.children() if self.child.poll() is None else []
        for each in [*children, self.child]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self.child.wait()
        self._reader.join()

    def _read(self) -> None:
        with self.child.stderr:
            self.lines += iter(self.child.stderr.readline, "")

    @property
    def log(self) -> str:
        """What it has said so far."""
        return "".join(self.lines)

    @property
    def worker(self) -> psutil.Process:
        """Its worker, with `--worker process`."""
        return next(each for each in self.process.children() if "worker_process" in " ".join(each.cmdline()))

    def end(self, *signals: int, within: float = PATIENCE) -> int:
        """Send these, and wait for its end; returns the exit code."""
        for each in signals:
            self.child.send_signal(each)
        code = self.child.wait(within)
        self._reader.join(1.0)  # a worker that outlives it holds the log open
        return code

    # --- requests ---

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        """A connection. With a small buffer little is on its way to a client that does not read."""
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(PATIENCE)
        client.connect(self.address)
        return client

    def send(self, method: str, path: str, body: object = None, **how) -> socket.socket:
        """A connection on which a request has been sent. `body`: bytes as they are, anything else as JSON."""
        client = self.connect(**how)
        client.sendall(request(method, path, body))
        return client

    def ask(self, method: str, path: str, body: object = None) -> "Answered":
        """A request and its answer."""
        with self.send(method, path, body) as client:
            return Answered(client)

    def story(self, max_tokens: int, **fields) -> socket.socket:
        """A stream of a long text, asked for; its reading is left to the caller."""
        body = {"prompt": STORY, "max_tokens": max_tokens, "ignore_eos": True, "stream": True} | fields
        return self.send("POST", "/v1/completions", body)

    # --- what it holds ---

    def metrics(self) -> dict[str, float]:
        """Those without labels of their own, by their names without prefix."""
        text = self.ask("GET", "/metrics").body.decode()
        return {name: float(value) for name, value in re.findall(r"^minillm:(\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)}

    def is_quiet(self) -> bool:
        """No request runs or waits, and all blocks are back."""
        now = self.metrics()
        return not any(now[name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))

    def alive(self) -> dict[str, object]:
        """Tasks, threads, children and descriptors; `num_blocks` then says how many pieces of memory Python holds."""
        count = self.log.count("ALIVE ")
        self.child.send_signal(signal.SIGUSR1)
        soon(lambda: self.log.count("ALIVE ") > count)
        soon(lambda: self.lines[-1].endswith("\n"))
        tasks, threads, self.num_blocks = json.loads(re.findall(r"^ALIVE (.*)$", self.log, re.MULTILINE)[-1])
        children = sorted(each.pid for each in self.process.children(recursive=True))
        return {"tasks": tasks, "threads": threads, "children": children, "files": self.process.num_fds()}


class Answered:
    """An answer that has been read to its end: status, headers, body."""

    def __init__(self, client: socket.socket):
        response = HTTPResponse(client)
        response.begin()
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self) -> dict:
        """The body's value."""
        return json.loads(self.body)

    @property
    def events(self) -> list[dict]:
        """Those of a stream that has ended with [DONE]."""
        *events, done, rest = self.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", ""), self.body[-300:]
        return [json.loads(event.removeprefix("data: ")) for event in events]

    @property
    def text(self) -> str:
        """That of a stream's only choice."""
        return "".join(event["choices"][0]["text"] for event in self.events)


def request(method: str, path: str, body: object = None, *headers: str) -> bytes:
    """A request's bytes, after whose answer the connection is closed."""
    body = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(method, path, f"Content-Length: {len(body)}", "Connection: close", *headers) + body


def head(method: str, path: str, *headers: str) -> bytes:
    """A request's head alone."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode()


def reset(client: socket.socket) -> None:
    """Close it so that the server hears of it as an error."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.close()


def is_closed(client: socket.socket) -> bool:
    """Wait for the server to close it; what it still sends is thrown away. False if it takes too long."""
    with contextlib.suppress(ConnectionError):
        try:
            while client.recv(1 << 20):
                pass
        except TimeoutError:
            return False
    return True
