"""`minillm bench ladder`: same tokens on every rung, one budget of cache for all, work that is counted, not assumed."""

import gc
import json
import os
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from minillm.bench import contenders, engine, ladder, ladder_predicted, ladder_report, ladder_rungs, measuring
from minillm.bench.contenders import Job
from minillm.bench.ladder_rungs import Budget, Rows, TransformersBatches
from minillm.cli import main as cli
from minillm.engine import SchedulerConfig
from minillm.errors import ConfigError
from minillm.ladder import ContiguousExecutor, generate_cached, generate_naive
from minillm.model import load_model, read_config
from minillm.runtime import ScheduledRequest, SchedulerOutput, descendants
from minillm.simulation import StepWork
from minillm.trace import BlockUse, ScheduledTokens, StepEvent
from tiny_models import BASE

TINY = LlamaConfig(**BASE | {"max_position_embeddings": 1024, "num_hidden_layers": 2, "tie_word_embeddings": True})
NUM_REQUESTS, NUM_NAIVE, NUM_ALONE = 6, 2, 4
OURS = ["naive", "cache", "static", "dynamic", "continuous", "paged", "kernels", "processes", "unshared", "shared"]
PEERS = ["transformers_naive", "transformers_cache", "transformers_static", "transformers_cb"]


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Garbage collection, which the benchmark and transformers' manager ask for, looks at new objects only."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return contenders.write_random_checkpoint(TINY, tmp_path_factory.mktemp("tiny"))


def few_jobs(num_jobs: int, vocab_size: int, seed: int = contenders.COURSE_SEED) -> list[Job]:
    """The workload, but short: the tests have no time."""
    jobs = contenders.make_jobs(num_jobs, vocab_size, seed)
    return [Job(job.prompt[: 5 + 7 * number], 3 + 4 * (number % 3)) for number, job in enumerate(jobs)]


@pytest.fixture(scope="module")
def jobs():
    return few_jobs(NUM_REQUESTS, TINY.vocab_size)


@pytest.fixture(scope="module")
def budget(jobs, folder):
    return Budget.of(
        jobs, read_config(folder), 4, num_bytes=130 * ladder_rungs.kv_bytes_per_token(read_config(folder), 4)
    )


@pytest.fixture
def tiny(monkeypatch, folder):
    """The storyteller's shape is a tiny model."""
    shape = engine.Shape("tiny", NUM_REQUESTS, lambda _: folder, 8, 64, 8, 64)
    monkeypatch.setattr(ladder, "MODELS", {"storyteller": shape})
    monkeypatch.setattr(ladder, "SHAPES", {"storyteller": ladder.Shape(NUM_REQUESTS, NUM_NAIVE, NUM_ALONE, 8)})
    monkeypatch.setattr(ladder, "make_jobs", few_jobs)
    monkeypatch.setattr(ladder, "PREFIX_TOKENS", 32)
    monkeypatch.setattr(ladder, "WARM_UP_JOBS", 1)


