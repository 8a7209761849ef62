"""Pictures of a paged cache: what they find in a trace is what the block manager had, and what they say and draw."""

import random
import re
from dataclasses import replace
from functools import cache

import pytest
from matplotlib.patches import Rectangle

from minillm.engine.block_manager import BlockManager
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler, SchedulerConfig
from minillm.sampling.params import SamplingParams
from minillm.simulation.clock import VirtualClock
from minillm.simulation.cost_model import preset
from minillm.simulation.executor import SimulatedExecutor
from minillm.simulation.running import run
from minillm.trace.events import BlockUse, Preemption, RequestRecord, ScheduledTokens, StepEvent, Trace
from minillm.viz import (
    BlockTables,
    BlockTableSteps,
    PictureError,
    PoolState,
    PoolUse,
    ReservedAgainstPaged,
    Timeline,
    pool_states,
)
from minillm.viz.block_replay import Replay
from minillm.viz.blocks import BAND, HEIGHT, owner_letters, pool_rows

BLOCK_SIZE = 4
TEXTS = {
    "A": [
        "Once",
        " upon",
        " a",
        " time",
        ",",
        " there",
        " was",
        " a",
        " little",
        " fox",
        " who",
        " lived",
        " by",
        " the",
        " river",
        ".",
    ],
    "B": ["Once", " upon", " a", " time", " in", " the", " snow", " there", " lived", " a", " bear", " who"],
    "C": ["The", " owl", " saw", " a", " crêpe", ".", " It", " was", " hers", ".", " Tom", " and"],
}
LENGTHS = {"A": (7, 9), "B": (6, 6), "C": (5, 7)}  # prompt and output tokens


class Recorded:
    """A run on a paged cache, with the tables and the cached blocks that the block manager had after every step."""

    def __init__(self, requests, *, blocks, mode="recompute", caching=True, abort=None):
        self.clock = VirtualClock()
        self.manager = BlockManager(blocks, BLOCK_SIZE, num_host_blocks=16, enable_prefix_caching=caching)
        config = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=16, max_model_len=48)
        self.scheduler = Scheduler(config, self.clock, block_manager=self.manager, preemption_mode=mode)
        self.tables, self.cached, self.abort = [], [], abort
        executor = SimulatedExecutor(preset("Llama-2-7B", "4090"), self.clock)
        self.trace = run(self.scheduler, executor, requests, self.clock, on_step=self._look)
        everybody = [each for request in requests for each in (request, *request.children)]
        self.tokens = {each.request_id: list(map(str, each.token_ids(0, each.num_tokens))) for each in everybody}

    def _look(self, plan, updates):
        running = list(self.scheduler.running.values())
        tables = {request.request_id: tuple(self.manager.table(request)) for request in running}
        self.tables.append(tables)
        self.cached.append(tuple(self.manager._cached))
        if self.abort is not None and running and self.abort.random() < 0.15:
            self.scheduler.abort_request(self.abort.choice(running).request_id)

    @property
    def num_preemptions(self) -> int:
        return sum(len(step.preempted) for step in self.trace.steps)


@cache
def random_run(seed: int, mode="recompute", caching=True, aborts=False, n=1) -> Recorded:
    """Ten requests, some of which begin alike, in a pool that is too small for them."""
    rng = random.Random(seed)
    requests = []
    for index in range(10):
        prompt = list(range(rng.choice([0, 4, 8]))) + [100 * index + i for i in range(1, rng.randint(2, 11))]
        params = SamplingParams(max_tokens=rng.randint(1, 14), ignore_eos=True, temperature=1.0, n=rng.choice([1, n]))
        requests.append(Request(str(index), prompt, params, arrival_time=0.02 * index * rng.random()))
    return Recorded(requests, blocks=14, mode=mode, caching=caching, abort=rng if aborts else None)


@cache
def small_run(mode="recompute") -> Recorded:
    """A; then B, which begins like A, and C, which is preempted."""
    numbers = {text: index for index, text in enumerate(sorted({text for texts in TEXTS.values() for text in texts}))}
    requests = []
    for name, (num_prompt, num_output) in LENGTHS.items():
        prompt = [numbers[text] for text in TEXTS[name][:num_prompt]]
        params = SamplingParams(max_tokens=num_output, ignore_eos=True)
        requests.append(Request(name, prompt, params, arrival_time=0.0 if name == "A" else 1e-6))
    return Recorded(requests, blocks=8, mode=mode)


