"""LLMEngine: what a step tells and to whom, and what is left when requests, rows, steps or the worker fail."""

import dataclasses
import json
import os
import shutil
import signal
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm import EngineConfig, LLMEngine, SamplingParams, generate_cached
from minillm.engine.outputs import Completion
from minillm.engine.prompts import encode_prompt
from minillm.engine.request import Request
from minillm.errors import ConfigError, OutOfMemoryError, PromptError, SamplingParamsError, WorkerDiedError
from minillm.model.text import Detokenizer
from minillm.model.weights import locate
from minillm.runtime.batch import rows_computed
from minillm.sampling import TokenLogprobs, token_logprobs
from tiny_models import random_token_ids

CONFIG = EngineConfig(num_blocks=12, block_size=4, max_model_len=40, max_num_seqs=4, max_num_batched_tokens=16)
PROMPT = random_token_ids(9)
TEN = SamplingParams(max_tokens=10, ignore_eos=True)
THREE = SamplingParams(temperature=2.0, seed=5, n=3, max_tokens=15, stop_token_ids=range(30))


def make_engine(folder, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return LLMEngine(folder, dtype="float64", config=config, skip_tokenizer_init=True)


@pytest.fixture(scope="module")
def one(checkpoint):
    return make_engine(checkpoint("llama"))


@pytest.fixture
def engine(one):
    """One engine for many tests; each must leave it idle."""
    yield one
    try:
        assert_idle(one)
    finally:
        for request_id in list(one._states):
            one.abort_request(request_id)


def assert_idle(engine):
    assert not engine.has_unfinished_requests()
    blocks = engine.scheduler.block_manager
    blocks.check()
    assert blocks.usage.used == 0 and blocks.num_free == blocks.num_blocks - 1


def run(engine, most=200):
    """Step to the end; all outputs, in order."""
    outputs = []
    for _ in range(most):
        if not engine.has_unfinished_requests():
            return outputs
        outputs += engine.step()
    raise AssertionError(f"requests are still unfinished after {most} steps")


def alone(engine, prompt, params):
    return list(generate_cached(engine.model, prompt, params).token_ids)


# --- what a step tells -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final_only"])
def test_a_step_tells_all_so_far_or_what_is_new_or_nothing_before_the_end(engine, kind):
    engine.add_request("a", PROMPT, TEN, output_kind=kind)
    outputs = run(engine)
    expected = alone(engine, PROMPT, TEN)
    told = [output.outputs[0].token_ids for output in outputs]
    if kind == "cumulative":
        assert told == [expected[: n + 1] for n in range(10)]
    elif kind == "delta":
        assert told == [[token_id] for token_id in expected]
    else:
        assert told == [expected]
    assert [output.finished for output in outputs] == [False] * (len(told) - 1) + [True]
    assert outputs[-1].outputs[0].finish_reason == "length" and outputs[-1].prompt_token_ids == PROMPT


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final_only"])
def test_of_several_outputs_the_last_to_end_finishes_the_request(engine, kind):
    expected = [alone(engine, PROMPT, dataclasses.replace(THREE, n=1, seed=5 + i)) for i in range(3)]
    assert len({len(each) for each in expected}) > 1, "they end at different steps"
    engine.add_request("a", PROMPT, THREE, output_kind=kind)
    outputs = run(engine)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    if kind == "delta":
        told = [[], [], []]
        for output in outputs:
            for completion in output.outputs:
                told[completion.index] += completion.token_ids
    else:
        told = [completion.token_ids for completion in outputs[-1].outputs]
    assert told == expected


def test_a_step_without_requests_does_nothing(engine):
    steps = len(engine.trace.steps)
    assert engine.step() == [] and len(engine.trace.steps) == steps


def test_a_request_that_only_counts_at_its_end_costs_nothing_before(engine, monkeypatch):
    calls = []
    right = Completion.take
    monkeypatch.setattr(Completion, "take", lambda self, *args: (calls.append(args), right(self, *args)))
    engine.add_request("a", PROMPT, TEN, output_kind="final_only")
    run(engine)
    assert len(calls) == 1


def test_every_output_has_a_seed_of_64_bits():
    assert SamplingParams(temperature=1.0, n=2, seed=2**63 - 2).seed + 1 == 2**63 - 1
    with pytest.raises(SamplingParamsError, match="beyond 64 bits"):
        SamplingParams(temperature=1.0, n=2, seed=2**63 - 1)


# --- coming and going ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("a", [], TEN), PromptError, "empty"),
        (("a", [500], TEN), PromptError, "outside the vocabulary"),
        ((7, PROMPT, TEN), PromptError, "request_id is 7"),
        (("busy", PROMPT, TEN), PromptError, "'busy' is in use"),
        (("a", PROMPT, SamplingParams(max_tokens=32)), PromptError, "41 tokens .* max_model_len is 40"),
        (("a", PROMPT, SamplingParams(max_tokens=2, stop="x")), SamplingParamsError, "need a tokenizer"),
        (("a", PROMPT, "greedy"), SamplingParamsError, "params is 'greedy'.*SamplingParams"),
        (("a", "text", TEN), PromptError, "no tokenizer"),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_changes(engine, arguments, error, message):
    engine.add_request("busy", PROMPT, TEN)
    requests = len(engine.trace.requests)
    with pytest.raises(error, match=message):
        engine.add_request(*arguments)
    assert len(engine.trace.requests) == requests and not engine.is_unfinished("a")
    assert engine.abort_request("busy") and not engine.is_unfinished("busy")


def test_an_unknown_output_kind_or_priority_is_refused(engine):
    with pytest.raises(ConfigError, match="output_kind 'all'"):
        engine.add_request("a", PROMPT, TEN, output_kind="all")
    with pytest.raises(ConfigError, match="priority is 2"):
        engine.add_request("a", PROMPT, TEN, priority=2)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_after_an_abort_nothing_is_said_and_all_blocks_are_back(engine, n, steps):
    params = SamplingParams(temperature=1.0, seed=1, n=n, max_tokens=20, ignore_eos=True)
    engine.add_request("a", PROMPT, params)
    for _ in range(steps):
        engine.step()
    assert engine.abort_request("a")
    assert not engine.abort_request("a") and not engine.abort_request("unknown")
    assert_idle(engine)
    engine.add_request("a", PROMPT, TEN)
    assert run(engine)[-1].outputs[0].token_ids == alone(engine, PROMPT, TEN)


def test_an_abort_after_the_first_output_has_ended_ends_the_others(engine):
    engine.add_request("a", PROMPT, THREE)
    while not any(completion.finish_reason for output in engine.step() for completion in output.outputs):
        pass
    assert engine.has_unfinished_requests() and engine.abort_request("a")


def ended_one_of_two(engine):
    """A request of two outputs, the first of which has ended and been told, by a stop id; its tokens are [7, ...]."""
    params = SamplingParams(temperature=2.0, seed=5, n=2, max_tokens=15, ignore_eos=True)
    engine.add_request("a", PROMPT, params)
    first = run(engine)[-1].outputs[0].token_ids[0]
    engine.add_request("a", PROMPT, dataclasses.replace(params, stop_token_ids=[first]))
    while engine.is_unfinished("a") and not engine._states["a"].completions[0].finish_reason:
        engine.step()
    assert engine.is_unfinished("a") and engine._states["a"].completions[1].finish_reason is None


def test_an_id_is_in_use_until_all_its_outputs_have_ended_and_been_told(engine):
    ended_one_of_two(engine)
    engine.add_request("b", PROMPT, TEN, output_kind="final_only")
    for refused in (engine.add_request, engine.prepare):
        with pytest.raises(PromptError, match="'a' is in use"):
            refused("a", PROMPT, TEN)
    told = {output.request_id: output for output in run(engine) if output.finished}
    assert [len(each.token_ids) for each in told["a"].outputs] == [1, 15]
    assert told["b"].outputs[0].token_ids == alone(engine, PROMPT, TEN)
    engine.add_request("a", PROMPT, TEN, output_kind="final_only")
    assert run(engine)[-1].outputs[0].token_ids == alone(engine, PROMPT, TEN)


def test_an_id_is_in_use_while_its_end_has_not_been_told(checkpoint, monkeypatch, default_handler):
    """Ctrl-C comes when the step is over, and before it has told."""
    engine = make_engine(checkpoint("llama"))
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=1))
    right = engine._outputs

    def interrupted(changed):
        outputs = right(changed)
        os.kill(os.getpid(), signal.SIGINT)
        return outputs

    monkeypatch.setattr(engine, "_outputs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    assert engine.is_unfinished("a")
    with pytest.raises(PromptError, match="'a' is in use"):
        engine.add_request("a", PROMPT, TEN)
    (output,) = engine.step()
    assert output.finished and not engine.is_unfinished("a")
    engine.add_request("a", PROMPT, TEN)
    assert engine.abort_request("a")


def test_an_abort_ends_no_stranger_whose_id_is_that_of_an_output_that_has_ended(engine):
    params = SamplingParams(temperature=2.0, seed=5, n=2, max_tokens=15, ignore_eos=True)
    engine.add_request("a", PROMPT, params)
    second = run(engine)[-1].outputs[1].token_ids[0]
    engine.add_request("a", PROMPT, dataclasses.replace(params, stop_token_ids=[second]))
    while not engine._states["a"].completions[1].finish_reason:
        engine.step()
    engine.add_request("a.1", PROMPT, TEN, output_kind="final_only")
    assert engine.abort_request("a")
    assert [output.outputs[0].token_ids for output in run(engine)] == [alone(engine, PROMPT, TEN)]


@pytest.mark.parametrize("aborted", [False, True])
@pytest.mark.parametrize("kinds", [("final_only", "delta"), ("delta", "final_only"), ("final_only", "cumulative")])
def test_a_second_life_speaks_as_it_was_asked_to_whatever_the_first_did(engine, kinds, aborted):
    lengths = {"final_only": [10], "delta": [1] * 10, "cumulative": list(range(1, 11))}
    for kind in kinds:
        engine.add_request("a", PROMPT, TEN, output_kind=kind)
        if aborted and kind == kinds[0]:
            engine.step()
            engine.abort_request("a")
        else:
            assert [len(output.outputs[0].token_ids) for output in run(engine)] == lengths[kind]


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final_only"])
def test_metrics_are_the_times_of_the_trace(engine, kind):
    engine.add_request("first", PROMPT, TEN, output_kind=kind, arrival_time=0.0)
    engine.add_request("two", PROMPT, SamplingParams(temperature=2.0, seed=1, n=2, max_tokens=4), output_kind=kind)
    told = run(engine)
    trace, life = engine.trace, {}
    for record in trace.requests:
        life[record.caller_id or record.request_id] = record.request_id  # the latest of each
    times = {name: trace.token_times(life[name]) for name in ("first", "two", "two.1")}
    last = {output.request_id: output.metrics for output in told if output.finished}
    assert (last["first"].arrival_time, trace.request(life["two"]).arrival_time) == (0.0, last["two"].arrival_time)
    assert (last["first"].first_token_time, last["first"].last_token_time) == (times["first"][0], times["first"][-1])
    both = sorted(times["two"] + times["two.1"])
    assert (last["two"].first_token_time, last["two"].last_token_time) == (both[0], both[-1])
    ongoing = [output.metrics.last_token_time for output in told if output.request_id == "first"]
    assert ongoing == (times["first"][-1:] if kind == "final_only" else times["first"])


def test_a_request_aborted_before_its_first_token_has_no_times_of_tokens(engine):
    told = []
    engine.add(engine.prepare("a", PROMPT, TEN), on_abort=told.append)
    engine.abort_request("a")
    (output,) = told
    assert output.finished and output.outputs[0].finish_reason == "abort" and output.outputs[0].token_ids == []
    assert output.metrics.first_token_time is None and output.metrics.last_token_time is None


def test_priorities_and_arrival_times_reach_the_scheduler(checkpoint):
    engine = make_engine(checkpoint("llama"), scheduling_policy="priority", max_num_seqs=1)
    for name, priority in (("low", 9), ("high", -9)):
        engine.add_request(name, PROMPT, SamplingParams(max_tokens=2, ignore_eos=True), priority=priority)
    ended = [output.request_id for output in run(engine) if output.finished]
    assert ended == ["high", "low"]
    engine.add_request("c", PROMPT, TEN, arrival_time=-1.5)
    assert engine.trace.request("c").arrival_time == -1.5
    with pytest.raises(ConfigError, match="later than now, .* by the engine's clock"):
        engine.add_request("d", PROMPT, TEN, arrival_time=time.time())  # of another clock


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("carried_out", [False, True], ids=["before it computes", "after it has computed"])
@pytest.mark.parametrize("fails_at", range(6))
def test_a_failed_step_is_as_if_it_had_not_been(checkpoint, monkeypatch, caching, carried_out, fails_at):
    engine = make_engine(checkpoint("llama"), enable_prefix_caching=caching)
    right, calls = engine.executor.launch, []

    def launch(plan):
        calls.append(plan)
        if len(calls) == fails_at + 1:
            if carried_out:
                right(plan)
            raise RuntimeError("lost")
        return right(plan)

    monkeypatch.setattr(engine.executor, "launch", launch)
    params = [TEN, SamplingParams(temperature=1.0, seed=4, max_tokens=6, ignore_eos=True)]
    prompts, outputs = [random_token_ids(20), random_token_ids(7, seed=3)], []
    for name, prompt, each in zip("ab", prompts, params, strict=True):
        engine.add_request(name, prompt, each, output_kind="final_only")
    failures = 0
    while engine.has_unfinished_requests():
        try:
            outputs += engine.step()
        except RuntimeError:
            failures += 1
            assert engine.scheduler.block_manager.usage.used == 0 or fails_at == 0
    assert failures == 1
    told = {output.request_id: output.outputs[0].token_ids for output in outputs}
    assert told == {name: alone(engine, *each) for name, *each in zip("ab", prompts, params, strict=True)}
    assert_idle(engine)


def test_a_row_of_nan_ends_that_request_alone(checkpoint):
    """One token's embedding is not a number: who has it in the prompt fails, neighbours and successors do not."""
    engine = make_engine(checkpoint("llama"))
    expected = alone(engine, PROMPT, TEN)
    bad = next(token_id for token_id in range(199) if token_id not in PROMPT + expected)
    with torch.no_grad():
        engine.model.embed_tokens.weight[bad] = torch.nan
    for kind in ("cumulative", "final_only"):
        engine.add_request("good", PROMPT, TEN, output_kind=kind)
        engine.add_request("bad", [*PROMPT[:8], bad], TEN, output_kind=kind)
        last = {output.request_id: output for output in run(engine) if output.finished}
        assert last["good"].outputs[0].token_ids == expected
        failed = last["bad"].outputs[0]
        assert (failed.finish_reason, failed.token_ids) == ("error", [])
        assert "nan" in failed.stop_reason.lower() or "finite" in failed.stop_reason.lower()
        assert_idle(engine)


def test_nan_in_the_first_chunk_of_a_prompt_is_noticed_there_and_not_shared(checkpoint):
    engine = make_engine(checkpoint("llama"), max_num_batched_tokens=12, max_num_seqs=2)
    with torch.no_grad():
        engine.model.embed_tokens.weight[7] = torch.nan
    prompt = [7, *([3] * 24)]
    engine.add_request("bad", prompt, TEN)
    (failed,) = engine.step()  # the first 12 of 25 tokens
    assert failed.finished and failed.outputs[0].finish_reason == "error"
    assert engine.scheduler.block_manager.usage.cached == 0
    assert_idle(engine)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("num_tokens", [12, 1], ids=["several tokens", "one token"])
def test_one_number_that_is_not_finite_in_a_chunk_that_gives_no_token_is_enough(checkpoint, value, num_tokens):
    """Of either sign, and only in the hidden state of the chunk's newest token."""
    engine = make_engine(checkpoint("llama"), max_num_batched_tokens=num_tokens, max_num_seqs=1)

    def spoil(model, arguments, hidden):
        hidden[-1, 5] = value

    engine.executor.workers[0].runner.model.register_forward_hook(spoil)
    engine.add_request("bad", random_token_ids(25), TEN)
    (failed,) = engine.step()
    assert failed.finished and failed.outputs[0].finish_reason == "error"
    assert engine.scheduler.block_manager.usage.cached == 0
    assert_idle(engine)


def test_nan_in_a_chunk_of_one_token_is_noticed_there_and_not_shared(checkpoint):
    """A budget of one token per step fills blocks without a chunk of several ever being computed."""
    engine = make_engine(checkpoint("llama"), max_num_batched_tokens=1, max_num_seqs=1)
    with torch.no_grad():
        engine.model.embed_tokens.weight[7] = torch.nan
    engine.add_request("bad", [3, 7, *([3] * 9)], TEN)
    assert engine.step() == []
    (failed,) = engine.step()  # the second of 11 tokens
    assert failed.finished and failed.outputs[0].finish_reason == "error"
    assert engine.scheduler.block_manager.usage.cached == 0
    assert_idle(engine)


def test_what_no_policy_could_sort_by_is_refused_before_the_request_arrives(checkpoint):
    engine = make_engine(checkpoint("llama"), scheduling_policy="priority")
    for change in (
        {"priority": "high"},
        {"priority": float("nan")},
        {"arrival_time": "now"},
        {"arrival_time": float("nan")},
    ):
        with pytest.raises(ConfigError, match=f"{next(iter(change))} is"):
            engine.add_request("a", PROMPT, TEN, **change)
        assert_idle(engine)


def test_a_salt_without_utf8_form_disturbs_nobody(engine):
    engine.add_request("odd", {"prompt_token_ids": PROMPT, "cache_salt": "\ud800"}, TEN)
    engine.add_request("plain", PROMPT, TEN)
    told = {output.request_id: output.outputs[0].token_ids for output in run(engine) if output.finished}
    assert told["odd"] == told["plain"] and len(told["odd"]) == 10


def test_when_the_worker_dies_every_request_fails_and_none_is_taken(checkpoint, monkeypatch):
    engine = make_engine(checkpoint("llama"))
    engine.add_request("a", PROMPT, TEN)
    engine.add_request("b", PROMPT, SamplingParams(temperature=1.0, n=2, max_tokens=5))
    engine.step()

    def die(plan):
        raise WorkerDiedError("the worker process 7 was killed")

    monkeypatch.setattr(engine.executor, "launch", die)
    for call in (engine.step, engine.step, lambda: engine.add_request("c", PROMPT, TEN)):
        with pytest.raises(WorkerDiedError, match="process 7 was killed"):
            call()
    assert_idle(engine)
    assert not engine.abort_request("a")


def test_a_pool_too_small_for_the_memory_leaves_no_worker_behind(checkpoint, monkeypatch):
    ended = []
    monkeypatch.setattr("minillm.engine.model_executor.ModelExecutor.shutdown", lambda self: ended.append(self))
    with pytest.raises(OutOfMemoryError, match="blocks do not fit"):
        make_engine(checkpoint("llama"), num_blocks=10**12)
    assert len(ended) == 1


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 1.5}, "block_size is 1.5"),
        ({"num_blocks": 1}, "num_blocks is 1"),
        ({"num_host_blocks": -1}, "num_host_blocks is -1"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_seqs": True}, "max_num_seqs is True"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 9}, "is below max_num_seqs"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization is 0"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization is 1.1"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy 'lifo' is not one of fcfs"),
        ({"preemption_mode": "drop"}, "preemption_mode 'drop' is not one of recompute"),
        ({"worker": "thread"}, "worker 'thread' is not one of inline"),
        (
            {"enable_chunked_prefill": False, "max_model_len": 100, "max_num_batched_tokens": 64},
            "without chunked prefill",
        ),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**arguments)


