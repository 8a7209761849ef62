"""`minillm bench gpu` on the CPU: all of it runs, wrong results are not timed, a lost call leaves what it had."""

import gc
import json
import random
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from minillm.bench import recorded
from minillm.bench.contenders import Job, Ours, our_arguments
from minillm.bench.gpu import ceilings, command, kernels, models, peers, report, serving, supervisor, timing, workloads
from minillm.bench.gpu.scale import DRY, FULL
from minillm.bench.gpu.session import UNFINISHED, DeviceLost, Session, new_record
from minillm.cli import main as cli
from minillm.costs import shapes
from minillm.costs.shapes import Card
from minillm.engine.recorder import Recorder
from minillm.errors import ConfigError, KernelError, UnsupportedModelError
from minillm.kernels import reference
from minillm.model import hf_config
from minillm.trace.events import StepEvent

TINY = DRY.w1_shapes["tiny Qwen3"]


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Garbage collection, which follows every entry, looks at new objects only."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def session(tmp_path):
    card = Card("test", 10**9, 1e9, 1e12)
    return Session(DRY, 1, new_record(DRY, {}), tmp_path / "run.json", card=card, log=lambda line: None)


# --- the workloads ---------------------------------------------------------------------------------------------------


def test_w1_is_drawn_as_nano_vllm_draws_it():
    jobs = workloads.w1_jobs(FULL)
    random.seed(0)
    for job in jobs:  # a prompt's length, its tokens, the next prompt's length, ...
        length = random.randint(100, 1024)
        assert job.prompt == [random.randint(0, 10_000) for _ in range(length)]
    assert [job.num_outputs for job in jobs] == [random.randint(100, 1024) for _ in jobs]
    assert len(jobs) == 256
    assert workloads.totals(jobs) == (142_827, 133_966)


def test_another_w1_is_refused(monkeypatch):
    monkeypatch.setattr(workloads, "uniform_jobs", lambda lengths: [Job([1], 1)])
    with pytest.raises(AssertionError, match=r"W1 has \(1, 1\) .* instead of \(142827, 133966\)"):
        workloads.w1_jobs(FULL)


def test_w2_is_one_reader():
    (job,) = workloads.w2_jobs(FULL)
    assert (len(job.prompt), job.num_outputs) == (5, 256)


def test_w3_has_exponential_outputs_up_to_the_cap():
    jobs = workloads.w3_jobs(FULL)
    outputs = [job.num_outputs for job in jobs]
    assert len(jobs) == 1000 and {len(job.prompt) for job in jobs} == {512}
    assert 118 < sum(outputs) / 1000 < 138 and min(outputs) >= 1 and max(outputs) <= 1536
    assert 0.57 < sum(output < 128 for output in outputs) / 1000 < 0.69  # 1 - 1/e of an exponential is below its mean
    capped = workloads.w3_jobs(replace(DRY, w3_requests=500, w3_mean_output=1000))
    assert max(job.num_outputs for job in capped) == DRY.w3_longest_output


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*shapes.SHAPES, "tiny"])
def test_transformers_gets_the_same_shape(name):
    shape = (shapes.SHAPES | {"tiny": TINY})[name]
    assert hf_config.model_config(models.transformers_config(shape), ()) == shape


def test_a_shape_with_a_window_is_refused():
    with pytest.raises(UnsupportedModelError, match="biases or sliding windows"):
        models.transformers_config(replace(TINY, sliding_windows=(4,)))


