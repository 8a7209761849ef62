"""Abuse of a served engine, over real connections to a `minillm serve` of its own.

FAULTS is a table: a name, what is sent, what is expected. While each of them happens two other clients are served; they
get, byte for byte, what they get undisturbed. After it a fixed probe gets the same answer, all blocks are back, and the
server has as many tasks, threads, children and descriptors as before. `python -m tests.soak` draws from the same table.
"""

import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import psutil
import pytest

from served import PATIENCE, STORY, Answered, ServedProcess, head, is_closed, request, reset, soon

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
CONTEXT, NUM_BLOCKS = 1024, 200  # three long requests fill the pool
OPTIONS = [f"--max-model-len={CONTEXT}", f"--num-blocks={NUM_BLOCKS}", "--max-num-seqs=8", "--max-queue=24"]
OPTIONS += ["--max-body-mib=1", "--body-timeout=1.5"]
BAD = 1850  # the token whose rows have no numbers in this server
SECONDS = 1.5  # of patience, which otherwise is 10 to 30
WORKER = f"""
import sys
from minillm.runtime import worker_process
load = worker_process.Worker.load
def load_with_a_bad_token(*given, **named):
    worker = load(*given, **named)
    def spoil(module, given, rows):
        return rows.masked_fill((given[0] == {BAD}).unsqueeze(-1), float("nan"))
    worker.model.embed_tokens.register_forward_hook(spoil)
    return worker
worker_process.Worker.load = load_with_a_bad_token
worker_process.main(*map(int, sys.argv[1:]))
"""
CHANGES = f"""
from minillm.serving import connections, live, server
connections.HEAD_SECONDS = connections.WRITE_SECONDS = live.BODY_SECONDS = {SECONDS}

import os, subprocess
from minillm.runtime import worker_process
def start_with_a_bad_token(fileno):
    command = [sys.executable, "-c", {WORKER!r}, str(fileno), str(os.getpid())]
    return subprocess.Popen(command, pass_fds=[fileno], stdin=subprocess.DEVNULL)
worker_process._start = start_with_a_bad_token

bound = server.bound
def bound_with_small_buffers(host, port):
    listener = bound(host, port)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)  # the system may hold megabytes else
    return listener
server.bound = bound_with_small_buffers

now, jumps = time.time, [0.0]
def jump(number, frame):
    jumps.append({{0.0: 4e8, 4e8: -4e8, -4e8: 0.0}}[jumps[-1]])
time.time = lambda: now() + jumps[-1]
signal.signal(signal.SIGUSR2, jump)
"""


class Fault(NamedTuple):
    """A row of the table."""

    name: str
    expected: str
    happen: Callable[[ServedProcess], None]


FAULTS: list[Fault] = []


def fault(name: str, expected: str) -> Callable:
    """Put a function into the table, which sends it and checks the answer."""

    def add(happen: Callable[[ServedProcess], None]) -> Callable:
        FAULTS.append(Fault(name, expected, happen))
        return happen

    return add


def start(*options: str, changes: str = "") -> ServedProcess:
    return ServedProcess(*OPTIONS, *options, changes=CHANGES + changes)


# --- what must stay as it was ----------------------------------------------------------------------------------------

PROBE = {"prompt": "The little fox", "max_tokens": 24, "temperature": 0, "return_token_ids": True, "logprobs": 1}
FLOOD = {"prompt": STORY, "max_tokens": CONTEXT - 9, "ignore_eos": True, "stream": True, "n": 2, "logprobs": 20}
OTHERS = [
    (COMPLETIONS, {"prompt": STORY, "max_tokens": 90, "temperature": 0, "ignore_eos": True, "stream": True}),
    (CHATS, {"messages": [{"role": "user", "content": "Tell me of a dog."}], "max_tokens": 90, "temperature": 0.9,
             "seed": 7, "top_k": 40, "ignore_eos": True, "stream": True}),
]  # fmt: skip


