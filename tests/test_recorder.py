"""The trace of a run that goes on: lives of one id told apart, and the last steps only, with what is missing said."""

import json
import pickle
from itertools import islice

import pytest

from minillm import SamplingParams
from minillm.engine.block_manager import BlockManager
from minillm.engine.recorder import Recorder
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler, SchedulerConfig
from minillm.errors import PromptError
from minillm.ladder.padded_schedulers import StaticScheduler
from minillm.runtime.plan import ModelOutput, ScheduledRequest, SchedulerOutput
from minillm.simulation.clock import VirtualClock
from minillm.simulation.reporting import report
from minillm.simulation.workload import made_request
from minillm.trace.chrome import chrome_trace
from minillm.trace.events import RequestRecord
from minillm.trace.files import TraceFileError, load_trace, save_trace
from minillm.viz import BlockTableSteps, Timeline
from minillm.viz.base import PictureError


class Run:
    """A scheduler whose steps take 1 s and whose tokens are all 7."""

    def __init__(self, kind=Scheduler, max_num_seqs=4, **named):
        self.clock = VirtualClock()
        config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=16, max_model_len=64)
        self.scheduler = kind(config, clock=self.clock, **named)

    def add(self, name, num_prompt_tokens=2, num_outputs=3):
        self.scheduler.add_request(made_request(name, self.clock(), num_prompt_tokens, num_outputs))

    def step(self, times=1):
        for _ in range(times):
            plan = self.scheduler.schedule()
            self.clock.advance(1.0)
            tokens = {part.request_id: 7 for part in plan.scheduled if part.samples}
            self.scheduler.update(plan, ModelOutput(tokens, 0))
        return self.scheduler.trace


# --- two lives of one id ---------------------------------------------------------------------------------------------


def test_two_lives_of_one_id_are_told_apart(tmp_path):
    run = Run()
    run.add("a")
    run.step(3)
    run.clock.advance(5.0)
    run.add("a", 4, 2)
    trace = run.step(2)
    assert trace.requests == [RequestRecord("a", 0.0, 2), RequestRecord("a#2", 8.0, 4, caller_id="a")]
    assert (trace.token_times("a"), trace.token_times("a#2")) == ([1.0, 2.0, 3.0], [9.0, 10.0])
    assert (trace.ttft("a"), trace.ttft("a#2"), trace.end_to_end("a#2")) == (1.0, 1.0, 2.0)
    figures = report(trace)
    assert (figures.num_requests, figures.num_finished, figures.output_tokens) == (2, 2, 5)
    assert (figures.ttft.max, figures.e2e.max) == (1.0, 3.0)
    assert load_trace(save_trace(trace, tmp_path / "lives.jsonl")) == trace
    assert Timeline(trace, "steps").text().splitlines()[1:3] == ["a    |PDD..", "a#2  |   PD"]
    named = [each["args"]["name"] for each in chrome_trace(trace)["traceEvents"] if each["name"] == "thread_name"]
    assert named == ["steps", "a", "a#2"]


def test_an_id_that_looks_like_a_second_life_is_not_taken_for_one():
    run = Run()
    for name in ("a#2", "a", "a", "a#2"):
        run.add(name, num_outputs=1)
        trace = run.step()
    assert [(each.request_id, each.caller_id) for each in trace.requests] == [
        ("a#2", None), ("a", None), ("a#3", "a"), ("a#2#2", "a#2"),
    ]  # fmt: skip


def test_an_id_is_the_newest_life_s_while_older_records_go_and_new_again_after_all_have():
    run = Run(max_trace_steps=2)
    recorder = run.scheduler.recorder
    for _ in range(3):
        run.add("a", num_outputs=1)
        run.step()
    run.add("a", num_outputs=9)
    run.step(8)
    assert recorder.name("a") == "a#4" and [each.request_id for each in run.scheduler.trace.requests] == ["a#4"]
    run.step()
    run.add("b", num_outputs=9)
    trace = run.step(9)
    assert [each.request_id for each in trace.requests] == ["b"] and trace.dropped_requests == 4
    run.add("a", num_outputs=1)
    assert [each.request_id for each in run.step().requests] == ["b", "a"]


