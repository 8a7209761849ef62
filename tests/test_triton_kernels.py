"""The Triton kernels beside plain float64 attention, in Triton's interpreter or, where there is a GPU, compiled.

Whatever a kernel must not read is NaN: free blocks, ends of blocks, what block tables point at behind a request's
own blocks, and the output before the call. Bugs planted in the source must each fail the same checks.
"""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed; `make setup` does on Linux x86_64")

from minillm.attention import zero_or_minus_infinity  # noqa: E402
from minillm.errors import KernelError  # noqa: E402
from minillm.masks import visible  # noqa: E402
from minillm.runtime.kernels import reference, triton_kernels  # noqa: E402
from paged_cases import (  # noqa: E402
    DEVICE,
    TOLERANCE,
    check_decode,
    check_nan_stays_with_those_who_see_it,
    check_prefill,
    check_store,
    paged,
    random_queries,
)
from planted import compiled, with_bug  # noqa: E402

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    """What torch.empty hands out: outputs, and the parts that splits leave for the combine kernel."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_kernels_run_as_this_file_means_them_to():
    assert (os.environ.get("TRITON_INTERPRET", "0") == "1") == triton_kernels.INTERPRETED
    assert not triton_kernels.INTERPRETED or not GPU
    assert torch.empty(1000).isnan().all()


# --- against float64 ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 256])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("group", range(1, 9))
def test_decode(group, head_size, block_size, dtype):
    lengths = [0, 1, block_size - 1, block_size, block_size + 1]
    case = paged(lengths, dtype, num_kv_heads=1 + (block_size == 16), head_size=head_size, block_size=block_size)
    check_decode(triton_kernels, case, group, num_splits=1 + group % 3)


# Each group meets every block size, both head sizes and all dtypes.
PREFILLS = [
    (group, (64, 128)[(group + i) % 2], block_size, DTYPES[(group // 2 + i) % len(DTYPES)])
    for group in range(1, 9)
    for i, block_size in enumerate((16, 32, 256))
]


@pytest.mark.parametrize(("group", "head_size", "block_size", "dtype"), PREFILLS)
def test_prefill(group, head_size, block_size, dtype):
    """Without a prefix, behind a prefix that ends beside a block's end, one token, none."""
    lengths = [0, 1, block_size - 1, block_size, block_size + 1, block_size + 5]
    counts = [0, 1, 5, min(block_size, 19), 1, 21]
    case = paged(lengths, dtype, num_kv_heads=1 + (block_size == 16), head_size=head_size, block_size=block_size)
    check_prefill(triton_kernels, case, counts, group)


@pytest.mark.parametrize("dtype", DTYPES)
def test_store(dtype):
    for block_size in (16, 32, 256):
        check_store(triton_kernels, dtype, block_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_thousand_keys(dtype):
    case = paged([3001, 4096], dtype, num_kv_heads=1, block_size=32)
    check_decode(triton_kernels, case, group=4, num_splits=None)
    check_decode(triton_kernels, case, group=4, num_splits=32)
    check_prefill(triton_kernels, case, [9, 2], group=4)


@pytest.mark.parametrize("head_size", [16, 32])
def test_small_heads_and_the_largest_group(head_size):
    case = paged([33, 70], num_kv_heads=1, head_size=head_size)
    check_decode(triton_kernels, case, group=16)
    check_prefill(triton_kernels, case, [33, 3], group=16)


@pytest.mark.parametrize("window", [1, 16, 63, 64, 65, 1000])
def test_sliding_windows(window):
    case = paged([0, 1, 64, 65, 150], num_kv_heads=1)
    check_decode(triton_kernels, case, window=window)
    check_prefill(triton_kernels, case, [0, 1, 64, 3, 70], window=window)


def test_all_tokens_at_once_equal_the_cached_prefix_and_the_rest():
    """Chunked as the scheduler may: same queries, same answers."""
    case, group = paged([150], num_kv_heads=2), 3
    q = random_queries(150, case, group)

    def rows(first, end):
        starts, length = torch.tensor([0, end - first]).to(DEVICE), torch.tensor([end]).to(DEVICE)
        return triton_kernels.prefill(q[first:end], case.keys, case.values, case.tables, starts, length, end - first)

    chunks = [rows(*chunk) for chunk in ((0, 1), (1, 70), (70, 128), (128, 150))]
    torch.testing.assert_close(torch.cat(chunks), rows(0, 150), rtol=0, atol=TOLERANCE[torch.float32])


def test_the_torch_kernels_of_the_cpu_agree():
    case = paged([100, 101, 110], num_kv_heads=2)
    q = random_queries(3, case, group=2)
    mask = zero_or_minus_infinity(visible((case.lengths - 1)[:, None, None], 7 * 16), torch.float32)
    finite = case.keys.nan_to_num(0), case.values.nan_to_num(0)  # as the CPU's pool is
    expected = reference.decode_masked(q, *finite, case.tables[:, :7], mask)
    out = triton_kernels.decode(q, case.keys, case.values, case.tables, case.lengths)
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE[torch.float32])


