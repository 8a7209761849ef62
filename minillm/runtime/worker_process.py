"""A worker in a process of its own: the engine survives its death, and it ends if the engine does.

The two talk over a socket, in JSON (see `messages`): a call is [method, arguments], its answer ["ok", result] or
["error", name of the error, message, stack trace]. Nothing is ever unpickled.
"""

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm import errors
from minillm.costs import MemoryProfile
from minillm.errors import MiniLLMError, WorkerDiedError
from minillm.runtime import messages
from minillm.runtime.plan import DEFAULT_OPTIONS, ModelOutput, PendingOutput, RunnerOptions, SchedulerOutput
from minillm.runtime.worker import Worker

if TYPE_CHECKING:
    from minillm.runtime.ranks import RankGroup

LOOK_EVERY = 0.5  # seconds between checks that the other process is alive, in case its end of the socket stays open
MOST_IN_FLIGHT = 2  # steps: one that is computed, and the next one
GIVEN_TO_END = 2.0  # seconds a worker has to end by itself before it is killed
ERRORS = {
    name: error for name, error in vars(errors).items() if isinstance(error, type) and issubclass(error, MiniLLMError)
}  # what the worker may raise here by name; anything else becomes a RuntimeError


# --- the engine's side -----------------------------------------------------------------------------------------------


