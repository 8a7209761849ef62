"""Pictures of kernels and of launching them: what they say is what the kernels, the costs and the trace say."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.offsetbox import AnchoredOffsetbox, TextArea
from matplotlib.patches import Rectangle

from minillm.costs.kv_bytes import kv_bytes_per_token
from minillm.costs.roofline import compute_bound_batch, decode_seconds
from minillm.costs.shapes import H200, LLAMA_2_7B, QWEN3_0_6B
from minillm.kernels.cuda.traffic import RECORD, Traffic
from minillm.trace.events import StepEvent, Trace
from minillm.viz import (
    DecodeRoofline,
    DecodeTiles,
    HostDeviceLanes,
    LaneChart,
    LaunchOverhead,
    MemoryTraffic,
    Picture,
    PictureError,
    PrefillTiles,
    Span,
    WarpAccess,
    device_use,
    stacked,
)
from minillm.viz.lanes import BESIDE
from minillm.viz.palette import COMPUTES, IDLE, LIGHT_GREY, MASKED, PREPARES, READS, SEEN, WAITS


def boxes(picture: Picture, gid: str) -> list[Rectangle]:
    """The boxes of that name in the figure."""
    (axes,) = picture.figure().axes
    return [patch for patch in axes.patches + axes.artists if isinstance(patch, Rectangle) and patch.get_gid() == gid]


# --- tiles: the kernels are asked which keys each of their programs reads ---


class Seen(NamedTuple):
    """What each program of a kernel did with its tiles of keys, one after the other."""

    keys: dict[tuple[int, int, int], list[list[int]]]  # looked up in the block table
    masked: dict[tuple[int, int, int], list[bool]]  # whether some query may not see some of them


@pytest.fixture
def seen(monkeypatch):
    """Watches the Triton kernels in the interpreter."""
    kernels = pytest.importorskip("minillm.kernels.triton_kernels", reason="Triton is not installed")
    if not kernels.INTERPRETED:
        pytest.skip("compiled kernels do not say what they read")
    from triton.runtime.interpreter import interpreter_builder

    found = Seen(defaultdict(list), defaultdict(list))
    row_offsets, softmax_step, decode_split = kernels._row_offsets, kernels._softmax_step, kernels._decode_split
    program = []  # of decode: (request, KV head, split), whichever place of the grid has taken them; else the place

    def place():
        return program[-1] if program else interpreter_builder.grid_idx

    def take_over(*arguments):
        own = arguments[:3]
        program.append(tuple(int(each.handle.data.item()) if hasattr(each, "handle") else each for each in own))
        return decode_split(*arguments)

    def look_up(table, position, present, *rest):
        keys, is_read = (np.atleast_1d(each.handle.data) for each in (position, present))
        found.keys[place()].append(keys[np.broadcast_to(is_read, keys.shape)].tolist())
        return row_offsets(table, position, present, *rest)

    def take_in(scores, *rest):
        found.masked[place()].append(bool(np.isneginf(scores.handle.data).any()))
        return softmax_step(scores, *rest)

    monkeypatch.setattr(kernels, "_decode_split", take_over)
    monkeypatch.setattr(kernels, "_row_offsets", look_up)
    monkeypatch.setattr(kernels, "_softmax_step", take_in)
    return found


def pool(lengths, block_size=16, head_size=16, num_kv_heads=1):
    """Zeros, and tables that give each request blocks of its own."""
    counts = [-(-length // block_size) for length in lengths]
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int64)
    for row, count in enumerate(counts):
        tables[row, :count] = torch.arange(count) + sum(counts[:row]) + 1
    shape = (sum(counts) + 1, block_size, num_kv_heads, head_size)
    return torch.zeros(shape, dtype=torch.float16), tables


@pytest.mark.parametrize(
    ("lengths", "num_splits", "window"),
    [
        ([150, 37, 300, 0], 4, None),
        ([1, 63, 64, 65, 128, 129], 2, None),
        ([700, 512, 70], 8, None),
        ([700, 300, 20], 3, 100),
        ([640, 641], 4, 1),
    ],
)
def test_decode_tiles_are_the_keys_that_each_program_reads(seen, lengths, num_splits, window):
    from minillm.kernels import triton_kernels

    keys, tables = pool(lengths)
    q = torch.zeros(len(lengths), 2, 16, dtype=torch.float16)
    triton_kernels.decode(q, keys, keys, tables, torch.tensor(lengths), window, num_splits=num_splits)
    picture = DecodeTiles(lengths, num_splits, block_size=16, window=window)
    for request in range(len(lengths)):
        for split in range(num_splits):
            read = seen.keys[request, 0, split]
            tiles = picture.splits[request][split]
            assert [list(picture.keys(request, tile)) for tile in tiles] == read
            assert list(picture.split_keys(request, split)) == sum(read, [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("length", "num_queries", "group", "window"),
    [(230, 130, 2, None), (64, 64, 1, None), (300, 300, 2, 100), (200, 3, 4, None), (129, 65, 3, 40), (1, 1, 1, None)],
)
def test_prefill_tiles_are_the_keys_that_each_program_reads(seen, length, num_queries, group, window, dtype):
    from minillm.kernels import triton_kernels

    keys, tables = pool([length])
    q = torch.zeros(num_queries, group, 16, dtype=dtype)
    starts = torch.tensor([0, num_queries])
    triton_kernels.prefill(
        q, keys.to(dtype), keys.to(dtype), tables, starts, torch.tensor([length]), num_queries, window
    )
    sides = {"tile_rows": 32, "tile_keys": 32} if dtype == torch.float32 else {}
    picture = PrefillTiles(length, num_queries, group=group, window=window, **sides)
    assert len(picture.programs) == len(seen.keys)
    for index, program in enumerate(reversed(picture.programs)):  # the kernel begins with the longest
        expected = [[key for key in picture.loaded(program, tile) if key < length] for tile in program.tiles]
        assert seen.keys[index, 0, 0] == expected
        masked = [picture.state(program, tile) is MASKED for tile in program.tiles]
        assert all(masked) if window else masked == seen.masked[index, 0, 0]  # under a window nothing is taken whole


def test_decode_tiles_in_words_and_boxes():
    tables = [[5, 2, 7, 9, 1, 3, 8, 4, 6, 11], [12, 10, 13]]
    picture = DecodeTiles([150, 37, 0], 2, block_size=16, tables=[*tables, []], num_kv_heads=2)
    assert picture.text().splitlines() == [
        "req 0 |0000|0000|11..|  150 keys, 3 tiles",
        "req 1 |000.|....|....|  37 keys, 1 tile; nothing for split 1",
        "req 2 |....|....|....|  padding: zeros, no load",
        "a sign is 16 keys: the split that reads it, . not loaded; | ends a tile",
        "3 requests × 2 KV heads × 2 splits = 12 programs, 6 without a key; the longest takes 2 tiles of 64 keys "
        "(unsplit: 3)",
        "",
        "       split  tiles     keys  physical blocks",
        "-----  -----  -----  -------  ---------------",
        "req 0      0    0–1    0–127  5 2 7 9 1 3 8 4",
        "req 0      1      2  128–149             6 11",
        "req 1      0      0     0–36         12 10 13",
    ]
    assert [(box.get_x(), box.get_width()) for box in boxes(picture, "0:0")] == [(0, 64), (64, 64)]
    assert [(box.get_x(), box.get_width()) for box in boxes(picture, "0:1")] == [(128, 22)]
    assert not boxes(picture, "2:0")
    labels = [text.get_text() for text in picture.figure().axes[0].texts]
    assert all(labels.count(str(block)) >= 1 for table in tables for block in table)


def test_prefill_tiles_in_words_and_boxes():
    picture = PrefillTiles(150, 70, group=2)
    assert picture.text().splitlines() == [
        "queries 80–111  |#/.|",
        "queries 112–143 |#//|",
        "queries 144–149 |##/|",
        "a sign is a tile of 64 keys:   # taken whole   / masked   . not loaded",
        "3 programs per KV head, 32 queries × 2 heads each: 8 tiles of 64 keys loaded (4 masked), 1 never; "
        f"{sum(range(81, 151)) / (64 * (32 * 2 + 32 * 3 + 6 * 3)):.0%} of the computed pairs are seen",
    ]
    assert len(boxes(picture, SEEN.letter)) == 4
    assert [(box.get_x(), box.get_width()) for box in boxes(picture, MASKED.letter)] == [
        (64, 48), (64, 64), (128, 16), (128, 22),
    ]  # fmt: skip


# --- memory access ---


def reads(address_of, size=4, lanes=range(32)):
    """lane -> what it reads."""
    return {lane: (address_of(lane), size) for lane in lanes}


def traffic(accesses, names=("tables", "keys"), stored=False) -> Traffic:
    """Of (array, thread, line, occurrence, address), 4 bytes each."""
    rows = [
        (address, 0, thread, line, nth, names.index(name), 4, stored) for name, thread, line, nth, address in accesses
    ]
    return Traffic(names, np.array(rows, RECORD))


def test_a_warp_that_reads_apart_moves_eight_times_what_it_asks_for():
    apart, together = WarpAccess(reads(lambda lane: 512 * lane)), WarpAccess(reads(lambda lane: 4 * lane))
    assert (apart.bytes_asked, apart.bytes_moved) == (128, 1024)
    assert (together.bytes_asked, together.bytes_moved) == (128, 128)
    assert together.text().splitlines() == [
        "byte  0  [ 0  1  2  3  4  5  6  7] [ 8  9 10 11 12 13 14 15] [16 17 18 19 20 21 22 23] "
        "[24 25 26 27 28 29 30 31]",
        "[ ] a sector of 32 bytes, 4 an entry: the lane that reads it, + several, . in vain",
        "from lane to lane 4 bytes",
        "32 lanes × 4 bytes ask for 128 different bytes; 4 sectors × 32 = 128 bytes move; efficiency 100%",
    ]
    assert apart.text().splitlines()[1] == "byte    512  [ 1  .  .  .  .  .  .  .]"
    assert "… and 20 lines more like these" in apart.text()
    assert len(boxes(apart, "moved")) == 32 and len(boxes(together, "moved")) == 4
    assert sum(box.get_width() for box in boxes(apart, "asked")) == 128
    both = stacked([apart, together]).figure().axes
    assert both[0].get_xlim() == both[1].get_xlim()


def test_arrows_end_in_the_bytes_their_lane_reads():
    picture = WarpAccess(reads(lambda lane: 16 * (lane % 16) + 1024 * (lane // 16), 16, lanes=[0, 3, 17]))
    (axes,) = picture.figure().axes
    ends = [line.get_xdata()[1] for line in axes.lines if line.get_gid() == "reads"]
    assert ends == [8, 32 + 24, 64 + 10 + 24]  # sectors 0, 1 and 32: one gap, before the last
    assert picture.text().splitlines()[:2] == ["byte     0  [ 0  .] [ .  3]", "byte 1,024  [ . 17]"]
    assert "3 lanes × 16 bytes" in picture.summary() and picture.distance() == "from lane to lane mostly 48 bytes"


def test_lanes_that_read_the_same_bytes_move_them_once():
    picture = WarpAccess(reads(lambda lane: 64))
    assert picture.text().splitlines()[0] == "byte 64  [ +  .  .  .  .  .  .  .]"
    assert (picture.bytes_asked, picture.bytes_moved) == (4, 32) and "efficiency 12.5%" in picture.summary()
    assert picture.distance() == "all lanes read the same address"


def test_a_number_that_lies_across_two_sectors_moves_both():
    assert WarpAccess({0: (30, 4)}).sectors == [0, 1]


def test_one_instruction_of_one_warp_is_found_in_the_traffic():
    threads = range(64)
    accesses = [("tables", thread, 7, 0, 4 * thread) for thread in threads]
    accesses += [("keys", thread, 10, nth, 8 * thread + 4 * nth) for nth in (1, 0) for thread in reversed(threads)]
    accesses += [("keys", thread, 12, 0, 16 * thread) for thread in threads]
    found = traffic(accesses)
    assert WarpAccess.of_traffic(found, "keys", warp=1).lanes == reads(lambda lane: 8 * (32 + lane))
    assert WarpAccess.of_traffic(found, "keys", occurrence=1).lanes == reads(lambda lane: 8 * lane + 4)
    assert WarpAccess.of_traffic(found, "keys", line=12).lanes == reads(lambda lane: 16 * lane)
    with pytest.raises(PictureError, match=r"no load 0 of 'keys'.*warp 1, line 11.*0 times; lines that do: \[10, 12\]"):
        WarpAccess.of_traffic(found, "keys", warp=1, line=11)
    with pytest.raises(PictureError, match=r"no load 2 of 'keys'.*line 10: that line does so 2 times"):
        WarpAccess.of_traffic(found, "keys", occurrence=2)
    with pytest.raises(PictureError, match=r"warp 2, line None.*\[\]"):
        WarpAccess.of_traffic(found, "keys", warp=2)
    with pytest.raises(PictureError, match="0 times"):
        WarpAccess.of_traffic(traffic(accesses, stored=True), "keys")


def test_a_line_that_loads_two_arrays_counts_each_by_itself():
    accesses = [("tables", 0, 7, 0, 4), ("keys", 0, 7, 1, 8), ("tables", 0, 7, 2, 12), ("keys", 0, 7, 3, 16)]
    assert WarpAccess.of_traffic(traffic(accesses), "keys", occurrence=1).lanes == {0: (16, 4)}


def test_the_warps_of_a_kernel_move_what_its_traffic_counts():
    emulator = pytest.importorskip("minillm.kernels.cuda.emulator")
    keys, tables = pool([40])
    keys = keys.float()
    q = torch.zeros(1, 2, 64)
    keys = keys.new_zeros(*keys.shape[:3], 64)
    _, found = emulator.run("decode", q, keys, keys.clone(), tables, torch.tensor([40]), version=1)
    times = defaultdict(set)
    for each in found.records_of("keys"):
        times[each["block"], each["thread"] // 32, each["line"]].add(each["occurrence"])
    pictures = [
        WarpAccess.of_traffic(found, "keys", block=block, warp=warp, line=line, occurrence=occurrence)
        for (block, warp, line), occurrences in times.items()
        for occurrence in range(len(occurrences))
    ]
    counts = found.loads("keys")
    assert len(pictures) == counts.requests > 64
    assert sum(len(picture.lanes) for picture in pictures) == counts.num_loads
    assert sum(picture.bytes_moved for picture in pictures) == counts.bytes_moved
    assert sum(picture.bytes_asked for picture in pictures) == counts.bytes_asked


def test_traffic_of_versions():
    apart = traffic([("keys", thread, 1, 0, 512 * thread) for thread in range(64)])
    together = traffic([("keys", thread, 1, 0, 4 * (thread % 32)) for thread in range(64)])
    picture = MemoryTraffic({"v1": apart, "v2": together}, title="keys")
    assert [line.split() for line in picture.text().splitlines()[2:4]] == [
        ["v1", "64", "2", "32", "256", "B", "2.05", "kB", "12.5%", "256", "B", "8×"],
        ["v2", "64", "2", "4", "256", "B", "256", "B", "100%", "128", "B", "2×"],
    ]
    assert picture.alt() == "keys: memory moved: v1 2.05 kB, v2 256 B"
    (axes,) = picture.figure().axes
    assert [bar.get_width() for bar in axes.patches] == [256, 2048, 256, 256]
    assert "moved: 2.05 kB  (8× every byte once; efficiency 12.5%)" in [text.get_text() for text in axes.texts]


def test_traffic_says_which_array_is_read():
    mixed = [("tables", 0, 1, 0, 0), *[("keys", thread, 2, 0, 32 * thread) for thread in range(32)]]
    picture = MemoryTraffic({"v1": traffic(mixed), "v2": traffic(mixed[:1])})
    assert [line.split("  ")[0] for line in picture.text().splitlines()[-2:]] == ["v1", "v2"]
    assert picture.parts == {"tables": {"v1": (4, 32), "v2": (4, 32)}, "keys": {"v1": (128, 1024), "v2": (0, 0)}}
    parts = [bar.get_width() for bar in picture.figure().axes[0].patches]
    assert parts == [4, 128, 32, 1024, 4, 0, 32, 0]


# --- roofline ---


@pytest.mark.parametrize("context", [0, 512])
def test_the_parts_of_the_roofline_add_up_to_the_cost_of_a_step(context):
    picture = DecodeRoofline(QWEN3_0_6B, H200, context, measured={3: 1e-3})
    parts = picture.series
    for index, batch in enumerate(picture.batches):
        least = decode_seconds(QWEN3_0_6B, H200, context, batch)
        assert parts["least time"][index] == pytest.approx(1000 * least)
        cache = parts["reading the cache"][index] if context else 0
        longer = max(parts["reading the weights"][index], parts["arithmetic"][index])
        assert longer + cache == pytest.approx(1000 * least)
    assert picture.batches[2] == 3
    assert [each for each in parts["measured"] if each == each] == [1.0]
    row = next(line.split() for line in picture.text().splitlines() if line.startswith("3 "))
    assert row[-2:] == ["1.000", f"{decode_seconds(QWEN3_0_6B, H200, context, 3) / 1e-3:.0%}"]


def test_the_roofline_turns_where_arithmetic_overtakes_the_weights():
    picture = DecodeRoofline(LLAMA_2_7B, H200, 0)
    turn = compute_bound_batch(H200)
    assert picture.summary() == f"up to {turn - 1} requests, reading the weights takes longer than arithmetic"
    assert [picture.longest(index) for index in (7, 8)] == ["reading the weights", "arithmetic"]
    (axes,) = picture.figure().axes
    (line,) = [line for line in axes.lines if line.get_label() == "least time"]
    before, after = (dict(zip(line.get_xdata(), line.get_ydata(), strict=True))[batch] for batch in (128, turn))
    assert before == pytest.approx(after, rel=0.01)  # level up to there
    assert str(turn - 1) in [text.get_text() for text in axes.texts]


def test_the_cache_overtakes_the_weights_too():
    picture = DecodeRoofline(QWEN3_0_6B, H200, 512)
    batch = picture.cache_bound()
    assert f"from {batch} on, reading 512 cached tokens each does" in picture.summary()
    at, under = (DecodeRoofline(QWEN3_0_6B, H200, 512, [each]).series for each in (batch, batch - 1))
    assert at["reading the cache"][0] >= at["reading the weights"][0]
    assert under["reading the cache"][0] < under["reading the weights"][0]


def test_the_roofline_says_how_many_tokens_a_second_a_marked_batch_is():
    picture = DecodeRoofline(LLAMA_2_7B, H200, 500, marked=[256, 51])
    words = [
        f"{batch} requests: {batch / decode_seconds(LLAMA_2_7B, H200, 500, batch):,.0f} tokens/s" for batch in (51, 256)
    ]
    assert picture.text().splitlines()[-3:-1] == words
    (axes,) = picture.figure().axes
    assert set(words) <= {text.get_text() for text in axes.texts}
    dots = [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert dots == [pytest.approx((batch, 1000 * decode_seconds(LLAMA_2_7B, H200, 500, batch))) for batch in (51, 256)]


def test_a_batch_that_does_not_fit_is_grey_and_has_no_speed():
    picture = DecodeRoofline(LLAMA_2_7B, H200, 500)
    weights, caches = 2 * LLAMA_2_7B.num_parameters, 500 * kv_bytes_per_token(LLAMA_2_7B)
    most = picture.most_requests
    assert weights + most * caches <= H200.memory_bytes < weights + (most + 1) * caches
    assert f"more than {most:,} do not fit" in picture.summary()
    rows = {line.split()[0]: line for line in picture.text().splitlines()}
    assert "no room" in rows["1,024"] and "no room" not in rows["512"]
    (axes,) = picture.figure().axes
    (span,) = [patch for patch in axes.patches if patch.get_facecolor()[:3] == to_rgb(LIGHT_GREY)]
    assert span.get_extents().x0 == pytest.approx(axes.transData.transform((most, 1))[0])
    assert not DecodeRoofline(LLAMA_2_7B, H200, 500, [1, 256]).figure().axes[0].patches


# --- lanes ---


def event(index, start, launched, device, end, planned=None):
    return StepEvent(index, start, end, (), planned=planned, launched=launched, device=device)


def synchronous() -> Trace:
    """Two steps of 10 ms: 2 launch (the device begins after 1), 5 on the device, 3 read; 1 for the caller between."""
    steps = [event(i, t, t + 0.002, (t + 0.001, t + 0.006), t + 0.009) for i, t in enumerate((1.0, 1.010))]
    return Trace(steps=steps)


def asynchronous() -> Trace:
    """Three steps: the second and the third are launched while the device has the one before."""
    return Trace(
        steps=[
            event(0, 0.000, 0.002, (0.001, 0.006), 0.007),
            event(1, 0.007, 0.004, (0.006, 0.011), 0.013, planned=0.002),
            event(2, 0.013, 0.009, (0.011, 0.016), 0.018, planned=0.007),
        ]
    )


def spans(picture, lane):
    """Milliseconds, letter and label."""
    return [
        (round(1000 * span.start, 3), round(1000 * span.end, 3), span.state.letter, span.label)
        for span in picture.lanes[lane]
    ]


def test_a_synchronous_run_leaves_the_device_idle():
    picture = HostDeviceLanes(synchronous())
    assert spans(picture, "host") == [
        (0, 2, "L", "0"), (2, 6, "w", ""), (6, 9, "R", "0"), (10, 12, "L", "1"), (12, 16, "w", ""), (16, 19, "R", "1"),
    ]  # fmt: skip
    assert spans(picture, "device") == [
        (0, 1, "_", ""), (1, 6, "D", "0"), (6, 11, "_", ""), (11, 16, "D", "1"), (16, 19, "_", ""),
    ]  # fmt: skip
    assert picture.text().splitlines() == [
        "host   |LLLLLLLLLLwwwwwwwwwwwwwwwwwwwwRRRRRRRRRRRRRRR     LLLLLLLLLLwwwwwwwwwwwwwwwwwwwwRRRRRRRRRRRRRRR|",
        "device |_____DDDDDDDDDDDDDDDDDDDDDDDDD_________________________DDDDDDDDDDDDDDDDDDDDDDDDD_______________|",
        "a column is 200 µs;   L schedules and launches   w waits for the device   R reads and updates   D computes   "
        "_ idle",
        "host: schedules and launches 4 ms, waits for the device 8 ms, reads and updates 6 ms",
        "device: computes 10 ms, idle 9 ms",
        "19 ms, device idle 47%: 9 ms in 3 gaps, the longest 5 ms",
    ]
    assert len(boxes(picture, IDLE.letter)) == 3


def test_an_asynchronous_run_launches_before_it_reads():
    picture = HostDeviceLanes(asynchronous())
    assert spans(picture, "host") == [
        (0, 2, "L", "0"), (2, 4, "L", "1"), (4, 6, "w", ""), (6, 7, "R", "0"), (7, 9, "L", "2"), (9, 11, "w", ""),
        (11, 13, "R", "1"), (13, 16, "w", ""), (16, 18, "R", "2"),
    ]  # fmt: skip
    use = device_use(asynchronous())
    assert (use.seconds, use.busy, use.gaps) == (
        pytest.approx(0.018),
        pytest.approx(0.015),
        pytest.approx((1e-3, 2e-3)),
    )
    assert use.idle_share == pytest.approx(1 / 6)


def numbers_beside(picture) -> tuple[list[str], list[str]]:
    """What stands above and below the host's lane."""
    (axes,) = picture.figure().axes
    beside = [text for text in axes.texts if text.get_text() and abs(text.get_position()[1]) == pytest.approx(BESIDE)]
    return tuple([text.get_text() for text in beside if text.get_position()[1] * side > 0] for side in (-1, 1))


