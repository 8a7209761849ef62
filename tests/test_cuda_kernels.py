"""The CUDA C++ kernels beside plain float64 attention: emulated on the CPU, and compiled where there is a GPU.

The emulation must itself be trusted: that it counts what warps load, and says so when a kernel does what it must not.
"""

import shutil
import subprocess
from typing import NamedTuple

import numpy as np
import pytest
import torch

from minillm.errors import KernelError
from minillm.kernels import building, cuda
from minillm.kernels.cuda import compiled, emulator
from minillm.kernels.cuda.emulator import BACKWARDS, Emulator, emulate
from minillm.kernels.cuda.launches import SOURCE, Specialisation, splits_for
from minillm.kernels.cuda.traffic import RECORD, Traffic, joined
from paged_cases import (
    DEVICE,
    check_decode,
    check_nan_stays_with_those_who_see_it,
    check_prefill,
    check_store,
    paged,
    random_queries,
    uninitialized_memory_is_nan,  # noqa: F401 - for every test here
)

VERSIONS = cuda.VERSIONS
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Version(NamedTuple):
    """The kernels, decode in one version. `kernels`: an Emulator, or the package on a GPU."""

    version: int
    kernels: object = emulator

    def decode(self, *arguments, num_splits=None, **options):
        splits = num_splits if self.version == 5 else None
        return self.kernels.decode(*arguments, version=self.version, num_splits=splits, **options)

    def prefill(self, *arguments, **options):
        return self.kernels.prefill(*arguments, **options)


def on_cpu(*arguments, **options):
    return paged(*arguments, device="cpu", **options)


# --- against float64 ---

# All groups, and with each other value of the rest; every row is compiled once.
SHAPES = [
    (1, 64, 16, F32), (2, 128, 32, F16), (3, 64, 256, BF16), (4, 128, 16, BF16), (5, 64, 32, F16), (6, 128, 256, F32),
    (7, 16, 8, F32), (8, 32, 16, BF16),
]  # fmt: skip


def lengths_around(block_size):
    return [0, 1, block_size - 1, block_size, block_size + 1, 300]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("group", "head_size", "block_size", "dtype"), SHAPES)
def test_decode(group, head_size, block_size, dtype, version):
    case = on_cpu(lengths_around(block_size), dtype, 1 + group % 2, head_size, block_size)
    check_decode(Version(version), case, group)


@pytest.mark.parametrize(("group", "head_size", "block_size", "dtype"), SHAPES)
def test_prefill(group, head_size, block_size, dtype):
    """Without a prefix, behind a prefix that ends beside a block's end, one token, none."""
    case = on_cpu(lengths_around(block_size), dtype, 1 + group % 2, head_size, block_size)
    check_prefill(emulator, case, [0, 1, 5, min(block_size, 19), 1, 21], group)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_store(dtype):
    check_store(emulator, dtype, device="cpu")


@pytest.mark.parametrize("window", [1, 16, 63, 64, 65, 1000])
def test_sliding_windows(window):
    case = on_cpu([0, 1, 64, 65, 150], num_kv_heads=1)
    for version in VERSIONS:
        check_decode(Version(version), case, 1, window)
    check_prefill(emulator, case, [0, 1, 64, 3, 70], 1, window)


@pytest.mark.parametrize("version", VERSIONS)
def test_scores_of_which_no_exponential_can_be_taken(version):
    """Nothing but the largest score taken off them keeps 2^score in float."""
    case = on_cpu([2, 150, 300], F16, num_kv_heads=2, block_size=32)
    case.keys.mul_(256)
    case = case._replace(own=[(k * 256, v) for k, v in case.own])
    check_decode(Version(version), case, group=5)
    check_prefill(emulator, case, [2, 30, 1], group=5)


@pytest.mark.parametrize("num_splits", [1, 2, 5, 32])
def test_any_number_of_splits_gives_the_same(num_splits):
    case = on_cpu([0, 1, 64, 65, 300], num_kv_heads=1)
    check_decode(emulator, case, 1, num_splits=num_splits)
    check_decode(emulator, case, 1, num_splits=num_splits, window=130)


