"""The way of one request through the three layers, in the eight steps of the book, as far as its trace goes.

The trace begins where the engine gets the request and ends where it returns the tokens. Times of the HTTP server's
steps, 1 to 3, are only in the server's log, in the line with the same id.
"""

from collections.abc import Iterator
from typing import NamedTuple

from minillm.errors import MiniLLMError
from minillm.trace.events import RequestRecord, ScheduledTokens, StepEvent, Trace


class UnknownRequestError(MiniLLMError):
    """The trace has no request of this id."""


class Stage(NamedTuple):
    """One of the eight steps."""

    number: int  # 1 to 8
    layer: int | None  # 1 to 3; None is outside of all
    part: str  # which one acts
    seconds: float | None  # since the request's arrival; None if the trace does not have it
    what: str


def find_request(trace: Trace, request_id: str) -> RequestRecord:
    """The record of this id; if the trace only knows it as its caller's, the last such. Raises UnknownRequestError."""
    own = [each for each in trace.requests if each.request_id == request_id]
    callers = [each for each in trace.requests if each.caller_id == request_id]
    if not own + callers:
        known = ", ".join(each.request_id for each in trace.requests[:5])
        more = f" and {len(trace.requests) - 5:,} more" if len(trace.requests) > 5 else ""
        gone = f"; {trace.dropped}" if trace.dropped else ""
        raise UnknownRequestError(f"no request {request_id!r} in this trace, which has {known}{more}{gone}")
    return (callers or own)[-1]


def stages_of(trace: Trace, record: RequestRecord) -> list[Stage]:
    """The eight steps of a request. Steps 5 to 7 describe its first pass through the model, step 8 all passes."""
    parts, arrival = list(trace.parts(record.request_id)), record.arrival_time
    stages = [
        Stage(1, None, "user", None, "sends the request"),
        Stage(2, 1, "OpenAI server", None, "reads and checks it"),
        Stage(3, 1, "API server", None, "finds its route, checks the API key, gives it an id"),
        Stage(4, 1, "LLMEngine", 0.0, f"makes a request of {record.num_prompt_tokens} prompt tokens; it waits"),
    ]
    if not parts:
        return [*stages, Stage(5, 2, "Scheduler", None, "has not chosen it in any step that is kept")]
    (step, part), sampled = parts[0], [(step, part) for step, part in parts if part.num_sampled]
    planned = step.start_time if step.planned is None else step.planned
    stages.append(Stage(5, 2, "Scheduler", planned - arrival, _chosen(trace, record, step, part)))
    began, ended = (step.start_time, step.end_time) if step.device is None else step.device
    handed = began if step.launched is None else min(began, step.launched)  # in this process, launching returns later
    stages.append(Stage(6, 2, "ModelExecutor", handed - arrival, "hands the plan to the worker"))
    what = f"prepares inputs and block tables, computes for {(ended - began) * 1e3:.2f} ms, samples"
    stages.append(Stage(7, 3, "Worker", began - arrival, what))
    stages.append(Stage(8, 1, "back to the user", *_told(trace, record, parts, sampled)))
    return stages


def _chosen(trace: Trace, record: RequestRecord, step: StepEvent, part: ScheduledTokens) -> str:
    others = len({each.request_id for each in step.scheduled}) - 1
    cached = f"; {part.start} are in the cache" if part.start and not trace.dropped_steps else ""
    ids = part.block_ids or ()
    blocks = f", in block{'s' * (len(ids) != 1)} {', '.join(map(str, ids))}" if ids else ""
    return (
        f"chooses it for step {step.step}, beside {others} other{'s' * (others != 1)}: "
        f"{part.num_tokens} of its tokens{cached}{blocks}; "
        f"{step.num_waiting} still wait"
    )


def _told(trace: Trace, record: RequestRecord, parts: list, sampled: list) -> tuple[float | None, str]:
    preemptions = sum(each.request_id == record.request_id for step in trace.steps for each in step.preempted)
    if not sampled:
        return None, f"nothing yet: {len(parts)} passes have brought no token"
    first, last = sampled[0][0], sampled[-1][0]
    passes = len({step.step for step, _ in parts})
    text = f"first token; then {len(sampled) - 1} more"
    if len(sampled) > 1:
        gap = (last.end_time - first.end_time) / (len(sampled) - 1)
        whole = last.end_time - record.arrival_time
        text += f", {gap * 1e3:.2f} ms from one to the next, the last after {whole * 1e3:.2f} ms"
    text += f"; steps 5 to 7 ran {passes} times in all"
    if preemptions:
        text += f"; it was preempted {preemptions} time{'s' * (preemptions != 1)}"
    if not any(record.request_id in step.finished for step in trace.steps):
        text += "; it did not end with a result here"
    return first.end_time - record.arrival_time, text


def journey_lines(trace: Trace, request_id: str) -> Iterator[str]:
    """The steps as text, one per line. Raises UnknownRequestError."""
    record = find_request(trace, request_id)
    yield f"request {record.request_id}, arrived at {record.arrival_time:.4f} s of the engine's clock"
    yield f"{'step':4}  {'layer':5}  {'part':16}  {'after':>11}  what happens"
    for number, layer, part, seconds, what in stages_of(trace, record):
        after = "" if seconds is None else f"{seconds * 1e3:.2f} ms"
        yield f"{number:4}  {layer or '-':>5}  {part:16}  {after:>11}  {what}"
    yield "Of steps 1 to 3 the trace knows no times: see the server's log, the line with this id."
