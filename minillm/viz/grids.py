"""Grids of tokens by tokens: which token may look at which, and with how much weight."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from minillm.viz.base import (
    SMALL_SIZE,
    Picture,
    PictureError,
    add_box,
    add_legend,
    literal,
    pad,
    plural,
    text_width,
    token_labels,
)
from minillm.viz.palette import (
    BLACK,
    CHANGED,
    DROPPED,
    GREEN,
    GREY,
    MAY_LOOK,
    MAY_NOT,
    OWNER_COLORS,
    RED,
    SAME,
    ink_on,
)

MAX_MARKED = 40  # cells per side up to which each cell gets its own mark and border
BORDER = "#BBBBBB"
LETTER_WIDTH = 0.085  # inches, of the small type
MAX_TEXT_WIDTH = 100  # columns of plain text up to which the key labels stand above their cells


class TokenGrid(Picture):
    """A grid [T_query, T_key]: row = the token that looks, column = the token it looks at. Steps = rows."""

    legend = ""
    across, down = "looks at →", "looking\ntoken ↓"  # names of the columns and the rows

    def __init__(self, values, query_labels, key_labels, title, highlight_row):
        self.values = as_rows(values)
        self.num_queries, self.num_keys = len(self.values), len(self.values[0])
        if key_labels is None and self.num_queries == self.num_keys:
            key_labels = query_labels
        if query_labels is None and key_labels is not None and len(key_labels) == self.num_keys:
            query_labels = key_labels[self.num_keys - self.num_queries :]  # the queries are the last tokens
        self.query_labels = token_labels(query_labels, self.num_queries, "rows (looking tokens)")
        self.key_labels = token_labels(key_labels, self.num_keys, "columns (looked-at tokens)")
        if highlight_row is not None and not 0 <= highlight_row < self.num_queries:
            raise PictureError(f"highlight_row is {highlight_row}; the mask has rows 0..{self.num_queries - 1}")
        self.title = title
        self.highlight_row = highlight_row
        self.num_steps = self.num_queries

    def row_name(self, row: int) -> str:
        """ "token 3 ' time'" in words; the number is the token's position among the keys' last rows."""
        position = self.num_keys - self.num_queries + row if self.num_queries <= self.num_keys else row
        return f"token {position}" + (f" {self.query_labels[row]}" if self.query_labels else "")

    def _cell_text(self, value) -> str:
        raise NotImplementedError

    def text(self) -> str:
        rows = self.query_labels or [str(row) for row in range(self.num_queries)]
        cells = [[self._cell_text(value) for value in row] for row in self.values]
        heads = self.key_labels or [str(column) for column in range(self.num_keys)]
        widths = [max(text_width(head), text_width(cells[0][column])) for column, head in enumerate(heads)]
        label_width = max(map(text_width, [*rows, self.across]))
        lines = []
        if sum(widths) + 2 * len(widths) + label_width <= MAX_TEXT_WIDTH:
            lines.append(pad(self.across, label_width, right=True) + "  " + _joined(heads, widths))
        else:  # too wide: cells close together, with labels only for the rows
            widths = [text_width(cells[0][0])] * self.num_keys
            if self.key_labels and self.key_labels != self.query_labels:
                lines.append(f"{self.across} " + " ".join(self.key_labels))
        for index, (label, row) in enumerate(zip(rows, cells, strict=True)):
            arrow = "  ←" if index == self.highlight_row else ""
            lines.append(pad(label, label_width, right=True) + "  " + _joined(row, widths).rstrip() + arrow)
        return "\n".join(line.rstrip() for line in [*lines, self.legend] if line)

    def _cell_size(self) -> float:
        most = max(self.num_queries, self.num_keys)
        fits = 6.3 / most
        if self.key_labels is None and self.query_labels is None:
            return max(min(fits, 0.34), 4 / most if most > MAX_MARKED else 0)
        return max(0.2, min(fits, 0.42))

    def _size(self) -> tuple[float, float]:
        cell = self._cell_size()
        top = 0.55 + (LETTER_WIDTH * max(map(text_width, self.key_labels)) if self._turned() else 0)
        return max(2.4, cell * self.num_keys + self._left()), cell * self.num_queries + top

    def _left(self) -> float:
        return 0.15 + LETTER_WIDTH * max(map(text_width, [*(self.query_labels or []), *self.down.split("\n")]))

    def _title_width(self) -> float:
        return self._size()[0] - self._left()

    def _turned(self) -> bool:
        return any(text_width(label) * LETTER_WIDTH > self._cell_size() for label in self.key_labels or [])

    def _colors(self, highlight: int | None):
        """[T_query, T_key] of (r, g, b) floats."""
        raise NotImplementedError

    def _mark_cells(self, axes, highlight: int | None) -> None:
        """Mark the cells with signs that mean the same as the colours."""
        raise NotImplementedError

    def _draw(self, axes, step: int | None = None) -> None:
        from matplotlib.patches import Rectangle

        highlight = self.highlight_row if step is None else step
        small = max(self.num_queries, self.num_keys) <= MAX_MARKED
        edges = {"edgecolors": BORDER, "linewidth": 0.6} if small else {"rasterized": True}
        axes.pcolormesh(self._colors(highlight), **edges)
        width = max(self.num_keys, (self._size()[0] - self._left()) / self._cell_size())  # limits the size of a cell
        axes.set(xlim=(0, width), ylim=(self.num_queries, 0), aspect="equal", anchor="NW")
        if small:
            self._mark_cells(axes, highlight)
        if highlight is not None:
            frame = Rectangle((0, highlight), self.num_keys, 1, fill=False, edgecolor=BLACK, linewidth=2, clip_on=False)
            axes.add_patch(frame)
        self._label_axes(axes, highlight)

    def _label_axes(self, axes, highlight: int | None) -> None:
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel(self.across, loc="left", color=GREY, size=SMALL_SIZE)
        axes.annotate(
            self.down, (0, 1), (-4, 5), xycoords="axes fraction", textcoords="offset points",
            ha="right", va="bottom", color=GREY, size=SMALL_SIZE,
        )  # fmt: skip
        axes.tick_params(length=0, pad=3)
        axes.spines[:].set_visible(False)
        corners = [0, self.num_keys, self.num_keys, 0, 0], [0, 0, self.num_queries, self.num_queries, 0]
        axes.plot(*corners, color=BORDER, linewidth=0.6, clip_on=False, zorder=1)
        turned = {"rotation": 60, "ha": "left", "rotation_mode": "anchor"} if self._turned() else {}
        axes.set_xticks(*_ticks(self.num_keys, self.key_labels), **turned)
        axes.set_yticks(*_ticks(self.num_queries, self.query_labels))
        if highlight is not None and self.query_labels:
            axes.get_yticklabels()[highlight].set_fontweight("bold")


class MaskGrid(TokenGrid):
    """A bool mask [T_query, T_key]: green with a dot = may look, white = may not.

    `mask` is a tensor, an array or nested lists. Labels are tokens as the tokenizer cuts them (" upon"). If only one
    axis has labels, the other takes them from it: all for a square mask, the last ones if there are fewer rows.
    `highlight_row` and `highlight_column` frame one of each. `requests` (name -> tokens, in the order of the row)
    frames the block of each and tints its tokens. `cell` is the side of a cell in inches. Steps = rows. Raises
    PictureError if the labels are not as many as rows or columns, for a row or column out of range, if the mask is
    empty or ragged, or if the requests' tokens are not as many as the mask's.
    """

    legend = f"{MAY_LOOK.letter} {MAY_LOOK.name}   {MAY_NOT.letter} {MAY_NOT.name}"

    def __init__(
        self,
        mask,
        query_labels: Sequence[str] | None = None,
        key_labels: Sequence[str] | None = None,
        title: str | None = None,
        highlight_row: int | None = None,
        highlight_column: int | None = None,
        requests: Mapping[str, int] | None = None,
        cell: float | None = None,
    ):
        super().__init__(mask, query_labels, key_labels, title, highlight_row)
        self.requests, self.cell = dict(requests or {}), cell
        if self.requests and not sum(self.requests.values()) == self.num_queries == self.num_keys:
            raise PictureError(
                f"the requests have {self.requests} tokens, the mask {self.num_queries} rows and {self.num_keys} "
                "columns; a mask of whole requests has as many of each as they have tokens"
            )
        if highlight_column is not None and not 0 <= highlight_column < self.num_keys:
            raise PictureError(f"highlight_column is {highlight_column}; the mask has columns 0..{self.num_keys - 1}")
        self.highlight_column = highlight_column

    def _draw(self, axes, step: int | None = None) -> None:
        from matplotlib.patches import Rectangle

        super()._draw(axes, step)
        self._draw_requests(axes)
        if self.highlight_column is not None:
            frame = {"fill": False, "edgecolor": BLACK, "linewidth": 2, "linestyle": "--", "clip_on": False}
            axes.add_patch(Rectangle((self.highlight_column, 0), 1, self.num_queries, **frame))

    def _cell_size(self) -> float:
        return self.cell or super()._cell_size()

    def text(self) -> str:
        if not self.requests:
            return super().text()
        ends = accumulate(self.requests.values())
        blocks = [
            f"{name} {end - count}–{end - 1}" for (name, count), end in zip(self.requests.items(), ends, strict=True)
        ]
        return f"{super().text()}\nrows and columns of {', '.join(blocks)}"

    def _draw_requests(self, axes) -> None:
        """Draw a frame around each request's block, its name in the empty corner, and its tokens on its tint."""
        from matplotlib.patches import Rectangle

        start = 0
        for index, (name, count) in enumerate(self.requests.items()):
            tint = {"facecolor": OWNER_COLORS[index % len(OWNER_COLORS)], "edgecolor": "none", "pad": 1.5}
            frame = {"fill": False, "edgecolor": BLACK, "linewidth": 1.6, "clip_on": False}
            axes.add_patch(Rectangle((start, start), count, count, **frame)).set_gid(f"block {name}")
            for label in (axes.get_xticklabels() + axes.get_yticklabels()) if self.key_labels else []:
                place = label.get_position()[0 if label in axes.get_xticklabels() else 1]
                if start < place < start + count:
                    label.set_bbox(tint)
            if count > 1:
                corner = {"ha": "center", "va": "center", "fontweight": "bold", "bbox": tint}
                axes.text(start + count - 0.5, start + 0.5, literal(name), **corner).set_in_layout(False)
            start += count

    def caption(self, step: int) -> str:
        seen = self._seen(step)
        names = ", ".join((self.key_labels or list(map(str, range(self.num_keys))))[column] for column in seen)
        return f"{self.row_name(step)} sees: {names or 'nobody'} — {len(seen)} of {self.num_keys}"

    def alt(self) -> str:
        entries = sum(len(self._seen(row)) for row in range(self.num_queries))
        return (
            f"{self.title + ': ' if self.title else ''}mask of {plural(self.num_queries, 'looking token')} by "
            f"{plural(self.num_keys, 'looked-at token')}, {entries} of {self.num_queries * self.num_keys} may look"
        )

    def _seen(self, row: int) -> list[int]:
        return [column for column, may in enumerate(self.values[row]) if may]

    def _cell_text(self, value) -> str:
        return MAY_LOOK.letter if value else MAY_NOT.letter

    def _colors(self, highlight: int | None):
        return _blend([[float(bool(value)) for value in row] for row in self.values], highlight)

    def _is_pale(self, row: int, highlight: int | None) -> bool:
        return highlight not in (None, row)

    def _mark_cells(self, axes, highlight: int | None) -> None:
        looks = [(column + 0.5, row + 0.5) for row in range(self.num_queries) for column in self._seen(row)]
        if looks:
            inks = [MAY_LOOK.color if self._is_pale(int(row), highlight) else MAY_LOOK.ink for _, row in looks]
            axes.scatter(*zip(*looks, strict=True), s=(16 * self._cell_size()) ** 2, color=inks, linewidth=0)


