"""`explain` on runs whose answer is known: simulated with one cause, two, all or none; and on traces it must refuse."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.engine import BlockManager, SchedulerConfig
from minillm.errors import ConfigError
from minillm.simulation import (
    BATCHING,
    Calibrated,
    ExplainError,
    Published,
    Roofline,
    SimulatedExecutor,
    VirtualClock,
    WithHost,
    explain,
    made_request,
    preset,
    run,
)
from minillm.trace import RequestRecord, ScheduledTokens, StepEvent, Trace

FREE = Calibrated(0, 0, 0, 0, 0, 0, 0, 0)
LINEAR = replace(FREE, per_step=8e-3, per_computed_token=0.5e-3, per_key_read=2e-6)
UNEVEN = [(5 + 37 * i % 60, 3 + 23 * i % 40) for i in range(48)]
SAME_PROMPTS = [(16, output) for _, output in UNEVEN]
SAME_OUTPUTS = [(prompt, 12) for prompt, _ in UNEVEN]
TOLERANCE = 0.03


def trace_of(pairs, batching="continuous", rows=4, costs=LINEAR, host=None, blocks=None, gap=0.0, every=0.0):
    clock = VirtualClock()
    config = SchedulerConfig(rows, 1024, 512)
    pool = {} if blocks is None else {"block_manager": BlockManager(blocks, 4, enable_prefix_caching=False)}
    scheduler = BATCHING[batching](config, clock, **pool)
    model = costs if host is None else WithHost(costs, host)
    requests = [made_request(str(i), every * i, *pair) for i, pair in enumerate(pairs)]
    executor = SimulatedExecutor(model, clock)
    return run(scheduler, executor, requests, clock, on_step=lambda plan, updates: clock.advance(gap))


def explained(a, b):
    why = explain(a, b)
    assert math.prod(why.factors.values()) == pytest.approx(why.ratio, rel=1e-9)
    assert why.ratio == pytest.approx(a.makespan / b.makespan)
    for factor in why.decomposition.factors:
        assert factor.low <= factor.shapley * (1 + 1e-9) and factor.shapley <= factor.high * (1 + 1e-9)
    return why


def only(why, cause):
    """Whether that cause is the whole ratio, and it is worth speaking of."""
    rest = {name: factor for name, factor in why.factors.items() if name != cause}
    return why.ratio > 1.2 and all(factor == pytest.approx(1, abs=TOLERANCE) for factor in rest.values())


# --- one cause -------------------------------------------------------------------------------------------------------


def test_of_a_run_beside_itself_nothing_is_explained():
    for host in (None, 4e-3):
        trace = trace_of(UNEVEN, "static", host=host)
        assert explained(trace, trace).factors == pytest.approx(
            {"padding": 1, "waiting": 1, "memory": 1, "host": 1, "computing": 1}
        )


@pytest.mark.parametrize("batching", ["static", "dynamic"])
def test_only_padding(batching):
    assert only(explained(trace_of(SAME_OUTPUTS, batching), trace_of(SAME_OUTPUTS)), "padding")


@pytest.mark.parametrize("step", [0.0, 8e-3, 0.5])
def test_only_waiting(step):
    costs = replace(LINEAR, per_step=step)
    assert only(
        explained(trace_of(SAME_PROMPTS, "static", costs=costs), trace_of(SAME_PROMPTS, costs=costs)), "waiting"
    )


def test_only_memory_by_fewer_rows():
    assert only(explained(trace_of(UNEVEN, rows=2), trace_of(UNEVEN, rows=16)), "memory")


def test_only_memory_by_a_pool_that_preempts():
    few, many = trace_of(UNEVEN, rows=16, blocks=40), trace_of(UNEVEN, rows=16, blocks=400)
    why = explained(few, many)
    assert why.a.recompute > 100 and why.b.recompute == 0 and why.a.somebody_waited > why.b.somebody_waited
    assert only(why, "memory")


@pytest.mark.parametrize("rows", [2, 16])
def test_only_the_host_inside_the_steps(rows):
    why = explained(trace_of(UNEVEN, rows=rows, host=20e-3), trace_of(UNEVEN, rows=rows, host=1e-3))
    assert only(why, "host") and why.a.host == pytest.approx(20e-3 * why.a.steps)


def test_only_the_host_between_the_steps():
    why = explained(trace_of(UNEVEN, gap=20e-3), trace_of(UNEVEN))
    assert only(why, "host") and why.a.host == pytest.approx(20e-3 * (why.a.steps - 1))


def test_the_same_host_per_step_is_no_cause_however_many_steps_there_are():
    why = explained(trace_of(UNEVEN, rows=2, host=20e-3), trace_of(UNEVEN, rows=16, host=20e-3))
    assert why.factors["host"] == pytest.approx(1) and only(why, "memory")


def test_slower_kernels_are_what_is_left():
    slow = replace(LINEAR, **{name: 3 * price for name, price in vars(LINEAR).items()})
    why = explained(trace_of(UNEVEN, costs=slow), trace_of(UNEVEN))
    assert only(why, "computing") and why.factors["computing"] == pytest.approx(3)


def test_places_that_nobody_could_have_taken_are_not_waited_for():
    """All requests are in one batch: without waiting for the longest only the tokens of ended rows would be saved."""
    costs = replace(LINEAR, per_step=0.5)
    why = explained(trace_of(SAME_PROMPTS, "static", 64, costs), trace_of(SAME_PROMPTS, "continuous", 64, costs))
    assert why.a.ended > 500 and why.factors["waiting"] == pytest.approx(why.ratio, rel=0.01)


def test_time_without_requests_is_told_apart():
    slow = replace(LINEAR, **{name: 3 * price for name, price in vars(LINEAR).items()})
    few = UNEVEN[:6]
    why = explained(trace_of(few, costs=slow, every=5.0), trace_of(few, every=5.0))
    assert why.a.idle > 10 and why.factors["computing"] > 1 > 0.99 > why.ratio / why.factors["computing"]
    assert why.a.host == pytest.approx(0, abs=1e-9) == why.b.host


# --- two causes, and all ---------------------------------------------------------------------------------------------


def known(runs, cause, other):
    """The factor of a cause in both orders, from four runs: {set of causes: seconds}."""
    both, alone = {cause, other}, {cause}
    orders = (runs[frozenset(alone)] / runs[frozenset()], runs[frozenset(both)] / runs[frozenset({other})])
    return min(orders) * (1 - TOLERANCE), max(orders) * (1 + TOLERANCE)


SWITCHES = {
    "memory": ("rows", 2, 16),
    "host": ("host", 20e-3, 0.0),
    "waiting": ("batching", "static", "continuous"),
    "padding": ("batching", "static", "continuous"),
}


@pytest.mark.parametrize("pair", [("memory", "host"), ("waiting", "host"), ("padding", "host"), ("waiting", "memory")])
def test_two_causes_are_told_apart(pair):
    requests = 4 * {"padding": SAME_OUTPUTS}.get(pair[0], SAME_PROMPTS)
    traces = {}
    for present in (frozenset(some) for some in ((), pair[:1], pair[1:], pair)):
        options = {SWITCHES[cause][0]: SWITCHES[cause][1 if cause in present else 2] for cause in pair}
        traces[present] = trace_of(requests, **options)
    runs = {present: trace.makespan for present, trace in traces.items()}
    why = explained(traces[frozenset(pair)], traces[frozenset()])
    for cause, other in (pair, pair[::-1]):
        low, high = known(runs, cause, other)
        assert 1.05 < low <= why.factors[cause] <= high, (cause, low, why.factors[cause], high)
    for cause in why.factors.keys() - set(pair):
        assert why.factors[cause] == pytest.approx(1, abs=TOLERANCE), cause


def test_all_causes_at_once():
    why = explained(trace_of(UNEVEN, "static", 2, host=20e-3), trace_of(UNEVEN, rows=16, host=2e-3))
    assert all(why.factors[cause] > 1.03 for cause in ("padding", "waiting", "memory", "host"))
    assert why.factors["computing"] == pytest.approx(1, abs=TOLERANCE)


def test_the_order_of_causes_does_not_matter():
    why = explained(trace_of(UNEVEN, "static", 2, host=20e-3), trace_of(UNEVEN, rows=16))
    host = next(factor for factor in why.decomposition.factors if factor.name == "host")
    assert host.high > 1.2 * host.low  # a single order would give a different result
    shown = str(why)
    assert f"{why.ratio:.2f} times as long" in shown and "by order" in shown and "somebody waited" in shown


# --- on a card -------------------------------------------------------------------------------------------------------


def test_on_a_card_each_cause_is_found_within_what_the_simulator_says_of_it():
    """Prices are not linear there: a step takes as long as the slower of memory and arithmetic."""
    published = Published("13b", num_requests=60)
    ours = published.trace(())
    for cause, found in (("reservation", "memory"), ("host", "host")):
        why = explained(published.trace([cause]), ours)
        assert why.ratio == pytest.approx(published.seconds([cause]) / published.seconds(()))
        assert only(why, found)
    both = explained(published.trace(["reservation", "waiting"]), ours)
    waiting = published.seconds(["reservation", "waiting"]) / published.seconds(["reservation"])
    assert both.factors["waiting"] == pytest.approx(waiting, rel=0.05)


def test_the_trace_of_the_published_setting_tells_what_the_host_took():
    published = Published("13b", num_requests=4)
    trace = published.trace(["host"])
    assert trace.makespan == pytest.approx(published.seconds(["host"]))
    host = {round(step.duration - step.computing, 9) for step in trace.steps}
    assert host == {40 * 40 * 10e-6}  # layers, launches, seconds
    roofline = preset("LLaMA-13B", "a100")
    assert isinstance(roofline, Roofline) and trace_of(UNEVEN[:2], costs=roofline).steps[0].device is None


# --- whatever the runs -----------------------------------------------------------------------------------------------

runs = st.fixed_dictionaries(
    {
        "batching": st.sampled_from(list(BATCHING)),
        "rows": st.integers(1, 5),
        "host": st.sampled_from([None, 0.0, 3e-3]),
        "gap": st.sampled_from([0.0, 5e-3]),
        "every": st.sampled_from([0.0, 0.2]),
        "costs": st.sampled_from([LINEAR, replace(FREE, per_step=1e-2), replace(FREE, per_computed_token=1e-3)]),
    }
)


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=8), runs, runs)
@settings(max_examples=60, deadline=None)
def test_the_factors_multiply_to_the_ratio_and_the_seconds_add_up(pairs, one, other):
    why = explained(trace_of(pairs, **one), trace_of(pairs, **other))
    for use in (why.a, why.b):
        assert use.idle + use.computing + use.host == pytest.approx(use.seconds)
        assert min(use.idle, use.computing, use.host) >= 0


# --- what cannot be explained ----------------------------------------------------------------------------------------


def test_other_ids_are_other_names_for_the_same_requests():
    trace = trace_of(UNEVEN[:3])
    named = Trace(
        [replace(record, request_id="x" + record.request_id) for record in trace.requests],
        [
            replace(
                step,
                scheduled=tuple(replace(part, request_id="x" + part.request_id) for part in step.scheduled),
                finished=tuple("x" + each for each in step.finished),
            )
            for step in trace.steps
        ],
    )
    assert explained(trace, named).ratio == 1


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda trace: Trace(), "trace b has 0 requests and 0 steps"),
        (lambda trace: replace(trace, steps=[]), "trace b has 3 requests and 0 steps"),
        (lambda trace: replace(trace, steps=trace.steps[:-1]), "1 of 3 requests have not ended, such as"),
        (lambda trace: replace(trace, dropped_steps=7), "trace b is not complete: the first 7 steps"),
        (lambda trace: trace_of([(5, 3), (42, 26), (9, 9)]), "1 only in a and 1 only in b, such as one of 19 prompt"),
        (lambda trace: trace_of(UNEVEN[:2]), "1 only in a and 0 only in b"),
        (
            lambda trace: replace(trace, steps=[replace(step, end_time=step.start_time) for step in trace.steps]),
            "in which nothing took time",
        ),
    ],
)
def test_traces_that_cannot_be_compared_are_refused(spoil, says):
    trace = trace_of(UNEVEN[:3])
    with pytest.raises(ExplainError, match=says):
        explain(trace, spoil(trace))


def test_what_is_no_trace_is_refused():
    with pytest.raises(ConfigError, match="trace_b"):
        explain(trace_of(UNEVEN[:1]), "trace")


# --- factors from a trace --------------------------------------------------------------------------------------------


def test_the_tokens_of_a_step_by_what_they_are_for():
    parts = (
        ScheduledTokens("a", 0, 3, "recompute"),
        ScheduledTokens("a", 3, 1, "decode", 1),
        ScheduledTokens("b", 0, 2, "prefill", 1),
        ScheduledTokens("b", 0, 2, "padding"),
        ScheduledTokens("c", 0, 4, "padding"),
    )
    step = StepEvent(0, 1.0, 3.0, parts)
    assert step.uses == (3, 2, 4, 3) and sum(step.uses) == step.num_tokens
    assert step.computing == 2 and replace(step, device=(1.5, 2.5)).computing == 1
    assert replace(step, device=(0.5, 1.25)).computing == 0.25 and replace(step, device=(4.0, 5.0)).computing == 0


def test_the_makespan_is_the_reports():
    step = StepEvent(0, 1.0, 3.0, ())
    assert Trace().makespan == 0 and Trace([RequestRecord("a", 0.25, 1)], [step]).makespan == 2.75
    assert Trace([RequestRecord("a", 0.25, 1)], [step], dropped_steps=1).makespan == 2
