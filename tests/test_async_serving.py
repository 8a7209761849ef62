"""AsyncEngine: many coroutines and one engine on a thread of its own."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from minillm import SamplingParams
from minillm.engine import EngineConfig, LLMEngine
from minillm.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from minillm.errors import ConfigError, PromptError, SamplingParamsError, WorkerDiedError
from minillm.serving import AsyncEngine, DrainingError, QueueFullError, SlowReaderError, StepFailedError
from minillm.serving import async_engine as module
from minillm.serving.async_engine import merged
from minillm.trace import StepEvent, record_of
from test_llm_engine import CONFIG, PROMPT, TEN, THREE, alone, assert_idle, make_engine
from tiny_models import random_token_ids

LONG = SamplingParams(max_tokens=25, ignore_eos=True)
WAIT = 20.0  # seconds after which a test has hung


@contextlib.contextmanager
def serving(folder, *, max_queue=256, max_unread=1024, **changes):
    engine = AsyncEngine(make_engine(folder, **changes), max_queue=max_queue, max_unread=max_unread)
    try:
        yield engine
        engine.shutdown()
        assert_idle(engine._engine)
    finally:
        engine.shutdown()
    assert not engine._thread.is_alive()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, WAIT))


async def read(engine, request_id, prompt=PROMPT, params=TEN, **options):
    """The token ids of each output, and the last RequestOutput."""
    token_ids, last = {}, None
    async for last in engine.generate(request_id, prompt, params, **options):
        for part in last.outputs:
            token_ids.setdefault(part.index, []).extend(part.token_ids)
    return token_ids, last


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("llama")


@pytest.fixture(scope="module")
def expected(folder):
    """prompt, params -> the token ids that the engine gives on its own."""
    engine = make_engine(folder)
    return lambda prompt, params=TEN: alone(engine, prompt, params)


# --- requests --------------------------------------------------------------------------------------------------------


def test_many_coroutines_get_what_each_would_get_alone(folder, expected):
    prompts = [random_token_ids(3 + i % 7, seed=i) for i in range(20)]

    async def main(engine):
        return await asyncio.gather(*(read(engine, str(i), prompt) for i, prompt in enumerate(prompts)))

    with serving(folder) as engine:
        found = run(main(engine))
        assert max(len(set(batch)) for batch in batches(engine)) == CONFIG.max_num_seqs
    assert [tokens[0] for tokens, _ in found] == [expected(prompt) for prompt in prompts]
    assert all(last.finished for _, last in found)


@pytest.mark.parametrize("kind", ["delta", "cumulative", "final_only"])
def test_all_outputs_of_a_prompt_come_in_every_kind(folder, kind):
    one = make_engine(folder)
    one.add_request("a", PROMPT, THREE, output_kind="final_only")
    wanted = {}
    while one.has_unfinished_requests():
        for output in one.step():
            wanted = {part.index: part.token_ids for part in output.outputs}

    async def main(engine):
        outputs = [output async for output in engine.generate("a", PROMPT, THREE, output_kind=kind)]
        if kind == "delta":
            found = {}
            for output in outputs:
                for part in output.outputs:
                    found.setdefault(part.index, []).extend(part.token_ids)
            return found
        return {part.index: part.token_ids for part in outputs[-1].outputs}

    with serving(folder) as engine:
        assert run(main(engine)) == wanted


def test_text_is_the_same_streamed_and_not():
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=3, stop=("zzz",))

    async def main(engine):
        text = ""
        async for output in engine.generate("a", "Once upon a time", params):
            text += output.outputs[0].text
        async for output in engine.generate("a", "Once upon a time", params, output_kind="final_only"):
            return text, output.outputs[0].text

    engine = AsyncEngine(LLMEngine(config=EngineConfig(num_blocks=130)))
    try:
        text, whole = run(main(engine))
    finally:
        engine.shutdown()
    assert text == whole != ""


def test_errors_come_with_the_first_output_and_leave_nothing(folder):
    cases = [
        ([], TEN, {}, PromptError),
        ("text", TEN, {}, PromptError),  # there is no tokenizer
        ("text" * 1_000, TEN, {}, PromptError),
        ([1] * 41, TEN, {}, PromptError),
        ([10**6], TEN, {}, PromptError),
        (PROMPT, SamplingParams(max_tokens=10**6), {}, PromptError),
        (PROMPT, SamplingParams(stop="x"), {}, SamplingParamsError),
        (PROMPT, TEN, {"priority": 3}, ConfigError),
        (PROMPT, TEN, {"output_kind": "whole"}, ConfigError),
    ]

    async def main(engine):
        for number, (prompt, params, options, error) in enumerate(cases):
            stream = engine.generate(f"a{number}", prompt, params, **options)
            with pytest.raises(error):
                await anext(stream)
        with pytest.raises(PromptError, match="request_id"):
            await anext(engine.generate(7, PROMPT))
        await engine.control(paused=True)
        first = asyncio.create_task(read(engine, "same"))
        await until(lambda: engine.num_waiting)
        with pytest.raises(PromptError, match="in use"):
            await anext(engine.generate("same", PROMPT))
        await engine.control(paused=False)
        await first

    with serving(folder) as engine:
        run(main(engine))
        assert [record.request_id for record in engine._engine.trace.requests] == ["same"]


def test_who_stops_reading_ends_the_request_within_two_steps(folder):
    async def main(engine):
        stream = engine.generate("a", PROMPT, THREE)
        await anext(stream)
        num_steps = len(engine._engine.scheduler.recorder._steps)
        await stream.aclose()
        await until(lambda: not engine._engine.has_unfinished_requests())
        assert len(engine._engine.scheduler.recorder._steps) <= num_steps + 3  # those before it was closed count too

        waits = asyncio.create_task(read(engine, "b", params=LONG))  # by cancelling, while it is read
        await until(lambda: engine.num_running)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        await until(lambda: not engine._engine.has_unfinished_requests())
        assert engine.cache_usage == 0

    with serving(folder) as engine:
        run(main(engine))


def test_one_that_waits_in_the_queue_can_be_ended_too(folder):
    async def main(engine):
        await engine.control(paused=True)
        tasks = [asyncio.create_task(read(engine, str(i), params=LONG)) for i in range(6)]
        await until(lambda: engine._engine.scheduler.num_unfinished == 6)
        tasks[5].cancel()
        await until(lambda: engine._engine.scheduler.num_unfinished == 5)
        await engine.control(paused=False)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [len(each[0][0]) for each in found[:5]] == [25] * 5
        assert isinstance(found[5], asyncio.CancelledError)

    with serving(folder) as engine:
        run(main(engine))
        assert "5" not in {part.request_id for step in engine._engine.trace.steps for part in step.scheduled}


def test_an_abort_is_told_to_the_reader(folder):
    async def main(engine):
        await engine.control(paused=True)
        task = asyncio.create_task(read(engine, "a", params=LONG))
        await until(lambda: engine._engine.scheduler.num_unfinished)
        await engine.control(step=4)
        await until(lambda: len(engine._engine.scheduler.recorder._steps) == 4)
        assert await engine.abort("a") and not await engine.abort("a")
        tokens, last = await task
        assert last.finished and last.outputs[0].finish_reason == "abort"
        assert len(tokens[0]) == 4  # nothing that was told before is lost

    with serving(folder) as engine:
        run(main(engine))


# --- too much --------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_says_when_to_come_back(folder, expected):
    prompts = [random_token_ids(5, seed=i) for i in range(200)]

    async def main(engine):
        tasks = [read(engine, str(i), prompt) for i, prompt in enumerate(prompts)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    with serving(folder, max_queue=6) as engine:
        found = run(main(engine))
    refused = [each for each in found if isinstance(each, QueueFullError)]
    assert len(refused) + sum(isinstance(each, tuple) for each in found) == 200
    assert len(refused) >= 150  # they came at once, and 4 run while 6 wait
    assert all(1 <= each.retry_after <= 60 for each in refused)
    for prompt, each in zip(prompts, found, strict=True):
        if isinstance(each, tuple):
            assert each[0][0] == expected(prompt)


def test_a_reader_that_does_not_read_is_ended_and_the_others_go_on(folder, expected):
    async def main(engine):
        await engine.control(paused=True)
        slow = engine.generate("slow", PROMPT, LONG)
        first = asyncio.create_task(anext(slow))
        await until(lambda: engine.num_waiting)
        await engine.control(step=1)
        await first
        await engine.control(paused=False)
        tokens, _ = await read(engine, "quick", params=TEN)
        await until(lambda: not engine._engine.has_unfinished_requests())
        with pytest.raises(SlowReaderError, match="12 outputs"):
            await anext(slow)
        return tokens

    with serving(folder, max_unread=12) as engine:  # more than the quick one can have
        assert run(main(engine))[0] == expected(PROMPT)
        assert len(engine._engine.trace.token_times("slow")) < 25


def test_what_was_not_fetched_comes_as_one(folder, expected):
    async def main(engine):
        stream = engine.generate("a", PROMPT, TEN)
        outputs = [await anext(stream)]
        await until(lambda: not engine._engine.has_unfinished_requests())
        await asyncio.sleep(0.01)
        outputs += [output async for output in stream]
        assert len(outputs) <= 2 and outputs[-1].finished  # one, if the first was fetched late
        return [token_id for output in outputs for token_id in output.outputs[0].token_ids]

    with serving(folder) as engine:
        assert run(main(engine)) == expected(PROMPT)


def test_outputs_that_are_no_deltas_come_one_by_one_however_late(folder, expected):
    async def main(engine):
        stream = engine.generate("a", PROMPT, TEN, output_kind="cumulative")
        await anext(stream)
        await until(lambda: not engine._engine.has_unfinished_requests())
        await asyncio.sleep(0.01)
        return [output async for output in stream]

    with serving(folder) as engine:
        rest = run(main(engine))
    assert [len(output.outputs[0].token_ids) for output in rest] == list(range(2, 11))
    assert rest[-1].outputs[0].token_ids == expected(PROMPT) and rest[-1].finished


def test_deltas_are_merged_output_by_output():
    def output(*parts, **others):
        metrics = RequestMetrics(0.0, 1.0, others.pop("time", 2.0))
        values = {"finished": False, "num_cached_tokens": 0, "metrics": metrics} | others
        return RequestOutput("a", "p", [1], [CompletionOutput(*part) for part in parts], **values)

    first = output((0, "a", [1], -1.0, [{1: None}]), (1, "b", [2], None, None), prompt_logprobs=[None])
    second = output((2, "c", [3], None, None), (0, "d", [4], -2.0, [{4: None}], "stop", 4), finished=True, time=3.0)
    both = merged(first, second)
    parts = {part.index: part for part in both.outputs}
    assert sorted(parts) == [0, 1, 2] and both.finished and both.prompt_logprobs == [None]
    assert parts[0] == CompletionOutput(0, "ad", [1, 4], -2.0, [{1: None}, {4: None}], "stop", 4)
    assert (parts[1].text, parts[2].text, both.metrics.last_token_time) == ("b", "c", 3.0)


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_row_of_nan_ends_that_request_alone(folder, expected):
    bad = next(each for each in range(100) if each not in PROMPT and each not in expected(PROMPT))
    engine = AsyncEngine(make_engine(folder))
    engine._engine.model.embed_tokens.weight.data[bad] = torch.nan

    async def main():
        return await asyncio.gather(read(engine, "good"), read(engine, "bad", [bad, *PROMPT]))

    try:
        (good, _), (_, last) = run(main())
    finally:
        engine.shutdown()
    assert good[0] == expected(PROMPT)
    assert last.finished and last.outputs[0].finish_reason == "error"


@pytest.mark.parametrize("num_failures", [1, 2, 3])
def test_a_step_that_fails_is_tried_again_but_not_for_ever(folder, expected, monkeypatch, num_failures):
    async def main(engine):
        launch, left = engine._engine.executor.launch, [num_failures]

        def fail(plan):
            if left[0] > 0 and plan.step >= 3:
                left[0] -= 1
                raise RuntimeError("the device hiccups")
            return launch(plan)

        engine._engine.executor.launch = fail
        if num_failures < module.MOST_FAILED_STEPS:
            assert (await read(engine, "a"))[0][0] == expected(PROMPT)
        else:
            with pytest.raises(StepFailedError, match="device hiccups"):
                await read(engine, "a")
        assert left == [0]
        await engine.check_health()
        assert (await read(engine, "b"))[0][0] == expected(PROMPT)

    with serving(folder) as engine:
        run(main(engine))


def test_a_worker_that_is_killed_fails_every_stream_and_the_health(folder):
    engine = AsyncEngine(make_engine(folder, worker="process"))
    pid = engine._engine.executor.workers[0].pid

    async def main():
        await engine.check_health()
        streams = [engine.generate(str(i), PROMPT, LONG) for i in range(3)]
        for stream in streams:
            await anext(stream)
        os.kill(pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(WorkerDiedError, match="killed by signal 9"):
                async for _ in stream:
                    pass
        with pytest.raises(WorkerDiedError):
            await engine.check_health()
        with pytest.raises(WorkerDiedError):
            await anext(engine.generate("late", PROMPT, TEN))
        await engine.drain(1.0)

    try:
        run(main())
    finally:
        engine.shutdown()


def test_a_worker_that_dies_while_nothing_runs_is_noticed(folder):
    engine = AsyncEngine(make_engine(folder, worker="process"))

    async def main():
        os.kill(engine._engine.executor.workers[0].pid, signal.SIGKILL)
        while True:
            try:
                await engine.check_health()
            except WorkerDiedError as error:
                assert "killed by signal 9" in str(error)
                return
            await asyncio.sleep(0.001)

    try:
        run(main())
    finally:
        engine.shutdown()


def test_a_bug_on_the_thread_lets_nobody_wait(folder, monkeypatch):
    engine = AsyncEngine(make_engine(folder))

    async def main():
        stream = engine.generate("a", PROMPT, LONG)
        await anext(stream)
        monkeypatch.setattr(engine, "_take", lambda output: 1 / 0)
        with pytest.raises(WorkerDiedError, match="ZeroDivisionError"):
            async for _ in stream:
                pass
        with pytest.raises(WorkerDiedError):
            await anext(engine.generate("b", PROMPT))
        with pytest.raises(WorkerDiedError):
            await engine.check_health()

    run(main())
    engine.shutdown()


# --- the end ---------------------------------------------------------------------------------------------------------


def test_draining_ends_what_has_begun_and_takes_nothing_new(folder, expected):
    async def main(engine):
        await engine.control(paused=True)
        task = asyncio.create_task(read(engine, "a"))
        await until(lambda: engine._engine.scheduler.num_unfinished)
        hears = engine.subscribe()
        await anext(hears)
        drained = asyncio.create_task(engine.drain(WAIT))
        await until(lambda: engine._draining)
        with pytest.raises(DrainingError):
            await anext(engine.generate("b", PROMPT))
        with pytest.raises(DrainingError):
            await engine.check_health()
        await drained
        with pytest.raises(DrainingError):
            async for _ in hears:
                pass
        with pytest.raises(DrainingError):
            await anext(engine.subscribe())
        return (await task)[0][0]

    with serving(folder) as engine:
        assert run(main(engine)) == expected(PROMPT)


def test_what_has_not_ended_in_time_is_aborted(folder):
    async def main(engine):
        step = engine._engine.step

        def slow():
            time.sleep(0.05)
            return step()

        engine._engine.step = slow
        task = asyncio.create_task(read(engine, "a", params=LONG))
        await until(lambda: engine.num_running)
        began = time.monotonic()
        await engine.drain(0.2)
        assert 0.2 <= time.monotonic() - began < 1.0
        _, last = await task
        assert last.outputs[0].finish_reason == "abort"

    with serving(folder) as engine:
        run(main(engine))


def test_shutdown_ends_the_thread_and_tells_who_waits(folder):
    engine = AsyncEngine(make_engine(folder))

    async def main():
        await engine.control(paused=True)
        task = asyncio.create_task(read(engine, "a", params=LONG))
        await until(lambda: engine._engine.scheduler.num_unfinished)
        await asyncio.to_thread(engine.shutdown)
        with pytest.raises(WorkerDiedError, match="shut down"):
            await task

    before = threading.active_count() - 1
    run(main())
    engine.shutdown()
    assert threading.active_count() <= before + 1  # asyncio's own pool may stay
    with pytest.raises(ConfigError, match="trace"):
        AsyncEngine(make_engine(folder, trace=False))


# --- the engine as a whole -------------------------------------------------------------------------------------------


def batches(engine):
    """Who took part in each step."""
    return [sorted(part.request_id for part in step.scheduled) for step in engine._engine.trace.steps]


def burst(engine, lengths, **control):
    async def main():
        await engine.control(paused=True, **control)
        tasks = [
            asyncio.create_task(read(engine, str(i), random_token_ids(5, seed=i), SamplingParams(max_tokens=length)))
            for i, length in enumerate(lengths)
        ]
        await until(lambda: engine._engine.scheduler.num_unfinished == len(lengths))
        await engine.control(paused=False)
        return [tokens[0] for tokens, _ in await asyncio.gather(*tasks)]

    return run(main())


def test_static_batches_end_together_and_take_more_steps(folder):
    lengths = [2, 9, 3, 8, 2, 9, 3, 8]
    with serving(folder) as engine:
        continuous = burst(engine, lengths)
        num_steps = len(batches(engine))
    with serving(folder) as engine:
        static = burst(engine, lengths, batching="static")
        steps = batches(engine)
    assert static == continuous
    last_of_first = max(i for i, batch in enumerate(steps) if set(batch) & set("0123"))
    first_of_second = min(i for i, batch in enumerate(steps) if set(batch) & set("4567"))
    assert first_of_second == last_of_first + 1
    assert len(steps) > num_steps


def test_a_static_batch_that_the_budget_cuts_fills_in_the_next_step(folder):
    with serving(folder) as engine:
        burst(engine, [6, 6, 6, 6], batching="static", max_num_batched_tokens=8)
        steps = batches(engine)
    assert "0" in steps[0] and "3" not in steps[0]
    assert ["0", "1", "2", "3"] in steps


def test_limits_are_changed_and_kept_within_those_of_the_start(folder):
    async def main(engine):
        told = [await engine.control(max_num_seqs=2, max_num_batched_tokens=6)]
        for wrong in (
            {"max_num_seqs": 5},
            {"max_num_seqs": 0},
            {"max_num_seqs": True},
            {"max_num_batched_tokens": 1},
            {"max_num_batched_tokens": 17},
            {"batching": "dynamic"},
            {"batching": ["static"]},
            {"paused": 1},
            {"step": 0},
            {"max_num_seqs": 1, "batching": "x"},
        ):
            with pytest.raises(ConfigError):
                await engine.control(**wrong)
            told.append(await engine.control())
        assert all(each == told[0] for each in told)
        assert (told[0]["max_num_seqs"], told[0]["most_num_seqs"], told[0]["batching"]) == (2, 4, "continuous")
        return await asyncio.gather(*(read(engine, str(i)) for i in range(5)))

    with serving(folder) as engine:
        run(main(engine))
        steps = engine._engine.trace.steps
        assert max(len(step.scheduled) for step in steps) == 2
        assert max(step.num_tokens for step in steps) == 6


def test_limits_lowered_below_what_runs_let_it_run_on(folder, expected):
    async def main(engine):
        await engine.control(paused=True)
        tasks = [asyncio.create_task(read(engine, str(i), params=LONG)) for i in range(6)]
        await until(lambda: engine._engine.scheduler.num_unfinished == 6)
        await engine.control(step=5)
        await until(lambda: len(engine._engine.scheduler.recorder._steps) >= 5)
        assert engine.num_running == 4
        await engine.control(max_num_seqs=1, max_num_batched_tokens=1)
        await engine.control(paused=False)
        return [tokens[0] for tokens, _ in await asyncio.gather(*tasks)]

    with serving(folder, num_blocks=60) as engine:
        assert run(main(engine)) == [expected(PROMPT, LONG)] * 6
        assert len(engine._engine.trace.steps[-1].scheduled) == 1


def test_a_halted_engine_computes_the_steps_that_are_asked_for(folder):
    async def main(engine):
        await engine.control(paused=True)
        task = asyncio.create_task(read(engine, "a"))
        await until(lambda: engine._engine.scheduler.num_unfinished)
        for number in range(1, 4):
            await engine.control(step=1)
            await until(lambda number=number: len(engine._engine.scheduler.recorder._steps) == number)
            await asyncio.sleep(0.01)
            assert len(engine._engine.scheduler.recorder._steps) == number
        await engine.control(paused=False)
        await task

    with serving(folder) as engine:
        run(main(engine))


def test_a_subscriber_hears_what_the_trace_says(folder):
    async def main(engine):
        await read(engine, "before")
        records, hears = [], engine.subscribe()
        header = await anext(hears)
        assert header == {"format": "minillm trace", "version": 1, "live": True}
        records.append(await anext(hears))
        before = [await anext(hears) for _ in range(1 + len(engine._engine.scheduler.recorder._steps))]
        await asyncio.gather(read(engine, "a"), read(engine, "b", params=THREE), read(engine, "a.1", params=TEN))
        await engine.control(max_num_seqs=3)
        async for record in hears:
            records.append(record)
            if "config" in record:
                break
        await hears.aclose()
        return before, records

    with serving(folder) as engine:
        before, records = run(main(engine))
        trace = engine._engine.trace
    assert [next(iter(each)) for each in before] == ["request"] + ["step"] * (len(before) - 1)
    lines = [each for each in before + records if "step" in each or "request" in each]
    assert [each["step"] for each in lines if "step" in each] == [record_of(step) for step in trace.steps]
    assert [each["request"] for each in lines if "request" in each] == [record_of(each) for each in trace.requests]
    assert (records[0]["config"]["max_num_seqs"], records[-1]["config"]["max_num_seqs"]) == (4, 3)
    told = {(each["tokens"]["request_id"], each["tokens"]["step"]) for each in records if "tokens" in each}
    sampled = {(part.request_id, step.step) for step in trace.steps for part in step.scheduled if part.num_sampled}
    assert told == {(name, step) for name, step in sampled if name != "before"}


def test_a_subscriber_hears_who_was_aborted_then_and_before(folder):
    """A trace does not tell, and a picture of the engine would let them wait for ever."""

    async def main(engine):
        await engine.control(paused=True)
        hears = engine.subscribe()
        await anext(hears)
        tasks = [
            asyncio.create_task(read(engine, name, params=replace(TEN, n=2, temperature=1.0)))
            for name in ("runs", "waits", "stays")
        ]
        await until(lambda: engine._engine.scheduler.num_unfinished == 6)
        await engine.control(step=1)
        await until(lambda: engine._engine.scheduler.recorder._steps)
        for task in tasks[:2]:
            task.cancel()
        await until(lambda: engine._engine.scheduler.num_unfinished == 2)
        then, before = [], engine.subscribe()
        while sum(len(record.get("aborted", ())) for record in then) < 4:
            then.append(await anext(hears))
        async for record in before:
            if "aborted" in record:
                break
        await engine.control(paused=False)
        await tasks[2]
        return [name for each in then for name in each.get("aborted", ())], record["aborted"]

    with serving(folder) as engine:
        then, before = run(main(engine))
    assert sorted(then) == ["runs", "runs.1", "waits", "waits.1"]
    assert before == ["runs", "waits"]  # the trace has dropped the others, which took part in nothing


def test_a_subscriber_whose_event_loop_stood_still_hears_everything(folder):
    """What came behind the beginning of the feed is fetched with it."""

    async def main(engine):
        feed = engine.follow()
        beginning = asyncio.ensure_future(anext(feed))
        await asyncio.sleep(0)  # it has asked
        task = asyncio.create_task(read(engine, "a", params=TEN))
        await asyncio.sleep(0)
        while len(engine._engine.trace.steps) < 10 or engine._engine.has_unfinished_requests():
            time.sleep(0.001)
        await engine.control()  # the last step's news is on its way before this answer
        await task
        records = await beginning
        while not any("finished" in record.get("step", ()) for record in records):
            records += await anext(feed)
        return records

    with serving(folder) as engine:
        records = run(main(engine))
    assert "format" in records[0] and "config" in records[1]
    assert [record["step"]["step"] for record in records if "step" in record] == list(range(10))


def test_a_subscriber_that_lags_behind_is_dropped(folder, monkeypatch):
    monkeypatch.setattr(module, "MOST_UNREAD_NEWS", 5)

    async def main(engine):
        hears = engine.subscribe()
        await anext(hears)
        await asyncio.gather(*(read(engine, str(i), params=LONG) for i in range(3)))
        with pytest.raises(SlowReaderError):
            async for _ in hears:
                pass
        await engine.control()
        assert not engine._subscribers

    with serving(folder) as engine:
        run(main(engine))


def test_the_last_steps_alone_are_a_trace_of_their_own(folder):
    engine = make_engine(folder)
    for name in "abc":
        engine.add_request(name, PROMPT, TEN)
        while engine.has_unfinished_requests():
            engine.step()
    engine.add_request("last", PROMPT, TEN)
    engine.step()
    recent, whole = engine.scheduler.recorder.snapshot(5)(), engine.trace
    assert recent.steps == whole.steps[-5:] and all(isinstance(step, StepEvent) for step in recent.steps)
    assert recent.dropped_steps == len(whole.steps) - 5
    assert {part.request_id for step in recent.steps for part in step.scheduled} == {
        record.request_id for record in recent.requests
    }
    assert recent.dropped_requests == len(whole.requests) - len(recent.requests)
    assert engine.scheduler.recorder.snapshot()() == whole
    engine.shutdown()


def test_vectors_are_made_between_steps(folder):
    async def main(engine):
        (vector, _) = await asyncio.gather(engine.encode(PROMPT), read(engine, "a"))
        with pytest.raises(PromptError):
            await engine.encode([])
        return vector

    one = make_engine(folder)
    with serving(folder) as engine:
        assert torch.equal(run(main(engine)), one.encode(one.prepare_encode(PROMPT)))
