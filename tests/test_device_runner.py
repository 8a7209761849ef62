"""The runner says what the float64 ladder says: eager, in graphs, launched ahead of what has been read."""

import math
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from device_jobs import Job, ladder, run_jobs, shuffled_blocks
from minillm import SamplingParams, generate_cached
from minillm.costs.memory_ledger import CacheLimits
from minillm.costs.peak_memory import PeakMemory
from minillm.engine.block_manager import BlockManager
from minillm.engine.engine_config import EngineConfig
from minillm.engine.llm_engine import LLMEngine
from minillm.engine.model_executor import ModelExecutor
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler, SchedulerConfig
from minillm.errors import ConfigError, KernelError
from minillm.kernels import ops, triton_ops
from minillm.kernels.dispatch import choose
from minillm.runtime import device_queue
from minillm.runtime import worker as worker_module
from minillm.runtime.batch import ALIGNED, FIELDS, NO_SLOT, Batch, Layout, carve, carve_changes
from minillm.runtime.cache_engine import CacheEngine
from minillm.runtime.device_queue import CudaQueue, FreeCores, HostQueue
from minillm.runtime.plan import NewRequest, RunnerOptions, ScheduledRequest, SchedulerOutput
from minillm.runtime.runner import Runner
from minillm.runtime.step_graph import HostGraph, bucket_sizes, record
from minillm.runtime.worker import Worker, card_memory, first_layer_alone, worst_plan
from tiny_models import all_logits, random_token_ids

KIND = "llama-mqa"  # whose outputs vary most
NUM_BLOCKS, BLOCK_SIZE = 14, 4  # far too few for all at once
JOB_BLOCKS = 60
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # compiled where there is a GPU, else interpreted
OPTIONS = RunnerOptions("reference", max_num_seqs=6, max_model_len=48, fused_ops=False)
EAGER = replace(OPTIONS, enforce_eager=True)


class LateQueue(HostQueue):
    """A device that does nothing before it is waited for: its inputs must still be unchanged then."""

    def __init__(self):
        self.handed_in = deque()

    def run(self, work):
        self.handed_in.append(work)

    def wait(self, began, ended):
        with torch.inference_mode():
            while math.isnan(ended.passed_at):
                self.handed_in.popleft()()
        return super().wait(began, ended)


def device_runner_of(model, options=OPTIONS, queue=None, num_blocks=JOB_BLOCKS, num_host_blocks=0):
    """A runner as on a GPU, on the kernels in torch, which take float64: own tables, nobody looks at a length."""
    backend = choose("reference", model.config, model.dtype, "cpu", BLOCK_SIZE)
    backend = replace(backend, prepare=lambda inputs, pool, config: inputs, reads_whole_blocks=False)
    cache = CacheEngine(model.config, num_blocks, BLOCK_SIZE, model.dtype, "cpu", num_host_blocks)
    return Runner(model, cache, backend, ops if options.fused_ops else None, options, queue or HostQueue())


def host_runner_of(model, options=OPTIONS, num_blocks=JOB_BLOCKS, num_host_blocks=0):
    """A runner as on a CPU: masked attention, tables in common, a step is over when it is launched."""
    cache = CacheEngine(model.config, num_blocks, BLOCK_SIZE, model.dtype, "cpu", num_host_blocks)
    return Runner(model, cache, options=options)


WAYS = {
    "host": host_runner_of,
    "eager": lambda model, **sizes: device_runner_of(model, EAGER, **sizes),
    "graphs": lambda model, **sizes: device_runner_of(model, **sizes),
    "late": lambda model, **sizes: device_runner_of(model, queue=LateQueue(), **sizes),
}


@pytest.fixture(scope="module")
def model(load):
    return load(KIND, torch.float64)


@pytest.fixture(scope="module")
def expected(model):
    """The outputs of the greedy jobs, each alone."""
    return ladder(model, greedy_jobs())


def greedy_jobs():
    """They join and leave in different steps, in chunks and whole, one with a prompt of one token."""
    sizes = [(9, 24, 0, 4), (1, 20, 0, 1), (17, 26, 1, 5), (6, 14, 2, 1000), (11, 13, 4, 2), (3, 10, 12, 1)]
    return [
        Job(f"job {i}", random_token_ids(n, 190, i), SamplingParams(max_tokens=outputs), joins, chunk)
        for i, (n, outputs, joins, chunk) in enumerate(sizes)
    ]


def drawing_jobs(asking):
    """Some ask for more than a temperature."""
    asked = [{}, {"top_k": 4}, {"seed": -5}, {"min_p": 0.05, "top_p": 0.9}, {"logprobs": 2}, {}]
    return [
        job._replace(params=replace(job.params, **{"temperature": 1.5, "seed": i} | (more if asking else {})))
        for i, (job, more) in enumerate(zip(greedy_jobs(), asked, strict=True))
    ]


def run(runner, jobs, **how):
    return run_jobs(runner, jobs, JOB_BLOCKS, BLOCK_SIZE, **how)


# --- the same tokens -------------------------------------------------------------------------------------------------


def requests():
    """Requests of all kinds; all are greedy, as good as."""
    shared = random_token_ids(9, 190)
    for i in range(6):
        params = SamplingParams(max_tokens=20, logprobs=i % 4 or None)
        yield Request(f"req {i}", shared + random_token_ids(1 + 2 * i, 190, i), params)
    params = SamplingParams(temperature=1e-4, n=3, max_tokens=8)  # greedy to all intents, but may have n > 1
    yield Request("three", random_token_ids(6, 190, 9), params)
    yield Request("aborted", random_token_ids(6, 190, 10), SamplingParams(max_tokens=9))


