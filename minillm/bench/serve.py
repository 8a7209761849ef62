"""The server beside its engine: the same jobs through HTTP and through `LLM`, in turns on this machine.

    minillm bench serve --json serve.json

The server is a separate process on a free port. This process is its client and, in its turns, runs the bare engine. For
throughput, a closed loop of 64 streams is compared with `LLM.generate`; for the time to the first token, an idle server
with an idle engine. Then requests arrive at random. Times are the client's. Under load a server may send several tokens
in one event: ITL is the time between events.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from minillm.bench.contenders import Job, make_jobs, our_arguments
from minillm.bench.measuring import seconds_of_processes, surroundings
from minillm.engine import LLM
from minillm.errors import ConfigError, check_number, check_options
from minillm.runtime import descendants
from minillm.sampling import SamplingParams
from minillm.serving import ServerProcess
from minillm.simulation import SLO, Spread, poisson, spread

SCHEMA = 1
ANSWER_SECONDS = 300.0  # the longest run
IDLE_TOKENS = 8  # of a request to an idle server
REST_SECONDS = 0.05  # before it, for server and engine alike: right after a run, data is still in the caches
DATA, DONE = b"data: ", b"data: [DONE]"


@dataclass
class Answer:
    """What a client saw of one request; times in seconds."""

    sent: float
    status: int = 0
    events: list[float] = field(default_factory=list)  # times of events, without [DONE]
    is_whole: bool = False  # it ended with [DONE]

    @property
    def ttft(self) -> float:
        """Seconds to the first event."""
        return self.events[0] - self.sent

    @property
    def e2e(self) -> float:
        """Seconds to the last event."""
        return self.events[-1] - self.sent

    def gaps(self) -> list[float]:
        """Seconds between events."""
        return [later - earlier for earlier, later in zip(self.events, self.events[1:], strict=False)]

    def met(self, slo: SLO, num_tokens: int) -> bool:
        """Whether it was served within the SLO."""
        return self.is_whole and slo.met_by(self.ttft, (self.e2e - self.ttft) / max(1, num_tokens - 1), self.e2e)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)
    slo = SLO(arguments.ttft, arguments.itl)
    jobs = make_jobs(arguments.requests, vocab_size=1_000)
    settings = our_arguments(jobs, arguments.streams, max(512, arguments.streams))
    llm = LLM(arguments.model, verbose=False, **settings)
    try:
        with server(arguments.model, settings, arguments.server_options) as (where, pid):
            result = measure(llm, where, pid, jobs, arguments, slo)
    finally:
        llm.shutdown()
    print(table(result))
    if arguments.json is not None:
        record = {"schema": SCHEMA, "kind": "serve"} | surroundings() | {"parts": {arguments.model: result}}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="minillm bench serve", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="storyteller")
    parser.add_argument("--requests", type=int, default=256, help="of each run")
    parser.add_argument("--streams", type=int, default=64, help="of the closed loop, and the engine's max_num_seqs")
    parser.add_argument("--repeats", type=int, default=5, help="turns; the median counts")
    parser.add_argument("--load", type=float, default=0.6, help="arrivals, as a share of the closed loop's requests/s")
    parser.add_argument("--ttft", type=float, default=0.2, help="a request is served well within so many seconds, ...")
    parser.add_argument("--itl", type=float, default=0.05, help="... and with so many from token to token on average")
    parser.add_argument("--server-options", nargs=argparse.REMAINDER, default=[], help="the rest goes to minillm serve")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    check_options(arguments, at_least_one=("requests", "streams", "repeats"), files=("json",))
    check_number("--load", arguments.load, "a share of the closed loop's pace, above 0", lambda load: 0 < load <= 100)
    return arguments


def measure(llm: LLM, where: tuple, pid: int, jobs: Sequence[Job], arguments: argparse.Namespace, slo: SLO) -> dict:
    """Measure all runs: server and engine in turns, then random arrivals."""
    num_tokens, turns, pids = sum(job.num_outputs for job in jobs), [], [pid, *descendants(pid)]
    engine_run(llm, jobs)  # both compute something before anything is measured
    run(where, jobs, [0.0] * len(jobs), arguments.streams)
    for _ in range(arguments.repeats):
        engine = engine_run(llm, jobs)
        before, began, client = seconds_of_processes(pids)["cpu"], time.perf_counter(), time.process_time()
        answers = run(where, jobs, [0.0] * len(jobs), arguments.streams)
        seconds, cpu = time.perf_counter() - began, seconds_of_processes(pids)["cpu"] - before
        client = time.process_time() - client
        check_whole(answers)
        idle = {"engine": engine_ttft(llm, jobs[0]), "server": server_ttft(where, jobs[0])}
        turns.append(
            {"engine": engine, "server": {"seconds": seconds, "cpu": cpu, "client": client}, "idle_ttft": idle}
        )
    rate = len(jobs) / statistics.median(turn["server"]["seconds"] for turn in turns) * arguments.load
    arrivals = poisson(rate, random.Random(0))
    random_run = run(where, jobs, [next(arrivals) for _ in jobs])
    return {
        "requests": len(jobs),
        "tokens": num_tokens,
        "streams": arguments.streams,
        "turns": turns,
        "throughput_ratio": statistics.median(turn["engine"]["seconds"] / turn["server"]["seconds"] for turn in turns),
        "cpu_ratio": statistics.median(turn["server"]["cpu"] / turn["engine"]["cpu"] for turn in turns),
        "ttft_ratio": statistics.median(turn["idle_ttft"]["server"] / turn["idle_ttft"]["engine"] for turn in turns),
        "closed_loop": figures(answers, jobs, slo),
        "poisson": {"rate": rate} | figures(random_run, jobs, slo),
        "slo": {"ttft": slo.ttft, "itl": slo.itl},
    }


def check_whole(answers: Sequence[Answer]) -> None:
    """Raises ConfigError if a request was not served: then a comparison is meaningless."""
    wrong = Counter(answer.status for answer in answers if not answer.is_whole)
    if wrong:
        raise ConfigError(f"{wrong.total()} of {len(answers)} requests were not served: HTTP {dict(wrong)}")


def figures(answers: Sequence[Answer], jobs: Sequence[Job], slo: SLO) -> dict:
    """TTFT, time between events, E2E, and the share served within the SLO."""
    served = [answer for answer in answers if answer.is_whole]
    well = sum(answer.met(slo, job.num_outputs) for answer, job in zip(answers, jobs, strict=True))
    return {
        "served": len(served),
        "goodput": well / len(answers),
        "ttft": asdict(spread(Counter(answer.ttft for answer in served))),
        "itl": asdict(spread(Counter(gap for answer in served for gap in answer.gaps()))),
        "e2e": asdict(spread(Counter(answer.e2e for answer in served))),
        "tokens_per_event": sum(job.num_outputs for job in jobs) / max(1, sum(len(each.events) for each in served)),
    }


# --- the engine ------------------------------------------------------------------------------------------------------


def parameters(job: Job, **changes) -> SamplingParams:
    return SamplingParams(**{"max_tokens": job.num_outputs, "ignore_eos": True} | changes)


def engine_run(llm: LLM, jobs: Sequence[Job]) -> dict[str, float]:
    """`LLM.generate` on all jobs: wall seconds and CPU seconds."""
    began, cpu = time.perf_counter(), time.process_time()
    llm.generate([job.prompt for job in jobs], [parameters(job) for job in jobs], use_tqdm=False)
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}


def engine_ttft(llm: LLM, job: Job) -> float:
    """Median seconds to the first token of a single request."""
    times = []
    for _ in range(10):
        time.sleep(REST_SECONDS)
        began = time.perf_counter()
        stream = llm.stream(job.prompt, parameters(job, max_tokens=IDLE_TOKENS))
        next(stream)
        times.append(time.perf_counter() - began)
        for _ in stream:
            pass
    return statistics.median(times)


# --- the server and its client ---------------------------------------------------------------------------------------


@contextmanager
def server(model: str, settings: dict, options: Sequence[str] = ()) -> Iterator[tuple[tuple[str, int], int]]:
    """`minillm serve` in a separate process: (host, port), process id. Raises ConfigError if it does not start."""
    given = [each for name, value in settings.items() for each in as_option(name, value)]
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with ServerProcess(model, ["--no-page", *given, *options], environment=environment) as child:
        yield (child.host, child.port), child.pid


def as_option(name: str, value: object) -> list[str]:
    """An engine argument as a command-line option."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", str(value)]


