"""The progress of the course: a row per chapter, with the numbers of the rung that it built."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from minillm.errors import check_number
from minillm.viz.base import SMALL_SIZE, Picture, PictureError, literal, number, pad, text_table
from minillm.viz.palette import BLACK, GREY, TEAL, VIOLET, WHITE

COLUMNS = 24  # of the text's bars
BARS_END = 0.45  # share of the axes; the rest is columns of numbers, which end at
COLUMN_ENDS = (0.55, 0.69, 0.85, 0.99)
HEADER = ("tokens/s", "slots wasted", "memory wasted", "factor so far")


class Score(NamedTuple):
    """A chapter's row. None: not measured. `is_own`: whether the factor is of a rung of this chapter."""

    chapter: int
    name: str
    tokens_per_second: float | None = None
    slots_wasted: float | None = None  # a share
    memory_wasted: float | None = None  # a share
    factor: float | None = None  # over the first rung
    is_own: bool = True
    note: str = ""

    def cells(self) -> list[str]:
        """The columns as text, "–" for None."""
        shares = ["–" if share is None else f"{share:.0%}" for share in (self.slots_wasted, self.memory_wasted)]
        factor = "–" if self.factor is None else f"{self.factor:.1f}x"
        return [number(self.tokens_per_second), *shares, factor if self.is_own else f"({factor})"]


class Scoreboard(Picture):
    """The chapters from top to bottom, with bars of the factor so far on a logarithmic axis; `today` is highlighted.

    Rows after `today` show only their names, because readers still have to guess their numbers. None shows all. A
    factor in brackets is that of the rung before, if a chapter has no rung. `source` says where the numbers come from.
    Raises PictureError without rows, for chapters that do not rise, for an unknown `today`, and for numbers out of
    range.
    """

    def __init__(
        self, scores: Sequence[Score], *, today: int | None = None, title: str | None = None, source: str = ""
    ):
        self.scores = list(scores)
        chapters = [score.chapter for score in self.scores]
        if not chapters or any(one >= other for one, other in zip(chapters, chapters[1:], strict=False)):
            raise PictureError(f"the chapters are {chapters}; give at least one, and let them rise")
        if today is not None and today not in chapters:
            raise PictureError(f"today is chapter {today}; the scoreboard has {chapters}")
        for score in self.scores:
            self._check(score)
        self.today, self.title, self.source = today, title, source

    @staticmethod
    def _check(score: Score) -> None:
        for what in ("tokens_per_second", "factor"):
            if getattr(score, what) is not None:
                check_number(what, getattr(score, what), "above 0", lambda value: value > 0, error=PictureError)
        for what in ("slots_wasted", "memory_wasted"):
            if getattr(score, what) is not None:
                check_number(what, getattr(score, what), "from 0 to 1", lambda v: 0 <= v <= 1, error=PictureError)

    def is_shown(self, score: Score) -> bool:
        """Whether the row's numbers are shown."""
        return self.today is None or score.chapter <= self.today

    def text(self) -> str:
        most = max(self._factors(), default=1.0)
        rows = []
        for score in self.scores:
            cells = score.cells() if self.is_shown(score) else [""] * len(HEADER)
            bar = ""
            if self.is_shown(score) and score.factor is not None:
                length = 1 + round((COLUMNS - 1) * max(0.0, math.log(score.factor)) / math.log(max(most, 2)))
                bar = ("#" if score.is_own else "-") * length
            mark = ">" if score.chapter == self.today else " "
            rows.append([f"{mark}{score.chapter:3}  {score.name}", *cells, pad(bar, COLUMNS)])
        lines = text_table(["     chapter", *HEADER, ""], rows).splitlines()
        notes = [f"chapter {score.chapter}: {score.note}" for score in self.scores if self._is_noted(score)]
        source = [self.source] if self.source else []
        return "\n".join([*(line.rstrip() for line in lines), *([""] if notes or source else []), *notes, *source])

    def _is_noted(self, score: Score) -> bool:
        return bool(score.note) and self.is_shown(score)

    def _factors(self) -> list[float]:
        return [score.factor for score in self.scores if self.is_shown(score) and score.factor is not None]

    def alt(self) -> str:
        own = [score for score in self.scores if self.is_shown(score) and score.is_own and score.factor is not None]
        told = ", ".join(f"chapter {score.chapter} {score.factor:.1f}x" for score in own)
        return f"{self.title or 'Scoreboard'}: {told or 'nothing yet'}"

    # --- figure ---

    def _size(self) -> tuple[float, float]:
        return 9.0, 0.32 * len(self.scores) + 1.0

    def _title_width(self) -> float:
        return 6

    def _draw(self, axes, step: int | None = None) -> None:
        least, most = 0.9 * min([1.0, *self._factors()]), 1.1 * max([2.0, *self._factors()])
        axes.set_xscale("log")
        axes.set(xlim=(least, least * (most / least) ** (1 / BARS_END)), ylim=(len(self.scores) - 0.4, -1.3))
        for row, score in enumerate(self.scores):
            if score.chapter == self.today:
                axes.axhspan(row - 0.48, row + 0.48, facecolor="none", edgecolor=BLACK, linewidth=1.4)
            if self.is_shown(score):
                self._draw_row(axes, row, score)
        for place, name in zip(COLUMN_ENDS, HEADER, strict=True):
            self._write(axes, place, -0.85, name, color=GREY)
        self._draw_axes(axes, most)

    def _draw_row(self, axes, row: int, score: Score) -> None:
        if score.factor not in (None, 1.0):
            style = {"color": TEAL if score.chapter == self.today else VIOLET}
            if not score.is_own:
                style = {"facecolor": WHITE, "edgecolor": GREY, "linewidth": 0.8}
            axes.barh(row, score.factor - 1, 0.6, 1, **style)
        for place, cell in zip(COLUMN_ENDS, score.cells(), strict=True):
            self._write(axes, place, row, cell, weight="bold" if score.chapter == self.today else "normal")

    def _write(self, axes, x: float, y: float, text: str, **style) -> None:
        style |= {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center", "size": SMALL_SIZE}
        axes.annotate(text, (x, y), **style)

    def _draw_axes(self, axes, most: float) -> None:
        """Draw ticks only under the bars: the columns share their axes."""
        from matplotlib.ticker import FixedLocator, NullLocator

        ticks = [factor * ten for ten in (1, 10, 100, 1000) for factor in (1, 2, 5) if factor * ten <= most]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(1, color=BLACK, linewidth=1, linestyle=":", zorder=0)
        axes.set_yticks(range(len(self.scores)), [literal(f"{each.chapter}  {each.name}") for each in self.scores])
        for label, score in zip(axes.get_yticklabels(), self.scores, strict=True):
            label.set_color(BLACK if self.is_shown(score) else GREY)
            label.set_fontweight("bold" if score.chapter == self.today else "normal")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("times as fast as the first rung; hollow: no rung of its own", loc="left")