def test_a_random_decoder_is_one_that_computes():
    model = models.random_decoder(TINY, torch.bfloat16, torch.device("cpu"))
    again = models.random_decoder(TINY, torch.bfloat16, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.dtype == torch.bfloat16 and model.inv_freq.dtype == torch.float32
    assert torch.equal(model.inv_freq, type(model)(TINY).inv_freq)
    assert model.embed_tokens.weight.float().std().item() == pytest.approx(models.DEVIATION, rel=0.1)
    assert (model.norm.weight == 1).all() and (model.layers[0].self_attn.q_norm.weight == 1).all()
    peer = models.random_peer(TINY, torch.float32, torch.device("cpu"))
    assert sum(p.numel() for p in peer.parameters()) == TINY.num_parameters
    assert peer.generation_config.eos_token_id is None


# --- timing ----------------------------------------------------------------------------------------------------------


def test_work_is_repeated_as_often_as_time_allows():
    calls = []
    seconds = timing.device_seconds(lambda: calls.append(time.sleep(0.002)), torch.device("cpu"), 0.02)
    assert len(calls) == len(seconds) + 2  # once before it counts, once to see how long it takes
    assert timing.LEAST_REPEATS <= len(seconds) <= 10 and min(seconds) >= 0.002
    assert len(timing.device_seconds(lambda: None, torch.device("cpu"), 100.0)) == timing.MOST_REPEATS


def test_on_a_gpu_events_tell_and_the_host_waits_once(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            self.place = None

        def record(self):
            self.place = len(log)
            log.append("event")

        def elapsed_time(self, end):
            assert log[-1] == "wait"  # nothing is read before the device has done it
            return 1000.0 * (end.place - self.place)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    seconds = timing.device_seconds(lambda: log.append("work"), torch.device("cuda"), 0.0)
    assert seconds == [2.0] * timing.LEAST_REPEATS
    assert log == ["work", "wait", "work", "wait", *["event", "work", "event"] * timing.LEAST_REPEATS, "wait"]


# --- kernels ---------------------------------------------------------------------------------------------------------


def test_calls_look_at_other_blocks_until_all_have_been_read():
    scale = replace(DRY, decode_batches=(2, 8), decode_contexts=(40,), rotated_bytes=2**30)
    bench = kernels.KernelBench(scale)
    inputs = bench.decode_inputs((2, 40), 16)
    assert len(inputs.calls) == kernels.MOST_ROTATIONS
    round_trip = torch.stack([tables for _, tables in inputs.calls[:4]])  # [4, 2, 3]: the pool has 24 blocks
    assert sorted(round_trip.flatten().tolist()) == list(range(1, 25))
    assert inputs.counted_bytes == 2 * 40 * 2 * 2 * 16 * 4  # requests, tokens, K and V, heads, D, bytes
    for _, tables in inputs.calls:
        assert len(tables.unique()) == tables.numel() and tables.min() >= 1
    for wanted, calls in ((9, 9), (1, kernels.LEAST_ROTATIONS)):
        enough = replace(scale, rotated_bytes=wanted * inputs.counted_bytes)
        assert len(kernels.KernelBench(enough).decode_inputs((2, 40), 16).calls) == calls


def test_what_is_right_is_timed_and_what_is_wrong_is_not(session):
    inputs = kernels.KernelBench(DRY).decode_inputs((2, 20), 16)
    cell = kernels.measured_decode(session, inputs, reference.decode)
    median = sorted(cell["seconds"])[len(cell["seconds"]) // 2]
    assert cell["bytes_per_second"] == pytest.approx(inputs.counted_bytes / median)
    assert cell["share_of_copy"] == pytest.approx(cell["bytes_per_second"] / 1e9)
    assert cell["largest_difference"] == 0

    def shorter(q, keys, values, tables, lengths, out=None):
        return reference.decode(q, keys, values, tables, lengths - 1, out=out)

    def unwritten(q, keys, values, tables, lengths, out=None):
        reference.decode(q[:1], keys, values, tables[:1], lengths[:1], out=out[:1])
        return out

    for wrong in (unwritten, shorter):  # `out` still holds what is right
        with pytest.raises(AssertionError, match="differs from the reference by"):
            kernels.measured_decode(session, inputs, wrong)


def test_launches_differ_from_the_default_and_from_each_other():
    pytest.importorskip("triton")
    from minillm.kernels.triton_kernels import DECODE_LAUNCH

    tried = list(kernels.launches(FULL))
    others = [options["launch"] for _, options in tried if "launch" in options]
    assert DECODE_LAUNCH not in others and len(set(others)) == len(others) >= 9
    assert len({label for label, _ in tried}) == len(tried)


def test_the_products_of_a_run_are_counted(monkeypatch):
    right, calls = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda *arguments, **kwargs: calls.append(right(*arguments, **kwargs)))
    monkeypatch.setattr(ceilings, "device_seconds", lambda work, *arguments: [work() or 3.0])
    entry = ceilings.gemm_ceiling(DRY)
    assert entry["flops"] * 3.0 == pytest.approx(2 * DRY.gemm_side**3 * len(calls)) and calls


# --- isolation -------------------------------------------------------------------------------------------------------


def saved(session) -> dict:
    return json.loads(session.file.read_text())["parts"]


def test_an_entry_that_fails_is_recorded_and_the_rest_goes_on(session):
    part = session.part("w1")
    session.entry(part, "bad", lambda: [][1])
    session.entry(part, "impossible", partial(fail, KernelError("head size 7")))
    session.entry(part, "good", lambda: {"figure": 1})
    assert saved(session)["w1"]["bad"]["error"] == "IndexError: list index out of range"
    places = saved(session)["w1"]["bad"]["raised_at"].split(", called at ")
    assert [place.partition(":")[0] for place in places] == ["test_bench_gpu.py", "session.py"]  # innermost first
    assert saved(session)["w1"]["impossible"]["refused"] == "head size 7"
    assert saved(session)["w1"]["good"]["figure"] == 1


def fail(error: BaseException):
    raise error


def test_a_killed_call_leaves_what_was_measured_and_what_was_under_way(session):
    part = session.part("w1")
    session.entry(part, "good", lambda: {"figure": 1})
    with pytest.raises(KeyboardInterrupt):
        session.entry(part, "slow", partial(fail, KeyboardInterrupt()))
    assert saved(session)["w1"]["good"]["figure"] == 1
    assert "did not finish" in saved(session)["w1"]["slow"]["error"]


def test_what_is_there_is_not_measured_again_and_what_was_skipped_is(session):
    part = session.part("w1")
    session.entry(part, "good", lambda: {"figure": 1})
    session.deadline = time.perf_counter()
    assert session.entry(part, "late", lambda: {"figure": 2}) == {"skipped": "no time was left"}
    session.deadline = float("inf")
    assert session.entry(part, "good", lambda: {"figure": 3})["figure"] == 1
    assert session.entry(part, "late", lambda: {"figure": 4})["figure"] == 4


def test_time_is_shared(session):
    session.deadline = outer = time.perf_counter() + 100
    with session.share_of_time(1 / 4):
        assert session.seconds_left == pytest.approx(25, abs=1)
        with session.share_of_time(0.0):
            assert session.seconds_left == 0
    assert session.deadline == outer


def test_a_part_that_fails_outside_its_entries_does_not_end_the_run(session):
    command.run_part(session, "w3", lambda session: fail(ValueError("no such shape")))
    assert saved(session)["w3"]["error"] == "ValueError: no such shape"


def test_an_error_of_cuda_ends_the_process_and_running_out_of_memory_does_not(session, monkeypatch):
    session.scale = replace(DRY, device="cuda")
    monkeypatch.setattr(session, "free_memory", lambda: None)
    harmless = [torch.OutOfMemoryError("too large"), KeyError("CUDA error"), KernelError("head size 7")]
    harmless += [RuntimeError("Failed to find C compiler"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")]
    for error in harmless:
        session.entry(session.part("w1"), repr(error), partial(fail, error))
    with pytest.raises(DeviceLost, match="RuntimeError: operation failed during capture"):
        session.entry(session.part("w1"), "graph", partial(fail, RuntimeError("operation failed during capture")))
    assert "during capture" in saved(session)["w1"]["graph"]["error"]
    for words in ("CUDA error: an illegal memory access", "Triton Error [CUDA]: an illegal memory access"):
        with pytest.raises(DeviceLost):
            session.entry(session.part(words), "lost", partial(fail, RuntimeError(words)))


def test_a_row_that_ends_one_process_after_the_other_is_given_up(session, monkeypatch):
    """Each new process loads everything again: a kernel that fails everywhere must not use up the budget."""
    session.scale = replace(DRY, device="cuda")
    monkeypatch.setattr(session, "free_memory", lambda: None)
    row = session.part("kernels").setdefault("cuda, version 1", {})
    row["crashed"] = json.loads(json.dumps(UNFINISHED))  # as the next process finds it
    assert session.entry(row, "works", lambda: {"figure": 1})["figure"] == 1
    with pytest.raises(DeviceLost):
        session.entry(row, "lost", partial(fail, RuntimeError("CUDA error: an illegal memory access")))
    assert "not tried" in session.entry(row, "next", partial(fail, AssertionError("tried")))["error"]
    part = session.part("kernels")
    for number in range(2, 6):
        other = part.setdefault(f"row {number}", {})
        assert session.entry(other, "works", lambda: {"figure": 2})["figure"] == 2
        with pytest.raises(DeviceLost):
            session.entry(other, "lost", partial(fail, RuntimeError("CUDA error: an illegal memory access")))
    late = part.setdefault("row 6", {})
    assert "not tried" in session.entry(late, "late", partial(fail, AssertionError("tried")))["error"]
    assert session.entry(session.part("w1"), "of another part", lambda: {"figure": 3})["figure"] == 3


def test_a_lost_device_is_told_by_the_exit_code(monkeypatch, capsys):
    monkeypatch.setitem(command.PARTS, "w2", (lambda session: fail(DeviceLost("illegal address")), 1))
    assert command.main(["--dry-run", "--only", "w2"]) == supervisor.DEVICE_LOST
    assert "the device was lost: illegal address" in capsys.readouterr().err


CHILD = """
import json, os, pathlib, signal, sys, time
log, file = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--json") + 1])
turn = log.read_text().count(chr(10)) if log.exists() else 0
with log.open("a") as lines:
    lines.write(json.dumps(sys.argv[2:]) + chr(10))
what = {plan}[turn]
if what != "nothing":
    parts = {{"w1": {{str(i): {{}} for i in range(turn + 1)}}}}
    file.write_text(json.dumps({{"schema": 1, "kind": "gpu", "date": "", "machine": {{}}, "parts": parts}}))
if what == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if what == "hang":
    time.sleep(60)
sys.exit(0 if what == "finish" else 75)
"""


def supervised(monkeypatch, tmp_path, *plan: str) -> tuple[int, list[list[str]]]:
    """Exit code, and the options of every process, if these do as `plan` says."""
    log, file = tmp_path / "log", tmp_path / "run.json"
    command = [sys.executable, "-c", CHILD.format(plan=plan), str(log)]
    monkeypatch.setattr(supervisor, "child_command", lambda options: [*command, *options])
    monkeypatch.setattr(supervisor, "POLL", 0.02)
    monkeypatch.setattr(supervisor, "LEAST_STALL", 1.0)
    code = supervisor.supervise(["--only", "w1"], file, 60.0, resume=False)
    return code, [json.loads(line) for line in log.read_text().splitlines()]


def test_after_a_crash_and_a_lost_device_another_process_goes_on(monkeypatch, tmp_path):
    code, options = supervised(monkeypatch, tmp_path, "crash", "lost", "finish")
    assert code == 0 and len(options) == 3
    assert ["--resume" in each for each in options] == [False, True, True]
    assert all(each[:2] == ["--only", "w1"] for each in options)
    budgets = [float(each[each.index("--budget") + 1]) for each in options]
    assert 60 - supervisor.START >= budgets[0] >= budgets[-1] >= 1


def test_a_process_that_hangs_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor, "SHARE_OF_A_STALL", 1 / 60)
    code, options = supervised(monkeypatch, tmp_path, "hang", "finish")
    assert code == 0 and len(options) == 2


def test_where_nothing_more_is_measured_nobody_goes_on(monkeypatch, tmp_path, capsys):
    code, options = supervised(monkeypatch, tmp_path, "lost", "nothing", "finish")
    assert code == 1 and len(options) == 2
    assert "the process that measures ended with 75" in capsys.readouterr().err


def test_a_process_of_its_own_has_the_same_options():
    options = supervisor.child_command(["--only", "w1", "--json", "a.json", "--budget", "7", "--resume"])
    assert options[:5] == [sys.executable, "-m", "minillm.cli.main", "bench", "gpu"]
    arguments = command.parse_arguments(options[5:])
    assert arguments.unsupervised and arguments.resume and arguments.budget == 7 and arguments.only == "w1"


def test_an_error_of_the_device_after_an_entry_is_noticed(session, monkeypatch):
    session.scale = replace(DRY, device="cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: fail(RuntimeError("an illegal memory access")))
    with pytest.raises(DeviceLost, match="illegal memory access"):
        session.entry(session.part("w1"), "bad", lambda: [][1])
    assert "IndexError" in saved(session)["w1"]["bad"]["error"]


# --- peers -----------------------------------------------------------------------------------------------------------


class FakePeer:
    """Takes `seconds` a token on a clock of its own and says its settings."""

    name, version = "fake", "1.2"

    def __init__(self, settings, missing=0):
        self.settings, self.missing, self.calls, self.closed = settings, missing, [], False

    def generate(self, jobs):
        self.calls.append(list(jobs))
        return [[0] * (job.num_outputs - self.missing) for job in jobs]

    def close(self):
        self.closed = True


made: list[FakePeer] = []


def factory(shape, jobs, settings):
    assert len(jobs) and isinstance(jobs, list)
    made.append(FakePeer(settings | {"layers": shape.num_hidden_layers}))
    return made[-1]


def hasty(shape, jobs, settings):
    return FakePeer(settings, missing=1)


def test_a_peer_from_outside_gets_shape_jobs_and_settings(session):
    jobs = [Job([1, 2, 3], 16), Job([4], 8)]
    session.peers, session.repeats = ["test_bench_gpu:factory"], 2
    (other,) = serving.outside(session, TINY, jobs).values()
    record = serving.run_peer(session, other, jobs)
    peer = made[-1]
    assert peer.closed and record["version"] == "1.2"
    assert record["settings"] == {
        "temperature": 0.6,
        "dtype": "float32",
        "device": "cpu",
        "max_num_seqs": DRY.max_num_seqs,
        "max_model_len": 19,
        "max_num_batched_tokens": DRY.max_num_batched_tokens,
        "gpu_memory_utilization": peers.GPU_MEMORY_UTILIZATION,
        "layers": 1,
    }
    assert [[job.num_outputs for job in jobs] for jobs in peer.calls] == [[4, 4], [2, 1], [16, 8], [16, 8]]
    assert (record["subset"], record["output_tokens"], len(record["seconds"])) == ("all", 24, 2)


def test_a_peer_that_gives_too_few_tokens_has_no_speed(session):
    session.peers = ["test_bench_gpu:hasty"]
    (other,) = serving.outside(session, TINY, [Job([1], 8)]).values()
    entry = session.entry({}, "hasty", lambda: serving.run_peer(session, other, [Job([1], 8)]))
    assert entry["error"] == "AssertionError: request 0 got 0 tokens instead of 1"


def test_a_slow_peer_runs_a_subset_that_is_named(session, monkeypatch):
    """A second a token: of 16 tokens, 6 seconds allow a quarter."""
    clock = [0.0]
    monkeypatch.setattr(serving.time, "perf_counter", lambda: clock[0])
    peer = FakePeer({})
    right = peer.generate

    def slow(jobs):
        clock[0] += sum(job.num_outputs for job in jobs)
        return right(jobs)

    peer.generate = slow
    jobs, session.repeats = [Job([1], 8), Job([2], 8)], 3
    monkeypatch.setattr(serving, "warm_up", lambda *arguments: None)
    session.deadline = 8.0
    record = serving.run_peer(session, serving.Other(lambda: peer), jobs)
    assert record["subset"] == "all 2 requests, outputs cut to 1/4.0 of their length"
    assert record["output_tokens_per_second"] == 1.0 and record["output_tokens"] == 4
    clock[0], session.deadline, peer.calls = 0.0, 18.0, []
    record = serving.run_peer(session, serving.Other(lambda: peer, batch_size=1), jobs)
    assert (
        record["subset"] == "the first 1 of 2 requests" and len(peer.calls) == 1
    )  # the pilot was all there is time for


def test_a_peer_with_cut_outputs_is_compared_with_ours_on_the_same(session, monkeypatch):
    """With short outputs, prompts take a larger share: only for that, ours on the whole workload would be faster."""
    jobs = [Job([1], 16), Job([2], 8)]
    ours = {24: 90.0, 12: 60.0, 6: 40.0, 3: 30.0}  # by tokens asked for
    monkeypatch.setattr(serving, "Ours", lambda *arguments: FakePeer({}))
    for name in ("steps", "kernels"):
        monkeypatch.setattr(FakePeer, name, [], raising=False)
    for name in ("roofline", "step_on_device_share", "random_decoder"):
        monkeypatch.setattr(serving, name, lambda *arguments: {})

    def timed_runs(peer, part, repeats, session):
        tokens = workloads.totals(part)[1]
        return {"seconds": [1.0], "output_tokens": tokens, serving.SPEED: ours[tokens]}

    def run_peer(session, other, jobs):
        return {"output_tokens": other.make(), serving.SPEED: 10.0}

    monkeypatch.setattr(serving, "timed_runs", timed_runs)
    monkeypatch.setattr(serving, "run_peer", run_peer)
    others = {tokens: serving.Other(lambda tokens=tokens: tokens, batch) for tokens, batch in ((24, 2), (6, 2), (8, 1))}
    entries = {}
    serving.compare(session, entries, TINY, jobs, others)
    assert {name: entries[name]["minillm_is_faster_by"] for name in others} == {24: 9.0, 6: 4.0, 8: 9.0}
    assert entries["minillm"][serving.SPEED] == 90.0
    entries = {}
    serving.compare(session, entries, TINY, jobs, {8: others[8]})  # by batches alone: nothing is cut
    assert entries["minillm"][serving.CUT_SPEEDS] == {}


@pytest.mark.parametrize("fastest", [*peers.PAGES, None])
@pytest.mark.parametrize("failing", [None, *peers.PAGES])
def test_transformers_gets_the_pages_with_which_it_is_fastest(monkeypatch, fastest, failing):
    clock, closed = [0.0], []

    class Contender(FakePeer):
        def generate(self, jobs):
            clock[0] += sum(job.num_outputs for job in jobs) * (1 if self.settings["pages"] == fastest else 2)

        def close(self):
            closed.append(self.settings["pages"])

    def make(model, jobs, most, budget, temperature):
        pages = peers.DEFAULTS if budget is None else peers.OURS
        assert budget in (None, FULL.max_num_batched_tokens)
        return Contender({"pages": pages}) if pages != failing else fail(RuntimeError("no room"))

    monkeypatch.setattr(peers, "random_peer", lambda *arguments: None)
    monkeypatch.setattr(peers, "ContinuousBatches", make)
    monkeypatch.setattr(peers.time, "perf_counter", lambda: clock[0])
    peer = peers.continuous_peer(TINY, [Job([1], 80)] * 9, FULL)
    [expected] = {fastest or peers.DEFAULTS} - {failing} or {*peers.PAGES} - {failing}
    assert peer.settings["pages"] == peer.settings["pages_and_budget"] == expected
    assert closed == [pages for pages in peers.PAGES if pages != failing]  # not the one that is to run
    assert peer.settings["seconds_of_a_pilot"] == {each: 90 if each == fastest else 180 for each in closed}
    monkeypatch.setattr(peers, "ContinuousBatches", lambda *arguments: fail(RuntimeError("no room")))
    with pytest.raises(RuntimeError, match="no room"):
        peers.continuous_peer(TINY, [Job([1], 80)], FULL)


@pytest.mark.parametrize(
    "batch_size, expected",
    [
        (None, [(3, 1), (3, 2), (3, 5), (3, 10)]),  # requests, tokens of the first
        (3, [(3, 1), (3, 2), (3, 5), (3, 10)]),
        (2, [(2, 10), (3, 10)]),
        (1, [(1, 10), (2, 10), (3, 10)]),
    ],
)
def test_subsets_grow_to_the_whole(batch_size, expected):
    jobs = [Job([1], 10), Job([2], 6), Job([3], 1)]
    parts = serving.subsets(jobs, batch_size)
    assert [(len(part), part[0].num_outputs) for part in parts] == expected
    assert list(parts[-1]) == jobs and all(job.num_outputs >= 1 for part in parts for job in part)


@pytest.mark.parametrize(
    "path, message",
    [
        ("nothing", "not of the form package.module:factory"),
        ("no_such_module_here:factory", "no_such_module_here cannot be imported"),
        ("test_bench_gpu:no_factory", "has no function 'no_factory'"),
    ],
)
def test_a_peer_that_is_not_there_is_refused_before_anything_runs(path, message, capsys):
    assert cli.main(["bench", "gpu", "--dry-run", "--peer", path]) == cli.USER_ERROR
    assert message in capsys.readouterr().err


def test_the_largest_static_batch_is_what_half_the_free_memory_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (140 * 2**30, 141 * 2**30))
    name, shape = FULL.large_shape
    jobs = [Job([0] * 512, outputs) for outputs in (1536, 3)] * 500
    assert peers.largest_static_batch(shape, jobs, FULL) == 56  # 1 GiB a request, 63.7 of them
    assert peers.largest_static_batch(shape, jobs[:3], FULL) == 3


# --- ours ------------------------------------------------------------------------------------------------------------


def test_ours_stands_beside_what_the_ceilings_allow(session):
    jobs = workloads.w1_jobs(DRY)
    session.repeats = 2
    record = serving.run_ours(session, TINY, jobs, {"block_size": 32})
    assert len(record["seconds"]) == 2 and record["output_tokens"] == sum(job.num_outputs for job in jobs)
    assert record["settings"]["block_size"] == 32 and "the fastest that works here" in record["kernels"]
    assert 0 < record["roofline_seconds"] <= record["roofline_seconds_of_its_steps"] * (1 + 1e-9)
    assert record["roofline_share"] == pytest.approx(record["roofline_seconds"] * 2 / sum(record["seconds"]))


def test_a_run_is_written_down_when_its_steps_are_asked_for_and_not_when_the_next_begins(monkeypatch):
    model = models.random_decoder(TINY, torch.float32, torch.device("cpu"))
    jobs = workloads.w1_jobs(DRY)
    written, right = [], Recorder.trace.fget
    monkeypatch.setattr(Recorder, "trace", property(lambda recorder: written.append(1) or right(recorder)))
    with closing(Ours(model, our_arguments(jobs, 4, 32))) as ours:
        ours.generate(jobs)
        ours.generate(jobs[:1])
        assert not written
        assert sum(part.num_sampled for step in ours.steps for part in step.scheduled) == jobs[0].num_outputs
        assert written


def test_how_long_a_step_was_on_the_device():
    times = [(0.0, 1.0), (1.5, 2.0), (3.0, 4.0)]
    steps = [StepEvent(i, *each, (), device=each) for i, each in enumerate(times)]
    assert serving.step_on_device_share(steps) == 2.5 / 4
    assert serving.step_on_device_share([*steps, StepEvent(3, 4.0, 5.0, ())]) is None


def test_each_variant_differs_from_the_first_in_what_its_name_says(session):
    variants = serving.ablation_variants(session)
    assert list(variants.values())[0] == {}
    assert variants["no CUDA graphs"] == {"enforce_eager": True}
    assert all(0 < len(changes) <= 2 for label, changes in variants.items() if label != serving.FIRST_VARIANT)
    assert len({json.dumps(changes) for changes in variants.values()}) == len(variants)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The file and the text of one whole dry run."""
    file = tmp_path_factory.mktemp("bench") / "dry.json"
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **kwargs: lines.append(" ".join(map(str, words))))
        options = ["--dry-run", "--repeats", "1", "--json", str(file), "--peer", "test_bench_gpu:factory"]
        assert cli.main(["bench", "gpu", *options]) == 0
    return file, "\n".join(lines)


def test_a_dry_run_measures_every_part(dry_run):
    run = json.loads(dry_run[0].read_text())
    assert list(run["parts"]) == ["ceilings", *command.PARTS]
    assert find(run["parts"], "error") == []
    missing = {reason.split(":")[0] for reason in find(run["parts"], "refused")}
    assert missing <= {"attention_backend 'cuda'", "attention_backend 'flash'", "attention_backend 'triton'"}
    for name, shape in DRY.w1_shapes.items():
        entries = run["parts"]["w1"][name]
        assert len(entries) == 5 and all(entry["output_tokens"] for entry in entries.values())
        assert all("minillm_is_faster_by" in entry for label, entry in entries.items() if label != "minillm")
        assert shape.num_hidden_layers == entries["test_bench_gpu:factory"]["settings"]["layers"]
    assert "batches of 2" in list(run["parts"]["w3"]["tiny Llama"])[1]
    assert {"minillm", "torch", "triton", "transformers"} == set(run["versions"])


def find(node: dict, name: str) -> list[str]:
    """All values under this name, at any depth."""
    return [value for key, value in node.items() if key == name and isinstance(value, str)] + [
        found for value in node.values() if isinstance(value, dict) for found in find(value, name)
    ]


def test_a_dry_run_cannot_be_taken_for_a_measurement(dry_run):
    file, text = dry_run
    assert text.count("DRY RUN, NOT A MEASUREMENT") >= 3 and text.rstrip().endswith("DRY RUN, NOT A MEASUREMENT")
    with pytest.raises(ConfigError, match="dry run: its figures mean nothing"):
        recorded.load(file)
    with pytest.raises(ConfigError, match="a dry run is not recorded"):
        command.main(["--dry-run", "--json", str(recorded.FOLDER / "run.json")])
    assert not (recorded.FOLDER / "run.json").exists()


def test_a_finished_run_has_nothing_to_resume(dry_run, monkeypatch):
    before = json.loads(dry_run[0].read_text())["parts"]
    monkeypatch.setattr(serving, "run_ours", lambda *arguments: fail(AssertionError("measured again")))
    assert command.main(["--dry-run", "--resume", "--json", str(dry_run[0])]) == 0
    assert json.loads(dry_run[0].read_text())["parts"] == before


def test_a_record_is_shown(dry_run, capsys):
    assert cli.main(["bench", "gpu", "--show", str(dry_run[0])]) == 0
    shown = capsys.readouterr().out
    assert "DRY RUN" in shown and shown.strip() in dry_run[1]
    for words in ("decode attention", "W1: 3 requests", "W2: 1 requests", "W3: 3 requests", "one thing changed"):
        assert words in shown


def test_another_machine_does_not_go_on_with_a_record(dry_run, tmp_path, capsys):
    run = json.loads(dry_run[0].read_text())
    file = tmp_path / "elsewhere.json"
    file.write_text(json.dumps(run | {"machine": {"gpu": "another"}}))
    assert cli.main(["bench", "gpu", "--dry-run", "--resume", "--json", str(file)]) == cli.USER_ERROR
    assert "--resume: machine of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--only", "w1,w9"], "--only 'w9' is not one of ceilings, kernels, w1, w2, w3, ablation"),
        (["--repeats", "0"], "--repeats is 0; it must be a whole number"),
        (["--budget", "0.5"], "--budget is 0.5; it must be a number of seconds, at least 1"),
        (["--resume"], "--resume continues the file of --json"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, capsys):
    assert cli.main(["bench", "gpu", "--dry-run", *options]) == cli.USER_ERROR
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_real_run_is_refused(tmp_path, capsys):
    assert cli.main(["bench", "gpu", "--json", str(tmp_path / "run.json")]) == cli.USER_ERROR
    assert "torch sees no CUDA device here" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_help_tells_how_to_write_a_peer(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = capsys.readouterr().out
    assert "--peer MODULE:FACTORY" in shown and "`factory(shape, jobs, settings)`" in shown and "nano-vllm" in shown


# --- recorded runs ---------------------------------------------------------------------------------------------------


def test_the_latest_recorded_run_of_a_kind(tmp_path):
    assert recorded.latest("gpu", tmp_path) is None
    run = {"schema": 1, "kind": "gpu", "machine": {}, "parts": {}}
    for name, date in (("a", "2026-11-23"), ("b", "2026-11-25"), ("c", "2026-11-24")):
        (tmp_path / f"{name}.json").write_text(json.dumps(run | {"date": date}))
    (tmp_path / "d.json").write_text(json.dumps(run | {"date": "2027-01-01", "kind": "other"}))
    assert recorded.latest("gpu", tmp_path)["date"] == "2026-11-25"
    (tmp_path / "e.json").write_text(json.dumps(run | {"date": "2026-11-24", "parts": {"w1": {}}}))
    assert recorded.latest("gpu", tmp_path, part="w1")["parts"] == {"w1": {}}
    assert recorded.latest("gpu", tmp_path, part="w2") is None


@pytest.mark.parametrize("text, message", [("{", "cannot be read"), ('{"schema": 1}', "no kind, date"), ("3", "no ")])
def test_what_is_no_record_is_refused(text, message, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        recorded.latest("gpu", tmp_path)


def test_all_recorded_runs_are_real_ones():
    for file in recorded.FOLDER.glob("*.json"):
        run = recorded.load(file)
        assert run["kind"] != "gpu" or run["machine"]["gpu"]


def test_a_table_names_what_is_missing_once():
    cell = {"refused": "no GPU"}
    parts = {"kernels": {"decode": {"flash": {"1 x 2": cell, "1 x 4": cell}}}, "w1": {"error": "ValueError: broken"}}
    run = {"kind": "gpu", "date": "2026-11-23", "machine": {"gpu": "H200", "driver": "580"}, "parts": parts}
    text = report.table(run)
    assert "kernels / decode / flash / 1 x 2 and 1 more: refused: no GPU" in text
    assert "w1: error: ValueError: broken" in text and "DRY RUN" not in text


def test_peers_are_told_apart_from_a_namespace():
    """A factory may return anything with the four names."""
    peer = SimpleNamespace(name="x", version="1", settings={}, generate=lambda jobs: [[1]], close=lambda: None)
    session = Session(DRY, 1, new_record(DRY, {}), log=lambda line: None)
    assert serving.run_peer(session, serving.Other(lambda: peer), [Job([1], 1)])["subset"] == "all"