def run_requests(runner, preemption_mode):
    """The requests on a pool that is too small; returns their outputs, log-probabilities and the trace."""
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE, num_host_blocks=NUM_BLOCKS)
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=48)
    scheduler = Scheduler(config, block_manager=manager, preemption_mode=preemption_mode)
    for request in requests():
        scheduler.add_request(request)
    token_ids, logprobs = {}, {}
    while scheduler.has_unfinished_requests():
        plan = scheduler.schedule()
        output = runner.execute_model(plan)
        for update in scheduler.update(plan, output):
            token_ids.setdefault(update.request_id, []).append(update.token_id)
        for request_id, entry in output.logprobs.items():
            logprobs.setdefault(request_id, []).append((entry.logprob, entry.rank, *entry.top_ids))
        if len(token_ids.get("aborted", ())) == 4:
            scheduler.end_request("aborted", "abort")
    return token_ids, logprobs, scheduler.trace


@pytest.fixture(scope="module")
def expected_of_requests(model):
    """What `run_requests` must return, by the ladder."""
    jobs = [Job(each.request_id, each.prompt_token_ids, replace(each.params, n=1)) for each in requests()]
    token_ids, logprobs = ladder(model, jobs), {}
    for job in jobs:
        if job.params.logprobs:
            rows = all_logits(model, job.prompt + token_ids[job.request_id][:-1])[len(job.prompt) - 1 :].log_softmax(-1)
            tops = rows.topk(job.params.logprobs)
            logprobs[job.request_id] = [
                (top[0].item(), 1, *ids.tolist()) for top, ids in zip(tops.values, tops.indices, strict=True)
            ]
    token_ids |= {"three.1": token_ids["three"], "three.2": token_ids["three"], "aborted": token_ids["aborted"][:4]}
    return token_ids, logprobs


@pytest.mark.parametrize("preemption_mode", ["recompute", "swap"])
@pytest.mark.parametrize("way", WAYS)
def test_it_says_what_the_ladder_says(model, expected_of_requests, way, preemption_mode):
    expected, expected_logprobs = expected_of_requests
    sizes = {"num_blocks": NUM_BLOCKS, "num_host_blocks": NUM_BLOCKS}
    ours, logprobs, trace = run_requests(WAYS[way](model, **sizes), preemption_mode)
    assert ours == expected and {"three", "three.1", "three.2", "aborted"} < set(ours)
    assert logprobs.keys() == expected_logprobs.keys()
    for request_id, entries in expected_logprobs.items():
        assert logprobs[request_id] == [pytest.approx(entry, abs=1e-9) for entry in entries]
    assert preemption_mode in {each.mode for step in trace.steps for each in step.preempted}
    chunks = [slice_ for step in trace.steps for slice_ in step.scheduled if slice_.num_tokens > 1]
    assert any(chunk.start > 0 for chunk in chunks) and any(chunk.start == 8 for chunk in chunks)  # a cached prefix


@pytest.mark.parametrize("kind", [KIND, "qwen2-window", "mistral-window", "qwen3"])
@pytest.mark.parametrize("way", WAYS)
def test_steps_launched_ahead_say_the_same(load, kind, way):
    model = load(kind, torch.float64)
    ours, outputs = run(WAYS[way](model), greedy_jobs(), ahead=True)
    assert ours == ladder(model, greedy_jobs())
    assert all(began <= ended for began, ended in (output.device_times for output in outputs))
    ends = [output.device_times[1] for output in outputs]
    assert ends == sorted(ends)


def test_the_fused_forward_says_the_same(model, expected):
    runner = device_runner_of(model, replace(OPTIONS, fused_ops=True))
    assert run(runner, greedy_jobs(), ahead=True)[0] == expected


def test_decode_steps_are_graphs_and_others_are_not(model):
    runner = device_runner_of(model)
    steps = []
    prepare = runner.batch.prepare
    runner.batch.prepare = lambda *args: steps.append(prepare(*args)) or steps[-1]
    run(runner, greedy_jobs(), ahead=True)
    replayed = [step for step in steps if step.graph]
    assert {step.graph for step in replayed} == {1, 2, 4, 6}
    assert any(step.graph > len(step.sampled_ids) for step in replayed)  # padded
    assert all(step.layout == Layout.of_decodes(step.graph) for step in replayed)
    assert all(step.layout.num_chunks or step.checked_ids for step in steps if not step.graph)
    assert any(step.checked_ids and step.layout.num_chunks == 0 for step in steps)  # one token, and no new one yet


