"""Pictures: what they say in words, what they draw, that they follow their data, and that they leave no trace."""

import io
import math
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import matplotlib.image
import pytest
import torch
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import to_hex, to_rgb

from minillm.attention.masks import causal, rectangular
from minillm.trace.events import RequestRecord, ScheduledTokens, StepEvent, Trace
from minillm.viz import (
    AttentionWeights,
    Bars,
    CacheGrowth,
    Curves,
    CutMask,
    InfluenceGrid,
    MaskGrid,
    PictureError,
    RecomputeGrid,
    Timeline,
    binary_bytes,
    both_bytes,
    decimal_bytes,
    side_by_side,
    stacked,
)
from minillm.viz import figures as readme_figures
from minillm.viz.base import PLATE, drawing_style, number, text_width, token_label
from minillm.viz.palette import GREEN, SERIES_COLORS, STATES, WHITE

TOKENS = ["Once", " upon", " a", " time", ",", " there", " was"]


def one_request(prompt: int = 3, output: int = 4, *, naive: bool = False, prefill: float = 0.2, decode: float = 0.02):
    """One request "0": a prefill of `prefill` seconds, then passes of `decode` seconds, naive or with a cache."""
    trace, now = Trace([RequestRecord("0", 0.0, prompt)]), 0.0
    for step in range(output):
        length = prompt + step
        if step == 0:
            part = ScheduledTokens("0", 0, prompt, "prefill", 1)
        elif naive:
            part = ScheduledTokens("0", 0, length, "recompute", 1)
        else:
            part = ScheduledTokens("0", length - 1, 1, "decode", 1)
        end = now + (decode if step else prefill)
        finished = ("0",) if step == output - 1 else ()
        trace.steps.append(StepEvent(step, now, end, (part,), finished, cached_tokens=0 if naive else length))
        now = end
    return trace


def three_requests() -> Trace:
    """ "a" runs at once, "b" waits and is prefilled in two chunks, "c" arrives late; "a" is padded at its end."""
    schedule = [
        [("a", 0, 4, "prefill", 1)],
        [("a", 4, 1, "decode", 1), ("b", 0, 3, "prefill", 0)],
        [("a", 5, 1, "padding", 0), ("b", 3, 2, "prefill", 1)],
        [("b", 5, 1, "decode", 1)],
        [("b", 0, 6, "recompute", 0), ("b", 6, 1, "decode", 1), ("c", 0, 2, "prefill", 1)],
    ]
    finished = {2: ("a",), 4: ("b", "c")}
    trace = Trace([RequestRecord("a", 0.0, 4), RequestRecord("b", 0.0, 5), RequestRecord("c", 0.025, 2)])
    for step, parts in enumerate(schedule):
        parts = tuple(ScheduledTokens(*part) for part in parts)
        trace.steps.append(StepEvent(step, step / 100, (step + 1) / 100, parts, finished.get(step, ())))
    return trace


def boxes_of(figure, gid: str):
    return [patch for patch in figure.axes[0].patches if patch.get_gid() == gid]


PICTURES = {
    "influence": lambda: InfluenceGrid(causal(4), TOKENS[:4], title="Measured"),
    "cut": lambda: CutMask(causal(4), TOKENS[:4], cut=3, title="Two chunks"),
    "mask": lambda: MaskGrid(causal(4), TOKENS[:4], title="Causal"),
    "weights": lambda: AttentionWeights(torch.eye(3), TOKENS[:3]),
    "seconds": lambda: Timeline(one_request()),
    "steps": lambda: Timeline(three_requests(), "steps"),
    "recompute": lambda: RecomputeGrid(one_request(naive=True)),
    "cache": lambda: CacheGrowth(one_request(), 524_288),
    "curves": lambda: Curves([1, 2, 4], {"predicted": [1, 2, 4], "measured": [1, 1.5, None]}, "tokens", "seconds"),
    "bars": lambda: Bars({"naive": 18, "cached": 6}),
    "panels": lambda: side_by_side([MaskGrid(causal(2)), MaskGrid(causal(3))]),
}


