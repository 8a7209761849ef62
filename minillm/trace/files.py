"""Traces in files, as JSON lines: a header, a line per request, a line per step. What is read equals what was written.

    {"format": "minillm trace", "version": 1}
    {"request": {"request_id": "a", "arrival_time": 0.0, "num_prompt_tokens": 7}}
    {"step": {"step": 0, "start_time": 0.0, "end_time": 0.2, "scheduled": [{"request_id": "a", ...}]}}

The names are those of `events`. Fields at their default are left out, so a file older than a field can still be read.
If only the last steps were kept, the header says so: "dropped_steps", "dropped_requests". Times are written in full.
"""

import json
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import get_args

from minillm.errors import Count, MiniLLMError, check_kind, checked, read_text, write_text
from minillm.trace.events import RequestRecord, StepEvent, Trace

FORMAT, VERSION = "minillm trace", 1
DROPPED = ("dropped_steps", "dropped_requests")


class TraceFileError(MiniLLMError):
    """A trace file cannot be read, or cannot be written as JSON; names the line."""


@checked(error=TraceFileError)
def save_trace(trace: Trace, path: str | Path) -> Path:
    """Write `trace` to `path`; returns the path. Raises TraceFileError for a time that is not finite."""
    return write_text(path, "".join(line + "\n" for line in trace_lines(trace)), error=TraceFileError)


def trace_lines(trace: Trace) -> list[str]:
    """The lines of a trace's file. Raises TraceFileError for a time that is not finite."""
    try:
        return [json.dumps(line, allow_nan=False) for line in records_of(trace)]
    except ValueError as error:
        raise TraceFileError("cannot write the trace as JSON: a time in it is not finite") from error


def records_of(trace: Trace) -> Iterator[dict]:
    """The same as objects: the header, then one for each other line."""
    yield {"format": FORMAT, "version": VERSION} | {name: n for name in DROPPED if (n := getattr(trace, name))}
    yield from ({"request": record_of(request)} for request in trace.requests)
    yield from ({"step": record_of(step)} for step in trace.steps)


def record_of(event: RequestRecord | StepEvent) -> dict:
    """An event as the object of a line: the fields that are not at their default, as JSON values."""
    values = {}
    for field in fields(event):
        value = getattr(event, field.name)
        if field.default is MISSING or value != field.default:
            values[field.name] = _json(value)
    return values


def _json(value):
    """A field's value as a JSON value: a dataclass as an object, a tuple as a list."""
    if is_dataclass(value):
        return record_of(value)
    return [_json(each) for each in value] if isinstance(value, tuple) else value


def load_trace(path: str | Path) -> Trace:
    """The trace in `path`. Raises TraceFileError, naming the line, for a file that `save_trace` cannot have made."""
    lines = read_text(path, "the trace", error=TraceFileError).rstrip("\n").split("\n")
    trace, known = Trace(**_read_header(path, lines[0])), set()
    for number, line in enumerate(lines[1:], start=2):
        _Line(f"{path}, line {number}", line).add_to(trace, known)
    return trace


def _read_header(path: str | Path, line: str) -> dict[str, int]:
    """The counts of dropped steps and requests in the first line."""
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
    return {
        name: check_kind(f"{path}, line 1: {name}", header.get(name, 0), Count, error=TraceFileError)
        for name in DROPPED
    }


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
        if step.device and step.device[1] < step.device[0]:
            raise self._error(f"the device ends the step at {step.device[1]} s, before it begins at {step.device[0]} s")
        if trace.steps and step.start_time < trace.steps[-1].start_time:
            raise self._error(f"the step begins at {step.start_time} s, before the one in the line above")

    def _read(self, kind: type, values: object):
        """A dataclass from its JSON object."""
        if not isinstance(values, dict):
            raise self._error(f"a {kind.__name__} must be a JSON object, not {values!r}")
        known = fields(kind)
        unknown = values.keys() - {field.name for field in known}
        missing = [field.name for field in known if field.default is MISSING and field.name not in values]
        if unknown or missing:
            raise self._error(f"a {kind.__name__} with unknown fields {sorted(unknown)}, missing {missing}")
        return kind(**{field.name: self._value(field, values[field.name]) for field in known if field.name in values})

    def _value(self, field: Field, value: object):
        """A dataclass field's value from its JSON value; objects, also in lists, are dataclasses too."""
        if isinstance(value, list | dict) and (kind := next(filter(is_dataclass, get_args(field.type)), None)):
            value = [self._read(kind, each) for each in value] if isinstance(value, list) else self._read(kind, value)
        return check_kind(field.name, value, field.type, error=self._error)
