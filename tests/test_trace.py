"""Latencies read from a trace written by hand, and from a real run's."""

import pytest

from minillm import SamplingParams, Trace, generate_cached, generate_naive
from minillm.trace.events import RequestRecord, ScheduledTokens, StepEvent
from tiny_models import ScriptedModel


def step(number, start, end, *scheduled, **other):
    return StepEvent(number, start, end, scheduled, **other)


@pytest.fixture
def trace():
    """a: 5 prompt tokens in chunks of 3 and 2, then two decodes. b arrives at 0.5 and gets one token."""
    return Trace(
        requests=[RequestRecord("a", 0.0, 5), RequestRecord("b", 0.5, 2)],
        steps=[
            step(0, 0.0, 1.0, ScheduledTokens("a", 0, 3, "prefill"), num_waiting=1),
            step(1, 1.0, 1.5, ScheduledTokens("a", 3, 2, "prefill", num_sampled=1), num_waiting=1),
            step(
                2,
                1.5,
                2.5,
                ScheduledTokens("a", 5, 1, "decode", num_sampled=1),
                ScheduledTokens("b", 0, 2, "prefill", num_sampled=1),
                finished=("b",),
            ),
            step(3, 2.5, 2.75, ScheduledTokens("a", 6, 1, "decode", num_sampled=1), finished=("a",)),
        ],
    )


def test_tokens_exist_from_the_end_of_the_step_that_sampled_them(trace):
    assert trace.token_times("a") == [1.5, 2.5, 2.75]
    assert trace.token_times("b") == [2.5]


def test_ttft_runs_from_arrival_to_the_first_token(trace):
    assert trace.ttft("a") == 1.5
    assert trace.ttft("b") == 2.0


def test_itl_is_the_time_between_consecutive_tokens(trace):
    assert trace.inter_token_latencies("a") == [1.0, 0.25]
    assert trace.inter_token_latencies("b") == []


def test_e2e_is_ttft_plus_all_itl(trace):
    assert trace.end_to_end("a") == 2.75 == trace.ttft("a") + sum(trace.inter_token_latencies("a"))
    assert trace.end_to_end("b") == 2.0


def test_steps_know_their_tokens_and_duration(trace):
    assert [event.num_tokens for event in trace.steps] == [3, 2, 3, 1]
    assert [event.duration for event in trace.steps] == [1.0, 0.5, 1.0, 0.25]
    assert [part.end for _, part in trace.parts("a")] == [3, 5, 6, 7]


def test_an_unknown_request_is_named_with_those_that_exist(trace):
    with pytest.raises(KeyError, match="'c'.*'a', 'b'"):
        trace.request("c")


@pytest.mark.parametrize(
    ("generate", "kinds"),
    [(generate_cached, ["prefill", "decode", "decode"]), (generate_naive, ["prefill", "recompute", "recompute"])],
)
def test_a_run_says_what_each_pass_was_for(generate, kinds):
    trace = generate(ScriptedModel([7, 8, 9], num_prompt_tokens=4), [1, 2, 3, 4], SamplingParams(max_tokens=3)).trace
    (request,) = trace.requests
    assert request.num_prompt_tokens == 4
    assert [part.why for _, part in trace.parts(request.request_id)] == kinds
    assert [event.finished for event in trace.steps] == [(), (), (request.request_id,)]
    times = [time for event in trace.steps for time in (event.start_time, event.end_time)]
    assert times == sorted(times)
    assert trace.token_times(request.request_id) == [event.end_time for event in trace.steps]