# --- masks ---


def test_a_mask_in_words():
    assert MaskGrid(causal(4), TOKENS[:4]).text() == (
        "looks at →  Once  ␣upon  ␣a  ␣time\n"
        "      Once  #     .      .   .\n"
        "     ␣upon  #     #      .   .\n"
        "        ␣a  #     #      #   .\n"
        "     ␣time  #     #      #   #\n"
        "# may look   . may not"
    )


def test_a_rectangular_mask_takes_the_rows_labels_from_the_last_columns():
    picture = MaskGrid(rectangular(2, 4), key_labels=TOKENS[:4], highlight_row=1)
    assert picture.text().splitlines()[1:3] == [
        "        ␣a  #     #      #   .",
        "     ␣time  #     #      #   #  ←",
    ]


def test_a_wide_mask_is_written_closely_and_an_unlabelled_one_with_numbers():
    wide = MaskGrid(causal(40)).text().splitlines()
    assert wide[0] == "         0  #" + "." * 39
    assert MaskGrid([[True, False]]).text() == "looks at →  0 1\n         0  # .\n# may look   . may not"


def test_captions_read_the_mask_row_by_row():
    picture = MaskGrid(causal(7), TOKENS)
    assert picture.num_steps == 7
    assert picture.caption(3) == "token 3 ␣time sees: Once, ␣upon, ␣a, ␣time — 4 of 7"
    assert MaskGrid(rectangular(3, 7)).caption(0) == "token 4 sees: 0, 1, 2, 3, 4 — 5 of 7"
    assert MaskGrid([[False, False]]).caption(0).endswith("sees: nobody — 0 of 2")


def test_a_mask_is_cut_into_two_chunks():
    assert CutMask(causal(3), TOKENS[:3], cut=2).text() == (
        "looks at →  Once  ␣upon  ␣a\n"
        "      Once  #     .      x\n"
        "     ␣upon  #     #      x\n"
        "---------------------------\n"
        "        ␣a  #     #      #\n"
        "# may look   . may not   x cut off, was empty"
    )
    for cut in (0, 3, -1):
        with pytest.raises(PictureError, match=f"cut is {cut}; .* the 3 rows"):
            CutMask(causal(3), cut=cut)


@pytest.mark.parametrize("mask", [causal(7), rectangular(3, 7), causal(7, window=2), causal(20), causal(1)])
def test_as_many_green_cells_and_marks_as_the_mask_allows_looks(mask):
    axes = MaskGrid(mask).figure().axes[0]
    mesh = next(child for child in axes.collections if isinstance(child, QuadMesh))
    green = [tuple(color) == pytest.approx(to_rgb(GREEN)) for color in mesh.get_array().reshape(-1, 3)]
    marks = next(child for child in axes.collections if isinstance(child, PathCollection))
    assert sum(green) == len(marks.get_offsets()) == int(mask.sum())
    assert [bool(cell) for cell in green] == mask.flatten().tolist()


def test_the_same_weight_has_the_same_colour_in_every_row():
    (axes,) = AttentionWeights(torch.eye(3), highlight_row=1).figure().axes
    (cells,) = [each for each in axes.collections if isinstance(each, QuadMesh)]
    colours = cells.get_array().reshape(3, 3, 3)
    assert [tuple(colours[row, row]) for row in range(3)] == 3 * [pytest.approx(to_rgb(GREEN))]


def test_influence_is_not_called_looking():
    picture = InfluenceGrid(causal(3), TOKENS[:3], title="measured")
    assert picture.text().splitlines()[0] == "replaced token →  Once  ␣upon  ␣a"
    assert picture.caption(1) == "the row of token 1 ␣upon changes with: Once, ␣upon"
    said = [text.get_text() for text in picture.figure().axes[0].texts] + [picture.figure().axes[0].get_xlabel()]
    assert "replaced token →" in said and "row that\nchanged ↓" in said
    for words in (picture.text(), picture.caption(1), picture.alt(), *said):
        assert "look" not in words and "sees" not in words