def short_steps(count: int) -> Trace:
    """Steps of 10 ms, of which launching and reading take 0.1 each."""
    times = [0.010 * index for index in range(count)]
    return Trace(steps=[event(i, t, t + 1e-4, (t + 1e-4, t + 9e-3), t + 9.1e-3) for i, t in enumerate(times)])


def test_boxes_of_the_host_that_are_too_narrow_have_their_step_beside_them():
    assert numbers_beside(HostDeviceLanes(short_steps(4))) == (["0", "1", "2", "3"], ["0", "1", "2", "3"])
    assert numbers_beside(HostDeviceLanes(synchronous())) == ([], [])  # they stand in the boxes
    assert numbers_beside(HostDeviceLanes(short_steps(100))) == ([], [])  # no room


def test_a_part_of_a_run_shows_what_else_the_device_does_then():
    picture = HostDeviceLanes(asynchronous(), first_step=2, num_steps=1)
    assert spans(picture, "device") == [(0, 3, "D", "2"), (3, 5, "_", "")]
    assert spans(picture, "host") == [(0, 3, "w", ""), (3, 5, "R", "2")]
    for first, count in ((3, None), (-1, 1), (2, 2), (0, 0)):
        with pytest.raises(PictureError, match="not in the trace"):
            HostDeviceLanes(asynchronous(), first_step=first, num_steps=count)


