"""Which replica gets a request, and what that brings: routers alone, and behind them simulated replicas."""

import json
import tracemalloc
from collections import Counter

import pytest

from minillm.cli.main import main
from minillm.engine import (
    ROUTERS,
    BlockManager,
    PowerOfTwo,
    PrefixAware,
    Request,
    RoundRobin,
    Router,
    Scheduler,
    SchedulerConfig,
    block_keys,
    extend_prefixes,
    make_router,
)
from minillm.errors import ConfigError, PromptError
from minillm.simulation import (
    Replica,
    ReportBuilder,
    SimulatedExecutor,
    VirtualClock,
    fixed,
    lognormal,
    made_request,
    make_requests,
    prefixed_requests,
    preset,
    run,
    run_replicas,
    uniform,
)

CONFIG = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=512, max_model_len=4096)
IDLE = {"a": 0, "b": 0, "c": 0}


def prompt(first: int, num_tokens: int = 64) -> range:
    return range(first, first + num_tokens)


# --- routers ---------------------------------------------------------------------------------------------------------


def test_round_robin_goes_around():
    router = RoundRobin()
    assert [router.choose(IDLE, prompt(0)) for _ in range(5)] == ["a", "b", "c", "a", "b"]


def test_power_of_two_never_takes_the_most_loaded_of_three():
    router = PowerOfTwo()
    chosen = Counter(router.choose({"a": 9, "b": 3, "c": 1}, prompt(0)) for _ in range(300))
    assert chosen["a"] == 0 and 60 < chosen["b"] < 140 < chosen["c"]  # b in a third of the draws


def test_power_of_two_with_one_replica_takes_it():
    assert PowerOfTwo().choose({"only": 7}, prompt(0)) == "only"


def test_a_prefix_goes_where_it_was_sent_before():
    router = PrefixAware()
    first = router.choose(IDLE, prompt(0))
    assert all(router.choose(IDLE, [*prompt(0), *prompt(9000 + i)]) == first for i in range(20))


def test_the_longest_prefix_counts_not_the_first_block():
    router = PrefixAware()
    short, long = [*range(16), *prompt(500)], [*range(16), *prompt(700)]
    assert router.choose({"a": 0}, short) == "a"
    assert router.choose({"b": 0, "a": 99}, long) == "b"  # a is far ahead
    loads = {"a": 3, "b": 5}  # both hold the first block
    assert router.choose(loads, [*short, *prompt(800)]) == "a"
    assert router.choose(loads, [*long, *prompt(800)]) == "b"


def test_of_two_with_the_prefix_the_less_loaded_one_is_taken():
    router = PrefixAware()
    router.choose({"a": 0}, prompt(0))
    router.choose({"b": 0, "a": 99}, prompt(0))
    assert router.choose({"a": 4, "b": 2}, prompt(0)) == "b"
    assert router.choose({"a": 2, "b": 4}, prompt(0)) == "a"


@pytest.mark.parametrize(("ahead", "stays"), [(8, True), (9, False)])
def test_a_replica_that_is_too_far_ahead_loses_the_prefix_to_another(ahead, stays):
    router = PrefixAware(most_ahead=8)
    router.choose({"a": 0}, prompt(0))
    chosen = router.choose({"a": ahead, "b": 0}, prompt(0))
    assert (chosen == "a") == stays
    assert router.choose({"a": 8, "b": 0}, prompt(0)) == ("a" if stays else "b")  # there it is now as well


def test_a_replica_that_is_gone_is_forgotten_with_its_cache():
    router = PrefixAware()
    assert router.choose({"a": 0}, prompt(0)) == "a"
    assert router.choose({"b": 0}, prompt(0)) == "b"
    assert not any("a" in holders for holders in router._holders.values()) and "a" not in router._sent


def test_what_was_sent_longest_ago_is_forgotten_first_and_of_a_prompt_its_end():
    router = PrefixAware(most_remembered=6)
    router.choose({"a": 0}, prompt(0))  # 4 blocks
    router.choose({"a": 0}, prompt(1000))  # 4 more: 2 of the first prompt are left
    assert len(router._sent["a"]) == 6 == len(router._holders)
    kept = block_keys(prompt(0))[:2]
    assert all(key in router._holders for key in kept)


def test_a_prompt_shorter_than_a_block_leaves_nothing_behind():
    router = PrefixAware()
    assert router.choose(IDLE, range(15)) in IDLE
    assert router._holders == {}


def test_keys_are_those_of_the_engine_and_another_salt_is_another_prefix():
    request = Request("r", list(prompt(0, 70)), _one_token(), cache_salt="mine")
    keys = [prefix.key for prefix in extend_prefixes(request, 4, 16)]
    assert block_keys(request.prompt_token_ids, 16, "mine") == keys
    assert not set(block_keys(request.prompt_token_ids, 16)) & set(keys)


@pytest.mark.parametrize("name", ROUTERS)
def test_without_a_replica_a_router_says_so(name):
    with pytest.raises(ConfigError, match="no replica"):
        make_router(name).choose({}, prompt(0))


