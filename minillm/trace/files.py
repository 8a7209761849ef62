"""Traces in files, as JSON lines: a header, a line a request, a line a step. What is read equals what was written.

    {"format": "minillm trace", "version": 1}
    {"request": {"request_id": "a", "arrival_time": 0.0, "num_prompt_tokens": 7}}
    {"step": {"step": 0, "start_time": 0.0, "end_time": 0.2, "scheduled": [{"request_id": "a", ...}]}}

The names are those of `events`; fields at their default are left out, so a file from before a field was there
can still be read. Where only the last steps were kept, the header says so: "dropped_steps", "dropped_requests". Times
are written in full.
"""

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from minillm.errors import MiniLLMError, checked, read_text, write_text
from minillm.trace.events import BlockUse, Preemption, RequestRecord, ScheduledTokens, StepEvent, Trace, Why

FORMAT, VERSION = "minillm trace", 1
DROPPED = ("dropped_steps", "dropped_requests")


class TraceFileError(MiniLLMError):
    """A trace file cannot be read, or cannot be written as JSON; names the line."""


@checked(error=TraceFileError)
def save_trace(trace: Trace, path: str | Path) -> Path:
    """Write `trace` to `path`; returns the path. Raises TraceFileError for a time that is not finite."""
    dropped = {name: getattr(trace, name) for name in DROPPED if getattr(trace, name)}
    lines = [{"format": FORMAT, "version": VERSION, **dropped}]
    lines += [{"request": _record(request)} for request in trace.requests]
    lines += [{"step": _record(step)} for step in trace.steps]
    try:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    except ValueError as error:
        raise TraceFileError(f"cannot write the trace to {path}: a time in it is not finite") from error
    return write_text(path, text, error=TraceFileError)


def _record(record) -> dict:
    """The fields of a dataclass that are not at their default."""
    values = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if field.default is MISSING or value != field.default:
            values[field.name] = _json(value)
    return values


def _json(value):
    """A field's value as JSON has it: a dataclass as an object, a tuple as a list."""
    if is_dataclass(value):
        return _record(value)
    return [_json(each) for each in value] if isinstance(value, tuple) else value


def load_trace(path: str | Path) -> Trace:
    """The trace in `path`. Raises TraceFileError, naming the line, for a file that `save_trace` cannot have made."""
    lines = read_text(path, "the trace", error=TraceFileError).rstrip("\n").split("\n")
    trace, known = Trace(**_read_header(path, lines[0])), set()
    for number, line in enumerate(lines[1:], start=2):
        _Line(f"{path}, line {number}", line).add_to(trace, known)
    return trace


def _read_header(path: str | Path, line: str) -> dict[str, int]:
    """What the first line says was dropped."""
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TraceFileError(
            f'{path}, line 1: no trace, which begins with {{"format": "{FORMAT}", "version": {VERSION}}}'
        )
    if header.get("version") != VERSION:
        raise TraceFileError(
            f"{path}, line 1: the trace is of version {header.get('version')!r}, this minillm reads {VERSION}; "
            "record it again or update minillm"
        )
    dropped = {name: header.get(name, 0) for name in DROPPED}
    for name, count in dropped.items():
        if not _is_count(count):
            raise TraceFileError(f"{path}, line 1: {name} is {count!r}; it must be a whole number, 0 or more")
    return dropped


