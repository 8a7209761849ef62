"""An engine that launches each step before it reads the last one says what one says that does not."""

import dataclasses
import os
import signal

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from minillm import LLM, EngineConfig, LLMEngine, SamplingParams
from minillm.engine.block_manager import BlockManager
from minillm.engine.llm_engine import HeldInterrupts
from minillm.engine.request import Request
from minillm.engine.scheduler import PREEMPTION_MODES, Scheduler, SchedulerConfig, StepOrderError
from minillm.errors import ConfigError, WorkerDiedError
from minillm.runtime.plan import ModelOutput
from minillm.runtime.runner import Runner
from minillm.trace.chrome import DEVICE, HOST, chrome_trace
from minillm.trace.files import load_trace, save_trace
from minillm.viz import BlockTableSteps, PoolUse, Timeline
from test_llm_engine import PROMPT, TEN, alone, assert_idle, make_engine, run
from tiny_models import random_token_ids

KIND = "llama"
STOPS = SamplingParams(max_tokens=30, stop_token_ids=range(0, 200, 3))  # soon, but not at once


def make_async(folder, **changes):
    return make_engine(folder, async_scheduling=True, **changes)


@pytest.fixture(scope="module")
def both(checkpoint):
    """Engines that differ in nothing but when they read their steps, one pair for each way to preempt."""
    pairs = {}
    for mode in PREEMPTION_MODES:
        changes = {"preemption_mode": mode, "scheduling_policy": "priority"}
        pairs[mode] = (make_engine(checkpoint(KIND), **changes), make_async(checkpoint(KIND), **changes))
    return pairs


class Recorder:
    """Wraps an executor, and records when a step is launched and when it is read."""

    def __init__(self, engine):
        self.calls, self.plans, self.right = [], [], engine.executor.launch
        engine.executor.launch = self.launch

    def launch(self, plan):
        self.plans.append(plan)
        step = len(self.plans) - 1
        self.calls.append(("launch", step))
        return Recorded(self, step, self.right(plan))


class Recorded:
    def __init__(self, recorder, step, pending):
        self.recorder, self.step, self.pending = recorder, step, pending

    def result(self):
        self.recorder.calls.append(("read", self.step))
        return self.pending.result()


# --- the same tokens -------------------------------------------------------------------------------------------------

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8, 2.0]),
    seed=st.integers(0, 5),
    max_tokens=st.sampled_from([1, 2, 5, 12, 20]),
    stop_token_ids=st.sampled_from([(), (), range(0, 200, 5)]),
    logprobs=st.sampled_from([None, None, 2]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 1.2]),
    min_tokens=st.sampled_from([0, 0, 1]),
    prompt_logprobs=st.sampled_from([None, None, 1]),
)
REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 18),  # length of its prompt
        st.booleans(),  # it begins as others do
        PARAMS,
        st.sampled_from([1, 1, 1, 3]),  # outputs
        st.integers(-1, 1),  # priority
        st.integers(0, 6),  # steps before the next one arrives
        st.sampled_from(["final_only", "cumulative", "delta"]),
    ),
    min_size=1,
    max_size=8,
)


def outputs_of(engine, requests):
    """Add the requests as the steps go, and run to the end; what was said of each, in full."""
    told, outputs = {}, []
    for number, (length, shared, params, n, priority, pause, kind) in enumerate(requests):
        prompt = random_token_ids(length, seed=0 if shared else number + 1)
        if n > 1 and params.temperature:
            params = dataclasses.replace(params, n=n)
        engine.add_request(str(number), prompt, params, priority=priority, output_kind=kind)
        for _ in range(pause):
            outputs += engine.step()
    outputs += run(engine, 2000)
    for output in outputs:
        for each in output.outputs:
            key = output.request_id, each.index
            if requests[int(output.request_id)][-1] == "delta":
                before, scores = told.get(key, ([], [], None))[:2]
                told[key] = (before + each.token_ids, scores + (each.logprobs or []), each.finish_reason)
            else:
                told[key] = (each.token_ids, each.logprobs or [], each.finish_reason)
    return told


