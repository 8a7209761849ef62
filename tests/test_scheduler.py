"""The scheduler: budget, order, fairness, aborts; its work does not grow with who waits. No model, no torch."""

import inspect
import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.engine.block_manager import BlockManager
from minillm.engine.queue import SCHEDULING_POLICIES, WaitingQueue
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler, SchedulerConfig, StepOrderError
from minillm.errors import ConfigError, PromptError
from minillm.ladder.padded_schedulers import DynamicScheduler, MergingScheduler, StaticScheduler
from minillm.runtime.plan import ModelOutput
from minillm.sampling.params import SamplingParams
from minillm.simulation.clock import VirtualClock
from minillm.simulation.running import fresh
from minillm.simulation.workload import made_request

SCHEDULERS = (Scheduler, StaticScheduler, DynamicScheduler, MergingScheduler)
EOS = 7


def scheduler_of(kind=Scheduler, **limits):
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 10, "max_model_len": 100} | limits
    return kind(SchedulerConfig(**limits), VirtualClock())


def step(scheduler, token_id=0):
    """One step in which every request that samples gets `token_id`; the clock advances by a second."""
    plan = scheduler.schedule()
    scheduler.clock.advance(1.0)
    sampled = {part.request_id: token_id for part in plan.scheduled if part.samples}
    return plan, scheduler.update(plan, ModelOutput(sampled, 0)) if plan.scheduled else []


def sizes(plan):
    return {part.request_id: (part.start, part.num_tokens) for part in plan.scheduled}


# --- one step --------------------------------------------------------------------------------------------------------


def test_a_prompt_is_computed_in_chunks_that_fill_the_budget():
    scheduler = scheduler_of()
    scheduler.add_request(made_request("a", 0.0, 23, 2))
    plans = [step(scheduler)[0] for _ in range(4)]
    assert [sizes(plan)["a"] for plan in plans] == [(0, 10), (10, 10), (20, 3), (23, 1)]
    assert [plan.scheduled[0].samples for plan in plans] == [False, False, True, True]
    assert [plan.scheduled[0].why for plan in plans] == ["prefill", "prefill", "prefill", "decode"]
    assert list(plans[0].new_requests[0].prompt_token_ids) == list(range(23))
    assert not any(plan.new_requests for plan in plans[1:])
    assert not scheduler.has_unfinished_requests()


def test_decodes_come_first_and_a_prompt_gets_the_rest():
    scheduler = scheduler_of()
    for name in "ab":
        scheduler.add_request(made_request(name, 0.0, 3, 9))
    step(scheduler)
    scheduler.add_request(made_request("long", 0.0, 50, 9))
    scheduler.add_request(made_request("late", 0.0, 1, 9))
    plan, _ = step(scheduler)
    assert sizes(plan) == {"a": (3, 1), "b": (3, 1), "long": (0, 8)}
    plan, _ = step(scheduler)
    assert sizes(plan) == {"a": (4, 1), "b": (4, 1), "long": (8, 8)}


def test_the_chapters_budget_of_a_thousand_tokens():
    """5.6.4: ten decodes, A 100, B 200, C 500, and the remaining 190 from another request."""
    scheduler = scheduler_of(max_num_seqs=20, max_num_batched_tokens=1000, max_model_len=2000)
    for i in range(10):
        scheduler.add_request(made_request(f"decode {i}", 0.0, 1, 9))
    step(scheduler)
    for name, length in (("A", 100), ("B", 200), ("C", 500), ("D", 400)):
        scheduler.add_request(made_request(name, 0.0, length, 9))
    plan, _ = step(scheduler)
    assert [part.num_tokens for part in plan.scheduled] == [1] * 10 + [100, 200, 500, 190]
    assert plan.num_tokens == 1000


