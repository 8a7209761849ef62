"""The waterfall: bars that begin where the last one ended, ranges over orders, and the same in plain text."""

import pytest

from minillm.simulation import Decomposition
from minillm.viz import PictureError, Waterfall

STEPS = [("a", 2.0, 1.0, 4.0), ("b", 4.0), ("c", 0.5, 0.5, 0.5)]


def test_bars_begin_where_the_one_before_has_ended():
    picture = Waterfall(STEPS, first="ours", last="theirs", claim=(3, 5))
    assert picture.ends == [2, 8, 4] and picture.total == 4
    (axes,) = picture.figure().axes
    bars = {(round(bar.get_y() + 0.28), bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches[-4:]}
    assert bars == {(1, 1, 2), (2, 2, 8), (3, 8, 4), (4, 1, 4)}
    assert axes.get_xscale() == "log"
    ranges = [tuple(line.get_xdata()) for line in axes.lines if line.get_marker() == "|"]
    assert ranges == [(1, 4), (4, 4)]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["ours", "a", "b", "c", "theirs"]
    assert [text.get_text() for text in axes.texts] == ["claimed", "2.00", "4.00", "0.50", "4.0"]


def test_the_text_has_the_same_bars():
    picture = Waterfall(STEPS, first="ours", last="theirs", claim=(2, 4))
    lines = picture.text().splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["ours", "a", "b", "c", "theirs", "claimed"]
    bar = {line.split()[0]: line[len(lines[1].rsplit("  ", 1)[0]) + 2 :] for line in lines[2:]}
    assert bar["a"] == "#" * 14 + "-" * 13  # an axis from 1 to 8 in 40 columns: 2 is at 13, 4 at 26
    assert bar["b"] == " " * 13 + "#" * 27 and bar["c"] == " " * 26 + "#" * 14
    assert bar["theirs"] == "#" * 27 and bar["claimed"] == " " * 13 + "=" * 14
    assert "1.00 to 4.00" in lines[3] and "to" not in lines[4]
    assert picture.alt() == "a 2.00, b 4.00, c 0.50; theirs 4.00"


def test_guesses_are_hollow_below_the_measured_bars_and_beside_them_in_the_text():
    picture = Waterfall(STEPS, guesses={"a": 4.0, "c": 2.0, "b": None}, last="theirs")
    assert picture.guessed_total == 8
    (axes,) = picture.figure().axes
    hollow = [bar for bar in axes.patches if bar.get_facecolor()[3] == 0]
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in hollow] == [(1, 4), (8, 16), (1, 8)]
    assert all(bar.get_y() > row + 0.28 for bar, row in zip(hollow, (1, 3, 4), strict=True))
    assert [text.get_text() for text in axes.texts][0] == "2.00 (guessed 4.00)"
    header, _, *lines = picture.text().splitlines()
    cells = {line.split()[0]: line[header.index("guess") - 1 : header.index("guess") + 5].strip() for line in lines}
    assert cells == {"start": "", "a": "4.00", "b": "", "c": "2.00", "theirs": "8.00"}
    start = header.index("product") + len("product  ")
    bar = {line.split()[0]: line[start:] for line in lines}
    assert bar["a"][20] == "o"  # 4 on an axis from 1 to 16 in 40 columns
    assert bar["c"][39] == "o" and bar["theirs"][29] == "o"
    assert picture.alt() == "a 2.00, b 4.00, c 0.50; theirs 4.00; guessed a 4.00, c 2.00, together 8.00"


@pytest.mark.parametrize(
    ("guesses", "says"), [({"d": 2.0}, "guess"), ({"a": 0.0}, "guess of 'a'"), ({"a": "x"}, "'x'")]
)
def test_impossible_guesses_are_refused(guesses, says):
    with pytest.raises(PictureError, match=says):
        Waterfall(STEPS, guesses=guesses)


def test_of_a_decomposition_the_largest_comes_first():
    worth = {"small": 2.0, "large": 3.0}

    def seconds(some):
        return 1.0 if not some else 10.0 if len(some) == 2 else worth[next(iter(some))]

    picture = Waterfall.of(Decomposition.of(tuple(worth), seconds), title="two")
    assert [step.name for step in picture.steps] == ["large", "small"]
    assert picture.total == pytest.approx(10) and picture.alt().startswith("two: large")
    assert (picture.steps[0].low, picture.steps[0].high) == (3, 5)


def test_a_single_factor_of_one_is_drawn():
    picture = Waterfall([("nothing", 1.0)])
    assert picture.png() and "1.00" in picture.text()


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([], "at least one"),
        ([("a", 0.0)], "above 0"),
        ([("a", float("nan"))], "above 0"),
        ([("a", 2.0, 3.0, 4.0)], "outside its range"),
        ([("a", 2.0, 1.0)], "one end"),
    ],
)
def test_impossible_factors_are_refused(steps, says):
    with pytest.raises(PictureError, match=says):
        Waterfall(steps)
