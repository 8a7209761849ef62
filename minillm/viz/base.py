"""What all pictures share: the three forms of a picture, figures without global state, labels and numbers.

matplotlib and ipywidgets are imported only where a figure or a stepper is asked for; the text form needs neither.
"""

import base64
import html
import io
import math
import re
import textwrap
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from minillm.errors import MiniLLMError
from minillm.viz.palette import BLACK, State

MAX_WIDTH = 9.0  # inches; a notebook's and a README's column
DOTS_PER_INCH = 120
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 11, 10, 9  # points; the last is the smallest in use
TEXT_SIGNS = "#.*-_/o+"  # letters of states only in the text form; a figure shows the box
LEGEND_LINE = 0.22  # inches, the height of a line of a legend
SWATCH, SIGN = 0.55, 0.068  # inches: a legend's box, and each sign of its name

# Behind an SVG, instead of the white rectangle that matplotlib draws first: words stay readable on a dark page.
PLATE = '<rect width="100%" height="100%" rx="6" style="fill: #ffffff"/>'

SVG_IDS = re.compile(r'(?<=["#])[A-Za-z][0-9a-f]{10}(?=[")])')  # that matplotlib gives to clip paths, marks and hatches

STYLE = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib, so that every machine draws the same shapes
    "font.size": TEXT_SIZE,
    "axes.titlesize": TITLE_SIZE,
    "axes.labelsize": TEXT_SIZE,
    "xtick.labelsize": SMALL_SIZE,
    "ytick.labelsize": SMALL_SIZE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
    "savefig.dpi": DOTS_PER_INCH,
    "svg.fonttype": "path",
    "svg.hashsalt": "minillm",  # otherwise the ids in an SVG differ from run to run
}


class PictureError(MiniLLMError):
    """The data given cannot be drawn: label counts, lengths or shapes disagree, or there is nothing to draw."""


