"""Pictures of batching: what they say and draw follows the trace of real scheduler runs, waste included."""

import re
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.patches import Polygon, Rectangle

from minillm.attention.masks import block_diagonal, rectangular
from minillm.engine.scheduler import SchedulerConfig
from minillm.simulation.cost_model import preset
from minillm.simulation.reporting import report
from minillm.simulation.running import compare_batching
from minillm.simulation.workload import made_request
from minillm.trace.events import RequestRecord, ScheduledTokens, StepEvent, Trace
from minillm.viz import (
    BatchComposition,
    BlockMaskSteps,
    LoadCurves,
    PaddingRectangle,
    PaddingSteps,
    Panels,
    PictureError,
    Places,
    PolicyTimelines,
    RunOverview,
    Timeline,
)
from minillm.viz.activity import columns_of
from minillm.viz.block_masks import Block, BlockMask, blocks_of
from minillm.viz.timeline import MOST_PADDING

BUDGET = 6


@cache
def batching_traces(num_requests: int = 5) -> dict[str, Trace]:
    """Requests of different lengths that arrive one after the other, under all three ways of batching."""
    lengths = [(4, 5), (9, 2), (3, 4), (5, 1), (2, 6)]
    requests = [made_request(f"r{i}", 0.01 * i, *lengths[i % len(lengths)]) for i in range(num_requests)]
    config = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=BUDGET, max_model_len=64)
    runs = compare_batching(requests, config, preset("Llama-2-7B", "4090"))
    return {batching: run.trace for batching, run in runs.items()}


def padded_trace() -> Trace:
    """A batch of two, padded: "b" is shorter, and ends before "a"; "c" arrives at 0.25 s and has the next step."""
    schedule = [
        [("a", 0, 4, "prefill", 1), ("b", 0, 1, "prefill", 1), ("b", 0, 3, "padding", 0)],
        [("a", 4, 1, "decode", 1), ("b", 1, 1, "decode", 1)],
        [("a", 5, 1, "decode", 1), ("b", 0, 1, "padding", 0)],
        [("c", 0, 2, "prefill", 1)],
    ]
    finished = {2: ("a", "b"), 3: ("c",)}
    trace = Trace([RequestRecord("a", 0.0, 4), RequestRecord("b", 0.0, 1), RequestRecord("c", 0.15, 2)])
    for step, parts in enumerate(schedule):
        parts = tuple(ScheduledTokens(*part) for part in parts)
        trace.steps.append(StepEvent(step, step / 10, (step + 1) / 10, parts, finished.get(step, ())))
    return trace


def boxes_of(axes, gid: str) -> list[Rectangle]:
    return [patch for patch in axes.patches if patch.get_gid() == gid]


PICTURES = {
    "policies": lambda: PolicyTimelines(batching_traces(), title="Three ways"),
    "places": lambda: Places(batching_traces(), title="Three ways"),
    "timeline": lambda: Timeline(padded_trace(), "tokens"),
    "composition": lambda: BatchComposition(batching_traces()["continuous"], BUDGET, title="Steps"),
    "rectangle": lambda: PaddingRectangle([2, 5, 10], title="Static"),
    "rectangles": lambda: PaddingSteps(batching_traces()["dynamic"]),
    "blocks": lambda: BlockMaskSteps(batching_traces()["continuous"], title="Blocks"),
    "load": lambda: LoadCurves([1, 2, 4], {"all": [1, 2, 2.5]}, {"p50": [0.1, 0.2, 3], "p99": [0.2, 0.6, 9]}, slo=0.5),
}


# --- places ---


def test_a_place_is_held_to_the_last_step_and_then_given_to_the_next():
    picture = Places({"padded": padded_trace()})
    assert picture.text() == (
        "padded: 4 steps, 75% of the places in use\n"
        "  0 |PDDP\n"
        "  1 |PDx\n"
        "\n"
        "a column is 1 step; P prefill   D decode   x padding"
    )
    assert {(stay.place, stay.request_id) for stay in picture.stays["padded"]} == {(0, "a"), (1, "b"), (0, "c")}


