"""The server's life: it loads and says so layer by layer, serves, and on a signal ends what it has begun.

The first SIGTERM or Ctrl-C: nothing new is taken, what runs may end, then the process exits with 0. The second one ends
it at once. If the worker dies the server stays, answers /health with 503, and says why in its log.
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
from pathlib import Path
from types import FrameType

import uvicorn

from minillm.engine import EngineConfig, LLMEngine
from minillm.errors import ConfigError
from minillm.serving.api_server import create_app
from minillm.serving.async_engine import AsyncEngine
from minillm.serving.connections import PatientProtocol
from minillm.serving.metrics import Metrics
from minillm.serving.options import ServerOptions

log = logging.getLogger("minillm.serving")
CLOSING_SECONDS = 5  # for answers to be sent when all requests have ended
SWITCH_SECONDS = 50e-6  # for which the event loop may keep the engine waiting for Python's lock, or the engine the loop
LOG_EVERY = 10.0  # seconds between lines of throughput


def serve(model: str, options: ServerOptions, config: EngineConfig, **loading) -> int:
    """Serve until a signal ends it; returns the exit code. `loading` is what `LLMEngine` takes beside the model.

    Raises ConfigError if the address cannot be had, before anything is loaded, and the errors of `LLMEngine`.
    """
    began = time.perf_counter()
    log_to_stderr()
    allow_many_connections()
    with bound(options.host, options.port) as listener:
        say(1, "LLMEngine", f"loading {model}")
        llm_engine = LLMEngine(model, config=config, **loading)
        name = options.served_model_name or Path(model).name
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
    """Lines of this program, and what uvicorn has to complain of."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("minillm", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def say(layer: int, part: str, text: str) -> None:
    """A line that names who speaks: the part, and its layer as the book counts them."""
    log.info("[layer %d, %s] %s", layer, part, text)


def allow_many_connections() -> None:
    """Each connection is a file to the system, which allows 1,024 unless it is asked."""
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

    The engine lets go of Python's lock in each of a step's kernels. With Python's 5 ms it would come back only when the
    loop has sent all tokens of the step before; what should happen beside each other would happen one after the other.
    Objects that stay are taken out of the collector's rounds, which neither thread could interrupt.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()


def address(listener: socket.socket) -> str:
    """Where clients reach it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def start_up_lines(engine: AsyncEngine) -> Iterator[tuple[int, str, str]]:
    """(layer, part, what it says) of everything that a start decides, from the configuration down and up again."""
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
    """uvicorn, with our answer to signals."""

    ready, began = "ready", 0.0  # what the log says when it listens, with the seconds since it began

    def __init__(self, app, engine: AsyncEngine, drain_timeout: float):
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
        """Listen, and say so."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
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
        """Whoever has not taken its answer by now does not get it; a lost connection ends its tasks in order."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one ends it in order, the second at once."""
        if self._is_ending:
            os._exit(128 + sig)  # a worker process ends by itself when our end of its socket closes
        self._is_ending = True
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._end(signal.Signals(sig).name)))

    async def _end(self, name: str) -> None:
        engine = self.engine
        say(
            1,
            "OpenAI server",
            f"{name}: {engine.num_running} requests run, {engine.num_waiting} wait, and may end within "
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
    """A line every LOG_EVERY seconds, while something happens and once after."""
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
    """What has happened in the last LOG_EVERY seconds, and how things stand."""
    hits = new["prefix_cache_hits"] / max(1, new["prefix_cache_queries"])
    return (
        f"prompt throughput {new['prompt_tokens'] / LOG_EVERY:.1f} tokens/s, generation throughput "
        f"{new['generation_tokens'] / LOG_EVERY:.1f} tokens/s, running {engine.num_running}, waiting "
        f"{engine.num_waiting}, cache usage {engine.cache_usage:.1%}, prefix cache hit rate {hits:.1%}"
    )