def test_of_requests_that_ended_before_they_ran_as_many_are_kept_as_steps():
    run = Run(max_trace_steps=2)
    for number in range(5):
        run.add(f"r{number}")
        assert run.scheduler.abort_request(f"r{number}")
    trace = run.scheduler.trace
    assert [each.request_id for each in trace.requests] == ["r3", "r4"] and trace.dropped_requests == 3


def test_who_ran_before_a_step_failed_is_dropped_with_its_steps():
    run = Run(block_manager=BlockManager(20, 4), max_trace_steps=3)
    run.add("a", num_outputs=9)
    run.step()
    run.scheduler.retract(run.scheduler.schedule())
    assert run.scheduler.abort_request("a")
    run.add("b", num_outputs=20)
    trace = run.step(8)
    assert [each.request_id for each in trace.requests] == ["b"] and trace.dropped_requests == 1


def test_an_end_by_what_the_last_token_meant_reaches_who_has_given_way():
    run = Run(block_manager=BlockManager(5, 4, enable_prefix_caching=False), watermark=0)
    for name in ("a", "b"):
        run.add(name, num_prompt_tokens=4, num_outputs=12)
    while "b" in run.scheduler.running or not run.scheduler.trace.steps:
        trace = run.step()
    assert "b" not in trace.steps[-1].finished and run.scheduler.end_request("b", "stop", "text")
    assert run.scheduler.trace.steps[-1].finished[-1] == "b"


def test_parts_behind_a_discarded_one_are_told():
    recorder = Recorder()
    parts = [ScheduledRequest(name, 4, 1, True, "decode", 0, (), name == "c") for name in "abc"]
    recorder.note(SchedulerOutput(0, 0.0, others=parts), {"b"}, (), {"start_time": 0.0, "end_time": 1.0})
    (step,) = recorder.trace.steps
    told = [(part.request_id, part.start, part.why, part.num_sampled) for part in step.scheduled]
    assert told == [("a", 4, "decode", 1), ("b", 4, "padding", 0), ("c", 4, "recompute", 1)]


def test_what_is_computed_again_and_a_prompt_of_one_token_are_told_as_such():
    recorder = Recorder()
    parts = [
        ScheduledRequest("a", 0, 5, True, "prefill", 0, (), 2),
        ScheduledRequest("b", 0, 1, True, "prefill", 0, (), 0),
    ]
    recorder.note(SchedulerOutput(0, 0.0, others=parts), (), (), {"start_time": 0.0, "end_time": 1.0})
    told = [(part.request_id, part.start, part.num_tokens, part.why) for part in recorder.trace.steps[0].scheduled]
    assert told == [("a", 0, 2, "recompute"), ("a", 2, 3, "prefill"), ("b", 0, 1, "prefill")]


def test_padding_is_told_in_tokens():
    recorder = Recorder()
    parts = [
        ScheduledRequest("a", 0, 5, True, "prefill", 0, (), 0),
        ScheduledRequest("b", 0, 2, True, "prefill", 0, (), 0),
    ]
    plan = SchedulerOutput(0, 0.0, others=parts, row_length=5, padding_rows=["c"])
    recorder.note(plan, (), (), {"start_time": 0.0, "end_time": 1.0})
    told = [(part.request_id, part.num_tokens, part.why) for part in recorder.trace.steps[0].scheduled]
    assert told == [("a", 5, "prefill"), ("b", 2, "prefill"), ("b", 3, "padding"), ("c", 5, "padding")]


@pytest.mark.parametrize("looked_at", [False, True])
def test_an_end_by_what_the_last_token_meant_is_in_the_step_that_computed_it(looked_at):
    run = Run()
    scheduler = run.scheduler
    for name in ("a", "b", "c"):
        run.add(name)
    assert scheduler.end_request("c", "stop", "text") and scheduler.trace.steps == []
    plan = scheduler.schedule()
    scheduler.update(plan, ModelOutput({"a": 7, "b": 7}, 0))
    if looked_at:
        assert scheduler.trace.steps[-1].finished == ()
    assert scheduler.end_request("a", "stop", "text") and scheduler.end_request("b", "stop", "text")
    assert [step.finished for step in scheduler.trace.steps] == [("a", "b")]


