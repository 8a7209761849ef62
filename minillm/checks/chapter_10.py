"""Chapter 10, the layer above the engine: a stream of events is taken apart, a full queue refused."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from minillm.checks.base import Case, CheckFailed, call, describe, failure, is_number, run_check, same_value
from minillm.checks.chapter_09 import Name
from minillm.costs import A100_80GB, LLAMA_2_7B
from minillm.engine import Request, Scheduler, SchedulerConfig
from minillm.sampling import SamplingParams
from minillm.serving import retry_after
from minillm.simulation import Roofline, SimulatedExecutor, VirtualClock, run

# --- sse_events ------------------------------------------------------------------------------------------------------

MOST_EVENTS = 1_000


class Event(NamedTuple):
    """An event, and how many chunks had been read when it came."""

    data: str
    num_chunks: int


class Chunks(list):
    """What a connection brings, piece by piece; with `stays_open` it then neither brings more nor ends."""

    stays_open = False


def sse_events(function: Callable) -> None:
    """`sse_events(chunks)` -> the data of each event, as soon as it has come whole; [DONE] ends it, and is none.

    Lines end with \\n or \\r\\n, wherever chunks are cut. An event ends with an empty line; one that does not is none.
    """
    cases = [
        _stream([b"data: a\n\n"], [("a", 1)], "A line `data: …`, then an empty one: that is an event."),
        _stream([b"data: a\n\ndata: b\n\n"], [("a", 1), ("b", 1)], "A chunk may bring several events."),
        _stream([b"da", b"ta: a", b"\n", b"\n"], [("a", 4)], "A line may be cut anywhere: keep what has no end yet."),
        _stream(
            [b"data: a\n\n", b"data: b\n\n"],
            [("a", 1), ("b", 2)],
            "`yield` each event as soon as it is whole, before the next chunk is read.",
        ),
        _stream(
            _cut("data: è🙂\n\n".encode()),
            [("è🙂", 14)],
            "A character may have several bytes, and a cut may go through it: decode whole lines.",
        ),
        _stream([b"data: a\ndata: b\n\n"], [("a\nb", 1)], "Several data lines are one event; \\n stands between them."),
        _stream([b": ping\n\ndata: a\n\n"], [("a", 1)], "A line that begins with a colon is a comment."),
        _stream(
            [b"event: token\nid: 7\ndatabase: x\ndata: a\nretry: 9\n\n"],
            [("a", 1)],
            "Fields other than data are left out; databases are no data.",
        ),
        _stream([b"data: a\r\n\r", b"\ndata: b\r\n\r\n"], [("a", 2), ("b", 2)], "A line may end with \\r\\n as well."),
        _stream(
            [b"data:a\n\ndata:  b \n\n"],
            [("a", 1), (" b ", 1)],
            "One blank behind the colon goes, if there is one; all others are the event's.",
        ),
        _stream(
            ["data: one\u2028line\x0bstill\x85one\n\n".encode()],
            [("one\u2028line\x0bstill\x85one", 1)],
            "splitlines() ends lines at more than \\n: split at \\n alone.",
        ),
        _stream([b"\n\n\ndata: a\n\n\n"], [("a", 1)], "An empty line without data before it is no event."),
        _stream([b"data: a\n\ndata: b\n"], [("a", 1)], "The connection broke before the empty line: no event."),
        _stream(
            [b"data: a\n\ndata: [DONE]\n\n"],
            [("a", 1)],
            "After [DONE] return at once: the connection may stay open, and the next chunk never comes.",
            stays_open=True,
        ),
        _stream(
            [b'data: "[DONE]"\n\ndata: so [DONE]\n\n', b"data: [DONE]\n\ndata: b\n\n"],
            [('"[DONE]"', 1), ("so [DONE]", 1)],
            "Only an event that is [DONE] and nothing else is the end.",
        ),
    ]
    run_check("sse_events", _as_they_come(function), cases, same=_in_time, show=_show_events)


def _cut(data: bytes) -> list[bytes]:
    """Every byte a chunk of its own."""
    return [data[place : place + 1] for place in range(len(data))]


def _stream(chunks: list[bytes], events: list[tuple[str, int]], hint: str, stays_open: bool = False) -> Case:
    chunks = Chunks(chunks)
    chunks.stays_open = stays_open
    return Case((chunks,), [Event(*event) for event in events], hint)


def _as_they_come(function: Callable) -> Callable:
    """The reader's function on a stream; beside each of its events, how many chunks it had read."""

    def observed(chunks: Chunks) -> list | Any:
        num_read = 0

        def connection() -> Iterator[bytes]:
            nonlocal num_read
            for chunk in chunks:
                num_read += 1
                yield chunk
            if chunks.stays_open:
                raise TimeoutError("read on, where nothing more comes")

        answer = function(connection())
        if answer is None:
            return None
        events = []
        for event in answer:
            events.append(Event(event, num_read))
            if len(events) == MOST_EVENTS:
                break
        return events

    return observed


