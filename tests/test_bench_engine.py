"""`minillm bench engine`: the workload is the published one, ratios stay within turns, other tokens are found out."""

import contextlib
import dataclasses
import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from minillm.bench import contenders, engine, engine_report, live, peer_process, real_model, scheduler_cost
from minillm.bench.contenders import Job
from minillm.bench.engine_report import Run, Turn
from minillm.cli import main as cli
from minillm.errors import ConfigError, PeerError
from minillm.model.weights import load_model
from minillm.simulation.workload import course_requests
from minillm.trace.events import BlockUse, ScheduledTokens, StepEvent
from tiny_models import BASE

NUM_REQUESTS = 3
HALF = list(range(0, BASE["vocab_size"], 2))  # of all tokens end an output, if they are not ignored
CHANGES = {"max_position_embeddings": 512, "num_hidden_layers": 2, "tie_word_embeddings": True, "eos_token_id": HALF}
TINY = LlamaConfig(**BASE | CHANGES)


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Garbage collection, which the benchmark and transformers' manager ask for, looks at new objects only."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return contenders.write_random_checkpoint(TINY, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(monkeypatch, folder):
    """Both shapes are a tiny model, named as the real ones."""
    shapes = {
        name: engine.Shape(name, NUM_REQUESTS, lambda _: folder, 8, 64, 8, 64) for name in ("storyteller", "135m")
    }
    monkeypatch.setattr(engine, "SHAPES", shapes)
    monkeypatch.setattr(engine, "WARM_UPS", 1)


@pytest.fixture
def jobs():
    return contenders.make_jobs(NUM_REQUESTS, TINY.vocab_size)


def bench(tmp_path, *options: str) -> dict:
    """What `minillm bench engine` writes."""
    file = tmp_path / "engine.json"
    assert cli.main(["bench", "engine", *options, "--json", str(file)]) == 0
    return json.loads(file.read_text())


# --- the workload ----------------------------------------------------------------------------------------------------


def test_the_workload_is_the_published_one():
    jobs = contenders.make_jobs(64, 1900)
    rng = random.Random(7)
    for job in jobs:
        assert len(job.prompt) == min(256, max(8, round(math.exp(4.0 + 0.8 * standard_normal(rng)))))
        assert job.num_outputs == min(256, max(4, round(math.exp(3.8 + 0.9 * standard_normal(rng)))))
    assert (sum(len(job.prompt) for job in jobs), sum(job.num_outputs for job in jobs)) == (4647, 3188)
    assert {min(min(job.prompt) for job in jobs), max(max(job.prompt) for job in jobs)} <= set(range(1900))


def standard_normal(rng: random.Random) -> float:
    return rng.normalvariate(0.0, 1.0)


def test_lengths_do_not_depend_on_the_vocabulary_nor_on_how_many_requests_follow():
    lengths = [[(len(job.prompt), job.num_outputs) for job in contenders.make_jobs(16, size)] for size in (49_152, 9)]
    assert lengths[0] == lengths[1] == [(len(j.prompt), j.num_outputs) for j in contenders.make_jobs(64, 9)[:16]]


def test_the_workload_is_the_course_s():
    jobs = contenders.make_jobs(64, 4096)
    course = course_requests()
    assert [(len(job.prompt), job.num_outputs) for job in jobs] == [
        (request.num_prompt_tokens, request.params.max_tokens) for request in course
    ]
    assert [job.prompt for job in jobs] == [request.prompt_token_ids for request in course_requests(vocab_size=4096)]


@pytest.mark.parametrize(
    ("arguments", "digest"),  # of what was served when the recorded runs were made
    [((64, 4096, 7), "440344b657b890ca"), ((64, 49_152, 7), "fc879eac711b42d8"), ((3, 1000, 11), "78ccadff6c7676a8")],
)
def test_the_workload_s_tokens_never_change(arguments, digest):
    jobs = json.dumps([[job.prompt, job.num_outputs] for job in contenders.make_jobs(*arguments)])
    assert hashlib.sha256(jobs.encode()).hexdigest()[:16] == digest


