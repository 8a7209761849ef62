"""Clocks, workloads, cost models, the run loop, reports; and that a simulation makes the steps of the real run."""

import dataclasses
import itertools
import json
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minillm
from minillm import costs
from minillm.bench import batching, simulator
from minillm.bench import measuring as measure
from minillm.cli import main as cli
from minillm.costs.kv_bytes import kv_bytes_per_token
from minillm.costs.shapes import H200, LLAMA_2_7B, SHAPES
from minillm.engine.scheduler import SchedulerConfig
from minillm.errors import ConfigError, PromptError
from minillm.ladder.contiguous import ContiguousExecutor
from minillm.ladder.kv_cache import RowCache
from minillm.model.decoder import Decoder
from minillm.runtime.plan import NewRequest, ScheduledRequest, SchedulerOutput
from minillm.simulation import workload
from minillm.simulation.clock import RealClock, VirtualClock
from minillm.simulation.cost_model import CARDS, Calibrated, Roofline, StepWork, non_negative_least_squares, preset
from minillm.simulation.executor import SimulatedExecutor
from minillm.simulation.reporting import SLO, ReportBuilder, Spread, report, spread
from minillm.simulation.running import BATCHING, compare_batching, run
from minillm.simulation.workload import course_requests, made_request, make_requests
from minillm.trace.events import RequestRecord, ScheduledTokens, StepEvent, Trace
from minillm.trace.files import load_trace

SHAPE = minillm.ModelConfig(
    vocab_size=500,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=600,
)
LIMITS = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=8, max_model_len=64)
PRICES = Calibrated(1e-3, 1e-4, 0.0, 2e-4, 3e-4, 1e-4, 1e-7, 1e-7)


def small_model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SHAPE).eval().requires_grad_(False)


def some_requests(num_requests=9, seed=0):
    return make_requests(num_requests, workload.uniform(1, 20), workload.uniform(1, 12), seed=seed)


def one_second_a_step(way, requests, limits=LIMITS, **options):
    """A simulated run in which every step takes a second."""
    clock = VirtualClock()
    scheduler = BATCHING[way](limits, clock, trace=options.pop("trace", True))
    prices = Calibrated(1.0, *[0.0] * 7)
    return run(scheduler, SimulatedExecutor(prices, clock), requests, clock, **options)


# --- clocks ----------------------------------------------------------------------------------------------------------


def test_a_virtual_clock_moves_only_when_told():
    clock = VirtualClock()
    clock.advance(2.5)
    clock.advance_to(2.0)
    assert clock() == 2.5
    clock.advance_to(4.0)
    assert clock() == 4.0
    with pytest.raises(ConfigError, match="-1"):
        clock.advance(-1)


def test_a_real_clock_sleeps_until_the_moment():
    clock = RealClock()
    clock.advance_to(0.02)
    assert clock() >= 0.02
    clock.advance_to(0.0)


def test_a_real_clock_may_count_computing_time_instead():
    readings = iter([5.0, 5.5])
    assert RealClock(lambda: next(readings))() == 0.5


# --- workloads -------------------------------------------------------------------------------------------------------


def described(requests):
    return [
        (request.request_id, request.arrival_time, request.num_prompt_tokens, request.params.max_tokens)
        for request in requests
    ]