@pytest.mark.parametrize(
    "asked", [{"temperature": 1.0, "top_k": 3, "seed": 1}, {"logprobs": 2}, {"presence_penalty": 1.5}]
)
def test_a_step_in_which_somebody_asks_replays_its_graph(model, expected, monkeypatch, asked):
    """Such a request is sampled after the graph, and the others get the same as without it."""
    replayed, replay = [], HostGraph.replay
    monkeypatch.setattr(HostGraph, "replay", lambda graph: replayed.append(graph) or replay(graph))
    others = [job._replace(joins=0, chunk=1000) for job in greedy_jobs()[2:4]]  # of 26 and 14 tokens
    asking = Job("asking", random_token_ids(5, 190, 2), SamplingParams(max_tokens=20, **asked))
    runner = device_runner_of(model)
    tokens, outputs = run(runner, [others[0], asking, others[1]], ahead=True, launching=nobody_waits)
    assert [list(runner.graphs.values()).index(graph) for graph in replayed] == [2] * 13 + [1] * 6 + [0] * 6
    assert tokens == {job.request_id: expected[job.request_id] for job in others} | ladder(model, [asking])
    assert sum(len(output.logprobs) for output in outputs) == (20 if "logprobs" in asked else 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("lost", [(), (5, 16)], ids=["", "steps are retracted"])
def test_a_step_reads_what_the_steps_before_it_have_written(load, way, mode, lost):
    """Token by token, what the model is given: also after a preemption, and after steps that nothing came of."""
    model = load(KIND, torch.float64)
    jobs, known, read, planned = greedy_jobs(), {}, [], []
    whole = {
        job.request_id: job.prompt + output for job, output in zip(jobs, ladder(model, jobs).values(), strict=True)
    }
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE, num_host_blocks=NUM_BLOCKS)
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=48)
    scheduler = Scheduler(config, block_manager=manager, preemption_mode=mode, depth=2)
    for job in jobs:
        scheduler.add_request(Request(job.request_id, job.prompt, job.params))
    runner, unread = WAYS[way](model, num_blocks=NUM_BLOCKS, num_host_blocks=NUM_BLOCKS), deque()
    model.register_forward_pre_hook(lambda model, given: read.append(given[0].tolist()))
    while scheduler.has_unfinished_requests():
        while len(unread) < 2 and (plan := scheduler.schedule()).num_requests:
            unread.append((plan, runner.launch(plan)))
            planned.append(plan)
        plan, pending = unread.popleft()
        output = pending.result()
        if plan.step in lost:
            scheduler.retract(plan)
            unread.clear()
            continue
        for update in scheduler.update(plan, output):
            known.setdefault(update.request_id, []).append(update.token_id)
    assert {job.request_id: job.prompt + known[job.request_id] for job in jobs} == whole
    for plan, token_ids in zip(planned, read, strict=True):
        parts = sorted(plan.scheduled, key=lambda part: part.num_tokens > 1)
        expected = [token_id for part in parts for token_id in whole[part.request_id][part.start : part.end]]
        assert token_ids[: plan.num_tokens] == expected
    again = [new for plan in planned for new in plan.new_requests if new.output_token_ids]
    assert again and mode in {each.mode for step in scheduler.trace.steps for each in step.preempted}


# --- drawn tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("asking", [True, False])
def test_what_is_drawn_depends_on_the_request_alone(model, expected, way, asking):
    jobs = drawing_jobs(asking)
    together, outputs = run(WAYS[way](model), jobs, ahead=True)
    assert together == ladder(model, jobs)
    assert all(together[request_id] != expected[request_id] for request_id in expected)  # it was drawn
    assert sum(len(output.logprobs) for output in outputs) == asking * len(together["job 4"])
    again, _ = run(WAYS[way](model), [job._replace(params=replace(job.params, seed=100)) for job in jobs])
    assert all(together[request_id] != again[request_id] for request_id in again)


def test_the_first_token_is_drawn_with_the_first_numbers(model):
    prompt, params = random_token_ids(7, 190), SamplingParams(temperature=2.0, seed=11, max_tokens=6)
    token_ids = run(device_runner_of(model), [Job("a", prompt, params)])[0]["a"]
    logits = all_logits(model, prompt + token_ids[:-1])[len(prompt) - 1 :]
    columns = torch.full((6,), 2.0), torch.full((6,), 11), torch.arange(6)
    assert ops.sample_rows(logits, *columns).tolist() == token_ids


def test_logits_may_be_rows_of_a_wider_matrix(load):
    """As on a GPU, where nobody looks at what is behind the ids."""
    model = load(KIND, torch.float64)
    expected, _ = run(device_runner_of(model), drawing_jobs(asking=True))
    plain, widths = model.logits, set()

    def in_wide_rows(hidden):
        logits = plain(hidden)
        wide = torch.full((len(logits), 256), math.nan, dtype=logits.dtype)
        wide[:, : logits.shape[1]] = logits
        widths.add(logits.shape[1])
        return wide[:, : logits.shape[1]]

    model.logits = in_wide_rows
    assert run(device_runner_of(model), drawing_jobs(asking=True))[0] == expected and max(widths) < 256


def test_a_filter_drops_what_it_should(model):
    prompt = random_token_ids(7, 190)
    params = SamplingParams(temperature=50.0, top_k=2, seed=1, max_tokens=30)  # without the filter: anything
    token_ids = run(device_runner_of(model), [Job("a", prompt, params)])[0]["a"]
    logits = all_logits(model, prompt + token_ids[:-1])[len(prompt) - 1 :]
    best = logits.topk(2).indices.tolist()
    assert all(token_id in two for token_id, two in zip(token_ids, best, strict=True))
    assert 5 < sum(token_id == two[0] for token_id, two in zip(token_ids, best, strict=True)) < 25


def test_a_request_that_starts_anew_goes_on_with_its_own_numbers(model):
    prompt, params = random_token_ids(7, 190), SamplingParams(temperature=2.0, seed=11, max_tokens=6)
    expected = run(device_runner_of(model), [Job("a", prompt, params)])[0]["a"]
    runner = device_runner_of(model)
    run(runner, [Job("a", prompt, params)._replace(params=params)])
    plan = SchedulerOutput(0, 0.0, finished_ids=["a"], new_requests=[NewRequest("a", params, prompt, expected[:3])])
    plan.others.append(ScheduledRequest("a", 0, 10, True, "prefill", block_ids=[3, 2, 1]))
    plan.num_tokens = 10
    assert runner.execute_model(plan).token_ids == {"a": expected[3]}


