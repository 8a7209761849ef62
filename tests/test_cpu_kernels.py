"""The C++ kernels for a CPU against float64: attention over poisoned pools, small operations, builds, planted bugs."""

import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import operation_cases
from minillm.errors import KernelError
from minillm.kernels import building, counting, cpu, dispatch
from minillm.runtime.plan import RunnerOptions
from minillm.runtime.worker import Worker
from paged_cases import (
    check_decode,
    check_nan_stays_with_those_who_see_it,
    check_prefill,
    check_store,
    paged,
)
from tiny_models import LADDER_TOLERANCE, difference

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = [  # each is built, which takes a second or two
    *((dtype, 2, 64, 16) for dtype in DTYPES),
    (torch.float32, 1, 32, 1),
    (torch.float32, 3, 80, 7),
    (torch.float32, 8, 256, 32),
    (torch.bfloat16, 4, 128, 16),
    (torch.float64, 5, 32, 3),
]
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 200]
pytestmark = pytest.mark.skipif(
    cpu.unusable(torch.float32, 64, 2) is not None, reason=f"no C++ kernels: {cpu.unusable(torch.float32, 64, 2)}"
)


def kernels(version=2):
    """As `paged_cases` calls them: with a number of splits, which a CPU has no use for."""

    def decode(*arguments, num_splits=1, **options):
        return cpu.decode(*arguments, version=version, **options)

    return SimpleNamespace(decode=decode, prefill=cpu.prefill, store_kv=cpu.store_kv)


@pytest.mark.parametrize(("dtype", "group", "head_size", "block_size"), SHAPES)
def test_decode(dtype, group, head_size, block_size):
    case = paged(LENGTHS, dtype, head_size=head_size, block_size=block_size, device="cpu")
    check_decode(kernels(), case, group)


@pytest.mark.parametrize("version", [1, 2])
def test_both_versions_of_decode(version):
    check_decode(kernels(version), paged(LENGTHS, device="cpu"), group=4)


@pytest.mark.parametrize(("dtype", "group", "head_size", "block_size"), SHAPES)
def test_prefill(dtype, group, head_size, block_size):
    case = paged([1, 16, 17, 70, 130, 200], dtype, head_size=head_size, block_size=block_size, device="cpu")
    check_prefill(kernels(), case, [1, 16, 3, 70, 33, 1], group)