@pytest.mark.parametrize("arrivals", ["at once", "poisson", "bursts"])
def test_a_seed_fixes_the_requests(arrivals):
    made = [
        described(make_requests(50, workload.lognormal(30, 1.0, 99), workload.fixed(4), arrivals=arrivals, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert made[0] == made[1] != made[2]


def test_lengths_follow_their_distributions():
    rng = random.Random(0)
    draws = {
        "fixed": [workload.fixed(7)(rng) for _ in range(5)],
        "uniform": [workload.uniform(3, 6)(rng) for _ in range(500)],
        "lognormal": sorted(workload.lognormal(40, 0.8, 150)(rng) for _ in range(2001)),
    }
    assert draws["fixed"] == [7] * 5
    assert set(draws["uniform"]) == {3, 4, 5, 6}
    assert 37 <= draws["lognormal"][1000] <= 43 and draws["lognormal"][0] >= 1 and draws["lognormal"][-1] == 150
    clipped = {workload.lognormal(40, 5.0, 150, shortest=8)(rng) for _ in range(500)}
    assert (min(clipped), max(clipped)) == (8, 150)


def test_the_course_s_requests_are_always_the_same():
    requests = course_requests()
    assert described(requests) == described(course_requests(vocab_size=9)) and len(requests) == 64
    assert sum(request.num_prompt_tokens for request in requests) == 4_647
    assert sum(request.params.max_tokens for request in requests) == 3_188
    assert {request.arrival_time for request in requests} == {0.0}
    assert described(course_requests(100))[:64] == described(requests)
    assert described(course_requests(16)) == described(requests[:16])


def test_the_course_s_requests_arrive_as_others_do():
    made = make_requests(64, workload.fixed(1), workload.fixed(1), arrivals="poisson", rate=4.0, seed=7)
    requests = course_requests(arrivals="poisson", rate=4.0)
    assert [request.arrival_time for request in requests] == [request.arrival_time for request in made]
    assert [request.params.max_tokens for request in requests] == [each.params.max_tokens for each in course_requests()]
    with pytest.raises(ConfigError, match="raise the rate"):
        course_requests(arrivals="poisson", rate=1e-12)


def test_the_course_s_requests_run_to_their_end():
    few = course_requests(3, vocab_size=SHAPE.vocab_size)
    assert all(max(request.prompt_token_ids) < SHAPE.vocab_size for request in few)
    limits = SchedulerConfig(max_num_seqs=3, max_model_len=512)
    trace = one_second_a_step("continuous", few, limits)
    sampled = Counter()
    for step in trace.steps:
        sampled.update({part.request_id: part.num_sampled for part in step.scheduled})
    assert sampled == {request.request_id: request.params.max_tokens for request in few}


def test_arrivals_follow_their_distributions():
    assert [next(workload.all_at_once()) for _ in range(3)] == [0.0] * 3
    burst = workload.bursts(3, 2.0)
    assert [next(burst) for _ in range(7)] == [0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 4.0]
    random_times = workload.poisson(5.0, random.Random(0))
    times = [next(random_times) for _ in range(2000)]
    assert times == sorted(times) and 370 < times[-1] < 430
    even = make_requests(9, workload.fixed(1), workload.fixed(1), arrivals="bursts", rate=2.0, burst_size=4)
    assert [request.arrival_time for request in even] == [0.0] * 4 + [2.0] * 4 + [4.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: workload.fixed(0),
        lambda: workload.uniform(5, 4),
        lambda: workload.lognormal(0.5, 1.0, 10),
        lambda: workload.lognormal(5, -1.0, 10),
        lambda: make_requests(0, workload.fixed(1), workload.fixed(1)),
        lambda: make_requests(1, workload.fixed(1), workload.fixed(1), arrivals="sometimes"),
        lambda: make_requests(1, workload.fixed(1), workload.fixed(1), arrivals="poisson", rate=0.0),
        lambda: SLO(ttft=0.0),
        lambda: preset("GPT-5", "h200"),
        lambda: preset("Qwen3-8B", "abacus"),
        lambda: Roofline(LLAMA_2_7B, H200, launch_overhead=-1.0),
        lambda: Calibrated.fit([]),
    ],
)
def test_impossible_values_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_requests_go_to_a_file_and_back(tmp_path):
    requests = make_requests(20, workload.uniform(1, 9), workload.uniform(1, 9), arrivals="poisson")
    workload.save_requests(tmp_path / "requests.jsonl", requests)
    assert described(workload.load_requests(tmp_path / "requests.jsonl")) == described(requests)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no requests"),
        ("{", "line 1 is not JSON"),
        ("[]", "must be an object"),
        ('{"num_prompt_tokens": 3, "num_output_tokens": 0}', "num_output_tokens is 0"),
        ('{"num_prompt_tokens": 3}', "num_output_tokens is None"),
        ('{"num_prompt_tokens": 3, "num_output_tokens": 1, "arrival_time": -1}', "arrival_time is -1"),
        ('{"num_prompt_tokens": 3, "num_output_tokens": 1, "color": 1}', "must be an object with the fields"),
    ],
)
def test_a_wrong_file_is_refused_by_line(tmp_path, text, complaint):
    (tmp_path / "requests.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        workload.load_requests(tmp_path / "requests.jsonl")
    with pytest.raises(ConfigError, match="cannot read"):
        workload.load_requests(tmp_path / "none.jsonl")


# --- the work of a step ----------------------------------------------------------------------------------------------


class CountingExecutor(ContiguousExecutor):
    """Counts what the real executor does, where it does it."""

    def __init__(self, monkeypatch):
        super().__init__(small_model(), LIMITS.max_num_seqs, LIMITS.max_model_len)
        self.counts = []  # of each step: tokens through the model, rows of logits, score entries, keys read in layer 0
        monkeypatch.setattr(Decoder, "forward", self.counting(Decoder.forward, 0, lambda token_ids, *_: len(token_ids)))
        monkeypatch.setattr(Decoder, "logits", self.counting(Decoder.logits, 1, len))
        keys_of = lambda layer, rows, num_tokens: (layer == 0) * len(rows) * num_tokens  # noqa: E731
        monkeypatch.setattr(RowCache, "read", self.counting(RowCache.read, 3, keys_of))

    def counting(self, method, place, amount):
        def counted(instance, *arguments):
            self.counts[-1][place] += amount(*arguments)
            return method(instance, *arguments)

        return counted

    def execute_model(self, plan):
        self.counts.append([0, 0, 0, 0])
        output = super().execute_model(plan)
        self.counts[-1][2] = output.score_entries
        return output


@pytest.mark.parametrize("way", BATCHING)
def test_the_work_read_off_a_plan_is_what_the_real_executor_does(way, monkeypatch):
    executor, clock, works = CountingExecutor(monkeypatch), RealClock(), []
    scheduler = BATCHING[way](LIMITS, clock)
    run(scheduler, executor, some_requests(), clock, on_step=lambda plan, _: works.append(StepWork.of(plan)))
    assert [
        [work.computed_tokens, work.logit_rows, work.score_entries, work.keys_read] for work in works
    ] == executor.counts
    assert sum(work.computed_tokens for work in works) == sum(step.num_tokens for step in scheduler.trace.steps)
    assert len({work.chunks > 0 for work in works}) == 2 or way != "continuous"


@pytest.mark.parametrize("way", BATCHING)
def test_a_simulation_makes_the_steps_of_the_real_run(way):
    """Same requests, same lengths: the two traces differ in their times alone."""
    clock = VirtualClock()
    scheduler = BATCHING[way](LIMITS, clock)
    real = run(scheduler, ContiguousExecutor(small_model(), 3, 64), some_requests(), clock)
    simulated = one_second_a_step(way, some_requests())
    timeless = [dataclasses.replace(step, start_time=0.0, end_time=0.0) for step in simulated.steps]
    assert real.requests == simulated.requests and real.steps == timeless


def plan_of(*shapes, row_length=None, padding_rows=0):
    """A plan of (start, number of tokens) parts that all sample."""
    parts = [ScheduledRequest(f"{i}", start, n, True, "decode") for i, (start, n) in enumerate(shapes)]
    rows = [f"ended {i}" for i in range(padding_rows)]
    tokens = sum(n for _, n in shapes)
    return SchedulerOutput(0, 0.0, others=parts, num_tokens=tokens, row_length=row_length, padding_rows=rows)


def test_work_counted_by_hand():
    ragged = plan_of((9, 1), (4, 1), (2, 3))
    assert StepWork.of(ragged) == StepWork(5, 3, 0, 1, 3, score_entries=2 * 10 + 3 * 5, keys_read=2 * 10 + 5)
    exact = StepWork.of_variable_length_kernel(ragged)
    assert exact == StepWork(5, 3, 0, 1, 3, score_entries=10 + 5 + (3 + 4 + 5), keys_read=10 + 5 + 5)
    padded = plan_of((9, 1), (2, 3), row_length=3, padding_rows=1)
    expected = StepWork(9, 3, 1, 0, 2, score_entries=3 * 3 * 10, keys_read=3 * 10)
    assert StepWork.of(padded) == StepWork.of_variable_length_kernel(padded) == expected


# --- cost models -----------------------------------------------------------------------------------------------------


@given(
    st.sampled_from([*SHAPES]),
    st.sampled_from([*CARDS]),
    st.sampled_from([0.0, 1e-3]),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 1000), st.booleans()), min_size=1, max_size=6),
)
def test_a_simulated_step_takes_what_costs_says_to_the_last_digit(shape, card, overhead, shapes):
    """Of the plan, with every count, and of the event that the step leaves in the trace."""
    parts = [ScheduledRequest(f"{i}", start, n, samples, "decode") for i, (start, n, samples) in enumerate(shapes)]
    plan = SchedulerOutput(0, 0.0, others=parts, num_tokens=sum(n for _, n, _ in shapes))
    roofline = preset(shape, card, overhead)
    simulated = roofline.seconds(roofline.work(plan))
    what = (SHAPES[shape], CARDS[card])
    keys, entries = sum(start + n for start, n, _ in shapes), sum(costs.causal_entries(k, k + n) for k, n, _ in shapes)
    rows = sum(samples for *_, samples in shapes)
    assert simulated == overhead + costs.step_seconds(*what, plan.num_tokens, rows, keys, entries)
    tokens = tuple(ScheduledTokens(f"{i}", k, n, "decode", num_sampled=int(s)) for i, (k, n, s) in enumerate(shapes))
    assert simulated == overhead + costs.trace_seconds(*what, [StepEvent(0, 0.0, 1.0, tokens)])
    if len(shapes) == 1 and rows and keys == plan.num_tokens:
        assert simulated == overhead + costs.prefill_seconds(*what, keys)
    if rows == len(shapes) == plan.num_tokens == 1:
        assert simulated == overhead + costs.decode_seconds(*what, keys)