class _Line:
    """One line after the header, being checked; `where` names it in errors."""

    def __init__(self, where: str, text: str):
        self.where = where
        try:
            self.content = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
            raise self._error(f"no JSON ({getattr(error, 'msg', error)})") from error

    def _error(self, reason: str) -> TraceFileError:
        return TraceFileError(f"{self.where}: {reason}")

    def add_to(self, trace: Trace, known: set[str]) -> None:
        """Append the request or the step of this line, if it fits what came before: `known` are the requests' ids."""
        if not isinstance(self.content, dict) or len(self.content) != 1:
            raise self._error('expected {"request": ...} or {"step": ...}')
        ((kind, values),) = self.content.items()
        if kind == "request":
            request = self._read(RequestRecord, values)
            if request.request_id in known:
                raise self._error(f"request id {request.request_id!r} is there twice")
            known.add(request.request_id)
            trace.requests.append(request)
        elif kind == "step":
            step = self._read(StepEvent, values)
            self._check_order(trace, step)
            named = (part.request_id for part in (*step.scheduled, *step.preempted))
            strangers = {*step.finished, *named} - known
            if strangers:
                raise self._error(f"requests {sorted(strangers)[:4]} have no line of their own above")
            trace.steps.append(step)
        else:
            raise self._error(f"unknown entry {kind!r}; expected request or step")

    def _check_order(self, trace: Trace, step: StepEvent) -> None:
        if step.end_time < step.start_time:
            raise self._error(f"the step ends at {step.end_time} s, before it begins at {step.start_time} s")
        if trace.steps and step.start_time < trace.steps[-1].start_time:
            raise self._error(f"the step begins at {step.start_time} s, before the one in the line above")

    def _read(self, kind: type, values: object):
        """A dataclass from its JSON object."""
        readers, known = READERS[kind], fields(kind)
        if not isinstance(values, dict):
            raise self._error(f"a {kind.__name__} must be a JSON object, not {values!r}")
        unknown = values.keys() - readers.keys()
        missing = [field.name for field in known if field.default is MISSING and field.name not in values]
        if unknown or missing:
            raise self._error(f"a {kind.__name__} with unknown fields {sorted(unknown)}, missing {missing}")
        return kind(**{name: self._value(name, readers[name], value) for name, value in values.items()})

    def _value(self, name: str, reader: "Reader | Objects", value: object):
        """What a field of a dataclass holds, from its JSON value."""
        if isinstance(reader, Objects):
            if not reader.many:
                return self._read(reader.kind, value)
            if not isinstance(value, list):
                raise self._error(f"{name} is {value!r}; it must be a list")
            return tuple(self._read(reader.kind, each) for each in value)
        accepts, wanted = reader
        if not accepts(value):
            raise self._error(f"{name} is {value!r}; it must be {wanted}")
        return _frozen(value)


def _frozen(value):
    """JSON's lists as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


class Objects(NamedTuple):
    """A field that holds another dataclass, or several."""

    kind: type
    many: bool = True


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


# What each field may hold, and how an error says so.
Reader = tuple[Callable[[object], bool], str]
MODES = get_args(Preemption.__annotations__["mode"])
NAME: Reader = (lambda value: isinstance(value, str), "a string")
COUNT: Reader = (_is_count, "a whole number, 0 or more")
COUNTS: Reader = (_are_counts, "a list of whole numbers, 0 or more")
PAIRS: Reader = (
    lambda value: isinstance(value, list) and all(_are_counts(pair) and len(pair) == 2 for pair in value),
    "a list of pairs of whole numbers, 0 or more",
)
TIME: Reader = (lambda value: type(value) in (int, float) and math.isfinite(value), "seconds, a finite number")
SPAN: Reader = (
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(TIME[0], value)) and value[0] <= value[1],
    "two moments in seconds, the second not before the first",
)
NAMES: Reader = (lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value), "strings")
WHY: Reader = (lambda value: value in get_args(Why), f"one of {', '.join(get_args(Why))}")
MODE: Reader = (lambda value: value in MODES, f"one of {', '.join(MODES)}")
READERS: dict[type, dict[str, Reader | Objects]] = {
    RequestRecord: {"request_id": NAME, "arrival_time": TIME, "num_prompt_tokens": COUNT, "caller_id": NAME},
    ScheduledTokens: {
        "request_id": NAME,
        "start": COUNT,
        "num_tokens": COUNT,
        "why": WHY,
        "num_sampled": COUNT,
        "first_block": COUNT,
        "block_ids": COUNTS,
    },
    Preemption: {"request_id": NAME, "mode": MODE, "num_tokens": COUNT},
    BlockUse: {"used": COUNT, "cached": COUNT, "free": COUNT, "null": COUNT},
    StepEvent: {
        "step": COUNT,
        "start_time": TIME,
        "end_time": TIME,
        "scheduled": Objects(ScheduledTokens),
        "finished": NAMES,
        "num_waiting": COUNT,
        "score_entries": COUNT,
        "cached_tokens": COUNT,
        "preempted": Objects(Preemption),
        "copied_blocks": PAIRS,
        "blocks": Objects(BlockUse, many=False),
        "planned": TIME,
        "launched": TIME,
        "device": SPAN,
    },
}
