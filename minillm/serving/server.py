"""The server's life: it loads, with a log line per layer, serves, and on a signal finishes what it has begun.

After the first SIGTERM or Ctrl-C it takes nothing new, lets running requests end, then exits with 0. The second one
ends it at once. If the worker dies the server stays, answers /health with 503, and logs why.
"""

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from types import FrameType

import uvicorn

from minillm.engine import EngineConfig, LLMEngine
from minillm.errors import ConfigError
from minillm.serving.api_server import create_app
from minillm.serving.async_engine import AsyncEngine
from minillm.serving.connections import PatientProtocol
from minillm.serving.metrics import Metrics
from minillm.serving.options import ServerOptions, name_of
from minillm.serving.served_engine import ServedEngine

log = logging.getLogger("minillm.serving")
CLOSING_SECONDS = 5  # for answers to be sent when all requests have ended
SWITCH_SECONDS = 50e-6  # for which the event loop or the engine may keep the other waiting for Python's lock
LOG_EVERY = 10.0  # seconds between lines of throughput


def serve(model: str, options: ServerOptions, config: EngineConfig, **loading) -> int:
    """Serve until a signal ends it; returns the exit code. `loading` are the other arguments of `LLMEngine`.

    Raises ConfigError, before anything is loaded, if it cannot listen at the address, and the errors of `LLMEngine`.
    """
    began = time.perf_counter()
    log_to_stderr()
    allow_many_connections()
    with bound(options.host, options.port) as listener:
        say(1, "LLMEngine", f"loading {model}")
        llm_engine = LLMEngine(model, config=config, **loading)
        name = name_of(model, options)
        metrics = Metrics(options.metrics_prefix, name)
        engine = AsyncEngine(llm_engine, max_queue=options.max_queue, metrics=metrics, model_name=name)
        try:
            for line in start_up_lines(engine):
                say(*line)
            server = Server(create_app(engine, options), engine, options.drain_timeout)
            server.ready = f"ready on {address(listener)} after {{:.1f}} s"
            server.began = began
            share_the_lock()
            server.run(sockets=[listener])
        finally:
            engine.shutdown()
    say(1, "OpenAI server", "ended")
    return 0


# --- before it serves ------------------------------------------------------------------------------------------------


def log_to_stderr() -> None:
    """Log this program's lines, and uvicorn's warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("minillm", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def say(layer: int, part: str, text: str) -> None:
    """Log a line with the part it comes from and that part's layer, as the book counts layers."""
    log.info("[layer %d, %s] %s", layer, part, text)


def allow_many_connections() -> None:
    """Raise the system's limit of files: each connection is one, and the default is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def bound(host: str, port: int) -> socket.socket:
    """A socket with this address, which does not listen yet. Raises ConfigError."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise ConfigError(f"host {host!r} is no address of this machine ({error.strerror}); try 127.0.0.1") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}, port {port} ({error.strerror}); choose another with --port, 0 for any free one"
        ) from error
    return listener


def share_the_lock() -> None:
    """Set how two threads that both compute, the engine's and the event loop's, take turns.

    The engine releases Python's lock in each kernel of a step. With Python's 5 ms it would get the lock back only after
    the loop has sent all tokens of the step before, and the two would not overlap. Permanent objects are excluded from
    garbage collection, which neither thread could interrupt.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()


def address(listener: socket.socket) -> str:
    """The URL of the server."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def start_up_lines(engine: AsyncEngine) -> Iterator[tuple[int, str, str]]:
    """Yields (layer, part, text) for everything decided at the start, from the configuration down and up again."""
    config, ledger, model = engine.config, engine.ledger, engine.model_config
    settings = ", ".join(f"{field.name}={getattr(config, field.name)}" for field in fields(config))
    yield 1, "LLMEngine", f"engine config: {settings}"
    where = "in this process" if config.worker == "inline" else "in a process of its own"
    if config.tensor_parallel_size > 1:
        where = f"in {config.tensor_parallel_size} processes, each with its part"
    yield 3, "Worker", f"weights: {model.num_parameters:,} parameters, {where}"
    for line in str(ledger).splitlines():
        yield 3, "CacheEngine", line
    yield 3, "kernels", engine.kernels
    num_tokens = (ledger.num_blocks - 1) * ledger.block_size
    yield (
        2,
        "BlockManager",
        f"{ledger.num_blocks:,} blocks of {ledger.block_size} tokens hold {num_tokens:,} tokens; maximum concurrency "
        f"for {config.max_model_len:,} tokens per request: {num_tokens / config.max_model_len:.2f}",
    )
    yield (
        2,
        "Scheduler",
        f"{config.scheduling_policy}, a step has at most {config.max_num_seqs} requests and "
        f"{config.max_num_batched_tokens} tokens; {engine.max_queue} more requests may wait",
    )