@pytest.mark.parametrize("overlap", [False, True])
def test_as_many_steps_are_read_as_asked_for(overlap):
    """Eight steps are eight, also where a ninth is launched before the eighth has been read."""
    ends = [0.010 * (index + 1) for index in range(12)]
    launched = [end - (0.014 if overlap else 0.009) for end in ends]
    planned = [each - 0.001 for each in launched]
    steps = [
        event(i, end - 0.010, launched[i], (end - 0.0095, end - 0.001), end, planned=planned[i])
        for i, end in enumerate(ends)
    ]
    picture = HostDeviceLanes(Trace(steps=steps), first_step=2, num_steps=8)
    assert [span.label for span in picture.lanes["host"] if span.state is READS] == [str(i) for i in range(2, 10)]
    assert [span.label for span in picture.lanes["device"] if span.label] == [str(i) for i in range(2, 10)]


def test_a_device_clock_that_rounds_does_not_make_steps_overlap():
    steps = [event(0, 0.0, 0.002, (0.001, 0.006000008), 0.007), event(1, 0.007, 0.004, (0.006, 0.011), 0.013)]
    assert device_use(Trace(steps=steps)).gaps == pytest.approx((1e-3, 2e-3))


def test_two_runs_share_a_scale():
    both = stacked([HostDeviceLanes(synchronous(), title="before"), HostDeviceLanes(asynchronous(), title="after")])
    assert [axes.get_xlim() for axes in both.figure().axes] == 2 * [pytest.approx((0, 0.019))]