class CutMask(MaskGrid):
    """A square mask cut into two chunks above row `cut`, with the corner that the first chunk does not need in grey.

    Arguments, steps and errors are otherwise those of `MaskGrid`; a cut that is not between two rows is refused.
    """

    legend = f"{MaskGrid.legend}   {DROPPED.letter} {DROPPED.name}"

    def __init__(self, mask, labels: Sequence[str] | None = None, *, cut: int, title: str | None = None):
        super().__init__(mask, labels, title=title)
        if not 0 < cut < self.num_queries == self.num_keys:
            raise PictureError(f"cut is {cut}; it must lie between two of the {self.num_queries} rows of a square mask")
        self.cut = cut
        for row in self.values[:cut]:
            row[cut:] = [None] * (self.num_keys - cut)  # not part of either chunk's mask

    def _cell_text(self, value) -> str:
        return DROPPED.letter if value is None else super()._cell_text(value)

    def text(self) -> str:
        lines = super().text().splitlines()
        rule = len(lines) - 1 - (self.num_queries - self.cut)  # the last line is the legend
        return "\n".join([*lines[:rule], "-" * max(map(text_width, lines[:-1])), *lines[rule:]])

    def alt(self) -> str:
        pieces = f"{self.cut} × {self.cut} and {self.num_queries - self.cut} × {self.num_keys}"
        return f"{super().alt()}; cut into {pieces}"

    def _size(self) -> tuple[float, float]:
        width, height = super()._size()
        return max(width, 3.8), height + 0.35  # room for the legend

    def _draw(self, axes, step: int | None = None) -> None:
        super()._draw(axes, step)
        add_box(axes, self.cut, 0, self.num_keys - self.cut, self.cut, DROPPED, linewidth=0)
        axes.plot([0, self.num_keys], [self.cut] * 2, color=RED, linewidth=3, clip_on=False)
        add_legend(axes, [replace(DROPPED, letter="")], y=8, extra="red line: the cut")