def test_without_a_seed_no_two_are_alike(model):
    job = Job("a", random_token_ids(7, 190), SamplingParams(temperature=5.0, max_tokens=20))
    first, second = (run(device_runner_of(model), [job])[0] for _ in range(2))
    assert first != second


# --- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", [2, 8, None])  # in a chunk that gives no token, in the last one, in the output
def test_a_request_that_is_not_finite_fails_alone(load, way, place):
    model = load(KIND, torch.float64)
    first, *others = greedy_jobs()
    expected = ladder(model, [first, *others])
    elsewhere = {*first.prompt, *(id_ for job in others for id_ in (*job.prompt, *expected[job.request_id]))}
    bad = next(id_ for id_ in expected["job 0"][1:-1] if id_ not in elsewhere)
    if place is not None:
        first = first._replace(prompt=[*first.prompt[:place], bad, *first.prompt[place + 1 :]])
    with torch.no_grad():
        model.embed_tokens.weight[bad] = torch.nan
    runner = WAYS[way](model)
    tokens, outputs = run(runner, [first, *others], ahead=True)
    assert {job.request_id: tokens[job.request_id] for job in others} == {
        job.request_id: expected[job.request_id] for job in others
    }
    good = expected["job 0"][: expected["job 0"].index(bad) + 1] if place is None else []
    assert tokens["job 0"] == good and (place is not None) == (not good)
    messages = {request_id: message for output in outputs for request_id, message in output.failed.items()}
    assert messages == {"job 0": "what the model computed for request 'job 0' is not finite; its cache was discarded"}
    assert not any("job 0" in output.token_ids and "job 0" in output.failed for output in outputs)
    if place is not None:  # noticed in the chunk it is in, of 4 tokens
        assert [step for step, output in enumerate(outputs) if output.failed][0] == place // 4
    assert runner.batch.tokens.min() >= 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_number_that_is_not_finite_in_a_chunk_that_gives_no_token_is_enough(load, value):
    model = load(KIND, torch.float64)
    hook = model.register_forward_hook(lambda model, inputs, hidden: hidden[-1, 5].fill_(value) and None)
    try:
        _, outputs = run(
            device_runner_of(model, EAGER), [Job("a", random_token_ids(9, 190), SamplingParams(max_tokens=1), chunk=4)]
        )
    finally:
        hook.remove()
    assert list(outputs[0].failed) == ["a"]


def test_a_failed_request_has_no_log_probabilities(load):
    model = load(KIND, torch.float64)
    with torch.no_grad():
        model.embed_tokens.weight[195] = torch.nan
    params = SamplingParams(max_tokens=1, logprobs=1)
    _, [output] = run(device_runner_of(model), [Job("a", [1, 195], params), Job("b", [1, 2], params)])
    assert list(output.failed) == ["a"] and list(output.token_ids) == list(output.logprobs) == ["b"]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_that_is_not_a_requests_own_is_looked_at(model, expected, way):
    runner = WAYS[way](model)
    for pool in (runner.cache.keys, runner.cache.values):
        pool[:, way == "host" :] = torch.nan  # whose masks may fall on the null block
    runner.batch.device_tables[:-1] = 10**6  # no such block; the last row is for padding
    runner.batch.tokens[:-1] = 10**6  # no such token
    assert run(runner, greedy_jobs(), ahead=True)[0] == expected


def test_what_padding_finds_in_the_buffer_is_overwritten(model, expected):
    runner = device_runner_of(model)
    graphs = runner.graphs

    def spoil():
        runner._static.random_(0, 5)  # rows, slots and lengths that might be anybody's

    assert run(runner, greedy_jobs(), launching=partial(between, spoil))[0] == expected
    assert runner.graphs is graphs and len(graphs) == 4


@contextmanager
def between(work):
    work()
    yield


# --- nobody waits ----------------------------------------------------------------------------------------------------

WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.equal"}


