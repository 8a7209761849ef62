"""One run of the benchmark: its record, its budget of time, and the isolation of everything that is measured.

Every measurement is an *entry*: a name in a part of the record. The file is written before and after each entry, so
that a call that is killed leaves what was measured; an entry that raises is recorded as {"error": ...} and the rest
goes on. A CUDA error may outlive its entry (an illegal address, a graph half captured), so that nothing after it can
be trusted: `DeviceLost` ends the process, and the supervisor goes on in another one, where entries that the file has
already are not repeated.
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

SCHEMA = 1  # of the JSON; another number where old readers would misread it
KIND, DRY_KIND = "gpu", "DRY RUN, NOT A MEASUREMENT"
SPEED = "output_tokens_per_second"  # of a run of a workload: what speeds are compared by
UNFINISHED = {"error": "did not finish: the process ended while this was measured", "ended_process": True}
MOST_ENDED = 2  # processes ended by entries side by side, before the rest of these is given up
MOST_ENDED_IN_PART = 6  # the same of a whole part
WORDS_OF_CUDA = "CUDA error", "CUDA driver error", "[CUDA]", "cuda runtime error", "during capture"
FRAMES = 8  # of where an error was raised, the innermost


class DeviceLost(RuntimeError):
    """The device does nothing more for this process; another one may go on."""


@dataclass
class Session:
    """What the parts share: sizes, the record they fill, ceilings, time."""

    scale: Scale
    repeats: int
    record: dict
    file: Path | None = None
    peers: Sequence[str] = ()
    card: Card | None = None  # the measured ceilings, once they are
    deadline: float = float("inf")  # on time.perf_counter: when the part that runs should be over
    log: Callable[[str], None] = field(default=lambda line: print(line, flush=True))
    _part: dict = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Of the part that runs; never negative."""
        return max(0.0, self.deadline - time.perf_counter())

    @contextmanager
    def share_of_time(self, share: float) -> Iterator[None]:
        """What is done inside should take no more than this share of the seconds that are left."""
        outer = self.deadline
        self.deadline = time.perf_counter() + share * self.seconds_left
        try:
            yield
        finally:
            self.deadline = outer

    def part(self, name: str) -> dict:
        """The record of a part, empty at first; the one that runs from now on."""
        self._part = self.record["parts"].setdefault(name, {})
        return self._part

    def entry(self, part: dict, name: str, work: Callable[[], Mapping]) -> dict:
        """part[name] = work(), or what went wrong. One that is there already is not measured again.

        Without time left it is skipped, which the record says. Raises DeviceLost if the device is of no more use.
        """
        if name in part and "skipped" not in part[name]:
            return part[name]
        if not self.seconds_left:
            part[name] = {"skipped": "no time was left"}
            self.log(f"  {name}: skipped, no time was left")
            return part[name]
        if num_ended(part) >= MOST_ENDED or num_ended(self._part) >= MOST_ENDED_IN_PART:
            part[name] = {"error": "not tried: too many like it have ended the process that measured them"}
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
        """Give back what the last entry held. Raises DeviceLost if the device does not answer."""
        gc.collect()
        if self.scale.torch_device.type == "cuda":
            try:
                synchronize(self.scale.torch_device)
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise DeviceLost(str(error)) from error

    def save(self) -> None:
        """Write the record, whole or not at all."""
        if self.file is not None:
            draft = self.file.with_name(self.file.name + ".part")
            draft.write_text(json.dumps(self.record, indent=1) + "\n")
            draft.replace(self.file)


def num_ended(node: Mapping) -> int:
    """Entries in there, at any depth, that have ended the process which measured them."""
    return sum(num_ended(each) for each in node.values() if isinstance(each, dict)) + ("ended_process" in node)


def is_of_the_device(error: Exception) -> bool:
    """Whether CUDA itself has failed, by the kind of the error or by its words; running out of memory does no harm.

    A missing compiler is a RuntimeError too. What is not recognised here, `free_memory` finds out by asking the device.
    """
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.AcceleratorError) or any(words in str(error) for words in WORDS_OF_CUDA)


def described_error(error: Exception) -> dict:
    """What went wrong and where, for the record."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[: -FRAMES - 1 : -1]]
    return {"error": f"{type(error).__name__}: {error}", "raised_at": ", called at ".join(places)}


def new_record(scale: Scale, arguments: Mapping) -> dict:
    """A record without measurements: what machine, which versions, which settings, when."""
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
    """Names and sizes of what computes."""
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
    """As nvidia-smi says; None where there is no such program."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str | None]:
    """Of what is measured; None for what is not installed."""
    found = {"minillm": minillm.__version__, "torch": torch.__version__}
    for name in ("triton", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