def _in_time(got: list, expected: list[Event]) -> bool:
    if len(got) != len(expected):
        return False
    return all(
        same_value(one.data, other.data) and one.num_chunks <= other.num_chunks
        for one, other in zip(got, expected, strict=True)
    )


def _show_events(events: Sequence[Event]) -> str:
    told = [f"{event.data!r} after {event.num_chunks} chunk{'s' * (event.num_chunks != 1)}" for event in events[:5]]
    return ", ".join(told) + (", …" if len(events) > 5 else "") if told else "no event"


# --- admission -------------------------------------------------------------------------------------------------------

NOBODY: list[float] = []
TAKEN = Name("None")  # an answer here, not the lack of one


def admission(function: Callable) -> None:
    """`admission(num_requests, most, ended)` -> None if another request is taken, else the seconds of Retry-After.

    `num_requests` run or wait, `most` may; `ended` is how many seconds ago requests have ended.
    """
    cases = [
        _asked(0, 16, NOBODY, "There is room: return None."),
        _asked(15, 16, [1.0], "One more makes 16, and 16 may run or wait."),
        _asked(
            17, 16, [1.0] * 100, "The limit may have been lowered meanwhile: the queue is full above `most` as well."
        ),
        _asked(16, 16, [1.0] * 16, "16 run or wait already. Half of them end in 10 s · 8 / 16."),
        _asked(16, 16, [0.5] * 7, "10 s · 8 / 7 is 11.4 s: round up, or the client comes too early."),
        _asked(16, 16, [0.5, 9.9, 10.1, 300.0], "Only those that ended less than 10 s ago count."),
        _asked(4, 4, NOBODY, "None has ended lately: count one."),
        _asked(400, 264, [0.1] * 20, "More than 60 s is not said: nobody would come back."),
        _asked(16, 16, [300.0, 10.1, 9.9, 0.5], "The list has no order that counts: look at every time in it."),
        _asked(4, 4, [12.0, 40.0], "None has ended in the last 10 s, though some did before: count one."),
        _asked(8, 8, [10.0, 9.0], "A request that ended exactly 10 s ago does not count."),
        _asked(2, 2, [0.01] * 200, "Less than 1 s is not said: the header has whole seconds."),
        _asked(9, 9, [2.0] * 3, "Half of 9 requests are 4.5, not 4."),
        _asked(20, 10, [0.1] * 5, "Half of those that run or wait, 20 here, not half of `most`."),
    ]
    run_check("admission", _answered(function), cases, advise=_on_seconds)


def _answered(function: Callable) -> Callable:
    def answered(num_requests: int, most: int, ended: list[float]) -> Any:
        answer = function(num_requests, most, ended)
        return TAKEN if answer is None else answer

    return answered


def _asked(num_requests: int, most: int, ended: list[float], hint: str) -> Case:
    answer = TAKEN if num_requests < most else retry_after(num_requests, ended)
    return Case((num_requests, most, ended), answer, hint)


