"""Routers beside each other: the same requests to `minillm serve --replicas`, in turns on this machine.

    minillm bench replicas --replicas 2 4 --json replicas.json

Each request is a question behind one of some system prompts; both are random tokens. They arrive at random. Every run
has a server of its own, so that all begin with empty caches. A turn has one run for each router, and all three get the
same requests at the same times. Hits are the servers' counts, TTFT is the client's.
"""

import argparse
import json
import random
import re
import statistics
import urllib.request
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from minillm.bench.contenders import Job
from minillm.bench.measuring import surroundings
from minillm.bench.serve import as_option, check_whole, run
from minillm.engine import ROUTERS
from minillm.errors import check_number, check_options
from minillm.serving import ServerProcess
from minillm.simulation import poisson, spread

SCHEMA = 1
TOKENS = range(300, 1_800)  # of which prompts are drawn
OUTPUTS = 8  # tokens of each answer
WARM_UP = 4  # requests for each replica, before anything is measured
COUNTER = r"^minillm:prefix_cache_{}_total\{{.*\}} (\S+)$"  # one line for each replica


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)
    print(
        f"{arguments.system_prompts} system prompts of {arguments.prefix} tokens, {arguments.each} questions of "
        f"{arguments.question} each, {arguments.rate:g} requests/s, {arguments.num_blocks} blocks for each replica"
    )
    parts = {}
    for number in arguments.replicas:
        turns = [
            {router: served(router, number, turn, arguments) for router in ROUTERS} for turn in range(arguments.turns)
        ]
        parts[str(number)] = {"turns": turns}
        print(table(number, turns))
    if arguments.json is not None:
        options = {name: value for name, value in vars(arguments).items() if name not in ("json", "replicas")}
        record = {"schema": SCHEMA, "kind": "replicas"} | surroundings() | {"options": options, "parts": parts}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="minillm bench replicas", description=__doc__.split("\n\n")[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[2], metavar="N", help="how many; several are tried")
    parser.add_argument("--system-prompts", type=int, default=8, metavar="K")
    parser.add_argument("--each", type=int, default=40, metavar="N", help="questions for each system prompt")
    parser.add_argument("--prefix", type=int, default=256, metavar="TOKENS", help="length of a system prompt")
    parser.add_argument("--question", type=int, default=32, metavar="TOKENS", help="length of a question")
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second")
    parser.add_argument("--num-blocks", type=int, default=120, help="of each replica, with 16 tokens each")
    parser.add_argument("--cpus-per-replica", type=float, default=0.25, help="that Ray keeps free for each")
    parser.add_argument("--turns", type=int, default=5, help="the median counts")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    counts = ("system_prompts", "each", "prefix", "question", "num_blocks", "turns")
    check_options(arguments, at_least_one=counts, files=("json",))
    for number in arguments.replicas:
        check_number("--replicas", number, "1 to 64", lambda number: 1 <= number <= 64)
    check_number("--rate", arguments.rate, "requests per second, above 0", lambda rate: 0 < rate <= 1e6)
    return arguments


def make_jobs(turn: int, arguments: argparse.Namespace) -> list[Job]:
    """The requests of a turn: each system prompt as often as the others, in a random order."""
    rng = random.Random(turn)
    systems = [rng.choices(TOKENS, k=arguments.prefix) for _ in range(arguments.system_prompts)]
    asked = [system for system in systems for _ in range(arguments.each)]
    rng.shuffle(asked)
    return [Job(system + rng.choices(TOKENS, k=arguments.question), OUTPUTS) for system in asked]


def served(router: str, replicas: int, turn: int, arguments: argparse.Namespace) -> dict:
    """Serve the requests of a turn: share of prompt tokens found in a cache, and the spread of TTFT in seconds.

    Raises ConfigError if the server does not start, or a request is not served.
    """
    jobs, arrivals = make_jobs(turn, arguments), poisson(arguments.rate, random.Random(turn))
    options = {
        "replicas": replicas,
        "router": router,
        "cpus_per_replica": arguments.cpus_per_replica,
        "num_blocks": arguments.num_blocks,
        "max_model_len": len(jobs[0].prompt) + OUTPUTS,
        "max_num_seqs": 8,
    }
    given = [each for name, value in options.items() for each in as_option(name, value)]
    with ServerProcess(options=["--no-page", *given], environment={"OMP_NUM_THREADS": "1"}) as server:
        where = (server.host, server.port)
        warm_up = [Job([token] * arguments.question, OUTPUTS) for token in TOKENS[: WARM_UP * replicas]]
        check_whole(run(where, warm_up, [0.0] * len(warm_up)))
        before = counts(server.address)
        answers = run(where, jobs, [next(arrivals) for _ in jobs])
        check_whole(answers)
        found = counts(server.address) - before
    return {
        "hits": found["hits"] / found["queries"],
        "ttft": asdict(spread(Counter(answer.ttft for answer in answers))),
    }


def counts(address: str) -> Counter[str]:
    """Prompt tokens asked for in the caches of all replicas, and found there."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return Counter(
        {name: sum(map(float, re.findall(COUNTER.format(name), text, re.MULTILINE))) for name in ("queries", "hits")}
    )


def table(replicas: int, turns: list[dict]) -> str:
    """Medians of the turns as text."""
    lines = [f"{replicas} replicas{'prefix hits':>18}{'TTFT p50':>12}{'p99':>12}   median of {len(turns)} turns"]
    for router in ROUTERS:
        found = summary(turns, router)
        lines.append(f"{router:14}{found['hits']:>14.1%}{found['p50']:>9.1f} ms{found['p99']:>9.1f} ms")
    return "\n".join(lines)


def summary(turns: list[dict], router: str) -> dict[str, float]:
    """Medians of a router's turns: share of hits; p50 and p99 of TTFT in ms."""
    times = [turn[router]["ttft"] for turn in turns]
    return {"hits": statistics.median(turn[router]["hits"] for turn in turns)} | {
        name: 1e3 * statistics.median(each[name] for each in times) for name in ("p50", "p99")
    }