def test_a_simulated_run_takes_what_costs_says_of_its_trace():
    clock, roofline = VirtualClock(), Roofline(LLAMA_2_7B, H200, launch_overhead=0.0)
    trace = run(BATCHING["continuous"](LIMITS, clock), SimulatedExecutor(roofline, clock), some_requests(), clock)
    expected = costs.trace_seconds(LLAMA_2_7B, H200, trace.steps)
    assert expected == pytest.approx(sum(step.end_time - step.start_time for step in trace.steps), rel=1e-9)
    assert len(trace.steps) > 20


@pytest.mark.parametrize("batch", [1, 64, 1000])
def test_a_simulated_decode_step_takes_what_costs_says_of_a_batch(batch):
    roofline = Roofline(LLAMA_2_7B, H200, launch_overhead=0.0)
    work = roofline.work(plan_of(*[(499, 1)] * batch))
    assert roofline.seconds(work) == costs.decode_seconds(LLAMA_2_7B, H200, 500, batch)


def test_a_roofline_adds_launches_and_cache():
    roofline = preset("Llama-2-7B", "h200")
    assert roofline.launch_overhead == pytest.approx(32 * 9 * 5e-6)
    one, two = (roofline.seconds(roofline.work(plan_of((context, 1)))) for context in (100, 101))
    assert two - one == pytest.approx(kv_bytes_per_token(LLAMA_2_7B) / H200.bandwidth)


