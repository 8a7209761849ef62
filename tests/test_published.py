"""The published factor in the simulator: ours stays ours, what is switched costs what it says, and it adds up."""

import json
import math
from dataclasses import replace
from itertools import permutations
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minillm import costs
from minillm.cli import main as cli
from minillm.engine import BlockManager, Scheduler, SchedulerConfig
from minillm.errors import ConfigError, OutOfMemoryError
from minillm.ladder import StaticScheduler
from minillm.runtime import ScheduledRequest, SchedulerOutput
from minillm.simulation import (
    CAUSES,
    SETTINGS,
    Assumptions,
    ChatLengths,
    Decomposition,
    Published,
    Roofline,
    Setting,
    SimulatedExecutor,
    VirtualClock,
    made_request,
    observations,
    run,
    sensitivity,
    under_load,
    verdict,
)
from minillm.simulation.factors import coalitions
from minillm.simulation.published import MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, BothWays, GenerateOf2023

ALL = frozenset(CAUSES)
SMALL = 24  # requests: a run takes a tenth of a second


# --- factors ---------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_shapley_values_are_the_mean_over_all_orders_and_multiply_to_the_total(data, size):
    causes = "abcd"[:size]
    seconds = {some: data.draw(st.floats(0.1, 100)) for some in coalitions(causes)}
    parts = Decomposition.of(tuple(causes), seconds.get)
    orders = [dict(parts.removed(order)) for order in permutations(causes)]
    for factor in parts.factors:
        effects = [order[factor.name] for order in orders]
        assert math.log(factor.shapley) == pytest.approx(fmean(map(math.log, effects)), abs=1e-9)
        assert (factor.low, factor.high) == (pytest.approx(min(effects)), pytest.approx(max(effects)))
        assert factor.first == pytest.approx(seconds[frozenset(factor.name)] / seconds[frozenset()])
        assert factor.last == pytest.approx(
            parts.total * seconds[frozenset()] / seconds[frozenset(causes) - {factor.name}]
        )
    assert math.prod(factor.shapley for factor in parts.factors) == pytest.approx(parts.total)
    for order in orders:
        assert math.prod(order.values()) == pytest.approx(parts.total)


def test_factors_that_do_not_depend_on_each_other_have_no_range():
    worth = {"a": 2.0, "b": 3.0, "c": 1.0}
    parts = Decomposition.of(tuple(worth), lambda some: 5 * math.prod(worth[cause] for cause in some))
    for factor in parts.factors:
        assert factor.shapley == pytest.approx(worth[factor.name])
        assert factor.low == pytest.approx(factor.high)
    assert parts.share(["a", "c"]) == pytest.approx(math.log(2) / math.log(6))
    assert parts.share("abc") == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Decomposition.of((), len), "1 to 12"),
        (lambda: Decomposition.of(("a", "a"), len), "different names"),
        (lambda: Decomposition.of(tuple(map(str, range(60))), len), "1 to 12"),
        (lambda: Decomposition.of(("a",), lambda some: float(len(some))), "seconds"),
        (lambda: Decomposition(("a",), {frozenset(): 1.0}), r"\['a'\] are missing"),
        (lambda: Decomposition.of(("a",), lambda some: 1.0).ratio("b"), r"\['b'\] are not causes"),
        (lambda: Decomposition.of(("a",), lambda some: 1.0).removed(["a", "a"]), "each of"),
        (lambda: Decomposition.of(("a",), lambda some: 1.0).share("a"), "nothing to share"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


# --- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigmas", [(1.3, 0.9), (1.0, 0.6), (1.6, 1.2)])
def test_chat_lengths_have_the_published_means_within_the_published_limits(sigmas):
    law = ChatLengths(prompt_sigma=sigmas[0], output_sigma=sigmas[1])
    pairs = law.pairs(20_000, seed=1)
    prompts, outputs = zip(*pairs, strict=True)
    assert fmean(prompts) == pytest.approx(161.31, rel=0.03)
    assert fmean(outputs) == pytest.approx(337.99, rel=0.03)
    assert min(prompts) >= 4 and max(prompts) <= 1024 and min(outputs) >= 4
    assert 1900 < max(prompt + output for prompt, output in pairs) <= 2048  # the tail is there
    assert law.pairs(10, seed=1) == pairs[:10] != law.pairs(10, seed=2)


def test_the_means_hold_where_prompt_and_output_compete_for_the_context():
    law = ChatLengths(prompt_sigma=1.6, output_sigma=1.2, longest=1300)
    prompts, outputs = zip(*law.pairs(40_000, seed=0), strict=True)
    assert fmean(outputs) == pytest.approx(337.99, rel=0.01)
    assert fmean(prompts) == pytest.approx(161.31, rel=0.02)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompt_mean": 900.0}, "no median"),
        ({"prompt_mean": 480.0}, "farther from the limits"),
        ({"prompt_mean": 1025.0}, "cannot have a mean"),
        ({"output_mean": 3.0}, "no median"),
        ({"output_mean": 2047.0}, "no median|farther"),
        ({"prompt_sigma": 0.0}, "prompt_sigma"),
        ({"output_sigma": math.nan}, "output_sigma"),
        ({"longest_prompt": 2048}, "cannot have a mean"),
    ],
)
def test_lengths_that_no_law_has_are_refused(wrong, says):
    with pytest.raises(ConfigError, match=says):
        ChatLengths(**wrong)