class Picture(ABC):
    """One picture in three forms: `text()`, `figure()` and, where `num_steps` > 0, `stepper()`.

    A picture depends only on its data and never changes. As the last line of a notebook cell it is displayed.
    """

    title: str | None = None
    num_steps: int = 0
    _title_pad: float = 8  # points between title and axes
    _legend_inches: float = 0.0  # of the height: a legend that several panels can share

    @abstractmethod
    def text(self) -> str:
        """The picture in plain text, without trailing blanks or newline; the same on every machine."""

    @abstractmethod
    def _size(self) -> tuple[float, float]:
        """Width and height in inches, labels included, title not."""

    @abstractmethod
    def _draw(self, axes, step: int | None = None) -> None:
        """Draw into `axes`; with `step`, the state at that step. The caller sets the title."""

    def caption(self, step: int) -> str:
        """One sentence about step `step`; it is also the frame's alternative text."""
        return f"step {step + 1} of {self.num_steps}"

    def figure(self, step: int | None = None):
        """A new `matplotlib.figure.Figure`, unknown to pyplot. Raises PictureError for a step out of range."""
        self._check_step(step)
        with drawing_style():
            figure = new_figure(*self._panel_size())
            self._fill(figure, step)
        return figure

    def stepper(self, interval: int = 1000):
        """A widget with a play button and a slider over the steps; `interval` is milliseconds per frame.

        Raises PictureError if the picture has no steps.
        """
        if self.num_steps == 0:
            raise PictureError(f"{type(self).__name__} has no steps to go through; show its figure() instead")
        from minillm.viz.stepper import Stepper

        return Stepper(self, interval=interval)

    def png(self, step: int | None = None) -> bytes:
        """The figure as PNG, the same bytes for the same data."""
        return self._bytes("png", step, metadata={"Software": None})

    def svg(self, step: int | None = None) -> bytes:
        """The figure as SVG on a plate with round corners, the same bytes for the same data."""
        drawn = self._bytes("svg", step, metadata={"Date": None, "Creator": None}).decode()
        numbers = {name: f"{name[0]}{number}" for number, name in enumerate(dict.fromkeys(SVG_IDS.findall(drawn)))}
        drawn = SVG_IDS.sub(lambda found: numbers[found[0]], drawn)  # they hash coordinates, and so their last bits
        return re.sub(r'<path d="[^"]*" style="fill: #ffffff"/>', PLATE, drawn, count=1).encode()

    def save(self, path: str | Path, step: int | None = None) -> Path:
        """Write the figure (.svg or .png) or the text (.txt) to `path`. Raises PictureError for other endings."""
        path = Path(path)
        writers = {".svg": self.svg, ".png": self.png, ".txt": lambda step: (self.text() + "\n").encode()}
        if path.suffix not in writers:
            raise PictureError(f"cannot write {path.name!r}: the ending must be one of {', '.join(writers)}")
        path.write_bytes(writers[path.suffix](step))
        return path

    def alt(self) -> str:
        """The figure's alternative text in one line."""
        return self.title or type(self).__name__

    def _x_end(self) -> float | None:
        """The end of an x axis that begins at 0 and can be shared; None if there is none."""
        return None

    def _fill(self, figure, step: int | None) -> None:
        axes = figure.add_subplot()
        self._draw(axes, step)
        self._set_title(axes)

    def _set_title(self, axes) -> None:
        if self.title:
            axes.set_title(literal("\n".join(self._title_lines())), loc="left", fontweight="bold", pad=self._title_pad)

    def _title_lines(self) -> list[str]:
        return textwrap.wrap(self.title, max(12, int(9.3 * self._title_width()))) if self.title else []

    def _title_width(self) -> float:
        """Inches from the left end of the axes to the right end of the panel."""
        return 0.88 * self._size()[0]

    def _panel_size(self) -> tuple[float, float]:
        width, height = self._size()
        return width, height + 0.2 * len(self._title_lines())

    def _bytes(self, kind: str, step: int | None, metadata: dict) -> bytes:
        figure = self.figure(step)
        buffer = io.BytesIO()
        with drawing_style():
            figure.savefig(buffer, format=kind, metadata=metadata)
        return buffer.getvalue()

    def _check_step(self, step: int | None) -> None:
        if step is not None and not 0 <= step < self.num_steps:
            raise PictureError(f"step {step} is outside this picture's steps 0..{self.num_steps - 1}")

    def _repr_mimebundle_(self, include=None, exclude=None):
        data = {"text/plain": self.text()}
        with suppress(ImportError):  # no matplotlib: the text form says the same
            data["text/html"] = image_tag(self.png(), self.alt())
        return data

    def __repr__(self) -> str:
        return self.text()