def test_the_pool_holds_all_jobs_and_what_transformers_keeps_back():
    jobs = [Job([1] * 16, 17), Job([1] * 3, 1)]  # 3 blocks and 1
    assert contenders.num_blocks_for(jobs) == 5


def test_the_135m_shape_is_the_published_one():
    shape = contenders.SHAPE_135M
    assert (shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads) == (576, 30, 9)
    assert (shape.num_key_value_heads, shape.head_dim) == (3, 64)
    assert (shape.intermediate_size, shape.vocab_size, shape.tie_word_embeddings) == (1536, 49_152, True)
    assert [(engine.SHAPES[name].num_requests) for name in ("storyteller", "135m")] == [64, 16]


def test_a_random_checkpoint_is_the_same_every_time(folder, tmp_path):
    torch.rand(3)  # whatever the state of the generator
    again = contenders.write_random_checkpoint(TINY, tmp_path)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


# --- a run -----------------------------------------------------------------------------------------------------------


def test_the_record_has_what_the_figures_need(tiny, tmp_path, capsys):
    written = bench(tmp_path, "--repeats", "2")
    assert {"machine", "date", "torch", "transformers", "python", "minillm"} <= written.keys()
    assert list(written["shapes"]) == ["storyteller", "135m"]
    for record in written["shapes"].values():
        names = ["ours", "static16", "transformers_cb"]
        assert list(record["seconds"]) == [*names, "gemm_floor"]
        walls = {name: [run["wall"] for run in runs] for name, runs in record["seconds"].items()}
        for peer in names[1:]:
            in_turn = [theirs / ours for theirs, ours in zip(walls[peer], walls["ours"], strict=True)]
            assert record[f"ratio_{peer}"] == {"median": statistics.median(in_turn), "repeats": in_turn}
            assert len(record["ratios_of_user_time"][peer]["repeats"]) == 2
        shares = [floor / ours for floor, ours in zip(walls["gemm_floor"], walls["ours"], strict=True)]
        assert record["gemm_floor_share"] == statistics.median(shares) and min(shares) > 0
        assert record["identical_outputs"] and record["different_by_rounding"] == []
        assert 0 < record["cache_waste"]["of_pool"] < record["cache_waste"]["of_blocks"] < 0.5
        assert record["settings"]["transformers_cb"]["allow_block_sharing"] is False
        assert set(record["load"]) == set(names) and all(len(loads) == 2 for loads in record["load"].values())
        assert record["dtype"] == "float32" and set(record["seconds"]["ours"][0]) == {"wall", "cpu", "user"}
        assert {one["attention"] for one in record["settings"].values() if "attention" in one} == {"sdpa"}
        assert record["settings"]["ours"]["num_blocks"] == record["settings"]["transformers_cb"]["num_blocks"]
    shown = capsys.readouterr().out
    assert shown.count("identical in every token") == 2 and "storyteller, turn 2: transformers_cb" in shown


def test_ratios_can_be_of_cpu_seconds(tiny, tmp_path):
    record = bench(tmp_path, "--timer", "cpu", "--shape", "135m", "--repeats", "1")["shapes"]["135m"]
    cpu = {name: runs[0]["cpu"] for name, runs in record["seconds"].items()}
    assert record["ratio_static16"]["repeats"] == [cpu["static16"] / cpu["ours"]] and record["timer"] == "cpu"


def test_ours_alone_makes_no_ratio(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "load_peer", lambda folder: pytest.fail("transformers was loaded"))
    written = bench(tmp_path, "--peers", "none", "--shape", "135m", "--repeats", "1", "--requests", "2")
    record = written["shapes"]["135m"]
    assert list(written["shapes"]) == ["135m"] and record["requests"] == 2
    assert list(record["seconds"]) == ["ours", "gemm_floor"] and not [key for key in record if key.startswith("ratio_")]
    shown = capsys.readouterr().out
    assert record["identical_outputs"] is None and "times as long" not in shown and "identical" not in shown


