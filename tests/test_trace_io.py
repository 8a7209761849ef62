"""Traces in files: they come back as they were, broken ones are refused by line, Perfetto's rules hold, the command."""

import json
import math
from collections import defaultdict
from dataclasses import fields, is_dataclass, replace
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.cli import main as cli
from minillm.errors import Count
from minillm.trace.chrome import DEVICE, HOST, STEPS, chrome_trace, save_chrome_trace
from minillm.trace.events import BlockUse, Preemption, RequestRecord, ScheduledTokens, StepEvent, Trace
from minillm.trace.files import TraceFileError, load_trace, save_trace


def small_trace() -> Trace:
    """ "a" at once; "b" arrives late, waits, is prefilled in two chunks, preempted and recomputed, with padding."""
    schedule = [
        (0.5, 0.7, [("a", 0, 4, "prefill", 1)], (), 0),
        (0.7, 0.8, [("a", 4, 1, "decode", 1)], (), 1),
        (0.8, 0.95, [("a", 5, 1, "decode", 1), ("b", 0, 3, "prefill", 0)], (), 0),
        (0.96, 1.1, [("a", 0, 2, "padding", 0), ("b", 3, 2, "prefill", 1)], ("a",), 0),
        (1.1, 1.2, [("b", 0, 5, "recompute", 0), ("b", 5, 1, "decode", 1), ("b", 5, 3, "padding", 0)], ("b",), 0),
    ]
    trace = Trace([RequestRecord("a", 0.45, 4), RequestRecord("b", 0.72, 5)])
    for step, (start, end, parts, finished, waiting) in enumerate(schedule):
        parts = tuple(ScheduledTokens(*part) for part in parts)
        counts = {"num_waiting": waiting, "score_entries": 10 * step, "cached_tokens": 5 + step}
        trace.steps.append(StepEvent(step, start, end, parts, finished, **counts))
    return trace


def paged_trace() -> Trace:
    """Blocks of 2, pool of 4: "b" is preempted for "a", by recomputation and by swapping; a shared block is copied."""

    def part(*fields, first_block: int = 0, blocks: tuple[int, ...]) -> ScheduledTokens:
        return ScheduledTokens(*fields, first_block=first_block, block_ids=blocks)

    both = (part("a", 0, 3, "prefill", 1, blocks=(1, 2)), part("b", 0, 1, "prefill", 1, blocks=(3,)))
    a3 = (part("a", 3, 1, "decode", 1, first_block=1, blocks=(3,)),)
    a4 = (part("a", 4, 1, "decode", 1, first_block=2, blocks=(2,)),)
    schedule = [
        (both, (), (), BlockUse(3, 0, 0)),
        (a3, (Preemption("b", "recompute", 1),), ((2, 3),), BlockUse(2, 1, 0)),
        ((part("b", 0, 1, "recompute", blocks=(2,)),), (), (), BlockUse(3, 0, 0)),
        (a4, (Preemption("b", "swap", 1),), (), BlockUse(0, 2, 1)),
    ]
    trace = Trace([RequestRecord("a", 0.0, 3), RequestRecord("b", 0.0, 1)])
    for step, (parts, preempted, copied, use) in enumerate(schedule):
        more = {"preempted": preempted, "copied_blocks": copied, "blocks": use}
        trace.steps.append(StepEvent(step, step / 4, (step + 1) / 4, parts, ("a", "b") if step == 3 else (), **more))
    return trace


# --- JSON lines ---


@pytest.mark.parametrize("make", ["small_trace", "paged_trace", "overlapped_trace"])
def test_a_trace_comes_back_as_it_was(tmp_path, make):
    trace = globals()[make]()
    path = save_trace(trace, tmp_path / "run.jsonl")
    assert load_trace(path) == trace
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"format": "minillm trace", "version": 1}
    assert len(lines) == 1 + len(trace.requests) + len(trace.steps)
    again = save_trace(load_trace(path), tmp_path / "again.jsonl")
    assert again.read_bytes() == path.read_bytes()


TIMES = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = {Count: st.integers(0, 2**40), float: TIMES, str: st.text(max_size=4)}