def test_a_column_can_be_framed_too():
    (axes,) = MaskGrid(causal(4), highlight_row=3, highlight_column=2).figure().axes
    assert [(patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches] == [
        ((0, 3), 4, 1), ((2, 0), 1, 4),
    ]  # fmt: skip
    with pytest.raises(PictureError, match="highlight_column is 4"):
        MaskGrid(causal(4), highlight_column=4)


def test_shares_on_axes_of_the_same_length_can_be_compared():
    shares = {"certain": {"Paris": 0.998}, "hesitant": {"John": 0.203}}
    figure = side_by_side([Bars(values, x_end=1, width=3.0, title=name) for name, values in shares.items()]).figure()
    assert [axes.get_xlim() for axes in figure.axes] == [(0, 1), (0, 1)]
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().y0 == figure.axes[1].get_position().y0  # side by side, not stacked
    with pytest.raises(PictureError, match="ends at 1"):
        Bars({"a": 1.1}, x_end=1)


def test_weights_in_words_and_in_the_figure():
    weights = [[1.0, 0.0], [0.254, 0.746]]
    picture = AttentionWeights(weights, ["a", "b"])
    assert picture.text() == "looks at →  a     b\n         a  1.00  0.00\n         b  0.25  0.75\neach row sums to 1"
    assert picture.caption(1) == "token 1 b looks most at b: weight 0.75"
    written = {text.get_text() for text in picture.figure().axes[0].texts}
    assert {"1.00", "0.00", "0.25", "0.75"} <= written


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MaskGrid(causal(3), ["a", "b"]), "2 labels were given for 3 rows"),
        (lambda: MaskGrid(causal(3), key_labels=["a"]), "1 labels were given for 3 columns"),
        (lambda: MaskGrid(causal(0)), "empty grid"),
        (lambda: MaskGrid(torch.ones(3)), "two dimensions"),
        (lambda: MaskGrid(torch.ones(2, 3, 3)), "pick one head"),
        (lambda: MaskGrid([[1, 0], [1]]), r"lengths \[1, 2\]"),
        (lambda: MaskGrid(causal(3), highlight_row=3), "highlight_row is 3"),
        (lambda: MaskGrid(causal(3)).figure(step=3), "step 3 is outside"),
        (lambda: AttentionWeights([[1.5]]), "after"),
        (lambda: Timeline(Trace()), "empty"),
        (lambda: Timeline(one_request(), "hours"), "hours"),
        (lambda: RecomputeGrid(one_request(), "7"), "not in the trace"),
        (lambda: RecomputeGrid(three_requests()), "3 requests; name one"),
        (lambda: RecomputeGrid(one_request(), token_labels=["a"]), "1 labels were given for 6 positions"),
        (lambda: CacheGrowth(one_request(), 0), "bytes_per_token is 0"),
        (lambda: CacheGrowth(Trace(), 8), "no steps"),
        (lambda: Curves([1, 2], {"a": [1]}, "x", "y"), "1 values for 2"),
        (lambda: Curves([0], {"a": [1]}, "x", "y", log_x=True), "logarithmic"),
        (lambda: Curves([1], {"a": [1]}, "x", "y", ratio=("a", "b")), "b"),
        (lambda: Bars({}), "at least one value"),
        (lambda: Bars({"a": -1}), "none below 0"),
        (lambda: side_by_side([]), "no pictures"),
        (lambda: Bars({"a": 1}).stepper(), "no steps"),
        (lambda: Bars({"a": 1}).save("picture.jpeg"), ".svg, .png, .txt"),
    ],
)
def test_impossible_data_is_refused_with_the_reason(make, says):
    with pytest.raises(PictureError, match=says):
        make()


# --- timelines ---