def test_least_squares_without_negative_prices():
    rng = random.Random(0)
    rows = [[1.0, rng.random(), 1000 * rng.random()] for _ in range(50)]
    targets = [2.0 * a + 3.0 * b + 0.004 * c for a, b, c in rows]
    assert non_negative_least_squares(rows, targets) == pytest.approx([2.0, 3.0, 0.004])
    targets = [2.0 * a - 3.0 * b + 0.004 * c for a, b, c in rows]
    found = non_negative_least_squares(rows, targets)
    assert found[1] == 0.0 and min(found) >= 0.0


@pytest.mark.parametrize("disturbed", [0, 20])
def test_calibration_finds_the_prices_even_if_some_steps_were_disturbed(disturbed):
    measured = []
    for way in BATCHING:
        works = []
        one_second_a_step(way, some_requests(30), on_step=lambda plan, _, works=works: works.append(plan))
        measured += [(StepWork.of(plan), PRICES.seconds(StepWork.of(plan))) for plan in works]
    rng = random.Random(0)
    for i in rng.sample(range(len(measured)), disturbed):
        measured[i] = (measured[i][0], measured[i][1] * 50)
    fitted = Calibrated.fit(measured)
    for work, _ in measured:
        assert fitted.seconds(work) == pytest.approx(PRICES.seconds(work), rel=1e-3)


# --- the run loop ----------------------------------------------------------------------------------------------------


def test_requests_arrive_by_the_clock_and_idle_time_is_skipped():
    requests = [made_request("late", 10.5, 2, 1), made_request("early", 0.0, 2, 3), made_request("in step", 1.2, 2, 1)]
    trace = one_second_a_step("continuous", requests)
    assert [(step.start_time, {part.request_id for part in step.scheduled}) for step in trace.steps] == [
        (0.0, {"early"}),
        (1.0, {"early"}),
        (2.0, {"early", "in step"}),
        (10.5, {"late"}),
    ]
    assert [record.request_id for record in trace.requests] == ["early", "in step", "late"]