def server_ttft(where: tuple[str, int], job: Job) -> float:
    """Median seconds to the first event of a single request."""
    single = job._replace(num_outputs=IDLE_TOKENS)
    return statistics.median(run(where, [single], [REST_SECONDS])[0].ttft for _ in range(10))


def run(
    where: tuple[str, int], jobs: Sequence[Job], arrivals: Sequence[float], most_at_once: int | None = None
) -> list[Answer]:
    """Send each job at its time, with at most `most_at_once` in flight; returns their answers in order."""
    requests = [request(job) for job in jobs]  # made before the clock starts

    async def main() -> list[Answer]:
        places, began = asyncio.Semaphore(most_at_once or len(jobs)), time.perf_counter()

        async def one(text: bytes, arrival: float) -> Answer:
            await asyncio.sleep(max(0.0, began + arrival - time.perf_counter()))
            async with places:
                return await ask(where, text)

        return await asyncio.gather(*map(one, requests, arrivals))

    return asyncio.run(asyncio.wait_for(main(), ANSWER_SECONDS))


def request(job: Job) -> bytes:
    """The bytes of a streaming request."""
    fields = {"prompt": job.prompt, "max_tokens": job.num_outputs, "temperature": 0}
    body = json.dumps(fields | {"ignore_eos": True, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(where: tuple[str, int], text: bytes) -> Answer:
    """Send a request and record the times of its events."""
    loop = asyncio.get_running_loop()
    _, stream = await loop.create_connection(lambda: Stream(text), *where)
    return await stream.ended


class Stream(asyncio.Protocol):
    """A minimal reader of event times, because 64 streams share two cores with their server.

    An event's `data: ` may be split over two pieces: the incomplete line of a piece is kept for the next.
    """

    def __init__(self, text: bytes):
        self._text, self._left = text, b""
        self.ended: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._answer = Answer(time.perf_counter())
        transport.write(self._text)

    def data_received(self, data: bytes) -> None:
        now, data = time.perf_counter(), self._left + data
        answer = self._answer
        if not answer.status and len(data) >= 12:
            answer.status = int(data[9:12])
        complete, _, self._left = data.rpartition(b"\n")
        answer.is_whole |= DONE in complete
        answer.events += [now] * (complete.count(DATA) - complete.count(DONE))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(self._answer)


# --- the report ------------------------------------------------------------------------------------------------------


def table(result: dict) -> str:
    """The results as text."""
    slo = result["slo"]
    lines = [
        f"{result['requests']} requests, {result['tokens']:,} tokens, {result['streams']} streams, "
        f"{len(result['turns'])} turns",
    ]
    for name in ("engine", "server"):
        seconds = statistics.median(turn[name]["seconds"] for turn in result["turns"])
        ttft = statistics.median(turn["idle_ttft"][name] for turn in result["turns"])
        cpu = statistics.median(turn[name]["cpu"] for turn in result["turns"])
        lines.append(
            f"{name:8} {result['tokens'] / seconds:10,.0f} tokens/s, {cpu / result['tokens'] * 1e6:7.1f} µs of CPU per "
            f"token; idle: TTFT {ttft * 1e3:.2f} ms"
        )
    client = statistics.median(turn["server"]["client"] for turn in result["turns"])
    lines.append(f"client   {client / result['tokens'] * 1e6:.1f} µs of CPU per token")
    lines.append(
        f"ratio    {result['throughput_ratio']:10.1%} of the engine's throughput, {result['cpu_ratio']:.2f} times its "
        f"processor time; idle: {result['ttft_ratio']:.2f} times its TTFT"
    )
    for name, title in (
        ("closed_loop", "closed loop"),
        ("poisson", f"Poisson, {result['poisson']['rate']:.1f} requests/s"),
    ):
        found = result[name]
        lines.append(
            f"{title}: {found['served']} served, {found['goodput']:.1%} with TTFT within {slo['ttft'] * 1e3:g} ms and "
            f"{slo['itl'] * 1e3:g} ms per token; {found['tokens_per_event']:.2f} tokens per event"
        )
        lines += [f"  {time:5} {spread_text(Spread(**found[time]))}" for time in ("ttft", "itl", "e2e")]
    return "\n".join(lines)


def spread_text(found: Spread) -> str:
    """Percentiles in ms."""
    values = ((name, getattr(found, name)) for name in ("p50", "p90", "p99", "max"))
    return "  ".join(f"{name} {'-' if value is None else f'{value * 1e3:8.1f} ms'}" for name, value in values)
