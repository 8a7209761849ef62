"""The Triton kernels' source: compiled for a GPU, bugs planted in it that the checks must find, calls that are refused.

Of test_triton_kernels' checks the small ones are here: whatever breaks all of it fails within seconds.
"""

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed; `make setup` does on Linux x86_64")

from minillm.errors import KernelError  # noqa: E402
from minillm.kernels import triton_kernels  # noqa: E402
from paged_cases import (  # noqa: E402
    DEVICE,
    check_decode,
    check_nan_stays_with_those_who_see_it,
    check_prefill,
    check_store,
    paged,
    poisoned,
    random_queries,
    uninitialized_memory_is_nan,  # noqa: F401 - for every test here
)
from planted import compiled, with_bug  # noqa: E402

# --- bugs planted in the source ---


def small_store(kernels):
    check_store(kernels, torch.float32)


def small_decode(kernels):
    check_decode(kernels, paged([0, 1, 15, 16, 17, 150]))


def single_split_decode(kernels):
    check_decode(kernels, paged([0, 1, 15, 16, 17, 150]), num_splits=1)


def many_splits_decode(kernels):
    """More of them than programs that share them, of requests with one and with several."""
    check_decode(kernels, paged([2000, 1, 640], num_kv_heads=1, head_size=16), group=1, num_splits=32)


def wide_combine(kernels):
    """More splits than are put together at once, the largest scores last."""
    case = paged([1500], num_kv_heads=1, head_size=16)
    case.keys.mul_(1 + torch.arange(len(case.keys), device=DEVICE)[:, None, None, None] / 20)
    k, v = case.own[0]
    token = torch.arange(1500)
    case.own[0] = case.keys[case.tables[0].cpu()[token // 16], token % 16].cpu().double(), v
    check_decode(kernels, case, group=1, num_splits=24)


def split_long_requests(kernels):
    """Splits that shapes decide, of 1,024 keys at most: three of the longest request."""
    case = paged([2100, 3, 65], num_kv_heads=2, head_size=16)
    assert triton_kernels.splits_for(1000, 34, 8) == (3, 1, 16)
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "processors", lambda device: 1)
        patch.setattr(kernels.torch, "empty", noting(written, torch.empty))
        check_decode(kernels, case, group=1, num_splits=None)
    logs = next(each for each in written if each.ndim == 3 and each.dtype == torch.float32 and each.shape[2] == 3)
    assert logs[0].isfinite().all() and logs[1:].isnan().all()  # a request that is not split leaves no parts


def noting(made, original):
    def function(*arguments, **named):
        made.append(original(*arguments, **named))
        return made[-1]

    return function


def longest_tile_first(kernels):
    """The first program of the grid takes the last queries, which see most keys."""
    case = paged([150], num_kv_heads=1, head_size=16)
    q, starts = random_queries(150, case, group=1), torch.tensor([0, 150], device=DEVICE)
    out = poisoned(q)
    kernels.prefill(q, case.keys, case.values, case.tables, starts, case.lengths, 1, out=out)  # a grid of one tile
    tile = triton_kernels.prefill_launch(q.dtype).rows
    written = torch.arange(150, device=DEVICE) >= (150 - 1) // tile * tile
    assert torch.equal(out.isfinite().all(-1).all(-1), written)


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
    "a split ends early": ("tl.minimum(own_first + share, own_end)", "own_first + share - 1", 1, small_decode),
    "the last split is dropped": ("tl.sum(further, axis=0), num", "tl.sum(further, axis=0) - 1, num", 1, small_decode),
    "shared splits are taken once": ("axis=0), num_sharing\n", "axis=0), 10**6\n", 1, many_splits_decode),
    "a split of the request before": ("before = ends <= number", "before = ends < number", 1, small_decode),
    "splits are counted from 0": ("split = 1 + number -", "split = number -", 1, small_decode),
    "splits are longer than they may be": (
        "tl.minimum(tl.cdiv(num_tiles, wanted_splits), split_tiles)",
        "tl.cdiv(num_tiles, wanted_splits)",
        1,
        split_long_requests,
    ),
    "combine leaves out the second chunk": ("range(0, num_splits, SPLITS)", "range(0, 1, SPLITS)", 1, wide_combine),
    "what is not split is put together": ("if num_splits <= 1:", "if num_splits < 1:", 1, small_decode),
    "prefill's first tile is left out": ("TILE_QUERIES) - 1 - tl", "TILE_QUERIES) - tl", 1, small_prefill),
    "prefill begins with the first tile": (
        "tl.cdiv(num_queries, TILE_QUERIES) - 1 - tl.program_id(0)",
        "tl.program_id(0)",
        1,
        longest_tile_first,
    ),
    "no rescale when a larger score comes": ("acc = acc * rescale[:, None] +", "acc = acc +", 1, single_split_decode),
    "the sum is not rescaled": ("total = total * rescale +", "total = total +", 1, single_split_decode),
    "no rescale in the combine": ("weight = tl.exp2(log - base)", "weight = tl.exp2(log * 0)", 1, small_decode),
    "no rescale from chunk to chunk": ("acc = acc * rescale + tl", "acc = acc + tl", 1, wide_combine),
    "combine reads what no split wrote": ("used = split < num_splits", "used = split < SPLITS", 1, small_decode),
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


@pytest.mark.parametrize("check", dict.fromkeys(bug[-1] for bug in BUGS.values()))
def test_without_the_bug_the_same_check_passes(check):
    check(triton_kernels)


@pytest.mark.skipif(GPU, reason="planted bugs may read outside the pool; the interpreter shows them as well")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name, tmp_path):
    right, wrong, count, check = BUGS[name]
    with pytest.raises(AssertionError):
        check(with_bug(triton_kernels, right, wrong, tmp_path, count))


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
    "17 query heads per key head.*1 to 16": lambda: decode_of(heads=34),
    "window 0": lambda: decode_of(window=0),
    "Launch.*rows must be at least 16 and the group, here 1": lambda: decode_of(
        launch=triton_kernels.Launch(8, 64, 4, 3)
    ),
    "Launch.*num_stages at least 1": lambda: decode_of(launch=triton_kernels.Launch(16, 64, 4, 0)),
    "num_splits 129.*1 to 128": lambda: decode_of(num_splits=129),
    "num_splits 0.*1 to 128": lambda: decode_of(num_splits=0),
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