def bench(folder, *options: str) -> int:
    return cli.main(["bench", "ladder", "--shape", "storyteller", *options])


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_whole_run(tiny, tmp_path, folder, jobs, budget, capsys, monkeypatch):
    file, drawing = tmp_path / "ladder.json", tmp_path / "ladder.svg"
    options = ("--repeats", "2", "--budget", str(budget.num_bytes), "--simulate")
    assert bench(folder, *options, "--json", str(file), "--svg", str(drawing)) == 0
    written = json.loads(file.read_text())
    assert (written["kind"], written["schema"]) == ("ladder", 1)
    assert {"machine", "date", "torch", "transformers", "python", "minillm"} <= written.keys()
    part = written["parts"]["storyteller"]
    rungs = part["rungs"]
    assert list(rungs) == OURS + PEERS and part["different_by_rounding"] == []

    # every rung did what its name says
    prompts, outputs = ([len(job.prompt) for job in jobs], [job.num_outputs for job in jobs])
    lengths = [[n + i for i in range(outs)] for n, outs in zip(prompts, outputs, strict=True)]  # fed for each token
    naive_tokens = sum(map(sum, lengths[:NUM_NAIVE]))
    once = sum(job.num_tokens - 1 for job in jobs)  # the last token is never fed back
    computed = {name: rung["computed_tokens"] for name, rung in rungs.items()}
    assert computed["naive"] == computed["transformers_naive"] == naive_tokens
    alone = sum(job.num_tokens - 1 for job in jobs[:NUM_ALONE])
    assert computed["cache"] == computed["transformers_cache"] == alone
    assert computed["continuous"] == once and computed["paged"] == computed["kernels"] >= once
    assert computed["static"] == computed["transformers_static"] == padded(jobs, budget.rows)
    assert computed["dynamic"] > once and computed["processes"] >= once
    assert computed["unshared"] - computed["shared"] >= 32  # of the second request at least
    steps = {name: rung["steps"] for name, rung in rungs.items()}
    assert steps["naive"] == sum(outputs[:NUM_NAIVE]) and steps["cache"] == sum(outputs[:NUM_ALONE])
    assert steps["paged"] < steps["continuous"] < steps["static"] == steps["transformers_static"]
    why = {name: rungs[name]["settings"].get("kernels", "") for name in ("paged", "kernels", "processes")}
    assert why["paged"].startswith("reference") and rungs["processes"]["settings"]["worker"] == "process"

    # memory: one budget; rows waste what blocks do not
    for name, rung in rungs.items():
        cache = rung["cache"]
        assert 0 <= cache["set_aside"] <= cache["budget"] == budget.num_bytes
        if cache["reserved"] is not None:
            assert cache["reserved"]["mean"] <= cache["reserved"]["peak"] <= budget.num_bytes, name
        if cache["wasted"] is not None:
            assert cache["wasted"]["mean"] == pytest.approx(cache["reserved"]["mean"] - cache["used"]["mean"])
    row = budget.longest * budget.bytes_per_token
    assert rungs["static"]["cache"]["reserved"]["peak"] == budget.rows * row == 2 * row
    assert rungs["shared"]["cache"]["used"] is None and rungs["naive"]["cache"]["reserved"]["peak"] == 0
    share = {
        name: rungs[name]["cache"]["wasted"]["mean"] / rungs[name]["cache"]["reserved"]["mean"] for name in OURS[2:7]
    }
    assert share["paged"] < 0.4 < share["continuous"]

    # factors are of the same requests, turn by turn
    def seconds(name: str, turn: int) -> float:
        return rungs[name]["seconds"][turn]["wall"]

    over = rungs["dynamic"]["over_before"]
    assert over["repeats"] == pytest.approx([seconds("static", i) / seconds("dynamic", i) for i in (0, 1)])
    assert over["median"] == statistics.median(over["repeats"]) and over["same_requests"]
    assert rungs["cache"]["over_before"]["requests"] == NUM_NAIVE and rungs["cache"]["over_before"]["same_requests"]
    assert not rungs["static"]["over_before"]["same_requests"]
    chain = [rungs[name]["over_before"]["median"] for name in OURS[1:8]]
    assert rungs["processes"]["over_first"] == pytest.approx(statistics.geometric_mean(chain) ** len(chain))
    assert rungs["transformers_static"]["over_transformers_static"]["median"] == 1
    assert rungs["shared"]["over_first"] is None and rungs["shared"]["over_before"]["median"] > 0
    for rung in rungs.values():
        assert 0 < rung["ttft"]["p50"] <= rung["ttft"]["p99"] and 0 < rung["itl"]["p50"] <= rung["itl"]["p99"]
        assert len(rung["seconds"]) == 2 and set(rung["seconds"][0]) == {"wall", "cpu", "user"}

    # the simulator
    predicted = part["predicted"]
    assert list(predicted["rungs"]) == [name for name in OURS if name != "processes"]
    errors = [abs(each["over_before"]["error"]) for each in predicted["rungs"].values() if each["over_before"]]
    assert predicted["median_error"] == statistics.median(errors) and len(errors) == 7
    assert (
        set(predicted["prices"]) == {"alone", "rows", "paged", "kernels"} and "two processes" in predicted["left_out"]
    )

    # what was printed is what the record says
    shown = capsys.readouterr().out
    monkeypatch.setattr(ladder, "measure_shape", lambda *_: pytest.fail("something was measured"))
    assert bench(folder, "--show", str(file)) == 0
    again = capsys.readouterr().out
    assert again in shown and "every rung gave the same tokens" in again and "median error of a factor" in again
    assert "naive: the first 2 requests only" in again and drawing.read_text().count("<svg") == 1
    picture = ladder_report.waterfall(part)
    assert [step.name for step in picture.steps] == [rungs[name]["label"] for name in OURS[1:8]]
    assert picture.total == pytest.approx(rungs["processes"]["over_first"])


