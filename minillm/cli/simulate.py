"""The command `minillm simulate`: synthetic requests under a batching policy, on a card that need not exist here.

Slow imports happen only when they are needed, so that `minillm --help` stays fast.
"""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

from minillm.engine import ROUTERS, SCHEDULING_POLICIES
from minillm.errors import ConfigError, check_options, write_text
from minillm.simulation import BATCHING


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batching", default="continuous", choices=list(BATCHING))
    parser.add_argument("--policy", default="fcfs", choices=SCHEDULING_POLICIES, help="the order of waiting requests")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="requests that run at the same time")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512, help="token budget of a step")
    card = parser.add_argument_group("the simulated card")
    card.add_argument("--model", default="Llama-2-7B", help="a published shape, such as Qwen3-0.6B")
    card.add_argument("--card", default="h200", help="4090, a10g, a100-40gb, a100 or h200")
    card.add_argument("--launch-ms", type=float, help="milliseconds that launching the kernels of a step takes")
    load = parser.add_argument_group("requests")
    load.add_argument("--requests", type=int, default=1000, metavar="N")
    load.add_argument("--file", type=Path, help="JSON lines with num_prompt_tokens, num_output_tokens, arrival_time")
    load.add_argument("--arrivals", default="at once", choices=["at once", "poisson", "bursts"])
    load.add_argument("--rate", type=float, default=1.0, help="requests per second (poisson, bursts)")
    load.add_argument("--burst-size", type=int, default=16)
    lengths = "in tokens: 100 (fixed), 16-256 (uniform), 80~0.9 (lognormal: median and sigma, at most 2048)"
    load.add_argument("--prompt-length", default="16-256", help=lengths)
    load.add_argument("--output-length", default="1-128", help="likewise")
    load.add_argument("--system-prompts", type=int, metavar="K", help="each prompt begins with one of K system prompts")
    load.add_argument("--system-prompt-length", default="512", help="likewise, of those")
    load.add_argument("--seed", type=int, default=0)
    several = parser.add_argument_group("several replicas, each with a pool of blocks and a prefix cache")
    several.add_argument("--replicas", type=int, metavar="N", help="of the engine, each on a card of its own")
    several.add_argument(
        "--router", default="prefix-aware", choices=list(ROUTERS), help="how the replica of a request is chosen"
    )
    slo = parser.add_argument_group("limits of a well served request (goodput)")
    slo.add_argument("--slo-ttft-ms", type=float, help="time to first token")
    slo.add_argument("--slo-itl-ms", type=float, help="a request's mean time between tokens")
    slo.add_argument("--slo-e2e-ms", type=float, help="from arrival to result")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report and its settings")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write every step, for `minillm trace FILE`")


def run(arguments: argparse.Namespace) -> int:
    """Simulate, print the report, write it if asked. Raises ConfigError or PromptError for bad values."""
    from minillm.engine import SchedulerConfig
    from minillm.simulation import ReportBuilder, SimulatedExecutor, VirtualClock, preset
    from minillm.simulation import run as run_to_the_end
    from minillm.trace import save_trace

    at_least_one = ("max_num_seqs", "max_num_batched_tokens", "replicas", "system_prompts")
    check_options(arguments, at_least_one=at_least_one, files=("json", "trace"))
    launch_overhead = None if arguments.launch_ms is None else arguments.launch_ms / 1000
    cost_model = preset(arguments.model, arguments.card, launch_overhead)
    requests = requests_of(arguments)
    config = SchedulerConfig(
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        max_model_len=cost_model.config.max_position_embeddings,
        scheduling_policy=arguments.policy,
    )
    if arguments.replicas:
        return run_several(arguments, cost_model, config, requests)
    clock, figures = VirtualClock(), ReportBuilder(slo_of(arguments))
    scheduler = BATCHING[arguments.batching](config, clock, trace=arguments.trace is not None)
    began = time.perf_counter()
    run_to_the_end(scheduler, SimulatedExecutor(cost_model, clock), requests, clock, figures=figures)
    seconds = time.perf_counter() - began
    report = figures.report()
    print(report)
    print(f"simulated {report.makespan:.0f} s in {seconds:.1f} s")
    if arguments.json:
        write_json(arguments.json, arguments, report, seconds)
    if arguments.trace:
        save_trace(scheduler.trace, arguments.trace)
    return 0


def run_several(arguments: argparse.Namespace, cost_model, config, requests: Iterable) -> int:
    """The same with replicas behind a router. Raises ConfigError for options of a single engine."""
    from minillm.engine import make_router
    from minillm.simulation import Replica, run_replicas

    if arguments.batching != "continuous" or arguments.trace:
        raise ConfigError("--replicas goes with --batching continuous and without --trace")
    replicas = [Replica(cost_model, config) for _ in range(arguments.replicas)]
    blocks = replicas[0].scheduler.block_manager
    router = make_router(arguments.router, blocks.block_size, blocks.num_blocks)
    began = time.perf_counter()
    found = run_replicas(replicas, router, requests, slo_of(arguments))
    seconds = time.perf_counter() - began
    print(f"router        {arguments.router}\n{found}")
    print(f"simulated {found.report.makespan:.0f} s in {seconds:.1f} s")
    if arguments.json:
        write_json(arguments.json, arguments, found, seconds)
    return 0


def main(argv: list[str] | None = None) -> int:
    """`minillm simulate` as a program of its own."""
    parser = argparse.ArgumentParser(prog="minillm simulate", description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


def requests_of(arguments: argparse.Namespace) -> Iterable:
    """The requests of the file, or synthetic ones, made as they arrive."""
    from minillm.simulation import load_requests, prefixed_requests, stream_requests

    if arguments.file:
        return load_requests(arguments.file)
    lengths = length_draw(arguments.prompt_length), length_draw(arguments.output_length)
    arriving = {name: getattr(arguments, name) for name in ("arrivals", "rate", "burst_size", "seed")}
    if arguments.system_prompts:
        each = -(-arguments.requests // arguments.system_prompts)
        system = length_draw(arguments.system_prompt_length)
        return prefixed_requests(arguments.system_prompts, each, system, *lengths, **arriving)
    return stream_requests(arguments.requests, *lengths, **arriving)


def length_draw(text: str):
    """The distribution of lengths, from "100", "16-256" or "80~0.9". Raises ConfigError for anything else."""
    from minillm.simulation import workload

    try:
        if "~" in text:
            median, sigma = text.split("~")
            return workload.lognormal(float(median), float(sigma), longest=2048)
        if "-" in text:
            low, high = text.split("-")
            return workload.uniform(int(low), int(high))
        return workload.fixed(int(text))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"length {text!r} is none of 100 (fixed), 16-256 (uniform), 80~0.9 (lognormal)") from error


def slo_of(arguments: argparse.Namespace):
    """The given limits, in seconds; None for those that are not given."""
    from minillm.simulation import SLO

    limits = {name: getattr(arguments, f"slo_{name}_ms") for name in ("ttft", "itl", "e2e")}
    return SLO(**{name: limit / 1000 for name, limit in limits.items() if limit is not None})


def write_json(path: Path, arguments: argparse.Namespace, report, seconds: float) -> None:
    """Write the report and its settings."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    settings = {name: value for name, value in settings.items() if name not in ("command", "json", "trace")}
    content = {"settings": settings, "report": report.as_dict(), "seconds_to_simulate": round(seconds, 3)}
    write_text(path, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