def test_places_are_those_of_the_trace():
    traces = batching_traces()
    picture = Places(traces)
    for name, trace in traces.items():
        found = picture.stays[name]
        assert picture.num_places[name] <= 3
        taken = Counter((stay.place, step) for stay in found for step in range(stay.start, stay.end))
        assert set(taken.values()) == {1}  # nobody shares a place
        useful = sum(stay.end - stay.start for stay in found if stay.state != "padding")
        real = sum(len({p.request_id for p in step.scheduled if p.why != "padding"}) for step in trace.steps)
        assert useful == real
    (axes,) = picture.figure().axes
    assert len(boxes_of(axes, "static:padding")) == sum(stay.state == "padding" for stay in picture.stays["static"])
    assert "padding" not in {stay.state for stay in picture.stays["continuous"]}


def test_places_want_a_step():
    for traces in ({}, {"a": Trace()}):
        with pytest.raises(PictureError, match="each with a step"):
            Places(traces)


# --- timelines of batches ---


def test_rows_filled_up_with_padding_are_in_lower_case():
    assert Timeline(padded_trace(), "steps").text() == (
        "step  0\n"
        "a    |PDD.\n"
        "b    |pDx.\n"
        "c    |  wP\n"
        "w waiting   P prefill   D decode   x padding   . finished   p the same, filled up with padding"
    )


def test_in_tokens_a_step_is_as_wide_as_what_it_computes():
    timeline = Timeline(padded_trace(), "tokens")
    assert [(box.start, box.end) for box in timeline.boxes("a")] == [(0, 8), (8, 10), (10, 12)]
    assert timeline.text().splitlines()[:4] == [
        "token  0         10",
        "a     |PPPPPPPPDDDD..",
        "b     |ppppppppDDxx..",
        "c     |          wwPP",
    ]
    assert (timeline.ttft("a"), timeline.mean_itl("a"), timeline.end()) == (8, 2, 14)


def test_in_seconds_a_late_arrival_waits_from_its_arrival():
    boxes = Timeline(padded_trace()).boxes("c")
    assert [(box.state, box.start, box.end) for box in boxes] == [
        ("waiting", 0.15, pytest.approx(0.3)),
        ("prefill", pytest.approx(0.3), pytest.approx(0.4)),
    ]
    assert "4 tokens, 3 of them padding" in Timeline(padded_trace()).text()


def test_the_share_of_padding_is_hatched_at_the_foot_of_the_box():
    axes = Timeline(padded_trace(), "steps").figure().axes[0]
    whole = boxes_of(axes, "b:prefill")[0]
    foot, row = boxes_of(axes, "b:padding")
    assert foot.get_height() == pytest.approx(MOST_PADDING * whole.get_height()) and foot.get_x() == whole.get_x()
    assert "x" in foot.get_hatch() and row.get_height() == whole.get_height()
    letters = [text for text in axes.texts if text.get_text() == "P"]
    (letter,) = [text for text in letters if whole.get_y() < text.get_position()[1] < foot.get_y() < row.get_y() + 1]
    assert letter.get_bbox_patch() is None  # above the padding, and no hole in it


def test_the_rectangles_of_a_run_have_one_legend():
    text = PaddingSteps(batching_traces()["dynamic"]).text()
    assert text.count("P prefill") == 1 and text.count("useful (") > 1


def test_a_box_after_the_moment_shown_is_pale_even_if_it_is_waiting():
    axes = Timeline(padded_trace()).figure(step=0).axes[0]
    assert [box.get_alpha() for box in boxes_of(axes, "c:waiting")] == [0.12]
    axes = Timeline(padded_trace()).figure(step=1).axes[0]
    assert sorted(box.get_width() for box in boxes_of(axes, "c:waiting")) == pytest.approx([0.05, 0.1])


@pytest.mark.parametrize("batching", ["static", "dynamic", "continuous"])
def test_every_token_computed_is_in_a_box(batching):
    trace = batching_traces()[batching]
    timeline = Timeline(trace, "steps")
    boxes = timeline.boxes_of_all()
    assert sum(box.num_tokens for box in boxes) == sum(step.num_tokens for step in trace.steps)
    assert sum(box.num_tokens - box.num_padding for box in boxes) == report(trace).useful_tokens
    for record in trace.requests:
        prefilled = sum(box.num_tokens - box.num_padding for box in timeline.boxes(record.request_id)
                        if box.state == "prefill")  # fmt: skip
        assert prefilled == record.num_prompt_tokens


