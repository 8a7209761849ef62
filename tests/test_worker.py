"""A worker in another process says what one in this process says, and neither side outlives the other."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm import SamplingParams
from minillm.engine.block_manager import BlockManager
from minillm.engine.engine_config import EngineConfig
from minillm.engine.model_executor import ModelExecutor
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler
from minillm.errors import ConfigError, ModelNotFoundError, PromptError, WorkerDiedError
from minillm.runtime import messages, worker_process
from minillm.runtime.plan import BlockMove, ModelOutput, NewRequest, ScheduledRequest, SchedulerOutput
from minillm.runtime.worker import worst_plan
from minillm.runtime.worker_process import _result, _Server
from minillm.sampling.params import PromptLogprobs, TokenLogprobs
from tiny_models import random_token_ids

NUM_BLOCKS, BLOCK_SIZE = 14, 4  # far too few for all at once
KIND = "qwen3"
CONFIG = EngineConfig(block_size=BLOCK_SIZE, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=48).resolved(48)


@pytest.fixture(scope="module")
def in_process(checkpoint):
    """A worker process, shared by the tests that leave it alive; at the end it goes when it is told to."""
    executor = ModelExecutor.start(checkpoint(KIND), replace(CONFIG, worker="process"), num_tokens=190)
    yield executor
    worker = executor.workers[0]
    assert is_there(worker.pid)
    executor.shutdown()
    executor.shutdown()  # no effect the second time
    assert not is_there(worker.pid)
    with pytest.raises(WorkerDiedError, match="ended with exit code 0; start a new engine"):
        executor.init_cache(NUM_BLOCKS)


def run_requests(executor: ModelExecutor, preemption_mode: str = "swap", after_step=lambda step: None):
    """Requests of all kinds on a pool that is too small; returns their outputs, log-probabilities and the trace."""
    executor.init_cache(NUM_BLOCKS, num_host_blocks=NUM_BLOCKS)
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE, num_host_blocks=NUM_BLOCKS)
    scheduler = Scheduler(CONFIG, block_manager=manager, preemption_mode=preemption_mode)
    shared = random_token_ids(9, 190)
    for index in range(6):
        params = SamplingParams(temperature=index % 3, seed=index, max_tokens=20, logprobs=index % 4 or None)
        scheduler.add_request(Request(f"req {index}", shared + random_token_ids(1 + 2 * index, 190, index), params))
    token_ids, logprobs = {}, {}
    while scheduler.has_unfinished_requests():
        plan = scheduler.schedule()
        output = executor.execute_model(plan)
        for update in scheduler.update(plan, output):
            token_ids.setdefault(update.request_id, []).append(update.token_id)
        for request_id, entry in output.logprobs.items():
            logprobs.setdefault(request_id, []).append(as_lists(entry))
        after_step(plan.step)
    return token_ids, logprobs, scheduler.trace


def as_lists(value):
    """A message's content with every tuple, range and other sequence as a list."""
    return messages.decode(messages.encode(value))


# --- messages --------------------------------------------------------------------------------------------------------