# --- while it serves -------------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """uvicorn with our own signal handling."""

    ready, began = "ready", 0.0  # the log's line when it listens, with the seconds since it began

    def __init__(self, app, engine: ServedEngine, drain_timeout: float):
        config = uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2 * CLOSING_SECONDS,  # if `_cut_off` does not help
        )
        super().__init__(config)
        self.engine, self.drain_timeout = engine, drain_timeout
        self._is_ending = False
        self._tasks: set[asyncio.Task] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and log it."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if isinstance(self.engine, AsyncEngine):  # replicas have logs of their own
            self._spawn(log_throughput(self.engine))
        say(1, "API server", "routes: " + ", ".join(sorted(self.config.app.openapi()["paths"])))
        say(1, "OpenAI server", self.ready.format(time.perf_counter() - self.began))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what is open."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._loop.call_later(CLOSING_SECONDS, self._cut_off)
        await super().shutdown(sockets)

    def _cut_off(self) -> None:
        """Close connections whose answers are unread; a lost connection ends its tasks in order."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: the first one ends the server in order, the second at once."""
        if self._is_ending:
            os._exit(128 + sig)  # a worker process ends by itself when our end of its socket closes
        self._is_ending = True
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._end(signal.Signals(sig).name)))

    async def _end(self, name: str) -> None:
        engine = self.engine
        say(
            1,
            "OpenAI server",
            f"{name}: {engine.num_running} requests run, {engine.num_waiting} wait, and may finish within "
            f"{self.drain_timeout:g} s; nothing new is taken",
        )
        try:
            async with asyncio.timeout(self.drain_timeout + CLOSING_SECONDS):
                await engine.drain(self.drain_timeout)
        except TimeoutError:  # a step that does not end, on the engine's thread or in its worker
            log.error("the engine does not answer; the server ends without it")
            os._exit(1)
        self.should_exit = True

    def _spawn(self, work) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def log_throughput(engine: AsyncEngine) -> None:
    """Log a line every LOG_EVERY seconds while something happens, and once after."""
    before, was_busy = dict(engine.metrics.counters), False
    while True:
        await asyncio.sleep(LOG_EVERY)
        now = dict(engine.metrics.counters)
        new, before = {name: now[name] - before[name] for name in now}, now
        is_busy = any(new.values()) or engine.num_running + engine.num_waiting > 0
        if is_busy or was_busy:
            say(2, "Scheduler", throughput_line(engine, new))
        was_busy = is_busy


def throughput_line(engine: AsyncEngine, new: dict[str, int]) -> str:
    """The line: what has happened in the last LOG_EVERY seconds, and the current state."""
    hits = new["prefix_cache_hits"] / max(1, new["prefix_cache_queries"])
    return (
        f"prompt throughput {new['prompt_tokens'] / LOG_EVERY:.1f} tokens/s, generation throughput "
        f"{new['generation_tokens'] / LOG_EVERY:.1f} tokens/s, running {engine.num_running}, waiting "
        f"{engine.num_waiting}, cache usage {engine.cache_usage:.1%}, prefix cache hit rate {hits:.1%}"
    )
