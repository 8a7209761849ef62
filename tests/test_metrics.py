"""What /metrics says is what the trace says."""

import asyncio
import re
import time
from itertools import accumulate

import pytest
from prometheus_client.parser import text_string_to_metric_families

from minillm import SamplingParams
from minillm.engine import EngineConfig, LLMEngine
from minillm.errors import WorkerDiedError
from minillm.serving import AsyncEngine, Metrics, QueueFullError
from test_async_serving import LONG, read, run, until
from test_llm_engine import PROMPT, TEN, THREE, make_engine
from tiny_models import random_token_ids


def figures(metrics) -> dict[str, float]:
    """Sample -> value; those of vLLM's two labels alone."""
    text, kind = metrics.exposition()
    assert kind.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            if sample.name.startswith(f"{metrics.prefix}:"):
                assert (sample.labels.pop("model_name"), sample.labels.pop("engine")) == ("tiny", "0")
                extra = ",".join(sample.labels.values())
                found[sample.name.partition(":")[2] + (f" {extra}" if extra else "")] = sample.value
    return found


@pytest.fixture(scope="module")
def told(checkpoint):
    """The figures of a run with chunks, preemptions, cached prefixes, an abort and a refusal; its trace and outputs."""
    metrics = Metrics(model_name="tiny")
    engine = AsyncEngine(make_engine(checkpoint("llama")), metrics=metrics, model_name="tiny", max_queue=20)
    shared = random_token_ids(12, seed=1)
    stop = SamplingParams(temperature=2.0, seed=1, max_tokens=20, stop_token_ids=range(60))

    async def main():
        outputs = [(await read(engine, "first", shared))[1]]
        await engine.control(paused=True)
        jobs = [(str(i), [*shared, i], TEN, "delta") for i in range(4)]
        jobs += [(f"long {i}", random_token_ids(14, seed=i), LONG, "final_only") for i in range(4)]
        jobs += [(f"stop {i}", random_token_ids(4, seed=i), stop, "cumulative") for i in range(4)]
        jobs += [(f"three {kind}", PROMPT, THREE, kind) for kind in ("delta", "cumulative", "final_only")]
        tasks = [asyncio.create_task(read(engine, *job[:3], output_kind=job[3])) for job in jobs]
        aborted = asyncio.create_task(read(engine, "aborted", params=LONG))
        await until(lambda: engine._engine.scheduler.num_unfinished == 12 + 9 + 1)
        waiting = figures(metrics)
        fillers = [asyncio.create_task(read(engine, f"filler {i}")) for i in range(2)]
        await until(lambda: engine._engine.scheduler.num_unfinished == 24)
        with pytest.raises(QueueFullError):
            await read(engine, "refused")
        await engine.control(paused=False)
        await until(lambda: engine.num_running)
        aborted.cancel()
        outputs += [last for _, last in await asyncio.gather(*tasks, *fillers)]
        await until(lambda: not engine._engine.has_unfinished_requests())
        return waiting, outputs

    waiting, outputs = run(main())
    engine.shutdown()
    return metrics, engine._engine.trace, outputs, waiting


def test_counts_are_those_of_the_trace(told):
    metrics, trace, outputs, waiting = told
    found = figures(metrics)
    steps = trace.steps
    assert found["generation_tokens_total"] == sum(part.num_sampled for step in steps for part in step.scheduled)
    assert found["num_preemptions_total"] == sum(len(step.preempted) for step in steps) > 0
    assert found["iteration_tokens_total_sum"] == sum(step.num_tokens for step in steps)
    assert found["iteration_tokens_total_count"] == len(steps)
    got_a_token = [each for each in trace.requests if trace.token_times(each.request_id)]
    assert found["prompt_tokens_total"] == sum(each.num_prompt_tokens for each in got_a_token)
    assert found["admission_rejections_total"] == 1
    ran = [each for each in trace.requests if list(trace.parts(each.request_id))]
    assert found["prefix_cache_queries_total"] == sum(each.num_prompt_tokens for each in ran)
    firsts = [next(trace.parts(each.request_id))[1].start for each in ran]
    assert found["prefix_cache_hits_total"] == sum(firsts)
    assert sum(output.num_cached_tokens for output in outputs) > 0
    assert (waiting["num_requests_waiting"], waiting["num_requests_running"]) == (22, 0)
    assert (found["num_requests_waiting"], found["num_requests_running"], found["kv_cache_usage_perc"]) == (0, 0, 0)
    assert found["cache_config_info 4,True,0,12"] == 1