def test_static_shows_padding_rows_dynamic_padding_beside_tokens_continuous_chunks_and_none():
    letters = {
        batching: "".join(Timeline(trace, "steps").chart(1, len(trace.steps))[1:])
        for batching, trace in batching_traces().items()
    }
    assert "x" in letters["static"] and "d" not in letters["static"]
    assert "d" in letters["dynamic"] and "x" not in letters["dynamic"]
    assert "PP" in letters["continuous"] and not set("xpd") & set(letters["continuous"].replace("step", ""))


def test_a_very_long_run_is_written_in_fewer_columns():
    trace = Trace([RequestRecord("0", 0.0, 1)])
    for step in range(1000):
        trace.steps.append(StepEvent(step, step, step + 1, (ScheduledTokens("0", step, 1, "decode", 1),)))
    lines = Timeline(trace, "steps").text().splitlines()
    assert lines[1] == "req 0 |" + 100 * "D" and "a column is 10 steps" in lines


@pytest.mark.parametrize(
    ("end", "whole", "expected"),
    [
        (7, True, (1, 7)),
        (101, True, (2, 51)),
        (600, True, (10, 60)),
        (0.3, False, (0.005, 60)),
        (1.0, False, (0.01, 100)),
    ],
)
def test_columns_have_round_widths(end, whole, expected):
    width, columns = columns_of(end, whole=whole)
    assert (pytest.approx(width), columns) == expected


# --- ways of batching ---


def test_all_ways_of_batching_are_on_one_axis_and_their_makespans_marked():
    traces = batching_traces()
    figure = PolicyTimelines(traces).figure()
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    for axes, trace in zip(figure.axes, traces.values(), strict=True):
        marks = {line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "-"}
        assert report(trace).makespan == pytest.approx(marks.pop()) and not marks
        heights = {round(axes.get_position().height, 3) for axes in figure.axes}
    assert len(heights) == 1
    assert [bool(axes.get_xlabel()) for axes in figure.axes] == [False, False, True]


def test_ways_of_batching_in_words_end_in_a_table_of_what_was_computed():
    text = PolicyTimelines(batching_traces()).text()
    for batching, trace in batching_traces().items():
        figures = report(trace)
        line = text.splitlines()[-3 + list(batching_traces()).index(batching)].split()
        assert line[0] == batching
        assert line[-3:] == [str(figures.computed_tokens), str(figures.useful_tokens), f"{figures.utilisation:.1%}"]
    assert "1.00x" in text and "a column is" in text
    assert text.count("w waiting") == 1


def test_stepping_moves_one_moment_through_all_ways_of_batching():
    picture = PolicyTimelines(batching_traces())
    last = picture.caption(picture.num_steps - 1)
    assert picture.caption(0).count("0 of 5 finished") == 3 and last.count("5 of 5 finished") == 3
    figure = picture.figure(step=3)
    moments = [line.get_xdata()[0] for axes in figure.axes for line in axes.lines if line.get_linestyle() == ":"]
    assert moments.count(4 * picture.moment) == 3


# --- composition ---


def test_bars_are_the_tokens_of_the_steps_and_the_line_is_the_budget():
    trace = batching_traces()["continuous"]
    axes = BatchComposition(trace, BUDGET).figure().axes[0]
    for kind in ("prefill", "decode"):
        heights = {round(box.get_x()): box.get_height() for box in boxes_of(axes, kind)}
        for index, step in enumerate(trace.steps):
            assert heights.get(index, 0) == sum(part.num_tokens for part in step.scheduled if part.why == kind)
    assert [list(line.get_ydata()) for line in axes.lines] == [[BUDGET, BUDGET]]
    assert max(step.num_tokens for step in trace.steps) == BUDGET  # the budget was reached