def _on_seconds(got: Any, case: Case) -> str | None:
    if case.expected is not TAKEN and is_number(got) and float(got) % 1:
        return "Retry-After has whole seconds: round up, or the client comes too early."
    if case.expected is TAKEN and is_number(got):
        return "There is room for one more: return None, and the request is taken."
    return None


# --- take, the puzzle ------------------------------------------------------------------------------------------------

PATIENCE = 1.0  # seconds that a user waits for the first token
CROWDS = {1: 345, 2: 333}  # seed -> how many users of NUM_USERS must have it in time
NUM_USERS = 400


def take(function: Callable) -> None:
    """`take(num_prompt_tokens, ahead)` -> whether a newcomer is taken.

    `ahead`: how many tokens are still to be computed of each prompt before it. The puzzle: 400 requests come to a
    simulated A100 with Llama-2-7B, 15 and 60 per second in turn. Many users are to have their first token within a
    second; a user who is refused has none.
    """
    lines = []
    for seed, wanted in CROWDS.items():
        everybody = _num_in_time(seed, lambda num_prompt_tokens, ahead: True)
        expected = f"the first token within {PATIENCE:g} s for {wanted} users of {NUM_USERS}"
        case = Case((), expected, "What makes a newcomer wait: the number of prompts ahead, or their tokens?")

        def answer(num_prompt_tokens: int, ahead: list[int], case: Case = case) -> bool:
            asked = replace(case, args=(num_prompt_tokens, ahead), expected="True or False")
            taken = call("take", function, asked, describe)
            if not isinstance(taken, bool):
                raise CheckFailed(failure("take", asked, f"got       {describe(taken)}", asked.expected))
            return taken

        num_in_time = _num_in_time(seed, answer)
        if num_in_time < wanted:
            if num_in_time > 0.9 * wanted:
                case = replace(case, hint="A long prompt delays all that come behind it. When is it worth that?")
            got = f"got       {num_in_time} in time; {everybody} if everybody is taken"
            raise CheckFailed(failure("take", case, got, case.expected))
        lines.append(f"  {num_in_time} of {NUM_USERS} in time; {everybody} if everybody is taken")
    print("✓ take: 2 crowds within the budget", *lines, sep="\n")


class _Guarded(Scheduler):
    """One that asks a rule about each newcomer."""

    def __init__(self, rule: Callable[[int, list[int]], bool], clock: VirtualClock):
        super().__init__(SchedulerConfig(256, 512, 4096), clock)
        self.rule, self.taken = rule, []

    def add_request(self, request: Request) -> None:
        left = ((each, each.num_prompt_tokens - each.num_computed_tokens) for each in self.taken)
        ahead = {each: tokens for each, tokens in left if tokens > 0}
        self.taken = list(ahead)
        if self.rule(request.num_prompt_tokens, list(ahead.values())):
            super().add_request(request)
            self.taken.append(request)


def _num_in_time(seed: int, rule: Callable[[int, list[int]], bool]) -> int:
    """How many of the crowd have their first token in time under a rule."""
    clock = VirtualClock()
    executor = SimulatedExecutor(Roofline(LLAMA_2_7B, A100_80GB), clock)
    trace = run(_Guarded(rule, clock), executor, _crowd(seed), clock)
    return sum(trace.ttft(request.request_id) <= PATIENCE for request in trace.requests)


def _crowd(seed: int) -> list[Request]:
    """Five seconds with 15 per second, five with 60, and so on; a quarter of the prompts is long."""
    rng, at, requests = random.Random(seed), 0.0, []
    for number in range(NUM_USERS):
        at += rng.expovariate(60 if at // 5 % 2 else 15)
        length = rng.randint(20, 200) if rng.random() < 0.75 else rng.randint(1_500, 3_000)
        params = SamplingParams(max_tokens=min(400, 8 + int(rng.lognormvariate(4, 0.8))), ignore_eos=True)
        requests.append(Request(f"user {number}", range(length), params, arrival_time=at))
    return requests