def test_every_contender_gives_exactly_the_number_of_tokens_asked_for(folder, jobs):
    reference = load_model(folder, torch.float64, skip_tokenizer_init=True).model
    expected = []
    for job in jobs:
        token_ids = list(job.prompt)
        for _ in range(job.num_outputs):
            token_ids.append(int(engine.last_logits(reference, token_ids).argmax()))
        expected.append(tuple(token_ids[len(job.prompt) :]))
    assert all(set(HALF) & set(output[:-1]) for output in expected), "no output goes on after eos: nothing is shown"
    shape = engine.Shape("tiny", 3, lambda _: folder, 2, 32, 2, 32)
    arguments = engine.parse_arguments([])
    for name, contender in engine.make_contenders(shape, folder, jobs, arguments, engine.Cores(None, None)):
        assert contender.generate(jobs) == expected, name
        assert contender.generate(jobs[:1]) == expected[:1], f"{name}, the second time"
        contender.close()


def test_static_batches_wait_for_their_longest_output(folder, jobs, monkeypatch):
    monkeypatch.setattr(contenders, "STATIC_BATCH", 2)
    model = contenders.load_peer(folder)
    calls, right = [], model.generate

    def counted(token_ids, **kwargs):
        calls.append((tuple(token_ids.shape), kwargs["generation_config"].max_new_tokens))
        return right(token_ids, **kwargs)

    monkeypatch.setattr(model, "generate", counted)
    contenders.StaticBatches(model).generate(jobs)
    pairs = [jobs[:2], jobs[2:]]
    assert calls == [
        ((len(pair), max(len(job.prompt) for job in pair)), max(job.num_outputs for job in pair)) for pair in pairs
    ]


@pytest.mark.parametrize("option", ["--repeats", "--requests"])
def test_nothing_to_measure_is_refused(option, capsys):
    assert cli.main(["bench", "engine", option, "0"]) == cli.USER_ERROR
    assert f"{option} is 0; it must be a whole number" in capsys.readouterr().err


class StoppedManager:
    """Takes requests, gives the results it was made with, and has ended."""

    def __init__(self, *errors: str | None):
        self.results = [SimpleNamespace(request_id=i, generated_tokens=[1], error=e) for i, e in enumerate(errors)]
        self.numbers = itertools.count()

    def pause(self):
        return contextlib.nullcontext()

    def add_request(self, prompt, **kwargs):
        return next(self.numbers)

    def get_result(self, timeout):
        return self.results.pop() if self.results else None

    def is_running(self):
        return False


@pytest.mark.parametrize(
    "errors, message",
    [((None,), "stopped after 1 of 3 requests"), ((None, "no room", None), "failed 1 requests: no room")],
)
def test_a_manager_that_loses_requests_ends_the_benchmark(jobs, errors, message):
    contender = contenders.ContinuousBatches.__new__(contenders.ContinuousBatches)
    contender.manager = StoppedManager(*errors)
    with pytest.raises(RuntimeError, match=message):
        contender.generate(jobs)


def test_a_transformers_without_our_settings_is_refused(folder, jobs, monkeypatch):
    older = dataclasses.make_dataclass("ContinuousBatchingConfig", ["block_size", "num_blocks", "max_batch_tokens"])
    monkeypatch.setattr(contenders, "ContinuousBatchingConfig", older)
    with pytest.raises(ConfigError, match="does not know allow_block_sharing, max_requests_per_batch of"):
        contenders.ContinuousBatches(contenders.load_peer(folder), jobs, 2, 32)


def test_a_transformers_that_says_block_size_and_cannot_pause_takes_part(jobs, monkeypatch):
    """As 5.17, which the GPU machine has."""
    names = ["block_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch", "allow_block_sharing"]
    monkeypatch.setattr(contenders, "ContinuousBatchingConfig", dataclasses.make_dataclass("Older", names))
    seen = {}

    class Manager(StoppedManager):
        pause = property()  # hasattr says no

        def warmup(self):
            pass

        start = warmup

    def init_continuous_batching(generation_config, continuous_batching_config):
        seen.update(vars(continuous_batching_config))
        return Manager(None, None, None)

    config = SimpleNamespace(_attn_implementation="paged|sdpa")
    model = SimpleNamespace(config=config, init_continuous_batching=init_continuous_batching)
    assert contenders.ContinuousBatches(model, jobs, 2, 32).generate(jobs) == [(1,)] * 3
    assert seen["block_size"] == contenders.BLOCK_SIZE


