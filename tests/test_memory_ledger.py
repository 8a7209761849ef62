"""The ledger adds up on every model, what was measured is enough for what runs, and a pool too small is refused."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minillm
from minillm import SamplingParams
from minillm.costs import memory_ledger
from minillm.costs.memory_ledger import MIB, CacheLimits, MemoryProfile, available_memory, plan_cache
from minillm.costs.peak_memory import PeakMemory
from minillm.engine.block_manager import BlockManager
from minillm.engine.engine_config import EngineConfig
from minillm.engine.model_executor import ModelExecutor
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler
from minillm.errors import ConfigError, OutOfMemoryError
from minillm.runtime.cache_engine import host_zeros
from tiny_models import KINDS, random_token_ids

ON_CPU = MemoryProfile(
    weights=100 * MIB,
    activations=7 * MIB,
    masks=MIB,
    bytes_per_block=MIB,
    available=400 * MIB,
    host_available=400 * MIB,
)
ON_CARD = ON_CPU._replace(available=800 * MIB, card_bytes=1000 * MIB)
LIMITS = CacheLimits(max_num_seqs=4, max_model_len=160)
SMALL = EngineConfig(max_num_seqs=6, max_num_batched_tokens=40, max_model_len=48, block_size=4).resolved(48)


# --- how many blocks -------------------------------------------------------------------------------------------------


def test_the_pool_is_what_running_requests_can_use_and_on_a_card_twice_that():
    ledger = plan_cache(ON_CPU, LIMITS)
    assert ledger.num_blocks == 4 * 10 + 1
    assert ledger.free == (100 + 200 - 100 - 41 - 7 - 1) * MIB
    assert plan_cache(ON_CARD, LIMITS).num_blocks == 2 * 4 * 10 + 1


def test_on_a_cpu_the_pool_takes_4_gib_at_most_unless_one_request_needs_more_or_more_is_asked_for():
    """Half of the free memory, which prefix caching fills in the end, is not ours to take."""
    large = ON_CPU._replace(available=64 * 2**30, host_available=64 * 2**30)
    limits = dataclasses.replace(LIMITS, max_num_seqs=1000)
    assert plan_cache(large, limits).cache == 4 * 2**30
    assert plan_cache(large, dataclasses.replace(limits, num_blocks=6000)).cache == 6000 * MIB
    long = dataclasses.replace(limits, max_model_len=16 * 5000)
    assert plan_cache(large, long).num_blocks == 5001
    assert plan_cache(large._replace(card_bytes=70 * 2**30), limits).num_blocks == 2 * 1000 * 10 + 1


def test_the_pool_is_no_larger_than_its_share_of_the_memory():
    limits = dataclasses.replace(LIMITS, max_num_seqs=64)
    on_cpu = plan_cache(ON_CPU, limits)
    assert (on_cpu.num_blocks, on_cpu.total, on_cpu.free) == (200 - 7 - 1, 300 * MIB, 0)
    on_card = plan_cache(ON_CARD, limits)  # 100 MiB of it are others': 0.9 * 1000 - 100
    assert (on_card.num_blocks, on_card.total) == (800 - 100 - 7 - 1, 800 * MIB)
    half = plan_cache(ON_CARD, dataclasses.replace(limits, gpu_memory_utilization=0.5))
    assert half.num_blocks == on_card.num_blocks - 400


def test_blocks_to_swap_to_share_the_memory_of_the_cpu_but_not_of_a_card():
    limits = dataclasses.replace(LIMITS, max_num_seqs=64, num_host_blocks=None)
    on_cpu, on_card = plan_cache(ON_CPU, limits), plan_cache(ON_CARD, dataclasses.replace(LIMITS, num_host_blocks=50))
    assert (on_cpu.num_blocks, on_cpu.num_host_blocks, on_cpu.swap) == (96, 96, 96 * MIB)
    assert (on_card.num_host_blocks, on_card.swap) == (50, 0)
    assert plan_cache(ON_CPU, dataclasses.replace(limits, num_host_blocks=50)).num_blocks == 200 - 7 - 1 - 50


def test_blocks_asked_for_by_number_may_take_all_that_is_available():
    asked = dataclasses.replace(LIMITS, num_blocks=390)
    ledger = plan_cache(ON_CPU, asked)
    assert (ledger.num_blocks, ledger.total) == (390, 500 * MIB)
    with pytest.raises(
        OutOfMemoryError, match=r"393 blocks do not fit: weights 100.0 MiB, cache 393.0 MiB.* lower num_"
    ):
        plan_cache(ON_CPU, dataclasses.replace(LIMITS, num_blocks=393))


def test_a_pool_smaller_than_one_request_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"num_blocks is 10, .*max_model_len = 160 tokens needs 11.*raise num_blocks"):
        dataclasses.replace(LIMITS, num_blocks=10)
    assert plan_cache(ON_CPU, dataclasses.replace(LIMITS, num_blocks=11)).num_blocks == 11
    short = ON_CPU._replace(available=36 * MIB, host_available=36 * MIB)  # half of it: 18, less 8
    with pytest.raises(
        OutOfMemoryError, match=r"max_model_len = 160 .* 11 blocks, 11.0 MiB; .* holds 10 beside .* lower"
    ):
        plan_cache(short, LIMITS)
    assert plan_cache(short, dataclasses.replace(LIMITS, max_model_len=144)).num_blocks == 10
    with pytest.raises(OutOfMemoryError, match=r"gpu_memory_utilization = 0.2 .* holds 0 beside"):
        plan_cache(ON_CARD, dataclasses.replace(LIMITS, gpu_memory_utilization=0.2))


def test_blocks_to_swap_to_must_fit_the_machine():
    """Pinned, keys and values apart, in powers of two: 257 times half a MiB are twice 256 MiB."""
    with pytest.raises(OutOfMemoryError, match="257 host blocks need 512.0 MiB, the machine has 400.0 MiB"):
        plan_cache(ON_CARD, dataclasses.replace(LIMITS, num_host_blocks=257))
    assert plan_cache(ON_CARD, dataclasses.replace(LIMITS, num_host_blocks=256)).host_blocks == 256 * MIB


@pytest.mark.parametrize(
    ("profile", "num_blocks", "num_host_blocks", "taken"),
    [
        (ON_CARD._replace(host_available=10_000 * MIB), 81, 81, 128 * MIB),  # as many as the pool has: 2 * 40.5 MiB
        (ON_CARD, 81, 64, 64 * MIB),  # 65 would take 128 MiB, more than a quarter of 400
        (ON_CARD._replace(host_available=7 * MIB), 81, 1, MIB),
        (ON_CARD._replace(host_available=0), 81, 0, 0),
        (ON_CPU, 250, 100, 100 * MIB),  # not pinned
    ],
)
def test_as_many_blocks_to_swap_to_as_the_pool_has_but_a_quarter_of_the_memory_at_most(
    profile, num_blocks, num_host_blocks, taken
):
    limits = dataclasses.replace(LIMITS, num_blocks=num_blocks, num_host_blocks=None)
    ledger = plan_cache(profile, limits)
    assert (ledger.num_host_blocks, ledger.host_blocks) == (num_host_blocks, taken)


def test_swapping_on_a_large_card_takes_a_quarter_of_the_host_and_not_the_power_of_two_above():
    block = 2 * 36 * 16 * 8 * 128 * 2  # bytes, of Qwen3-8B
    h200 = MemoryProfile(16 * 2**30, 2**30, 0, block, 120 * 2**30, 200 * 2**30, card_bytes=140 * 2**30)
    limits = CacheLimits(max_num_seqs=1000, max_model_len=4096, num_host_blocks=None)
    ledger = plan_cache(h200, limits)
    assert ledger.cache > 100 * 2**30 and 0.98 * 50 * 2**30 < ledger.num_host_blocks * block < ledger.host_blocks
    assert ledger.host_blocks <= 50 * 2**30 and ledger.swap == 0
    assert plan_cache(h200, dataclasses.replace(limits, num_host_blocks=0)).num_blocks == ledger.num_blocks


@pytest.mark.parametrize("num_blocks", [0, 1, 3, 4, 9, 16])
def test_the_ledger_counts_what_is_taken_for_pinned_blocks(monkeypatch, num_blocks):
    """The allocator is torch's: whatever is asked for takes a power of two."""
    taken, torch_zeros = [], torch.zeros

    def pinned_zeros(shape, dtype, pin_memory):
        assert pin_memory
        found = torch_zeros(shape, dtype=dtype)
        taken.append(1 << math.ceil(math.log2(found.nbytes)))
        return found

    monkeypatch.setattr(torch, "zeros", pinned_zeros)
    monkeypatch.setattr(memory_ledger, "PINNED_PIECE", 2**12)
    shape = (3, 16, 2, 8)  # 1,536 bytes: 2 in each piece of 4,096
    keys, values = (host_zeros(num_blocks, shape, torch.bfloat16, "cuda") for _ in range(2))
    assert [block.shape for block in (*keys, *values)] == [shape] * 2 * num_blocks
    bytes_per_block = 2 * math.prod(shape) * 2
    ledger = plan_cache(
        ON_CARD._replace(bytes_per_block=bytes_per_block), dataclasses.replace(LIMITS, num_host_blocks=num_blocks)
    )
    assert sum(taken) == ledger.host_blocks
    assert len({block.data_ptr() for block in (*keys, *values)}) == 2 * num_blocks


