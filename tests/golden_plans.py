"""Recorded plans of the schedulers: 20 workloads without a model, so that a rewrite can show that it decides the same.

`plans_of(workload)` runs a workload and returns what was decided in it as plain data; golden_plans.json holds what was
decided when it was recorded. To record anew, on purpose: python -m tests.golden_plans --write
"""

import json
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from minillm.engine.block_manager import BlockManager
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler, SchedulerConfig
from minillm.runtime.plan import ModelOutput
from minillm.sampling.params import SamplingParams

RECORDING = Path(__file__).with_name("golden_plans.json")
EOS = 0
MOST_ROUNDS = 500


class Ask(NamedTuple):
    """A request, and the round in which it arrives."""

    at: int
    request_id: str
    prompt: Sequence[int]
    params: SamplingParams
    named: dict  # further arguments of Request


class End(NamedTuple):
    """A request is ended from outside in this round: before the next step is planned, or while one is in flight."""

    at: int
    request_id: str
    in_flight: bool = False
    reason: str = "abort"


@dataclass(frozen=True)
class Workload:
    """What happens in a run: all that decides about its plans."""

    name: str
    asks: Sequence[Ask]
    depth: int = 1  # unread steps at most; 0: the plain scheduler, without blocks
    limits: dict = field(default_factory=dict)  # of SchedulerConfig
    num_blocks: int = 200
    num_host_blocks: int = 0
    preemption_mode: str = "recompute"
    enable_prefix_caching: bool = True
    watermark: float = 0.01
    ends: Sequence[End] = ()
    failing: Sequence[tuple[str, int]] = ()  # request, and the place in its output that gets no token
    raises_at_launch: Sequence[int] = ()  # steps
    raises_at_read: Sequence[int] = ()