def test_without_chunked_prefill_a_prompt_waits_until_it_fits():
    scheduler = scheduler_of(enable_chunked_prefill=False, max_num_batched_tokens=100, max_num_seqs=4)
    scheduler.add_request(made_request("a", 0.0, 60, 1))
    scheduler.add_request(made_request("b", 0.0, 60, 1))
    assert sizes(step(scheduler)[0]) == {"a": (0, 60)}
    assert sizes(step(scheduler)[0]) == {"b": (0, 60)}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_an_end_of_sequence_token_ends_a_request_unless_ignored(kind):
    scheduler = scheduler_of(kind)
    params = SamplingParams(max_tokens=5)
    scheduler.add_request(Request("ends", [1], params, eos_token_ids=(EOS,)))
    scheduler.add_request(made_request("goes on", 0.0, 1, 3, eos_token_ids=(EOS,)))
    _, updates = step(scheduler, EOS)
    assert {update.request_id: update.finish_reason for update in updates} == {"ends": "stop", "goes on": None}
    while scheduler.has_unfinished_requests():
        _, updates = step(scheduler, EOS)
    assert [update.finish_reason for update in updates] == ["length"]


def test_a_finished_request_leaves_at_once_and_a_waiting_one_takes_its_place():
    scheduler = scheduler_of(max_num_seqs=2)
    for name, output in (("a", 1), ("b", 3), ("c", 2)):
        scheduler.add_request(made_request(name, 0.0, 2, output))
    assert set(sizes(step(scheduler)[0])) == {"a", "b"}
    plan, _ = step(scheduler)
    assert set(sizes(plan)) == {"b", "c"}
    assert plan.finished_ids == ["a"] and [new.request_id for new in plan.new_requests] == ["c"]


# --- padded batches --------------------------------------------------------------------------------------------------


def test_a_static_batch_keeps_its_rows_until_the_last_request_ends():
    scheduler = scheduler_of(StaticScheduler, max_num_seqs=2)
    for name, prompt, output in (("short", 2, 1), ("long", 5, 3), ("next", 1, 1)):
        scheduler.add_request(made_request(name, 0.0, prompt, output))
    plans = [step(scheduler)[0] for _ in range(4)]
    assert [(sizes(plan), plan.padding_rows, plan.row_length, plan.num_computed_tokens) for plan in plans] == [
        ({"short": (0, 2), "long": (0, 5)}, [], 5, 10),
        ({"long": (5, 1)}, ["short"], 1, 2),
        ({"long": (6, 1)}, ["short"], 1, 2),
        ({"next": (0, 1)}, [], 1, 1),
    ]
    assert [event.finished for event in scheduler.trace.steps] == [(), (), ("short", "long"), ("next",)]


def test_the_chapters_693_and_792():
    """(n - 1)(B - 1): a B of 8 that counts the newcomer gives 693; eight decodes *plus* it are B = 9 and 792."""
    assert joining_padding(7, 100) == (100 - 1) * (8 - 1) == 693
    assert joining_padding(8, 100) == (100 - 1) * (9 - 1) == 792


def test_merging_computes_prompts_apart_from_decodes():
    """Who joins shares a rectangle with nobody but those who join with it; in it, nobody decodes."""
    scheduler = scheduler_of(MergingScheduler, max_num_seqs=2)
    for name, prompt, output in (("short", 2, 1), ("long", 5, 4), ("next", 3, 2)):
        scheduler.add_request(made_request(name, 0.0, prompt, output))
    plans = [step(scheduler)[0] for _ in range(5)]
    assert [(sizes(plan), plan.padding_rows, plan.row_length, plan.num_computed_tokens) for plan in plans] == [
        ({"short": (0, 2), "long": (0, 5)}, [], 5, 10),
        ({"next": (0, 3)}, [], 3, 3),  # "long" waits for it
        ({"long": (5, 1), "next": (3, 1)}, [], 1, 2),
        ({"long": (6, 1)}, [], 1, 1),
        ({"long": (7, 1)}, [], 1, 1),
    ]