def anything(kind, **given):
    """Any value of an annotation; fields of dataclasses that are `given` are drawn as told there."""
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        drawn = {field.name: anything(field.type, **given) for field in fields(kind)}
        return st.builds(kind, **drawn | {name: given[name] for name in drawn.keys() & given.keys()})
    if kind in PLAIN:
        return PLAIN[kind]
    if origin is Literal:
        return st.sampled_from(parts)
    if origin is tuple and parts[-1] is not Ellipsis:
        return st.tuples(*map(anything, parts))
    if origin is tuple:
        return st.lists(anything(parts[0], **given), max_size=3).map(tuple)
    return st.none() | anything(parts[0], **given)


@settings(max_examples=20)
@given(st.data())
def test_any_trace_comes_back_exactly(tmp_path_factory, data):
    """A field that is new is drawn too."""
    names = data.draw(st.lists(PLAIN[str], min_size=1, max_size=3, unique=True))
    trace = Trace([data.draw(anything(RequestRecord, request_id=st.just(name))) for name in names])
    name, span = st.sampled_from(names), st.tuples(TIMES, TIMES).map(sorted).map(tuple)
    for start in sorted(data.draw(st.lists(TIMES, max_size=3))):
        times = {"start_time": st.just(start), "end_time": st.floats(start, allow_infinity=False)}
        more = {"finished": st.lists(name, max_size=2).map(tuple), "device": st.none() | span}
        trace.steps.append(data.draw(anything(StepEvent, request_id=name, **times, **more)))
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    assert load_trace(save_trace(trace, path)) == trace