def test_requests_that_arrive_together_keep_their_order():
    requests = [made_request(name, arrival, 1, 1) for name, arrival in (("c", 1.0), ("a", 0.0), ("b", 0.0), ("d", 1.0))]
    trace = one_second_a_step("continuous", requests)
    assert [[part.request_id for part in step.scheduled] for step in trace.steps] == [["a", "b"], ["c", "d"]]


def test_a_request_that_can_never_run_stops_the_run():
    with pytest.raises(PromptError, match="max_model_len is 64"):
        one_second_a_step("continuous", [made_request("big", 0.0, 60, 60)])


def test_an_empty_plan_takes_no_time():
    clock = VirtualClock()
    output = SimulatedExecutor(PRICES, clock).execute_model(SchedulerOutput(0, 0.0))
    assert (output.token_ids, clock()) == ({}, 0.0)


def test_ways_of_batching_are_compared_on_the_same_requests():
    requests = some_requests(12)
    runs = compare_batching(requests, LIMITS, PRICES)
    assert list(runs) == ["static", "dynamic", "continuous"]
    assert all(request.output_token_ids == [] for request in requests), "the given ones are left as they are"
    tokens = sum(request.params.max_tokens for request in requests)
    for way, (trace, figures, finished) in runs.items():
        assert figures == report(trace) and figures.output_tokens == tokens
        assert (figures.utilisation == 1.0) == (way == "continuous")
        assert [len(request.output_token_ids) for request in finished] == [r.params.max_tokens for r in requests]
    makespan = {way: each.report.makespan for way, each in runs.items()}
    assert makespan["continuous"] < min(makespan["static"], makespan["dynamic"])


def test_ways_of_batching_are_compared_on_a_real_model_too():
    runs = compare_batching(some_requests(5), LIMITS, lambda: ContiguousExecutor(small_model(), 3, 64))
    outputs = [[request.output_token_ids for request in each.requests] for each in runs.values()]
    assert outputs[0] == outputs[1] == outputs[2] and runs["static"].report.makespan > 0


# --- reports ---------------------------------------------------------------------------------------------------------


def hand_made_trace():
    """Two requests in three steps of 1, 2 and 1 seconds; "b" ends first but leaves with "a", as in a static batch."""
    steps = [
        StepEvent(
            0,
            1.0,
            2.0,
            (
                ScheduledTokens("a", 0, 4, "prefill", 1),
                ScheduledTokens("b", 0, 1, "prefill", 1),
                ScheduledTokens("b", 0, 3, "padding"),
            ),
            num_waiting=2,
        ),
        StepEvent(
            1,
            2.0,
            4.0,
            (ScheduledTokens("a", 4, 1, "decode", 1), ScheduledTokens("b", 1, 1, "decode", 1)),
            num_waiting=1,
        ),
        StepEvent(
            2, 4.0, 5.0, (ScheduledTokens("a", 5, 1, "decode", 1), ScheduledTokens("b", 0, 1, "padding")), ("a", "b")
        ),
    ]
    return Trace([RequestRecord("a", 0.0, 4), RequestRecord("b", 0.5, 1)], steps)


def test_a_report_of_a_trace_made_by_hand():
    figures = report(hand_made_trace(), SLO(ttft=1.6, e2e=5.0))
    assert (figures.num_requests, figures.num_finished, figures.num_steps) == (2, 2, 3)
    assert figures.makespan == 5.0
    assert (figures.output_tokens, figures.output_tokens_per_second) == (5, 1.0)
    assert (figures.requests_per_second, figures.goodput) == (0.4, 0.2)  # only b's first token came in time
    assert figures.ttft == Spread(1.75, 1.5, 2.0, 2.0, 2.0)
    assert figures.itl == Spread(pytest.approx(5 / 3), 2.0, 2.0, 2.0, 2.0)
    assert figures.e2e == Spread(4.75, 4.5, 5.0, 5.0, 5.0)  # b waited for a
    assert (figures.computed_tokens, figures.useful_tokens, figures.utilisation) == (12, 8, 8 / 12)
    assert figures.mean_waiting == (2 * 1 + 1 * 2) / 5
    assert json.loads(json.dumps(figures.as_dict()))["slo"] == {"ttft": 1.6, "itl": None, "e2e": 5.0}
    assert str(figures).splitlines() == [
        "requests      2 of 2 finished in 5.00 s, 3 steps",
        "throughput    1.0 output tokens/s, 0.40 requests/s, goodput 0.20 requests/s",
        "tokens        12 computed, 8 useful (66.7%)",
        "mean waiting  0.8 requests",
        "                      mean         p50         p90         p99         max   (ms)",
        "TTFT               1750.00     1500.00     2000.00     2000.00     2000.00",
        "ITL                1666.67     2000.00     2000.00     2000.00     2000.00",
        "E2E                4750.00     4500.00     5000.00     5000.00     5000.00",
    ]