class Panels(Picture):
    """Several pictures in one: next to each other as long as they fit the page, then on a new line.

    `columns` = 1 puts them above each other; `share_x` gives timelines one scale. The stepper steps all of them; one
    with fewer steps than the others stays at its last step.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        *,
        columns: int | None = None,
        share_x: bool = False,
        title: str | None = None,
    ):
        if not pictures:
            raise PictureError("no pictures were given to put side by side")
        if columns is not None and columns < 1:
            raise PictureError(f"columns is {columns}; use 1 or more, or None for as many as fit")
        self.pictures = tuple(pictures)
        self.share_x = share_x
        self.title = title
        self.rows = list(_rows_that_fit(self.pictures, columns))
        self.num_steps = max(picture.num_steps for picture in self.pictures)

    def text(self) -> str:
        parts = [f"{picture.title}\n{picture.text()}" if picture.title else picture.text() for picture in self.pictures]
        return "\n\n".join(parts)

    def caption(self, step: int) -> str:
        stepping = [picture for picture in self.pictures if picture.num_steps]
        return "; ".join(
            (f"{picture.title}: " if picture.title else "") + picture.caption(min(step, picture.num_steps - 1))
            for picture in stepping
        )

    def alt(self) -> str:
        return (f"{self.title}: " if self.title else "") + "; ".join(picture.alt() for picture in self.pictures)

    def _size(self) -> tuple[float, float]:
        sizes = self._panel_sizes()
        width = max(sum(width for width, _ in row) for row in sizes)
        return width, sum(max(height for _, height in row) for row in sizes) + self._legend_height()

    def _draw(self, axes, step: int | None = None) -> None:
        raise NotImplementedError("panels are drawn by _fill, each into its own axes")

    def _fill(self, figure, step: int | None) -> None:
        self._set_title_of_all(figure)
        if self._shares_legend():
            figure.shared_legend = SharedLegend()
        ends = [picture._x_end() for picture in self.pictures if self.share_x]
        for place, picture in zip(self._places(figure), self.pictures, strict=True):
            axes = figure.add_subplot(place)
            if ends and None not in ends:
                axes.set_xlim(0, max(ends))  # a picture keeps limits that are already set
            picture._draw(axes, None if step is None else min(step, picture.num_steps - 1))
            picture._set_title(axes)
        if self._shares_legend():
            figure.shared_legend.draw(figure, self._legend_height())

    def _shares_legend(self) -> bool:
        """Whether several panels have a legend: it is then drawn once, below all of them."""
        return sum(picture._legend_inches > 0 for picture in self.pictures) > 1

    def _panel_sizes(self) -> list[list[tuple[float, float]]]:
        """Per row, the width and height of each panel, without a legend that is drawn once."""
        shared = self._shares_legend()

        def size(picture: Picture) -> tuple[float, float]:
            width, height = picture._panel_size()
            return width, height - shared * picture._legend_inches

        return [list(map(size, row)) for row in self.rows]

    def _legend_height(self) -> float:
        """Inches of the legend that is drawn once; 0 if none is."""
        return max(picture._legend_inches for picture in self.pictures) if self._shares_legend() else 0.0

    def _set_title_of_all(self, figure) -> None:
        if self.title:
            lines = literal("\n".join(self._title_lines()))
            figure.suptitle(lines, x=0.01, ha="left", size=TITLE_SIZE + 1, fontweight="bold")

    def _places(self, figure) -> Iterator:
        """Where each picture goes: one column with common edges, or rows that keep each picture's own size."""
        sizes = self._panel_sizes()
        lines = figure.add_gridspec(len(self.rows), 1, height_ratios=[max(h for _, h in row) for row in sizes])
        for line, row in zip(lines, sizes, strict=True):
            if self.share_x and len(self.rows) == len(self.pictures):
                yield line
                continue
            widths = [width for width, _ in row]
            spare = max(0.01, self._size()[0] - sum(widths))  # left empty, so that all rows have the same scale
            yield from list(line.subgridspec(1, len(row) + 1, width_ratios=[*widths, spare]))[:-1]


def side_by_side(pictures: Sequence[Picture]) -> Panels:
    """Pictures next to each other, on as many lines as the page needs."""
    return Panels(pictures)


def stacked(pictures: Sequence[Picture], *, share_x: bool = True) -> Panels:
    """Pictures above each other; timelines by default on one scale of x."""
    return Panels(pictures, columns=1, share_x=share_x)


def _rows_that_fit(pictures: Sequence[Picture], columns: int | None) -> Iterator[list[Picture]]:
    row: list[Picture] = []
    for picture in pictures:
        width = sum(other._panel_size()[0] for other in row) + picture._panel_size()[0]
        if row and (len(row) == columns or width > MAX_WIDTH):
            yield row
            row = []
        row.append(picture)
    yield row


# --- figures ---


@contextmanager
def drawing_style():
    """matplotlib's defaults and our style, regardless of the reader's settings, which are restored afterwards."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        yield


def new_figure(width: float, height: float):
    """An empty Figure of this size in inches, on its own Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(width, MAX_WIDTH), height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def image_tag(png: bytes, alt: str) -> str:
    """HTML of a PNG with its alternative text. Viewers of notebooks drop the text of a bare PNG."""
    data = base64.b64encode(png).decode()
    return f'<img style="max-width: 100%" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def add_box(axes, x: float, y: float, width: float, height: float, state: State, *, letter: bool = False, **patch):
    """Add a rectangle with the colour, hatch and, if asked, letter of `state`; returns the Rectangle."""
    from matplotlib.patches import Rectangle

    style = {"facecolor": state.color, "edgecolor": state.ink if state.hatch else "white", "hatch": state.hatch}
    box = axes.add_artist(Rectangle((x, y), width, height, **{**style, "linewidth": 0.6, **patch}))
    box.set_in_layout(False)  # it lies within the axes, and measuring every box is slow
    if letter:
        add_letter(axes, x + width / 2, y + height / 2, state)
    return box