def test_times_are_those_of_the_trace(told):
    metrics, trace, outputs, _ = told
    found = figures(metrics)
    times = {each.request_id: trace.token_times(each.request_id) for each in trace.requests}
    arrival = {each.request_id: each.arrival_time for each in trace.requests}
    ttfts = [each[0] - arrival[name] for name, each in times.items() if each]
    assert found["time_to_first_token_seconds_sum"] == pytest.approx(sum(ttfts))
    assert found["time_to_first_token_seconds_count"] == len(ttfts)
    gaps = [gap for name in times for gap in trace.inter_token_latencies(name)]
    assert found["inter_token_latency_seconds_count"] == len(gaps)
    assert found["inter_token_latency_seconds_sum"] == pytest.approx(sum(gaps))
    ended = {name: each for name, each in times.items() if name != "aborted"}
    assert found["e2e_request_latency_seconds_count"] == len(ended)
    assert found["e2e_request_latency_seconds_sum"] == pytest.approx(
        sum(each[-1] - arrival[name] for name, each in ended.items())
    )
    parts = {name: next(trace.parts(name))[0] for name in ended}
    queued = {name: (step.planned or step.start_time) - arrival[name] for name, step in parts.items()}
    together = [found[f"request_{part}_time_seconds_sum"] for part in ("prefill", "decode")]
    assert found["request_inference_time_seconds_sum"] == pytest.approx(sum(together))
    assert found["e2e_request_latency_seconds_sum"] == pytest.approx(sum(together) + sum(queued.values()))
    assert found["request_generation_tokens_sum"] == sum(map(len, ended.values()))
    assert found["request_num_preemptions_sum"] <= found["num_preemptions_total"]


def test_every_request_ends_once_by_its_reason(told):
    metrics, trace, outputs, _ = told
    found = figures(metrics)
    ended = {reason: found[f"request_success_total {reason}"] for reason in ("stop", "length", "abort", "error")}
    assert sum(ended.values()) == len(trace.requests)
    reasons = [part.finish_reason for output in outputs for part in output.outputs]
    assert ended["abort"] == 1 and ended["error"] == 0 and ended["stop"] >= reasons.count("stop") > 0
    assert metrics._requests == {}


def test_buckets_count_up_to_their_bound(told):
    metrics, trace, _, _ = told
    found = figures(metrics)
    for name, histogram in metrics.histograms.items():
        counts = [found[f"{name}_bucket {bound}"] for bound, _ in histogram.buckets()]
        assert counts == list(accumulate(histogram.counts)) and counts[-1] == found[f"{name}_count"]
    tokens = [step.num_tokens for step in trace.steps]
    for bound in (1, 2, 8, 16):
        assert found[f"iteration_tokens_total_bucket {float(bound)}"] == sum(each <= bound for each in tokens)


def test_the_names_are_vllms_with_its_prefix():
    text = Metrics("vllm", "m").exposition()[0].decode()
    wanted = """prefix_cache_queries_total prefix_cache_hits_total num_preemptions_total prompt_tokens_total
        generation_tokens_total request_success_total time_to_first_token_seconds_bucket e2e_request_latency_seconds_sum
        inter_token_latency_seconds_count request_queue_time_seconds_sum request_prefill_time_seconds_sum
        request_decode_time_seconds_sum iteration_tokens_total_bucket"""
    for name in wanted.split():
        assert re.search(rf'^vllm:{name}{{.*model_name="m"', text, re.MULTILINE), name
    assert "process_resident_memory_bytes" in text


def test_requests_of_an_engine_that_died_have_failed(checkpoint):
    metrics = Metrics(model_name="tiny")
    engine = AsyncEngine(make_engine(checkpoint("llama")), metrics=metrics, model_name="tiny")

    async def main():
        await engine.control(paused=True)
        task = asyncio.create_task(read(engine, "a"))
        await until(lambda: engine._engine.scheduler.num_unfinished)
        await asyncio.to_thread(engine.shutdown)
        with pytest.raises(WorkerDiedError):
            await task

    run(main())
    assert figures(metrics)["request_success_total error"] == 1


def test_requests_that_failing_steps_end_have_failed(checkpoint):
    metrics = Metrics(model_name="tiny")
    engine = AsyncEngine(make_engine(checkpoint("llama")), metrics=metrics, model_name="tiny")

    def fail(plan):
        raise RuntimeError("the device hiccups")

    engine._engine.executor.launch = fail
    with pytest.raises(RuntimeError, match="hiccups"):
        run(read(engine, "a", params=TEN))
    assert figures(metrics)["request_success_total error"] == 1 and metrics._requests == {}
    engine.shutdown()


def test_a_step_is_counted_in_a_fraction_of_the_time_that_it_takes():
    """Without the metrics the engine's thread is as fast: what they take of its processor time is measured here."""
    metrics = Metrics(model_name="tiny")
    engine = LLMEngine(config=EngineConfig(max_model_len=128))
    recorder = engine.scheduler.recorder
    recorder.news()
    for number in range(64):
        engine.add_request(str(number), "Once upon a time", SamplingParams(max_tokens=40, ignore_eos=True))
    steps, counting = 0.0, 0.0
    while engine.has_unfinished_requests():
        began = time.process_time()
        engine.step()
        middle = time.process_time()
        metrics.take_news(recorder.news())
        steps, counting = steps + middle - began, counting + time.process_time() - middle
    engine.shutdown()
    assert metrics.counters["generation_tokens"] == 64 * 40
    print(f"\n{counting / 41 * 1000:.3f} ms per step of {steps / 41 * 1000:.2f} ms")
    assert counting < 0.05 * steps
