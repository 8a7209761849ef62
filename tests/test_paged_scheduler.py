"""The scheduler's rules about blocks, on plans alone: what the trace says, and what engine arguments change.

That outputs stay the same whatever happens is the state machine's business (test_engine_machine).
"""

import pytest

from minillm.engine.block_manager import BlockManager
from minillm.engine.request import Request
from minillm.engine.scheduler import PREEMPTION_MODES, Scheduler, SchedulerConfig
from minillm.errors import ConfigError, PromptError
from minillm.runtime.plan import ModelOutput
from minillm.sampling.params import SamplingParams

LIMITS = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=32)


def scheduler_of(num_blocks: int, **options) -> Scheduler:
    return Scheduler(LIMITS, block_manager=BlockManager(num_blocks, 4, enable_prefix_caching=False), **options)


def request(name: str, num_prompt: int = 4, max_tokens: int = 12) -> Request:
    return Request(name, [1] * num_prompt, SamplingParams(max_tokens=max_tokens))


def step(scheduler: Scheduler):
    plan = scheduler.schedule()
    scheduler.update(plan, ModelOutput({part.request_id: 1 for part in plan.scheduled if part.samples}, 0))
    return plan


def test_who_gave_way_in_a_step_that_failed_is_in_the_trace_once():
    scheduler = scheduler_of(num_blocks=5, watermark=0)  # 4 blocks of 4 tokens
    for name in "ab":
        scheduler.add_request(request(name))
    while not (plan := scheduler.schedule()).preempted_ids:
        scheduler.update(plan, ModelOutput({part.request_id: 1 for part in plan.scheduled if part.samples}, 0))
    scheduler.retract(plan)
    while scheduler.has_unfinished_requests():
        step(scheduler)
    told = [each.request_id for event in scheduler.trace.steps for each in event.preempted]
    assert plan.preempted_ids == ["b"] and told.count("b") == 1
    scheduler.block_manager.check()


def test_the_watermark_is_left_over_when_another_request_joins():
    """Two requests of one block each, 4 blocks: with a quarter of the pool kept back the third has to wait."""
    running = {}
    for watermark in (0, 0.4):
        scheduler = scheduler_of(num_blocks=5, watermark=watermark)
        for name in "abc":
            scheduler.add_request(request(name, num_prompt=3))
        step(scheduler)
        running[watermark] = list(scheduler.running)
    assert running == {0: ["a", "b", "c"], 0.4: ["a", "b"]}


def test_tokens_computed_again_are_told_apart_from_new_ones():
    scheduler = scheduler_of(num_blocks=5, watermark=0)
    for name in "ab":
        scheduler.add_request(request(name))
    while scheduler.has_unfinished_requests():
        step(scheduler)
    parts = [part for event in scheduler.trace.steps for part in event.scheduled if part.request_id == "b"]
    again = [part for part in parts if part.why == "recompute"]
    new = [part for part in parts if part.why != "recompute"]
    lost = sum(each.num_tokens for event in scheduler.trace.steps for each in event.preempted)
    assert sum(part.num_tokens for part in again) == lost > 0
    assert [part.why for part in new] == ["prefill", *["decode"] * 11]
    assert sum(part.num_tokens for part in new) == 4 + 11  # the last token is never fed back
    assert [part.start for part in new] == [0, *range(4, 15)]


def test_who_gave_way_is_told_by_the_name_of_that_life_and_without_a_trace_by_nobody():
    for trace in (True, False):
        scheduler = scheduler_of(num_blocks=5, watermark=0, trace=trace)
        scheduler.add_request(request("b", max_tokens=1))
        step(scheduler)
        for name in "ab":
            scheduler.add_request(request(name))
        preempted = []
        while scheduler.has_unfinished_requests():
            preempted += step(scheduler).preempted_ids
        assert preempted[0] == "b"
        if trace:
            assert {each.request_id for event in scheduler.trace.steps for each in event.preempted} == {"b#2"}


def test_the_other_outputs_of_a_prompt_are_requests_with_one_output_and_the_next_seeds():
    scheduler = scheduler_of(num_blocks=9)
    parent = Request("a", [1, 1], SamplingParams(max_tokens=2, n=3, seed=5, temperature=1.0, prompt_logprobs=0))
    scheduler.add_request(parent)
    told = [(each.request_id, each.params.n, each.params.seed, each.params.prompt_logprobs) for each in parent.children]
    assert told == [("a.1", 1, 6, None), ("a.2", 1, 7, None)]


