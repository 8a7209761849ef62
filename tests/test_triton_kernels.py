"""The Triton kernels beside plain float64 attention, in Triton's interpreter or, where there is a GPU, compiled.

Whatever a kernel must not read is NaN: free blocks, ends of blocks, what block tables point at behind a request's
own blocks, and the output before the call. Bugs planted in the source: test_triton_bugs, which is quick.
"""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed; `make setup` does on Linux x86_64")

from minillm.kernels import triton_kernels  # noqa: E402
from paged_cases import (  # noqa: E402
    DEVICE,
    TOLERANCE,
    check_decode,
    check_nan_stays_with_those_who_see_it,
    check_prefill,
    check_store,
    paged,
    random_queries,
    uninitialized_memory_is_nan,  # noqa: F401 - for every test here
)

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]


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
    of = partial(triton_kernels.splits_for, processors=132)  # of tiles of 64 keys
    assert of(num_programs=8, max_tiles=128) == (66, 66, 16)  # four programs a processor
    assert of(num_programs=64, max_tiles=128) == (8, 8, 16)
    assert of(num_programs=64, max_tiles=512) == (32, 8, 16)  # of 1,024 keys at most
    assert of(num_programs=2048, max_tiles=512) == (32, 1, 16)
    assert of(num_programs=2048, max_tiles=32) == (1, 1, 32)  # not worth it
    assert of(num_programs=8, max_tiles=3) == (3, 3, 16)
    assert of(num_programs=8, max_tiles=1) == (1, 1, 1)
    assert of(num_programs=2048, max_tiles=16384) == (128, 1, 128)
    for num_programs in (1, 8, 100, 5000):
        for max_tiles in (1, 2, 17, 33, 500, 4096):
            most, wanted, tiles = of(num_programs=num_programs, max_tiles=max_tiles)
            for num_tiles in {1, max_tiles // 2 + 1, max_tiles}:
                share = max(1, min(-(-num_tiles // wanted), tiles))
                assert -(-num_tiles // share) <= most <= triton_kernels.MAX_SPLITS


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