def test_a_timeline_in_steps():
    assert Timeline(three_requests(), "steps").text() == (
        "step  0\n"
        "a    |PDx..\n"
        "b    |wPPDR\n"
        "c    |   wP\n"
        "w waiting   P prefill   D decode   R recompute   x padding   . finished"
    )


def test_a_timeline_in_milliseconds():
    assert Timeline(one_request(prompt=7, output=100)).text() == (
        "req 0\n"
        "  P prefill          0.0 –     200.0 ms  7 tokens\n"
        "  D decode         200.0 –   2,180.0 ms  99 tokens in 99 steps of 20.0 ms\n"
        "  TTFT 200 ms, ITL 20.0 ms"
    )


def test_a_long_timeline_goes_on_below():
    lines = Timeline(one_request(output=250), "steps").text().splitlines()
    assert [len(line) for line in lines if line.startswith("req 0")] == [107, 107, 57]
    assert lines[2].split()[:3] == ["step", "100", "105"]


def test_boxes_are_as_wide_as_the_steps_took():
    trace = one_request(prompt=5, output=6)
    figure = Timeline(trace).figure()
    widths = [box.get_width() for state in ("prefill", "decode") for box in boxes_of(figure, f"0:{state}")]
    assert widths == pytest.approx([step.duration for step in trace.steps])
    in_steps = Timeline(trace, "steps").figure()
    assert [box.get_width() for box in boxes_of(in_steps, "0:decode")] == [1] * 5


def test_waiting_lasts_from_the_arrival_to_the_first_step():
    timeline = Timeline(three_requests())
    waits = [(box.start, box.end) for box in timeline.boxes("c") if box.state == "waiting"]
    assert waits == [pytest.approx((0.025, 0.04))]
    assert [box.state for box in timeline.boxes("b")] == ["waiting", "prefill", "prefill", "decode", "recompute"]
    assert [box.num_tokens for box in timeline.boxes("b")] == [0, 3, 2, 1, 7]


def test_the_pause_between_two_passes_is_not_waiting():
    trace = one_request(output=3)
    trace.steps[1:] = [replace(s, start_time=s.start_time + 1e-3, end_time=s.end_time + 1e-3) for s in trace.steps[1:]]
    assert {box.state for box in Timeline(trace).boxes("0")} == {"prefill", "decode"}


def test_the_measures_are_those_of_the_trace():
    trace = three_requests()
    timeline, in_steps = Timeline(trace), Timeline(trace, "steps")
    for request_id in "abc":
        assert timeline.ttft(request_id) == pytest.approx(trace.ttft(request_id))
    assert timeline.mean_itl("b") == pytest.approx(sum(trace.inter_token_latencies("b")) / 2)
    assert (in_steps.ttft("b"), in_steps.mean_itl("b")) == (3, 1)
    assert (in_steps.ttft("c"), in_steps.mean_itl("c")) == (2, None)


def test_brackets_carry_the_measured_times():
    written = [text.get_text() for text in Timeline(one_request()).figure().axes[0].texts]
    assert "TTFT 200 ms" in written and "ITL 20.0 ms (mean of 3)" in written


def test_sampled_tokens_stand_on_the_timeline():
    picture = Timeline(one_request(), "steps", sampled_tokens={"0": [" a", " big", " red", " $x$"]})
    written = [text.get_text() for text in picture.figure().axes[0].texts]
    assert {"␣a", "␣big", "␣red", r"␣\$x\$"} <= set(written)


def test_a_request_without_a_token_and_one_that_never_runs_can_be_drawn():
    trace = one_request(output=1)
    trace.steps = [
        replace(trace.steps[0], scheduled=(replace(trace.steps[0].scheduled[0], num_sampled=0),), finished=())
    ]
    trace.requests.append(RequestRecord("late", 0.0, 3))
    assert "TTFT –, ITL –" in Timeline(trace).text()
    assert Timeline(trace, "steps").text().splitlines()[2] == "late  |w"
    assert Timeline(trace).png() and Timeline(trace, "steps").png()