class Clock:
    """Counts steps: a look at it adds nothing."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# --- what a rewrite of the schedulers may have to change -------------------------------------------------------------


def make_scheduler(workload: Workload, clock: Clock):
    """The scheduler of a workload."""
    limits = {"max_num_seqs": 6, "max_num_batched_tokens": 16, "max_model_len": 120, **workload.limits}
    config = SchedulerConfig(**limits)
    if workload.depth == 0:
        return Scheduler(config, clock)
    blocks = BlockManager(
        workload.num_blocks,
        4,
        num_host_blocks=workload.num_host_blocks,
        enable_prefix_caching=workload.enable_prefix_caching,
    )
    return Scheduler(
        config,
        clock,
        block_manager=blocks,
        depth=workload.depth,
        preemption_mode=workload.preemption_mode,
        watermark=workload.watermark,
    )


def num_new_tokens(part) -> int:
    """Tokens of a request that a plan has computed."""
    return part.num_tokens


# --- the run ---------------------------------------------------------------------------------------------------------


def plans_of(workload: Workload) -> list:
    """Run a workload; returns its log, plain data: plans, results, ends from outside, and how it all ended."""
    return Run(workload).log


class Run:
    """The loop of an engine around a scheduler, with an executor that computes nothing."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.clock = Clock()
        self.scheduler = make_scheduler(workload, self.clock)
        self.requests: list[Request] = []
        self.launched: deque = deque()
        self.log: list = []
        for number in range(MOST_ROUNDS):
            self.round(number)
            if not self.scheduler.has_unfinished_requests() and number >= self.last_arrival:
                break
        else:
            raise AssertionError(f"{workload.name}: not done after {MOST_ROUNDS} rounds")
        while self.launched:
            self.read()
        self.log.append(self.outcome())

    @property
    def last_arrival(self) -> int:
        return max(ask.at for ask in self.workload.asks)

    def round(self, number: int) -> None:
        """As `LLMEngine.step`: launch what may be launched, read the oldest step."""
        for ask in self.workload.asks:
            if ask.at == number:
                self.add(ask)
        self.end(number, in_flight=False)
        while len(self.launched) < max(1, self.workload.depth) and self.launch():
            pass
        self.end(number, in_flight=True)
        if self.launched:
            self.read()
        self.clock.now += 1.0

    def add(self, ask: Ask) -> None:
        named = {"eos_token_ids": (EOS,), "arrival_time": self.clock.now, **ask.named}
        request = Request(ask.request_id, ask.prompt, ask.params, **named)
        self.scheduler.add_request(request)
        self.requests += [request, *request.children]
        self.log.append(["add", [each.request_id for each in (request, *request.children)]])

    def end(self, number: int, in_flight: bool) -> None:
        for end in self.workload.ends:
            if end.at == number and end.in_flight == in_flight:
                ended = self.scheduler.end_request(end.request_id, end.reason)
                self.log.append(["end", end.request_id, end.reason, ended])

    def launch(self) -> bool:
        if not self.scheduler.has_unfinished_requests():
            return False
        plan = self.scheduler.schedule()
        if not plan.scheduled:
            assert self.launched, "nothing is planned, and nothing is in flight that could change it"
            return False
        self.log.append(plain(plan))
        if plan.step in self.workload.raises_at_launch:
            self.retract(plan)
            return False
        self.launched.append((plan, self.compute(plan)))
        return True

    def compute(self, plan) -> ModelOutput:
        """What a request says depends on its id and the place in its output only, not on the plan."""
        token_ids, failed = {}, {}
        for part in plan.scheduled:
            if part.samples:
                request_id = part.request_id
                place = part.start + num_new_tokens(part) - self.request(request_id).num_prompt_tokens
                if (request_id, place) in self.workload.failing:
                    failed[request_id] = "no token"
                else:
                    token_ids[request_id] = token_at(request_id, place)
        return ModelOutput(token_ids, 0, failed=failed)

    def request(self, request_id: str) -> Request:
        return next(request for request in reversed(self.requests) if request.request_id == request_id)

    def read(self) -> None:
        plan, output = self.launched[0]
        if plan.step in self.workload.raises_at_read:
            self.retract(plan)
            return
        updates = self.scheduler.update(plan, output)
        self.launched.popleft()
        self.log.append(["read", plan.step, [list(update) for update in updates]])

    def retract(self, plan) -> None:
        self.launched.clear()
        self.scheduler.retract(plan)
        self.log.append(["retract", plan.step])

    def outcome(self) -> list:
        use = None if self.workload.depth == 0 else self.scheduler.block_manager.usage
        blocks = [] if use is None else [use.used, use.cached, use.free]
        return ["outcome", blocks, [told(request) for request in self.requests]]


def plain(plan) -> list:
    """A plan as plain data, without the ids of its tokens."""
    return [
        "plan",
        plan.step,
        [plain_part(part) for part in plan.scheduled],
        [new.request_id for new in plan.new_requests],
        list(plan.finished_ids),
        list(plan.preempted_ids),
        [[move.kind, list(move.sources), list(move.targets)] for move in plan.block_moves],
        plan.num_tokens,
    ]


def plain_part(part) -> list:
    blocks = [part.first_block, list(part.block_ids), part.num_recomputed]
    return [part.request_id, part.start, num_new_tokens(part), int(part.samples), part.why, *blocks]


def told(request: Request) -> list:
    counts = [request.num_preemptions, request.num_cached_tokens]
    return [request.request_id, list(request.output_token_ids), request.finish_reason, *counts]


# --- the workloads ---------------------------------------------------------------------------------------------------


def draw(*key: object) -> int:
    """A number that looks random and is the same everywhere."""
    return crc32(repr(key).encode()) >> 4


def token_at(request_id: str, place: int) -> int:
    """The token a request samples at this place of its output: an eos in one of 12."""
    number = draw("token", request_id, place)
    return EOS if number % 12 == 0 else 1 + number % 50