def assert_same_logprobs(scores, expected):
    """Equal up to rounding, which depends on the other requests in a step."""
    assert [list(each) for each in scores] == [list(each) for each in expected]
    for each, other in zip(scores, expected, strict=True):
        assert [entry.logprob for entry in each.values()] == pytest.approx([entry.logprob for entry in other.values()])


@pytest.mark.parametrize("mode", PREEMPTION_MODES)
def test_every_request_says_the_same(both, mode):
    synchronous, ahead = both[mode]

    @settings(max_examples=12, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(REQUESTS)
    def check(requests):
        told, expected = outputs_of(ahead, requests), outputs_of(synchronous, requests)
        assert {key: (ids, reason) for key, (ids, _, reason) in told.items()} == {
            key: (ids, reason) for key, (ids, _, reason) in expected.items()
        }
        for key, (_, scores, _) in told.items():
            assert_same_logprobs(scores, expected[key][1])
        assert_idle(ahead)

    check()
    preempted = {each.mode for step in ahead.trace.steps for each in step.preempted}
    assert mode in preempted and any(part.why == "recompute" for step in ahead.trace.steps for part in step.scheduled)


def test_it_finds_a_token_that_went_to_the_wrong_request(checkpoint, monkeypatch):
    right = Runner._keep
    monkeypatch.setattr(Runner, "_keep", lambda self, places, token_ids: right(self, places.roll(1), token_ids))
    engine = make_async(checkpoint(KIND))
    prompts = {"a": PROMPT, "b": random_token_ids(5, seed=8)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, TEN, output_kind="final_only")
    told = {output.request_id: output.outputs[0].token_ids for output in run(engine)}
    assert told != {name: alone(engine, prompt, TEN) for name, prompt in prompts.items()}


def test_text_streams_and_stop_strings_are_the_same():
    texts = {}
    for ahead in (False, True):
        with LLM(num_blocks=100, max_model_len=200, async_scheduling=ahead, verbose=False) as llm:
            whole = llm.generate("Once upon a time", SamplingParams(max_tokens=40), use_tqdm=False)[0].outputs[0].text
            stop = whole[60:64]
            params = SamplingParams(max_tokens=40, stop=stop)
            cut = llm.generate(["Once upon a time", "The fox"], params, use_tqdm=False)
            streamed = "".join(output.outputs[0].text for output in llm.stream("Once upon a time", params))
            stream = llm.stream("The fox", SamplingParams(max_tokens=40))
            next(stream)
            stream.close()  # with a step in flight
            assert_idle(llm.engine)
            texts[ahead] = [whole, streamed, *[output.outputs[0].text for output in cut]]
            assert cut[0].outputs[0].stop_reason == stop and streamed == cut[0].outputs[0].text
    assert texts[True] == texts[False]


# --- when steps are launched and read --------------------------------------------------------------------------------


def test_each_step_is_launched_before_the_one_before_is_read(checkpoint):
    engine = make_async(checkpoint(KIND))
    recorder = Recorder(engine)
    engine.add_request("a", PROMPT, TEN)
    outputs = run(engine)
    order = [("launch", 0)]
    for step in range(9):
        order += [("launch", step + 1), ("read", step)]
    assert recorder.calls == [*order, ("read", 9)]
    assert len(outputs) == 10
    computed = [(part.start, part.num_tokens) for plan in recorder.plans for part in plan.scheduled]
    assert computed == [(0, len(PROMPT)), *((len(PROMPT) + number, 1) for number in range(9))]


def test_a_synchronous_engine_reads_each_step_before_the_next_is_planned(checkpoint):
    engine = make_engine(checkpoint(KIND))
    recorder = Recorder(engine)
    engine.add_request("a", PROMPT, TEN)
    run(engine)
    assert recorder.calls == [(what, step) for step in range(10) for what in ("launch", "read")]


def test_nothing_is_computed_for_nothing_but_one_token_after_an_end_nobody_foresaw(checkpoint):
    """By length: none. By a stop id: one, for each request that does not reach its length there anyway."""
    computed = {}
    for ahead in (False, True):
        engine = make_engine(checkpoint(KIND), async_scheduling=ahead, num_blocks=60)
        recorder = Recorder(engine)
        ended = []
        for number in range(8):
            params = [TEN, STOPS, SamplingParams(max_tokens=1)][number % 3]
            engine.add_request(str(number), random_token_ids(3 + number, seed=number), params, output_kind="final_only")
        while engine.has_unfinished_requests():
            ended += [output.outputs[0] for output in engine.step()]
        stopped = sum(each.finish_reason == "stop" for each in ended)
        engine.add_request("last", PROMPT, SamplingParams(max_tokens=1))
        run(engine)  # a step that is in flight when all have ended is read with the next
        computed[ahead] = sum(part.num_tokens for plan in recorder.plans for part in plan.scheduled)
        padding = [part for step in engine.trace.steps for part in step.scheduled if part.why == "padding"]
        assert len(padding) == (stopped if ahead else 0)
        assert all(part.num_sampled == 0 and part.num_tokens == 1 for part in padding)
        assert all(plan.num_requests for plan in recorder.plans)
    assert stopped == 3 and computed[True] - computed[False] == stopped


def test_plans_out_of_order_are_refused():
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=32)
    scheduler = Scheduler(config, block_manager=BlockManager(20, 4), depth=2)
    scheduler.add_request(Request("a", PROMPT, TEN))
    first, second = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(StepOrderError, match="2 plans are in flight"):
        scheduler.schedule()
    with pytest.raises(StepOrderError, match="step 1 are not the next"):
        scheduler.update(second, ModelOutput({"a": 3}, 0))
    assert [each.token_id for each in scheduler.update(first, ModelOutput({"a": 3}, 0))] == [3]