@pytest.mark.parametrize(
    "wrong",
    [
        {"gpu_memory_utilization": 0.0},
        {"gpu_memory_utilization": 1.01},
        {"gpu_memory_utilization": float("nan")},
        {"block_size": 0},
        {"max_model_len": 0},
        {"num_host_blocks": -1},
    ],
)
def test_impossible_limits_are_refused(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        dataclasses.replace(LIMITS, **wrong)


@given(
    st.builds(
        MemoryProfile,
        *[st.integers(0, 2**34) for _ in range(3)],
        st.integers(1, 2**23).map(lambda half: 2 * half),  # keys and values
        *[st.integers(0, 2**36) for _ in range(2)],
        st.none() | st.integers(2**30, 2**37),
    ),
    st.builds(
        CacheLimits,
        *[st.integers(1, 5000) for _ in range(2)],
        block_size=st.integers(1, 64),
        num_host_blocks=st.none() | st.integers(0, 5000),
        gpu_memory_utilization=st.floats(0.01, 1),
    ),
)
def test_whatever_the_numbers_the_ledger_adds_up_or_refuses(profile, limits):
    try:
        ledger = plan_cache(profile, limits)
    except OutOfMemoryError:
        return
    assert sum(ledger.spent.values()) + ledger.free == ledger.total
    assert ledger.free >= 0
    assert limits.least_blocks <= ledger.num_blocks <= limits.most_blocks(profile)
    assert ledger.cache == ledger.num_blocks * profile.bytes_per_block
    assert ledger.host_blocks >= ledger.num_host_blocks * profile.bytes_per_block
    if limits.num_host_blocks is None:
        assert ledger.num_host_blocks <= ledger.num_blocks and 4 * ledger.host_blocks <= profile.host_available


def test_the_table_printed_at_start_names_every_post():
    table = str(plan_cache(ON_CPU, dataclasses.replace(LIMITS, num_host_blocks=20)))
    assert table.splitlines() == [
        "memory                 300.0 MiB  100.0%",
        "  weights              100.0 MiB   33.3%",
        "  cache                 41.0 MiB   13.7%  41 blocks of 16 tokens",
        "  swapped blocks        20.0 MiB    6.7%  20 blocks",
        "  activations            7.0 MiB    2.3%",
        "  masks                  1.0 MiB    0.3%",
        "  free                 131.0 MiB   43.7%",
    ]
    assert "20 blocks, 32.0 MiB of host memory" in str(
        plan_cache(ON_CARD, dataclasses.replace(LIMITS, num_host_blocks=20))
    )


def test_several_workers_get_what_suits_the_worst_of_them():
    small = ON_CARD._replace(available=700 * MIB, weights=50 * MIB)
    assert MemoryProfile.worst([ON_CARD, small]) == ON_CARD._replace(available=700 * MIB)
    assert MemoryProfile.worst([ON_CPU]) == ON_CPU


# --- measured --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", [*KINDS, "storyteller"])
def test_the_ledger_adds_up_and_covers_every_step(kind, backend, load):
    model = minillm.load_model(skip_tokenizer_init=True).model if kind == "storyteller" else load(kind)
    executor = ModelExecutor.start(model, dataclasses.replace(SMALL, attention_backend=backend))
    ledger = executor.reserve(SMALL)
    cache = executor.workers[0].runner.cache
    assert ledger.weights == 4 * model.config.num_parameters + model.inv_freq.nbytes
    assert ledger.cache == cache.keys.nbytes + cache.values.nbytes == cache.num_bytes
    assert ledger.num_blocks == 6 * 12 + 1
    assert sum(ledger.spent.values()) + ledger.free == ledger.total
    assert (ledger.masks > 0) == (executor.why.startswith("reference")) and ledger.activations > 0

    peaks = peaks_of_a_run(executor, ledger.num_blocks, model.config.num_sampled_ids)
    assert len(peaks) > 10
    assert ledger.activations + ledger.masks >= max(peaks) > 0.5 * (ledger.activations + ledger.masks)


def peaks_of_a_run(executor: ModelExecutor, num_blocks: int, num_ids: int) -> list[int]:
    """Bytes at the peak of every step of a run of requests of all lengths, with all that sampling can do."""
    scheduler = Scheduler(SMALL, block_manager=BlockManager(num_blocks, SMALL.block_size))
    draw = random.Random(3)
    for index in range(8):
        length = draw.choice([47, 40, 33, 20])
        params = SamplingParams(
            temperature=1,
            top_k=50,
            top_p=0.9,
            min_p=0.01,
            seed=index,
            logprobs=20,
            max_tokens=min(48 - length, 10),
            presence_penalty=1.0,
            repetition_penalty=1.5,
            logit_bias={1: 1.0},
            min_tokens=1,
            prompt_logprobs=20,
        )
        scheduler.add_request(Request(f"req {index}", random_token_ids(length, num_ids, index), params))
    peaks = []
    while scheduler.has_unfinished_requests():
        plan = scheduler.schedule()
        with PeakMemory() as memory:
            output = executor.execute_model(plan)
        scheduler.update(plan, output)
        peaks.append(memory.peak_bytes)
    return peaks


# --- the machine -----------------------------------------------------------------------------------------------------


def test_available_memory_is_the_kernels_number():
    assert 0 < available_memory() < 2**46


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_ledger, "CGROUP", tmp_path)
    free = available_memory()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{30 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {20 * MIB}\nactive_file 7\n")
    assert available_memory() > free / 2
    (tmp_path / "memory.max").write_text(f"{50 * MIB}\n")
    assert available_memory() == 40 * MIB


def test_without_proc_the_whole_memory_counts(monkeypatch, tmp_path):
    def no_proc(path, key):
        raise OSError(path)

    available = available_memory()
    monkeypatch.setattr(memory_ledger, "_kernel_number", no_proc)
    assert available_memory() > available
    monkeypatch.delattr(memory_ledger.os, "sysconf")
    with pytest.raises(ConfigError, match="does not tell how much memory"):
        available_memory()
