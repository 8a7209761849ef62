"""The command line of `minillm bench gpu`, and the order of the parts."""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from minillm.bench import recorded
from minillm.bench.gpu import kernels, peers, report, serving
from minillm.bench.gpu.ceilings import copy_ceiling, gemm_ceiling, measured_card
from minillm.bench.gpu.scale import DRY, FULL, Scale
from minillm.bench.gpu.session import KIND, DeviceLost, Session, described_error, new_record
from minillm.bench.gpu.supervisor import DEVICE_LOST, supervise
from minillm.errors import ConfigError, check_number, check_options

BUDGET = 530.0  # seconds: less than ten minutes, including Python's start and an entry that takes too long
CPU_MEMORY_BYTES = 2**30  # stands for a card's memory in a dry run

# Part -> its function, and its weight in dividing the budget.
PARTS: dict[str, tuple[Callable[[Session], None], float]] = {
    "kernels": (kernels.kernels, 5),
    "w1": (serving.w1, 10),
    "w2": (serving.w2, 2),
    "w3": (serving.w3, 6),
    "ablation": (serving.ablation, 6),
}
CEILINGS = "ceilings"

DESCRIPTION = """Measure this machine's GPU: its ceilings, the attention kernels, three workloads through the engine
beside transformers and other peers, and the gain from each part of the engine. Everything beyond a part's share of the
budget is cut short or skipped, and the record says so. --resume continues a killed or cut run."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    if arguments.show:
        print(report.table(recorded.read(arguments.show)))
        return 0
    scale = DRY if arguments.dry_run else FULL
    check(arguments, scale)
    if scale.is_full and not arguments.unsupervised:
        return supervised(argv, arguments)
    return measure_here(arguments, scale)


def supervised(argv: list[str], arguments: argparse.Namespace) -> int:
    """Measure in other processes; their record is printed even if they crashed."""
    with tempfile.TemporaryDirectory() as made:
        file = arguments.json or Path(made) / "gpu.json"
        code = supervise(argv, file, arguments.budget, arguments.resume)
        if code == 1 and file.exists():
            print(report.table(recorded.read(file)))
        return code


def measure_here(arguments: argparse.Namespace, scale: Scale) -> int:
    """Measure in this process. The exit code DEVICE_LOST means that a new process should continue."""
    session = begin(arguments, scale)
    gc.freeze()  # modules stay: the collection after each entry can skip them
    try:
        measure(session, arguments)
    except DeviceLost as error:
        print(f"the device was lost: {error}", file=sys.stderr)
        return DEVICE_LOST
    finally:
        gc.unfreeze()
    print(report.table(session.record))
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="minillm bench gpu",
        description=DESCRIPTION,
        epilog="Peers:\n" + peers.__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here, after every measurement")
    parser.add_argument("--only", metavar="PART,PART", help=f"of {', '.join([CEILINGS, *PARTS])}; ceilings always run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a workload, as far as time allows")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="for everything")
    parser.add_argument("--peer", action="append", default=[], metavar="MODULE:FACTORY", help="see below; repeatable")
    parser.add_argument("--resume", action="store_true", help="continue FILE: measure what it does not have yet")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; the figures mean nothing")
    parser.add_argument("--unsupervised", action="store_true", help="in this process, which a CUDA error may end")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a record and measure nothing")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace, scale: Scale) -> None:
    """Raises ConfigError for options that make no sense, before anything is measured."""
    check_options(arguments, at_least_one=("repeats",), files=("json",))
    check_number("--budget", arguments.budget, "a number of seconds, at least 1", lambda seconds: seconds >= 1)
    wanted_parts(arguments)
    for path in arguments.peer:
        peers.find_factory(path)
    if arguments.resume and not (arguments.json and arguments.json.exists()):
        raise ConfigError("--resume continues the file of --json; give one that exists")
    if not scale.is_full and arguments.json and arguments.json.resolve().parent == recorded.FOLDER:
        raise ConfigError(f"--json {arguments.json}: a dry run is not recorded; write it elsewhere")
    if scale.is_full and not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device here; run on a machine with one, or use --dry-run")


def wanted_parts(arguments: argparse.Namespace) -> list[str]:
    """Names of the parts to run beside the ceilings, in their order. Raises ConfigError for one that does not exist."""
    if arguments.only is None:
        return list(PARTS)
    named = arguments.only.split(",")
    for name in named:
        if name not in (CEILINGS, *PARTS):
            raise ConfigError(f"--only {name!r} is not one of {', '.join([CEILINGS, *PARTS])}")
    return [name for name in PARTS if name in named]


def begin(arguments: argparse.Namespace, scale: Scale) -> Session:
    """A session with an empty record, or the one to continue. Raises ConfigError if that is of a different kind."""
    transformers.utils.logging.disable_progress_bar()
    options = {name: getattr(arguments, name) for name in ("repeats", "budget", "only", "peer")}
    record = new_record(scale, options)
    if arguments.resume:
        earlier = recorded.read(arguments.json)
        for name in ("schema", "kind", "machine", "versions"):
            if earlier.get(name) != record[name]:
                raise ConfigError(
                    f"--resume: {name} of {arguments.json} is {earlier.get(name)}, here it is {record[name]}; "
                    "write another file"
                )
        record = earlier
    return Session(scale, arguments.repeats, record, arguments.json, arguments.peer)


def measure(session: Session, arguments: argparse.Namespace) -> None:
    """Run all selected parts, each within its share of the remaining budget. Raises DeviceLost."""
    session.deadline = time.perf_counter() + arguments.budget
    if session.record["kind"] != KIND:
        session.log(f"{session.record['kind']}: tiny sizes on the CPU, to see that every line runs")
    ceilings(session)
    names = wanted_parts(arguments)
    for number, name in enumerate(names):
        work, weight = PARTS[name]
        session.log(f"{name}:")
        with session.share_of_time(weight / sum(PARTS[other][1] for other in names[number:])):
            run_part(session, name, work)


def ceilings(session: Session) -> None:
    """Measure the ceilings. Raises ConfigError if that fails, because all shares are relative to them."""
    session.log(f"{CEILINGS}:")
    part, scale = session.part(CEILINGS), session.scale
    copy = session.entry(part, "copy", lambda: copy_ceiling(scale))
    gemm = session.entry(part, "gemm", lambda: gemm_ceiling(scale))
    for name, entry in (("copy", copy), ("gemm", gemm)):
        if "seconds" not in entry:
            raise ConfigError(f"the {name} ceiling could not be measured: {entry}")
    machine = session.record["machine"]
    memory_bytes = machine.get("memory_bytes", CPU_MEMORY_BYTES)
    session.card = measured_card(machine["gpu"] or "CPU", copy, gemm, memory_bytes)


def run_part(session: Session, name: str, work: Callable[[Session], None]) -> None:
    """Run one part; a failure outside its entries is recorded, and the other parts still run. Raises DeviceLost."""
    try:
        work(session)
    except DeviceLost:
        raise
    except Exception as error:
        session.part(name).update(described_error(error))
        session.log(f"  {name}: {session.part(name)['error']}")
        session.free_memory()
    session.save()