class NobodyWaits(TorchDispatchMode):
    """Raises at operations for which the host would wait for a GPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation.overloadpacket)
        chosen_by = args[1] if name in ("aten.index", "aten.index_put", "aten.index_put_") else ()
        if name in WAITING or any(each is not None and each.dtype == torch.bool for each in chosen_by):
            raise AssertionError(f"{operation} waits for the device")
        return operation(*args, **(kwargs or {}))


@contextmanager
def nobody_waits():
    """Neither by an operation, nor by reading a tensor, nor by making one of a list."""

    make = torch.tensor

    def refuse(*args, **kwargs):
        raise AssertionError("this waits for the device")

    def in_pinned_memory(*args, **kwargs):
        return make(*args, **kwargs) if "pin_memory" in kwargs and "device" not in kwargs else refuse()

    with pytest.MonkeyPatch.context() as patch, NobodyWaits():
        for name in ("tolist", "cpu", "item", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        for name in ("as_tensor", "from_numpy"):
            patch.setattr(torch, name, refuse)
        patch.setattr(torch, "tensor", in_pinned_memory)
        yield


@pytest.mark.parametrize("way", ["eager", "graphs"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_launch_waits_for_nothing(model, expected, way, fused):
    options = replace(OPTIONS, fused_ops=fused, enforce_eager=way == "eager")
    assert run(device_runner_of(model, options), greedy_jobs(), ahead=True, launching=nobody_waits)[0] == expected


@pytest.mark.parametrize(
    "waits", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: x.nonzero()]
)
def test_who_waits_is_caught(model, waits):
    runner = device_runner_of(model)
    runner.sample_rows = lambda logits, *numbers: waits(logits) or ops.sample_rows(logits, *numbers)
    with pytest.raises(AssertionError, match="waits for the device"):
        run(runner, greedy_jobs(), launching=nobody_waits)


def test_reading_waits_for_this_step_alone_and_says_the_same_every_time(model):
    runner = device_runner_of(model, queue=LateQueue())
    pending = []
    run(
        runner,
        greedy_jobs()[:1],
        ahead=True,
        launching=lambda: after(lambda: pending.append(len(runner.queue.handed_in))),
    )
    assert max(pending) > 2  # the last step's work was still there when the next was handed in
    plan = first_plan()
    first = runner.launch(plan)
    assert first.result() is first.result()
    assert runner.launch(SchedulerOutput(1, 0.0)).result().token_ids == {}


@contextmanager
def after(work):
    yield
    work()


def first_plan():
    new = NewRequest("z", SamplingParams(max_tokens=3), [1, 2, 3, 4, 5])
    part = ScheduledRequest("z", 0, 5, True, "prefill", block_ids=[1, 2])
    return SchedulerOutput(0, 0.0, {}, [part], [new], num_tokens=5)


# --- broken twins ----------------------------------------------------------------------------------------------------


def one_buffer_for_all(patch, batch):
    """The staging buffer is filled again before it has been copied."""
    shared, original = torch.zeros(10_000, dtype=torch.int64), batch._padded

    def padded(*arguments, **named):
        step, _ = original(*arguments, **named)
        buffer = shared[: len(step.buffer)].copy_(step.buffer)
        return step._replace(buffer=buffer), carve(buffer.numpy(), step.layout)

    patch.setattr(batch, "_padded", padded)


def token_of_a_neighbour(patch, batch):
    """The last sampled token is read from the row of another request."""
    original = batch._fill_decodes

    def fill(into, rows, starts):
        original(into, rows, starts)
        into.tokens[: len(rows)] = np.roll(into.tokens[: len(rows)], 1)

    patch.setattr(batch, "_fill_decodes", fill)


def padding_in_a_real_row(patch, batch):
    """What padding samples is kept as the newest token of the first row."""
    original = batch._fill_sampling

    def fill(into, rows, ends):
        original(into, rows, ends)
        into.sampled[len(rows) :] = into.sampled[0]

    patch.setattr(batch, "_fill_sampling", fill)


def padding_that_is_stored(patch, batch):
    """The keys and values of padding are written to a block of a request."""
    original, slot = batch._padded, shuffled_blocks(JOB_BLOCKS)[-1] * BLOCK_SIZE

    def padded(layout, **named):
        step, into = original(layout, **named)
        into.slots[:] = slot
        return step, into

    patch.setattr(batch, "_padded", padded)


def changes_forgotten(patch, batch):
    """The device hears of a request's first blocks only."""
    original = batch.set_blocks

    def set_blocks(part):
        before = dict(batch._changes)
        original(part)
        if part.first_block:
            batch._changes = before

    patch.setattr(batch, "set_blocks", set_blocks)


BUGS = [one_buffer_for_all, token_of_a_neighbour, padding_in_a_real_row, padding_that_is_stored, changes_forgotten]


@pytest.mark.parametrize("bug", BUGS)
def test_a_broken_twin_says_something_else(model, expected, monkeypatch, bug):
    runner = device_runner_of(model, queue=LateQueue())
    bug(monkeypatch, runner.batch)
    with suppress(IndexError, RuntimeError):  # it looked up a block or token that is not there
        assert run(runner, greedy_jobs(), ahead=True)[0] != expected


# --- the parts -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(model):
    part = ScheduledRequest("z", 0, 1, True, "prefill", block_ids=range(1, 14))
    plan = SchedulerOutput(0, 0.0, {}, [part], first_plan().new_requests, num_tokens=1)
    with pytest.raises(ConfigError, match="'z' has 13 blocks, .* for 12 blocks per request; raise max_model_len"):
        device_runner_of(model).launch(plan)
    jobs = [Job(f"{i}", [1, 2], SamplingParams(max_tokens=4)) for i in range(7)]
    with pytest.raises(ConfigError, match="'6' has 2 tokens and is number 7 .* 6 requests of 48 tokens; raise max_num"):
        run(device_runner_of(model), jobs)
    with pytest.raises(ConfigError, match="'a' has 49 tokens and is number 1"):
        run(device_runner_of(model), [Job("a", [1] * 49, SamplingParams(max_tokens=1))])


@pytest.mark.parametrize("gone", ["finished_ids", "preempted_ids"])
def test_a_request_that_gives_way_gives_its_row_back(model, gone):
    runner = device_runner_of(model)
    runner.execute_model(first_plan())
    batch = runner.batch
    assert batch.block_table("z")[:3].tolist() == [1, 2, 0] and list(batch.states) == ["z"]
    row = batch.block_table("z")
    runner.execute_model(SchedulerOutput(1, 0.0, **{gone: ["z", "unknown"]}))
    assert batch.states == {} and not row.any() and len(batch._free_rows) == 6
    with pytest.raises(KeyError):
        batch.block_table("z")


def test_graphs_for_every_number_of_requests():
    assert bucket_sizes(1) == [1] and bucket_sizes(6) == [1, 2, 4, 6] and bucket_sizes(16) == [1, 2, 4, 8, 16]
    assert bucket_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    for most in (*range(1, 70), 256, 300, 1000):
        sizes = bucket_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        for size, bigger in pairwise(sizes):
            assert bigger - size <= max(size, 1) and (size < 128 or bigger - size <= bigger / 8)
    assert len(bucket_sizes(256)) == 20