def joining_padding(decodes: int, prompt: int) -> int:
    """Pads in the step in which a prompt joins so many decodes, counted in the trace."""
    scheduler = scheduler_of(DynamicScheduler, max_num_seqs=decodes + 1, max_num_batched_tokens=500, max_model_len=500)
    for i in range(decodes):
        scheduler.add_request(made_request(f"decode {i}", 0.0, 1, 9))
    step(scheduler)
    scheduler.add_request(made_request("prompt", 0.0, prompt, 9))
    plan, _ = step(scheduler)
    padding = sum(part.num_tokens for part in scheduler.trace.steps[-1].scheduled if part.why == "padding")
    assert padding == plan.num_computed_tokens - plan.num_tokens
    return padding


def test_the_chapters_exercise_on_lengths_2_5_10():
    """Exercise 5.2: 13 pads, 17 of 30 slots useful."""
    scheduler = scheduler_of(StaticScheduler)
    for length in (2, 5, 10):
        scheduler.add_request(made_request(f"{length}", 0.0, length, 1))
    plan, _ = step(scheduler)
    assert (plan.num_computed_tokens - plan.num_tokens, plan.num_tokens, plan.num_computed_tokens) == (13, 17, 30)


# --- order and fairness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
def test_equals_go_first_come_first_served(policy):
    queue = WaitingQueue(policy)
    for i in range(20):
        queue.push(made_request(f"{i}", 5.0, 3, 9))
    assert [queue.pop().request_id for _ in range(20)] == [f"{i}" for i in range(20)]


def test_priority_and_sjf_choose_their_rank():
    priority, sjf = WaitingQueue("priority"), WaitingQueue("sjf")
    for name, rank, predicted in (("a", 2, 9), ("b", 0, 5), ("c", 1, 7)):
        priority.push(made_request(name, 0.0, 3, 100, priority=rank))
        sjf.push(made_request(name, 0.0, 3, 100, predicted_output_tokens=predicted))
    assert "".join(priority.pop().request_id for _ in range(3)) == "bca"
    assert "".join(sjf.pop().request_id for _ in range(3)) == "bca"


def test_sjf_takes_max_tokens_where_nothing_is_predicted():
    assert made_request("a", 0.0, 3, 12).predicted_output_tokens == 12


@pytest.mark.parametrize("policy", ["priority", "sjf"])
def test_nobody_starves(policy):
    """One request of bad rank, and a fresh one of good rank every step: it still runs when its time has come."""
    rank, steps = 20, 0
    scheduler = scheduler_of(max_num_seqs=1, scheduling_policy=policy, ageing=1.0)
    scheduler.add_request(made_request("bad", 0.0, 1, rank, priority=rank))
    started = None
    while started is None and steps < 100:
        scheduler.add_request(made_request(f"good {steps}", scheduler.clock(), 1, 1, priority=0))
        plan, _ = step(scheduler)
        started = steps if "bad" in sizes(plan) else None
        steps += 1
    assert started is not None and rank - 2 <= started <= rank + 1


@pytest.mark.parametrize("policy", ["priority", "sjf"])
def test_without_time_passing_the_better_rank_wins(policy):
    """The broken twin of ageing: with next to none, the same request would wait for ever."""
    scheduler = scheduler_of(max_num_seqs=1, scheduling_policy=policy, ageing=1e-9)
    scheduler.add_request(made_request("bad", 0.0, 1, 20, priority=20))
    for i in range(100):
        scheduler.add_request(made_request(f"good {i}", scheduler.clock(), 1, 1, priority=0))
        assert "bad" not in sizes(step(scheduler)[0])


# --- refusals and aborts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_request_that_can_never_fit_is_refused_with_both_numbers(kind):
    scheduler = scheduler_of(kind)
    with pytest.raises(PromptError, match=r"101 tokens.*max_model_len is 100"):
        scheduler.add_request(made_request("big", 0.0, 51, 50))
    assert not scheduler.has_unfinished_requests() and scheduler.trace.requests == []
    scheduler.add_request(made_request("fits", 0.0, 50, 50))