def test_the_composition_in_words():
    trace = padded_trace()
    assert BatchComposition(trace, 8).text() == (
        "step             tokens  decode  prefill  padding\n"
        "----  ---------  ------  ------  -------  -------\n"
        "0     PPPPPxxx|       8       0        5        3\n"
        "1     DD      |       2       2        0        0\n"
        "2     Dx      |       2       1        0        1\n"
        "3     PP      |       2       0        2        0\n"
        "D decode   P prefill   x padding   a letter is 1 token   | the budget of 8 tokens\n"
        "4 steps, 14 tokens: 3 decode, 7 prefill, 4 padding; 43.8% of the budget"
    )
    assert BatchComposition(trace, 8).caption(0) == "step 1 of 4: 5 prefill + 3 padding = 8 of 8 tokens"
    assert "PPPP|Pxxx" in BatchComposition(trace, 4).text()  # a bar that goes beyond the budget


def test_a_long_run_is_drawn_as_means_of_groups():
    trace = Trace([RequestRecord("0", 0.0, 1)])
    for step in range(500):
        trace.steps.append(StepEvent(step, step, step + 1, (ScheduledTokens("0", step, 1 + step % 2, "decode", 1),)))
    picture = BatchComposition(trace)
    bars = picture.bars(100)
    assert len(bars) == 100 and {bar.total for bar in bars} <= {1.4, 1.6}
    assert sum(bar.total * (bar.last_step - bar.first_step + 1) for bar in bars) == pytest.approx(750)
    assert "mean of 5" in picture.figure().axes[0].get_xlabel()
    assert "numbers are means" in picture.text()


# --- rectangles ---


def test_the_chapters_exercise_pads_13_of_30_tokens():
    picture = PaddingRectangle([2, 5, 10])
    assert (picture.num_tokens, picture.num_useful) == (30, 17)
    assert picture.text() == (
        "req 0 |xxxxxxxxPP| 2 of 10 useful\n"
        "req 1 |xxxxxPPPPP| 5 of 10 useful\n"
        "req 2 |PPPPPPPPPP| 10 of 10 useful\n"
        "P prefill   x padding\n"
        "3 × 10 = 30 computed tokens: 17 useful (56.7%), 13 padding"
    )
    axes = picture.figure().axes[0]
    assert (len(boxes_of(axes, "padding")), len(boxes_of(axes, "prefill"))) == (13, 17)
    assert all(box.get_hatch() for box in boxes_of(axes, "padding"))


def test_one_prompt_of_100_beside_eight_decodes_wastes_792_of_900_tokens():
    picture = PaddingRectangle([1] * 8 + [100], why=["decode"] * 8 + ["prefill"])
    assert picture.summary() == "9 × 100 = 900 computed tokens: 108 useful (12.0%), 792 padding"
    axes = picture.figure().axes[0]
    assert sum(box.get_width() for box in boxes_of(axes, "padding")) == 792
    assert len(picture.text().splitlines()[0]) <= 130


@pytest.mark.parametrize("batching", ["static", "dynamic"])
def test_a_step_of_a_padded_trace_is_a_rectangle(batching):
    trace = batching_traces()[batching]
    found = Counter()
    for step in trace.steps:
        picture = PaddingRectangle.of_step(step)
        assert (picture.num_tokens, picture.num_useful) == (step.num_tokens, step.num_useful)
        found.update(row.why for row in picture.rows)
    assert {"prefill", "decode"} <= set(found) and ("padding" in found) == (batching == "static")
    picture = PaddingSteps(trace)
    assert picture.num_steps == len(trace.steps) and picture.chosen[0] == 0
    assert len({tuple(picture.figure(step).get_size_inches()) for step in (0, 1)}) == 1


def test_no_rectangle_from_a_ragged_step():
    with pytest.raises(PictureError, match=r"no rectangle: its rows have lengths \[1, 3\]|no rectangle"):
        PaddingSteps(batching_traces()["continuous"])


# --- block-diagonal masks ---


def test_prompts_computed_in_one_step_have_the_block_diagonal_mask():
    parts = tuple(
        ScheduledTokens(name, 0, length, "prefill", 1) for name, length in zip("abc", (2, 5, 10), strict=True)
    )
    trace = Trace([RequestRecord(name, 0, 1) for name in "abc"], [StepEvent(0, 0, 1, parts)])
    picture = BlockMaskSteps(trace)
    mask = BlockMask(picture.blocks[0])
    assert torch.equal(mask.mask(), block_diagonal([2, 5, 10]))
    assert mask.summary() == "17 × 17 mask, 73 of 289 entries True"
    assert [line[-17:] for line in mask.text().splitlines()[:17]] == [
        "".join("#" if may else "." for may in row) for row in block_diagonal([2, 5, 10]).tolist()
    ]
    dots = next(child for child in mask.figure().axes[0].collections if isinstance(child, PathCollection))
    assert len(dots.get_offsets()) == 73