@pytest.mark.parametrize("unit", ["s", "steps"])
def test_many_requests_and_steps_stay_drawable(unit):
    trace = Trace()
    for number_ in range(60):
        trace.requests.append(RequestRecord(f"r{number_}", number_ / 50, 8))
    for step in range(240):
        parts = [
            ScheduledTokens(f"r{r}", max(0, step - 4 * r) * 2, 2, "prefill" if step - 4 * r < 4 else "decode", 1)
            for r in range(60)
            if 4 * r <= step < 4 * r + 40
        ]
        trace.steps.append(StepEvent(step, step / 50, (step + 1) / 50, tuple(parts)))
    picture = Timeline(trace, unit)
    assert len(picture.text().splitlines()) in (62, 3 * 61 + 1)
    assert picture.figure().get_size_inches()[0] <= 9


def test_stacked_timelines_share_their_scale():
    naive = Timeline(one_request(naive=True, decode=0.2), title="naive")
    cached = Timeline(one_request(), title="cached")
    figure = stacked([naive, cached]).figure()
    assert [axes.get_xlim() for axes in figure.axes] == [pytest.approx((0, 0.8))] * 2
    assert stacked([naive, cached]).text() == f"naive\n{naive.text()}\n\ncached\n{cached.text()}"


# --- recomputation, cache, curves, bars ---


def test_recomputation_in_words():
    assert RecomputeGrid(one_request(prompt=3, output=3, naive=True)).text() == (
        "pass  position  computed / new\n"
        "   1  NNN                3 / 3\n"
        "   2  RRRN               4 / 1\n"
        "   3  RRRRN              5 / 1\n"
        "N new   R computed again\n"
        "12 tokens computed, 5 needed: 2.40 times the work"
    )
    caption = RecomputeGrid(one_request(prompt=3, output=3, naive=True)).caption(2)
    assert caption == "pass 3 of 3 computes 5 tokens, 4 of them again; so far 12 computed, 5 needed"
    assert "   3  ccccN              1 / 1" in RecomputeGrid(one_request(prompt=3, output=3)).text()


def test_recomputation_is_read_from_the_tokens_not_from_the_label():
    honest = one_request(naive=True)
    mislabelled = one_request(naive=True)
    for index, step in enumerate(mislabelled.steps):
        parts = tuple(replace(part, why="decode") for part in step.scheduled)
        mislabelled.steps[index] = replace(step, scheduled=parts)
    assert RecomputeGrid(mislabelled).text() == RecomputeGrid(honest).text()


def test_every_computed_token_is_one_box():
    picture = RecomputeGrid(one_request(prompt=3, output=4, naive=True))
    figure = picture.figure()
    again = boxes_of(figure, "R")
    new = boxes_of(figure, "N")
    assert (len(again), len(new)) == (3 + 4 + 5, 6) == (picture.num_computed - picture.num_needed, picture.num_needed)
    large = RecomputeGrid(one_request(prompt=3, output=60, naive=True))
    widths = [box.get_width() for gid in "RN" for box in boxes_of(large.figure(), gid)]
    assert sum(widths) == large.num_computed


def test_padding_is_not_counted_as_recomputation():
    assert RecomputeGrid(three_requests(), "a").summary() == "5 tokens computed, 5 needed: each just once"


def test_the_growth_of_the_cache_in_both_countings():
    picture = CacheGrowth(one_request(prompt=7, output=2), 524_288)
    assert picture.text() == (
        "step  cached tokens      bytes  decimal    binary\n"
        "----  -------------  ---------  -------  --------\n"
        "0                 7  3,670,016  3.67 MB  3.50 MiB\n"
        "1                 8  4,194,304  4.19 MB  4.00 MiB"
    )
    axes = picture.figure().axes[0]
    assert axes.texts[0].get_text() == "8 tokens × 524,288 B = 4.19 MB (4.00 MiB)"
    assert [patch.get_data().values.tolist() for patch in axes.patches] == [[7, 8]] * 2