def ask(at: int, request_id: str, num_prompt: int, max_tokens: int, shared: int = 0, family: int = 0, **named) -> Ask:
    """A request whose first `shared` prompt tokens are those of its family; `named` of SamplingParams or Request."""
    prompt = [100 * (family + 1) + i for i in range(shared)]
    prompt += [1 + draw("prompt", request_id, i) % 90 for i in range(num_prompt - shared)]
    of_request = {key: named.pop(key) for key in ("priority", "predicted_output_tokens", "cache_salt") if key in named}
    return Ask(at, request_id, prompt, SamplingParams(max_tokens=max_tokens, temperature=1.0, **named), of_request)


def crowd(seed: str, count: int, within: int = 1, longest: int = 20, most: int = 12, **named) -> list[Ask]:
    """So many requests of drawn lengths that arrive within so many rounds; a list in `named` goes round."""
    asks = []
    for i in range(count):
        chosen = {key: value[i % len(value)] if isinstance(value, list) else value for key, value in named.items()}
        num_prompt = max(3 + draw(seed, i, "prompt") % (longest - 2), chosen.get("shared", 0) + 1)
        max_tokens = 3 + draw(seed, i, "output") % (most - 2)
        asks.append(ask(draw(seed, i, "at") % within, f"{seed}{i}", num_prompt, max_tokens, **chosen))
    return asks


def ends_of(seed: str, asks: Sequence[Ask], rounds: int, children: Sequence[str] = ()) -> list[End]:
    """Each of these requests is aborted at a drawn moment after its arrival."""
    ids = [(each.at, each.request_id) for each in asks] + [(2, child) for child in children]
    return [
        End(at + draw(seed, request_id) % rounds, request_id, draw(seed, request_id, "in flight") % 2 == 0)
        for at, request_id in ids
    ]


LONG = {"longest": 13, "most": 32}
IGNORING = {"ignore_eos": [True, False, True, True]}
PRIORITIES = {"priority": [3, 0, 5, -2, 0]}
PREDICTED = {"predicted_output_tokens": [9, 2, None, 14, 5]}
PREFIXES = {"shared": [13, 9, 12, 0], "family": [0, 0, 1], "cache_salt": ["", "", "", "", "mine"]}