def test_every_step_has_the_mask_of_what_it_computes_over_what_is_cached():
    trace = batching_traces()["continuous"]
    for step, blocks in zip(trace.steps, blocks_of(trace), strict=True):
        parts = {part.request_id: part for part in step.scheduled}
        expected = torch.block_diag(*(
            rectangular(parts[block.request_id].num_tokens, parts[block.request_id].end) for block in blocks
        )).bool()  # fmt: skip
        mask = BlockMask(blocks)
        assert torch.equal(mask.mask(), expected)
        assert sum(block.num_scores for block in blocks) == int(expected.sum())
        assert mask.text().count("#") - mask.text().count("# looks") == int(expected.sum())


def test_blocks_join_and_leave():
    picture = BlockMaskSteps(batching_traces()["continuous"])
    captions = [picture.caption(step) for step in range(picture.num_steps)]
    assert captions[0].endswith("joined: r0")
    joined = [name for caption in captions for name in _names(caption, "joined: ")]
    left = [name for caption in captions for name in _names(caption, "left: ")]
    assert sorted(joined) == ["r0", "r1", "r2", "r3", "r4"] and len(set(left)) == 4  # the last one is there at the end
    chosen = [[block.request_id for block in picture.blocks[step]] for step in picture.chosen]
    assert all(before != after for before, after in zip(chosen, chosen[1:], strict=False))
    assert len({tuple(picture.figure(step).get_size_inches()) for step in range(3)}) == 1


def _names(caption: str, word: str) -> list[str]:
    return caption.split(word)[1].split(";")[0].split(", ") if word in caption else []


def test_the_drawn_stairs_have_as_many_cells_as_the_mask_has_entries():
    blocks = [Block("a", 3, 2), Block("b", 0, 4), Block("c", 60, 1)]
    axes = BlockMask(blocks).figure().axes[0]
    areas = {patch.get_gid(): _area(patch.get_xy()) for patch in axes.patches if isinstance(patch, Polygon)}
    assert areas == {"a:#": 9, "b:#": 10, "c:#": 61}
    boxes = [box for box in axes.patches if isinstance(box, Rectangle) and box.get_gid()]
    assert {box.get_gid(): box.get_width() for box in boxes} == {"a:o": 3, "a:+": 2, "b:+": 4, "c:o": 60, "c:+": 1}


def _area(corners) -> float:
    """The shoelace formula."""
    pairs = zip(corners, [*corners[1:], corners[0]], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs)) / 2


def test_a_request_between_two_chunks_keeps_its_block_and_a_preempted_one_loses_it():
    steps = [[("a", 0, 3)], [("b", 0, 2)], [("a", 3, 1)], [("a", 0, 5)]]
    trace = Trace([RequestRecord("a", 0, 4), RequestRecord("b", 0, 2)])
    for index, parts in enumerate(steps):
        parts = tuple(ScheduledTokens(*part, "prefill") for part in parts)
        trace.steps.append(StepEvent(index, index, index + 1, parts, ("b",) if index == 1 else ()))
    assert blocks_of(trace) == [
        [Block("a", 0, 3)], [Block("a", 3, 0), Block("b", 0, 2)], [Block("a", 3, 1)], [Block("a", 0, 5)],
    ]  # fmt: skip


# --- what all of them share ---


@pytest.mark.parametrize("name", PICTURES)
def test_the_same_bytes_every_time_and_no_wider_than_a_page(name, tmp_path):
    picture, same = PICTURES[name](), PICTURES[name]()
    svg = picture.save(tmp_path / "first.svg").read_text()
    assert same.save(tmp_path / "second.svg").read_text() == svg and same.text() == picture.text()
    assert float(re.search(r'width="([\d.]+)pt"', svg)[1]) <= 9 * 72
    assert picture.alt() and "\n" not in picture.alt()
    assert not any(line != line.rstrip() for line in picture.text().splitlines())