class FakeCuda:
    """What torch.cuda does when a graph is recorded, on a CPU."""

    def __init__(self, patch):
        self.recording = False
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        patch.setattr(torch.cuda, "graph", self.graph)

    @contextmanager
    def graph(self, graph, pool):
        assert pool == (0, 1)
        self.recording = True
        yield
        self.recording = False


def test_graphs_are_recorded_from_the_largest_down_and_after_a_rehearsal(monkeypatch):
    cuda, calls, inside = FakeCuda(monkeypatch), [], devices_entered(monkeypatch)

    def of(size):
        return lambda: calls.append((size, cuda.recording)) or torch.full((size,), len(calls) * len(inside))

    graphs = record({size: of(size) for size in (1, 2, 4)}, torch.device("cuda:1"))
    assert calls == [(4, False), (4, True), (2, False), (2, True), (1, False), (1, True)]
    assert list(graphs) == [1, 2, 4]  # the first one that is large enough is the smallest
    assert graphs[2].replay().tolist() == [4, 4] and len(calls) == 6


def test_fields_lie_apart_and_aligned():
    layout = Layout(7, 3, 2, 4, 4, 1)
    batch = Batch(replace(OPTIONS, max_num_seqs=9), BLOCK_SIZE, torch.device("cpu"), HostQueue().run, True)
    batch._changes = dict.fromkeys(range(5), 1)
    buffer = batch._padded(layout)[0].buffer
    ours, theirs = carve(buffer.numpy(), layout), carve(buffer, layout)
    changes = carve_changes(buffer, layout, 5)
    padding = {"nothing": 0, "nowhere": NO_SLOT, "spare row": 9, "spare token": 9 * batch.tokens.shape[1]}
    for number, (field, array, tensor) in enumerate(zip(FIELDS, ours, theirs, strict=True)):
        assert str(tensor.dtype) == f"torch.{field.dtype}" and (array == padding[field.padding]).all()
        array[:] = number
    for number, change in enumerate(changes):
        change.fill_(100 + number)
    for number, (array, tensor) in enumerate(zip(ours, theirs, strict=True)):
        assert (array == number).all() and (tensor == number).all() and array.shape == tensor.shape
        assert (tensor.data_ptr() - buffer.data_ptr()) % (8 * ALIGNED) == 0 == 8 * ALIGNED % 128
    assert [change.tolist() for change in changes] == [[100] * 5, [101] * 5]
    assert [len(each) for each in ours] == [7, 7, 7, 3, 3, 2, 3, 2, 4, 4, 4, 4, 4, 1]


def devices_entered(patch):
    """The devices whose guards are open at the moment: two engines of one process may have a GPU each."""
    inside = []

    @contextmanager
    def guard(device):
        inside.append(device)
        yield
        inside.pop()

    patch.setattr(torch.cuda, "device", guard)
    return inside


def test_work_is_launched_on_the_queues_own_device(monkeypatch):
    inside, seen = devices_entered(monkeypatch), []
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: SimpleNamespace(record=int, synchronize=int))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    queues = [CudaQueue(torch.device(f"cuda:{number}")) for number in range(2)]
    for queue in (*queues, HostQueue()):
        queue.run(lambda: seen.append([*inside]))
    assert seen == [[torch.device("cuda:0")], [torch.device("cuda:1")], []] and inside == []


class FakeEvent:
    """An event of a device whose clock is the test's."""

    now = 0.0  # milliseconds
    inside: list = []  # see `devices_entered`
    recorded_on: list = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.recorded_on.append(*FakeEvent.inside)
        self.at = FakeEvent.now

    def synchronize(self):
        FakeEvent.now = max(FakeEvent.now, self.at)

    def elapsed_time(self, later):
        return later.at - self.at


def test_a_devices_times_are_those_of_the_host(monkeypatch):
    inside = devices_entered(monkeypatch)
    monkeypatch.setattr(FakeEvent, "inside", inside)
    monkeypatch.setattr(FakeEvent, "recorded_on", [])
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(device_queue.time, "perf_counter", lambda: 50.0 + FakeEvent.now / 1e3)
    queue, marks = CudaQueue(torch.device("cuda:1")), []
    for FakeEvent.now in (10.0, 12.5, 13.0, 20.0):
        marks.append(queue.mark())
    assert queue.wait(*marks[:2]) == pytest.approx((50.01, 50.0125))
    assert queue.wait(*marks[2:]) == pytest.approx((50.013, 50.02))
    assert FakeEvent.recorded_on == [torch.device("cuda:1")] * 5 and inside == []
    assert queue.wait(*marks[:2]) == pytest.approx((50.01, 50.0125))


# --- the engine and its worker ---------------------------------------------------------------------------------------

LIMITS = CacheLimits(max_num_seqs=2, max_model_len=20, block_size=16, num_blocks=9)