def add_letter(axes, x: float, y: float, state: State, *, patch: bool = True) -> None:
    """Write the letter of `state` at a point. With `patch`, a background keeps it readable on a hatch."""
    behind = {"facecolor": state.color, "edgecolor": "none", "pad": 1.2} if patch else None
    letter = axes.text(x, y, state.letter, ha="center", va="center", size=SMALL_SIZE, color=state.ink, bbox=behind)
    letter.set_in_layout(False)


def add_legend(axes, states: Sequence[State], y: float, extra: str = ""):
    """The states' boxes with their names and letters, in a line `y` points below the axes.

    Signs of the text form (#, ., *) are left out. Returns the artist, or None if several panels share one legend, which
    `Panels` draws below the last of them.
    """
    shared = getattr(axes.get_figure(), "shared_legend", None)
    if shared is not None:
        shared.add(states, extra)
        return None
    from matplotlib.transforms import ScaledTranslation

    box = _legend_box([states], extra)
    shift = ScaledTranslation(0, -y / 72, axes.get_figure().dpi_scale_trans)
    box.set_bbox_to_anchor((0, 0), axes.transAxes + shift)
    return axes.add_artist(box)


class SharedLegend:
    """One legend for several panels: each state once, with its letter if any panel shows it."""

    def __init__(self) -> None:
        self.states: dict[tuple[str, str, str], State] = {}
        self.extra = ""

    def add(self, states: Sequence[State], extra: str = "") -> None:
        """Add the legend of one panel."""
        for state in states:
            known = self.states.setdefault((state.name, state.color, state.hatch), state)
            if not known.letter:
                self.states[state.name, state.color, state.hatch] = state
        self.extra = self.extra or extra

    def draw(self, figure, inches: float) -> None:
        """Draw it at the foot of the figure, in a strip of at least this height, which the panels leave free."""
        lines = legend_lines(list(self.states.values()), MAX_WIDTH - 1.2)
        higher = max(0.0, LEGEND_LINE * len(lines) + 0.04 - inches)
        figure.set_figheight(figure.get_figheight() + higher)
        strip = (inches + higher) / figure.get_figheight()
        figure.get_layout_engine().set(rect=(0, strip, 1, 1 - strip))
        box = _legend_box(lines, self.extra)
        box.set_bbox_to_anchor((0.01, strip), figure.transFigure)
        figure.add_artist(box).set_in_layout(False)


def legend_lines(states: Sequence[State], width: float) -> list[list[State]]:
    """The states of a legend in as many lines as `width` inches need."""
    lines: list[list[State]] = [[]]
    for state in states:
        if lines[-1] and sum(SWATCH + SIGN * len(other.name) for other in (*lines[-1], state)) > width:
            lines.append([])
        lines[-1].append(state)
    return lines


def _legend_box(lines: Sequence[Sequence[State]], extra: str):
    """Lines of a legend, with `extra` after the last state. The caller anchors its upper left corner."""
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, VPacker

    entries = [[_legend_entry(state) for state in states] for states in lines]
    if extra:
        entries[-1].append(_text_area(extra))
    rows = [HPacker(children=row, align="center", pad=0, sep=14) for row in entries]
    child = VPacker(children=rows, align="left", pad=0, sep=4)
    return AnchoredOffsetbox("upper left", child=child, frameon=False, pad=0, borderpad=0)