def test_a_trace_without_lanes_is_refused():
    bare = StepEvent(0, 0.0, 1.0, ())
    with pytest.raises(PictureError, match="0 of 1 step say when"):
        HostDeviceLanes(Trace(steps=[bare]))
    with pytest.raises(PictureError, match="3 of 4 steps say when"):
        device_use(Trace(steps=[*asynchronous().steps, bare]))


def test_lanes_of_any_spans():
    chart = LaneChart({"host": [Span(5.0, 6.0, PREPARES)], "device": [Span(5.5, 5.75, COMPUTES, "k")]})
    assert chart.summary() == "1 s, device idle 75%: 750 ms in 2 gaps, the longest 500 ms"
    with pytest.raises(PictureError, match="'device' overlap"):
        LaneChart({"device": [Span(0, 2, COMPUTES), Span(1, 3, COMPUTES)]})
    with pytest.raises(PictureError, match="0 spans"):
        LaneChart({"device": []})
    with pytest.raises(PictureError, match="a lane 'device'"):
        LaneChart({"host": [Span(0, 2, PREPARES)]})
    with pytest.raises(PictureError, match="no span lies between 7 and 8"):
        LaneChart({"device": [Span(0, 2, COMPUTES)]}, window=(7, 8))
    assert {PREPARES.letter, WAITS.letter, READS.letter, COMPUTES.letter, IDLE.letter} == set("LwRD_")