class InfluenceGrid(MaskGrid):
    """Measured influence: bool [T_row, T_token], True if the row changes when the token is replaced.

    Through several layers influence reaches further than the mask of one layer. Arguments, steps and errors are
    those of `MaskGrid`.
    """

    across, down = "replaced token →", "row that\nchanged ↓"
    legend = f"{CHANGED.letter} {CHANGED.name}   {SAME.letter} {SAME.name}"

    def caption(self, step: int) -> str:
        names = self.key_labels or [str(column) for column in range(self.num_keys)]
        causes = ", ".join(names[column] for column in self._seen(step))
        return f"the row of {self.row_name(step)} changes with: {causes or 'nothing'}"

    def alt(self) -> str:
        entries = sum(len(self._seen(row)) for row in range(self.num_queries))
        return (
            f"{self.title + ': ' if self.title else ''}{entries} of {self.num_queries * self.num_keys} pairs of a row "
            "and a replaced token in which the row changed"
        )


class AttentionWeights(TokenGrid):
    """Attention weights [T_query, T_key], floats from 0 to 1: greener is heavier; with numbers for up to 8 tokens.

    Labels as in `MaskGrid`. Raises PictureError also for a weight outside 0..1, which no softmax gives.
    """

    legend = "each row sums to 1"
    max_numbered = 8

    def __init__(
        self,
        weights,
        query_labels: Sequence[str] | None = None,
        key_labels: Sequence[str] | None = None,
        title: str | None = None,
        highlight_row: int | None = None,
    ):
        super().__init__(weights, query_labels, key_labels, title, highlight_row)
        for row in self.values:
            for value in row:
                if not -1e-6 <= value <= 1 + 1e-6:
                    raise PictureError(f"weight {value} is outside 0..1; give the weights *after* the softmax")

    def caption(self, step: int) -> str:
        row = self.values[step]
        heaviest = max(range(self.num_keys), key=row.__getitem__)
        name = self.key_labels[heaviest] if self.key_labels else f"token {heaviest}"
        return f"{self.row_name(step)} looks most at {name}: weight {row[heaviest]:.2f}"

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}attention weights, {self.num_queries} by {self.num_keys}"

    def _cell_text(self, value) -> str:
        return f"{value:.2f}"

    def _cell_size(self) -> float:
        return max(super()._cell_size(), 0.46) if self._numbered() else super()._cell_size()

    def _numbered(self) -> bool:
        return max(self.num_queries, self.num_keys) <= self.max_numbered

    def _colors(self, highlight: int | None):
        return _blend(self.values, None)  # a paler row would show wrong weights, so there is only the frame

    def _mark_cells(self, axes, highlight: int | None) -> None:
        from matplotlib.colors import to_hex

        shades = self._colors(highlight)
        for row in range(self.num_queries if self._numbered() else 0):
            for column, value in enumerate(self.values[row]):
                style = {"ha": "center", "va": "center", "size": SMALL_SIZE, "in_layout": False}
                axes.text(column + 0.5, row + 0.5, f"{value:.2f}", color=ink_on(to_hex(shades[row, column])), **style)