def test_curves_in_words_and_in_the_figure():
    series = {"predicted": [1.5, 2, 4], "measured": [1, 1.25, None]}
    picture = Curves([10, 20, 40], series, "tokens", "speed-up", ratio=("measured", "predicted"))
    assert picture.text() == (
        "speed-up\n"
        "tokens  predicted  measured  measured / predicted\n"
        "------  ---------  --------  --------------------\n"
        "10           1.50         1                 0.667\n"
        "20              2      1.25                 0.625\n"
        "40              4         –                     –"
    )
    predicted, measured = picture.figure().axes[0].lines
    assert (predicted.get_linestyle(), measured.get_marker()) == ("--", "s")
    assert list(measured.get_ydata())[:2] == [1, 1.25] and math.isnan(measured.get_ydata()[2])
    assert {text.get_text() for text in picture.figure().axes[0].texts} == {"predicted", "measured"}


def test_what_is_computed_is_dashed_and_what_is_marked_is_named_level_and_in_the_text():
    sums = {"a": [1, 2, 4], "b": [2, 2, 2], "at least": [2, 2, 4]}
    picture = Curves(
        [1, 2, 4], sums, "tokens", "ms", kinds=dict.fromkeys(sums, "predicted"), thick="at least",
        limits={"most": 3}, marks={"a": 2, "half": 3}, points={"here": (2, 2)}, sides=(2, "left", "right"),
    )  # fmt: skip
    assert picture.text().splitlines()[-5:] == [
        "most: ms 3", "a: at tokens 2", "half: at tokens 3", "here: at 2, 2", "below 2: left; above: right"
    ]  # fmt: skip
    (axes,) = picture.figure().axes
    lines = [line for line in axes.lines if line.get_label() in sums]
    assert {(line.get_linestyle(), line.get_marker()) for line in lines} == {("--", "None")}
    assert [line.get_linewidth() for line in lines] == [1.5, 1.5, 3]
    assert {text.get_rotation() for text in axes.texts} == {0}
    assert {"a: 2", "half: 3", "here", "← left  ", "  right →"} <= {text.get_text() for text in axes.texts}


def test_waste_in_bars_is_grey_and_the_rest_keeps_its_colours():
    values = {"one": {"pads": 1, "useful": 2, "empty": 3, "other": 4}}
    looks = Bars(values, waste=("pads", "empty")).figure().axes[0].patches
    assert [to_hex(bar.get_facecolor()).upper() for bar in looks] == [WHITE, SERIES_COLORS[0], WHITE, SERIES_COLORS[1]]
    assert [bool(bar.get_hatch()) for bar in looks] == [True, False, True, True] and looks[0].get_hatch() != looks[
        2
    ].get_hatch()


def test_ticks_of_bytes_are_whole():
    axes = Bars({"a": 150e9}, form=decimal_bytes).figure().axes[0]
    assert (
        axes.xaxis.get_major_formatter()(50e9, 0) == "50 GB"
        and axes.xaxis.get_major_formatter()(12.5e9, 0) == "12.50 GB"
    )


def test_names_at_the_ends_of_curves_do_not_touch():
    series = {f"series {index}": [1, 2 + index / 100] for index in range(5)}
    axes = Curves([1, 2], series, "x", "y", log_x=True, log_y=True).figure().axes[0]
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 0.05


def test_bars_say_what_fits():
    values = {"7B": {"weights": 13.5e9, "cache": 2.1e9}, "70B": {"weights": 138e9}}
    picture = Bars(values, limits={"24 GB": 24e9}, form=decimal_bytes)
    assert picture.text() == (
        "       weights    cache      total      24 GB\n"
        "---  ---------  -------  ---------  ---------\n"
        "7B    13.50 GB  2.10 GB   15.60 GB       fits\n"
        "70B  138.00 GB        –  138.00 GB  too large"
    )
    widths = [bar.get_width() for bar in picture.figure().axes[0].patches]
    assert widths == [13.5e9, 2.1e9, 138e9]