def test_a_limit_met_exactly_is_met_and_each_limit_counts():
    times = {"ttft": 1.5, "mean_itl": 2.0, "e2e": 4.5}
    exact = SLO(ttft=1.5, itl=2.0, e2e=4.5)
    assert exact.met_by(**times)
    for name, value in times.items():
        assert not exact.met_by(**{**times, name: math.nextafter(value, 9)})
    assert SLO().met_by(**dict.fromkeys(times, 1e9))


def test_a_report_counts_tokens_of_those_under_way_but_no_end_without_a_token():
    figures = ReportBuilder(SLO(itl=1.5))
    for request_id, arrival in ("late", 3.0), ("early", 1.0), ("aborted", 2.0), ("in flight", 2.0):
        figures.arrive(request_id, arrival)
    figures.add_step(4.0, 5.0, 8, 7, ["late", "early"], ["late", "aborted"], 2)
    figures.add_step(6.0, 6.5, 1, 1, ["early", "in flight"], [], 0)
    figures.add_step(7.0, 8.0, 1, 1, ["early"], ["early"], 1)
    report = figures.report()
    assert (report.num_requests, report.num_finished, report.num_steps, report.output_tokens) == (4, 2, 3, 5)
    assert (report.makespan, report.mean_waiting) == (7.0, 3 / 7)  # from the earliest arrival, whoever was told first
    assert (report.requests_per_second, report.goodput) == (2 / 7, 2 / 7)  # one token has no gap; gaps of 1.5 s are met
    assert report.e2e == Spread(4.5, 2.0, 7.0, 7.0, 7.0) and report.itl == Spread(1.5, 1.5, 1.5, 1.5, 1.5)
    assert (report.computed_tokens, report.useful_tokens) == (10, 9)


def test_the_trace_says_the_same_of_one_request():
    trace = hand_made_trace()
    assert (trace.ttft("b"), trace.end_to_end("b"), trace.inter_token_latencies("b")) == (1.5, 4.5, [2.0])


def test_a_run_that_was_cut_short_ends_with_its_last_token():
    trace = hand_made_trace()
    trace.steps.pop()
    assert trace.end_to_end("b") == 3.5


@pytest.mark.parametrize("way", BATCHING)
def test_a_streamed_report_is_that_of_the_trace(way):
    slo = SLO(ttft=6.0, itl=1.0, e2e=12.0)
    arrivals = {"arrivals": "poisson", "rate": 2.0}
    made = [make_requests(40, workload.uniform(1, 20), workload.uniform(1, 9), **arrivals) for _ in range(2)]
    figures = ReportBuilder(slo)
    assert one_second_a_step(way, made[0], trace=False, figures=figures) is None
    trace = one_second_a_step(way, made[1])
    assert figures.report() == report(trace, slo)
    assert 0 < figures.report().goodput < figures.report().requests_per_second


def test_a_report_before_the_first_step_is_empty():
    figures = report(Trace())
    assert (figures.makespan, figures.output_tokens_per_second, figures.utilisation) == (0.0, 0.0, 0.0)
    assert figures.ttft == Spread(None, None, None, None, None) and "-" in str(figures)


def test_a_run_that_took_no_time_has_no_rates():
    figures = ReportBuilder()
    figures.arrive("a", 1.0)
    figures.add_step(1.0, 1.0, 1, 1, ["a"], ["a"], 1)
    report = figures.report()
    assert (report.output_tokens, report.output_tokens_per_second, report.requests_per_second) == (1, 0.0, 0.0)


