"""One colour, one meaning, in package, player and guide; and every word is readable on what lies under it."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

import test_diagrams
import test_viz
import test_viz_batching
import test_viz_blocks
import test_viz_kernels
from minillm.viz import block_masks, palette
from minillm.viz.base import drawing_style
from minillm.viz.palette import MEANINGS, STATES, State, contrast, ink_on

ROOT = Path(__file__).resolve().parents[1]
LEAST = 4.5  # WCAG 2.2, success criterion 1.4.3
NAMED = {name: value for name, value in vars(palette).items() if isinstance(value, State)}
ALL_STATES = {**NAMED, **STATES, "looks": block_masks.LOOKS, "computed": block_masks.COMPUTED}
PICTURES = {
    f"{module.__name__}: {name}": make
    for module in (test_diagrams, test_viz, test_viz_batching, test_viz_blocks, test_viz_kernels)
    for name, make in module.PICTURES.items()
}


# --- one meaning ---


def test_every_state_has_a_colour_with_a_meaning():
    assert {name: state.color for name, state in ALL_STATES.items() if state.color not in MEANINGS} == {}


@pytest.mark.parametrize(
    ("color", "states"),
    [
        (palette.GREEN, {"MAY_LOOK", "CHANGED", "SEEN", "looks"}),
        (palette.BLUE, {"prefill"}),
        (palette.ORANGE, {"decode", "COMPUTES"}),
        (palette.SKY_BLUE, {"NEW", "computed"}),
        (palette.VERMILLION, {"recompute", "AGAIN"}),
        (palette.YELLOW, {"preempted"}),
        (palette.SLATE, {"swapped"}),
        (palette.VIOLET, {"HELD", "ASKED"}),
    ],
)
def test_a_strong_colour_has_one_meaning(color, states):
    assert {name for name, state in ALL_STATES.items() if state.color == color} == states


def test_waste_is_grey_and_hatched():
    for name in ("padding", "EMPTY", "EXTERNAL", "MASKED", "UNASKED", "IDLE", "waiting", "WAITS"):
        state = ALL_STATES[name]
        assert state.hatch and state.ink == palette.GREY and state.color in (palette.WHITE, palette.LIGHT_GREY), name


def test_requests_parts_and_lines_take_no_colour_that_means_a_state():
    taken = {state.color for state in ALL_STATES.values()}
    others = [*palette.OWNER_COLORS, *palette.PART_COLORS, *palette.SERIES_COLORS]
    assert taken & set(others) == {palette.VIOLET}  # the first line and the last part are the useful thing itself
    assert len(set(palette.OWNER_COLORS) | set(palette.PART_COLORS)) == 12


def test_the_guide_lists_the_colours():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(#[0-9A-F]{6})` [^|]*\| ([^|]+?) \|$", guide, flags=re.MULTILINE)
    assert dict(rows) == MEANINGS and len(rows) == len(MEANINGS)


# --- contrast ---


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21) and contrast("#777777", "#FFFFFF") == pytest.approx(
        4.48, abs=0.01
    )
    assert contrast("#0072B2", "#0072B2") == 1
    assert min(contrast(color, ink_on(color)) for color in ("#757575", "#777777", "#D55E00", "#0072B2")) > LEAST


@pytest.mark.parametrize("name", ALL_STATES)
def test_a_state_is_readable_in_its_own_colour(name):
    state = ALL_STATES[name]
    assert contrast(state.ink, state.color) >= LEAST


def test_names_of_lines_are_readable_on_white_and_letters_on_tints():
    assert min(contrast(color, palette.WHITE) for color in palette.SERIES_COLORS) >= LEAST
    assert min(contrast(color, palette.BLACK) for color in palette.OWNER_COLORS) >= LEAST


def words_and_grounds(figure) -> list[tuple[str, float]]:
    """Each piece of text of a figure, and the contrast to its own patch, or else to what is mostly under it."""
    words = [each for each in figure.findobj(Text) if each.get_text().strip() and each.get_visible()]
    figure.canvas.draw()
    extents = [each.get_window_extent() for each in words]
    found = []
    for each in words:
        each.set_alpha(0)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[:, :, :3]
    for each, extent in zip(words, extents, strict=True):
        patch = each.get_bbox_patch()
        if patch is not None and patch.get_facecolor()[3] == 1:
            ground = to_hex(patch.get_facecolor())
        else:
            rows = slice(max(0, int(pixels.shape[0] - extent.y1)), max(1, int(pixels.shape[0] - extent.y0)))
            under = pixels[rows, max(0, int(extent.x0)) : max(1, int(extent.x1))].reshape(-1, 3)
            if not len(under):
                continue  # outside the figure: nobody reads it
            ground = "#{:02x}{:02x}{:02x}".format(*Counter(map(tuple, under.tolist())).most_common(1)[0][0])
        found.append((each.get_text(), contrast(to_hex(each.get_color()), ground)))
    return found


@pytest.mark.parametrize("name", PICTURES)
def test_all_words_of_a_picture_are_readable(name):
    with drawing_style():
        found = words_and_grounds(PICTURES[name]().figure())
    assert found
    assert [(word, round(ratio, 2)) for word, ratio in found if ratio < LEAST] == []


def test_pale_words_would_be_found():
    picture = test_viz.PICTURES["bars"]()
    with drawing_style():
        figure = picture.figure()
        figure.axes[0].texts[0].set(color="#999999", bbox=None)
        assert [word for word, ratio in words_and_grounds(figure) if ratio < LEAST] == ["18"]