# --- ends, aborts and failures with a step in flight -----------------------------------------------------------------


def test_an_id_given_anew_while_its_old_step_is_in_flight(checkpoint):
    engine = make_async(checkpoint(KIND))
    other = random_token_ids(6, seed=4)
    engine.add_request("a", PROMPT, TEN)
    engine.step()
    assert engine.abort_request("a") and not engine.is_unfinished("a")
    engine.add_request("a", other, TEN, output_kind="final_only")
    assert [output.outputs[0].token_ids for output in run(engine)] == [alone(engine, other, TEN)]
    assert_idle(engine)


def test_after_an_abort_of_all_the_step_in_flight_is_read_with_the_next(checkpoint):
    engine = make_async(checkpoint(KIND))
    engine.add_request("a", PROMPT, TEN)
    engine.step()
    engine.abort_request("a")
    assert_idle(engine)
    assert engine.step() == [] and engine.step() == []
    engine.add_request("b", PROMPT, TEN, output_kind="final_only")
    assert run(engine)[0].outputs[0].token_ids == alone(engine, PROMPT, TEN)


@pytest.mark.parametrize("where", ["launch", "result", "Ctrl-C"])
@pytest.mark.parametrize("fails_at", range(5))
def test_a_failed_step_and_the_one_behind_it_are_as_if_they_had_not_been(checkpoint, where, fails_at):
    engine = make_async(checkpoint(KIND))
    right, launched = engine.executor.launch, []

    class Broken:
        def __init__(self, pending):
            self.pending = pending

        def result(self):
            if where == "result":
                self.pending.result()
                raise RuntimeError("lost")
            raise KeyboardInterrupt

    def launch(plan):
        launched.append(plan)
        if len(launched) != fails_at + 1:
            return right(plan)
        if where == "launch":
            raise RuntimeError("lost")
        return Broken(right(plan))

    engine.executor.launch = launch
    params = [TEN, SamplingParams(temperature=1.0, seed=4, max_tokens=6, ignore_eos=True)]
    prompts, outputs, failures = [random_token_ids(20), random_token_ids(7, seed=3)], [], 0
    for name, prompt, each in zip("ab", prompts, params, strict=True):
        engine.add_request(name, prompt, each, output_kind="final_only")
    while engine.has_unfinished_requests():
        try:
            outputs += engine.step()
        except (RuntimeError, KeyboardInterrupt):
            failures += 1
            assert engine.scheduler.block_manager.usage.used == 0 and not engine.scheduler.running
    assert failures == 1
    told = {output.request_id: output.outputs[0].token_ids for output in outputs}
    assert told == {name: alone(engine, *each) for name, *each in zip("ab", prompts, params, strict=True)}
    assert_idle(engine)