def probe(server: ServedProcess) -> bytes:
    """The part of the answer that is no id and no time."""
    answer = server.ask("POST", COMPLETIONS, PROBE)
    assert answer.status == 200, answer.body
    return re.search(rb'"choices":.*?"usage"', answer.body)[0]


def told(answer: Answered) -> str:
    """The whole text of a stream, however it was cut into events, and how it ended."""
    assert answer.status == 200, answer.body
    choices = [event["choices"][0] for event in answer.events]
    texts = [each["text"] if "text" in each else each["delta"]["content"] for each in choices]
    return "".join(texts) + f"|{choices[-1]['finish_reason']}"


class Others:
    """Clients with streams of their own, one after the other, for as long as this lasts."""

    def __init__(self, server: ServedProcess, expected: Sequence[str]):
        self.server, self.expected = server, expected
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._read, args=each) for each in zip(OTHERS, expected, strict=True)]
        self._stop = threading.Event()
        self._begun = threading.Barrier(len(OTHERS) + 1)

    def __enter__(self) -> "Others":
        for thread in self._threads:
            thread.start()
        self._begun.wait(PATIENCE)
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.failures

    def _read(self, sent: tuple[str, dict], expected: str) -> None:
        is_first = True
        try:
            while is_first or not self._stop.is_set():
                with self.server.send("POST", *sent) as client:
                    client.recv(1, socket.MSG_PEEK)
                    if is_first:
                        self._begun.wait(PATIENCE)
                        is_first = False
                    answer = Answered(client)
                self._stop.wait(0.1)
                if answer.status != 429 and told(answer) != expected:
                    self.failures.append(f"{told(answer)!r}\nwas expected to be\n{expected!r}")
        except Exception as error:
            self._begun.abort()
            self.failures.append(repr(error))


@pytest.fixture(scope="module")
def server():
    with start() as server:
        yield server


@pytest.fixture(scope="module")
def expected(server) -> tuple[bytes, list[str]]:
    """What probe and others get if nothing disturbs them; the server has then done everything once."""
    return undisturbed(server)


def undisturbed(server: ServedProcess) -> tuple[bytes, list[str]]:
    for path in ("/tokenize", "/v1/embeddings"):  # the pool's threads, transformers
        server.ask("POST", path, {"prompt": STORY, "input": STORY})
    return probe(server), [told(server.ask("POST", *each)) for each in OTHERS]


def resting(server: ServedProcess) -> dict[str, object]:
    """The server's state while it serves no request."""
    soon(server.is_quiet)
    soon(lambda: server.alive()["tasks"] == ["Server.serve", "log_throughput"])
    return server.alive()


def check(server: ServedProcess, row: Fault, expected: tuple[bytes, Sequence[str]]) -> None:
    """Let it happen to a server that serves others, and see that nothing is left of it."""
    before = resting(server)
    with Others(server, expected[1]):
        row.happen(server)
    soon(server.is_quiet)
    assert probe(server) == expected[0]
    with contextlib.suppress(AssertionError):
        soon(lambda: server.alive() == before, within=8)
    assert server.alive() == before


# --- the table: bodies -----------------------------------------------------------------------------------------------

REFUSED = "400"
GOOD = {"prompt": STORY, "max_tokens": 3}
Bodies = list[tuple[object, int, str | None]]


def bodies(name: str, path: str, expected: str, rows: Bodies) -> None:
    """Put bodies into the table, each with the status and the `param` of its answer."""

    @fault(name, expected)
    def send_all(server: ServedProcess) -> None:
        for body, status, param in rows:
            answer = server.ask("POST", path, body)
            shown = body if len(str(body)) < 300 else str(body)[:300]
            assert answer.status == status, (shown, answer.body)
            if status != 200:
                error = answer.json["error"]
                assert (error["code"], error["param"]) == (status, param), (shown, error)


def text(value: str) -> bytes:
    """A body whose prompt is this piece of JSON."""
    return b'{"max_tokens": 3, "prompt": ' + value.encode() + b"}"