def test_the_command_lets_the_router_remember_as_much_as_a_pool_holds(monkeypatch):
    made = []
    monkeypatch.setattr("minillm.engine.make_router", lambda *given: made.append(make_router(*given)) or made[-1])
    assert main(["simulate", "--model", "Llama-2-7B", "--card", "a100-40gb", "--requests", "2", "--replicas", "2"]) == 0
    replica = Replica(preset("Llama-2-7B", "a100-40gb"), CONFIG)
    assert made[0].most_remembered == replica.scheduler.block_manager.num_blocks < 4000


def test_an_unknown_router_is_named():
    with pytest.raises(ConfigError, match=r"'fastest'.*round-robin"):
        make_router("fastest")


# --- simulated replicas ----------------------------------------------------------------------------------------------


def shared(num_prefixes: int = 24, num_each: int = 12, rate: float = 40.0, **more) -> list[Request]:
    lengths = fixed(512), uniform(8, 40), lognormal(30, 0.8, 120)
    return list(prefixed_requests(num_prefixes, num_each, *lengths, arrivals="poisson", rate=rate, **more))


def replicas(number: int, num_blocks: int | None = None) -> list[Replica]:
    return [Replica(preset("Llama-2-7B", "a100"), CONFIG, num_blocks) for _ in range(number)]


def test_requests_with_prefixes_are_what_was_asked_for():
    requests = shared(3, 5)
    prefixes = Counter(tuple(request.prompt_token_ids[:512]) for request in requests)
    assert sorted(prefixes.values()) == [5, 5, 5]
    assert len({prefix[0] for prefix in prefixes}) == 3
    assert len({request.prompt_token_ids[512] for request in requests}) == 15  # all questions differ at once
    assert [request.prompt_token_ids for request in requests] == [r.prompt_token_ids for r in shared(3, 5)]


def test_one_replica_does_what_the_engine_does_alone():
    requests = make_requests(40, uniform(20, 300), uniform(1, 60), arrivals="poisson", rate=30)
    [alone] = replicas(1, 400)
    figures = ReportBuilder()
    scheduler = Scheduler(CONFIG, clock := VirtualClock(), trace=False, block_manager=BlockManager(400, 16))
    cost_model = preset("Llama-2-7B", "a100")
    run(scheduler, SimulatedExecutor(cost_model, clock), [r.copy() for r in requests], clock, figures=figures)
    got = run_replicas([alone], RoundRobin(), requests)
    assert got.report == figures.report() and got.num_routed == (40,)


class Watching(Router):
    """Remembers what it was told."""

    def __init__(self, inner: Router):
        self.inner, self.told = inner, []

    def _choose(self, loads, token_ids, salt):
        chosen = self.inner.choose(loads, token_ids, salt)
        self.told.append((dict(loads), chosen))
        return chosen


@pytest.mark.parametrize("name", ROUTERS)
def test_every_request_ends_and_loads_are_those_under_way(name):
    requests, router = shared(), Watching(make_router(name))
    engines = replicas(3, 300)
    got = run_replicas(engines, router, requests)
    assert got.report.num_finished == len(requests) == sum(got.num_routed)
    assert all(request.finish_reason == "length" for request in requests)
    for number, (loads, _) in enumerate(router.told):  # nobody is forgotten, and nobody counted after the end
        assert sum(loads.values()) <= number and min(loads.values()) >= 0
    assert all(engine.scheduler.block_manager.usage.used == 0 for engine in engines)


def test_an_end_is_known_when_its_step_has_ended_and_not_before():
    """Two requests of one token: one arrives while the other's only step goes on, one after it."""
    [first] = replicas(1)
    requests = [Request(f"r{i}", range(64), params) for i, params in enumerate([_one_token()] * 3)]
    router = Watching(RoundRobin())
    run_replicas([first], router, requests[:1])
    took = first.clock()
    for request, arrival in zip(requests, (0.0, 0.5 * took, 4 * took), strict=True):
        request.arrival_time = arrival
    router = Watching(RoundRobin())
    run_replicas(replicas(1), router, [request.copy() for request in requests])
    assert [loads[0] for loads, _ in router.told] == [0, 1, 0]


