"""A worker in a process of its own: the engine lives on if it dies, and it ends if the engine does.

The two talk over a socket, in JSON (see `messages`): a call is [method, arguments], its answer ["ok", result] or
["error", name of the error, message, stack trace]. Nothing is ever unpickled.
"""

import os
import signal
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from minillm import errors
from minillm.errors import MiniLLMError, WorkerDiedError
from minillm.memory_ledger import MemoryProfile
from minillm.plan import ModelOutput, SchedulerOutput
from minillm.runtime import messages
from minillm.runtime.worker import Worker

LOOK_EVERY = 0.5  # seconds between looks whether the other process still lives, in case its end of the socket does
GIVEN_TO_END = 2.0  # seconds a worker has to end by itself before it is killed
ERRORS = {
    name: error for name, error in vars(errors).items() if isinstance(error, type) and issubclass(error, MiniLLMError)
}  # what the worker may raise here by name; anything else becomes a RuntimeError


# --- the engine's side -----------------------------------------------------------------------------------------------


class ProcessWorker:
    """A `Worker` in another process, with the same methods and the same errors.

    Raises WorkerDiedError, in the call that waits and in all later ones, once that process has ended. Linux and macOS.
    """

    def __init__(
        self, model: str | Path, *, dtype: str = "float32", device: str = "cpu", num_tokens: int | None = None
    ):
        """Start the process and load the model there; same arguments and errors as `Worker.load`.

        It computes with as many threads as this process.
        """
        self._connection, theirs = Pipe()
        with theirs:
            self._process = _start(theirs.fileno())
        self._end = weakref.finalize(self, _end, self._connection, self._process)
        self._unanswered = 0  # calls; one that was interrupted while it waited leaves its answer behind
        try:
            self._call("load", str(model), str(dtype), str(device), num_tokens, torch.get_num_threads())
        except BaseException:
            self.shutdown()
            raise

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def profile(
        self, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int = 16
    ) -> MemoryProfile:
        """See `Worker.profile`."""
        return MemoryProfile(*self._call("profile", max_num_batched_tokens, max_num_seqs, max_model_len, block_size))

    def init_cache(self, num_blocks: int, block_size: int = 16, num_host_blocks: int = 0) -> int:
        """See `Worker.init_cache`."""
        return self._call("init_cache", num_blocks, block_size, num_host_blocks)

    def execute_model(self, plan: SchedulerOutput) -> ModelOutput:
        """See `Worker.execute_model`."""
        return messages.output_from(self._call("execute_model", plan))

    def shutdown(self) -> None:
        """End the process and wait until it is gone. No effect the second time."""
        self._end()

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call a method there and wait for its answer."""
        if not self._end.alive:
            raise WorkerDiedError(f"the worker process {self.pid} {self._how_it_ended()}; start a new engine")
        message = messages.encode([method, arguments])
        try:
            while self._unanswered:
                self._receive()
            self._unanswered += 1
            self._transfer(self._connection.send_bytes, message)
            answer = self._receive()
        except (EOFError, OSError):
            self._end()
            raise WorkerDiedError(
                f"the worker process {self.pid} {self._how_it_ended()} during {method}; all its requests have failed: "
                "start a new engine, with a smaller pool if the machine ran out of memory"
            ) from None
        return _result(*answer)

    def _receive(self) -> list:
        """The next answer. Raises EOFError if the process has ended and left none."""
        while not self._connection.poll(LOOK_EVERY):
            if self._process.poll() is not None and not self._connection.poll():
                raise EOFError
        answer = messages.decode(self._transfer(self._connection.recv_bytes))
        self._unanswered -= 1
        return answer

    def _transfer(self, operation: Callable, *arguments: bytes) -> bytes | None:
        """Send or receive one message; if only half of it passes (Ctrl-C), nothing after it could be read."""
        try:
            return operation(*arguments)
        except BaseException:
            self.shutdown()
            raise

    def _how_it_ended(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            return f"was killed by signal {-code} ({signal.strsignal(-code)})"
        return f"ended with exit code {code}"


def _start(fileno: int) -> subprocess.Popen:
    """A fresh interpreter that serves the socket `fileno`, and finds modules where this one does."""
    search = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "minillm.runtime.worker_process", str(fileno), str(os.getpid())],
        pass_fds=[fileno],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": search},
    )


def _end(connection: Connection, process: subprocess.Popen) -> None:
    """Close the socket, on which the process ends by itself, and make sure that it did."""
    connection.close()
    try:
        process.wait(GIVEN_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _result(status: str, *content: Any) -> Any:
    """What a call returned there, or the error it raised."""
    if status == "ok":
        return content[0]
    name, message, trace = content
    error = ERRORS[name](message) if name in ERRORS else RuntimeError(f"{name} in the worker process: {message}")
    error.add_note(f"In the worker process:\n{trace}")
    raise error


# --- the worker's side -----------------------------------------------------------------------------------------------


class _Server:
    """Holds the worker; its public methods are what can be called."""

    def load(self, model: str, dtype: str, device: str, num_tokens: int | None, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.worker = Worker.load(model, dtype=dtype, device=device, num_tokens=num_tokens)

    def profile(self, *limits: int) -> MemoryProfile:
        return self.worker.profile(*limits)

    def init_cache(self, *sizes: int) -> int:
        return self.worker.init_cache(*sizes)

    def execute_model(self, plan: list) -> ModelOutput:
        return self.worker.execute_model(messages.plan_from(plan))


METHODS: dict[str, Callable] = {name: method for name, method in vars(_Server).items() if not name.startswith("_")}


def serve(connection: Connection, parent: int) -> None:
    """Answer calls until the other end closes or the process `parent` is gone."""
    server = _Server()
    while True:
        try:
            while not connection.poll(LOOK_EVERY):
                if os.getppid() != parent:  # killed, while a process it forked keeps the socket open
                    return
            method, arguments = messages.decode(connection.recv_bytes())
            connection.send_bytes(messages.encode(_answer(server, method, arguments)))
        except (EOFError, OSError):
            return


def _answer(server: _Server, method: str, arguments: list) -> tuple:
    try:
        return "ok", METHODS[method](server, *arguments)
    except Exception as error:  # told to the engine, which decides
        return "error", type(error).__name__, str(error), traceback.format_exc()


def main(fileno: int, parent: int) -> None:
    """The process: serve the socket it was born with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine, which closes the socket
    os.set_inheritable(fileno, False)
    serve(Connection(fileno), parent)
    os._exit(0)  # the interpreter's own clearing up takes a second and is of no use to anybody


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