def test_an_id_in_use_is_refused():
    scheduler = scheduler_of()
    scheduler.add_request(made_request("a", 0.0, 1, 1))
    with pytest.raises(PromptError, match="in use"):
        scheduler.add_request(made_request("a", 0.0, 1, 1))


def test_an_empty_prompt_is_refused():
    with pytest.raises(PromptError, match="empty prompt"):
        Request("a", [], SamplingParams())


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": 3},
        {"max_model_len": 0},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 99},
        {"scheduling_policy": "random"},
        {"ageing": 0.0},
    ],
)
def test_impossible_limits_are_refused(limits):
    with pytest.raises(ConfigError):
        scheduler_of(**limits)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("depth, planned", [(1, [None] * 4), (2, [None, 0.0, 1.0, 2.0])])
def test_a_request_knows_when_its_first_and_its_last_token_were_read(depth, planned, paged):
    clock = VirtualClock()
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=4)
    scheduler = Scheduler(config, clock, depth=depth, block_manager=BlockManager(9, 4) if paged else None)
    request = made_request("a", 0.0, 6, 3)
    scheduler.add_request(request)
    times, launched = [], []
    while scheduler.has_unfinished_requests():
        while len(launched) < depth and (plan := scheduler.schedule()).scheduled:
            launched.append(plan)
        clock.advance(1.0)
        plan = launched.pop(0)
        scheduler.update(plan, ModelOutput({part.request_id: 7 for part in plan.scheduled if part.samples}, 0))
        times.append((request.first_token_time, request.last_token_time))
    assert times == [(None, None), (2.0, 2.0), (2.0, 3.0), (2.0, 4.0)]
    assert [step.planned for step in scheduler.trace.steps] == planned


@pytest.mark.parametrize("depth", [1, 2])
def test_plans_and_results_out_of_order_are_refused(depth):
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=4), VirtualClock(), depth=depth)
    scheduler.add_request(made_request("a", 0.0, 6, 3))
    plans = [scheduler.schedule() for _ in range(depth)]
    with pytest.raises(StepOrderError, match=f"{depth} plans are in flight"):
        scheduler.schedule()
    for wrong in (*plans[1:], replace(plans[0])):
        with pytest.raises(StepOrderError, match=f"step {wrong.step} are not the next"):
            scheduler.update(wrong, ModelOutput({}, 0))
    scheduler.update(plans[0], ModelOutput({}, 0))
    with pytest.raises(StepOrderError, match="step 0 are not the next"):
        scheduler.update(plans[0], ModelOutput({}, 0))


def test_a_copy_of_a_request_is_given_all_that_it_was_given_and_nothing_it_has_become():
    """An argument that is new is given an odd value here, or the copy could lose it unseen."""
    given = {
        "request_id": "a",
        "prompt_token_ids": [1, 2, 3],
        "params": SamplingParams(max_tokens=5, stop_token_ids=[8]),
        "eos_token_ids": (EOS,),
        "arrival_time": 2.5,
        "priority": -3,
        "predicted_output_tokens": 4,
        "cache_salt": "mine",
    }
    changed = given | {"request_id": "b", "params": SamplingParams(max_tokens=6), "priority": 7}
    parameters = inspect.signature(Request).parameters
    assert given.keys() == parameters.keys()
    assert all(given[name] != each.default for name, each in parameters.items())
    request = Request(**given)
    scheduler = scheduler_of()
    scheduler.add_request(request)
    step(scheduler)
    for copy, expected in (
        (request.copy(), given),
        (fresh(request), given),
        (request.copy(**{name: changed[name] for name in ("request_id", "params", "priority")}), changed),
    ):
        made = Request(**expected)
        assert vars(copy) == vars(made) and vars(copy) != vars(request)
        assert {name: getattr(copy, name) for name in parameters} == expected