class ProcessWorker:
    """A `Worker` in another process, with the same methods and the same errors.

    Raises WorkerDiedError, in the call that waits and in all later ones, once that process has ended. Linux and macOS.
    With several ranks (see `ranks`) it is the first of them, and ends with any that was started here.
    """

    def __init__(
        self,
        model: str | Path,
        options: RunnerOptions = DEFAULT_OPTIONS,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        num_tokens: int | None = None,
        num_ranks: int = 1,
    ):
        """Start the process and load the model there; same arguments and errors as `Worker.load`.

        The worker computes with as many threads as this process; ranks on a CPU share them.
        """
        ours, theirs = socket.socketpair()
        self._room = ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 8  # bytes that are sure to fit, unread
        self._connection = Connection(ours.detach())
        self._poller = poller_of(self._connection)
        self._processes: list[subprocess.Popen] = []  # messages go to the first one
        self._folder = None if num_ranks == 1 else _meeting_folder()
        self._end = weakref.finalize(self, _end, self._connection, self._processes, self._folder)
        self._ended: subprocess.Popen | None = None  # the one with which all ended
        self._unanswered: deque[_Answer] = deque()  # answers arrive in the order of the calls
        try:
            with theirs:
                self._start(theirs.fileno(), num_ranks, str(device))
            self.load(model, options, dtype=dtype, device=device, num_tokens=num_tokens)
        except BaseException:
            self.shutdown()
            raise

    def _start(self, fileno: int, num_ranks: int, device: str) -> None:
        """Start all processes, and let them find each other."""
        if num_ranks == 1:
            self._processes.append(_start(fileno))
            return
        from minillm.runtime import ranks

        place = Path(self._folder, "ranks")
        by_others = ranks.is_started_by_others()
        self._processes.append(_start(fileno, {} if by_others else ranks.environment_of(0, num_ranks, place)))
        for rank in () if by_others else range(1, num_ranks):
            self._processes.append(ranks.start_follower(rank, num_ranks, place, device))
        self._call("join", device)

    def load(self, model: str | Path, options: RunnerOptions, *, dtype=None, device="cpu", num_tokens=None) -> None:
        """Load a model there, in the place of the one before; see `Worker.load`."""
        read_there = [getattr(options, field.name) for field in fields(RunnerOptions)]  # no more of a whole config
        dtype = None if dtype is None else str(dtype)
        self._call("load", str(model), read_there, dtype, str(device), num_tokens, torch.get_num_threads())

    @property
    def pid(self) -> int:
        """The process's id; of several, that of rank 0."""
        return self.pids[0]

    @property
    def pids(self) -> list[int]:
        """The ids of all processes that were started here, by rank."""
        return [process.pid for process in self._processes]

    def profile(self) -> MemoryProfile:
        """See `Worker.profile`."""
        return MemoryProfile(*self._call("profile"))

    def init_cache(self, num_blocks: int, *, num_host_blocks: int = 0) -> int:
        """See `Worker.init_cache`."""
        return self._call("init_cache", num_blocks, num_host_blocks)

    @property
    def why(self) -> str:
        """See `Worker.why`."""
        return self._call("why")

    def launch(self, plan: SchedulerOutput) -> PendingOutput:
        """See `Worker.launch`: the other process computes while this one goes on."""
        return self._send("execute_model", plan)

    def execute_model(self, plan: SchedulerOutput) -> ModelOutput:
        """See `Worker.execute_model`."""
        return self.launch(plan).result()

    def encode(self, token_ids: Sequence[int]) -> Tensor:
        """See `Worker.encode`."""
        dtype, values = self._call("encode", token_ids)
        return torch.tensor(values, dtype=getattr(torch, dtype))

    def shutdown(self) -> None:
        """End the process and wait until it is gone. No effect the second time."""
        self._end()

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call a method there and wait for its answer."""
        return _result(*self._wait(self._send(method, *arguments)))

    def _send(self, method: str, *arguments: Any) -> "_Answer":
        """Call a method there; its answer is still to come."""
        self._check_alive()
        message = messages.encode([method, arguments])
        # A call that fits into the socket beside one more never waits for the other process to read it. Else, both
        # could be sending, each waiting for the other to read: then nothing may be left that it could send.
        most_unanswered = 1 if len(message) <= self._room else 0
        with self._dying_during(method):
            while len(self._unanswered) > most_unanswered:
                self._receive()
            answer = _Answer(self, method)
            with self._all_or_nothing():
                self._unanswered.append(answer)
                self._connection.send_bytes(message)
        return answer

    def _wait(self, answer: "_Answer") -> list:
        """The answer, when it has come. Raises WorkerDiedError if it cannot come any more."""
        if answer.content is None:
            self._check_alive()
            with self._dying_during(answer.method):
                while answer.content is None:
                    self._receive()
        return answer.content

    def _receive(self) -> None:
        """Take in the next answer. Raises EOFError if the process has ended and left none."""
        while not self._poller.poll(LOOK_EVERY * 1e3):
            if self._find_ended() and not self._poller.poll(LOOK_EVERY * 1e3):  # its last message, or rank 0's
                raise EOFError
        with self._all_or_nothing():
            content = self._connection.recv_bytes()
            self._unanswered.popleft().content = messages.decode(content)

    def check_alive(self) -> None:
        """Raises WorkerDiedError if the process has ended, even if no call has noticed. From any thread."""
        if self._find_ended():
            raise self._death()

    def _check_alive(self) -> None:
        if not self._end.alive:
            raise self._death()

    def _death(self) -> WorkerDiedError:
        return WorkerDiedError(f"the worker process {self._how_it_ended()}; start a new engine")

    def _find_ended(self) -> bool:
        """Whether a process has ended; notes which, of several one that was killed: the others end with it."""
        if self._ended is None:
            ended = [process for process in self._processes if process.poll() is not None]
            self._ended = min(ended, key=lambda process: process.returncode, default=None)
        return self._ended is not None

    def _wait_for_ends(self) -> None:
        """Find out which ended first: the others may end because of it before it is quite gone."""
        self._ended, until = None, time.monotonic() + 2 * LOOK_EVERY
        while any(process.poll() is None for process in self._processes) and time.monotonic() < until:
            time.sleep(0.01)
        self._find_ended()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """One message passes; if only half of it does (Ctrl-C), nothing after it could be read."""
        try:
            yield
        except (EOFError, OSError):  # no process is left to read it, see `_dying_during`
            raise
        except BaseException:
            self.shutdown()
            raise

    @contextmanager
    def _dying_during(self, method: str) -> Iterator[None]:
        """If the process turns out to have ended, raise an error that names the call."""
        try:
            yield
        except (EOFError, OSError):
            self._wait_for_ends()
            self._end()
            raise WorkerDiedError(
                f"the worker process {self._how_it_ended()} during {method}; all its requests have failed: "
                "start a new engine, with a smaller pool if the machine ran out of memory"
            ) from None

    def _how_it_ended(self) -> str:
        process = self._ended or self._processes[0]
        code, rank = process.returncode, self._processes.index(process)
        name = f"{process.pid} (rank {rank})" if self._folder else f"{process.pid}"
        if code is not None and code < 0:
            return f"{name} was killed by signal {-code} ({signal.strsignal(-code)})"
        return f"{name} ended with exit code {code}"


class _Answer:
    """The answer to a call, once it has come; it need not be waited for."""

    def __init__(self, worker: ProcessWorker, method: str):
        self.worker = worker
        self.method = method
        self.content: list | None = None  # None before it has come

    def result(self) -> ModelOutput:
        """The output of the step."""
        return messages.output_from(_result(*self.worker._wait(self)))


def poller_of(connection: Connection) -> select.poll:
    """Waits until something can be read, or the other end is closed. Connection.poll makes one in each call."""
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    return poller


def _meeting_folder() -> str:
    from minillm.runtime.ranks import make_folder  # which imports this module

    return make_folder()


def search_path() -> dict[str, str]:
    """The environment in which a process finds modules where this one does."""
    return {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def _start(fileno: int, environment: Mapping[str, str] = MappingProxyType({})) -> subprocess.Popen:
    """A process that serves the socket `fileno`, and finds modules where this one does."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "minillm.runtime.worker_process", str(fileno), str(os.getpid())],
        pass_fds=[fileno],
        stdin=subprocess.DEVNULL,
        env=os.environ | search_path() | environment,
    )