def test_what_was_computed_for_an_aborted_life_is_not_the_next_ones():
    run = Run()
    run.add("a", 2)
    plan = run.scheduler.schedule()
    run.scheduler.abort_request("a")
    run.clock.advance(1.0)
    run.add("a", 3, 1)
    run.scheduler.abort_request("a")
    run.add("a", 5, 1)
    run.scheduler.update(plan, ModelOutput({"a": 7}, 0))
    trace = run.step()
    assert [record.request_id for record in trace.requests] == ["a", "a#2", "a#3"]
    ((discarded,), (computed,)) = (step.scheduled for step in trace.steps)
    assert (discarded.request_id, discarded.num_tokens, discarded.num_sampled) == ("a", 2, 0)
    assert (computed.request_id, computed.num_tokens, computed.num_sampled) == ("a#3", 5, 1)
    assert [step.finished for step in trace.steps] == [(), ("a#3",)]


def test_an_id_in_a_static_batch_is_in_use_until_the_batch_returns():
    run = Run(StaticScheduler)
    run.add("short", num_outputs=1)
    run.add("long", num_outputs=3)
    run.step()
    with pytest.raises(PromptError, match="'short' is in use"):
        run.add("short")
    run.step(2)
    run.add("short")
    assert run.step(3).steps[-1].finished == ("short#2",)
    assert run.scheduler.trace.end_to_end("short") == 3.0


def test_an_abort_does_not_reach_a_stranger_who_has_the_id_of_an_ended_output():
    run = Run(block_manager=BlockManager(20, 4))
    params = SamplingParams(temperature=1.0, n=2, max_tokens=9, stop_token_ids=[7])
    run.scheduler.add_request(parent := Request("a", [1, 2], params))
    run.step()  # the first output ends with 7, the second joins
    run.scheduler.add_request(other := Request("a", [3], SamplingParams(max_tokens=9)))
    assert parent.finish_reason == "stop" and run.scheduler.abort_request("a.1")
    assert other.finish_reason is None
    parent = Request("b", [1, 2], SamplingParams(temperature=1.0, n=2, max_tokens=9))
    run.scheduler.add_request(parent)
    run.step(2)
    run.scheduler.end_request("b.1", "stop")
    run.scheduler.add_request(stranger := Request("b.1", [3], SamplingParams(max_tokens=9)))
    assert run.scheduler.abort_request("b")
    assert (parent.finish_reason, stranger.finish_reason) == ("abort", None)


# --- the last steps only ---------------------------------------------------------------------------------------------


def test_the_last_steps_are_kept_and_what_is_missing_is_counted(tmp_path):
    run, whole = Run(max_trace_steps=4), Run()
    for each in (run, whole):
        each.add("a", num_outputs=2)
        each.add("b", num_outputs=9)
        each.step(3)
        each.add("c", num_outputs=3)
        each.step(6)
    trace, full = run.scheduler.trace, whole.scheduler.trace
    assert trace.steps == full.steps[-4:] and (full.dropped_steps, full.dropped) == (0, "")
    assert (trace.dropped_steps, trace.dropped_requests) == (5, 1)
    assert [record.request_id for record in trace.requests] == ["b", "c"]
    assert trace.dropped == "the first 5 steps and 1 request are not kept"
    assert load_trace(save_trace(trace, tmp_path / "last.jsonl")) == trace
    path = tmp_path / "last.jsonl"
    assert json.loads(path.read_text().splitlines()[0])["dropped_steps"] == 5
    path.write_text(path.read_text().replace('"dropped_steps": 5', '"dropped_steps": -1'))
    with pytest.raises(TraceFileError, match="line 1: dropped_steps is -1"):
        load_trace(path)


def test_no_latency_is_made_up_for_a_request_whose_beginning_is_gone():
    run = Run(max_trace_steps=4)
    run.add("b", num_outputs=9)
    run.step(6)
    run.add("c", num_outputs=2)
    trace = run.step(3)
    with pytest.raises(LookupError, match="first token of 'b' is gone: the first 5 steps"):
        trace.ttft("b")
    assert (trace.ttft("c"), trace.end_to_end("b"), trace.end_to_end("c")) == (1.0, 9.0, 2.0)
    figures = report(trace)
    assert (figures.ttft.mean, figures.ttft.max) == (1.0, 1.0)  # c's alone
    assert (figures.num_steps, figures.makespan) == (4, 4.0)
    assert (figures.output_tokens, figures.output_tokens_per_second) == (6, 1.5)
    assert "the first 5 steps" in str(figures) and "the first 5 steps" in figures.as_dict()["dropped"]
    timeline = Timeline(trace, "steps")
    assert (timeline.ttft("b"), timeline.ttft("c")) == (None, 1)
    assert "the first 5 steps and 0 requests are not kept" in timeline.text()
    assert Timeline(trace).end() == 4.0
    assert "the first 5 steps" in Timeline(trace).text() and "the first 5 steps" in Timeline(trace).alt()
    events = chrome_trace(trace)["traceEvents"]
    assert any("the first 5 steps" in str(event["args"]) for event in events)
    assert not any(event["name"] == "waiting" for event in events)  # b was not waiting before, but computed