def test_the_rooms_agree_on_what_they_share():
    """Whoever makes one of them alone gets what the engine would hand it, but for what depends on the model."""
    declared = {}
    for room in EngineConfig.__bases__:
        for field in dataclasses.fields(room):
            declared.setdefault(field.name, []).append((field.type, field.default))
    shared = {name for name, said in declared.items() if len(said) > 1}
    assert shared == {"max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size"}
    assert [name for name in shared if len(set(declared[name])) > 1] == []
    again = set(declared) & set(vars(EngineConfig)["__annotations__"])
    assert again == {"max_num_batched_tokens", "max_model_len", "num_host_blocks"}  # None: to be resolved
    assert all(getattr(EngineConfig(), name) is None for name in again)


@pytest.mark.parametrize(("device", "num_tokens"), [("cpu", 512), (torch.device("cuda:1"), 8192), ("cuda", 8192)])
def test_what_depends_on_model_and_device_is_resolved(device, num_tokens):
    config = EngineConfig(max_num_seqs=7)
    found = config.resolved(100, device)
    on_cuda = num_tokens == 8192
    assert (found.max_num_batched_tokens, found.max_model_len, found.async_scheduling) == (num_tokens, 100, on_cuda)
    assert found.resolved(200, "cpu") == found and found.max_num_seqs == 7
    given = EngineConfig(max_num_batched_tokens=64, max_model_len=50, num_host_blocks=3, async_scheduling=not on_cuda)
    assert given.resolved(100, device) == given
    many = EngineConfig(max_num_seqs=600)
    if on_cuda:
        assert many.resolved(100, device).max_num_seqs == 600
    else:
        with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(512\) is below max_num_seqs \(600\)"):
            many.resolved(100, device)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.float16)])