def as_rows(values) -> list[list]:
    """A tensor, an array or nested sequences as a list of equally long rows. Raises PictureError for anything else."""
    rows = values.tolist() if hasattr(values, "tolist") else values
    try:
        rows = [list(row) for row in rows]
    except TypeError:
        raise PictureError("a grid needs two dimensions, [T_query, T_key]; this has fewer") from None
    if not rows or not rows[0]:
        raise PictureError("an empty grid cannot be drawn; it needs at least one row and one column")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise PictureError(f"the rows of a grid must be equally long; these have lengths {sorted(lengths)}")
    if isinstance(rows[0][0], list):
        raise PictureError("a grid needs two dimensions, [T_query, T_key]; this has more: pick one head")
    return rows


def _joined(cells: Sequence[str], widths: Sequence[int]) -> str:
    separator = "" if set(widths) == {1} and len(widths) > 30 else "  " if max(widths) > 1 else " "
    return separator.join(pad(cell, width) for cell, width in zip(cells, widths, strict=True))


def _ticks(count: int, labels: list[str] | None) -> tuple[list[float], list[str]]:
    """Positions and names of ticks: all labels, or else numbers, few enough not to touch."""
    every = 1 if labels or count <= 20 else 5 if count <= MAX_MARKED else 10 ** (len(str(count - 1)) - 1)
    shown = range(0, count, every)
    return [place + 0.5 for place in shown], [literal(labels[place]) if labels else str(place) for place in shown]


def _blend(shares: list[list[float]], highlight: int | None):
    """Colours [rows, columns, 3]: from white (0) to full green (1); rows other than the highlighted one are paler."""
    import numpy as np
    from matplotlib.colors import to_rgb

    strength = np.clip(np.array(shares, dtype=float), 0, 1)
    if highlight is not None:
        strength[np.arange(len(shares)) != highlight] *= 0.35
    return 1 - strength[:, :, None] * (1 - np.array(to_rgb(GREEN)))