def test_splits_fill_the_processors_and_follow_from_shapes_alone():
    assert splits_for(num_blocks=8, max_keys=8192, processors=132) == 32
    assert splits_for(num_blocks=64, max_keys=8192, processors=132) == 8
    assert splits_for(num_blocks=2048, max_keys=8192, processors=132) == 1
    assert splits_for(num_blocks=8, max_keys=200, processors=132) == 3
    assert splits_for(num_blocks=8, max_keys=16, processors=132) == 1


def test_tables_of_32_bits_beside_lengths_of_64():
    case = on_cpu([0, 40, 300])
    case = case._replace(tables=case.tables.int())
    check_decode(emulator, case, group=4)
    check_prefill(emulator, case, [0, 20, 3], group=4)


def test_padding_rows_are_zeros():
    case = on_cpu([0, 20, 0], num_kv_heads=1)
    q = random_queries(9, case, group=1)
    for version in VERSIONS:
        out = Version(version).decode(q[:3], case.keys, case.values, case.tables, case.lengths, num_splits=4)
        assert out[[0, 2]].eq(0).all() and out[1].ne(0).all()
    out = emulator.prefill(q, case.keys, case.values, case.tables, torch.tensor([0, 2, 5, 9]), case.lengths, 4)
    assert out[[0, 1, 5, 6, 7, 8]].eq(0).all() and out[2:5].ne(0).all()


def test_no_rows_at_all():
    case = on_cpu([3], num_kv_heads=1)
    q, none = random_queries(0, case, group=1), torch.zeros(0, dtype=torch.long)
    emulator.store_kv(case.keys, case.values, none, q, q)
    assert emulator.decode(q, case.keys, case.values, case.tables[:0], none).shape == (0, 1, 64)
    starts = torch.zeros(2, dtype=torch.long)
    assert emulator.prefill(q, case.keys, case.values, case.tables, starts, case.lengths, 0).shape == (0, 1, 64)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("what", ["keys", "values"])
def test_nan_stays_with_those_who_see_it(what, version):
    check_nan_stays_with_those_who_see_it(Version(version), what, device="cpu")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_order_of_threads_does_not_matter(version):
    case = on_cpu([1, 33, 100], num_kv_heads=1)
    q, arguments = random_queries(3, case, group=1), (case.keys, case.values, case.tables, case.lengths)
    first = Version(version).decode(q, *arguments)
    for order in (BACKWARDS, 1, 77):
        assert torch.equal(first, Version(version, Emulator(order=order)).decode(q, *arguments))


CONVERT = (
    SOURCE
    + """
extern "C" __global__ void convert(
    const SCALAR* from, float* wide, SCALAR* back, const float* numbers, SCALAR* close
) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    store(wide + i, to_float(load(from + i)));
    store(back + i, rounded(to_float(load(from + i))));
    store(close + i, rounded(load(numbers + i)));
}
"""
)


@pytest.mark.parametrize(("scalar", "dtype"), [("Half", F16), ("BFloat16", BF16)])
def test_numbers_of_16_bits_are_converted_as_torch_does(scalar, dtype):
    """All of them, there and back; and floats of all sizes, those half-way between two among them."""
    torch.manual_seed(0)
    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    finite = every[every.isfinite()].float()
    between = (finite + finite.roll(1)) / 2
    numbers = torch.cat([between, torch.randn(1 << 16) * 2.0 ** torch.randint(-30, 20, (1 << 16,))])[: 1 << 16]
    numbers[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 65520])
    wide, back, rounded = torch.zeros(1 << 16), torch.zeros_like(every), torch.zeros_like(every)
    arguments = {"from": every, "wide": wide, "back": back, "numbers": numbers, "close": rounded}
    source = Specialisation(scalar, "int", 64, 16, 1).source(CONVERT)
    emulate(source, "convert", (512, 1, 1), (128, 1, 1), arguments)
    assert torch.equal(wide.nan_to_num(1e30), every.float().nan_to_num(1e30))
    assert torch.equal(back.nan_to_num(1), every.nan_to_num(1))
    assert torch.equal(rounded.nan_to_num(1), numbers.to(dtype).nan_to_num(1))


# --- traffic ---

COPY = """
extern "C" __global__ void copy(const float* from, float* to, int stride, int count) {
    const int i = threadIdx.x;
    if (i < count) store(to + i, load(from + i * stride));
}
"""