def test_on_a_gpu_the_dtype_is_by_default_the_checkpoints(device, dtype, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("minillm.model.weights.as_device", torch.device)  # one that is not here
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "half")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"dtype": "float16"}))
    assert locate(folder, None, device)[1:] == (dtype, torch.device(device))
    assert locate(folder, "bfloat16", device)[1] == torch.bfloat16


def test_without_chunked_prefill_the_models_context_must_fit_a_step(checkpoint):
    with pytest.raises(ConfigError, match="without chunked prefill a prompt of up to 256 tokens"):
        make_engine(checkpoint("llama"), enable_chunked_prefill=False, max_model_len=None, num_blocks=100)


@pytest.mark.parametrize(
    ("mode", "given", "host_blocks"), [("recompute", None, 0), ("swap", None, 12), ("swap", 5, 5), ("recompute", 3, 3)]
)
def test_host_blocks_are_there_for_swapping(mode, given, host_blocks, checkpoint):
    engine = make_engine(checkpoint("llama"), preemption_mode=mode, num_host_blocks=given)
    assert engine.scheduler.block_manager.num_host_blocks == engine.ledger.num_host_blocks == host_blocks


# --- parts -----------------------------------------------------------------------------------------------------------


def test_logprobs_of_the_rows_that_ask():
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.0], [3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]], dtype=torch.float64)
    expected = logits.log_softmax(-1)
    params = [SamplingParams(logprobs=2, temperature=0.5), SamplingParams(), SamplingParams(logprobs=20)]
    found = token_logprobs(logits, params, torch.tensor([3, 0, 0]))
    assert set(found) == {0, 2}
    assert found[0].rank == 2 and found[2].rank == 2, "a tie has the better rank"
    assert found[0].logprob == pytest.approx(expected[0, 3].item())
    assert found[0].top_ids[0] == 2 and len(found[0].top_ids) == 2 and len(found[2].top_ids) == 4
    assert found[2].top_logprobs == pytest.approx(expected[2].sort(descending=True).values.tolist())
    assert token_logprobs(logits, [SamplingParams()] * 3, torch.tensor([3, 0, 0])) == {}