def _workloads() -> list[Workload]:
    plain = crowd("a", 9, 12, **IGNORING)
    whole = crowd("b", 9, 10, **PREDICTED)
    whole += [ask(0, f"b{9 + i}", num_prompt, 4, predicted_output_tokens=1) for i, num_prompt in enumerate((40, 24))]
    aborted, raced = crowd("o", 12, 8, **LONG, **IGNORING), crowd("p", 12, 8, n=[1, 2, 1, 3], **LONG, ignore_eos=True)
    forked = crowd("j", 5, 4, n=[3, 1, 4], **IGNORING)
    tight = {"num_blocks": 14}
    swap = {"preemption_mode": "swap", "num_host_blocks": 40}
    unchunked = {"enable_chunked_prefill": False, "max_num_batched_tokens": 64, "max_model_len": 64}
    eos = crowd("q", 10, 6, most=16)
    failing = crowd("r", 8, 8, n=[1, 3], shared=[9, 0], **IGNORING)
    return [
        Workload(
            "plain fcfs",
            plain,
            0,
            {"max_num_seqs": 3, "max_num_batched_tokens": 8},
            ends=ends_of("plain", plain[::3], 9),
        ),
        Workload(
            "plain sjf whole prompts",
            whole,
            0,
            {**unchunked, "scheduling_policy": "sjf", "ageing": 0.5},
            ends=ends_of("whole", whole[::4], 6),
            failing=[("b1", 2), ("b6", 0)],
        ),
        Workload("roomy fcfs ahead", crowd("d", 9, 14, **IGNORING), 2),
        Workload("tight recompute", crowd("e", 8, 6, **LONG, **IGNORING), **tight),
        Workload("tight swap", crowd("f", 8, 6, **LONG, **IGNORING), **tight, **swap),
        Workload(
            "priority recompute",
            crowd("g", 9, 16, **LONG, **PRIORITIES),
            limits={"scheduling_policy": "priority", "ageing": 0.1},
            **tight,
        ),
        Workload(
            "priority swap ahead",
            crowd("h", 9, 16, **LONG, **PRIORITIES, **IGNORING),
            2,
            {"scheduling_policy": "priority"},
            **tight,
            **swap,
        ),
        Workload(
            "sjf without prefixes",
            crowd("i", 9, 10, **LONG, **PREDICTED, **IGNORING),
            limits={"scheduling_policy": "sjf", "ageing": 0.3},
            enable_prefix_caching=False,
            watermark=0.2,
            **tight,
        ),
        Workload(
            "sjf swap with little host memory ahead",
            crowd("k", 9, 10, **LONG, **PREDICTED, **IGNORING),
            2,
            {"scheduling_policy": "sjf"},
            preemption_mode="swap",
            num_host_blocks=5,
            **tight,
        ),
        Workload("forks", forked, limits={"max_num_seqs": 8}, failing=[("j0", 0), ("j2.1", 1)]),
        Workload("forks tight ahead", crowd("l", 5, 4, n=[3, 1, 4], **LONG, ignore_eos=True), 2, **tight, **swap),
        Workload(
            "forks tight recompute",
            crowd("y", 5, 4, n=[2, 4, 3], **LONG, ignore_eos=True),
            limits={"max_num_seqs": 2},
            failing=[("y1", 0)],
            num_blocks=14,
        ),
        Workload("prefixes and salts", crowd("n", 12, 24, 24, **PREFIXES), num_blocks=40),
        Workload(
            "prefixes evicted whole prompts ahead",
            crowd("s", 12, 24, **LONG, **PREFIXES, prompt_logprobs=[None, None, 1]),
            2,
            unchunked,
            **tight,
        ),
        Workload(
            "aborts", aborted, ends=ends_of("abort", aborted[::2], 26), failing=[("o1", 3), ("o7", 0)], **tight, **swap
        ),
        Workload(
            "aborts of forks ahead",
            [*raced, ask(5, "p0", 7, 6), ask(17, "p4", 9, 6)],  # ids of aborted ones, the first with a step in flight
            2,
            {"max_num_seqs": 8},
            ends=[
                End(4, "p0", True),
                End(4, "p9.1"),
                End(13, "p5"),
                *ends_of("race", [raced[1], raced[2], *raced[4::2]], 12, ["p3.1", "p3.2", "p7.2", "p11.2"]),
            ],
            num_blocks=16,
        ),
        Workload(
            "eos and stops ahead",
            eos,
            2,
            ends=[End(5, "q2", True, "stop"), End(7, "q4", False, "stop"), End(9, "q0", True, "stop")],
        ),
        Workload("failures ahead", failing, 2, failing=[("r1", 0), ("r0", 2), ("r3.1", 1), ("r5", 3), ("r6", 0)]),
        Workload(
            "retracted steps ahead",
            crowd("t", 7, 8, **LONG, **IGNORING, n=[1, 2]),
            2,
            ends=[End(24, "t1.1", True)],
            raises_at_launch=[6, 25],
            raises_at_read=[11, 16, 23, 31, 51],
            **tight,
            **swap,
        ),
        Workload(
            "retracted steps",
            crowd("u", 7, 8, **LONG, **IGNORING, n=[1, 3]),
            raises_at_launch=[7, 20],
            raises_at_read=[12, 15],
            **tight,
        ),
    ]


WORKLOADS = {workload.name: workload for workload in _workloads()}


# --- the recording ---------------------------------------------------------------------------------------------------


def recorded() -> dict[str, list]:
    """The logs of all workloads as they were when they were recorded."""
    return json.loads(RECORDING.read_text(encoding="utf-8"))


def write() -> None:
    """Record all workloads, one line per entry of a log."""
    logs = []
    for name, workload in WORKLOADS.items():
        entries = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in plans_of(workload))
        logs.append(f"{json.dumps(name)}:[\n{entries}]")
    RECORDING.write_text("{\n" + ",\n".join(logs) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python -m tests.golden_plans --write records the plans of today's scheduler")
    write()