@pytest.mark.parametrize(
    ("value", "says"),
    [(0, "0"), (7, "7"), (1234.0, "1,234"), (2.4, "2.40"), (0.0123, "0.0123"), (33.18, "33.2"), (1234.5, "1,234")],
)
def test_numbers_are_rounded_to_read(value, says):
    assert number(value) == says
    assert number(-value) == (says if value == 0 else f"-{says}")


def test_numbers_and_labels_at_the_edge():
    assert [number(value) for value in (None, math.nan, math.inf, 1.23e-9)] == ["–", "–", "∞", "1.23e-09"]
    assert [token_label(token) for token in (" a", "\n", "", "\t")] == ["␣a", "↵", "∅", "⇥"]
    assert text_width("法国 é") == 6
    assert (decimal_bytes(524_288_000), binary_bytes(524_288_000)) == ("524.29 MB", "500.00 MiB")
    assert both_bytes(999) == "999 B"


# --- what all pictures share ---


@pytest.mark.parametrize("name", PICTURES)
def test_saving_twice_gives_the_same_bytes(name, tmp_path):
    for kind in ("svg", "png", "txt"):
        first = PICTURES[name]().save(tmp_path / f"first.{kind}").read_bytes()
        assert PICTURES[name]().save(tmp_path / f"second.{kind}").read_bytes() == first
    svg = (tmp_path / "first.svg").read_text()
    assert "<dc:date>" not in svg and str(tmp_path) not in svg
    assert svg.index(PLATE) < svg.index("<path")  # the first that is drawn


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_opaque_so_that_a_dark_page_does_not_swallow_its_words(name):
    image = matplotlib.image.imread(io.BytesIO(PICTURES[name]().png()))  # [height, width, RGBA]
    assert (image[:, :, 3] == 1).all()


class Image(HTMLParser):
    """What a reader gets of a picture in HTML: its bytes and its alternative text."""

    def handle_starttag(self, tag, attributes):
        assert tag == "img"
        self.src, self.alt = dict(attributes)["src"], dict(attributes)["alt"]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_itself_in_a_notebook(name):
    picture = PICTURES[name]()
    data = picture._repr_mimebundle_()
    assert data["text/plain"] == picture.text() and data.keys() == {"text/plain", "text/html"}
    image = Image()
    image.feed(data["text/html"])
    assert image.src.startswith("data:image/png;base64,iVBORw0KGgo")
    assert image.alt == picture.alt() and image.alt.strip() and "\n" not in image.alt
    assert not any(line != line.rstrip() for line in picture.text().splitlines())
    assert picture.figure().get_size_inches()[0] <= 9


def test_nothing_global_is_changed():
    code = (
        "import sys, matplotlib\n"
        "from minillm.viz import Bars, MaskGrid\n"
        "def settings(): return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != 'backend'}\n"
        "before = settings()\n"
        "for picture in (MaskGrid([[1, 0], [1, 1]]), Bars({'a': 1})):\n"
        "    picture.png(), picture.svg(), picture.figure()\n"
        "assert settings() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readers_settings_do_not_reach_in():
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "mine", "axes.facecolor": "black"}):
        loud = PICTURES["curves"]().svg()
        assert matplotlib.rcParams["font.size"] == 30
    assert loud == PICTURES["curves"]().svg()


@pytest.mark.parametrize("name", ["seconds", "steps"])
def test_another_trace_gives_another_timeline(name):
    changed = one_request(output=5, decode=0.03) if name == "seconds" else one_request(output=5)
    unit = "s" if name == "seconds" else "steps"
    assert Timeline(changed, unit).png() != PICTURES[name]().png()
    assert Timeline(changed, unit).text() != PICTURES[name]().text()