def test_every_block_can_be_shared_from_the_step_that_fills_it():
    manager = BlockManager(12, 4)
    scheduler = Scheduler(LIMITS, block_manager=manager)
    a = request("a", num_prompt=3, max_tokens=15)
    scheduler.add_request(a)
    for _ in range(14):
        step(scheduler)
        assert len(manager._block_of_key) == a.num_computed_tokens // 4


def test_what_was_cached_counts_when_a_request_first_joins():
    scheduler = Scheduler(LIMITS, block_manager=BlockManager(12, 4), preemption_mode="recompute")
    first, second = request("a", num_prompt=9, max_tokens=1), request("b", num_prompt=9, max_tokens=4)
    for each in (first, second):
        scheduler.add_request(each)
        step(scheduler)
    scheduler.retract(scheduler.schedule())  # it begins again, and finds what it has computed itself as well
    while scheduler.has_unfinished_requests():
        step(scheduler)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)


def test_a_part_says_which_blocks_are_new_to_the_executor():
    """The whole table of a request that joins, then what the table has grown by; an executor keeps the rest."""
    scheduler = scheduler_of(num_blocks=9)
    scheduler.add_request(request("a", num_prompt=6, max_tokens=8))
    parts = []
    while scheduler.has_unfinished_requests():
        (part,) = step(scheduler).scheduled
        parts.append((part.start, part.num_tokens, part.first_block, tuple(part.block_ids)))
    decodes = [(start, 1, 0, ()) for start in range(6, 13)]
    decodes[2], decodes[6] = (8, 1, 2, (3,)), (12, 1, 3, (4,))
    assert parts == [(0, 6, 0, (1, 2)), *decodes]
    assert all(event.planned is None for event in scheduler.trace.steps)  # each starts when it is planned


def test_a_request_that_never_fits_is_refused_with_both_numbers():
    with pytest.raises(PromptError, match="may need 6 blocks for 23 tokens .* the pool has 4 of 4"):
        scheduler_of(num_blocks=5).add_request(request("a", num_prompt=12))


@pytest.mark.parametrize(
    "options", [{"preemption_mode": "pause"}, {"watermark": 1}, {"watermark": -0.1}, {"depth": 3}, {"depth": 0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        scheduler_of(num_blocks=5, **options)


def test_without_max_tokens_a_request_may_fill_the_pool():
    """The last token is never fed back: two blocks of 4 hold a request of 9 tokens."""
    scheduler = scheduler_of(3)
    request = Request("a", [1, 2, 3], SamplingParams())
    scheduler.add_request(request)
    assert (request.params.max_tokens, request.num_tokens_at_most) == (6, 9)
    assert request.predicted_output_tokens == 6
    with pytest.raises(PromptError, match="max_tokens 7"):
        scheduler.add_request(Request("b", [1, 2, 3], SamplingParams(max_tokens=7)))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("preemption_mode", PREEMPTION_MODES)
def test_without_a_block_manager_nobody_gives_way_and_no_block_is_planned(preemption_mode, depth):
    """Every row is as long as a request can get, so that nothing runs short, however many wait and whatever fails."""
    scheduler = Scheduler(LIMITS, preemption_mode=preemption_mode, depth=depth, watermark=0.9)
    requests = [request(f"{i}", num_prompt=20, max_tokens=12) for i in range(9)]
    for each in requests:
        scheduler.add_request(each)
    plans, launched = [], []
    while scheduler.has_unfinished_requests():
        while len(launched) < depth and (plan := scheduler.schedule()).num_requests:
            plans.append(plan)
            launched.append(plan)
        if len(plans) in (10, 21):
            scheduler.retract(launched[0])
            launched.clear()
        else:
            plan = launched.pop(0)
            scheduler.update(plan, ModelOutput({part.request_id: 1 for part in plan.scheduled if part.samples}, 0))
    assert max(plan.num_requests for plan in plans) == LIMITS.max_num_seqs
    assert not any(plan.preempted_ids or plan.block_moves for plan in plans)
    assert not any(part.block_ids or part.first_block for plan in plans for part in plan.scheduled)
    assert [len(each.output_token_ids) for each in requests] == [12] * 9
    assert all(each.num_preemptions == 0 for each in requests)
    assert all(event.blocks is None and event.preempted == () for event in scheduler.trace.steps)
