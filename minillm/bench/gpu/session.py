"""One run of the benchmark: its record, its time budget, and the isolation of its measurements.

Every measurement is an *entry*: a name in a part of the record. The file is written before and after each entry, so
that a killed run keeps what was measured. An entry that raises is recorded as {"error": ...}, and the rest continues.
After a CUDA error such as an illegal address or a half captured graph, no later result can be trusted. Then
`DeviceLost` ends the process, and the supervisor continues in a new one, where entries that are already in the file are
not repeated.
"""

import datetime
import gc
import json
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

import minillm
from minillm.bench.gpu.scale import Scale
from minillm.bench.gpu.timing import synchronize
from minillm.bench.measuring import processor
from minillm.costs import Card
from minillm.errors import KernelError

SCHEMA = 1  # of the JSON; to be raised when old readers would misread it
KIND, DRY_KIND = "gpu", "DRY RUN, NOT A MEASUREMENT"
SPEED = "output_tokens_per_second"  # of a workload's run; speeds are compared by it
UNFINISHED = {"error": "did not finish: the process ended while this was measured", "ended_process": True}
MOST_ENDED = 2  # processes ended by sibling entries, before their remaining siblings are skipped
MOST_ENDED_IN_PART = 6  # the same for a whole part
WORDS_OF_CUDA = "CUDA error", "CUDA driver error", "[CUDA]", "cuda runtime error", "during capture"
FRAMES = 8  # innermost frames of an error that are recorded


class DeviceLost(RuntimeError):
    """The device is unusable for this process; a new process may continue."""


@dataclass
class Session:
    """The common state of the parts: sizes, the record, ceilings, time."""

    scale: Scale
    repeats: int
    record: dict
    file: Path | None = None
    peers: Sequence[str] = ()
    card: Card | None = None  # the measured ceilings, once they are
    deadline: float = float("inf")  # on time.perf_counter: the planned end of the running part
    log: Callable[[str], None] = field(default=lambda line: print(line, flush=True))
    _part: dict = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Seconds left for the running part; never negative."""
        return max(0.0, self.deadline - time.perf_counter())

    @contextmanager
    def share_of_time(self, share: float) -> Iterator[None]:
        """Limits the work within the block to this share of the seconds left."""
        outer = self.deadline
        self.deadline = time.perf_counter() + share * self.seconds_left
        try:
            yield
        finally:
            self.deadline = outer

    def part(self, name: str) -> dict:
        """Begin a part; returns its record, which is empty at first."""
        self._part = self.record["parts"].setdefault(name, {})
        return self._part

    def entry(self, part: dict, name: str, work: Callable[[], Mapping]) -> dict:
        """part[name] = work(), or its error. An existing entry is not measured again.

        Without time left it is skipped, and the record says so. Raises DeviceLost if the device is unusable.
        """
        if name in part and "skipped" not in part[name]:
            return part[name]
        if not self.seconds_left:
            part[name] = {"skipped": "no time was left"}
            self.log(f"  {name}: skipped, no time was left")
            return part[name]
        if num_ended(part) >= MOST_ENDED or num_ended(self._part) >= MOST_ENDED_IN_PART:
            part[name] = {"error": "not tried: too many like it have ended their process"}
            self.log(f"  {name}: not tried")
            return part[name]
        lost = False
        part[name] = dict(UNFINISHED)
        self.save()
        began = time.perf_counter()
        try:
            part[name] = dict(work())
        except KernelError as error:
            part[name] = {"refused": str(error)}
        except Exception as error:
            part[name] = described_error(error)
            lost = self.scale.torch_device.type == "cuda" and is_of_the_device(error)
            part[name] |= {"ended_process": True} if lost else {}
        part[name]["entry_seconds"] = time.perf_counter() - began
        self.save()
        outcome = part[name].get("error") or ("refused" if "refused" in part[name] else "done")
        self.log(f"  {name}: {outcome} ({part[name]['entry_seconds']:.1f} s)")
        if lost:
            raise DeviceLost(part[name]["error"])
        self.free_memory()
        return part[name]

    def free_memory(self) -> None:
        """Free the memory of the last entry. Raises DeviceLost if the device does not answer."""
        gc.collect()
        if self.scale.torch_device.type == "cuda":
            try:
                synchronize(self.scale.torch_device)
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise DeviceLost(str(error)) from error

    def save(self) -> None:
        """Write the record atomically."""
        if self.file is not None:
            draft = self.file.with_name(self.file.name + ".part")
            draft.write_text(json.dumps(self.record, indent=1) + "\n")
            draft.replace(self.file)


def num_ended(node: Mapping) -> int:
    """The number of entries, at any depth, that ended their process."""
    return sum(num_ended(each) for each in node.values() if isinstance(each, dict)) + ("ended_process" in node)


def is_of_the_device(error: Exception) -> bool:
    """Whether CUDA itself has failed, by the type or message of the error; running out of memory is harmless.

    A missing compiler is also a RuntimeError. Failures not recognised here are found when `free_memory` asks the
    device.
    """
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.AcceleratorError) or any(words in str(error) for words in WORDS_OF_CUDA)


def described_error(error: Exception) -> dict:
    """The error and where it was raised, for the record."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[: -FRAMES - 1 : -1]]
    return {"error": f"{type(error).__name__}: {error}", "raised_at": ", called at ".join(places)}


def new_record(scale: Scale, arguments: Mapping) -> dict:
    """A record without measurements: machine, versions, settings, date."""
    return {
        "schema": SCHEMA,
        "kind": KIND if scale.is_full else DRY_KIND,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(scale.torch_device),
        "versions": versions(),
        "settings": {
            "arguments": dict(arguments),
            "dtype": str(scale.dtype).removeprefix("torch."),
            "max_num_seqs": scale.max_num_seqs,
            "max_num_batched_tokens": scale.max_num_batched_tokens,
        },
        "parts": {},
    }


def machine(device: torch.device) -> dict:
    """Names and sizes of the GPU and the processor."""
    host = {"processor": processor(), "python": platform.python_version()}
    if device.type != "cuda":
        return host | {"gpu": None}
    card = torch.cuda.get_device_properties(device)
    return host | {
        "gpu": card.name,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "memory_bytes": card.total_memory,
        "processors": card.multi_processor_count,
        "l2_bytes": card.L2_cache_size,
    }


def driver_version() -> str | None:
    """The driver's version from nvidia-smi; None without that program."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str | None]:
    """Versions of the measured packages; None if not installed."""
    found = {"minillm": minillm.__version__, "torch": torch.__version__}
    for name in ("triton", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