def generate(model, **config):
    """Tokens and log-probabilities of six requests, one of them cut short by its own words, and the trace."""
    limits = {"block_size": BLOCK_SIZE, "num_blocks": 16, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    engine = LLMEngine(model, config=EngineConfig(**limits | {"max_model_len": 48} | config))
    for i in range(6):
        prompt = random_token_ids(8, 190) + random_token_ids(1 + 2 * i, 190, i)
        params = SamplingParams(max_tokens=20 - i, logprobs=2 if i == 3 else None, ignore_eos=i != 1)
        engine.add_request(f"{i}", prompt, params)
    found = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            completion = output.outputs[0]
            found[output.request_id] = list(completion.token_ids), completion.finish_reason
    engine.shutdown()
    return found, engine.trace


def as_on_a_device(patch, make_queue):
    """Workers make runners as they would on a GPU, with such a queue."""
    patch.setattr(worker_module, "Runner", lambda *given, **named: Runner(*given, make_queue(), **named))


@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize("preemption_mode", ["recompute", "swap"])
def test_an_engine_says_the_same_on_a_device(model, monkeypatch, async_scheduling, preemption_mode):
    expected, _ = generate(model)
    for i in range(6):
        prompt = random_token_ids(8, 190) + random_token_ids(1 + 2 * i, 190, i)
        alone = generate_cached(model, prompt, SamplingParams(max_tokens=20 - i, ignore_eos=i != 1))
        assert expected[f"{i}"][0] == list(alone.token_ids)
    as_on_a_device(monkeypatch, LateQueue)
    ways = {"async_scheduling": async_scheduling, "preemption_mode": preemption_mode}
    for kernels in ({"attention_backend": "reference"}, {"enforce_eager": True}, {"enforce_eager": False}):
        found, trace = generate(model, **kernels, **ways)
        assert found == expected
        assert preemption_mode in {each.mode for step in trace.steps for each in step.preempted}
        assert all(step.device is not None for step in trace.steps)


def test_a_cpu_has_tables_in_common_and_no_graphs(load):
    for name in ("auto", "cpu", "reference"):
        worker = Worker(load(KIND), RunnerOptions(name))
        worker.init_cache(9)
        batch = worker.runner.batch
        assert not batch.is_mirrored and not worker.runner.graphs
        assert batch.device_tables.data_ptr() == batch.tables.__array_interface__["data"][0]
        assert worker.why.startswith("reference: " if name == "reference" else ("cpu: ", "reference: "))


def test_a_backend_that_does_not_take_the_model_is_refused_before_anything_is_allocated(load, monkeypatch):
    monkeypatch.setattr(CacheEngine, "__init__", None)
    worker = Worker(load(KIND), RunnerOptions("flash", block_size=256))
    for call in (lambda: worker.init_cache(9), worker.profile):
        with pytest.raises(KernelError, match="attention_backend 'flash'"):
            call()
    with pytest.raises(KernelError, match="block_size 4: the (kernels in Triton|Triton kernels).* take 16"):
        Worker(load(KIND).to(TRITON_DEVICE), RunnerOptions("triton", block_size=4)).init_cache(9)


def test_the_profile_has_room_for_a_step_that_is_read_late(load, monkeypatch):
    """Its logits are kept for log-probabilities while the next one is computed."""
    as_on_a_device(monkeypatch, HostQueue)
    model = load(KIND)
    limits = {"max_num_batched_tokens": 32, "max_num_seqs": 32, "max_model_len": 48, "block_size": BLOCK_SIZE}
    worker = Worker(model, replace(OPTIONS, fused_ops=True, **limits))
    profile = worker.profile()
    cache = CacheEngine(model.config, 13, BLOCK_SIZE, model.dtype, "cpu")
    plan = worst_plan(**limits)
    with first_layer_alone(model), PeakMemory() as memory:
        runner = worker._new_runner(cache, replace(worker.options, enforce_eager=True))
        unread = runner.launch(plan)
        runner.launch(replace(plan, new_requests=[])).result()
        assert len(unread.logits) == 32
    assert memory.peak_bytes <= profile.activations + profile.masks


def test_a_step_that_is_over_keeps_nothing_for_log_probabilities(model):
    """On a CPU, whose profile is of one step: it may be read when the next one has been computed."""
    plan = first_plan()
    plan.new_requests[0] = plan.new_requests[0]._replace(params=SamplingParams(max_tokens=3, logprobs=1))
    unread = host_runner_of(model).launch(plan)
    assert unread.logits is None and list(unread.result().logprobs) == ["z"]


class FakeCard:
    """A GPU with torch's allocator: of what is kept of no tensor, a live graph's share cannot be given back."""

    def __init__(self, patch):
        self.free, self.kept, self.of_graphs = 1000, 50, 30
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        patch.setattr(torch.cuda, "empty_cache", self.empty_cache)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 2000))

    def empty_cache(self):
        self.free, self.kept = self.free + self.kept - self.of_graphs, self.of_graphs


def test_what_live_graphs_hold_is_not_free(monkeypatch):
    FakeCard(monkeypatch)
    assert card_memory(torch.device("cuda")) == (1020, 2000)


def test_a_shutdown_gives_a_cards_memory_back(monkeypatch):
    card = FakeCard(monkeypatch)
    worker = Worker(SimpleNamespace(device=torch.device("cuda")))
    card.of_graphs = 0  # they are the runner's
    worker.shutdown()
    assert card.free == 1050