bodies("malformed JSON", COMPLETIONS, REFUSED, [
    (body, 400, None) for body in (
        b"", b" ", b"{", b"}", b"nul", b"{'prompt': 'a'}", b'{"prompt": "a",}', b'{"prompt": "a"} {}', b'{"prompt": "a',
        b'{"prompt": 01}', b'\xef\xbb\xbf{"prompt": "a"}', '{"prompt": "a"}'.encode("utf-16"), b'{"prompt": "a\n"}',
    )
])  # fmt: skip
bodies("JSON that is no object", COMPLETIONS, REFUSED, [(each, 400, None) for each in (b"[]", b"7", b'"a"', b"null")])
bodies("deeply nested JSON", COMPLETIONS, REFUSED, [
    (b"[" * 500_000, 400, None), (b'{"a":' * 100_000, 400, None), (text("[" * 100_000 + "]" * 100_000), 400, None),
    (text("[" * 150 + "]" * 150), 400, "prompt"), (b'{"prompt": "a", "user": ' + b'{"a":' * 5_000, 400, None),
])  # fmt: skip
bodies("invalid UTF-8", COMPLETIONS, REFUSED, [
    (b'{"prompt": "' + each + b'"}', 400, None)
    for each in (b"\xff\xfe", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\x80", b"\xf5\x80\x80\x80")
])  # fmt: skip
bodies("lone surrogates", COMPLETIONS, REFUSED, [
    (text(r'"\ud800"'), 400, None), (text(r'"\udc00\ud800"'), 400, None), (text(r'["a", "\udfff"]'), 400, None),
    (rb'{"prompt": "a", "stop": "\ud83d"}', 400, None), (rb'{"prompt": "a", "model": "\ud83d"}', 400, None),
    (rb'{"prompt": "a", "\udead": 1}', 400, None), (text(r'"\ud83d\ude00"'), 200, None),
])  # fmt: skip
bodies("NUL", COMPLETIONS, "a character like others; raw: 400", [
    (text(r'"\u0000"'), 200, None), (text(r'"a\u0000b"'), 200, None), (b'{"prompt": "a\0"}', 400, None),
    (b"\0", 400, None), (rb'{"prompt": "a", "stop": "\u0000"}', 200, None),
    (rb'{"prompt": "a", "\u0000": 1}', 200, None),
])  # fmt: skip
bodies("prompts longer than the context and than the pool", COMPLETIONS, "400; several that fit one by one: 200", [
    ({"prompt": [300] * (CONTEXT - 1), "max_tokens": 3}, 200, None), ({"prompt": [300] * CONTEXT}, 400, "max_tokens"),
    ({"prompt": [300] * (CONTEXT + 1)}, 400, "input_tokens"), ({"prompt": [300] * 3_300}, 400, "input_tokens"),
    ({"prompt": [300] * 100_000}, 400, "input_tokens"), ({"prompt": "word " * 100_000}, 400, "input_tokens"),
    ({"prompt": [STORY, [300] * 3_300]}, 400, "input_tokens"),
    ({"prompt": [[each] * (CONTEXT - 1) for each in (300, 301, 302, 303)]}, 200, None),
    ({"prompt": [300] * 9, "n": 33}, 400, "n"), ({"prompt": "a", "n": 129}, 400, "n"),
])  # fmt: skip
bodies("max_tokens that are no number of tokens", COMPLETIONS, REFUSED, [
    (b'{"prompt": "a", "max_tokens": ' + each + b"}", 400, "max_tokens")
    for each in (b"0", b"-1", b"1e18", b"1" + b"0" * 18, b"9" * 400, b'"5"', b"true", b"1.5", b"[5]", b"{}", b"-0")
])  # fmt: skip
bodies("temperatures that are no numbers", COMPLETIONS, REFUSED, [
    *((b'{"prompt": "a", "temperature": ' + each + b"}", 400, None) for each in (b"NaN", b"Infinity", b"-Infinity")),
    *((b'{"prompt": "a", "temperature": ' + each + b"}", 400, "temperature")
      for each in (b'"NaN"', b"-1", b"-0.001", b"true", b"1e999", b"[]")),
    (b'{"prompt": "a", "temperature": 1e308, "max_tokens": 2}', 200, None),
    (b'{"prompt": "a", "temperature": 5e-324, "max_tokens": 2}', 200, None),
])  # fmt: skip
bodies("empty prompts of every kind", COMPLETIONS, REFUSED, [
    (body, 400, "prompt") for body in (
        {"prompt": ""}, {"prompt": []}, {"prompt": [""]}, {"prompt": [[]]}, {"prompt": ["a", ""]},
        {"prompt": [[300], []]}, {"prompt": None}, {},
        {"prompt": {}}, {"prompt": [None]}, {"prompt": False}, {"prompt": 0},
    )
])  # fmt: skip
bodies("empty chats of every kind", CHATS, REFUSED, [
    (body, 400, "messages") for body in (
        {}, {"messages": None}, {"messages": []}, {"messages": [{}]}, {"messages": [[]]}, {"messages": ""},
        {"messages": [{"content": "a"}]}, {"messages": [{"role": "", "content": "a"}]},
    )
])  # fmt: skip


@fault("oversize bodies, declared", "413 before they are read")
def declared(server: ServedProcess) -> None:
    clients = [server.connect() for _ in range(3)]
    for client, size in zip(clients, (2**20 + 1, 10**12, 10**18), strict=True):
        client.sendall(head("POST", COMPLETIONS, f"Content-Length: {size}") + b"{")
    for client in clients:
        assert Answered(client).status == 413
        assert is_closed(client)
        client.close()


@fault("oversize bodies, chunked, also without end", "413 while they are read")
def chunked(server: ServedProcess) -> None:
    for size in (100, 65_536):
        with server.connect() as client:
            client.sendall(head("POST", COMPLETIONS, "Transfer-Encoding: chunked"))
            piece, sent = f"{size:x}\r\n".encode() + b" " * size + b"\r\n", 0
            with contextlib.suppress(ConnectionError):
                while sent < 2**20 + 2**18:
                    client.sendall(piece)
                    sent += size
                assert Answered(client).status == 413
            assert is_closed(client)


@fault("framing that two servers could read in two ways", "400, closed")
def framing(server: ServedProcess) -> None:
    body = json.dumps(GOOD).encode()
    for headers in (
        ["Content-Length: -1"], ["Content-Length: +5"], ["Content-Length: 0x5"], ["Content-Length: 5, 6"],
        ["Content-Length: 5", "Content-Length: 6"], ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked, identity"], ["Transfer-Encoding: xchunked"],
        ["Content-Length: 99999999999999999999999"],
        ["Content-Length : 5"], ["\0: 1"], ["X: \0"], ["X: a\rb"], [": x"], ["A B: c"],
    ):  # fmt: skip
        with server.connect() as client:
            client.sendall(head("POST", COMPLETIONS, *headers) + body)
            assert Answered(client).status == 400, headers
            assert is_closed(client), headers
    for chunk in (b"x\r\n", b"-1\r\n", b"5\r\nabcdefgh\r\n", b"fffffffffffffffff\r\n", b"\r\n"):
        with server.connect() as client:
            client.sendall(head("POST", COMPLETIONS, "Transfer-Encoding: chunked") + chunk)
            assert Answered(client).status == 400, chunk
            assert is_closed(client), chunk


@fault("what is no HTTP at all", "400 or closed")
def no_http(server: ServedProcess) -> None:
    noise = random.Random(1)
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 300, b"GET /\r\n\r\n", b"\0" * 100,
        b"\r\n" * 50 + b"?",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET \xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
        noise.randbytes(5_000), b"SSH-2.0-OpenSSH_9.2\r\n",
    ):  # fmt: skip
        with server.connect() as client:
            client.sendall(sent)
            assert is_closed(client), sent
    for method, path, status in (
        ("PUT", COMPLETIONS, 405), ("DELETE", "/health", 405), ("OPTIONS", COMPLETIONS, 405), ("TRACE", "/", 405),
        ("GET", "/%ff%fe", 404), ("GET", "/" + "a" * 20_000, 404), ("GET", "/v1/models/%00", 404),
        ("GET", "/..%2f", 404),
        ("POST", "/v1/models", 405), ("GET", "//health", 404), ("GET", "/player/..%2f..%2ferrors.py", 404),
    ):  # fmt: skip
        assert server.ask(method, path).status == status, (method, path)