@pytest.mark.parametrize("window", [1, 7, 16, 63, 64, 65, 1000])
def test_sliding_windows(window):
    case = paged([1, 64, 65, 200], device="cpu")
    check_decode(kernels(), case, window=window)
    check_prefill(kernels(), case, [1, 64, 20, 150], window=window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_thousand_keys(dtype):
    case = paged([3000, 4097], dtype, num_kv_heads=1, device="cpu")
    check_decode(kernels(), case)
    check_prefill(kernels(), case, [40, 17])


@pytest.mark.parametrize("dtype", DTYPES)
def test_store(dtype):
    check_store(kernels(), dtype, device="cpu")


@pytest.mark.parametrize("what", ["keys", "values"])
def test_nan_stays_with_those_who_see_it(what):
    check_nan_stays_with_those_who_see_it(kernels(), what, device="cpu")


# --- the small operations ---


# --- its loads, counted ---


def test_lines_stay_as_long_as_there_is_room_for_those_used_later():
    lines = np.array([5, 5, 6, 5, 7, 6, 5])
    assert counting.fetches(lines, 1).tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert counting.fetches(lines, 2).tolist() == [0, 0, 1, 0, 2, 3, 4]
    assert counting.fetches(lines, 3).tolist() == [0, 0, 1, 0, 2, 1, 0]
    assert counting.fetches(lines[:0], 3).tolist() == []


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("window", [None, 20])
def test_what_is_counted_is_the_kernel(version, window):
    def decode(*arguments, num_splits=1, out, **options):
        return out.copy_(counting.decode(*arguments, version=version, **options)[0])

    counted = SimpleNamespace(decode=decode)
    check_decode(counted, paged(LENGTHS, device="cpu"), group=4, window=window)


@pytest.mark.parametrize(
    ("version", "cache_bytes", "times"),
    [(1, 2 << 10, 4), (1, 32 << 10, 1), (2, 2 << 10, 1), (2, 32 << 10, 1), (2, 0, 4)],
)
def test_lines_of_keys_are_fetched_once_or_for_every_query_head(version, cache_bytes, times):
    """Two requests of 30 keys, 2 key heads, lines of 16 numbers: 7.5 KiB of keys and as much of values for a head."""
    case, head_lines = paged([30, 30], device="cpu"), 64 * 4 // 64
    q = torch.randn(2, 8, 64)
    _, traffic = counting.decode(q, *case[:4], version=version, cache_bytes=cache_bytes)
    for name in ("keys", "values"):
        found = traffic.loads(name)
        assert found.sectors == found.requests == times * 2 * 30 * 2 * head_lines
        assert (found.unique_bytes, found.efficiency) == (2 * 30 * 2 * 64 * 4, 1.0)
    assert traffic.loads("q").unique_bytes == q.nbytes


def test_loads_are_counted_in_float32_alone():
    case = paged([30], torch.bfloat16, device="cpu")
    with pytest.raises(KernelError, match="bfloat16"):
        counting.decode(torch.randn(1, 8, 64).bfloat16(), *case[:4])


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The checks of `operation_cases`, whatever other devices there are."""
    monkeypatch.setattr(operation_cases, "DEVICE", "cpu")
    return operation_cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 16, 100, 1100])
def test_add_rms_norm_and_silu_mul(size, dtype, on_the_cpu):
    for num_tokens in (1, 5):
        on_the_cpu.check_add_rms_norm(cpu, dtype, num_tokens, size)
        on_the_cpu.check_silu_mul(cpu, dtype, num_tokens, max(2, size))
    nothing = torch.zeros(0, 2 * size, dtype=dtype)
    assert cpu.silu_mul(nothing).shape == (0, size)
    assert cpu.add_rms_norm(nothing, nothing.clone(), torch.ones(2 * size, dtype=dtype), 1e-5).shape == (0, 2 * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_ids", [1, 199, 2047, 2048, 2049, 4500])
def test_the_same_tokens_are_sampled(num_ids, dtype, on_the_cpu):
    on_the_cpu.check_same_tokens(cpu, num_ids, dtype, num_rows=12)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("place", [0, 1300, 2499])
def test_rows_that_are_not_finite_are_minus_one(temperature, place, on_the_cpu):
    on_the_cpu.check_not_finite(cpu, temperature, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_size"), [((4, 2), 64), ((5, 1), 32)])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_rotate_store(normed, heads, head_size, dtype, on_the_cpu):
    on_the_cpu.check_norm_rotate_store(cpu, dtype, head_size, heads, normed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(value):
    """Otherwise a request whose numbers have overflowed would go on as if nothing were the matter."""
    x = torch.randn(3, 64)
    x[1, 7] = value
    out = cpu.add_rms_norm(x, torch.zeros_like(x), torch.ones(64), 1e-6)
    assert not out[1].isfinite().all() and out[[0, 2]].isfinite().all()
    gate_up = torch.randn(3, 64)
    gate_up[1, 40] = value
    out = cpu.silu_mul(gate_up)
    assert not out[1, 8].isfinite() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", ["mistral-window", "qwen3"])
@torch.inference_mode()
def test_the_fused_forward_is_the_model_s(kind, load, on_the_cpu):
    plain, fused = on_the_cpu.both_forwards(load(kind, torch.float64), cpu, "cpu")
    assert difference(fused, plain) < LADDER_TOLERANCE


# --- threads ---


@pytest.fixture
def threads():
    """`torch.set_num_threads`, taken back afterwards."""
    given = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(given)


def all_operations(dtype):
    """What each gives for enough numbers to be shared among threads."""
    torch.manual_seed(3)
    case = paged([200, 1, 65, 33, 130] * 3, dtype, num_kv_heads=3, device="cpu")
    slots = torch.randperm(len(case.keys) * 16)[:200]
    x, logits = torch.randn(200, 3 * 3 * 64).to(dtype), torch.randn(9, 5000).to(dtype)
    rotation = tuple(torch.randn(2, 200, 1, 64).to(dtype))
    starts = torch.tensor([0, 70, 71, 100, 133, 200])
    stored, added = (case.keys.clone(), case.values.clone()), x.clone()
    tables, lengths = case.tables, case.lengths
    return [
        cpu.decode(x[:15, : 6 * 64].unflatten(1, (6, 64)), case.keys, case.values, tables, lengths),
        cpu.prefill(x.unflatten(1, (9, 64)), case.keys, case.values, tables[:5], starts, lengths[:5].clamp(min=70), 70),
        cpu.norm_rotate_store(x, 3, 3, None, None, 1e-5, rotation, slots, *stored),
        *(each.nan_to_num(7.0) for each in stored),
        cpu.add_rms_norm(x.flip(0), added, x[0].clone(), 1e-5),
        added,
        cpu.silu_mul(x),
        cpu.sample_rows(logits, torch.linspace(0, 2, 9), torch.arange(9), torch.arange(9)),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype, threads):
    threads(1)
    alone = all_operations(dtype)
    for number in (2, 3, 16):
        threads(number)
        for ours, expected in zip(all_operations(dtype), alone, strict=True):
            assert torch.equal(ours.nan_to_num(7.0), expected.nan_to_num(7.0))


POOL = """
import os, torch
from minillm.kernels import cpu
if cpu.without_threads():
    raise SystemExit(cpu.without_threads())
torch.set_num_threads(1)
x, few, weight = torch.ones(300, 600), torch.ones(2, 600), torch.ones(600)
torch.set_num_threads(3)
def threads_beside(work):
    before = len(os.listdir("/proc/self/task"))
    work()
    return len(os.listdir("/proc/self/task")) - before
print(*map(threads_beside, (lambda: cpu.silu_mul(few), lambda: cpu.silu_mul(x), lambda: torch.mm(x, x.T),
    lambda: torch.exp(torch.ones(10**6)), lambda: cpu.add_rms_norm(x, x.clone(), weight, 1e-5))))
"""


@pytest.mark.skipif(bool(cpu.without_threads()), reason=cpu.without_threads())
def test_products_and_kernels_share_one_pool_of_threads():
    told = subprocess.run([sys.executable, "-c", POOL], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["0", "2", "0", "0", "0"]  # little work starts none, then there are two beside the first


def test_without_threads_that_are_torch_s_the_kernels_do_without_and_say_so(fresh, monkeypatch, threads, load):
    def only_without(text, options, key=""):
        if cpu.THREADS in options:
            raise KernelError("no such option")
        return building.build(text, options, key)

    monkeypatch.setattr(cpu, "build", only_without)
    assert (
        "the compiler here has no threads" in dispatch.choose("cpu", load("llama").config, torch.float32, "cpu", 16).why
    )
    threads(3)
    alone = all_operations(torch.float32)
    monkeypatch.undo()
    for cached in (cpu._library, cpu.without_threads):
        cached.cache_clear()
    monkeypatch.setattr(cpu.ctypes, "CDLL", _nothing_loaded)
    assert "are not those of GNU's OpenMP" in cpu.without_threads()
    monkeypatch.undo()
    for ours, expected in zip(all_operations(torch.float32), alone, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), expected.nan_to_num(7.0))


def _nothing_loaded(*arguments):
    raise OSError("no such library is loaded")


# --- building ---


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As on a machine on which nothing has been built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (cpu._library, cpu.without_threads):
        cached.cache_clear()
    yield tmp_path
    for cached in (cpu._library, cpu.without_threads):
        cached.cache_clear()


def test_a_library_is_built_once_for_a_processor(fresh, monkeypatch):
    assert cpu.unusable(torch.float32, 32, 1) is None
    built = sorted(fresh.rglob("*.so"))
    assert len(built) == 2  # of this shape of heads, and of what is for all
    cpu._library.cache_clear()
    monkeypatch.setattr(building, "_compile", None)  # it need not be called again
    assert cpu.unusable(torch.float32, 32, 1) is None
    cpu._library.cache_clear()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh))
    monkeypatch.setattr(cpu, "processor", lambda: "another one, with fewer instructions")
    assert cpu.unusable(torch.float32, 32, 1) is None
    assert len(sorted(fresh.rglob("*.so"))) == 4 and set(built) < set(fresh.rglob("*.so"))


def test_without_a_compiler_or_with_a_failing_one_the_engine_runs_and_says_why(fresh, monkeypatch, load):
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    monkeypatch.setattr(building.importlib.util, "find_spec", lambda name: None)
    worker = Worker(load("llama"))
    worker.init_cache(9)
    assert worker.backend.name == "reference"
    assert worker.why.startswith("reference: the fastest that works here; not cpu (no C++ compiler")
    with pytest.raises(KernelError, match="attention_backend 'cpu': no C\\+\\+ compiler"):
        Worker(load("llama"), RunnerOptions("cpu")).init_cache(9)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh))
    monkeypatch.setenv("CXX", "false")
    assert "refuses the kernels" in cpu.unusable(torch.float32, 32, 1)


def test_a_cache_that_cannot_be_written_is_a_reason(fresh, monkeypatch):
    (fresh / "minillm").write_text("a file where a folder should be")
    assert "minillm" in cpu.unusable(torch.float32, 32, 1)


# --- bugs planted in the source ---


def small_decode(window=None):
    check_decode(kernels(), paged([0, 1, 16, 17, 90], num_kv_heads=2, head_size=32, device="cpu"), 2, window)


def small_prefill(window=None):
    case = paged([1, 17, 70, 130], num_kv_heads=2, head_size=32, device="cpu")
    check_prefill(kernels(), case, [1, 17, 5, 100], 2, window)


def nan_prefill():
    check_nan_stays_with_those_who_see_it(kernels(), "values", device="cpu")


def small_operations():
    operation_cases.check_add_rms_norm(cpu, torch.float32)
    operation_cases.check_silu_mul(cpu, torch.float32)
    operation_cases.check_norm_rotate_store(cpu, torch.float32)


def sampling():
    for seed in range(8):
        operation_cases.check_same_tokens(cpu, seed=seed)
    operation_cases.check_the_last_token(cpu)
    operation_cases.check_first_of_equals(cpu, torch.float32)
    operation_cases.check_not_finite(cpu, 1.0, 1300)
    operation_cases.check_rows_alone(cpu)


BUGS = {
    "one key too few": (
        "t < end; ++t) {\n        const SCALAR* value",
        "t < end - 1; ++t) {\n        const SCALAR* value",
        small_decode,
    ),
    "blocks in the order of the pool": ("table[t / block_size] *", "(t / block_size) *", small_decode),
    "the block of the request before": (
        "tables + b * table_stride",
        "tables + (b ? b - 1 : 0) * table_stride",
        small_decode,
    ),
    "window one too long": ("end > window ? end - window", "end > window ? end - window - 1", lambda: small_decode(7)),
    "scores not scaled": ("* scale;\n    for (int64_t t", ";\n    for (int64_t t", small_decode),
    "the next key seen": ("position + row / G + 1 - start", "position + row / G + 2 - start", small_prefill),
    "sums not rescaled": ("tile.sum[row][i] *= shrink", "tile.sum[row][i] *= 1", small_prefill),
    "total forgotten": ("tile.total[row] * shrink + total", "tile.total[row] + total", small_prefill),
    "window of the first row for all": ("own - window)", "tile.total[0] * 0)", lambda: small_prefill(9)),
    "0 * NaN": ("wrong += !__b", "wrong += 0 * !__b", nan_prefill),
    "x not added": ("real(kept[i]) + real(x", "real(kept[i]) + 0 * real(x", small_operations),
    "silu of the other side": ("(g > 0 ? g : g * e)", "(g > 0 ? g * e : g)", small_operations),
    "padding stored": ("if (slots[t] < 0) continue;\n        SCALAR *key", "SCALAR *key", small_operations),
    "rows share their noise": ("uint64_t(seeds[row])", "uint64_t(seeds[0])", sampling),
    "half of the draw's number": ("uint32_t(draw >> 32)", "0", sampling),
    "tiles share their noise": ("philox(uint32_t(first / 4)", "philox(0", sampling),
    "9 rounds": ("round < 10", "round < 9", sampling),
    "noise is scaled too": ("scores[i] += gumbel(bits[i])", "scores[i] += scale * gumbel(bits[i])", sampling),
    "a bad logarithm": ("e * 0.693147181f", "e * 0.5f", sampling),
    "the last tile is left out": ("first < size; first += IDS", "first + IDS <= size; first += IDS", sampling),
    "of equals the last": ("if (!(most > best)) continue", "if (!(most >= best)) continue", sampling),
    "NaN is passed over": ("wrong += !(real(own[i]) < -NOTHING)", "wrong += real(own[i]) == -NOTHING", sampling),
    "turned the other way": ("real(cos[i]) + y[i + D / 2]", "real(cos[i]) - y[i + D / 2]", small_operations),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name, fresh, monkeypatch, on_the_cpu):
    right, wrong, check = BUGS[name]
    sources = {file.name: file.read_text() for file in cpu.FOLDER.iterdir() if file.suffix in (".cpp", ".h")}
    assert sum(source.count(right) for source in sources.values()) == 1
    monkeypatch.setattr(cpu, "FOLDER", fresh)
    for name, source in sources.items():
        (fresh / name).write_text(source.replace(right, wrong))
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("check", [*dict.fromkeys(bug[-1] for bug in BUGS.values())])
def test_without_the_bug_the_same_check_passes(check, on_the_cpu):
    check()


def test_slots_of_32_bits_in_the_layers_that_are_not_checked(on_the_cpu):
    def as_32_bits(*arguments):
        return cpu.unchecked.norm_rotate_store(*(x.int() if i == 7 else x for i, x in enumerate(arguments)))

    on_the_cpu.check_norm_rotate_store(SimpleNamespace(norm_rotate_store=as_32_bits), torch.float32, 64, (4, 2))