def test_tables_that_began_in_dropped_steps_are_not_drawn():
    run = Run(block_manager=BlockManager(20, 4), max_trace_steps=3)
    run.add("a", num_prompt_tokens=3, num_outputs=12)
    run.step(12)
    with pytest.raises(PictureError, match="the first 9 steps .* max_trace_steps"):
        BlockTableSteps(run.scheduler.trace, 4)


def test_memory_is_flat_over_200_000_steps():
    """Three requests at once for three steps each, and one aborted before it runs; ids are used again and again."""
    recorder, sizes = Recorder(max_steps=100), []
    requests = {name: Request(name, [1], SamplingParams(max_tokens=3)) for name in (*"abcdefgh", "never")}
    plans = [SchedulerOutput(step, 0.0, **parts_of(step), num_tokens=3) for step in range(8)]
    for step in range(200_000):
        recorder.arrive(requests["abcdefgh"[step % 8]], step)
        if step % 4 == 0:
            recorder.arrive(requests["never"], step)
            recorder.end("never", ran=False)
        plan = plans[step % 8]
        plan.step = step
        finished = ["abcdefgh"[(step - 2) % 8]] if step >= 2 else []
        recorder.note(plan, (), finished, {"start_time": float(step), "end_time": step + 1.0})
        for name in finished:
            recorder.end(name, ran=True)
        if step % 20_000 == 19_999:
            sizes.append(len(pickle.dumps(recorder)))
    assert max(sizes) < 1.05 * min(sizes) < 50_000  # the numbers in it get longer
    trace = recorder.trace
    assert (len(trace.steps), trace.dropped_steps) == (100, 199_900)
    assert len(trace.requests) == 250_000 - trace.dropped_requests < 230  # 102 that ran, and 100 that did not
    named = {part.request_id for step in trace.steps for part in step.scheduled}
    assert named <= {record.request_id for record in trace.requests}


def parts_of(step):
    """One request joins and one leaves in each step."""
    decodes = {"abcdefgh"[(step - age) % 8]: age for age in (1, 2)}
    return {"decodes": decodes, "others": [ScheduledRequest("abcdefgh"[step % 8], 0, 1, True, "prefill")]}


def test_an_engine_keeps_the_last_steps_of_its_trace(checkpoint):
    from test_llm_engine import PROMPT, TEN, make_engine, run

    engine = make_engine(checkpoint("llama"), max_trace_steps=5)
    for _ in range(2):
        engine.add_request("a", PROMPT, TEN)
        run(engine)
    trace = engine.trace
    assert (len(trace.steps), trace.dropped_steps) == (5, 15)
    assert [(record.request_id, record.caller_id) for record in trace.requests] == [("a#2", "a")]
    assert make_engine(checkpoint("llama")).config.max_trace_steps == 10_000


def test_a_trace_in_hand_does_not_change():
    run = Run()
    run.add("a", num_outputs=9)
    trace = run.step(2)
    assert run.scheduler.trace is trace
    run.step()
    assert len(trace.steps) == 2 and len(run.scheduler.trace.steps) == 3


def test_the_default_clock_begins_with_the_scheduler_so_that_arrivals_and_steps_are_on_one():
    scheduler = StaticScheduler(SchedulerConfig(max_num_seqs=2))
    scheduler.add_request(made_request("A", 0.0, 2, 2))
    while scheduler.has_unfinished_requests():
        plan = scheduler.schedule()
        scheduler.update(plan, ModelOutput({"A": 7}, 0, device_times=None))
    assert 0 <= scheduler.trace.ttft("A") < 60  # the clock of the machine says how long it has been on
    assert list(islice(scheduler.trace.token_times("A"), 2)) == [step.end_time for step in scheduler.trace.steps]