def test_a_sampled_token_outside_the_top_comes_first_and_is_listed_once():
    request = Request("a", [5], SamplingParams(logprobs=2, temperature=1.0))
    completion = Completion(0, request, None, streams=False)
    for token_id, rank in ((9, 7), (4, 2)):
        request.append(token_id)
        completion.take(token_id, TokenLogprobs(-rank, rank, [3, 4], [-1.0, -2.0]))
    first, second = completion.cumulative().logprobs
    assert [(each, entry.rank) for each, entry in first.items()] == [(9, 7), (3, 1), (4, 2)]
    assert [(each, entry.rank) for each, entry in second.items()] == [(4, 2), (3, 1)]
    assert completion.cumulative().cumulative_logprob == -9


@given(data=st.data(), kind=st.sampled_from(["tokenizer", "byte_fallback_tokenizer"]))
def test_tokens_decoded_at_once_give_the_text_of_one_after_the_other(data, kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids = st.lists(st.integers(0, len(tokenizer) - 1), max_size=14)
    words = st.lists(st.sampled_from(["the", " fox", "é", "🦊", " "])).map(lambda text: tokenizer.encode("".join(text)))
    prompt, output = data.draw(ids), data.draw(ids | words)
    whole, pieces = Detokenizer(tokenizer, (), prompt), Detokenizer(tokenizer, (), prompt)
    whole.extend(output)
    whole.finish()
    for token_id in output:
        pieces.add(token_id)
    pieces.finish()
    assert whole.text == pieces.text


def test_a_prompt_given_as_text_and_ids_is_the_ids():
    encoded = encode_prompt({"prompt": "what they mean", "prompt_token_ids": (3, 4)}, None)
    assert (encoded.token_ids, encoded.text, encoded.cache_salt) == ([3, 4], "what they mean", "")


def test_a_cpu_computes_four_rows_for_two_or_three():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [rows_computed(count, cpu) for count in range(7)] == [0, 1, 4, 4, 4, 5, 6]
    assert [rows_computed(count, gpu) for count in range(7)] == list(range(7))