def test_a_file_from_before_the_paged_cache_can_be_read(tmp_path):
    lines = [
        '{"format": "minillm trace", "version": 1}',
        '{"request": {"request_id": "a", "arrival_time": 0.0, "num_prompt_tokens": 1}}',
        '{"step": {"step": 0, "start_time": 0.0, "end_time": 1.0, "scheduled": [{"request_id": "a", "start": 0, '
        '"num_tokens": 1, "why": "prefill", "num_sampled": 1}], "finished": ["a"], "cached_tokens": 1}}',
    ]
    (tmp_path / "old.jsonl").write_text("\n".join(lines) + "\n")
    step = StepEvent(0, 0.0, 1.0, (ScheduledTokens("a", 0, 1, "prefill", 1),), ("a",), cached_tokens=1)
    trace = Trace([RequestRecord("a", 0.0, 1)], [step])
    assert load_trace(tmp_path / "old.jsonl") == trace
    assert save_trace(trace, tmp_path / "new.jsonl").read_bytes() == (tmp_path / "old.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("line", "text", "says"),
    [
        (1, "", "line 1: no trace"),
        (1, '{"format": "something else"}', "line 1: no trace"),
        (1, '{"format": "minillm trace", "version": 2}', "line 1: the trace is of version 2, this minillm reads 1"),
        (2, "{", "line 2: no JSON"),
        (2, "", "line 2: no JSON"),
        (2, "[]", "line 2: expected"),
        (2, '{"note": 1}', "line 2: unknown entry 'note'"),
        (2, '{"request": 1}', "line 2: a RequestRecord must be a JSON object"),
        (2, '{"request": {"request_id": "a", "arrival_time": 0}}', r"missing \['num_prompt_tokens'\]"),
        (2, '{"request": {"request_id": 1, "arrival_time": 0, "num_prompt_tokens": 1}}', "request_id is 1; it must be"),
        (2, '{"request": {"request_id": "a", "arrival_time": NaN, "num_prompt_tokens": 1}}', "arrival_time is nan"),
        (2, '{"request": {"request_id": "a", "arrival_time": 0, "num_prompt_tokens": true}}', "tokens is True"),
        (3, '{"request": {"request_id": "a", "arrival_time": 0, "num_prompt_tokens": 1}}', "'a' is there twice"),
        (4, '{"step": {"step": 0, "start_time": 2, "end_time": 1, "scheduled": []}}', "line 4: the step ends at 1"),
        (4, '{"step": {"step": 0, "start_time": 1, "end_time": 2, "scheduled": 3}}', "scheduled is 3; .* a list"),
        (4, '{"step": {"step": 0, "start_time": 1, "end_time": 2, "scheduled": [], "x": 1}}', r"fields \['x'\]"),
        (4, '{"step": {"step": 0, "start_time": 1, "end_time": 2, "scheduled": [], "finished": ["c"]}}', r"\['c'\]"),
        (4, '{"step": {"step": 0, "start_time": 1, "end_time": 2, "scheduled": [{"why": "fun"}]}}', "ScheduledTokens"),
        (6, '{"step": {"step": 0, "start_time": 0.1, "end_time": 9, "scheduled": []}}', "before the one in"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_by_its_line(tmp_path, line, text, says):
    path = save_trace(small_trace(), tmp_path / "run.jsonl")
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines))
    with pytest.raises(TraceFileError, match=says) as refused:
        load_trace(path)
    assert f"{path}, line {line}: " in str(refused.value)


def test_a_why_that_does_not_exist_is_refused(tmp_path):
    path = save_trace(small_trace(), tmp_path / "run.jsonl")
    path.write_text(path.read_text().replace('"padding"', '"fun"'))
    with pytest.raises(TraceFileError, match="line 7: why is 'fun'; it must be one of 'prefill', 'decode'"):
        load_trace(path)


@pytest.mark.parametrize(
    ("there", "instead", "says"),
    [
        ('"block_ids": [1, 2]', '"block_ids": 1', "line 4: block_ids is 1; it must be a list, each item a whole"),
        ('"block_ids": [1, 2]', '"block_ids": [1, -2]', r"line 4: block_ids is \[1, -2\]"),
        (
            '"copied_blocks": [[2, 3]]',
            '"copied_blocks": [[2]]',
            "line 5: copied_blocks is .* list of 2: a whole",
        ),
        (
            '"copied_blocks": [[2, 3]]',
            '"copied_blocks": [2, 3]',
            "line 5: copied_blocks is .* list of 2: a whole",
        ),
        ('"mode": "recompute"', '"mode": "drop"', "line 5: mode is 'drop'; it must be one of 'recompute', 'swap'"),
        ('[{"request_id": "b", "mode": "recompute"', '[{"request_id": "c", "mode": "recompute"', r"line 5: .*\['c'\]"),
        ('"preempted": [', '"preempted": 1, "x": [', r"line 5: a StepEvent with unknown fields \['x'\]"),
        ('"blocks": {"used": 2, "cached": 1, "free": 0}', '"blocks": 2', "line 5: blocks is 2; it must be a BlockUse"),
        ('"blocks": {"used": 2, ', '"blocks": {', r"line 5: a BlockUse .* missing \['used'\]"),
        ('"used": 2', '"used": 2.5', "line 5: used is 2.5; it must be a whole number"),
        ('"blocks": {', '"device": [2.0, 1.0], "blocks": {', "line 4: the device ends the step at 1.0 s, before"),
        ('"blocks": {', '"device": [1.0], "blocks": {', "line 4: device is .* list of 2: a finite number"),
        ('"blocks": {', '"launched": "now", "blocks": {', "line 4: launched is 'now'; it must be a finite number"),
    ],
)
def test_broken_blocks_are_refused_by_their_line(tmp_path, there, instead, says):
    path = save_trace(paged_trace(), tmp_path / "run.jsonl")
    assert there in path.read_text()
    path.write_text(path.read_text().replace(there, instead, 1))
    with pytest.raises(TraceFileError, match=says):
        load_trace(path)


def test_missing_files_other_bytes_and_endless_times_are_refused(tmp_path):
    with pytest.raises(TraceFileError, match="No such file"):
        load_trace(tmp_path / "none.jsonl")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(TraceFileError, match="UTF-8"):
        load_trace(tmp_path / "bytes")
    endless = Trace([RequestRecord("a", math.inf, 1)])
    with pytest.raises(TraceFileError, match="not finite"):
        save_trace(endless, tmp_path / "endless.jsonl")
    assert not (tmp_path / "endless.jsonl").exists()


# --- Chrome's trace events ---


def nanoseconds(microseconds: float) -> int:
    return round(1000 * microseconds)


def check_format(document: dict) -> None:
    """The rules of the "Trace Event Format" for the phases M, X, C and i."""
    assert set(document) == {"traceEvents", "displayTimeUnit"}
    open_until = defaultdict(list)  # thread -> ends of the events around the present moment, outermost first
    last = 0.0
    for event in document["traceEvents"]:
        assert {"ph", "pid", "tid", "name", "args"} <= set(event)
        if event["ph"] == "M":
            continue
        assert event["ts"] >= last, "sorted by time"
        last = event["ts"]
        if event["ph"] == "C":
            assert all(isinstance(value, int) and value >= 0 for value in event["args"].values())
            continue
        if event["ph"] == "i":
            assert event["s"] in ("g", "p", "t") and "dur" not in event
            continue
        assert event["ph"] == "X" and event["dur"] >= 0
        start, end = nanoseconds(event["ts"]), nanoseconds(event["ts"] + event["dur"])
        around = open_until[event["tid"]]
        while around and around[-1] <= start:
            around.pop()
        assert not around or end <= around[-1], "an event ends within the one around it"
        around.append(end)


def test_the_chrome_trace_keeps_the_formats_rules():
    check_format(json.loads(json.dumps(chrome_trace(paged_trace()))))
    document = chrome_trace(small_trace())
    check_format(json.loads(json.dumps(document)))
    with pytest.raises(AssertionError, match="within the one around"):  # the check itself finds a broken nesting
        events = [dict(event) for event in document["traceEvents"]]
        next(event for event in events if event["name"] == "waiting")["dur"] += 1e9
        check_format({**document, "traceEvents": events})


def test_a_thread_a_request_with_its_life_and_what_it_did_in_it():
    events = chrome_trace(small_trace())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {STEPS: "steps", 3: "a", 4: "b"}
    life, *inner = [event for event in events if event["ph"] == "X" and event["tid"] == 4]
    assert (life["name"], life["ts"], life["dur"]) == ("b", 270_000, 480_000)  # from 0.72 to 1.2 s; 0.45 s is 0
    assert [event["name"] for event in inner] == ["waiting", "prefill", "waiting", "prefill", "recompute"]
    assert (inner[0]["ts"], inner[0]["dur"]) == (270_000, 80_000)
    tokens = [(each["args"]["tokens"], each["args"]["padding"]) for each in inner if each["args"]]
    assert tokens == [(3, 0), (2, 0), (6, 3)]
    assert [event["name"] for event in events if event["ph"] == "X" and event["tid"] == 3][-1] == "padding"


def test_counters_follow_the_run():
    events = chrome_trace(small_trace())["traceEvents"]
    requests = [event["args"] for event in events if event["name"] == "requests"]
    assert [(each["running"], each["waiting"]) for each in requests] == [(1, 0), (1, 1), (2, 0), (2, 0), (1, 0), (0, 0)]
    cached = [(event["ts"], event["args"]["tokens"]) for event in events if event["name"] == "cached tokens"]
    assert cached[0] == (250_000, 5) and cached[-1] == (750_000, 9)


def test_blocks_are_counted_and_preemptions_marked():
    events = chrome_trace(paged_trace())["traceEvents"]
    blocks = [(event["ts"], *event["args"].values()) for event in events if event["name"] == "blocks"]
    assert blocks == [(250_000, 3, 0, 0), (500_000, 2, 1, 0), (750_000, 3, 0, 0), (1_000_000, 0, 2, 1)]
    marks = [(event["ts"], event["tid"], event["name"], event["args"]) for event in events if event["ph"] == "i"]
    assert marks == [
        (250_000, 4, "preempted (recompute)", {"step": 1, "mode": "recompute", "tokens": 1}),
        (750_000, 4, "preempted (swap)", {"step": 3, "mode": "swap", "tokens": 1}),
    ]
    steps = [event["args"] for event in events if event["ph"] == "X" and event["tid"] == STEPS]
    assert [step.get("blocks copied") for step in steps] == [None, 1, None, None]


def test_overlapping_steps_and_odd_times_still_nest():
    trace = small_trace()
    trace.steps = [
        replace(each, end_time=each.end_time + 1 / 30, start_time=each.start_time / 3) for each in trace.steps
    ]
    trace.requests = [replace(record, arrival_time=record.arrival_time / 3) for record in trace.requests]
    document = chrome_trace(trace)
    document["traceEvents"] = [event for event in document["traceEvents"] if event["tid"] != STEPS]
    check_format(document)


def overlapped_trace() -> Trace:
    """Of one request: each step is planned and launched while the device computes the one before."""
    trace = Trace([RequestRecord("a", 0.0, 3)])
    times = [(0.0, None, 0.125, (0.125, 0.5), 0.625), (0.625, 0.125, 0.25, (0.5, 1.0), 1.125)]
    times += [(1.125, 0.625, 0.75, (0.9375, 1.5), 1.625)]  # the device's clock is a little off
    for step, (start, planned, launched, device, end) in enumerate(times):
        parts = (ScheduledTokens("a", 3 + step if step else 0, 1 if step else 3, "decode" if step else "prefill", 1),)
        more = {"planned": planned, "launched": launched, "device": device}
        trace.steps.append(StepEvent(step, start, end, parts, ("a",) if step == 2 else (), **more))
    return trace


def test_host_and_device_have_threads_of_their_own_where_the_trace_tells():
    document = chrome_trace(overlapped_trace())
    check_format(json.loads(json.dumps(document)))
    names = {event["tid"]: event["args"]["name"] for event in document["traceEvents"] if event["name"] == "thread_name"}
    assert names == {STEPS: "steps", HOST: "host", DEVICE: "device", 3: "a"}
    spans = {
        thread: [
            (event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
            for event in document["traceEvents"]
            if event["ph"] == "X" and event["tid"] == thread
        ]
        for thread in (HOST, DEVICE)
    }
    assert spans[HOST] == [("launch step 0", 0, 0.125), ("launch step 1", 0.125, 0.25), ("launch step 2", 0.625, 0.75)]
    assert spans[DEVICE] == [("step 0", 0.125, 0.5), ("step 1", 0.5, 1.0), ("step 2", 1.0, 1.5)]


def test_an_empty_trace_is_an_empty_document(tmp_path):
    document = json.loads(save_chrome_trace(Trace(), tmp_path / "empty.json").read_text())
    assert {event["ph"] for event in document["traceEvents"]} == {"M"}


# --- minillm trace ---


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["trace", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_command_draws_and_sums_up(capsys, tmp_path):
    path = save_trace(small_trace(), tmp_path / "run.jsonl")
    code, out, err = run(capsys, path)
    assert (code, err) == (0, "")
    assert "a    |PDDx.\nb    |  PPr" in out
    for figure in ("requests ", "2 of 2 finished", "5 steps", "22 computed, 12 useful", "TTFT", "ITL", "E2E"):
        assert figure in out


def test_the_command_tells_of_blocks_and_preemptions(capsys, tmp_path):
    out = run(capsys, save_trace(paged_trace(), tmp_path / "run.jsonl"))[1]
    assert out.endswith(
        "blocks        4 in the pool, at most 3 used (75.0%), in step 0; at the end 0 used, 2 cached, 1 free\n"
        "preemptions   2: 1 by recomputation (1 token computed again), 1 by swapping\n"
        "copies        1 shared block copied before being written to\n"
    )
    out = run(capsys, save_trace(small_trace(), tmp_path / "run.jsonl"))[1]
    assert "blocks " not in out and "preemptions" not in out


@pytest.mark.parametrize("unit", ["s", "tokens"])
def test_the_command_writes_what_it_is_asked_for(capsys, tmp_path, unit):
    path = save_trace(small_trace(), tmp_path / "run.jsonl")
    files = {kind: tmp_path / f"picture.{kind}" for kind in ("svg", "png", "chrome")}
    options = [part for kind, file in files.items() for part in (f"--{kind}", file)]
    code, out, _ = run(capsys, path, "--unit", unit, *options)
    assert code == 0 and all(str(file) in out for file in files.values())
    assert files["svg"].read_text().lstrip().startswith("<?xml")
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    check_format(json.loads(files["chrome"].read_text()))


def test_the_command_draws_the_first_of_many(capsys, tmp_path):
    path = save_trace(small_trace(), tmp_path / "run.jsonl")
    out = run(capsys, path, "--requests", "1")[1]
    assert "a    |PDDx\n" in out and "b    |" not in out
    assert "the first 1 of 2 requests" in out and "2 of 2 finished" in out


def test_the_command_answers_a_mistake_in_one_line(capsys, tmp_path):
    (tmp_path / "broken.jsonl").write_text("nonsense\n")
    code, out, err = run(capsys, tmp_path / "broken.jsonl")
    assert (code, out) == (2, "") and err.startswith("minillm: ") and "line 1" in err
    save_trace(Trace(), tmp_path / "empty.jsonl")
    assert run(capsys, tmp_path / "empty.jsonl")[0] == 2