NAMES = st.text(max_size=5)
IDS = st.lists(st.integers(0, 2**31), max_size=5)
FLOATS = st.floats(allow_nan=False)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.5, 2),
    top_k=st.integers(-1, 50),
    top_p=st.floats(0.1, 1),
    stop=st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=2),
    stop_token_ids=IDS,
    ignore_eos=st.booleans(),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logprobs=st.none() | st.integers(0, 20),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 2**31), st.floats(-100, 100), max_size=3),
    repetition_penalty=st.floats(0.1, 2),
    include_stop_str_in_output=st.booleans(),
)
PARTS = st.builds(
    ScheduledRequest,
    NAMES,
    st.integers(0),
    st.integers(1),
    st.booleans(),
    st.sampled_from(["prefill", "decode", "recompute"]),
    first_block=st.integers(0),
    block_ids=IDS,
    num_recomputed=st.integers(0),
)
NEW_REQUESTS = st.builds(NewRequest, NAMES, PARAMS, IDS, IDS, IDS)
PLANS = st.builds(
    SchedulerOutput,
    st.integers(0),
    FLOATS,
    decodes=st.dictionaries(NAMES, st.integers(0), max_size=4),
    others=st.lists(PARTS, max_size=4),
    new_requests=st.lists(NEW_REQUESTS, max_size=2),
    finished_ids=st.lists(NAMES, max_size=2),
    preempted_ids=st.lists(NAMES, max_size=2),
    block_moves=st.lists(st.builds(BlockMove, st.sampled_from(["copy", "swap_out", "swap_in"]), IDS, IDS), max_size=2),
    num_tokens=st.integers(0),
    row_length=st.none() | st.integers(1),
    padding_rows=st.lists(NAMES, max_size=2),
)
LOGPROBS = st.builds(TokenLogprobs, st.floats(max_value=0, allow_nan=False), st.integers(1), IDS, st.lists(FLOATS))
OUTPUTS = st.builds(
    ModelOutput,
    st.dictionaries(NAMES, st.integers(0, 2**31)),
    st.integers(0),
    st.dictionaries(NAMES, LOGPROBS, max_size=3),
    st.dictionaries(NAMES, NAMES, max_size=2),
    st.none() | st.tuples(FLOATS, FLOATS),
    st.dictionaries(NAMES, st.builds(PromptLogprobs, st.integers(0), st.lists(LOGPROBS, max_size=2)), max_size=2),
)


@given(PLANS)
def test_a_plan_arrives_as_it_was_sent(plan):
    assert messages.plan_from(as_lists(plan)) == plan


@given(OUTPUTS)
def test_a_result_arrives_as_it_was_sent(output):
    assert messages.output_from(as_lists(output)) == output


def test_sequences_of_every_kind_arrive_as_lists():
    new = NewRequest("\ud83e", SamplingParams(), np.arange(3), (4,))
    part = ScheduledRequest("\ud83e", 0, 4, True, "prefill", block_ids=range(1, 4))
    plan = messages.plan_from(as_lists(SchedulerOutput(0, 0.0, {"a": 7}, [part], [new])))
    assert plan.decodes == {"a": 7} and plan.others == [part._replace(block_ids=[1, 2, 3])]
    assert plan.new_requests == [new._replace(prompt_token_ids=[0, 1, 2], output_token_ids=[4], eos_token_ids=[])]
    assert messages.output_from(as_lists(ModelOutput({"a": np.int64(5)}, 7))) == ModelOutput({"a": 5}, 7)


def test_what_is_not_data_is_not_sent():
    with pytest.raises(TypeError, match="cannot be sent to a worker"):
        messages.encode([object()])