def copied(stride: int, count: int, threads: int = 32, first: int = 0) -> Traffic:
    arguments = {"from": torch.zeros(2000)[first:], "to": torch.zeros(threads), "stride": stride, "count": count}
    return emulate(COPY, "copy", (1, 1, 1), (threads, 1, 1), arguments)


def counts(traffic: Traffic, *names):
    own = traffic.loads(*names)
    return own.num_loads, own.requests, own.sectors, own.bytes_asked, own.unique_bytes


def test_sectors_are_what_a_warp_touches():
    assert counts(copied(stride=1, count=32)) == (32, 1, 4, 128, 128)
    assert counts(copied(stride=2, count=32)) == (32, 1, 8, 128, 128)
    assert counts(copied(stride=8, count=32)) == (32, 1, 32, 128, 128)
    assert counts(copied(stride=0, count=32)) == (32, 1, 1, 4, 4)
    assert counts(copied(stride=1, count=5)) == (5, 1, 1, 20, 20)
    assert counts(copied(stride=1, count=32, first=1)) == (32, 1, 5, 128, 128)  # begins inside a sector
    assert counts(copied(stride=1, count=40, threads=64)) == (40, 2, 5, 160, 160)
    traffic = copied(stride=8, count=32)
    assert (traffic.loads().bytes_moved, traffic.loads().efficiency) == (1024, 0.125)
    assert traffic.stores().sectors == 4 and traffic.loads("to").num_loads == 0


def test_records_say_who_reads_what_where():
    traffic = copied(stride=2, count=3)
    line = 1 + COPY.splitlines().index("    if (i < count) store(to + i, load(from + i * stride));")
    loads = traffic.records_of("from")
    assert loads["address"].tolist() == [0, 8, 16] and loads["thread"].tolist() == [0, 1, 2]
    assert set(loads["line"].tolist()) == {line} and set(loads["size"].tolist()) == {4}
    assert loads["occurrence"].tolist() == [0, 0, 0] and traffic.records_of("to", stored=True)["occurrence"][0] == 1


def test_traffic_of_several_kernels_adds_up():
    once = copied(stride=8, count=32)
    twice = joined([once, once])
    assert counts(twice) == (64, 2, 64, 256, 128)
    assert joined([]).loads().num_loads == 0


def test_counting_holds_for_numbers_that_do_not_fit_64_bits_together():
    records = np.zeros(4, RECORD)
    records["size"] = 4
    records["address"] = [0, 4, 1 << 20, 1 << 20]
    records["line"] = records["occurrence"] = records["block"] = [0, 0, (1 << 31) - 1, (1 << 31) - 1]
    assert counts(Traffic(("x",), records)) == (4, 2, 2, 12, 12)


def decode_traffic(version: int, dtype) -> tuple[Traffic, int]:
    """2 requests of 128 keys, 8 query heads over 2 key heads of 64; and the bytes of their keys and values."""
    lengths = torch.full((2,), 128, dtype=torch.int32)
    pool = torch.randn(2, 20, 16, 2, 64).to(dtype)
    tables = torch.randperm(20)[:16].view(2, 8).int()
    splits = {"num_splits": 2} if version == 5 else {}
    _, traffic = emulator.run(
        "decode", torch.randn(2, 8, 64).to(dtype), *pool, tables, lengths, version=version, **splits
    )
    return traffic, 2 * 2 * 128 * 2 * 64 * dtype.itemsize


@pytest.mark.parametrize(("dtype", "number"), [(F32, 4), (F16, 2)])
def test_what_each_version_changes(dtype, number):
    """The sentences in the source about its versions, as numbers."""
    group, traffics = 4, {}
    for version in VERSIONS:
        traffics[version], once = decode_traffic(version, dtype)
    pools = {version: traffic.loads("keys", "values") for version, traffic in traffics.items()}
    keys = {version: traffic.loads("keys") for version, traffic in traffics.items()}
    assert all(pool.unique_bytes == once for pool in pools.values())
    # 1: each thread in its own sector. 2: neighbours, no byte wasted. 3: the same bytes with fewer requests.
    assert (keys[1].sectors_per_request, keys[1].efficiency) == (32, number / 32)
    assert (keys[2].sectors_per_request, keys[2].efficiency) == (number, 1)
    assert (keys[3].sectors_per_request, keys[3].efficiency) == (16, 1)
    assert keys[2].requests == keys[1].requests == 16 // number * keys[3].requests
    assert pools[2].bytes_moved == pools[3].bytes_moved == group * once
    # 4: once for the whole group. 5: the same, and the parts.
    assert pools[4].bytes_moved == pools[5].bytes_moved == once
    parts = 2 * 8 * 2 * 64 * 4
    assert traffics[5].loads("parts").bytes_moved == traffics[5].stores("parts").bytes_moved == parts