def legend_of(picture) -> list[str]:
    """The words of a picture's legend."""
    (axes,) = picture.figure().axes
    boxes = [artist for artist in axes.artists if isinstance(artist, AnchoredOffsetbox)]
    return [area.get_text() for box in boxes for area in box.findobj(TextArea)]


def test_a_legend_names_the_letters_that_stand_in_boxes_and_no_others():
    steps = ["w  waits for the device", "reads and updates", "computes", "idle"]
    assert legend_of(HostDeviceLanes(synchronous())) == ["schedules and launches", *steps]
    chart = LaneChart({"device": [Span(0, 1, COMPUTES), Span(1, 1.0001, WAITS)]})
    assert legend_of(chart) == ["D  computes", "waits for the device"]
    assert legend_of(WarpAccess(reads(lambda lane: 4 * lane)))[:2] == ["asked for", "moved, not asked for"]


# --- launches ---

KERNELS = [("norm", 2e-6), ("gemm", 12e-6), ("norm", 2e-6), ("rope", 1e-6)]


def test_the_device_waits_for_launches_but_not_within_a_graph():
    picture = LaunchOverhead(KERNELS, launch_seconds=5e-6, graph_seconds=8e-6, gap_seconds=1e-6)
    eager, graph = picture.charts

    def device(chart):
        microseconds = [(round(1e6 * span.start, 3), round(1e6 * span.end, 3)) for span in chart.lanes["device"]]
        return [(*times, span.state.letter) for times, span in zip(microseconds, chart.lanes["device"], strict=True)]

    assert device(eager) == [
        (0, 5, "_"), (5, 7, "A"), (7, 10, "_"), (10, 22, "B"), (22, 23, "_"), (23, 25, "A"), (25, 26, "_"),
        (26, 27, "C"),
    ]  # fmt: skip
    assert device(graph) == [
        (0, 8, "_"), (8, 10, "A"), (10, 11, "_"), (11, 23, "B"), (23, 24, "_"), (24, 26, "A"), (26, 27, "_"),
        (27, 28, "C"),
    ]  # fmt: skip
    assert [span.label for span in eager.lanes["host"]] == ["A", "B", "A", "C"]
    assert len(graph.lanes["host"]) == 1
    assert picture.text().splitlines()[-1] == (
        "4 kernels, 17 µs of work: one by one 27 µs, as a graph 28 µs: 0.964 times as fast"
    )
    assert "A norm   B gemm   C rope" in picture.text()
    assert [axes.get_xlim() for axes in picture.figure().axes] == 2 * [pytest.approx((0, 28e-6))]