def numbers_in(value):
    """All whole numbers of a message."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return [number for each in value for number in numbers_in(each)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_tokens_travel_once_for_each_admission_and_in_no_other_part_of_a_plan(mode, depth):
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE, num_host_blocks=NUM_BLOCKS)
    scheduler = Scheduler(CONFIG, block_manager=manager, preemption_mode=mode, depth=depth)
    far, requests = 10**6, {}  # no position, block or number of a step
    for index in range(6):
        prompt = [far + number for number in range(10 + 2 * index)]
        requests[f"req {index}"] = request = Request(f"req {index}", prompt, SamplingParams(max_tokens=20))
        scheduler.add_request(request)
    plans, in_flight, announced = [], [], []
    while scheduler.has_unfinished_requests():
        while len(in_flight) < depth and (plan := scheduler.schedule()).num_requests:
            in_flight.append(plan)
            plans.append(plan)
            for new in plan.new_requests:
                request = requests[new.request_id]
                assert new == request.announcement() and new.prompt_token_ids is request.prompt_token_ids
                assert list(new.output_token_ids) == request.output_token_ids  # as it is now
            announced += [new.request_id for new in plan.new_requests]
        plan = in_flight.pop(0)
        output = {part.request_id: far + plan.step for part in plan.scheduled if part.samples}
        scheduler.update(plan, ModelOutput(output, 0))
    assert {name: announced.count(name) for name in requests} == {
        name: 1 + request.num_preemptions for name, request in requests.items()
    }
    assert len(announced) > 6 and all(len(request.output_token_ids) == 20 for request in requests.values())
    for plan in plans:
        numbers = numbers_in(as_lists(replace(plan, new_requests=[])))
        assert max(each for each in numbers if isinstance(each, int)) < far


# --- the same results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preemption_mode", ["recompute", "swap"])
def test_a_worker_process_says_what_a_worker_in_this_process_says(in_process, checkpoint, preemption_mode):
    inline = ModelExecutor.start(checkpoint(KIND), CONFIG, num_tokens=190)
    *expected, trace = run_requests(inline, preemption_mode)
    *there, their_trace = run_requests(in_process, preemption_mode)
    assert there == expected
    assert sorted(len(ids) for ids in expected[0].values()) == sorted(len(ids) for ids in there[0].values())
    assert set(expected[1]) == {f"req {index}" for index in (1, 2, 3, 5)}
    preempted = [preemption.mode for step in trace.steps for preemption in step.preempted]
    assert preemption_mode in preempted  # the way that was to be tested was taken
    assert [step.preempted for step in their_trace.steps] == [step.preempted for step in trace.steps]


def test_two_workers_each_get_every_plan(checkpoint):
    one, two = (ModelExecutor.start(checkpoint(KIND), CONFIG, num_tokens=190).workers[0] for _ in range(2))
    both = ModelExecutor([one, two])
    assert run_requests(both)[0] == run_requests(ModelExecutor([one]))[0]
    both.init_cache(4)
    both.execute_model(worst_plan(3, 1, 9, BLOCK_SIZE))
    for worker in (one, two):
        assert worker.runner.cache.keys[:, 1:].abs().sum() > 0
    both.shutdown()
    assert one.runner is None and two.runner is None


def test_a_worker_process_measures_what_a_worker_in_this_process_measures(in_process, checkpoint):
    inline = ModelExecutor.start(checkpoint(KIND), CONFIG, num_tokens=190)
    ours, theirs = (executor.profile() for executor in (inline, in_process))
    assert theirs._replace(available=0, host_available=0) == ours._replace(available=0, host_available=0)
    assert theirs.available == theirs.host_available > 0


def test_an_error_there_is_the_same_error_here_and_the_worker_goes_on(in_process):
    worker = in_process.workers[0]
    with pytest.raises(ConfigError, match="num_blocks 0") as raised:
        worker.init_cache(0)
    assert "init_cache" in raised.value.__notes__[0]  # where it happened
    with pytest.raises(RuntimeError, match=r"^KeyError in the worker process: 'nonsense'"):
        worker._call("nonsense")
    assert worker.init_cache(5) == 5 * worker.profile().bytes_per_block


def test_errors_cross_by_name_and_only_ours():
    with pytest.raises(PromptError, match="^too long"):
        _result("error", "PromptError", "too long", "trace")
    for name in ("SystemExit", "WorkerDiedError", "MASK_BYTES"):
        with pytest.raises(RuntimeError, match=f"{name} in the worker process: why") as raised:
            _result("error", name, "why", "trace")
        assert type(raised.value) is RuntimeError


def test_the_worker_computes_with_as_many_threads_as_the_engine(in_process, checkpoint):
    assert torch.get_num_threads() == 1
    try:
        _Server().load(str(checkpoint(KIND)), [], "float32", "cpu", None, 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    in_process.profile()
    tasks = Path(f"/proc/{in_process.workers[0].pid}/task")
    if tasks.is_dir():
        assert len(list(tasks.iterdir())) == 1


def test_a_call_that_is_interrupted_leaves_the_next_one_its_own_answer(in_process, monkeypatch):
    worker = in_process.workers[0]
    monkeypatch.setattr(worker, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.init_cache(5)
    monkeypatch.undo()
    assert worker.init_cache(7) == 7 * worker.profile().bytes_per_block


def test_answers_go_to_their_calls_whoever_waits_first_and_whoever_never_does(in_process, checkpoint):
    inline = ModelExecutor.start(checkpoint(KIND), CONFIG, num_tokens=190)
    plans = [one_token_plan("a", [7]), one_token_plan("a", [7], 1), one_token_plan("b", [9])]
    for executor in (inline, in_process):
        executor.init_cache(NUM_BLOCKS)
    expected = [inline.execute_model(plan).token_ids for plan in plans]
    first, second = (in_process.launch(plan) for plan in plans[:2])
    assert second.result().token_ids == expected[1]
    assert first.result().token_ids == first.result().token_ids == expected[0]
    in_process.launch(plans[0])  # nobody reads it, nor the next one
    in_process.launch(plans[1])
    assert in_process.launch(plans[2]).result().token_ids == expected[2]


def one_token_plan(name: str, prompt: list[int], start: int = 0) -> SchedulerOutput:
    """A step for one greedy request, with the first block that there is; all others are gone."""
    plan = SchedulerOutput(start, 0.0, num_tokens=1)
    if start == 0:
        plan.finished_ids += "ab"
        plan.new_requests.append(NewRequest(name, SamplingParams(max_tokens=9), prompt))
        plan.others.append(ScheduledRequest(name, 0, 1, True, "prefill", block_ids=(1,)))
    else:
        plan.decodes[name] = start
    return plan


def test_calls_and_answers_too_large_for_the_socket_never_block_each_other(in_process):
    """The answer quotes the call, so that both are larger than what the socket holds unread."""
    worker = in_process.workers[0]
    watch = threading.Timer(20, worker.shutdown)
    watch.start()
    nonsense = "nonsense" * 200_000
    answers = [worker._send(nonsense) for _ in range(3)]
    watch.cancel()
    assert all(nonsense in worker._wait(answer)[2] for answer in answers)


class Gpu:
    """A worker whose steps are computed when the test lets them."""

    model = SimpleNamespace(device=torch.device("cuda"))

    def __init__(self):
        self.launched, self.computed = [], [threading.Event() for _ in range(4)]

    def launch(self, plan):
        if plan.step == 3:
            raise ConfigError("no such step")
        self.launched.append(plan.step)
        return SimpleNamespace(result=partial(self.result, plan.step))

    def result(self, step):
        assert self.computed[step].wait(10)
        return ModelOutput({"a": step}, 0)

    why = "as it was told"


@pytest.fixture
def gpu_worker(monkeypatch):
    """A `Gpu`, and a socket that a thread of this process serves with it."""
    ours, theirs = (Connection(each.detach()) for each in socket.socketpair())
    gpu = Gpu()
    monkeypatch.setattr(worker_process.Worker, "load", lambda *arguments, **named: gpu)
    served = threading.Thread(target=worker_process.serve, args=(theirs, os.getppid()), daemon=True)
    served.start()
    ours.send_bytes(messages.encode(["load", ["m", "float32", "cuda", None, [], 1]]))
    assert answer_on(ours) == ["ok", None]
    yield gpu, ours
    ours.close()
    served.join(10)
    assert not served.is_alive()


def answer_on(connection) -> list:
    assert connection.poll(10)
    return messages.decode(connection.recv_bytes())


def eventually(condition) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def test_a_plan_is_launched_while_the_one_before_is_computed(gpu_worker):
    gpu, connection = gpu_worker
    for step in range(4):
        connection.send_bytes(messages.encode(["execute_model", [SchedulerOutput(step, 0.0)]]))
    assert eventually(lambda: gpu.launched == [0, 1])
    assert not connection.poll(0.05) and gpu.launched == [0, 1]  # nothing is computed yet, and two are enough
    gpu.computed[1].set()
    assert not connection.poll(0.05)  # answers keep the order of the calls
    gpu.computed[0].set()
    assert [answer_on(connection)[1][0] for _ in range(2)] == [{"a": 0}, {"a": 1}]
    assert eventually(lambda: gpu.launched == [0, 1, 2])
    connection.send_bytes(messages.encode(["why", []]))
    assert not connection.poll(0.05)  # other calls wait for all steps
    gpu.computed[2].set()
    answers = [answer_on(connection) for _ in range(3)]
    assert answers[0][1][0] == {"a": 2} and answers[1][:3] == ["error", "ConfigError", "no such step"]
    assert answers[2] == ["ok", "as it was told"]


def interrupted():
    raise KeyboardInterrupt


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_fails_the_waiting_call_at_once(checkpoint):
    executor = ModelExecutor.start(checkpoint(KIND), replace(CONFIG, worker="process"))
    worker = executor.workers[0]
    killed_at = []

    def kill_soon(step):
        if step == 3:
            os.kill(worker.pid, signal.SIGSTOP)  # so that the call is surely waiting when the kill comes
            threading.Timer(
                0.3, lambda: (killed_at.append(time.monotonic()), os.kill(worker.pid, signal.SIGKILL))
            ).start()

    with pytest.raises(
        WorkerDiedError, match=r"was killed by signal 9 \(Killed.*\) during execute_model; .* new engine"
    ):
        run_requests(executor, after_step=kill_soon)
    assert time.monotonic() - killed_at[0] < 5
    assert not is_there(worker.pid)  # not even as a zombie
    with pytest.raises(WorkerDiedError, match="was killed by signal 9 .* start a new engine"):
        executor.init_cache(NUM_BLOCKS)
    executor.shutdown()


def test_a_model_that_cannot_be_loaded_leaves_no_process(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **named: started.append(popen(*args, **named)) or started[0])
    with pytest.raises(ModelNotFoundError, match="no model or folder 'nowhere'"):
        ModelExecutor.start("nowhere", replace(CONFIG, worker="process"))
    [process] = started
    assert not is_there(process.pid)


PARENT = """
import os, sys
from minillm.runtime.worker_process import ProcessWorker
worker = ProcessWorker(sys.argv[1])
if os.fork() == 0:  # a process that keeps the engine's end of the socket open
    import time; time.sleep(60)