def test_prefill_reads_a_tile_of_keys_once_for_all_its_rows():
    case = on_cpu([96], num_kv_heads=1, head_size=64)
    q, starts = random_queries(32, case, group=4), torch.tensor([0, 32])
    _, traffic = emulator.run("prefill", q, case.keys, case.values, case.tables.int(), starts, case.lengths, 32)
    # 8 tiles of 4 queries; tile i sees 64 + 4 * (i + 1) keys.
    assert traffic.loads("keys").bytes_moved == sum(64 + 4 * (i + 1) for i in range(8)) * 64 * 4
    assert traffic.stores("out").efficiency == 1


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("window", [None, 20])
def test_what_is_masked_is_not_loaded(version, window):
    case = on_cpu([0, 1, 33, 150])
    q, pool = random_queries(4, case, group=4), (case.keys, case.values)
    _, traffic = emulator.run("decode", q, *pool, case.tables.int(), case.lengths, window, version=version)
    seen = sum(min(length, window or length) for length in (0, 1, 33, 150))
    assert traffic.loads("keys").unique_bytes == traffic.loads("values").unique_bytes == seen * 2 * 64 * 4


def test_store_moves_what_it_must():
    case = on_cpu([40])
    k, v = torch.randn(2, 5, 2, 64)
    _, traffic = emulator.run("store_kv", case.keys, case.values, torch.tensor([3, 17, -1, 64, 0]), k, v)
    assert traffic.loads("k", "v").bytes_moved == traffic.stores("keys", "values").bytes_moved == 4 * 2 * 2 * 64 * 4


# --- the emulation's errors for kernels that break a rule ---

WRONG = """
extern "C" __global__ void beyond(const float* from, float* to) {
    store(to + threadIdx.x, load(from + threadIdx.x));
}
extern "C" __global__ void half_a_barrier(const float* from, float* to) {
    if (threadIdx.x < 16) __syncthreads();
}
extern "C" __global__ void two_barriers(const float* from, float* to) {
    if (threadIdx.x < 16) __syncthreads();
    else
        __syncthreads();
}
extern "C" __global__ void lonely_shuffle(const float* from, float* to) {
    if (threadIdx.x < 16) __shfl_xor_sync(0xffffffff, 1.0f, 1);
}
extern "C" __global__ void crooked(const float* from, float* to) {
    struct alignas(8) Two { float a, b; };
    load(reinterpret_cast<const Two*>(from + 1));
}
extern "C" __global__ void shared_begins_as_nan(const float* from, float* to) {
    __shared__ float fixed[32];
    extern __shared__ float open[];
    store(to + threadIdx.x, fixed[threadIdx.x] + open[threadIdx.x]);
    fixed[threadIdx.x] = 1;
}
extern "C" __global__ void neighbours(const float* from, float* to) {
    const int i = threadIdx.x;
    const float down = __shfl_down_sync(0xffffffff, float(i), 4), first = __shfl_sync(0xffffffff, float(i), 8, 16);
    __syncwarp();
    store(to + i, 100 * down + first);
}
"""


def wrong(kernel: str, numbers=20, **changes) -> torch.Tensor:
    arguments = {"from": torch.zeros(numbers), "to": torch.zeros(32)}
    options = {"grid": (2, 1, 1), "block": (32, 1, 1), "arguments": arguments, "shared_bytes": 128}
    emulate(WRONG, kernel, **(options | changes))
    return arguments["to"]