# --- in another process ----------------------------------------------------------------------------------------------

FAKE_PYTHON = """#!{python}
import runpy, sys
assert sys.argv[1] == "-I"
sys.path.insert(0, {folder!r})
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FAKE_VLLM = """
import json, os, pathlib, time, types
__version__ = "0.fake"
HERE = pathlib.Path(__file__).parent
ORDERS = json.loads((HERE / "orders.json").read_text())

class SamplingParams:
    def __init__(self, **given):
        assert (given["temperature"], given["ignore_eos"], given["detokenize"]) == (0.0, True, False)
        self.max_tokens = given["max_tokens"]

class LLM:
    def __init__(self, **arguments):
        print("vllm prints to stdout")
        seen = {"arguments": arguments, "environment": dict(os.environ), "cores": sorted(os.sched_getaffinity(0))}
        (HERE / "seen.json").write_text(json.dumps(seen))
        if ORDERS["does"] == "refuse":
            raise ValueError("no room for a cache")

    def generate(self, prompts, params, use_tqdm):
        if ORDERS["does"] == "die":
            print("one thing", "another thing", "a last word", sep="\\n", flush=True)
            os._exit(3)
        if ORDERS["does"] == "hang":
            time.sleep(600)
        for prompt, wanted in zip(prompts, params, strict=True):
            token_ids = ORDERS["outputs"][json.dumps(prompt["prompt_token_ids"])]
            assert wanted.max_tokens == len(token_ids)
            yield types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=token_ids)])