def mean(rung: dict, what: str) -> float:
    return rung["cache"][what]["mean"]


def padded(jobs: list[Job], rows: int) -> int:
    """Tokens of left-padded batches in order of arrival, each until its longest output."""
    batches = [jobs[first : first + rows] for first in range(0, len(jobs), rows)]
    return sum(
        len(batch) * (max(len(job.prompt) for job in batch) + max(job.num_outputs for job in batch) - 1)
        for batch in batches
    )


# --- the budget ------------------------------------------------------------------------------------------------------


def test_a_quarter_of_what_all_need_is_the_default(folder):
    config = read_config(folder)
    jobs = contenders.make_jobs(64, TINY.vocab_size)
    budget = Budget.of(jobs, config, 4)
    per_token = 2 * 2 * config.num_key_value_heads * config.head_dim * 4
    assert budget.num_bytes == sum(job.num_tokens for job in jobs) * per_token // 4
    assert (budget.longest, budget.rows, budget.num_blocks) == (512, 3, 122)


def test_a_budget_without_room_for_a_row_is_refused(tiny, folder, capsys):
    assert bench(folder, "--budget", "1000") == cli.USER_ERROR
    assert "a cache of 1,000 bytes has no room for one row of" in capsys.readouterr().err


def test_a_baseline_beyond_the_budget_is_refused_before_it_runs(folder, jobs, budget):
    peer = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    assert TransformersBatches(peer, jobs, budget, budget.rows).set_aside <= budget.num_bytes
    with pytest.raises(ConfigError, match=r"transformers sets [\d,]+ bytes of cache aside, the budget is"):
        TransformersBatches(peer, jobs, budget, budget.rows + 1)


def test_what_rows_set_aside_is_what_their_executor_allocates(folder, jobs, budget):
    model = load_model(folder, skip_tokenizer_init=True).model
    rung = Rows("static", model, jobs, budget, 64)
    cache = ContiguousExecutor(model, rung.config.max_num_seqs, rung.config.max_model_len).cache
    assert cache.keys.nbytes + cache.values.nbytes == rung.set_aside <= budget.num_bytes


def test_what_the_pool_sets_aside_is_what_it_allocates(folder, jobs, budget):
    rung = ladder_rungs.Paged(load_model(folder, skip_tokenizer_init=True).model, jobs, budget, {"max_num_seqs": 4})
    ledger = rung.engine.llm.engine.ledger
    assert ledger.num_blocks * ledger.bytes_per_block == rung.set_aside <= budget.num_bytes
    rung.close()
    with pytest.raises(ConfigError, match="the pool sets"):
        ladder_rungs.Paged(folder, jobs, budget, {}, num_blocks=budget.num_blocks + 1)


# --- planted faults --------------------------------------------------------------------------------------------------


def test_a_rung_that_gives_another_token_is_found(folder, jobs, budget):
    model = load_model(folder, skip_tokenizer_init=True).model
    rungs = {
        "naive": ladder_rungs.Alone(generate_naive, model, jobs[:2], budget, False).placed("naive", "naive", None),
        "cache": ladder_rungs.Alone(generate_cached, model, jobs[:3], budget, True).placed("cache", "cache", "naive"),
    }
    turn = {name: rung.run() for name, rung in rungs.items()}
    assert ladder.compare_outputs(folder, rungs, [turn]) == []
    for name, number in (("naive", 1), ("cache", 0)):
        wrong = list(turn[name].outputs)
        wrong[number] = (*wrong[number][:-1], (wrong[number][-1] + 1) % TINY.vocab_size)
        with pytest.raises(AssertionError, match=f"gave request {number} token"):
            ladder.compare_outputs(folder, rungs, [turn, turn | {name: turn[name]._replace(outputs=wrong)}])