def test_a_graph_saves_the_launches_of_many_small_kernels():
    picture = LaunchOverhead([("k", 1e-6)] * 100, launch_seconds=5e-6, graph_seconds=10e-6, gap_seconds=0)
    assert "one by one 501 µs, as a graph 110 µs: 4.55 times as fast" in picture.summary()
    assert "one by one: 100 launches" in picture.text()


def test_a_replayed_kernel_is_not_free():
    """262 kernels that read next to nothing take a quarter of a millisecond: the card needs a microsecond for each."""
    _, graph = LaunchOverhead([("k", 1e-9)] * 262, launch_seconds=5e-6, graph_seconds=1e-5).pictures
    assert graph.end == pytest.approx(1e-5 + 261e-6 + 262e-9)


def test_some_of_many_kernels_are_enlarged_and_all_are_two_bars():
    many = KERNELS * 20
    picture = LaunchOverhead(many, launch_seconds=5e-6, graph_seconds=8e-6, gap_seconds=1e-6, enlarged=range(4, 8))
    totals, eager, graph = picture.pictures
    for name, chart in zip(totals.totals, picture.charts, strict=True):
        assert sum(totals.totals[name].values()) == pytest.approx(chart.end)
    busy = [span for span in eager.lanes["device"] if span.state is not IDLE]
    assert [span.state.letter for span in busy][-4:] == ["A", "B", "A", "C"] and len(eager.lanes["host"]) >= 4
    assert eager.end == pytest.approx(graph.end) and graph.title.endswith("kernels")
    assert len(picture.figure().axes) == 3 and picture.text().startswith("device")
    with pytest.raises(PictureError, match="0 to 79"):
        LaunchOverhead(many, launch_seconds=5e-6, graph_seconds=8e-6, enlarged=range(78, 81))