# --- compiled, with or without a GPU ---

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minillm.kernels import triton_kernels as kernels

tensors = dict.fromkeys(["q", "k", "v", "keys", "values", "out"], "*bf16")
tensors |= dict.fromkeys(["tables", "lengths", "query_starts", "slots"], "*i32")
types = tensors | {"parts": "*fp32", "logs": "*fp32", "scale": "fp32", "q_stride": "i32", "table_stride": "i32",}
numbers = ["k_stride", "v_stride", "row_size", "num_requests", "most_splits", "wanted_splits", "split_tiles"]
types |= dict.fromkeys(numbers, "i32")
constants = dict(NUM_KV_HEADS=8, NUM_HEADS=32, GROUP=4, D=128, BLOCK_SIZE=16, WINDOW=0, SPLITS=16, COLUMNS=1024)
constants |= dict(KEYS=kernels.TILE_KEYS, PRECISION="tf32")
for name in ("store", "decode", "split_decode", "combine", "prefill"):
    constants["REQUESTS"] = 256 if name == "split_decode" else 0
    kernel = getattr(kernels, f"_{name.removeprefix('split_')}_kernel")
    constants["ROWS"] = kernels.DECODE_ROWS if "decode" in name else kernels.TILE_ROWS
    own = {argument: constants[argument] for argument in kernel.arg_names if argument in constants}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if argument not in own}
    source = ASTSource(kernel, signature, own, aligned)
    options = dict(num_warps=1 if name == "combine" else 4, num_stages=2 if name == "prefill" else 3)
    options["maxnreg"] = kernels.REGISTERS if name == "split_decode" else None
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    wide = "ld.global.v4" in ptx or "cp.async.cg" in ptx
    print(name, compiled.metadata.shared, "st.local" in ptx, "mma" in ptx, wide)
"""


def test_the_kernels_compile_for_a_gpu_of_compute_capability_9():
    """Triton's compiler needs no GPU: tensor cores are used, loads are of 16 bytes, shared memory is enough."""
    kernels = compiled(COMPILE)
    assert {name: row[1:] for name, row in kernels.items()} == {
        "store": ["False", "False", "True"],
        "decode": ["False", "True", "True"],
        "split_decode": ["False", "True", "True"],
        "combine": ["False", "False", "True"],
        "prefill": ["False", "True", "True"],
    }
    assert max(int(shared) for shared, *_ in kernels.values()) <= 100 * 1024  # two programs on a processor of 228 KiB
