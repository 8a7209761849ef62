"""`minillm bench engine`: the workload is the published one, ratios stay within turns, other tokens are found out."""

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import random
import re
import statistics
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from minillm.bench import contenders, engine, scheduler_cost
from minillm.bench.contenders import Job
from minillm.bench.engine import Run, Turn
from minillm.cli import main as cli
from minillm.errors import ConfigError
from minillm.model.weights import load_model
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


def test_lengths_are_clipped_at_both_ends():
    rng = random.Random(0)
    drawn = {contenders.draw_length(rng, 4.0, 5.0, 8, 256) for _ in range(500)}
    assert (min(drawn), max(drawn)) == (8, 256)


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
        shares = [floor / ours for floor, ours in zip(walls["gemm_floor"], walls["ours"], strict=True)]
        assert record["gemm_floor_share"] == statistics.median(shares) and min(shares) > 0
        assert record["identical_outputs"] and record["different_by_rounding"] == []
        assert 0 < record["cache_waste"]["of_pool"] < record["cache_waste"]["of_blocks"] < 0.5
        assert record["settings"]["transformers_cb"]["allow_block_sharing"] is False
        assert {one["attention"] for one in record["settings"].values() if "attention" in one} == {"sdpa"}
        assert record["settings"]["ours"]["num_blocks"] == record["settings"]["transformers_cb"]["num_blocks"]
    shown = capsys.readouterr().out
    assert shown.count("identical in every token") == 2 and "storyteller, turn 2: static16" in shown


def test_ratios_can_be_of_cpu_seconds(tiny, tmp_path):
    record = bench(tmp_path, "--timer", "cpu", "--shape", "135m", "--repeats", "1")["shapes"]["135m"]
    cpu = {name: runs[0]["cpu"] for name, runs in record["seconds"].items()}
    assert record["ratio_static16"]["repeats"] == [cpu["static16"] / cpu["ours"]] and record["timer"] == "cpu"


def test_ours_alone_makes_no_ratio(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "load_peer", lambda folder: pytest.fail("transformers was loaded"))
    written = bench(tmp_path, "--peers", "none", "--shape", "135m", "--repeats", "1", "--requests", "2")
    record = written["shapes"]["135m"]
    assert list(written["shapes"]) == ["135m"] and record["requests"] == 2
    assert list(record["seconds"]) == ["ours", "gemm_floor"] and not [key for key in record if key.startswith("ratio")]
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
    made = engine.make_contenders(engine.Shape("tiny", 3, lambda _: folder, 2, 32, 2, 32), folder, jobs, True)
    for name, contender in made.items():
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
        made = right(*arguments)
        return made | {name: Spoiled(made[name], place, token_id)}

    monkeypatch.setattr(engine, "make_contenders", make)


@pytest.mark.parametrize("name", ["ours", "static16", "transformers_cb"])
def test_other_tokens_are_found_out(tiny, name, monkeypatch):
    spoil(monkeypatch, name, place=3, token_id=0)
    with pytest.raises(AssertionError, match=r"gave request 1 token \d+ as output 3 instead of \d+"):
        engine.main(["--shape", "135m", "--repeats", "1"])


def test_a_tie_is_named_and_accepted(tiny, folder, jobs, monkeypatch, tmp_path, capsys):
    """The twin of the right token has the same row in the output projection: nobody can tell the two apart."""
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
    assert engine.ratio([10.0, 30.0, 8.0], [5.0, 10.0, 1.0]) == {"median": 3.0, "repeats": [2.0, 3.0, 8.0]}


def test_turns_begin_with_another_contender_and_the_floor_follows_ours():
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
        ["static16", "transformers_cb", "ours", "floor"],
        ["transformers_cb", "ours", "floor", "static16"],
    ]
    assert all(isinstance(turn, Turn) and turn.runs.keys() == made.keys() for turn in turns)


def step(cached_tokens: int, used: int) -> StepEvent:
    parts = (ScheduledTokens("a", 0, 5, "prefill", 1), ScheduledTokens("b", 0, 3, "prefill", 0))
    return StepEvent(0, 0.0, 1.0, parts, cached_tokens=cached_tokens, blocks=BlockUse(used, 0, 11 - used))


def test_waste_is_what_handed_out_blocks_do_not_hold():
    waste = engine.cache_waste([step(16, 2), step(12, 1), step(0, 0)])
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


# --- the scheduler alone ---------------------------------------------------------------------------------------------


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