@pytest.mark.parametrize("ageing", [0.0, -0.5])
def test_ageing_that_is_not_positive_is_refused(ageing):
    with pytest.raises(ConfigError, match="ageing"):
        WaitingQueue("fcfs", ageing)


def test_the_limits_that_nobody_gives():
    assert SchedulerConfig() == SchedulerConfig(64, 512, 2048, "fcfs", 1.0, True)


@pytest.mark.parametrize("options", [{"trace": "yes"}, {"clock": 5}, {"max_trace_steps": 0}, {"max_trace_steps": 1.5}])
def test_options_of_a_wrong_kind_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Scheduler(SchedulerConfig(), **options)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_abort_is_idempotent_and_final(kind):
    scheduler = scheduler_of(kind, max_num_seqs=2)
    for name in "abc":
        scheduler.add_request(made_request(name, 0.0, 2, 5))
    step(scheduler)
    assert scheduler.abort_request("a") and scheduler.abort_request("c")  # one runs, one waits
    assert not scheduler.abort_request("a") and not scheduler.abort_request("unknown")
    seen = set()
    while scheduler.has_unfinished_requests():
        seen |= {update.request_id for update in step(scheduler)[1]}
    assert seen == {"b"}
    assert scheduler.schedule().scheduled == [] and scheduler.num_waiting() == 0
    assert not any({"a", "c"} & set(event.finished) for event in scheduler.trace.steps)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_an_abort_while_the_step_runs_discards_its_token(kind):
    scheduler = scheduler_of(kind)
    request = made_request("a", 0.0, 2, 5)
    scheduler.add_request(request)
    plan = scheduler.schedule()
    scheduler.abort_request("a")
    scheduler.add_request(made_request("a", 0.0, 3, 1))  # the id is free again
    assert not scheduler.update(plan, ModelOutput({"a": 1}, 0)).token_ids
    plan, updates = step(scheduler)
    assert (plan.finished_ids, sizes(plan)) == (["a"], {"a": (0, 3)})
    assert updates.finish_reasons == {"a": "length"} and request.output_token_ids == []


def test_results_of_a_static_batch_return_when_an_abort_ends_it():
    scheduler = scheduler_of(StaticScheduler)
    scheduler.add_request(made_request("done", 0.0, 1, 1))
    scheduler.add_request(made_request("endless", 0.0, 1, 50))
    step(scheduler)
    scheduler.abort_request("endless")
    scheduler.add_request(made_request("next", 0.0, 1, 1))
    step(scheduler)
    assert scheduler.trace.steps[-1].finished == ("done", "next")


# --- work ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
def test_the_work_of_a_step_does_not_grow_with_who_waits(policy, monkeypatch):
    """Bytecode lines run inside the engine in 30 steps, with 100 and with 20,000 waiting."""
    few, many = (lines_run(num_waiting, policy) for num_waiting in (100, 20_000))
    assert few > 1000
    assert many <= 1.05 * few


