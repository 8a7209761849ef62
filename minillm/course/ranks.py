"""A function of a notebook in several processes, which torch.distributed joins: no script, no address, no open port.

A process finds no function that is written in a notebook, so the function is sent as its code, with what it uses of the
notebook: other functions, modules by their names, and values that can be pickled.
"""

import marshal
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from minillm.errors import ConfigError, MiniLLMError, check_whole
from minillm.runtime import end_with, environment_of, search_path

SECONDS = 60.0  # that all processes may take together
LOOK_EVERY = 0.05  # seconds between checks that they go on


class RankError(MiniLLMError):
    """A rank raised an error, or did not come to its end in time."""


def on_ranks(size: int, function: Callable, *arguments: Any, seconds: float = SECONDS) -> list:
    """What `function(rank, size, *arguments)` returns in each of `size` new processes, which gloo joins; by rank.

    In there torch.distributed is ready. Raises ConfigError for a function that cannot be sent, and RankError if a rank
    fails or is not done after `seconds`; then the others are ended as well.
    """
    check_whole("size", size, 1)
    sent = pickle.dumps((sent_form(function), arguments))
    with tempfile.TemporaryDirectory(prefix="minillm-") as folder:
        place = Path(folder)
        (place / "call").write_bytes(sent)
        started = [_start(rank, size, place) for rank in range(size)]
        try:
            _wait(started, place, seconds)
        finally:
            for process in started:
                with suppress(ProcessLookupError):
                    process.kill()
                process.wait()
        return [pickle.loads((place / f"answer-{rank}").read_bytes()) for rank in range(size)]


def _start(rank: int, size: int, place: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"from minillm.course.ranks import run_rank; run_rank({str(place)!r})"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # what a rank raises is told by the caller
        env=os.environ | search_path() | environment_of(rank, size, place / "meet"),
    )


def _wait(started: list[subprocess.Popen], place: Path, seconds: float) -> None:
    """Until all have ended well."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
        if time.monotonic() > deadline:
            raise RankError(f"the ranks were not done after {seconds:g} s; does one wait for what no other sends?")
        time.sleep(LOOK_EVERY)
    if any(process.poll() for process in started):
        raise RankError(_first_failure(started, place))


def _first_failure(started: list[subprocess.Popen], place: Path) -> str:
    """Of ranks that fail together the one that began: the others fail because it is gone. It may still be ending."""
    reasons = {rank: place / f"error-{rank}" for rank in range(len(started))}
    failed = [rank for rank, process in enumerate(started) if process.poll() or reasons[rank].exists()]
    silent = [rank for rank in failed if not reasons[rank].exists()]  # killed: it could not say why
    first = silent[0] if silent else min(failed, key=lambda rank: reasons[rank].stat().st_mtime_ns)
    words = f"it ended with {started[first].poll()}" if silent else reasons[first].read_text(encoding="utf-8")
    return f"rank {first}: {words}"


def run_rank(folder: str) -> None:
    """The life of a process: join the others, call the function, leave what it returned in a file."""
    import torch.distributed as dist

    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    place, rank, size = Path(folder), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        dist.init_process_group("gloo", init_method=f"file://{place / 'meet'}", rank=rank, world_size=size)
        form, arguments = pickle.loads((place / "call").read_bytes())
        answer = pickle.dumps(made_of(form)(rank, size, *arguments))
        dist.barrier()
    except Exception as error:
        (place / f"error-{rank}").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        os._exit(1)
    (place / f"answer-{rank}").write_bytes(answer)
    dist.destroy_process_group()


# --- a function as data ----------------------------------------------------------------------------------------------


def sent_form(function: Callable) -> dict:
    """A function as what can be pickled: `made_of` makes it again, in a process that never saw its source.

    Raises ConfigError for what is no Python function, or uses something that cannot be sent.
    """
    functions, modules, values = {}, {}, {}
    waiting = [function]
    while waiting:
        each = waiting.pop()
        if not isinstance(each, FunctionType):
            raise ConfigError(f"{each!r} is no function written in Python; give one, such as def work(rank, size): …")
        if each.__closure__:
            raise ConfigError(f"{each.__name__} uses variables of the function around it; give it arguments instead")
        functions[each.__name__] = marshal.dumps(each.__code__), each.__defaults__, each.__kwdefaults__
        for name in names_in(each.__code__):
            value = each.__globals__.get(name)
            if name not in each.__globals__ or name in (*functions, *modules, *values):
                continue
            if isinstance(value, ModuleType):
                modules[name] = value.__name__
            elif isinstance(value, FunctionType) and value.__module__ == each.__module__:
                if value.__name__ != name:
                    raise ConfigError(f"{name} is another name of {value.__name__}; call it by the name in its def")
                waiting.append(value)
            else:
                values[name] = _pickled(name, value)
    return {"name": function.__name__, "functions": functions, "modules": modules, "values": values}


def _pickled(name: str, value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise ConfigError(f"{name} cannot be sent to another process ({error}); make it inside the function") from error


def made_of(form: dict) -> Callable:
    """The function that `sent_form` describes."""
    space: dict[str, Any] = {"__builtins__": __builtins__, "__name__": "__main__"}
    space |= {name: import_module(module) for name, module in form["modules"].items()}
    space |= {name: pickle.loads(value) for name, value in form["values"].items()}
    for name, (code, defaults, keywords) in form["functions"].items():
        space[name] = FunctionType(marshal.loads(code), space, name, defaults)
        space[name].__kwdefaults__ = keywords
    return space[form["name"]]


def names_in(code: CodeType) -> Iterator[str]:
    """All names that a function may look up outside itself."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