# --- the table: connections ------------------------------------------------------------------------------------------


def leave(how: str, client: socket.socket) -> None:
    {"closed": socket.socket.close, "reset": reset, "half-closed": lambda it: it.shutdown(socket.SHUT_WR)}[how](client)


@fault("clients that close, half-close or reset: running, waiting, n > 1, in mid-body", "aborted, blocks back")
def gone(server: ServedProcess) -> None:
    for how in ("closed", "reset", "half-closed"):
        clients = [server.story(CONTEXT - 9, stream=stream, n=n) for stream in (True, False) for n in (1, 3)]
        clients += [server.story(CONTEXT - 9, prompt=[STORY, "The fox"]) for _ in range(2)]  # some of these wait
        clients[0].recv(10)
        partial = server.connect()
        partial.sendall(head("POST", COMPLETIONS, "Content-Length: 500") + b'{"prompt": "')
        soon(lambda: server.metrics()["num_requests_waiting"] > 0)
        for client in [*clients, partial]:
            leave(how, client)
        soon(lambda: server.metrics()["num_requests_running"] <= len(OTHERS))
        for client in [*clients, partial]:
            client.close()


@fault("a client that goes behind a request sent ahead", "aborted, as without it")
def ahead_and_gone(server: ServedProcess) -> None:
    for stream in (True, False):
        client = server.story(CONTEXT - 9, stream=stream)
        soon(lambda: server.metrics()["num_requests_running"] > 0)
        client.sendall(request("GET", "/health") * 3)
        time.sleep(0.05)
        began = server.metrics()["generation_tokens_total"]
        client.close()
        soon(lambda: server.metrics()["num_requests_running"] <= len(OTHERS), within=10)
        assert server.metrics()["generation_tokens_total"] - began < 3 * CONTEXT