# --- both sides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
def test_without_any_cause_it_is_the_engine_itself(setting):
    published = Published(setting, num_requests=SMALL)
    clock, config = VirtualClock(), published.setting.config
    pool = BlockManager(published.ledger.num_blocks, 16, enable_prefix_caching=False)
    scheduler = Scheduler(SchedulerConfig(MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, 2048), clock, block_manager=pool)
    overhead = config.num_hidden_layers * 9 * 10e-6
    executor = SimulatedExecutor(Roofline(config, published.setting.card, launch_overhead=overhead), clock)
    run(scheduler, executor, published.requests(()), clock)
    assert published.seconds(()) == pytest.approx(clock(), rel=1e-12)


@pytest.mark.parametrize("n", [1, 3])
def test_one_run_priced_for_many_coalitions_is_what_each_takes_by_the_clock(n):
    published = Published("7b", num_requests=4, n=n, seed=3)
    for causes in coalitions(CAUSES):
        assert published.seconds(causes) == pytest.approx(published.report(causes).makespan, rel=1e-6)
    assert len(published._works) == 8


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("n", [1, 3])
def test_no_cause_makes_the_baseline_faster_and_the_factors_multiply_to_the_total(setting, n):
    published = Published(setting, num_requests=SMALL, n=n, seed=n)
    parts = published.decomposition()
    # Few requests with n = 3 fit one batch all together: then waiting costs nothing, and a static batch reads its
    # prompts in one step where ours has a token budget. In between, a cause may help where another is there.
    least = 1 if n == 1 else 0.999
    for factor in parts.factors:
        assert factor.first >= least and factor.last >= least, factor
        assert factor.low <= factor.shapley <= factor.high
    assert math.prod(factor.shapley for factor in parts.factors) == pytest.approx(parts.total)
    assert parts.total == published.total > 2


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("causes", coalitions(["waiting", "reservation", "copying"]))
def test_every_output_token_is_made_once_and_every_prompt_where_it_must(causes, n):
    published = Published("13b", num_requests=SMALL, n=n)
    report = published.report(causes)
    prompts, outputs = (sum(lengths) for lengths in zip(*published.lengths, strict=True))
    assert report.output_tokens == n * outputs
    assert report.num_finished == n * SMALL
    steps = n * (outputs - SMALL)  # all but the first token of each
    if "reservation" in causes:
        assert report.useful_tokens == n * prompts + steps
    elif not causes:  # room for all: the prompt once, and its last token again for each other output
        assert report.useful_tokens == prompts + (n - 1) * SMALL + steps