# --- rows that see nothing, and NaN ---


def test_padding_rows_are_zeros():
    case = paged([0, 20, 0], num_kv_heads=1)
    q = random_queries(9, case, group=2)
    for splits in (1, 4):
        out = triton_kernels.decode(q[:3], case.keys, case.values, case.tables, case.lengths, num_splits=splits)
        assert out[[0, 2]].eq(0).all() and out[1].ne(0).all()
    starts = torch.tensor([0, 2, 5, 9], device=DEVICE)
    out = triton_kernels.prefill(q, case.keys, case.values, case.tables, starts, case.lengths, 4)
    assert out[[0, 1, 5, 6, 7, 8]].eq(0).all() and out[2:5].ne(0).all()


def test_no_rows_at_all():
    case = paged([3], num_kv_heads=1)
    q, none = random_queries(0, case, group=2), torch.zeros(0, dtype=torch.long, device=DEVICE)
    triton_kernels.store_kv(case.keys, case.values, none, q[:, :1], q[:, :1])
    assert triton_kernels.decode(q, case.keys, case.values, case.tables[:0], none).shape == (0, 2, 64)
    starts = torch.zeros(2, dtype=torch.long, device=DEVICE)
    out = triton_kernels.prefill(q, case.keys, case.values, case.tables, starts, case.lengths, 0)
    assert out.shape == (0, 2, 64)


@pytest.mark.parametrize("what", ["keys", "values"])
def test_nan_stays_with_those_who_see_it(what):
    check_nan_stays_with_those_who_see_it(triton_kernels, what)


# --- splits ---


def test_splits_fill_the_processors_and_follow_from_shapes_alone():
    assert triton_kernels.splits_for(num_programs=8, max_keys=8192, processors=132) == 32
    assert triton_kernels.splits_for(num_programs=64, max_keys=8192, processors=132) == 4
    assert triton_kernels.splits_for(num_programs=2048, max_keys=8192, processors=132) == 1
    assert triton_kernels.splits_for(num_programs=8, max_keys=200, processors=132) == 2
    assert triton_kernels.splits_for(num_programs=8, max_keys=16, processors=132) == 1


@pytest.mark.parametrize("num_splits", [1, 2, 5, 32])
def test_any_number_of_splits_gives_the_same(num_splits):
    case = paged([1, 64, 65, 300], num_kv_heads=1)
    check_decode(triton_kernels, case, num_splits=num_splits)
    check_decode(triton_kernels, case, num_splits=num_splits, window=130)


LAUNCHES = [(16, 32, 2, 2), (32, 128, 4, 5), (64, 16, 8, 1)]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_any_launch_gives_the_same(launch):
    launch = triton_kernels.Launch(*launch)
    kernels = SimpleNamespace(
        decode=partial(triton_kernels.decode, launch=launch), prefill=partial(triton_kernels.prefill, launch=launch)
    )
    case = paged([1, 64, 65, 300], num_kv_heads=1)
    check_decode(kernels, case, group=5)
    check_prefill(kernels, case, [1, 3, 65, 20], group=5)


# --- compiled, with or without a GPU ---

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minillm.runtime.kernels import triton_kernels as kernels

tensors = dict.fromkeys(["q", "k", "v", "keys", "values", "out"], "*bf16")
tensors |= dict.fromkeys(["tables", "lengths", "query_starts", "slots"], "*i32")
types = tensors | {"parts": "*fp32", "logs": "*fp32", "scale": "fp32", "q_stride": "i32", "table_stride": "i32",}
types |= {"k_stride": "i32", "v_stride": "i32", "row_size": "i32"}
constants = dict(NUM_KV_HEADS=8, GROUP=4, D=128, BLOCK_SIZE=16, WINDOW=0, NUM_SPLITS=4, SPLITS=4, COLUMNS=1024)
constants |= dict(KEYS=kernels.TILE_KEYS, PRECISION="tf32")
for name in ("store", "decode", "combine", "prefill"):
    kernel = getattr(kernels, f"_{name}_kernel")
    constants["ROWS"] = kernels.DECODE_ROWS if name == "decode" else kernels.TILE_ROWS
    own = {argument: constants[argument] for argument in kernel.arg_names if argument in constants}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if argument not in own}
    source = ASTSource(kernel, signature, own, aligned)
    options = dict(num_warps=1 if name == "combine" else 4)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    print(name, compiled.metadata.shared, "mma" in ptx, "ld.global.v4" in ptx or "cp.async.cg" in ptx)