def test_a_row_of_nan_ends_that_request_alone(checkpoint):
    engine = make_async(checkpoint(KIND))
    expected = alone(engine, PROMPT, TEN)
    bad = next(token_id for token_id in range(199) if token_id not in PROMPT + expected)
    with torch.no_grad():
        engine.model.embed_tokens.weight[bad] = torch.nan
    for _ in range(2):
        engine.add_request("good", PROMPT, TEN)
        engine.add_request("bad", [*PROMPT[:8], bad], TEN)
        last = {output.request_id: output.outputs[0] for output in run(engine) if output.finished}
        assert last["good"].token_ids == expected
        assert (last["bad"].finish_reason, last["bad"].token_ids) == ("error", [])
        assert_idle(engine)


def test_a_shutdown_with_a_step_in_flight_is_clean(checkpoint):
    engine = make_async(checkpoint(KIND))
    engine.add_request("a", PROMPT, TEN)
    engine.step()
    engine.shutdown()
    engine.shutdown()
    assert_idle(engine)
    with pytest.raises(WorkerDiedError, match="shut down"):
        engine.step()


def test_a_worker_process_computes_while_the_next_step_is_planned_and_fails_all_when_it_dies(checkpoint):
    engine = make_async(checkpoint(KIND), worker="process")
    inline = make_engine(checkpoint(KIND))
    try:
        engine.add_request("a", PROMPT, TEN, output_kind="final_only")
        pid = engine.executor.workers[0].pid
        os.kill(pid, signal.SIGSTOP)
        for _ in range(2):
            assert engine._launch_next(HeldInterrupts())  # does not wait for the process
        os.kill(pid, signal.SIGCONT)
        assert run(engine)[0].outputs[0].token_ids == alone(inline, PROMPT, TEN)
        first, second = engine.trace.steps[:2]
        assert first.launched < first.device[0] and second.launched < first.end_time
        for name in "ab":
            engine.add_request(name, PROMPT, TEN)
        engine.step()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match="was killed by signal 9"):
            run(engine)
        with pytest.raises(WorkerDiedError, match="was killed by signal 9"):
            engine.step()
        assert_idle(engine)
    finally:
        engine.shutdown()


# --- the trace -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PREEMPTION_MODES)
def test_the_trace_of_overlapping_steps_can_be_drawn_and_kept(checkpoint, tmp_path, mode):
    engine = make_async(checkpoint(KIND), preemption_mode=mode)
    for number in range(7):
        params = [TEN, STOPS, SamplingParams(temperature=1.0, seed=number, n=2, max_tokens=9)][number % 3]
        engine.add_request(str(number), random_token_ids(3 + number, seed=number), params)
    run(engine)
    trace = engine.trace
    assert any(step.preempted for step in trace.steps)
    for before, step in zip(trace.steps, trace.steps[1:], strict=False):
        assert before.end_time <= step.start_time <= step.end_time
        assert before.device[1] <= step.device[0] <= step.device[1] <= step.end_time
        assert (step.start_time if step.planned is None else step.planned) <= step.launched
    assert sum(step.planned is not None for step in trace.steps) > len(trace.steps) / 2
    assert load_trace(save_trace(trace, tmp_path / "run.jsonl")) == trace
    for picture in (Timeline(trace), Timeline(trace, "steps"), PoolUse(trace, 4), BlockTableSteps(trace, 4)):
        assert picture.text()
    pool = PoolUse(trace, 4)
    assert all(share >= 0 for moment in pool.moments for share in moment.blocks.values())
    threads = {event["tid"] for event in chrome_trace(trace)["traceEvents"] if event["ph"] == "X"}
    assert {HOST, DEVICE} <= threads


def abort_one(engine, name):
    engine.add_request(name, random_token_ids(5, seed=9), TEN)
    for _ in range(3):
        engine.step()
    engine.abort_request(name)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("mode", PREEMPTION_MODES)