def test_a_step_costs_what_is_switched_on_and_no_more():
    """By hand: two prompts of 3 and 5 tokens beside decodes at 10 and 20."""
    setting, assumptions = SETTINGS["13b"], Assumptions()
    config, card = setting.config, setting.card
    others = [ScheduledRequest("a", 0, 3, True, "prefill"), ScheduledRequest("b", 0, 5, True, "prefill")]
    plan = SchedulerOutput(0, 0.0, {"c": 10, "d": 20}, others, num_tokens=10)
    work = BothWays.of(plan)
    assert work.own == (10, 4, 0, 2, 4, 6 + 15 + 11 + 21, 3 + 5 + 11 + 21)
    assert work.padded == (12, 4, 0, 2, 4, 12 * 21, 4 * 21)
    assert (work.own_moved, work.padded_moved) == (10 + 11 + 20 + 21, 2 * (20 + 21))

    def cost(*causes):
        return GenerateOf2023(setting, assumptions, frozenset(causes)).seconds(work)

    key = costs.kv_bytes_per_token(config) / card.bandwidth
    assert cost("host") - cost() == pytest.approx(40 * (40 - 9) * 10e-6)
    assert cost("copying") - cost() == pytest.approx(62 * key)
    assert cost("copying", "padded keys") - cost("padded keys") == pytest.approx(82 * key)
    assert cost("padded keys") - cost() == pytest.approx((84 - 40) * key)
    assert cost("waiting") == cost("reservation") == cost()  # these change the plan
    many = BothWays(*(replace_tokens(each, 100) for each in work[:2]), *work[2:])
    priced = GenerateOf2023(setting, assumptions, frozenset({"padding"})).seconds(many)
    assert priced - GenerateOf2023(setting, assumptions, frozenset()).seconds(many) == pytest.approx(
        200 * costs.tokenwise_flops(config, 1, 0) / card.flops, rel=1e-6
    )


def replace_tokens(work, times):
    """The same with so many times the tokens: a step that arithmetic bounds."""
    return work._replace(computed_tokens=work.computed_tokens * times)


def test_a_static_batch_is_padded_and_waits():
    plan = SchedulerOutput(0, 0.0, others=[ScheduledRequest("a", 7, 1, True, "decode")], num_tokens=1)
    plan.row_length, plan.padding_rows = 1, ["b", "c"]
    work = BothWays.of(plan)
    assert work.own == (3, 3, 0, 0, 1, 8, 8)  # the ended rows compute, and attend to nothing
    assert work.padded == (3, 3, 1, 0, 1, 24, 24)
    assert (work.own_moved, work.padded_moved) == (15, 45)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 1, 3])), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("kind", [StaticScheduler, Scheduler])
def test_batches_on_a_pool_that_runs_short_lose_nobody(kind, lengths):
    pool = BlockManager(1 + 6, 16, enable_prefix_caching=False)  # 96 tokens
    clock = VirtualClock()
    scheduler = kind(SchedulerConfig(8, 64, 80), clock, block_manager=pool)
    requests = [made_request(f"{i}", (i - 20) * 1e-9, *pair, n=n) for i, (*pair, n) in enumerate(lengths)]
    executor = SimulatedExecutor(Roofline(costs.LLAMA_7B, costs.A10G), clock)

    def check(plan, updates):
        pool.check()
        made.extend(update.request_id for update in updates)

    made = []
    run(scheduler, executor, requests, clock, on_step=check)
    for i, (_, output, n) in enumerate(lengths):
        for name in [f"{i}", *(f"{i}.{copy}" for copy in range(1, n))]:
            assert made.count(name) == output
    assert pool.usage.used == 0 and not scheduler.running


def test_a_pool_that_runs_short_was_tried():
    published = Published("13b", num_requests=150)
    assert published.report({"waiting"}).useful_tokens < published.report({"waiting"}).computed_tokens
    preempted, clock = [], VirtualClock()
    scheduler = published._scheduler(frozenset({"waiting"}), clock)
    executor = SimulatedExecutor(GenerateOf2023(published.setting, published.assumptions, frozenset()), clock)
    run(
        scheduler, executor, published.requests(()), clock, on_step=lambda plan, _: preempted.extend(plan.preempted_ids)
    )
    assert preempted


