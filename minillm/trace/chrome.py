"""A Trace as Chrome's trace events, to be opened in https://ui.perfetto.dev or chrome://tracing.

One thread per request: its whole life as one event, with waiting and each of its steps nested in it, and a mark where
it was preempted. One thread for the steps and, if the trace has their times, one each for the host, which plans and
launches them, and the device, which computes them. Counters are above, also of the blocks of a paged pool. Format:
"Trace Event Format" (Duffy, Google 2016); times are microseconds from the trace's beginning, exact to the nanosecond.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from minillm.errors import checked, write_text
from minillm.trace.events import RequestRecord, ScheduledTokens, StepEvent, Trace

PROCESS = 1
STEPS, HOST, DEVICE = 0, 1, 2  # threads; the requests follow in order of arrival
Part = tuple[StepEvent, list[ScheduledTokens]]  # a step, and what it computed for one request


@checked
def save_chrome_trace(trace: Trace, path: str | Path) -> Path:
    """Write `trace` to `path` as JSON that Perfetto opens; returns the path."""
    return write_text(path, json.dumps(chrome_trace(trace), separators=(",", ":")) + "\n")


def chrome_trace(trace: Trace) -> dict:
    """The JSON object of a trace: metadata first, then events and counters in order of time."""
    times = [step.start_time for step in trace.steps]
    if not trace.dropped_steps:  # else the counts before the first step are unknown
        times += [record.arrival_time for record in trace.requests]
    clock = _Clock(min(times, default=0.0))
    parts = _parts_by_request(trace)
    threads = {record.request_id: thread for thread, record in enumerate(trace.requests, start=DEVICE + 1)}
    events = list(_step_events(trace, clock)) + list(_counters(trace, clock)) + list(_marks(trace, threads, clock))
    events += [*_host_events(trace, clock), *_device_events(trace, clock)]
    for record in trace.requests:
        events += _request_events(threads[record.request_id], record, parts[record.request_id], clock)
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))  # of two that begin together, the outer first
    return {"traceEvents": [*_names(trace), *events], "displayTimeUnit": "ms"}


class _Clock:
    """Seconds of a run as whole nanoseconds since its beginning, so that events that touch do so exactly."""

    def __init__(self, begin: float):
        self.begin = begin

    def __call__(self, seconds: float) -> int:
        return round((seconds - self.begin) * 1e9)


def _names(trace: Trace) -> Iterator[dict]:
    """Metadata: names of the process and the threads, and the order of the threads."""
    name = f"minillm ({trace.dropped})" if trace.dropped else "minillm"
    yield {"ph": "M", "pid": PROCESS, "tid": STEPS, "name": "process_name", "args": {"name": name}}
    names = {STEPS: "steps"}
    if any(step.launched is not None for step in trace.steps):
        names[HOST] = "host"
    if any(step.device is not None for step in trace.steps):
        names[DEVICE] = "device"
    names |= {thread: _label(record.request_id) for thread, record in enumerate(trace.requests, start=DEVICE + 1)}
    for thread, name in names.items():
        place = {"ph": "M", "pid": PROCESS, "tid": thread}
        yield {**place, "name": "thread_name", "args": {"name": name}}
        yield {**place, "name": "thread_sort_index", "args": {"sort_index": thread}}


def _label(request_id: str) -> str:
    return f"request {request_id}" if request_id[:1].isdigit() else request_id


def _step_events(trace: Trace, clock: _Clock) -> Iterator[dict]:
    for step in trace.steps:
        more = {"tokens": step.num_tokens, "useful": step.num_useful, "score entries": step.score_entries}
        if step.copied_blocks:
            more["blocks copied"] = len(step.copied_blocks)
        yield _complete(STEPS, f"step {step.step}", clock(step.start_time), clock(step.end_time), more)


def _host_events(trace: Trace, clock: _Clock) -> Iterator[dict]:
    """From the moment the host began to plan a step until it had launched it."""
    for step in trace.steps:
        if step.launched is not None:
            begin = clock(step.start_time if step.planned is None else step.planned)
            yield _complete(HOST, f"launch step {step.step}", begin, max(begin, clock(step.launched)), {})


def _device_events(trace: Trace, clock: _Clock) -> Iterator[dict]:
    """The steps on the device, one after the other; its clock may differ a little from the host's."""
    now = 0
    for step in trace.steps:
        if step.device is not None:
            begin, end = map(clock, step.device)
            begin = max(now, begin)
            now = max(begin, end)
            yield _complete(DEVICE, f"step {step.step}", begin, now, {"tokens": step.num_tokens})