def lines_run(num_waiting: int, policy: str) -> int:
    scheduler = scheduler_of(scheduling_policy=policy)
    for i in range(num_waiting):
        scheduler.add_request(made_request(f"{i}", 0.0, 7, 4, priority=i % 5))
    lines = 0

    def count(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return count

    sys.settrace(count)
    for _ in range(30):
        step(scheduler)
    sys.settrace(None)
    return lines


def test_the_scheduler_imports_neither_torch_nor_numpy():
    code = "import sys, minillm.ladder.padded_schedulers; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- invariants, on random arrivals and aborts -----------------------------------------------------------------------

# All that a policy sorts by; of `arrival_time`, how many seconds ago.
RANKS = {"arrival_time": [0, 0.5, 7], "priority": [-1, 0, 1], "predicted_output_tokens": [None, 1, 5, 20]}
ranks = st.sampled_from([dict(zip(RANKS, values, strict=True)) for values in itertools.product(*RANKS.values())])


def drawn_at(now: float, drawn: dict) -> dict:
    """What a request is given that is added now."""
    return drawn | {"arrival_time": now - drawn["arrival_time"]}


def test_random_requests_draw_all_that_a_policy_may_sort_by():
    """A field that is new is drawn, or added here because no policy will ever sort by it."""
    parameters = inspect.signature(Request).parameters.values()
    optional = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert optional - RANKS.keys() == {"eos_token_ids", "cache_salt"}


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 12), ranks),
        st.tuples(st.just("abort"), st.integers(0, 40)),
        st.tuples(st.just("step"), st.integers(1, 3)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    actions=ACTIONS,
    kind=st.sampled_from(SCHEDULERS),
    policy=st.sampled_from(SCHEDULING_POLICIES),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(5, 20),
)
def test_invariants_under_random_arrivals_and_aborts(actions, kind, policy, max_num_seqs, budget):
    scheduler = scheduler_of(
        kind, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, scheduling_policy=policy, max_model_len=50
    )
    watch = Watch(scheduler)
    for action, *values in actions:
        if action == "add":
            watch.add(*values)
        elif action == "abort":
            watch.abort(f"{values[0]}")
        else:
            for _ in range(values[0]):
                watch.step()
    for _ in range(40 * len(watch.requests) + 1):  # with finite arrivals everything ends
        if not scheduler.has_unfinished_requests():
            break
        assert watch.step(), "work waits, but nothing was computed"
    watch.check_the_end()


class Watch:
    """Adds, aborts and steps, and checks after each step what must always hold."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.requests = {}
        self.aborted = set()
        self.outputs = {}

    def add(self, prompt, output, drawn):
        made = drawn_at(self.scheduler.clock(), drawn)
        request = made_request(f"{len(self.requests)}", num_prompt_tokens=prompt, num_output_tokens=output, **made)
        self.requests[request.request_id] = request
        self.scheduler.add_request(request)

    def abort(self, request_id):
        alive = request_id in self.requests and self.requests[request_id].finish_reason is None
        assert self.scheduler.abort_request(request_id) == alive
        self.aborted |= {request_id} if alive else set()

    def step(self):
        computed = {request_id: request.num_computed_tokens for request_id, request in self.requests.items()}
        plan, updates = step(self.scheduler)
        config = self.scheduler.config
        assert len(plan.scheduled) + len(plan.padding_rows) <= config.max_num_seqs
        assert plan.num_tokens == sum(part.num_tokens for part in plan.scheduled)
        if type(self.scheduler) is Scheduler:
            assert plan.num_tokens <= config.max_num_batched_tokens
            running = [part for part in plan.scheduled if computed[part.request_id]]
            assert plan.scheduled[: len(running)] == running, "who has begun goes before who joins"
        for part in plan.scheduled:
            assert part.start == computed[part.request_id], "every token is computed once, in order"
            assert part.request_id not in self.aborted
        for update in updates:
            self.outputs.setdefault(update.request_id, []).append(update.finish_reason)
        assert self.scheduler.num_waiting() == sum(
            request.finish_reason is None and request_id not in self.scheduler.running
            for request_id, request in self.requests.items()
        )
        return plan.num_tokens

    def check_the_end(self):
        assert not self.scheduler.has_unfinished_requests()
        assert not self.scheduler.running and self.scheduler.num_waiting() == 0
        for request_id, request in self.requests.items():
            if request_id in self.aborted:
                assert request.finish_reason == "abort"
                continue
            expected = [None] * (request.params.max_tokens - 1) + ["length"]
            assert self.outputs[request_id] == expected, "exactly one final output"
            assert request.num_computed_tokens == request.num_tokens - 1
        finished = [request_id for event in self.scheduler.trace.steps for request_id in event.finished]
        assert sorted(finished) == sorted(self.requests.keys() - self.aborted)