"""


@pytest.fixture(scope="module")
def said(folder):
    """What is right."""
    jobs = contenders.make_jobs(NUM_REQUESTS, TINY.vocab_size)
    return contenders.StaticBatches(contenders.load_peer(folder)).generate(jobs)


@pytest.fixture
def fake(tmp_path, jobs, said, monkeypatch):
    """Makes the Python of an environment with a fake vLLM that follows instructions; returns its folder."""
    monkeypatch.setattr(live, "preloads", lambda python: [])

    def make(does: str = "well") -> Path:
        outputs = {json.dumps(job.prompt): list(output) for job, output in zip(jobs, said, strict=True)}
        if does == "differ":
            first = json.dumps(jobs[0].prompt)
            outputs[first][2] = (outputs[first][2] + 1) % TINY.vocab_size
        (tmp_path / "orders.json").write_text(json.dumps({"does": does, "outputs": outputs}))
        (tmp_path / "vllm.py").write_text(FAKE_VLLM)
        (tmp_path / "torch.py").write_text("__version__ = '1.fake'\ndef get_num_threads():\n    return 1\n")
        (tmp_path / "transformers.py").write_text("__version__ = '2.fake'\n")
        python = tmp_path / "python"
        python.write_text(FAKE_PYTHON.format(python=sys.executable, folder=str(tmp_path)))
        python.chmod(0o755)
        return python

    return make


def beside(python: Path, *options: str) -> list[str]:
    return ["--vllm", str(python), "--peers", "none", "--shape", "135m", "--repeats", "2", *options]


def test_vllm_takes_part_from_an_environment_of_its_own(tiny, fake, tmp_path, jobs, capsys):
    allowed = os.sched_getaffinity(0)
    written = bench(tmp_path, *beside(fake()))
    record = written["shapes"]["135m"]
    assert list(record["seconds"]) == ["ours", "vllm", "gemm_floor"] and record["identical_outputs"]
    assert min(each["wall"] for each in record["seconds"]["vllm"]) > 0
    assert record["settings"]["vllm"]["versions"].items() > {"vllm": "0.fake", "torch": "1.fake"}.items()
    seen = json.loads((tmp_path / "seen.json").read_text())
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": max(job.num_tokens for job in jobs)}
    asked = {"dtype": "float32", "enforce_eager": False, "enable_prefix_caching": False, "skip_tokenizer_init": True}
    assert seen["arguments"].items() >= (limits | asked).items()
    assert {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}.items() <= seen["environment"].items()
    assert seen["cores"] == record["settings"]["vllm"]["cores"] == [max(allowed)]
    assert os.sched_getaffinity(0) == allowed
    assert str(tmp_path) not in json.dumps(written)  # a record can be shown to others
    shown = capsys.readouterr().out
    assert re.search(
        r"vllm takes [\d.]+ times as long as ours \(median of .*\), and [\d.]+ times the user CPU time", shown
    )


def test_ours_computes_on_the_core_of_vllm(fake, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8})
    bound = []
    monkeypatch.setattr(engine, "bind", bound.append)
    with engine.same_cores(engine.parse_arguments(["--vllm", str(fake()), "--threads", "2,1"])) as cores:
        assert cores == engine.Cores([5, 8], [3, 5, 8]) and bound == [[5, 8]]
    assert bound == [[5, 8], [3, 5, 8]]
    with engine.same_cores(engine.parse_arguments([])) as cores:
        assert cores == engine.Cores(None, None)


def test_vllms_other_tokens_are_found_out(tiny, fake):
    with pytest.raises(AssertionError, match=r"vllm gave request 0 token \d+ as output 2 instead of \d+"):
        engine.main(beside(fake("differ")))


def test_in_bfloat16_other_tokens_are_counted(tiny, fake, tmp_path, capsys):
    record = bench(tmp_path, *beside(fake("differ"), "--dtype", "bfloat16"))["shapes"]["135m"]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert record["dtype"] == seen["arguments"]["dtype"] == "bfloat16"
    assert record["different_from_ours"]["ours"] == 0 < record["different_from_ours"]["vllm"] <= NUM_REQUESTS
    assert record["gemm_floor_share"] > 0 and "identical_outputs" not in record
    assert re.search(r"outputs of vllm that differ from those of our first turn: [1-3] of 3", capsys.readouterr().out)


@pytest.mark.parametrize(
    "does, message",
    [
        ("refuse", r"vllm could not load: ValueError: no room for a cache; it said last: "),
        ("die", r"the process of vllm ended with status 3; it said last: one thing \| another thing \| a last word; "),
    ],
)
def test_a_vllm_that_fails_is_one_line_that_says_what_to_do(tiny, fake, does, message, capsys):
    assert cli.main(["bench", "engine", *beside(fake(does))]) == cli.USER_ERROR
    told = capsys.readouterr().err
    assert re.search(message, told) and "CONTRIBUTING.md says how an environment for it is made" in told
    assert told.count("\n") == 1


def test_a_vllm_that_says_nothing_is_not_waited_for(fake, folder, jobs, monkeypatch):
    contender = live.vllm(str(fake("hang")), folder, "float32", {}, 1, None, False)
    monkeypatch.setattr(live, "MOST_SECONDS", 0.2)
    with pytest.raises(PeerError, match="the process of vllm ended with status -9"):
        contender.generate(jobs)
    contender.close()
    assert contender.process.poll() is not None


def test_an_environment_without_vllm_is_told(folder, monkeypatch):
    monkeypatch.setattr(live, "preloads", lambda python: [])
    with pytest.raises(PeerError, match="No module named 'vllm'"):
        live.vllm(sys.executable, folder, "float32", {}, 1, None, False)


def test_a_vllm_that_would_be_slow_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    assert cli.main(["bench", "engine", "--vllm", str(python)]) == cli.USER_ERROR
    assert re.search(r"libtcmalloc_minimal \(.*\) and libiomp5 \(.*\); install", capsys.readouterr().err)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libiomp5.so").touch()
    monkeypatch.setattr("ctypes.util.find_library", "lib{}.so.4".format)
    assert live.preloads(str(python)) == ["libtcmalloc_minimal.so.4", str(tmp_path / "lib/libiomp5.so")]


def test_what_runs_in_vllms_environment_needs_nothing_of_ours():
    source = Path(peer_process.__file__).read_text()
    names = set(re.findall(r"^import (\w+)$", source, re.MULTILINE))
    assert names == set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)) <= sys.stdlib_module_names


def test_ours_is_measured_with_other_numbers_of_threads(tiny, tmp_path, monkeypatch):
    right = live.thread_environment  # and threads that wait passively, for machines on which other tests run
    monkeypatch.setattr(live, "thread_environment", lambda threads: right(threads) | {"OMP_WAIT_POLICY": "passive"})
    record = bench(tmp_path, "--threads", "1,2", "--peers", "none", "--shape", "135m", "--repeats", "1")["shapes"][
        "135m"
    ]
    assert list(record["seconds"]) == ["ours", "ours_2_threads", "gemm_floor"] and record["identical_outputs"]
    assert record["settings"]["ours_2_threads"]["threads"] == 2


def test_a_model_that_is_not_installed_is_left_out(tiny, monkeypatch, tmp_path, capsys):
    shape = dataclasses.replace(engine.SHAPES["135m"], label="SmolLM2", checkpoint=lambda _: real_model.checkpoint())
    engine.SHAPES["smollm2"] = shape
    monkeypatch.setattr(real_model, "find_gguf", lambda: None)
    written = bench(tmp_path, "--peers", "none", "--repeats", "1")
    assert list(written["shapes"]) == ["storyteller", "135m"]
    assert "SmolLM2 is left out: SmolLM2 needs the packages" in capsys.readouterr().out
    assert cli.main(["bench", "engine", "--shape", "smollm2"]) == cli.USER_ERROR


# --- the same tokens -------------------------------------------------------------------------------------------------


class Spoiled:
    """A contender that says another token in one place of its second output."""

    def __init__(self, contender, place: int, token_id: int):
        self.contender, self.place, self.token_id = contender, place, token_id

    def __getattr__(self, name):
        return getattr(self.contender, name)

    def generate(self, jobs):
        outputs = self.contender.generate(jobs)
        wrong = list(outputs[1])
        wrong[self.place] = self.token_id
        return [outputs[0], tuple(wrong), *outputs[2:]]


def spoil(monkeypatch, name: str, place: int, token_id: int) -> None:
    right = engine.make_contenders

    def make(*arguments):
        for each, contender in right(*arguments):
            yield each, Spoiled(contender, place, token_id) if each == name else contender

    monkeypatch.setattr(engine, "make_contenders", make)


@pytest.mark.parametrize("name", ["ours", "static16", "transformers_cb"])
def test_other_tokens_are_found_out(tiny, name, monkeypatch):
    spoil(monkeypatch, name, place=3, token_id=0)
    with pytest.raises(AssertionError, match=r"gave request 1 token \d+ as output 3 instead of \d+"):
        engine.main(["--shape", "135m", "--repeats", "1"])


def test_a_tie_is_named_and_accepted(tiny, folder, jobs, monkeypatch, tmp_path, capsys):
    """The right token and another have the same row in the output projection, so they are equally likely."""
    first_turn = contenders.StaticBatches(contenders.load_peer(folder)).generate(jobs)
    right, twin = first_turn[1][-1], 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data[twin] = model.get_input_embeddings().weight[right].clone()
    model.save_pretrained(tmp_path / "twins")
    shape = engine.Shape("twins", NUM_REQUESTS, lambda _: tmp_path / "twins", 8, 64, 8, 64)
    monkeypatch.setattr(engine, "SHAPES", {"135m": shape})
    outputs = contenders.StaticBatches(contenders.load_peer(tmp_path / "twins")).generate(jobs)
    said = outputs[1][-1]
    spoil(monkeypatch, "transformers_cb", place=-1, token_id={right: twin, twin: right}[said])
    record = bench(tmp_path, "--shape", "135m", "--repeats", "1")["shapes"]["135m"]
    assert record["different_by_rounding"] == [1] and not record["identical_outputs"]
    assert "identical but for float64 ties that float32 rounded differently, in requests 1" in capsys.readouterr().out


def test_a_missing_token_is_found_out(folder, jobs):
    said = [tuple(range(job.num_outputs)) for job in jobs]
    short = [said[0], said[1], said[2][:-1]]
    runs = {"ours": Run({}, said), "static16": Run({}, said), "transformers_cb": Run({}, short)}
    with pytest.raises(AssertionError, match=r"transformers_cb gave request 2 \d+ tokens instead of \d+"):
        engine.check_same_outputs(folder, jobs, [runs])


# --- figures ---------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_turns():
    assert engine_report.ratio([10.0, 30.0, 8.0], [5.0, 10.0, 1.0]) == {"median": 3.0, "repeats": [2.0, 3.0, 8.0]}


def test_turns_swap_their_order_and_the_floor_follows_ours():
    order = []

    class Noted:
        steps = ()

        def __init__(self, name):
            self.name = name

        def generate(self, jobs):
            order.append(self.name)
            return []

    class Floor:
        def run(self, products):
            order.append("floor")

    made = {name: Noted(name) for name in ("ours", "static16", "transformers_cb")}
    turns = [engine.take_turn(made, Floor(), [], number) for number in range(3)]
    assert [order[i : i + 4] for i in (0, 4, 8)] == [
        ["ours", "floor", "static16", "transformers_cb"],
        ["transformers_cb", "static16", "ours", "floor"],
        ["static16", "transformers_cb", "ours", "floor"],
    ]
    assert all(isinstance(turn, Turn) and turn.runs.keys() == made.keys() for turn in turns)


def test_of_two_neither_comes_first_more_often():
    firsts = [engine.turn_order(["ours", "vllm"], number)[0] for number in range(8)]
    assert firsts.count("ours") == 4 and firsts[:2] == ["ours", "vllm"]


def step(cached_tokens: int, used: int) -> StepEvent:
    parts = (ScheduledTokens("a", 0, 5, "prefill", 1), ScheduledTokens("b", 0, 3, "prefill", 0))
    return StepEvent(0, 0.0, 1.0, parts, cached_tokens=cached_tokens, blocks=BlockUse(used, 0, 11 - used))


def test_waste_is_what_handed_out_blocks_do_not_hold():
    waste = engine_report.cache_waste([step(16, 2), step(12, 1), step(0, 0)])
    assert waste["of_blocks"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert waste["of_pool"] == pytest.approx((1 / 12 + 0.25 / 12) / 2)


def test_the_floor_makes_the_products_of_the_run(folder, monkeypatch):
    """For each step the layers' four products on its tokens, and the output projection on its sampled rows only."""
    model = load_model(folder, skip_tokenizer_init=True).model
    made = []
    monkeypatch.setattr(
        "torch.nn.functional.linear", lambda x, weight, bias=None: made.append((len(x), *weight.shape)) or x
    )
    assert contenders.products_of([step(8, 1)]) == [(8, 1)]
    contenders.GemmFloor(model).run([(8, 1), (4, 0)])
    layer = [(128, 64), (64, 64), (192, 64), (64, 96)]  # qkv, o, gate-up, down of the tiny model
    in_eight, in_four = ([(rows, *shape) for shape in 2 * layer] for rows in (8, 4))
    assert made == [*in_eight, (1, 199, 64), *in_four]