def test_the_last_bits_of_coordinates_do_not_change_an_svg(monkeypatch):
    picture = PICTURES["blocks"]()
    before, (width, height) = picture.svg(), picture._size()
    assert b"url(#" in before
    monkeypatch.setattr(type(picture), "_size", lambda self: (width * (1 + 1e-14), height))
    assert picture.svg() == before


@pytest.mark.parametrize("name", [name for name, make in PICTURES.items() if make().num_steps])
def test_every_step_has_its_frame(name):
    picture = PICTURES[name]()
    stepper = picture.stepper()
    first = stepper.image.value
    stepper.slider.value = picture.num_steps - 1
    assert stepper.image.value != first and picture.caption(picture.num_steps - 1)[:12] in stepper.caption.value


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PolicyTimelines({}), "no traces"),
        (lambda: PolicyTimelines({"a": Trace()}), "empty"),
        (lambda: PolicyTimelines(batching_traces(), "hours"), "hours"),
        (lambda: BatchComposition(Trace()), "no steps"),
        (lambda: BatchComposition(padded_trace(), 0), "budget is 0"),
        (lambda: PaddingRectangle([]), "0 rows"),
        (lambda: PaddingRectangle([3, 5], 4), "do not fit a padded length of 4"),
        (lambda: PaddingRectangle([3], labels=["a", "b"]), "2 labels"),
        (lambda: BlockMaskSteps(Trace()), "no steps"),
        (lambda: BlockMaskSteps(padded_trace(), steps=[9]), "step 9 is outside"),
        (lambda: BlockMask([]), "no request"),
    ],
)
def test_impossible_data_is_refused_with_the_reason(make, says):
    with pytest.raises(PictureError, match=says):
        make()


def test_the_title_of_panels_stands_above_them():
    figure = Panels([PaddingRectangle([1, 2], title="one")], title="All of it").figure()
    assert figure.get_suptitle() == "All of it" and figure.axes[0].get_title(loc="left") == "one"


def test_many_requests_stay_drawable():
    traces = batching_traces(64)
    for picture in (PolicyTimelines(traces), BatchComposition(traces["continuous"], BUDGET)):
        width, height = picture.figure().get_size_inches()
        assert width <= 9 and height <= 12


def test_the_texts_need_neither_matplotlib_nor_torch():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from minillm.trace.events import *\n"
        "from minillm.viz import *\n"
        "parts = (ScheduledTokens('a', 0, 2, 'prefill', 1),)\n"
        "trace = Trace([RequestRecord('a', 0, 2)], [StepEvent(0, 0, 1, parts)])\n"
        "for make in (BatchComposition, BlockMaskSteps, PaddingSteps, Timeline):\n"
        "    assert repr(make(trace)) == make(trace).text()\n"
        "assert PolicyTimelines({'a': trace}).text() and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- an overview of runs ---


def test_an_overview_has_a_panel_for_each_quantity_and_a_line_for_each_run():
    panels = {
        "requests at once": {"static": [2, 1, 1], "continuous": [2, 2]},
        "held, %": {"static": 3 * [5.0], "continuous": [50, 7.5]},
    }
    picture = RunOverview(panels, title="Half the steps")
    assert [line.split("  ") for line in re.sub(" {2,}", "  ", picture.text()).splitlines()[2:]] == [
        ["requests at once", "1.33 (2)", "2 (2)"],
        ["held, %", "5 (5)", "28.8 (50)"],
    ]
    axes = picture.figure().axes
    assert len(axes) == 2 and axes[0].get_xlim() == axes[1].get_xlim()
    words = [text.get_text() for text in axes[0].texts]
    assert words == ["static: 3 steps", "continuous: 2 steps"]
    assert picture.alt() == "Half the steps: requests at once, held, % step by step; static 3 steps, continuous 2 steps"


@pytest.mark.parametrize(
    "panels", [{}, {"a": {}}, {"a": {"x": []}}, {"a": {"x": [1]}, "b": {"x": [1, 2]}}, {"a": {"x": [1]}, "b": {}}]
)
def test_an_overview_without_equal_runs_is_refused(panels):
    with pytest.raises(PictureError, match="nothing to draw|must have the runs"):
        RunOverview(panels)