@fault("requests or noise sent ahead of the answer", "the answer whole, then closed")
def ahead(server: ServedProcess) -> None:
    whole = server.story(40, temperature=0)
    with whole, server.connect() as client:
        body = {"prompt": STORY, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": True}
        sent = request("POST", COMPLETIONS, body).replace(b"Connection: close\r\n", b"")
        for more in (b"\0\1garbage\r\n\r\n", sent, b"GET / HTTP/1.1\r\n"):
            with server.connect() as client:
                client.sendall(sent + more)
                answer = Answered(client)
                assert is_closed(client)
                with server.connect() as later:
                    later.sendall(sent)
                    later.recv(1, socket.MSG_PEEK)
                    later.sendall(more)
                    after = Answered(later)
                    assert is_closed(later)
            if more == b"\0\1garbage\r\n\r\n":
                expected = Answered(whole).text
            assert answer.text == after.text == expected


@fault("slowloris: heads byte by byte, on 40 connections", f"closed after {SECONDS} s")
def slow_heads(server: ServedProcess) -> None:
    clients = [server.connect() for _ in range(40)]
    pieces = (bytes([each]) for each in head("GET", "/health")[:-2] + b"X: y\r\n" * 10_000)
    deadline, open_still = time.monotonic() + PATIENCE, set(clients)
    while open_still and time.monotonic() < deadline:
        piece = next(pieces)
        for client in list(open_still):
            client.setblocking(False)
            try:
                client.sendall(piece)
                if not client.recv(100):
                    open_still.discard(client)
            except BlockingIOError:
                pass
            except ConnectionError:
                open_still.discard(client)
        time.sleep(0.05)
    for client in clients:
        client.close()
    assert not open_still


@fault("slowloris: bodies byte by byte", f"408 after {SECONDS} s")
def slow_bodies(server: ServedProcess) -> None:
    for path in (COMPLETIONS, "/live/control"):
        began = time.monotonic()
        with server.connect() as client:
            client.sendall(head("POST", path, "Content-Length: 1000"))
            client.settimeout(0.05)
            while time.monotonic() < began + PATIENCE:
                client.sendall(b" ")
                try:
                    client.recv(1, socket.MSG_PEEK)
                    break
                except TimeoutError:
                    pass
            client.settimeout(PATIENCE)
            assert Answered(client).status == 408, path
            assert is_closed(client)


@fault("heads, chunk extensions and trailers without end", "400 or 413, closed; little is kept of them")
def endless(server: ServedProcess) -> None:
    chunked = head("POST", COMPLETIONS, "Transfer-Encoding: chunked")
    before = server.process.memory_full_info().uss
    for beginning, piece in (
        (b"GET /health HTTP/1.1\r\nX: ", b"x" * 10_000), (b"GET /health HTTP/1.1\r\n", b"X: y\r\n" * 2_000),
        (b"GET /", b"a" * 10_000), (chunked + b"1;", b"e" * 10_000), (chunked + b"1\r\n \r\n0\r\nX: ", b"x" * 10_000),
        (chunked + b"1\r\n \r\n0\r\n", b"X: y\r\n" * 2_000),
    ):  # fmt: skip
        with server.connect() as client:
            client.sendall(beginning)
            with contextlib.suppress(ConnectionError):
                for _ in range(2_000):  # 20 MB; most of it is not taken
                    client.sendall(piece)
                pytest.fail(f"all of {beginning!r} was taken")
    assert server.process.memory_full_info().uss - before < 30 * 2**20


@fault("connections that send nothing, 200 of them", f"closed after {SECONDS} s")
def silent(server: ServedProcess) -> None:
    clients = [server.connect() for _ in range(200)]
    assert all(is_closed(client) for client in clients)
    for client in clients:
        client.close()


@fault("a reader of a stream that does not read", "aborted, blocks back, connection cut")
def slow_stream(server: ServedProcess) -> None:
    with server.send("POST", COMPLETIONS, FLOOD, receive_buffer=4096) as client:
        wait_until_cut(server, client)
        soon(lambda: server.metrics()["num_requests_running"] <= len(OTHERS))
        assert b"[DONE]" not in rest_of(client)


@fault("a reader of a whole answer that does not read", "connection cut")
def slow_answer(server: ServedProcess) -> None:
    with server.connect(receive_buffer=4096) as client:
        client.sendall(request("POST", "/detokenize", {"tokens": [300] * 190_000}))
        wait_until_cut(server, client)


def wait_until_cut(server: ServedProcess, client: socket.socket) -> None:
    """Until the server has no connection to this client any more, which reads nothing meanwhile."""

    def is_connected() -> bool:
        port = client.getsockname()[1]
        return any(each.raddr and each.raddr.port == port for each in server.process.net_connections("tcp"))

    soon(is_connected)
    soon(lambda: not is_connected())


def rest_of(client: socket.socket) -> bytes:
    """What the system still holds for it."""
    received = []
    with contextlib.suppress(ConnectionError):
        received += iter(lambda: client.recv(1 << 20), b"")
    return b"".join(received)


# --- the table: load -------------------------------------------------------------------------------------------------


@fault("1,000 requests at once, 24 may wait", "each 200, or 429 with Retry-After; none hangs")
def burst(server: ServedProcess) -> None:
    sent = request("POST", COMPLETIONS, {"prompt": STORY, "max_tokens": 4, "temperature": 0, "ignore_eos": True})
    texts = Counter()

    async def one() -> tuple[int, bytes, bytes]:
        reader, writer = await asyncio.open_connection(*server.address)
        writer.write(sent)
        lines, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return int(lines[9:12]), lines, body

    async def all_of_them() -> list[tuple[int, bytes, bytes]]:
        async with asyncio.timeout(2 * PATIENCE):
            return await asyncio.gather(*(one() for _ in range(1_000)))

    answers = asyncio.run(all_of_them())
    for status, lines, body in answers:
        if status == 200:
            texts[json.loads(body)["choices"][0]["text"]] += 1
        else:
            assert int(re.search(rb"(?i)retry-after: (\d+)", lines)[1]) in range(1, 61)
    statuses = Counter(status for status, _, _ in answers)
    assert statuses.keys() == {200, 429} and len(texts) == 1 and statuses[200] >= 24, statuses


@fault("vectors asked for by clients that go at once", "none is made for them, and steps go on")
def vectors(server: ServedProcess) -> None:
    body = {"input": [[300] * CONTEXT] * 20}
    before = server.process.cpu_times()
    for _ in range(60):
        reset(server.send("POST", "/v1/embeddings", body))
    with server.story(30) as client:
        assert Answered(client).events[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.cpu_times().user - before.user < 15  # all of them would take a minute


@fault("NaN in one row", "that request fails; the others go on")
def no_numbers(server: ServedProcess) -> None:
    bad = {"prompt": [300, 301, BAD, 302], "max_tokens": 20}
    failed = server.ask("POST", COMPLETIONS, bad)
    assert failed.status == 500 and failed.json["error"]["type"] == "InternalServerError"
    failed = server.ask("POST", COMPLETIONS, bad | {"n": 2, "prompt": [[300] * 40 + [BAD] * 40, STORY]})
    assert failed.status == 500
    *_, last = server.ask("POST", COMPLETIONS, bad | {"stream": True}).events
    assert last["error"]["code"] == 500
    again = server.ask("POST", COMPLETIONS, {"prompt": [300] * 40, "max_tokens": 10})  # shares blocks with the bad one
    assert again.status == 200


@fault("the clock jumps twelve years ahead, and back behind", "nothing is timed by it")
def clock(server: ServedProcess) -> None:
    before = server.metrics()
    for _ in range(3):
        with server.story(200, temperature=0) as client:
            client.recv(1, socket.MSG_PEEK)
            server.child.send_signal(signal.SIGUSR2)
            assert len(Answered(client).events) > 1
    now = server.metrics()
    for name in (
        "e2e_request_latency_seconds_sum",
        "time_to_first_token_seconds_sum",
        "inter_token_latency_seconds_sum",
    ):
        assert 0 <= now[name] - before[name] < 100, name


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row.name)
def test_a_fault_harms_nobody_else_and_leaves_nothing(server, expected, row):
    check(server, row, expected)


# --- faults that end a server ----------------------------------------------------------------------------------------


def test_a_worker_killed_in_mid_step_ends_streams_with_an_error_and_the_server_in_order():
    with start("--worker=process") as server:
        idle = resting(server)
        streams = [server.story(CONTEXT - 9) for _ in range(12)]  # 8 run, 4 wait
        streams += [server.story(CONTEXT - 9, n=2, prompt=[STORY, "The fox"])]
        whole = server.story(CONTEXT - 9, stream=False)
        for stream in streams[:8]:
            stream.recv(1, socket.MSG_PEEK)
        worker = server.worker
        worker.kill()
        for stream in streams:
            answer = Answered(stream)
            if answer.status == 503:  # it had not begun
                assert "killed by signal 9" in answer.json["error"]["message"]
            else:
                error = answer.events[-1]["error"]
                assert error["code"] == 503 and "killed by signal 9" in error["message"]
            stream.close()
        assert Answered(whole).status == 503
        whole.close()
        for _ in range(3):
            assert server.ask("GET", "/health").status == 503
            assert server.ask("POST", COMPLETIONS, GOOD).status == 503
            assert server.ask("POST", COMPLETIONS, GOOD | {"stream": True}).status == 503
            assert server.ask("POST", "/v1/embeddings", {"input": "a"}).status == 503
        assert server.ask("GET", "/v1/models").status == server.ask("POST", "/tokenize", {"prompt": "a"}).status == 200
        soon(server.is_quiet)
        soon(lambda: (server.alive()["tasks"], server.alive()["threads"]) == (idle["tasks"], idle["threads"]))
        assert server.alive()["files"] < idle["files"] and server.alive()["children"] == []
        before = server.process.cpu_times().user
        time.sleep(0.5)
        assert server.process.cpu_times().user - before < 0.2  # it does not try again and again
        assert server.end(signal.SIGTERM) == 0
        assert not worker.is_running() and "Traceback" not in server.log


def test_a_server_that_is_killed_leaves_no_worker():
    with start("--worker=process") as server:
        stream = server.story(CONTEXT - 9)
        stream.recv(1, socket.MSG_PEEK)
        worker = server.worker
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        soon(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
        assert is_closed(stream)
        stream.close()


def test_a_worker_that_hangs_does_not_keep_the_server():
    with start("--worker=process", "--drain-timeout=0.5") as server:
        stream = server.story(CONTEXT - 9)
        stream.recv(1, socket.MSG_PEEK)
        worker = server.worker
        worker.suspend()
        try:
            assert server.end(signal.SIGTERM) == 1
        finally:
            worker.kill()
        assert "the engine does not answer" in server.log
        assert is_closed(stream)
        stream.close()


@pytest.mark.parametrize("drain_timeout", [30, 0.3])
def test_sigterm_under_load_drains_and_exits_with_0(drain_timeout):
    """With whatever else is connected: bodies and heads that do not come, readers that do not read, the page."""
    with start(f"--drain-timeout={drain_timeout}") as server:
        streams = [server.story(300, temperature=0) for _ in range(20)]
        page, silent, slow_head, slow_body = server.send("GET", "/live/events"), *(server.connect() for _ in range(3))
        slow_head.sendall(b"GET /health HT")
        unread = server.send("POST", COMPLETIONS, FLOOD | {"max_tokens": 300}, receive_buffer=4096)
        slow_body.sendall(head("POST", COMPLETIONS, "Content-Length: 1000") + b"{")
        streams[0].recv(1, socket.MSG_PEEK)
        soon(
            lambda: sum(server.metrics()[f"num_requests_{each}"] for each in ("running", "waiting")) >= len(streams) + 1
        )
        server.child.send_signal(signal.SIGTERM)
        soon(lambda: "nothing new is taken" in server.log)
        reasons = Counter()
        for stream in streams:
            reasons[Answered(stream).events[-1]["choices"][0]["finish_reason"]] += 1
            stream.close()
        assert server.end() == 0 and "Traceback" not in server.log
        for each in (page, silent, slow_head, slow_body, unread):
            assert is_closed(each)
            each.close()
        assert reasons["length"] == 20 if drain_timeout == 30 else reasons["abort"] >= 8, reasons
        assert reasons.total() == 20 and reasons.keys() <= {"length", "abort"}


def test_a_second_sigterm_under_load_ends_it_at_once():
    with start("--worker=process") as server:
        streams = [server.story(CONTEXT - 9) for _ in range(20)]
        streams[0].recv(1, socket.MSG_PEEK)
        worker = server.worker
        server.child.send_signal(signal.SIGTERM)
        soon(lambda: "nothing new is taken" in server.log)
        assert server.end(signal.SIGTERM, within=3) == 128 + signal.SIGTERM
        soon(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
        for stream in streams:
            stream.close()