def test_a_batch_on_a_pool_is_a_rectangle_though_not_all_found_room():
    pool = BlockManager(1 + 4, 16, enable_prefix_caching=False)
    scheduler = StaticScheduler(SchedulerConfig(8, 64, 64), VirtualClock(), block_manager=pool)
    for name, length in (("a", 20), ("b", 30), ("c", 40)):
        scheduler.add_request(made_request(name, 0.0, length, 3))
    plan = scheduler.schedule()
    assert [part.request_id for part in plan.scheduled] == ["a"] and scheduler.num_waiting() == 2
    assert plan.row_length == 20


def test_outputs_of_a_prompt_share_its_blocks_only_where_there_are_blocks():
    published = Published("7b", num_requests=4, n=3)
    assert [request.params.n for request in published.requests(())] == [3] * 4
    assert [request.params.n for request in published.requests({"reservation"})] == [1] * 12


def test_memory_is_what_the_card_has():
    sequence = 2048 * costs.kv_bytes_per_token(costs.LLAMA_13B)
    assert sequence == 2 * 40 * 40 * 128 * 2 * 2048 == 1_677_721_600  # published: up to 1.7 GB
    published = Published("13b", num_requests=1)
    ledger = published.ledger
    assert ledger.free >= 0 and ledger.free < ledger.bytes_per_block
    assert published.num_cache_tokens * costs.kv_bytes_per_token(costs.LLAMA_13B) < 0.9 * 40 * 2**30 - ledger.weights
    for causes, copies in (({"padding"}, 1), ({"copying"}, 2), ({"copying", "waiting"}, 2)):
        pool = published._scheduler(frozenset(causes), VirtualClock()).block_manager
        assert (pool.num_blocks - 1) * 16 == published.num_cache_tokens // copies // 16 * 16
    assert published.num_rows({"reservation"}) == published.num_cache_tokens // 2048 == 7
    assert published.num_rows({"reservation", "copying"}) == published.num_cache_tokens // 4096 == 3
    assert Published("13b", Assumptions(rows=5), num_requests=1).num_rows(ALL) == 5
    with pytest.raises(OutOfMemoryError):
        Published(Setting("too small", costs.LLAMA_13B, costs.RTX_4090), num_requests=1).ledger  # noqa: B018


