"""What lies in memory that nobody uses never matters: here it is full of NaN and infinities."""

import pytest
import torch

from minillm import SamplingParams, generate_chunked
from minillm.engine.block_manager import BlockManager
from minillm.engine.request import Request
from minillm.engine.scheduler import PREEMPTION_MODES, Scheduler, SchedulerConfig
from minillm.ladder.contiguous import ContiguousExecutor
from minillm.ladder.kv_cache import KVCache, RowCache
from minillm.runtime.cache_engine import CacheEngine
from minillm.runtime.plan import ScheduledRequest
from minillm.simulation.clock import VirtualClock
from minillm.simulation.running import BATCHING
from minillm.simulation.running import run as run_to_the_end
from test_device_runner import WAYS
from tiny_models import random_token_ids

KIND = "llama-mqa"
BLOCKS, BLOCK_SIZE = 14, 4  # far too few for all at once
POISONS = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(scope="module")
def model(load):
    return load(KIND, torch.float64)


def requests():
    """Of all lengths, some with the same beginning, two with several outputs."""
    made = []
    for i in range(7):
        n = 3 if i in (1, 4) else 1
        params = SamplingParams(
            temperature=1e-4, n=n, max_tokens=14 - i, seed=i, ignore_eos=True
        )  # greedy to all intents
        prompt = random_token_ids(6, 190)[: 3 * i] + random_token_ids(1 + 2 * i, 190, i)
        made.append(Request(f"req {i}", prompt, params))
    return made


def alone(model, request):
    params = SamplingParams(max_tokens=request.params.max_tokens, ignore_eos=True)
    return generate_chunked(model, request.prompt_token_ids, params, chunk_size=5).token_ids


@pytest.fixture(scope="module")
def expected(model):
    return {request.request_id: alone(model, request) for request in requests()}


@pytest.mark.parametrize("poison", POISONS)
def test_a_cache_of_one_sequence(model, expected, monkeypatch, poison):
    made = KVCache.__init__

    def poisoned(self, *args, **named):
        made(self, *args, **named)
        self.keys.fill_(poison), self.values.fill_(poison)

    monkeypatch.setattr(KVCache, "__init__", poisoned)
    assert {request.request_id: alone(model, request) for request in requests()} == expected


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("batching", BATCHING)
def test_rows_that_were_given_back(model, expected, batching, poison, monkeypatch):
    """Padded rectangles, whose rows have ended here and there, and ragged steps; every row is used again and again."""
    given_back, release = [], RowCache.release

    def poisoned(self, row):
        self.keys[:, row], self.values[:, row] = poison, poison  # as a request leaves it whose numbers overflowed
        given_back.append(row)
        release(self, row)

    monkeypatch.setattr(RowCache, "release", poisoned)
    limits, clock = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=8, max_model_len=48), VirtualClock()
    asked = [request for request in requests() if request.params.n == 1]
    run_to_the_end(BATCHING[batching](limits, clock), ContiguousExecutor(model, 2, 48), asked, clock)
    assert {each.request_id: tuple(each.output_token_ids) for each in asked} == {
        each.request_id: expected[each.request_id] for each in asked
    }
    assert len(given_back) > 2


def poison_unused(cache, manager, poison):
    """All blocks that are in no table and not kept for their content, in the pool and of host memory."""
    unused, host = list(manager._free), list(manager._free_host)
    cache.keys[:, unused], cache.values[:, unused] = poison, poison
    for block in host:
        cache.host_keys[block].fill_(poison), cache.host_values[block].fill_(poison)
    return len(unused)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("mode", PREEMPTION_MODES)
@pytest.mark.parametrize("way", ["host", "eager"])
def test_blocks_of_the_pool_and_of_host_memory(model, expected, way, mode, poison):
    manager = BlockManager(BLOCKS, BLOCK_SIZE, num_host_blocks=BLOCKS)
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=48)
    scheduler = Scheduler(limits, block_manager=manager, preemption_mode=mode)
    runner = WAYS[way](model, num_blocks=BLOCKS, num_host_blocks=BLOCKS)
    asked = requests()
    for request in asked:
        scheduler.add_request(request)
    moved, poisoned = set(), 0
    while scheduler.has_unfinished_requests():
        poisoned += poison_unused(runner.cache, manager, poison)
        plan = scheduler.schedule()
        moved |= {move.kind for move in plan.block_moves} | ({"preempted"} if plan.preempted_ids else set())
        scheduler.update(plan, runner.execute_model(plan))
    for request in asked:
        for each in (request, *request.children):
            assert tuple(each.output_token_ids) == expected[request.request_id]
    assert poisoned > 20 and "copy" in moved and "preempted" in moved
    assert mode == "recompute" or {"swap_out", "swap_in"} <= moved


def test_what_a_block_brings_behind_its_content_is_cleared(model):
    """A block that was shared, or comes back from host memory, is full of what its writers went on with."""
    cache = CacheEngine(model.config, 6, BLOCK_SIZE, torch.float64)
    for pool in (cache.keys, cache.values):
        pool.fill_(torch.inf)
    part = ScheduledRequest("a", 6, 3, True, "decode", 0, (2, 4, 3))
    cache.clear(part, part.block_ids)
    for pool in (cache.keys, cache.values):
        finite = pool.isfinite().all(-1).all(-1).all(0)  # [num_blocks, block_size]
        assert finite.tolist() == [
            [block == 3 or (block == 4 and slot >= 2) for slot in range(4)] for block in range(6)
        ]