RECORDED = {  # requests of each replica, cached tokens, steps, TTFT p99 in seconds: before requests were streamed
    "round-robin": ((72, 72, 72, 72), 54592, 3628, 0.060248137989),
    "power-of-two": ((72, 71, 75, 70), 47584, 3673, 0.056574258714),
    "prefix-aware": ((72, 84, 60, 72), 134384, 3892, 0.045873989702),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_results_are_those_of_a_list_built_first(name, stream):
    requests = shared()
    got = run_replicas(replicas(4, 300), make_router(name), iter(requests) if stream else requests[::-1])
    *exact, p99 = RECORDED[name]
    assert [got.num_routed, got.cached_tokens, got.report.num_steps] == exact
    assert got.report.ttft.p99 == pytest.approx(p99, rel=1e-9)


def test_an_iterator_is_not_read_ahead():
    """At most one request is taken that has not arrived yet."""
    taken, engines = [], replicas(2)

    def arriving():
        for i in range(30):
            now = max(engine.clock() for engine in engines)
            taken.append(now > i - 2)
            yield Request(f"r{i}", range(64), _one_token(), arrival_time=float(i))

    assert run_replicas(engines, RoundRobin(), arriving()).report.num_finished == 30
    assert len(taken) == 30 and all(taken[2:])


def test_memory_does_not_grow_with_the_number_of_requests(monkeypatch):
    """Beyond what percentiles need, and what a router and a pool remember, nothing is kept of an ended request."""
    monkeypatch.setattr("minillm.simulation.replicas.MOST_PREFIXES", 64)
    peaks = []
    for num_each in (30, 120, 480):
        requests = prefixed_requests(8, num_each, fixed(512), fixed(40), fixed(4), arrivals="poisson", rate=100.0)
        engines, router = replicas(2, 200), PrefixAware(most_remembered=64)
        tracemalloc.start()
        run_replicas(engines, router, requests)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    added = 8 * (480 - 120)
    assert (peaks[2] - peaks[1]) / added < 250  # bytes; the token ids of one prompt alone take 4,400


def test_an_iterator_in_another_order_is_refused():
    requests = iter([made_request("a", 2.0, 8, 1), made_request("b", 1.0, 8, 1)])
    with pytest.raises(ConfigError, match=r"'b' arrives at 1.0 s, the one before it at 2.0 s; sort them"):
        run_replicas(replicas(1), RoundRobin(), requests)


def test_what_is_no_request_is_refused():
    for wrong in (iter(["a"]), ["a"], 7):
        with pytest.raises(ConfigError, match="requests is"):
            run_replicas(replicas(1), RoundRobin(), wrong)


def test_one_id_on_two_replicas_at_once_is_refused():
    with pytest.raises(PromptError, match="request id 'a' is in use"):
        run_replicas(replicas(2), RoundRobin(), [made_request("a", 0.0, 8, 9), made_request("a", 0.0, 8, 9)])


def _one_token():
    return make_requests(1, fixed(1), fixed(1))[0].params


def test_prefix_aware_routing_finds_more_where_one_cache_does_not_hold_all_prefixes():
    """24 system prompts of 32 blocks; a pool has room for half of them beside what runs."""
    found = {name: run_replicas(replicas(4, 500), make_router(name), shared()) for name in ROUTERS}
    hits = {name: result.hit_share for name, result in found.items()}
    assert hits["prefix-aware"] > 1.5 * max(hits["round-robin"], hits["power-of-two"])
    ttft = {name: result.report.ttft.p50 for name, result in found.items()}
    assert ttft["prefix-aware"] < ttft["round-robin"]


def test_a_router_that_never_leaves_the_prefix_overloads_one_replica():
    """The bound on the load is what keeps the replica of a single system prompt from getting everybody."""
    bounded, unbounded = (
        run_replicas(replicas(4), PrefixAware(most_ahead=most), shared(1, 200, rate=400.0)) for most in (8, 10**6)
    )
    assert max(unbounded.num_routed) == 200 and max(bounded.num_routed) < 100
    assert bounded.report.e2e.p99 < unbounded.report.e2e.p99


def test_the_same_requests_are_routed_alike_every_time():
    first, second = (run_replicas(replicas(3), PrefixAware(), shared()) for _ in range(2))
    assert first == second


def test_several_outputs_of_a_prompt_count_its_tokens_once():
    requests = [made_request(f"r{i}", 0.0, 64, 5, n=3) for i in range(4)]
    router = Watching(RoundRobin())
    got = run_replicas(replicas(2), router, requests)
    assert got.prompt_tokens == 4 * 64 and got.report.num_finished == 12
    assert [sum(loads.values()) for loads, _ in router.told] == [0, 3, 6, 9]


def test_without_replicas_nothing_is_simulated():
    with pytest.raises(ConfigError, match="no replica"):
        run_replicas([], RoundRobin(), shared(1, 1))


def test_the_report_says_what_was_found():
    text = str(run_replicas(replicas(2), RoundRobin(), shared(2, 4)))
    assert text.startswith("replicas      2, each with 4 to 4 requests; ") and "of the prompts' tokens" in text


# --- on the command line ---------------------------------------------------------------------------------------------


def test_the_command_simulates_replicas(capsys, tmp_path):
    options = (
        "--model Llama-2-7B --card a100 --requests 40 --system-prompts 4 --arrivals poisson --rate 20 --replicas 2"
    )
    assert main(["simulate", *options.split(), "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("router        prefix-aware\nreplicas      2, each with ") and "40 of 40" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert sum(found["report"]["num_routed"]) == 40 and 0 < found["report"]["hit_share"] < 1
    assert found["settings"]["router"] == "prefix-aware"


@pytest.mark.parametrize("more", [["--batching", "static"], ["--trace", "run.jsonl"]])
def test_what_one_engine_alone_does_is_refused(more, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", "--replicas", "2", *more]) != 0
    assert "--replicas goes with --batching continuous" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_no_replicas_are_refused(capsys):
    assert main(["simulate", "--replicas", "0"]) != 0
    assert "replicas" in capsys.readouterr().err
