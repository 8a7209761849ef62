"""Tensor parallelism: the processes that hold one model together, joined by torch.distributed (gloo, on GPUs NCCL).

Rank 0 is the engine's worker process. It passes every call on to the other ranks, unchanged and in order. Every rank
carries out every plan, and samples the same tokens from the same gathered logits. A rank that raises an error ends, and
all others end with it.

The ranks are started here, on one machine. Or torchrun has started them, one on each GPU of several machines, and its
environment variables say so: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.costs import MemoryProfile
from minillm.errors import ConfigError, MiniLLMError
from minillm.model import ModelConfig, Shard, locate, read_config
from minillm.runtime import messages
from minillm.runtime.plan import RunnerOptions
from minillm.runtime.processes import is_gone, start_of
from minillm.runtime.worker_process import METHODS, MOST_IN_FLIGHT, ProcessWorker, _Server, search_path

PLACE = "MINILLM_RANKS_MEET_AT"  # the file of ranks that are all on this machine; without it MASTER_ADDR, MASTER_PORT
BY_HAND = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
FOREVER = timedelta(days=3650)  # of waiting for the next plan
FOLDER = re.compile(r"minillm-ranks-(\d{1,9})-(\d+)-.*")  # of the engine: process id, start
LOOK_EVERY = 0.5  # seconds between checks that the parent process is alive


class RankGroup:
    """This process among the ranks."""

    def __init__(self, device: str, environment: Mapping[str, str] = os.environ):
        """Wait until all ranks are there. `device` is "cpu" or "cuda": a rank takes the GPU of its LOCAL_RANK."""
        self.rank, self.size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        self.local_size = int(environment.get("LOCAL_WORLD_SIZE", 1))
        self.device = device if device == "cpu" else f"cuda:{environment.get('LOCAL_RANK', 0)}"
        self.backend = "gloo" if device == "cpu" else "nccl"
        if device != "cpu":
            torch.cuda.set_device(self.device)
        where = environment.get(PLACE, "env://")
        dist.init_process_group(self.backend, init_method=where, rank=self.rank, world_size=self.size)
        self._calls = dist.new_group(backend="gloo", timeout=FOREVER)
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()

    @property
    def why(self) -> str:
        """One line: how many compute together, and by which library."""
        return f"{self.size} ranks, joined by {self.backend}"

    @property
    def shard(self) -> Shard:
        """What this rank holds of a model."""
        return Shard(self.rank, self.size, self.add_up, self.gather)

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, in place."""
        dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[R, n] of every rank -> [R, size * n]."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def worst(self, profile: MemoryProfile) -> MemoryProfile:
        """A profile safe for every rank: on a CPU each has an equal part of the memory, on a GPU the whole card."""
        host = profile.host_available // self.local_size
        available = host if profile.on_cpu else profile.available
        profile = profile._replace(available=available, host_available=host, num_ranks=self.size)
        profiles = [MemoryProfile(*fields) for fields in messages.decode(self._from_all(messages.encode(profile)))]
        return MemoryProfile.worst(profiles)

    def _from_all(self, message: bytes) -> bytes:
        """The messages of all ranks, in JSON, as a list of them."""
        found = []
        for rank in range(self.size):
            found.append(self._broadcast(message if rank == self.rank else b"", rank))
        return b"[" + b",".join(found) + b"]"

    # --- calls ---

    def tell(self, message: bytes) -> None:
        """Rank 0 passes on a call."""
        self._broadcast(message, 0)

    def dismiss(self) -> None:
        """Rank 0 says that no call will follow."""
        with suppress(RuntimeError):  # another rank has ended already
            self.tell(b"")

    def hear(self) -> bytes:
        """Wait for the next call to rank 0 and return it; the empty message if rank 0 is gone."""
        try:
            return self._broadcast(b"", 0)
        except RuntimeError:  # as gloo has it
            return b""

    def _broadcast(self, message: bytes, source: int) -> bytes:
        """The message of one rank, on all."""
        length = torch.tensor([len(message)])
        dist.broadcast(length, source, group=self._calls)
        content = torch.empty(int(length), dtype=torch.uint8)
        if source == self.rank and message:
            content = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        if len(content):
            dist.broadcast(content, source, group=self._calls)
        return content.numpy().tobytes()


def end_with(parent: int) -> None:
    """This process ends when its parent is gone, whatever it waits for."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os._exit(1)


def follow(device: str) -> None:
    """The main loop of every rank but the first: do what rank 0 passes on, until the end. Does not return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine
    if PLACE not in os.environ:  # torchrun asks all to end, and rank 0 may still have to finish requests
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server, unread = _Server(), deque()
    try:
        server.join(device)
        while message := server._group.hear():
            method, arguments = messages.decode(message)
            is_step = method == "execute_model"
            while len(unread) > (MOST_IN_FLIGHT - 1 if is_step else 0):  # as rank 0 does
                unread.popleft().result()
            result = METHODS[method](server, *arguments)
            unread.extend([result] if is_step else [])
        os._exit(0)
    except BaseException as error:
        tell_why_it_ends(server._group, error)
        os._exit(1)