@pytest.mark.parametrize(("kind", "enforce_eager"), [("qwen3", False), ("mistral-window", True)])
def test_the_whole_path_in_triton(load, kind, enforce_eager):
    """Kernels, fused operations and sampling, in the interpreter or, where there is a GPU, compiled."""
    options = RunnerOptions("triton", enforce_eager, max_num_seqs=2, max_num_batched_tokens=4, max_model_len=20)
    executor = ModelExecutor([Worker(load(kind).to(TRITON_DEVICE), options)])
    ledger = executor.reserve(LIMITS)
    assert ledger.masks == 0 < ledger.activations
    [worker] = executor.workers
    assert worker.runner.sample_rows is triton_ops.sample_rows and worker.runner.backend.name == "triton"
    assert worker.runner.layers[0].silu_mul is triton_ops.silu_mul
    assert ("launched from Python" in worker.why) == enforce_eager
    params = SamplingParams(max_tokens=3)
    jobs = [Job("a", random_token_ids(7, 190), params, chunk=4), Job("b", random_token_ids(2, 190), params, joins=1)]
    expected = ladder(load(kind, torch.float64), jobs)
    assert run_jobs(worker.runner, jobs, 9, 16, ahead=True)[0] == expected
    executor.shutdown()
    assert worker.runner is None


# --- the cores of a CPU ---


@pytest.fixture
def two_cores(monkeypatch, tmp_path):
    """A machine of which this process may use two cores: `pass_by(seconds, ours, others)`, in seconds of their work.

    `running` threads want a core at the end of it.
    """
    now = {"clock": 100.0, "ours": 7.0, "all": 0.0, "idle": 0.0}

    def pass_by(seconds, ours, others, running=1):
        now["clock"] += seconds
        now["ours"] += ours
        now["all"] += ours + others
        now["idle"] += 2 * seconds - ours - others
        ticks = [round(100 * now[name]) for name in ("all", "idle")]
        kinds = [
            [ticks[0] // 3, 0, 0, ticks[1], 50, 0, 0, 0, 0, 0],
            [0, 0, 0, 9, 9, 0, 0, ticks[0] - ticks[0] // 3, 5, 5],
        ]
        lines = [f"cpu{core} {' '.join(map(str, counts))}" for core, counts in zip((2, 5), kinds, strict=True)]
        elsewhere = f"cpu3 {int(100 * now['clock'])} 0 0 0 0 0 0 0 0 0"
        device_queue.STATISTICS.write_text(
            "\n".join(["cpu  1 2 3 4 5 6 7 8", *lines, elsewhere, "intr 5 6 7", f"procs_running {running}"])
        )

    monkeypatch.setattr(device_queue, "STATISTICS", tmp_path / "stat")
    monkeypatch.setattr(device_queue, "own_cores", lambda: {"cpu2", "cpu5"})
    clocks = SimpleNamespace(perf_counter=lambda: now["clock"], process_time=lambda: now["ours"])
    monkeypatch.setattr(device_queue, "time", clocks)
    pass_by(0, 0, 0)
    return pass_by


def test_cores_that_others_use_are_left_to_them_at_once_and_taken_back_when_they_stay_free(two_cores):
    cores = FreeCores()
    assert cores.usable() == math.inf  # not measured yet
    for seconds, ours, others, expected in [
        (0.5, 1.0, 0.0, 2),
        (0.5, 0.8, 0.14, 2),  # 28 % of a core do no harm
        (0.1, 0.0, 0.2, 2),  # too short to be measured
        (0.4, 0.4, 0.2, 1),
        (0.5, 0.2, 0.9, 1),
        (0.5, 0.15, 1.0, 1),  # the process gets one all the same
        (0.5, 0.5, 0.0, 1),  # once may be chance
        (0.5, 0.5, 0.4, 1),
        (0.5, 0.5, 0.0, 1),
        (0.5, 0.5, 0.1, 2),
    ]:
        two_cores(seconds, ours, others)
        assert cores.usable() == expected, (seconds, ours, others)


def test_what_others_did_while_the_process_rested_counts_for_nothing_but_what_they_do_now(two_cores):
    cores = FreeCores()
    for seconds, ours, others, running, expected in [
        (8.0, 0.1, 7.9, 1, 2),  # another process used a core all the time, and has ended
        (8.0, 0.0, 0.1, 2, 1),  # another process has just started
        (0.5, 0.5, 0.5, 2, 1),
        (8.0, 1.0, 8.0, 3, 1),
        (8.0, 0.0, 8.0, 1, 2),  # at once
        (0.5, 0.4, 0.4, 1, 1),
    ]:
        two_cores(seconds, ours, others, running)
        assert cores.usable() == expected, (seconds, ours, others, running)


def test_where_nobody_tells_of_cores_all_are_free(monkeypatch, tmp_path):
    monkeypatch.setattr(device_queue, "STATISTICS", tmp_path / "none")
    monkeypatch.setattr(device_queue, "own_cores", None)
    monkeypatch.setattr(device_queue, "LOOK_EVERY", 0)
    assert FreeCores().usable() == math.inf


def test_a_step_computes_in_as_many_threads_as_cores_are_free(two_cores):
    given, used = torch.get_num_threads(), []
    queue = HostQueue()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for others in (0.0, 0.0, 1.0):
                two_cores(1, 0.5, others)
                queue.run(lambda: used.append(torch.get_num_threads()))
                assert torch.get_num_threads() == threads  # what the caller gave torch stays
        with pytest.raises(ZeroDivisionError):
            queue.run(lambda: 1 // 0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(given)
    assert used == [1, 1, 1, 2, 2, 1, 1, 2, 1]


@pytest.mark.skipif(not device_queue.STATISTICS.exists(), reason="the system does not tell what its cores do")
def test_a_busy_machine_is_noticed():
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * len(device_queue.own_cores()))
    ]
    try:
        time.sleep(0.2)
        cores = FreeCores()
        time.sleep(1)
        assert cores.usable() == 1
    finally:
        for process in busy:
            process.kill()
            process.wait()