STOPPED = {
    r"beyond, block \(0, 0, 0\), thread 20: line 3 loads 4 bytes at from\[20\], outside": lambda: wrong("beyond"),
    "thread 0: waits at the barrier of line 6, while thread 31 has ended": lambda: wrong("half_a_barrier"),
    "barrier of line 9, while thread 31 waits at the barrier of line 11": lambda: wrong("two_barriers"),
    "waits for other lanes in the shuffle of line 14, while thread 31 has ended": lambda: wrong("lonely_shuffle"),
    r"line 18 loads 8 bytes at from\[1\], which is not aligned": lambda: wrong("crooked"),
    "kernel 'upward' is not in the source; it has beyond, half": lambda: wrong("upward"),
    "1 arguments, x: kernel 'beyond' takes 2": lambda: wrong("beyond", arguments={"x": torch.zeros(1)}),
    "1024 threads and 49152 bytes": lambda: wrong("beyond", block=(1025, 1, 1)),
    "refuses the kernels: .*nonsense": lambda: emulate("nonsense", "nonsense", (1, 1, 1), (1, 1, 1), {}),
}


@pytest.mark.parametrize("message", STOPPED)
def test_what_a_kernel_must_not_do_is_reported(message):
    with pytest.raises(KernelError, match=message):
        STOPPED[message]()


def test_after_a_report_the_next_run_is_right():
    with pytest.raises(KernelError):
        wrong("half_a_barrier")
    assert wrong("beyond", numbers=32).eq(0).all()


def test_shared_memory_begins_as_nan_in_every_block():
    assert wrong("shared_begins_as_nan").isnan().all()


def test_shuffles_move_what_cuda_says():
    lane = torch.arange(32.0)
    down = torch.where(lane < 28, lane + 4, lane)
    assert torch.equal(wrong("neighbours"), 100 * down + lane // 16 * 16 + 8)


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(building.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match="no C\\+\\+ compiler.*pip install ziglang"):
        building.compiler()


# --- bugs planted in the source ---


def decode_of(version):
    return lambda kernels: check_decode(Version(version, kernels), on_cpu([0, 1, 33, 150], num_kv_heads=2), 2)


def small_prefill(kernels):
    check_prefill(kernels, on_cpu([0, 1, 17, 100]), [1, 1, 17, 30])


def nan_prefill(kernels):
    check_nan_stays_with_those_who_see_it(Version(5, kernels), "values", device="cpu")


BUGS = {
    "a barrier is missing": ("__syncthreads();  // the tile has been used", "", 1, small_prefill),
    "sees one key too many": (
        "if (key < end) {\n                const",
        "if (key <= end) {\n                const",
        1,
        decode_of(4),
    ),
    "stored one slot on": (
        "slot * row_size",
        "(slot + 1) * row_size",
        2,
        lambda kernels: check_store(kernels, F32, device="cpu"),
    ),
    "causal mask one too far": ("key <= position;", "key <= position + 1;", 1, small_prefill),
}


def with_bug(right: str, wrong: str, count: int, order: int = 0) -> Emulator:
    assert SOURCE.count(right) == count
    return Emulator(SOURCE.replace(right, wrong), order)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name):
    right, wrong, count, check = BUGS[name]
    with pytest.raises((AssertionError, KernelError)):
        check(with_bug(right, wrong, count))
        check(with_bug(right, wrong, count, BACKWARDS))
    check(Emulator())


# --- what is refused ---


def pool(dtype=F32, block_size=16, head_size=64, heads=2) -> torch.Tensor:
    return torch.zeros(3, block_size, heads, head_size, dtype=dtype)


def arguments_of(keys, heads=2, num_blocks=1) -> dict:
    q = torch.zeros(1, heads, keys.shape[3], dtype=keys.dtype)
    tables = torch.zeros(1, num_blocks, dtype=torch.int32)
    return {"q": q, "keys": keys, "values": keys.clone(), "tables": tables, "lengths": torch.ones(1, dtype=torch.int32)}


def decode_with(keys=None, heads=2, num_blocks=1, **options):
    return emulator.decode(**arguments_of(pool() if keys is None else keys, heads, num_blocks), **options)


def store_odd():
    k = torch.zeros(2 * 130)[: 2 * 129].view(2, 129)[:, :128].view(2, 2, 64)
    emulator.store_kv(pool(), pool(), torch.tensor([0, 1]), k, k)