def _request_events(thread: int, record: RequestRecord, parts: list[Part], clock: _Clock) -> Iterator[dict]:
    """The request from arrival to end, and in it every stretch of waiting and every step."""
    now = begin = max(0, clock(record.arrival_time))
    inner = []
    for step, computed in parts:
        start, end = max(now, clock(step.start_time)), clock(step.end_time)
        if start > now:
            inner.append(_complete(thread, "waiting", now, start, {}))
        real = [part for part in computed if part.why != "padding"]
        more = {
            "step": step.step,
            "positions": f"{real[0].start}–{real[-1].end - 1}" if real else "none",
            "tokens": sum(part.num_tokens for part in real),
            "padding": sum(part.num_tokens for part in computed if part.why == "padding"),
            "sampled": sum(part.num_sampled for part in real),
        }
        inner.append(_complete(thread, real[0].why if real else "padding", start, max(start, end), more))
        now = max(start, end)
    yield _complete(thread, _label(record.request_id), begin, now, {"prompt tokens": record.num_prompt_tokens})
    yield from inner


def _counters(trace: Trace, clock: _Clock) -> Iterator[dict]:
    """Requests running and waiting during a step, and the cache after it; all requests have left after the last."""
    for step in trace.steps:
        running = len({part.request_id for part in step.scheduled})
        yield _counter("requests", clock(step.start_time), {"running": running, "waiting": step.num_waiting})
        yield _counter("cached tokens", clock(step.end_time), {"tokens": step.cached_tokens})
        if step.blocks is not None:
            blocks = {"used": step.blocks.used, "cached": step.blocks.cached, "free": step.blocks.free}
            yield _counter("blocks", clock(step.end_time), blocks)
    if trace.steps:
        last = trace.steps[-1]
        yield _counter("requests", clock(last.end_time), {"running": 0, "waiting": last.num_waiting})


def _marks(trace: Trace, threads: dict[str, int], clock: _Clock) -> Iterator[dict]:
    """An instant event on the thread of every request that was preempted, where the step begins that needed room."""
    for step in trace.steps:
        for each in step.preempted:
            more = {"step": step.step, "mode": each.mode, "tokens": each.num_tokens}
            yield _instant(threads[each.request_id], f"preempted ({each.mode})", clock(step.start_time), more)


def _parts_by_request(trace: Trace) -> dict[str, list[Part]]:
    parts: dict[str, list[Part]] = {record.request_id: [] for record in trace.requests}
    for step in trace.steps:
        here: dict[str, list[ScheduledTokens]] = {}
        for part in step.scheduled:
            here.setdefault(part.request_id, []).append(part)
        for request_id, computed in here.items():
            parts[request_id].append((step, computed))
    return parts


def _complete(thread: int, name: str, start: int, end: int, more: dict) -> dict:
    """A complete event from `start` to `end`, in nanoseconds."""
    times = {"ts": start / 1000, "dur": (end - start) / 1000}
    return {"ph": "X", "pid": PROCESS, "tid": thread, "cat": "minillm", "name": name, **times, "args": more}


def _instant(thread: int, name: str, moment: int, more: dict) -> dict:
    """A mark at a moment, in nanoseconds, no taller than its thread."""
    place = {"ph": "i", "s": "t", "pid": PROCESS, "tid": thread, "cat": "minillm"}
    return {**place, "name": name, "ts": moment / 1000, "args": more}


def _counter(name: str, moment: int, values: dict[str, int]) -> dict:
    return {"ph": "C", "pid": PROCESS, "tid": STEPS, "name": name, "ts": moment / 1000, "args": values}