def test_the_pool_is_drawn_with_as_many_tokens_as_it_held(checkpoint, mode, ahead):
    """Nothing is shared here, so that tokens held and slots empty are all that used blocks have."""
    engine = make_engine(
        checkpoint(KIND), async_scheduling=ahead, preemption_mode=mode, enable_prefix_caching=False, num_blocks=12
    )
    abort_one(engine, "first")  # with a step in flight, and no other request
    for number in range(7):
        engine.add_request(str(number), random_token_ids(3 + number, seed=number), [TEN, TEN, STOPS][number % 3])
    abort_one(engine, "last")
    run(engine)
    engine.step()
    trace = engine.trace
    assert any(step.preempted for step in trace.steps)
    held = [moment.blocks["held"] * 4 for moment in PoolUse(trace, 4).moments]
    assert held == [step.cached_tokens for step in trace.steps]


def test_the_pool_can_be_drawn_after_a_failed_step(checkpoint):
    """The trace does not tell whose blocks went with it."""
    sizes = {"num_blocks": 60, "max_num_seqs": 8, "max_num_batched_tokens": 8}
    engine = make_engine(checkpoint(KIND), enable_prefix_caching=False, **sizes)
    right = engine.executor.launch
    for number in range(8):
        engine.add_request(str(number), random_token_ids(1, seed=number), TEN)
    for _ in range(9):
        engine.step()

    def broken(plan):
        engine.executor.launch = right
        raise RuntimeError("lost")

    engine.executor.launch = broken
    with pytest.raises(RuntimeError, match="lost"):
        engine.step()
    run(engine)
    shares = [share for moment in PoolUse(engine.trace, 4).moments for share in moment.blocks.values()]
    assert min(shares) == 0


def test_as_many_tokens_are_in_the_trace_as_were_told(checkpoint):
    engine = make_async(checkpoint(KIND))
    for number in range(5):
        engine.add_request(str(number), random_token_ids(4, seed=number), STOPS, output_kind="final_only")
    told = {output.request_id: len(output.outputs[0].token_ids) for output in run(engine)}
    engine.step()
    assert {name: len(engine.trace.token_times(name)) for name in told} == told


# --- configuration ---------------------------------------------------------------------------------------------------


def test_it_is_on_where_something_else_computes_and_where_it_is_asked_for():
    def runs_ahead(device, **arguments):
        return EngineConfig(**arguments).resolved(100, device).async_scheduling

    assert runs_ahead("cpu", worker="process")
    assert runs_ahead("cuda:1") and runs_ahead(torch.device("cuda")) and not runs_ahead(torch.device("cpu"))
    assert runs_ahead("cpu", async_scheduling=True)
    assert not runs_ahead("cuda", async_scheduling=False)


@pytest.mark.parametrize("name", ["async_scheduling", "enforce_eager", "fused_ops", "attention_backend"])
def test_what_is_neither_on_nor_off_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 1; it must be "):
        EngineConfig(**{name: 1})


@pytest.mark.parametrize("ahead", [False, True])
def test_a_decoder_can_be_given(load, checkpoint, ahead):
    model = load(KIND)
    engine = LLMEngine(model, config=EngineConfig(num_blocks=20, max_model_len=40, async_scheduling=ahead))
    assert engine.model is model and engine.tokenizer is None
    engine.add_request("a", PROMPT, TEN, output_kind="final_only")
    (output,) = run(engine)[0].outputs
    assert (output.token_ids, output.text) == (alone(engine, PROMPT, TEN), None)
    with pytest.raises(ConfigError, match="loads the model itself"):
        LLMEngine(model, config=EngineConfig(worker="process"))


def test_options_reach_the_worker(load):
    config = EngineConfig(num_blocks=20, max_model_len=40, max_num_seqs=3, enforce_eager=True, fused_ops=False)
    engine = LLMEngine(load(KIND), config=config)
    assert engine.executor.workers[0].options is engine.config is engine.scheduler.config
    assert engine.config == dataclasses.replace(
        config, max_num_batched_tokens=512, num_host_blocks=0, async_scheduling=False
    )