def _legend_entry(state: State):
    from matplotlib.offsetbox import DrawingArea, HPacker
    from matplotlib.patches import Rectangle

    swatch = DrawingArea(14, 11)
    edge = state.ink if state.hatch or state.color == "#FFFFFF" else state.color
    swatch.add_artist(
        Rectangle((0, 0), 14, 11, facecolor=state.color, edgecolor=edge, hatch=state.hatch, linewidth=0.6)
    )
    label = f"{state.letter}  {state.name}" if state.letter and state.letter not in TEXT_SIGNS else state.name
    return HPacker(children=[swatch, _text_area(label)], align="center", pad=0, sep=4)


def _text_area(label: str):
    from matplotlib.offsetbox import TextArea

    return TextArea(label, textprops={"size": SMALL_SIZE, "color": BLACK})


def literal(label: str) -> str:
    """`label` escaped for matplotlib, which takes text between two dollar signs for a formula."""
    return label.replace("$", r"\$")


# --- words and numbers ---


def token_label(token: str) -> str:
    """A token as its label, with visible blanks and line ends."""
    visible = str(token).replace(" ", "␣").replace("\r", "⇤").replace("\n", "↵").replace("\t", "⇥")
    return visible or "∅"


def token_labels(labels: Sequence[str] | None, count: int, what: str) -> list[str] | None:
    """The labels with visible blanks. Raises PictureError unless there are `count`; `what` is their name in it."""
    if labels is None:
        return None
    if len(labels) != count:
        raise PictureError(f"{len(labels)} labels were given for {count} {what}; give one per token, or None")
    return [token_label(label) for label in labels]


def titled(title: str | None, dropped: str) -> str | None:
    """The title of a picture, with a note on the steps its trace has dropped."""
    return title if not dropped else f"{title} ({dropped})" if title else dropped


def noted(text: str, dropped: str) -> str:
    """The text of a picture, with a line on the steps its trace has dropped."""
    return f"{text}\n{dropped}" if dropped else text


def request_label(request_id: str) -> str:
    """ "req 1" for the id "1"; an id that begins with a letter is not changed."""
    return f"req {request_id}" if request_id[:1].isdigit() else request_id


def text_width(text: str) -> int:
    """The columns of `text` in a fixed-width font: two for wide East Asian characters, none for combining marks."""
    wide = sum(unicodedata.east_asian_width(sign) in "WF" for sign in text)
    return len(text) + wide - sum(unicodedata.combining(sign) > 0 for sign in text)


def pad(text: str, width: int, *, right: bool = False) -> str:
    """`text` padded with blanks to `width` columns; with `right`, right-aligned."""
    blanks = " " * (width - text_width(text))
    return blanks + text if right else text + blanks


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table under a header and a rule: the first column left-aligned, the others right-aligned."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(text_width, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        places = enumerate(zip(cells, widths, strict=True))
        aligned = (pad(cell, width, right=index > 0) for index, (cell, width) in places)
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def plural(count: int, noun: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def number(value: float | None, digits: int = 3) -> str:
    """A number as text: whole numbers in full, others to at least `digits` significant digits; "–" for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if float(value).is_integer():
        return f"{int(value):,}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if decimals > 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(decimals, 0)}f}"


def decimal_bytes(count: float) -> str:
    """Bytes in powers of ten, as for disks and bandwidths: 5242880 -> "5.24 MB"."""
    return _scaled_bytes(count, 1000, ("B", "kB", "MB", "GB", "TB"))


def binary_bytes(count: float) -> str:
    """Bytes in powers of two, as memory is often counted: 5242880 -> "5.00 MiB"."""
    return _scaled_bytes(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def both_bytes(count: float) -> str:
    """Bytes in both units: "5.24 MB (5.00 MiB)"."""
    return f"{decimal_bytes(count)} ({binary_bytes(count)})" if count >= 1000 else decimal_bytes(count)


def _scaled_bytes(count: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while power < len(units) - 1 and abs(count) >= base ** (power + 1):
        power += 1
    return f"{count:,.0f} B" if power == 0 else f"{count / base**power:,.2f} {units[power]}"