# --- only the scheduler ---------------------------------------------------------------------------------------------


def test_scheduler_cost_is_measured_whatever_waits(tmp_path, capsys, monkeypatch):
    right = scheduler_cost.measure
    monkeypatch.setattr(scheduler_cost, "measure", lambda *given: right(*given, running=8, waiting=(0, 50)))
    written = bench(tmp_path, "--scheduler", "--repeats", "2")["scheduler"]
    assert list(written["waiting"]) == ["0", "50"]
    for row in written["waiting"].values():
        assert min(row[phase] for phase in scheduler_cost.PHASES) > 0 and len(row["repeats"]) == 2
        assert row["total"] == statistics.median(row["repeats"])
    assert re.search(r"\n +50( +\d\.\d{3}){6}\n", capsys.readouterr().out)


def test_what_is_measured_is_decoding_at_full_batch(folder):
    model = load_model(folder, skip_tokenizer_init=True).model
    scheduler, _ = scheduler_cost.decoding_engine(model, running=16, num_waiting=5)
    num_new_blocks = 0
    for _ in range(scheduler_cost.WARM_STEPS + scheduler_cost.STEPS):
        plan = scheduler.schedule()
        assert [part.num_tokens for part in plan.scheduled] == [1] * 16 and scheduler.num_waiting() == 5
        num_new_blocks += sum(len(part.block_ids) for part in plan.scheduled)
        assert all(not update.finish_reason for update in scheduler.update(plan, scheduler_cost.made_up_output(plan)))
    assert num_new_blocks == scheduler_cost.WARM_STEPS + scheduler_cost.STEPS  # one of 16 requests in every step