print(worker.pid, flush=True)
sys.stdin.read()
"""


def test_a_worker_ends_when_the_engine_is_killed(checkpoint):
    command = [sys.executable, "-c", PARENT, str(checkpoint(KIND))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        worker = int(parent.stdout.readline())
        assert is_there(worker)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 5
        while is_running(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(worker)
        os.killpg(parent.pid, signal.SIGKILL)  # what the engine had forked


def is_there(pid: int) -> bool:
    """True while the process exists, and be it as a zombie that nobody has reaped."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_running(pid: int) -> bool:
    """True while the process exists and is no zombie: an orphan is reaped by the system, if it gets round to that."""
    try:
        return is_there(pid) and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:  # gone between the two, or a system without /proc
        return is_there(pid)


# --- refused ---------------------------------------------------------------------------------------------------------


def test_impossible_executors_are_refused(load):
    with pytest.raises(ConfigError, match="0 workers"):
        ModelExecutor([])
    with pytest.raises(ConfigError, match="loads the model itself"):
        ModelExecutor.start(load(KIND), replace(CONFIG, worker="process"))


# --- the worst step --------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 200), st.integers(1, 20))
def test_the_worst_plan_uses_the_limits_up(budget, num_seqs, model_len, block_size):
    plan = worst_plan(budget, num_seqs, model_len, block_size)
    lengths = [part.num_tokens for part in plan.scheduled]
    assert len(lengths) == len({part.request_id for part in plan.scheduled}) == min(num_seqs, budget)
    assert lengths[0] == min(budget, model_len)
    assert plan.num_tokens == sum(lengths) >= min(budget, num_seqs * model_len)
    assert plan.num_tokens < budget + num_seqs
    assert all(part.num_tokens and part.end == model_len for part in plan.scheduled)
    assert {len(part.block_ids) for part in plan.scheduled} == {-(-model_len // block_size)}


def test_a_worst_plan_has_long_chunks_and_many_requests():
    assert [part.num_tokens for part in worst_plan(50, 6, 20, 4).scheduled] == [20, 20, 10, 1, 1, 1]
    assert [part.num_tokens for part in worst_plan(50, 2, 20, 4).scheduled] == [20, 20]


def test_the_profile_leaves_the_model_whole(load):
    model = load(KIND)
    layers = model.layers
    ModelExecutor.start(model, CONFIG).profile()
    assert model.layers is layers and len(layers) == 3