"""


def test_the_kernels_compile_for_a_gpu_of_compute_capability_9():
    """Triton's compiler needs no GPU: tensor cores are used, loads are of 16 bytes, shared memory is enough."""
    kernels = compiled(COMPILE)
    assert {name: row[1:] for name, row in kernels.items()} == {
        "store": ["False", "True"],
        "decode": ["True", "True"],
        "combine": ["False", "True"],
        "prefill": ["True", "True"],
    }
    assert max(int(shared) for shared, *_ in kernels.values()) <= 100 * 1024  # two programs on a processor of 228 KiB


# --- what is refused ---


def pool(dtype=torch.float32, block_size=16, head_size=64, heads=2) -> Tensor:
    return torch.zeros(3, block_size, heads, head_size, dtype=dtype, device=DEVICE)


def integers(*values) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def decode_of(keys=None, heads=2, **changes):
    keys = pool() if keys is None else keys
    arguments = {
        "q": torch.zeros(1, heads, keys.shape[3], dtype=keys.dtype, device=DEVICE),
        "keys": keys,
        "values": keys.clone(),
        "tables": integers([1]),
        "lengths": integers(3),
    }
    return triton_kernels.decode(**(arguments | changes))


REFUSED = {
    "torch.float64.*torch.float32, torch.float16": lambda: decode_of(pool(torch.float64)),
    "block_size 8.*16, 32, 64, 128, 256": lambda: decode_of(pool(block_size=8)),
    "head size 80.*16, 32, 64, 128": lambda: decode_of(pool(head_size=80)),
    "3 query heads over 2 key heads": lambda: decode_of(heads=3),
    "17 query heads a key head.*1 to 16": lambda: decode_of(heads=34),
    "window 0": lambda: decode_of(window=0),
    "Launch.*rows must be at least 16 and the group, here 1": lambda: decode_of(
        launch=triton_kernels.Launch(8, 64, 4, 3)
    ),
    "Launch.*num_stages at least 1": lambda: decode_of(launch=triton_kernels.Launch(16, 64, 4, 0)),
    "num_splits 33.*1 to 32": lambda: decode_of(num_splits=33),
    r"lengths: torch.float32 of shape \[1\].*int32": lambda: decode_of(lengths=torch.zeros(1, device=DEVICE)),
    r"tables: .*\[2, 1\].*\[1, 1\]": lambda: decode_of(tables=integers([1], [1])),
    "tables of shape": lambda: decode_of(tables=integers(1)),
    r"out: .*\[2, 2, 64\]": lambda: decode_of(out=torch.zeros(2, 2, 64, device=DEVICE)),
    "q is torch.float16": lambda: decode_of(q=torch.zeros(1, 2, 64, dtype=torch.float16, device=DEVICE)),
    "q of shape": lambda: decode_of(q=torch.zeros(1, 64, 2, device=DEVICE).mT),
    "pools of keys": lambda: decode_of(values=pool(heads=3)),
    "slots: ": lambda: triton_kernels.store_kv(pool(), pool(), integers(1, 2), *torch.zeros(2, 1, 2, 64).to(DEVICE)),
    "do not fit a pool": lambda: triton_kernels.store_kv(
        pool(), pool(), integers(1), *torch.zeros(2, 1, 1, 64).to(DEVICE)
    ),
    r"query_starts: .*\[1\].*\[2\]": lambda: triton_kernels.prefill(
        torch.zeros(1, 2, 64, device=DEVICE), pool(), pool(), integers([1]), integers(0), integers(1), 1
    ),
    "max_queries -1": lambda: triton_kernels.prefill(
        torch.zeros(1, 2, 64, device=DEVICE), pool(), pool(), integers([1]), integers(0, 1), integers(1), -1
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_kernels_do_not_take_is_refused_by_name(message):
    with pytest.raises(KernelError, match=message):
        REFUSED[message]()


@pytest.mark.skipif(GPU, reason="about the interpreter")
def test_bfloat16_is_refused_in_the_interpreter():
    with pytest.raises(KernelError, match="bfloat16: the kernels in Triton's interpreter"):
        decode_of(pool(torch.bfloat16))


# --- bugs planted in the source ---


def small_store(kernels):
    check_store(kernels, torch.float32)


def small_decode(kernels):
    check_decode(kernels, paged([0, 1, 15, 16, 17, 150]))


def single_split_decode(kernels):
    check_decode(kernels, paged([0, 1, 15, 16, 17, 150]), num_splits=1)


def windowed_decode(kernels):
    check_decode(kernels, paged([1, 30, 150]), window=20)


def small_prefill(kernels):
    check_prefill(kernels, paged([0, 1, 17, 100]), [2, 1, 17, 70])


def windowed_prefill(kernels):
    check_prefill(kernels, paged([1, 30, 150]), [1, 30, 80], window=20)


def nan_prefill(kernels):
    check_nan_stays_with_those_who_see_it(kernels, "values")


BUGS = {
    "padding is stored": ("(column < row_size) & (slot >= 0)", "column < row_size", 1, small_store),
    "stored one slot on": ("slot = tl.load(slots + token)", "slot = 1 + tl.load(slots + token)", 1, small_store),
    "wrong block": ("position // BLOCK_SIZE", "(position + 1) // BLOCK_SIZE", 1, single_split_decode),
    "wrong place in the block": ("+ position % BLOCK_SIZE", "+ position % (BLOCK_SIZE - 1)", 1, small_decode),
    "wrong key head": ("* NUM_KV_HEADS + head) * D", "* NUM_KV_HEADS) * D", 1, small_decode),
    "wrong query head": ("head = kv_head * GROUP + row", "head = kv_head * (GROUP - 1) + row", 1, small_decode),
    "decode sees one too many": ("(position < length)", "(position <= length)", 1, small_decode),
    "decode sees one too few": ("(position < length)", "(position < length - 1)", 1, small_decode),
    "decode's tail is not masked": (
        "scores = tl.where(seen[None, :], scores,",
        "scores = tl.where(True, scores,",
        1,
        small_decode,
    ),
    "decode's tail is loaded": (
        "values + offset[:, None] + column[None, :], mask=seen[:, None], other=0.0)",
        "values + offset[:, None] + column[None, :])",
        1,
        small_decode,
    ),
    "decode's window is one short": (
        "tl.maximum(length - WINDOW, 0)",
        "tl.maximum(length - WINDOW + 1, 0)",
        1,
        windowed_decode,
    ),
    "the last split ends early": (
        "share = tl.cdiv(end_tile - first_tile, NUM_SPLITS)",
        "share = (end_tile - first_tile) // NUM_SPLITS",
        1,
        small_decode,
    ),
    "no rescale when a larger score comes": ("acc = acc * rescale[:, None] +", "acc = acc +", 1, single_split_decode),
    "the sum is not rescaled": ("total = total * rescale +", "total = total +", 1, single_split_decode),
    "no rescale in the combine": ('tl.exp2(log - tl.where(best == float("-inf"), 0.0, best))', "1.0", 1, small_decode),
    "combine reads what no split wrote": ('used = log != float("-inf")', "used = split < NUM_SPLITS", 1, small_decode),
    "nothing seen is divided by nothing": ("tl.where(total == 0.0, 1.0, total)  #", "total  #", 2, single_split_decode),
    "causal mask without the diagonal": (
        "(key[None, :] <= position[:, None])",
        "(key[None, :] < position[:, None])",
        1,
        small_prefill,
    ),
    "causal mask one too far": (
        "(key[None, :] <= position[:, None])",
        "(key[None, :] <= position[:, None] + 1)",
        1,
        small_prefill,
    ),
    "the prefix is forgotten": ("position = length - num_queries + query", "position = query", 1, small_prefill),
    "the diagonal's tile is not masked": (
        "tl.maximum(first_position + 1, 0) // KEYS",
        "tl.cdiv(first_position + 1, KEYS)",
        1,
        small_prefill,
    ),
    "prefill sees all of the last tile": (
        "(key[None, :] <= position[:, None])",
        "(key[None, :] <= last_position)",
        1,
        small_prefill,
    ),
    "prefill's window is one long": (
        "(key[None, :] > position[:, None] - WINDOW)",
        "(key[None, :] >= position[:, None] - WINDOW)",
        1,
        windowed_prefill,
    ),
    "window edges are not masked": ("edge_tile = first_tile if WINDOW else", "edge_tile =", 1, windowed_prefill),
    "0 * NaN": ("tl.where(finite, v, 0.0)", "v", 1, nan_prefill),
    "NaN is swallowed": ('tl.where(broken[None, :] == 1, float("nan"), scores)', "scores", 1, nan_prefill),
}


@pytest.mark.skipif(GPU, reason="planted bugs may read outside the pool; the interpreter shows them as well")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name, tmp_path):
    right, wrong, count, check = BUGS[name]
    with pytest.raises(AssertionError):
        check(with_bug(triton_kernels, right, wrong, tmp_path, count))


@pytest.mark.parametrize("check", dict.fromkeys(bug[-1] for bug in BUGS.values()))
def test_without_the_bug_the_same_check_passes(check):
    check(triton_kernels)