def boxes_of(axes, gid: str) -> list[Rectangle]:
    return [patch for patch in axes.patches + axes.artists if isinstance(patch, Rectangle) and patch.get_gid() == gid]


# --- what is found in a trace ---


@pytest.mark.parametrize("aborts", [False, True])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_the_trace_tells_what_the_block_manager_had(mode, caching, aborts):
    preemptions = shared = cached = 0
    for seed in range(4):
        recorded = random_run(seed, mode, caching, aborts)
        replay = Replay(recorded.trace, BLOCK_SIZE, tokens=recorded.tokens)
        for index, step in enumerate(recorded.trace.steps):
            replay.begin(index)
            replay.end(index)
            state = replay.state()
            assert state.tables == recorded.tables[index]
            assert state.cached == recorded.cached[index]  # in the order in which they will go
            assert state.use == step.blocks
            assert state.num_empty == replay.num_empty == _empty_slots(state)
            shared, cached = shared + state.num_saved, cached + len(state.cached)
        preemptions += recorded.num_preemptions
    assert preemptions >= 2
    assert (shared > 0, cached > 0) == (caching, caching)


def _empty_slots(state: PoolState) -> int:
    """Slots without a token, counted one by one."""
    held = {
        (table[position // BLOCK_SIZE], position % BLOCK_SIZE)
        for request_id, table in state.tables.items()
        for position in range(state.num_tokens[request_id])
    }
    return BLOCK_SIZE * len(state.used()) - len(held)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_forked_requests_have_the_table_they_compute_with(mode):
    copies = 0
    for seed in range(4):
        recorded = random_run(seed, mode, n=3)
        after = pool_states(recorded.trace, BLOCK_SIZE, tokens=recorded.tokens)
        for index, step in enumerate(recorded.trace.steps):
            for part in step.scheduled:
                if part.request_id in recorded.tables[index]:
                    assert after[index].tables[part.request_id] == recorded.tables[index][part.request_id]
            copies += len(step.copied_blocks)
    assert copies


def test_without_tokens_as_many_blocks_are_cached_as_the_trace_says():
    trace = random_run(0).trace
    replay = Replay(trace, BLOCK_SIZE)
    for index, step in enumerate(trace.steps):
        replay.begin(index)
        replay.end(index)
        assert replay.state().use == step.blocks


def test_another_table_in_the_trace_is_another_table_in_the_picture():
    recorded = small_run()
    step = recorded.trace.steps[1]
    part = next(part for part in step.scheduled if part.request_id == "B")
    wrong = replace(part, first_block=0, block_ids=(2, 3))
    others = tuple(part for part in step.scheduled if part.request_id != "B")
    trace = Trace(recorded.trace.requests, [recorded.trace.steps[0], StepEvent(1, 1.0, 2.0, (wrong, *others))])
    assert pool_states(recorded.trace, BLOCK_SIZE)[1].tables["B"] == (1, 3)
    assert pool_states(trace, BLOCK_SIZE)[1].tables["B"] == (2, 3)


def test_a_swapped_request_says_where_its_tokens_are():
    states = pool_states(small_run("swap").trace, BLOCK_SIZE)
    assert states[0].fates == {"A": "", "B": "waiting", "C": "waiting"}
    assert states[5].fates["C"] == "swapped out, 8 tokens in host memory"
    assert states[-1].fates == dict.fromkeys("ABC", "finished")
    assert pool_states(small_run().trace, BLOCK_SIZE)[5].fates["C"] == "preempted, 8 tokens to compute again"


# --- block tables ---


def test_tables_and_pool_in_words():
    recorded = small_run()
    assert BlockTables.of_step(recorded.trace, BLOCK_SIZE, 2, tokens=TEXTS).text() == (
        "A  9 tokens, 1 written now  0→1 [Once ␣upon ␣a ␣time]  1→2 [, ␣there ␣was ␣a]  2→6 [␣little . . .]\n"
        "B  7 tokens, 1 written now  0→1 [Once ␣upon ␣a ␣time]  1→3 [␣in ␣the ␣snow .]\n"
        "C  6 tokens, 1 written now  0→4 [The ␣owl ␣saw ␣a]  1→5 [␣crêpe . . .]\n"
        "\n"
        "block  owner   slots\n"
        "    0  null\n"
        "    1  A B ×2  ####\n"
        "    2  A       ####\n"
        "    3  B       ##+.\n"
        "    4  C       ####\n"
        "    5  C       #+..\n"
        "    6  A       +...\n"
        "    7  free\n"
        "# held   + written now   . empty\n"
        "8 blocks of 4 slots: 6 used, 0 cached, 1 free, 1 null; "
        "6 of 24 slots in used blocks empty (25.0%); sharing saves 1 block"
    )


def test_without_tokens_the_slots_have_signs_and_the_end_is_announced():
    text = BlockTables.of_step(small_run().trace, BLOCK_SIZE, 6).text()
    assert "B  11 tokens, 1 written now, ends with this step  0→1 ####  1→3 ####  2→7 ##+." in text
    assert "C  preempted, 8 tokens to compute again\n" in text and "    4  cached  ####" in text


def test_what_the_last_step_left():
    recorded = small_run()
    after = BlockTables.of_step(recorded.trace, BLOCK_SIZE, len(recorded.trace.steps))
    assert after.state.use == recorded.trace.steps[-1].blocks and after.state.use.used == 0
    assert "A  finished\n" in after.text() and "written" not in after.summary()
    assert BlockTables.of_step(recorded.trace, BLOCK_SIZE).state.tables == {"C": (4, 5, 7)}


def test_a_copy_before_writing_is_said():
    scheduled = [
        ScheduledTokens("A", 0, 6, "prefill", 1, block_ids=(1, 2)),
        ScheduledTokens("A", 6, 1, "decode", 1, first_block=1, block_ids=(3,)),
        ScheduledTokens("A.1", 5, 1, "prefill", 1, block_ids=(1, 2)),
    ]
    trace = Trace([RequestRecord("A", 0.0, 6), RequestRecord("A.1", 0.0, 6)])
    trace.steps.append(StepEvent(0, 0.0, 1.0, (scheduled[0],)))
    trace.steps.append(StepEvent(1, 1.0, 2.0, tuple(scheduled[1:]), copied_blocks=((2, 3),)))
    picture = BlockTables.of_step(trace, BLOCK_SIZE)
    assert picture.state.tables == {"A": (1, 3), "A.1": (1, 2)} and picture.state.owners(1) == ["A", "A.1"]
    assert "\nblock 2 copied to 3\n" in picture.text()
    assert "block 2 copied to 3" in BlockTableSteps(trace, BLOCK_SIZE).caption(1)
    assert picture.text().startswith("A  7 tokens") and "B  A.1: 6 tokens" in picture.text()


def test_a_block_that_was_copied_away_from_can_be_cached():
    """Two requests share a block that is not full; one goes on in a copy, the other fills it; then both end."""
    first, second = ScheduledTokens("A", 0, 3, "prefill", 1, block_ids=(1,)), ScheduledTokens("A", 3, 1, "decode", 1)
    fork = ScheduledTokens("A.1", 2, 1, "prefill", 1, block_ids=(1,))
    parts = [(first,), (replace(second, block_ids=(2,)), fork), (ScheduledTokens("A.1", 3, 1, "decode", 1),)]
    trace = Trace([RequestRecord("A", 0.0, 3), RequestRecord("A.1", 0.0, 3)])
    for index, (scheduled, ended, cached) in enumerate(zip(parts, [(), ("A",), ("A.1",)], [0, 1, 2], strict=True)):
        use = BlockUse(1 if index < 2 else 0, cached, 3 - cached)
        trace.steps.append(StepEvent(index, index, index + 1.0, scheduled, ended, blocks=use))
    after = pool_states(trace, BLOCK_SIZE, tokens={"A": list("abcd"), "A.1": list("abce")})[-1]
    assert (after.cached, after.contents) == ((2, 1), {2: ("A", 0), 1: ("A.1", 0)})


def test_a_state_can_be_given_by_hand():
    state = PoolState(4, 6, {"cat": [5, 2], "dog": [5]}, {"cat": 6, "dog": 4}, cached=[3])
    picture = BlockTables(state, title="By hand")
    assert picture.text().splitlines()[:2] == ["A  cat: 6 tokens  0→5 ####  1→2 ##..", "B  dog: 4 tokens  0→5 ####"]
    assert (state.use, state.num_empty, state.num_saved) == (BlockUse(2, 1, 2, null=1), 2, 1)
    assert picture.alt().startswith("By hand: block tables and pool: 6 blocks")


def test_slots_are_drawn_as_they_are():
    recorded = small_run()
    picture = BlockTables.of_step(recorded.trace, BLOCK_SIZE, 2)
    axes, layout, state = picture.figure().axes[0], picture._layout, picture.state
    slot = layout.block / BLOCK_SIZE  # without tokens, all are equally wide
    empty = sum(box.get_width() for box in boxes_of(axes, "empty")) / slot
    partly = [block for block in state.used() if state.filled(block) < BLOCK_SIZE]
    assert round(empty) == state.num_empty and len(boxes_of(axes, "empty")) == len(partly)
    owned = [block for block in state.used() if len(state.owners(block)) == 1]
    held = [box.get_width() / slot for box in boxes_of(axes, "held") if box.get_height() == pytest.approx(HEIGHT)]
    assert sorted(map(round, held)) == sorted(state.filled(block) for block in owned)
    words = [text.get_text() for text in axes.texts]
    assert {"AB×2", "free", "null", "A", "9 tokens"} <= set(words)


def test_every_entry_of_a_table_points_at_its_block():
    picture = BlockTables.of_step(small_run().trace, BLOCK_SIZE, 2)
    axes, state = picture.figure().axes[0], picture.state
    listed = [block for table in state.tables.values() for block in table]
    arrows = [patch for patch in axes.patches if patch.get_gid() == "points"]
    entries = boxes_of(axes, "entry")
    assert len(arrows) == len(entries) == len(listed) == 7
    for block, arrow, entry in zip(listed, arrows, entries, strict=True):
        (x, y), (_, end) = picture._layout.place(block), arrow._posA_posB[1]
        assert end == pytest.approx(y + HEIGHT / 2, abs=0.02) and entry.get_x() + entry.get_width() < x


def test_several_free_blocks_have_one_line():
    assert pool_rows(9, {1, 2, 3, 5, 6, 8}) == [
        range(1),
        range(1, 4),
        range(4, 5),
        *(range(i, i + 1) for i in range(5, 9)),
    ]
    state = PoolState(4, 9, {"A": [1]}, {"A": 3})
    assert "\n    1  A      ###.\n  2–8  free\n" in BlockTables(state).text()
    words = [text.get_text() for text in BlockTables(state).figure().axes[0].texts]
    assert "2–8: 7 blocks free" in words and "8" not in words


def test_a_copied_block_has_an_arrow_to_its_copy():
    state = PoolState(4, 4, {"A": [1, 3], "B": [1, 2]}, {"A": 7, "B": 6}, copies=((2, 3),))
    for narrow in (False, True):
        picture = BlockTables(state, narrow=narrow)
        (arrow,) = [patch for patch in picture.figure().axes[0].patches if patch.get_gid() == "copy"]
        heights = [picture._layout.place(block)[1] + HEIGHT / 2 for block in (2, 3)]
        ends = [height for _, height in arrow._posA_posB]
        assert list(ends) == pytest.approx(heights, abs=0.03)


def test_the_tokens_stand_in_their_slots():
    axes = BlockTables.of_step(small_run().trace, BLOCK_SIZE, 2, tokens=TEXTS).figure().axes[0]
    words = [text.get_text() for text in axes.texts]
    assert words.count("Once") == words.count("␣owl") == words.count("␣little") == 1  # shared or not, once in the pool


def test_a_shared_block_has_the_colours_of_all_its_owners():
    picture = BlockTables.of_step(small_run().trace, BLOCK_SIZE, 2)
    axes = picture.figure().axes[0]
    x, y = picture._layout.place(1)
    stripes = [box for box in boxes_of(axes, "held") if box.get_x() == x and y <= box.get_y() < y + HEIGHT]
    assert sum(box.get_height() for box in stripes) == pytest.approx(BAND)  # so that words above it can be read
    assert [box.get_facecolor() for box in stripes] == [
        box.get_facecolor() for block in (2, 3) for box in boxes_of(axes, "held")
        if box.get_x() == x and box.get_y() == picture._layout.place(block)[1]
    ]  # fmt: skip


def test_a_large_pool_is_a_map():
    tables = {str(index): range(1 + 3 * index, 4 + 3 * index) for index in range(15)}
    tables["15"] = [1, 60]
    state = PoolState(16, 200, tables, {each: 16 * len(table) - 5 for each, table in tables.items()}, cached=[70])
    picture = BlockTables(state)
    lines = picture.text().splitlines()
    assert "and 6 requests more" in lines
    first = lines.index("block") + 1
    assert lines[first : first + 2] == [
        "    0  02AABBBCCCDDDEEEFFFGGGHHHIIIJJJKKKLLLMMMNNNOOO----",
        "   50  ----------P---------*" + 29 * "-",
    ]
    assert picture._layout.small and picture.figure().get_size_inches()[1] < 13


def test_requests_have_letters_of_their_own():
    assert owner_letters(["x", "y"]) == {"x": "x", "y": "y"}
    assert owner_letters(["0", "1", "0"]) == {"0": "A", "1": "B"}


def test_the_steps_in_which_a_table_changes_are_chosen():
    recorded = small_run("swap")
    steps = BlockTableSteps(recorded.trace, BLOCK_SIZE, tokens=TEXTS)
    assert steps.num_steps == len(recorded.trace.steps) + 1 and steps.chosen == (0, 1, 2, 4, 5, 6)
    assert steps.caption(1).startswith("step 2 of 12: 8 blocks of 4 slots: 5 used")
    assert steps.caption(12).startswith("after the last step: 8 blocks of 4 slots: 0 used")
    sizes = {tuple(steps.figure(step).get_size_inches()) for step in (0, 5, 12)}
    assert len(sizes) == 1


# --- the use of a pool ---


def test_the_parts_of_a_bar_sum_to_the_pool():
    recorded = random_run(0)
    picture = PoolUse(recorded.trace, BLOCK_SIZE)
    states = pool_states(recorded.trace, BLOCK_SIZE)
    assert picture.num_blocks == 13 and len(states) == picture.num_steps + 1
    for moment, step in zip(picture.moments, recorded.trace.steps, strict=True):
        assert sum(moment.blocks.values()) == 13
        assert moment.blocks["held"] + moment.blocks["empty"] == step.blocks.used
        assert moment.preempted.total() == len(step.preempted)
    assert recorded.num_preemptions
    assert 0 < picture.empty_share < 0.5


def test_the_use_of_a_pool_in_words():
    lines = PoolUse(small_run("swap").trace, BLOCK_SIZE).text().splitlines()
    assert lines[0].split() == ["step", "used", "cached", "free", "tokens", "held", "slots", "empty", "preempted"]
    assert lines[2].split() == ["0", "##-----", "2", "0", "5", "7", "1"]
    assert lines[7].split() == ["5", "####.**", "5", "2", "0", "18", "2", "s"]
    assert lines[-3:] == [
        "# held   . empty   * cached   - free   s swapped",
        "7 blocks of 4 slots to hand out; at most 7 used (100.0%), after step 4",
        "17.2% of the slots in used blocks empty; 1 preemption (1 swap)",
    ]


def test_the_use_of_a_pool_is_drawn_and_preemptions_marked():
    picture = PoolUse(small_run().trace, BLOCK_SIZE)
    axes = picture.figure().axes[0]
    for kind in ("held", "empty", "cached", "free"):
        heights = [moment.blocks[kind] for moment in picture.moments if moment.blocks[kind]]
        assert [box.get_height() for box in boxes_of(axes, kind)] == heights
    marks = [text for text in axes.texts if text.get_text() == "!"]
    assert [mark.get_position()[0] for mark in marks] == [5.5]
    assert not [text for text in picture.figure(step=3).axes[0].texts if text.get_text() == "!"]
    assert picture.caption(5).endswith("; 1 preemption before it")


def test_long_runs_are_drawn_as_means():
    recorded = random_run(0, n=3)
    picture = PoolUse(recorded.trace, BLOCK_SIZE)
    bars = picture.bars(10)
    assert len(bars) <= 10 and bars[-1].last_step == picture.num_steps - 1
    assert all(sum(bar.blocks.values()) == pytest.approx(13) for bar in bars)
    assert sum(bar.preempted.total() for bar in bars) == recorded.num_preemptions > 0


# --- reserving against paging ---


def test_waste_is_what_is_set_aside_without_a_token():
    tokens = {"0": 18, "1": 46, "2": 58}
    picture = ReservedAgainstPaged(tokens, {"0": 96}, {"0": 2, "1": 3, "2": 4}, 16, 160, external=64, title="Memory")
    assert picture.reserved == (18, 78, 64, 0) and picture.paged == (122, 22, 0, 16)
    assert (picture.reserved.waste, picture.paged.waste) == (pytest.approx(142 / 160), pytest.approx(22 / 160))
    assert picture.text().splitlines() == [
        "reserved: 1 of 3 requests fit, 88.8% of the memory wasted",
        "req 0  |" + "#" * 9 + "." * 39 + "| 18 of 96",
        "no room for 2 more",
        "memory |" + "#" * 6 + "." * 24 + "x" * 20 + "| 160 slots",
        "# holds tokens 11.2%   . empty 48.8%   x gaps too small 40.0%   a letter above is 2 slots",
        "",
        "blocks of 16: 3 of 3 requests fit, 13.8% of the memory wasted",
        "req 0  |" + "#" * 9 + "." * 7 + "| 18 of 32",
        "req 1  |" + "#" * 23 + "." + "| 46 of 48",
        "req 2  |" + "#" * 29 + "." * 3 + "| 58 of 64",
        "memory |" + "#" * 38 + "." * 7 + "-" * 5 + "| 160 slots",
        "# holds tokens 76.2%   . empty 13.8%   - free 10.0%   a letter above is 2 slots",
    ]
    left, right = picture.figure().axes
    assert [box.get_width() for box in boxes_of(left, "0:empty") + boxes_of(right, "1:empty")] == [78, 2]
    assert "no room for 2 more" in [text.get_text() for text in left.texts]
    assert {"76.2%", "13.8%", "10.0%"} <= {text.get_text() for text in right.texts}  # every slice says its share
    assert picture.alt().startswith("Memory: reserved: 1 of 3")


# --- preemption on a timeline ---


def test_a_timeline_shows_who_gave_way_and_how():
    assert Timeline(small_run().trace, "steps").text() == (
        "step  0    5    10\n"
        "A    |PDDDDDDDD...\n"
        "B    | PDDDDD.....\n"
        "C    | PDDD!!!!RDD\n"
        "! preempted   P prefill   D decode   R recompute   . finished"
    )
    swapped = Timeline(small_run("swap").trace, "steps")
    assert swapped.text().splitlines()[3:] == ["C    | PDDDssssDDD", "s swapped   P prefill   D decode   . finished"]
    assert "; preempted: C (swap)" in swapped.caption(5) and "preempted" not in swapped.caption(4)
    axes = swapped.figure().axes[0]
    (box,) = boxes_of(axes, "C:swapped")
    assert (box.get_x(), box.get_width(), box.get_hatch()) == (5, 4, "--" * 2)


def test_true_to_time_a_preempted_request_waits_until_it_runs_again():
    trace = small_run().trace
    timeline = Timeline(trace)
    (box,) = [box for box in timeline.boxes("C") if box.state == "preempted"]
    assert (box.start, box.end) == (pytest.approx(trace.steps[4].end_time), pytest.approx(trace.steps[9].start_time))
    assert re.search(r"! preempted +\d", timeline.text())


def test_a_second_preemption_of_another_kind_is_told_apart():
    parts = [("a", 0, 2, "prefill", 1), None, ("a", 0, 2, "recompute", 0), None, ("a", 2, 1, "decode", 1), None]
    preempted = {1: (Preemption("a", "recompute", 2),), 3: (Preemption("a", "swap", 2),)}
    trace = Trace([RequestRecord("a", 0.0, 2)])
    for index, part in enumerate(parts):
        scheduled = (ScheduledTokens(*part),) if part else (ScheduledTokens("b", 0, 1, "decode"),)
        trace.steps.append(StepEvent(index, index, index + 1.0, scheduled, preempted=preempted.get(index, ())))
    timeline = Timeline(trace, "steps")
    assert timeline.text().splitlines()[1] == "a    |P!RsDw"
    assert [box.state for box in Timeline(trace).boxes("a")][1::2] == ["preempted", "swapped", "waiting"]


# --- what all of them share ---

PICTURES = {
    "tables": lambda: BlockTables.of_step(small_run().trace, BLOCK_SIZE, 4, tokens=TEXTS, title="Tables"),
    "steps": lambda: BlockTableSteps(small_run("swap").trace, BLOCK_SIZE, steps=[1, 12], title="Steps"),
    "pool": lambda: PoolUse(random_run(2).trace, BLOCK_SIZE, title="Pool"),
    "memory": lambda: ReservedAgainstPaged({"a": 3, "b": 5}, {"a": 9}, {"a": 1, "b": 2}, 4, 12, title="Memory"),
    "timeline": lambda: Timeline(random_run(1, "swap").trace, "steps", title="Timeline"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_same_bytes_every_time_and_no_wider_than_a_page(name, tmp_path):
    picture, same = PICTURES[name](), PICTURES[name]()
    svg = picture.save(tmp_path / "first.svg").read_text()
    assert same.save(tmp_path / "second.svg").read_text() == svg and same.text() == picture.text()
    assert float(re.search(r'width="([\d.]+)pt"', svg)[1]) <= 9 * 72
    assert picture.alt() and "\n" not in picture.alt()
    assert not any(line != line.rstrip() for line in picture.text().splitlines())


@pytest.mark.parametrize("name", ["steps", "pool"])
def test_every_step_has_its_frame(name):
    picture = PICTURES[name]()
    stepper = picture.stepper()
    first = stepper.image.value
    stepper.slider.value = picture.num_steps - 1
    assert stepper.image.value != first and picture.caption(picture.num_steps - 1)[:12] in stepper.caption.value


def paged(*block_ids: int, first_block: int = 0, num_tokens: int = 4) -> Trace:
    part = ScheduledTokens("a", 0, num_tokens, "prefill", 1, first_block=first_block, block_ids=block_ids)
    return Trace([RequestRecord("a", 0.0, num_tokens)], [StepEvent(0, 0.0, 1.0, (part,))])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BlockTables.of_step(Trace(), 4), "no block tables"),
        (lambda: BlockTables.of_step(paged(1), 4, 2), r"step 2 is outside the trace's steps 0\.\.1"),
        (lambda: pool_states(paged(1), 2), "up to token 4 with 1 block of 2"),
        (lambda: pool_states(paged(1), 0), "block_size is 0"),
        (lambda: pool_states(paged(1, first_block=1), 4), "from entry 1, but it has 0"),
        (lambda: pool_states(paged(0), 4), "names block 0; blocks that can be allocated are 1 to 0"),
        (lambda: pool_states(paged(7), 4, num_blocks=7), "names block 7; blocks that can be allocated are 1 to 6"),
        (lambda: PoolState(4, 9, {"a": [1]}, {"a": 5}), "'a' holds 5 tokens in 1 block of 4"),
        (lambda: PoolState(4, 9, {"a": [1]}, {}), r"tables are given of \['a'\]"),
        (lambda: BlockTables(PoolState(4, 257, {}, {})), "a pool of 257 blocks"),
        (lambda: BlockTables.of_step(paged(1), 4, tokens={"a": ["x"]}), "1 labels were given for the 4 tokens"),
        (lambda: BlockTableSteps(paged(1), 4, steps=[2]), "step 2 is outside"),
        (lambda: PoolUse(paged(1), 4), "step 0 of the trace does not say"),
        (lambda: ReservedAgainstPaged({}, {}, {}, 4, 8), "tokens need all"),
        (lambda: ReservedAgainstPaged({"a": 1}, {"b": 1}, {}, 4, 8), "tokens need all"),
        (lambda: ReservedAgainstPaged({"a": 5}, {"a": 8}, {"a": 1}, 4, 8), r"'a' holds 5 tokens in 4 slots \(blocks"),
        (lambda: ReservedAgainstPaged({"a": 1}, {"a": 8}, {}, 4, 8, external=1), "8 slots taken .* capacity of 8"),
    ],
)
def test_impossible_data_is_refused_with_the_reason(make, says):
    with pytest.raises(PictureError, match=says):
        make()