def test_kernels_of_less_than_a_nanosecond_are_kernels_too():
    kernels = [("k", 4e-10)] * 3
    eager, graph = LaunchOverhead(kernels, launch_seconds=5e-6, graph_seconds=1e-5, gap_seconds=0).pictures
    assert [max(eager.device_use().gaps), max(graph.device_use().gaps)] == pytest.approx([5e-6, 1e-5])
    assert len(graph.device_use().gaps) == 1


def test_many_kinds_of_kernels_share_the_last_letter():
    names = [f"kernel {index}" for index in range(9)]
    picture = LaunchOverhead([(name, 1e-6) for name in names], launch_seconds=0, graph_seconds=0)
    assert "E kernel 4   F others" in picture.text()


# --- all of them ---

PICTURES = {
    "decode tiles": lambda: DecodeTiles([150, 37, 0], 2, block_size=16, tables=[range(10), range(3), []]),
    "decode tiles, long": lambda: DecodeTiles([3000, 8000], 32, block_size=256, window=4000),
    "prefill tiles": lambda: PrefillTiles(230, 130, group=2, title="prefill"),
    "warp": lambda: WarpAccess(reads(lambda lane: 512 * lane), title="apart"),
    "traffic": lambda: MemoryTraffic({"v1": traffic([("keys", 0, 1, 0, 0)])}),
    "roofline": lambda: DecodeRoofline(QWEN3_0_6B, H200, 512, measured={64: 2e-3}),
    "lanes": lambda: HostDeviceLanes(asynchronous(), title="run"),
    "launches": lambda: LaunchOverhead(KERNELS, launch_seconds=5e-6, graph_seconds=8e-6, title="launches"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_same_data_same_bytes_and_words_of_printable_width(name):
    make = PICTURES[name]
    assert make().svg() == make().svg()
    text = make().text()
    assert text == text.rstrip() and all(line == line.rstrip() for line in text.splitlines())
    assert make().alt() and "\n" not in make().alt()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DecodeTiles([], 1, block_size=16), "1 to 16 requests"),
        (lambda: DecodeTiles([5, -1], 1, block_size=16), "-1"),
        (lambda: DecodeTiles([64 * 128 + 1], 1, block_size=16), "8,193 keys.*8,192"),
        (lambda: DecodeTiles([5], 0, block_size=16), "num_splits is 0"),
        (lambda: DecodeTiles([5], 1, block_size=16, window=0), "window is 0"),
        (lambda: DecodeTiles([5, 17], 1, block_size=16, tables=[[1], [2]]), r"\[1, 2\] blocks of 16"),
        (lambda: DecodeTiles([5, 17], 1, block_size=16, tables=[[1]]), "one table per request"),
        (lambda: PrefillTiles(5, 6), "6 new of 5 tokens"),
        (lambda: PrefillTiles(5, 5, group=65), "65 heads in 64 rows"),
        (lambda: PrefillTiles(5, 5, window=0), "window is 0"),
        (lambda: PrefillTiles(3000, 3000), "47 programs"),
        (lambda: WarpAccess({}), "lanes none"),
        (lambda: WarpAccess({32: (0, 4)}), "32"),
        (lambda: WarpAccess({1: (-4, 4)}), "-4"),
        (lambda: WarpAccess(reads(lambda lane: 4096 * lane, 96)), "96 sectors"),
        (lambda: MemoryTraffic({}), "nothing to draw"),
        (lambda: MemoryTraffic({"v1": traffic([])}), "nothing to draw"),
        (lambda: DecodeRoofline(QWEN3_0_6B, H200, -1), "context -1"),
        (lambda: DecodeRoofline(QWEN3_0_6B, H200, 1, [0]), r"batches \[0\]"),
        (lambda: DecodeRoofline(QWEN3_0_6B, H200, 1, [2], marked=[0]), r"batches \[2, 0\]"),
        (lambda: DecodeRoofline(QWEN3_0_6B, H200, 1, measured={1: 0.0}), "'measured' has the value 0"),
        (lambda: LaunchOverhead([], launch_seconds=1, graph_seconds=1), "at least one kernel"),
        (lambda: LaunchOverhead(KERNELS, launch_seconds=-1, graph_seconds=1), "no time below 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(make, says):
    with pytest.raises(PictureError, match=says):
        make()