def test_less_is_wasted_with_blocks():
    """What is reserved and what is used, at the moments in which most is: the published 60 to 80 % and under 4 %."""
    lengths = ChatLengths().pairs(2000, 0)
    reserved = fmean(1 - (prompt + output / 2) / 2048 for prompt, output in lengths)
    paged = sum(-(prompt + output // 2) % 16 for prompt, output in lengths)
    assert reserved > 0.6
    assert paged / sum(prompt + output // 2 for prompt, output in lengths) < 0.04


def test_transformers_launches_about_forty_operations_a_layer():
    transformers = pytest.importorskip("transformers")
    views = {"view", "_unsafe_view", "transpose", "t", "slice", "expand", "unsqueeze", "squeeze", "permute", "alias"}
    views |= {"detach", "as_strided", "select", "reshape", "split", "dropout"}  # launch nothing

    class Counted(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.number += function._schema.name.split("::")[1] not in views
            return function(*args, **(kwargs or {}))

    def launches(num_layers):
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=num_layers, attn_implementation="eager")
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
        with torch.inference_mode():
            cache = model(torch.arange(6)[None], use_cache=True).past_key_values
            with Counted() as counted:
                model(torch.tensor([[3]]), past_key_values=cache, use_cache=True)
        return counted.number

    assert 38 <= launches(3) - launches(2) <= 50  # 45 in 5.23


# --- how sure it is --------------------------------------------------------------------------------------------------


def test_the_band_is_the_total_under_other_assumptions():
    published = Published("7b", num_requests=SMALL)
    bands = {band.what: band for band in sensitivity(published)}
    fixed = Published("7b", replace(Assumptions(), rows=16), num_requests=SMALL)
    assert bands["rows of the baseline"].at_low == pytest.approx(fixed.total)
    tails = ChatLengths(prompt_sigma=1.6, output_sigma=1.2)
    other = Published("7b", Assumptions(lengths=tails), num_requests=SMALL)
    assert bands["tails of the lengths"].at_high == pytest.approx(other.total)
    for what in ("host of the baseline", "rows of the baseline", "host of the engine"):
        assert bands[what].at_low < published.total < bands[what].at_high


def test_the_verdict_says_what_holds_and_what_is_not_paged_attention():
    published = Published("13b", num_requests=SMALL)
    found = verdict(published, rows=(1, 2, 3), launches=(25, 40))
    assert found.total == published.total
    assert found.total**found.paged_share * found.not_paged == pytest.approx(found.total)
    assert all(14 <= variant.factor <= 24 for variant in found.holds)
    assert all(2.5 <= factor <= 3.5 for factor in found.about_three.values()) and found.about_three
    assert all(1 < factor < found.total for factor in found.without.values())
    assert 1 < found.as_measured[0] < found.as_measured[1] < found.total
    same = Published("13b", Assumptions(rows=3, launches_per_layer=40), num_requests=SMALL)
    variants = {(each.rows, each.launches_per_layer, each.copying): each.factor for each in found.holds}
    if 14 <= same.total <= 24:
        assert variants[3, 40, True] == pytest.approx(same.total)
    json.dumps(found.as_dict())
    with pytest.raises(ConfigError, match="n 2"):
        verdict(Published("13b", num_requests=2, n=2))


def test_little_load_is_served_alike():
    published = Published("13b", num_requests=SMALL)
    runs = under_load(published, [0.01, 5.0])
    slow, fast = ([runs[side][rate].output_tokens_per_second for side in runs] for rate in (0.01, 5.0))
    assert slow[1] / slow[0] < 1.1 < 3 < fast[1] / fast[0]
    assert runs["baseline"][0.01].e2e.p50 > 1.5 * runs["engine"][0.01].e2e.p50


def test_each_side_may_have_rates_of_its_own():
    published = Published("13b", num_requests=2)
    runs, same = under_load(published, {"baseline": [0.01], "engine": [0.02, 5.0]}), under_load(published, [0.01, 5.0])
    assert {side: [*of_side] for side, of_side in runs.items()} == {"baseline": [0.01], "engine": [0.02, 5.0]}
    assert runs["engine"][5.0] == same["engine"][5.0] and runs["baseline"][0.01] == same["baseline"][0.01]


def test_observations_are_simulated_as_they_were_measured():
    seen = observations(200)
    assert [each.is_engine for each in seen] == [False, False, False, True, True]
    for each in seen[:3]:
        assert 0.8 < each.ratio < 1.2, each  # the baseline is not made slower than it was
    assert all(each.ratio > 1 for each in seen[3:])  # nothing is faster than its least time


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Published("70b"), "setting"),
        (lambda: Published(arrivals="bursts"), "arrivals"),
        (lambda: Published(num_requests=0), "num_requests"),
        (lambda: Published(n=0), "n is 0"),
        (lambda: Published(pairs=[(0, 1)]), "pairs"),
        (lambda: Published(num_requests=1).seconds({"magic"}), "magic"),
        (lambda: Assumptions(own_launches_per_layer=41), "own_launches_per_layer"),
        (lambda: Assumptions(launch_seconds=-1.0), "launch_seconds"),
        (lambda: Assumptions(reserved_tokens=4096), "reserved_tokens"),
        (lambda: Assumptions(rows=0), "rows"),
    ],
)
def test_impossible_settings_are_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_the_command_says_it_all_and_writes_it(capsys, tmp_path):
    file, picture = tmp_path / "run.json", tmp_path / "run.svg"
    options = ["--requests=5", "--setting=7b", "--json", str(file), "--svg", str(picture)]
    assert cli.main(["24x", *options]) == 0
    out = capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["total"] == Published("7b", num_requests=5).total
    assert f"{written['total']:.2f}" in out and "PagedAttention alone" in out and "reservation" in out
    assert len(written["seconds"]) == 64 and len(written["factors"]) == 6 and len(written["band"]) == 4
    assert picture.read_text().startswith("<?xml")
    assert cli.main(["24x", "--requests=5", "--load", "0.1,2", "--json", str(file)]) == 0
    assert set(json.loads(file.read_text())["load"]) == {"baseline", "engine"}
    assert "prompts/s" in capsys.readouterr().out