def test_a_transformers_that_computes_another_width_is_found(folder, jobs, budget):
    peer = contenders.load_peer(folder)
    rung = TransformersBatches(peer, jobs, budget, budget.rows)
    rung.use_cache = False  # it computes with its cache all the same
    with pytest.raises(AssertionError, match="transformers computed 2 x 1 tokens, not 2 x 13"):
        rung.run()


# --- the figures -----------------------------------------------------------------------------------------------------


def test_rows_of_a_batch_are_reserved_until_it_ends_and_blocks_until_their_request_does():
    def step(blocks=None, finished=(), cached=0) -> StepEvent:
        parts = (ScheduledTokens("req 0", 0, 4, "prefill", 1), ScheduledTokens("req 1", 0, 4, "padding"))
        return StepEvent(0, 0.0, 1.0, parts, finished, cached_tokens=cached, blocks=blocks)

    rung = SimpleNamespace(budget=SimpleNamespace(bytes_per_token=10), reserves=lambda _: 7, shares=False)
    rows = SimpleNamespace(
        steps=[step(cached=4), step(finished=("req 1",), cached=5), step(finished=("req 0", "req 1"))]
    )
    found = ladder_report.cache_use(rows, rung)
    assert found["reserved"] == {"peak": 140, "mean": 105} and found["used"] == {"peak": 50, "mean": 45}
    assert found["wasted"] == {"peak": 100, "mean": 60}
    blocks = SimpleNamespace(steps=[step(BlockUse(2, 0, 5), cached=20), step(BlockUse(0, 2, 5))])
    assert ladder_report.cache_use(blocks, rung)["wasted"] == {"peak": 120, "mean": 120}


def test_the_work_of_an_event_is_the_work_of_its_plan():
    plan = SchedulerOutput(0, 0.0, num_tokens=13)
    plan.decodes.update({"a": 9, "b": 4})
    plan.others += [
        ScheduledRequest("c", 3, 5, True, "prefill", num_recomputed=2),
        ScheduledRequest("d", 0, 6, False, "prefill"),
    ]
    event = StepEvent(
        0, 0.0, 1.0,
        (
            ScheduledTokens("a", 9, 1, "decode", 1), ScheduledTokens("b", 4, 1, "decode", 1),
            ScheduledTokens("c", 3, 2, "recompute"), ScheduledTokens("c", 5, 3, "prefill", 1),
            ScheduledTokens("d", 0, 6, "prefill"),
        ),
    )  # fmt: skip
    assert ladder_predicted.work_of(event, own_keys=False) == StepWork.of(plan)
    assert ladder_predicted.work_of(event, own_keys=True) == StepWork.of_variable_length_kernel(plan)


def test_a_request_alone_costs_what_its_lengths_say():
    job = Job([1, 2, 3], 3)
    assert [work.computed_tokens for work in ladder_predicted.works_alone(job, keeps=False)] == [3, 4, 5]
    assert [work.computed_tokens for work in ladder_predicted.works_alone(job, keeps=True)] == [3, 1, 1]
    assert [work.keys_read for work in ladder_predicted.works_alone(job, keeps=True)] == [3, 4, 5]


def test_the_time_of_a_worker_process_counts():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in descendants(os.getpid()) and not descendants(child.pid)
        child.communicate(b"\n")
    own = measuring.seconds_of_processes([os.getpid()])
    assert 0 < own["user"] <= own["cpu"] and own["user"] == pytest.approx(os.times().user, abs=0.2)
    with pytest.raises(ConfigError, match="/proc"):
        measuring.seconds_of_processes([2**22 + 1])


def test_a_record_of_something_else_is_refused(tiny, folder, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(dict.fromkeys(("schema", "date", "machine", "parts")) | {"kind": "gpu"}))
    assert bench(folder, "--show", str(file)) == cli.USER_ERROR
    assert "of the kind 'gpu'" in capsys.readouterr().err


def test_limits_of_rows_follow_from_the_budget(budget, jobs):
    rung = Rows("dynamic", None, jobs, budget, 64)
    assert rung.config == SchedulerConfig(budget.rows, 64, budget.longest)