REFUSED = {
    "cpu: the CUDA C\\+\\+ kernels take cuda; use": lambda: cuda.decode(**arguments_of(pool())),
    "torch.float64.*torch.float32, torch.float16, torch.bfloat16": lambda: decode_with(pool(torch.float64)),
    "head size 80.*16, 32, 64, 128": lambda: decode_with(pool(head_size=80)),
    "9 query heads per key head.*1 to 8": lambda: decode_with(heads=18),
    "window 0": lambda: decode_with(window=0),
    "version 6: there are 1, 2, 3, 4, 5": lambda: decode_with(version=6),
    "num_splits 33: pass 1 to 32": lambda: decode_with(num_splits=33),
    "num_splits 2: version 4 does not split": lambda: decode_with(version=4, num_splits=2),
    "8208 keys per request: version 3 .* 8192 at most; use version 4": lambda: decode_with(num_blocks=513, version=3),
    "k begins at address .* rows are 516 bytes apart.*multiples of 16": store_odd,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_kernels_do_not_take_is_refused_by_name(message):
    with pytest.raises(KernelError, match=message):
        REFUSED[message]()


def test_a_window_keeps_the_scores_of_long_contexts_few():
    assert decode_with(num_blocks=513, version=3, window=8192).eq(0).all()


# --- compiled ---

LARGEST = Specialisation("BFloat16", "int", 128, 16, 8)  # needs the most registers


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc, the CUDA toolkit's compiler, is not installed")
def test_nvcc_compiles_the_kernels_without_spilling(tmp_path):
    """Needs no GPU. Arrays stay in registers, and loads of 16 bytes are one instruction."""
    source = tmp_path / "kernels.cu"
    source.write_text(LARGEST.source())
    command = ["nvcc", "-arch=sm_90", "-Xptxas", "-v", "-keep", "-keep-dir", tmp_path, "-cubin", source, "-o"]
    run = subprocess.run([*command, tmp_path / "kernels.cubin"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    frames = [line.strip() for line in run.stderr.splitlines() if "bytes stack frame" in line]
    assert frames == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"] * 8
    kernels = (tmp_path / "kernels.ptx").read_text().split(".entry ")[1:]
    vectorised = {kernel.split("(")[0] for kernel in kernels if "ld.global.v4" in kernel}
    assert vectorised == {"decode_v3", "decode_v4", "decode_v5", "prefill", "store_kv"}


def test_nvrtc_compiles_the_kernels():
    """What is done on a GPU, as far as it goes without one."""
    try:
        compiled.compile_for_gpu("", "sm_90")
    except KernelError as error:
        pytest.skip(str(error))
    machine_code = compiled.compile_for_gpu(LARGEST.source(), "sm_90")
    assert machine_code.startswith(b"\x7fELF") and b"decode_v5" in machine_code
    with pytest.raises(KernelError, match="NVRTC refuses the kernels for sm_90.*nonsense"):
        compiled.compile_for_gpu("nonsense", "sm_90")


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "head_size", "block_size", "dtype"), SHAPES)
def test_on_a_gpu(group, head_size, block_size, dtype):
    case = paged(lengths_around(block_size), dtype, 1 + group % 2, head_size, block_size)
    for version in VERSIONS:
        check_decode(Version(version, cuda), case, group)
        check_decode(Version(version, cuda), case, group, window=20)
    check_decode(cuda, case, group, num_splits=None)
    check_prefill(cuda, case, [0, 1, 5, min(block_size, 19), 1, 21], group)
    check_prefill(cuda, case, [0, 1, 5, min(block_size, 19), 1, 21], group, window=20)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_store_on_a_gpu(dtype):
    check_store(cuda, dtype)


@pytest.mark.gpu
def test_several_thousand_keys_on_a_gpu():
    case = paged([3001, 4096], BF16, num_kv_heads=2, block_size=32)
    for version in VERSIONS:
        check_decode(Version(version, cuda), case, group=4, num_splits=None)
    check_prefill(cuda, case, [700, 2], group=4)


@pytest.mark.gpu
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("what", ["keys", "values"])
def test_nan_stays_with_those_who_see_it_on_a_gpu(what, version):
    check_nan_stays_with_those_who_see_it(Version(version, cuda), what)


@pytest.mark.gpu
def test_a_cuda_graph_of_the_kernels_gives_what_they_give():
    case = paged([40, 300], F16, num_kv_heads=2)
    q, out = random_queries(2, case, group=4), torch.zeros(2, 8, 64, dtype=F16, device=DEVICE)
    arguments = q, case.keys, case.values, case.tables, case.lengths
    expected = cuda.decode(*arguments).clone()  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.decode(*arguments, out=out)
    graph.replay()
    assert torch.equal(out, expected)