def test_the_text_needs_neither_matplotlib_nor_widgets():
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['ipywidgets'] = None\n"
        "from minillm.viz import Bars, MaskGrid\n"
        "picture = MaskGrid([[True]], ['Once'])\n"
        "assert picture._repr_mimebundle_() == {'text/plain': picture.text()} == {'text/plain': repr(picture)}\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_states_differ_in_letter_and_in_colour_or_hatch():
    letters = [state.letter for state in STATES.values()]
    assert len(set(letters)) == len(letters)
    looks = {(state.color, state.hatch) for key, state in STATES.items() if key != "finished"}
    assert len(looks) == len(STATES) - 1


# --- steppers ---


@pytest.mark.parametrize("name", ["mask", "weights", "seconds", "steps", "recompute", "cache", "panels"])
def test_moving_the_slider_shows_another_frame(name):
    picture = PICTURES[name]()
    stepper = picture.stepper()
    assert (stepper.slider.min, stepper.slider.max) == (0, picture.num_steps - 1)
    first = stepper.image.value
    assert "data:image/png;base64," in first and 'alt="' in first
    stepper.slider.value = picture.num_steps - 1
    assert stepper.image.value != first
    assert picture.caption(picture.num_steps - 1).split(",")[0] in stepper.caption.value
    stepper.slider.value = 0
    assert stepper.image.value == first


def test_the_play_button_and_the_slider_are_one(monkeypatch):
    import ipywidgets

    links = []
    monkeypatch.setattr(ipywidgets, "jslink", lambda source, target: links.append((source, target)))
    stepper = MaskGrid(causal(3)).stepper(interval=250)
    assert links == [((stepper.play, "value"), (stepper.slider, "value"))]
    assert (stepper.play.interval, stepper.play.max, stepper.slider.max) == (250, 2, 2)
    assert repr(stepper) == "Stepper(3 steps)"  # short: it is what a notebook keeps of the widget


def test_captions_cannot_break_out_of_the_page():
    stepper = MaskGrid(causal(1), ['<b>"x"']).stepper()
    assert "<b>" not in stepper.image.value and "<b>" not in stepper.caption.value


# --- the README's figures ---


def test_the_blocks_of_requests_are_framed_and_their_tokens_tinted():
    mask = [[row // 2 == column // 2 and column <= row for column in range(4)] for row in range(4)]
    picture = MaskGrid(mask, list("abcd"), requests={"A": 2, "B": 2})
    axes = picture.figure().axes[0]
    frames = [patch for patch in axes.patches if str(patch.get_gid()).startswith("block")]
    assert [(frame.get_xy(), frame.get_width(), frame.get_height()) for frame in frames] == [
        ((0, 0), 2, 2),
        ((2, 2), 2, 2),
    ]
    tints = [label.get_bbox_patch().get_facecolor() for label in axes.get_xticklabels()]
    assert tints[0] == tints[1] != tints[2] == tints[3]
    assert picture.text().endswith("\nrows and columns of A 0–1, B 2–3")
    with pytest.raises(PictureError, match="4 rows and 4"):
        MaskGrid(mask, requests={"A": 2, "B": 3})


def test_cells_of_grids_side_by_side_are_equally_large():
    grids = [MaskGrid([[1] * count] * count, list("abcde"[:count]), cell=0.42) for count in (2, 5)]
    figure = side_by_side(grids).figure()
    figure.canvas.draw()
    sides = [axes.transData.transform([[0, 0], [1, 0]])[:, 0] for axes in figure.axes]
    assert sides[0][1] - sides[0][0] == pytest.approx(sides[1][1] - sides[1][0], rel=0.1)


@pytest.mark.parametrize("name", readme_figures.FIGURES)
def test_the_readme_shows_what_the_code_draws_now(name):
    committed = readme_figures.FOLDER / name
    assert committed.is_file(), f"{name} is missing; run: make figures"
    assert readme_figures.FIGURES[name]().svg() == committed.read_bytes(), "run: make figures"


def test_drawing_style_is_undone_after_an_error():
    before = matplotlib.rcParams["font.size"]
    with pytest.raises(RuntimeError), drawing_style():
        raise RuntimeError
    assert matplotlib.rcParams["font.size"] == before