def test_percentiles_are_the_smallest_sample_that_so_many_do_not_exceed():
    assert spread(Counter(range(1, 101))) == Spread(50.5, 50, 90, 99, 100)
    assert spread(Counter(range(1, 1001))) == Spread(500.5, 500, 900, 990, 1000)
    assert spread(Counter([3.0])) == Spread(3.0, 3.0, 3.0, 3.0, 3.0)
    assert spread(Counter({1.0: 98, 2.0: 1, 9.0: 1})) == Spread(pytest.approx(1.09), 1.0, 1.0, 2.0, 9.0)


def test_the_knee_beyond_the_load_a_card_can_serve():
    """Twice the load the card can serve: the queue grows with the run; at half of it nobody waits."""
    p99 = {}
    for load in (0.5, 2.0):
        figures = ReportBuilder()
        requests = make_requests(300, workload.fixed(4), workload.fixed(4), arrivals="poisson", rate=load * 0.75)
        one_second_a_step("continuous", requests, trace=False, figures=figures)
        p99[load] = figures.report().ttft.p99
    assert p99[0.5] < 10 < 100 < p99[2.0]


# --- commands --------------------------------------------------------------------------------------------------------


def test_simulate_prints_and_writes_a_report(capsys, tmp_path):
    options = [
        "--requests",
        "40",
        "--arrivals",
        "poisson",
        "--rate",
        "50",
        "--slo-ttft-ms",
        "20",
        "--output-length",
        "9",
    ]
    for way in BATCHING:
        file = tmp_path / f"{way}.json"
        assert cli.main(["simulate", "--batching", way, *options, "--json", str(file)]) == 0
        written = json.loads(file.read_text())
        assert written["settings"]["batching"] == way and written["report"]["output_tokens"] == 40 * 9
        assert "40 of 40 finished" in capsys.readouterr().out


def test_simulate_asks_the_policy_who_goes_first(capsys, tmp_path):
    """Two requests, one place: the shorter job comes second in the file."""
    lengths = [{"num_prompt_tokens": 3, "num_output_tokens": length} for length in (50, 4)]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lengths))
    options = ["--file", str(tmp_path / "requests.jsonl"), "--max-num-seqs", "1", "--trace", str(tmp_path / "t.jsonl")]
    for policy, first in (("fcfs", "req 0"), ("sjf", "req 1")):
        assert cli.main(["simulate", "--policy", policy, *options]) == 0
        assert load_trace(tmp_path / "t.jsonl").steps[0].scheduled[0].request_id == first
    capsys.readouterr()


def test_a_simulated_trace_can_be_drawn(capsys, tmp_path):
    assert cli.main(["simulate", "--requests", "3", "--output-length", "4", "--trace", str(tmp_path / "t.jsonl")]) == 0
    assert cli.main(["trace", str(tmp_path / "t.jsonl")]) == 0
    assert "req 2" in capsys.readouterr().out


@pytest.mark.parametrize("way", BATCHING)
def test_requests_of_one_id_in_a_file_are_told_apart(capsys, tmp_path, way):
    """Whether they follow each other or are in flight together."""
    lines = [{"request_id": "a", "arrival_time": time} for time in (0.0, 0.0, 9.0)] + [{"request_id": "a#2"}]
    lengths = {"num_prompt_tokens": 3, "num_output_tokens": 4}
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line | lengths) + "\n" for line in lines))
    trace = str(tmp_path / "t.jsonl")
    options = ["--file", str(tmp_path / "requests.jsonl"), "--batching", way, "--trace", trace]
    assert cli.main(["simulate", *options]) == 0
    said = capsys.readouterr().out
    assert cli.main(["trace", trace]) == 0
    drawn = capsys.readouterr().out
    for name in ("a", "a#2", "a#3", "a#2#2"):
        assert f"\n{name} " in drawn
    assert "4 of 4 finished" in said and "4 of 4 finished" in drawn


def test_a_second_life_in_a_run_is_reported_by_steps_and_by_the_trace_alike():
    lives = [made_request("a", time, 3, 4) for time in (0.0, 50.0)]
    figures, clock = ReportBuilder(), VirtualClock()
    scheduler = BATCHING["continuous"](SchedulerConfig(2, 16, 64), clock)
    trace = run(scheduler, SimulatedExecutor(preset("Llama-2-7B", "a100"), clock), lives, clock, figures=figures)
    assert figures.report() == report(trace) and report(trace).num_finished == 2
    assert [record.request_id for record in trace.requests] == ["a", "a#2"]