def tell_why_it_ends(group: RankGroup | None, error: BaseException) -> None:
    """On stderr: our own errors in one line, because rank 0 mostly raises them too; others with a stack trace."""
    if isinstance(error, MiniLLMError):
        print(f"rank {group.rank if group else '?'}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


# --- before they start -----------------------------------------------------------------------------------------------


def is_started_by_others(environment: Mapping[str, str] = os.environ) -> bool:
    """True if this process is one of several that another program, such as torchrun, starts."""
    return "RANK" in environment


def check_ranks(config: ModelConfig, size: int, device: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError if ranks of this model are not possible on these devices, in this environment.

    Warns (UserWarning) if there are more ranks than cores.
    """
    Shard(size=size).config_of(config)
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or index:
        raise ConfigError(
            f"device is {device!r} and tensor_parallel_size {size}; ranks take cuda:0, cuda:1, ... of their machine: "
            "give 'cuda' (CUDA_VISIBLE_DEVICES says which there are), or 'cpu'"
        )
    local_size = size
    if is_started_by_others(environment):
        local_size = int(environment.get("LOCAL_WORLD_SIZE", 1))
        _check_environment(size, environment)
    if kind == "cuda" and local_size > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size asks for {local_size} GPUs on this machine, torch sees {torch.cuda.device_count()}; "
            "lower it, or start ranks on several machines with torchrun"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if kind == "cpu" and local_size > cores:
        warnings.warn(
            f"{local_size} ranks on {cores} cores: in every layer they wait for each other, and for a core",
            stacklevel=2,
        )


def _check_environment(size: int, environment: Mapping[str, str]) -> None:
    missing = [name for name in BY_HAND if not environment.get(name)]
    if missing:
        raise ConfigError(f"RANK is set, but not {', '.join(missing)}; start ranks with torchrun, or unset RANK")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise ConfigError(f"{name} is {environment[name]!r}; it must be a whole number")
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if world_size != size or rank >= size:
        raise ConfigError(
            f"tensor_parallel_size is {size}, but this is RANK {rank} of WORLD_SIZE {world_size}: start as many "
            "processes as there are ranks, or unset RANK and let minillm start them"
        )
    if rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _check_port(int(environment["MASTER_PORT"]))


def _check_port(port: int) -> None:
    """Raises ConfigError if rank 0 cannot listen there."""
    try:
        with socket.create_server(("", port)):
            pass
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"MASTER_PORT is {port}, where rank 0 cannot listen ({why}); choose a free one") from error


# --- the start -------------------------------------------------------------------------------------------------------


def start_ranks(
    model: str | Path,
    options: RunnerOptions,
    size: int,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    num_tokens: int | None = None,
) -> ProcessWorker:
    """The ranks of a model, as one worker. Does not return in a process that torchrun started as a rank other than 0.

    Raises ConfigError, before a process is started, as `check_ranks` does, and what `Worker.load` raises.
    """
    check_ranks(read_config(locate(model, dtype, device)[0]), size, str(device))
    if is_started_by_others() and os.environ["RANK"] != "0":
        follow(str(device))
    return ProcessWorker(model, options, dtype=dtype, device=device, num_tokens=num_tokens, num_ranks=size)


def make_folder() -> str:
    """A new folder in which ranks can meet. Removes those of engines that were killed: they could not do it."""
    for folder in Path(tempfile.gettempdir()).glob("minillm-ranks-*"):
        owner = FOLDER.fullmatch(folder.name)
        if owner and is_gone(int(owner[1]), int(owner[2])):
            shutil.rmtree(folder, ignore_errors=True)  # that of another user stays
    return tempfile.mkdtemp(prefix=f"minillm-ranks-{os.getpid()}-{start_of(os.getpid())}-")


def environment_of(rank: int, size: int, place: Path) -> dict[str, str]:
    """The environment of a rank that is started here: torchrun's variables, and where the ranks meet."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, PLACE: f"file://{place}"}
    nearby = {"GLOO_SOCKET_IFNAME": LOOPBACK[sys.platform]} if sys.platform in LOOPBACK else {}
    return nearby | {name: str(value) for name, value in told.items()}


def start_follower(rank: int, size: int, place: Path, device: str) -> subprocess.Popen:
    """Start one of the ranks after the first."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"from minillm.runtime.ranks import follow; follow({device!r})"],
        stdin=subprocess.DEVNULL,
        env=os.environ | search_path() | environment_of(rank, size, place),
    )