def _end(connection: Connection, processes: Sequence[subprocess.Popen], folder: str | None) -> None:
    """Close the socket, on which the processes end by themselves, and make sure that they did.

    If one of several has failed, the others may be waiting for it.
    """
    connection.close()
    is_late = any(process.poll() for process in processes)
    deadline = time.monotonic() + (0 if is_late else GIVEN_TO_END)
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


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

    _on_gpu = False  # there, a step is computed after it has been launched
    _group = None  # the ranks that this process is one of

    def join(self, device: str) -> None:
        from minillm.runtime.ranks import RankGroup  # which imports this module

        self._group = RankGroup(device)

    def load(
        self, model: str, options: list, dtype: str | None, device: str, num_tokens: int | None, num_threads: int
    ) -> None:
        named = {"dtype": dtype, "device": device, "num_tokens": num_tokens}
        if self._group is not None:
            num_threads = max(1, num_threads // self._group.local_size) if device == "cpu" else num_threads
            named |= {"device": self._group.device, "shard": self._group.shard}
        torch.set_num_threads(num_threads)
        self.worker = Worker.load(model, RunnerOptions(*options), **named)
        self._on_gpu = self.worker.model.device.type == "cuda"

    def profile(self) -> MemoryProfile:
        profile = self.worker.profile()
        return profile if self._group is None else self._group.worst(profile)

    def init_cache(self, num_blocks: int, num_host_blocks: int) -> int:
        return self.worker.init_cache(num_blocks, num_host_blocks=num_host_blocks)

    def why(self) -> str:
        return self.worker.why if self._group is None else f"{self.worker.why}; {self._group.why}"

    def encode(self, token_ids: list[int]) -> tuple[str, list[float]]:
        vector = self.worker.encode(token_ids)
        return str(vector.dtype).removeprefix("torch."), vector.tolist()

    def execute_model(self, plan: list) -> PendingOutput:
        return self.worker.launch(messages.plan_from(plan))


METHODS: dict[str, Callable] = {name: method for name, method in vars(_Server).items() if not name.startswith("_")}


def serve(connection: Connection, parent: int) -> None:
    """Answer calls, in their order, until the other end closes or the process `parent` is gone.

    A plan is launched while the device computes the one before: a thread of its own waits for steps and answers them.
    """
    server, unanswered, poller = _Server(), deque[Future](), poller_of(connection)
    waiter = ThreadPoolExecutor(1)  # the thread begins with the first step to be waited for
    while True:
        try:
            while not poller.poll(LOOK_EVERY * 1e3):
                if os.getppid() != parent:  # killed while a process it forked keeps the socket open
                    return
            message = connection.recv_bytes()
            if server._group is not None:
                server._group.tell(message)
            method, arguments = messages.decode(message)
            is_step = method == "execute_model"
            while len(unanswered) > (MOST_IN_FLIGHT - 1 if is_step else 0):
                unanswered.popleft().result()
            result = _carry_out(server, method, arguments)
            if is_step and server._on_gpu:
                unanswered.append(waiter.submit(_answer, connection, result, server._group))
            else:  # it has come already
                _answer(connection, result, server._group)
        except (EOFError, OSError):
            if server._group is not None:
                server._group.dismiss()
            return


def _carry_out(server: _Server, method: str, arguments: list) -> Callable[[], Any]:
    """Make a call; returns a function that returns its result or raises its error."""
    try:
        result = METHODS[method](server, *arguments)
    except Exception as error:
        return partial(_raise, error)
    return result.result if method == "execute_model" else lambda: result


def _raise(error: Exception) -> None:
    raise error


def _answer(connection: Connection, result: Callable[[], Any], group: "RankGroup | None") -> None:
    """Send the result of a call, once it is there, or its error: the engine decides.

    Ranks do not wait for one that has failed: with an error that no caller can fix, all end.
    """
    try:
        message = messages.encode(("ok", result()))
    except Exception as error:
        if group is not None and not isinstance(error, MiniLLMError):
            traceback.print_exception(error)
            os._exit(1)
        message = messages.encode(("error", type(error).__name__, str(error), traceback.format_exc()))
    connection.send_bytes(message)


def main(fileno: int, parent: int) -> None:
    """The process: serve the socket that it inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine, which closes the socket
    os.set_inheritable(fileno, False)
    serve(Connection(fileno), parent)
    os._exit(0)  # the interpreter's own clean-up takes a second and is of no use


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