def test_simulate_reads_requests_from_a_file(capsys, tmp_path):
    workload.save_requests(tmp_path / "requests.jsonl", some_requests(3))
    assert cli.main(["simulate", "--file", str(tmp_path / "requests.jsonl"), "--model", "Qwen3-8B"]) == 0
    assert "3 of 3 finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--requests", "0"],
        ["--prompt-length", "many"],
        ["--output-length", "9-3"],
        ["--card", "x"],
        ["--launch-ms", "-1"],
    ],
)
def test_a_mistake_in_simulate_is_one_line(capsys, options):
    assert cli.main(["simulate", *options]) == cli.USER_ERROR
    out, err = capsys.readouterr()
    assert err.startswith("minillm: ") and err.count("\n") == 1 and out == ""


@pytest.fixture
def quick_bench(monkeypatch, tokenizer):
    """The benchmarks on a tiny random model, with prices instead of a calibration."""
    for module in (batching, simulator):
        monkeypatch.setattr(module, "load", lambda name: (small_model(), tokenizer))
        monkeypatch.setattr(module, "calibration_steps", lambda model, timer, seed: [])
        monkeypatch.setattr(module.Calibrated, "fit", lambda steps: PRICES)
    monkeypatch.setattr(batching, "MOST_NEW_TOKENS", 20)
    monkeypatch.setattr(measure, "MAX_MODEL_LEN", 300)


def test_bench_batching_measures_and_writes(capsys, tmp_path, quick_bench):
    file = tmp_path / "batching.json"
    options = ["--requests", "6", "--repeats", "2", "--max-num-seqs", "3", "--json", str(file)]
    assert cli.main(["bench", "batching", *options]) == 0
    written = json.loads(file.read_text())
    ratio = written["ratio_continuous_over_static"]
    assert len(ratio["repeats"]) == 2 and ratio["median"] == pytest.approx(sum(ratio["repeats"]) / 2)
    assert written["simulated_ratio"] > 0 and {"machine", "date", "torch", "python", "minillm"} <= written.keys()
    continuous, static = written["batching"]["continuous"], written["batching"]["static"]
    assert (
        continuous["computed_tokens"]
        == continuous["useful_tokens"]
        == static["useful_tokens"]
        < static["computed_tokens"]
    )
    assert written["identical_outputs"] and "identical in every token" in capsys.readouterr().out


def end_early(monkeypatch, *runs):
    """In these runs, counted from 0, the last of six requests ends before its time."""
    right, made = measure.fresh, itertools.count()

    def sometimes_shorter(request):
        copy = right(request)
        copy.num_tokens_at_most -= 3 if next(made) in [6 * run + 5 for run in runs] else 0
        return copy

    monkeypatch.setattr(measure, "fresh", sometimes_shorter)
    monkeypatch.setattr("minillm.engine.request.finish_reason", lambda *_: ("length", None))


def test_bench_batching_does_not_accept_other_tokens_in_float64(quick_bench, monkeypatch):
    end_early(monkeypatch, 1, 4)  # dynamic batching, in float32 and again in float64
    with pytest.raises(AssertionError, match="other tokens than static batching for req 5"):
        batching.main(["--requests", "6", "--repeats", "1"])


def test_bench_batching_says_where_float32_rounded(quick_bench, monkeypatch, capsys):
    end_early(monkeypatch, 1)
    assert batching.main(["--requests", "6", "--repeats", "1"]) == 0
    assert "identical in float64; float32 rounded req 5 differently" in capsys.readouterr().out


def test_bench_simulator_measures_and_writes(capsys, tmp_path, quick_bench, monkeypatch):
    monkeypatch.setattr(simulator, "WORKLOADS", simulator.WORKLOADS[2::4])
    file = tmp_path / "simulator.json"
    assert cli.main(["bench", "simulator", "--repeats", "1", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert len(written["workloads"]) == 2 and math.isfinite(written["median_error"])
    assert written["prices"].keys() == vars(PRICES).keys()
    assert "median error" in capsys.readouterr().out


def test_new_requests_are_told_once():
    clock = VirtualClock()
    told = []
    scheduler = BATCHING["continuous"](LIMITS, clock)
    run(
        scheduler,
        SimulatedExecutor(PRICES, clock),
        some_requests(7),
        clock,
        on_step=lambda plan, _: told.extend(plan.new_requests),
    )
    assert sorted(new.request_id for new in told) == [f"req {i}" for i in range(7)]
    assert all(isinstance(new, NewRequest) for new in told)
