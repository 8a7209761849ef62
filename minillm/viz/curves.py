"""Measured numbers: curves of prediction and measurement, the growth of the cache, and bars against a limit."""

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from minillm.trace import Trace
from minillm.viz.base import (
    SMALL_SIZE,
    Picture,
    PictureError,
    binary_bytes,
    both_bytes,
    decimal_bytes,
    literal,
    noted,
    number,
    text_table,
    titled,
)
from minillm.viz.palette import BLACK, GREY, HELD, SERIES_COLORS, SERIES_HATCHES, SERIES_MARKERS, WASTE_HATCHES, WHITE

KINDS = ("predicted", "measured")

ABOVE = {"textcoords": "offset points", "size": SMALL_SIZE, "annotation_clip": False}  # for words above the axes
MOST_TICK_LETTERS = 48  # letters that fit below the x axis


class Look(NamedTuple):
    """How a series is drawn: its place in the palette; dashed without markers, or with them, dotted or not; thick."""

    index: int
    dashed: bool = False
    dotted: bool = False
    thick: bool = False

    @property
    def color(self) -> str:
        return _of(SERIES_COLORS, self.index)

    def style(self) -> dict:
        """For `axes.plot`."""
        if self.dashed:
            return {"color": self.color, "linestyle": "--", "linewidth": 3 if self.thick else 1.5}
        return {
            "color": self.color,
            "linestyle": ":" if self.dotted else "-",
            "marker": _of(SERIES_MARKERS, self.index),
        }


class Curves(Picture):
    """Several series over the same x: predicted ones are dashed, measured ones have markers; names are at the ends.

    `series` maps a name to as many values as `x` has; None or NaN leaves a gap. `kinds` maps a series to "predicted" or
    "measured"; without an entry it is measured unless its name contains "predict". `ratio` = (a, b) adds a column a / b
    to the text. `limits` (name -> y) are horizontal lines, `marks` (name -> x) vertical lines, `points` (name -> (x,
    y)) dots; a mark may have a series' name. `sides` = (x, left, right) divides the picture at x and names both halves.
    `thick` is the series that the others add up to. Raises PictureError for unequal lengths, unknown names, or a log
    axis with values ≤ 0.
    """

    marks_say = ""  # before the name of a marked series

    def __init__(
        self,
        x: Sequence[float],
        series: Mapping[str, Sequence[float | None]],
        x_label: str,
        y_label: str,
        *,
        kinds: Mapping[str, str] | None = None,
        log_x: bool = False,
        log_y: bool = False,
        ratio: tuple[str, str] | None = None,
        limits: Mapping[str, float] | None = None,
        marks: Mapping[str, float] | None = None,
        points: Mapping[str, tuple[float, float]] | None = None,
        sides: tuple[float, str, str] | None = None,
        thick: str | None = None,
        title: str | None = None,
    ):
        self.x = [float(value) for value in x]
        self.series = {name: [_value(value) for value in values] for name, values in series.items()}
        if not self.x or not self.series:
            raise PictureError("nothing to draw: give at least one x and one series")
        for name, values in self.series.items():
            if len(values) != len(self.x):
                raise PictureError(f"series {name!r} has {len(values)} values for {len(self.x)} values of x")
        self.kinds = {name: "predicted" if "predict" in name.lower() else "measured" for name in self.series}
        self.kinds.update(kinds or {})
        named = [*self.kinds, *(ratio or ()), *([thick] if thick else [])]
        unknown = [name for name in named if name not in self.series]
        if unknown or any(kind not in KINDS for kind in self.kinds.values()):
            raise PictureError(
                f"kinds, ratio and thick name series {list(self.series)} and kinds {KINDS}; got {unknown or kinds}"
            )
        self._check_positive("x", self.x, log_x)
        for name, values in self.series.items():
            self._check_positive(name, values, log_y)
        self.x_label, self.y_label, self.log_x, self.log_y = x_label, y_label, log_x, log_y
        self.ratio = ratio
        self.limits, self.marks, self.points = dict(limits or {}), dict(marks or {}), dict(points or {})
        self.sides = sides
        self.looks = {
            name: Look(index, dashed=self.kinds[name] == "predicted", thick=name == thick)
            for index, name in enumerate(self.series)
        }
        self.title = title

    @staticmethod
    def _check_positive(name: str, values: Sequence[float], is_log: bool) -> None:
        bad = [value for value in values if value <= 0]
        if is_log and bad:
            raise PictureError(f"{name!r} has the value {bad[0]}; a logarithmic axis needs values > 0")

    def text(self) -> str:
        return "\n".join([self.table(), *self._notes()])

    def table(self) -> str:
        """The values in plain text, without the notes."""
        header = [self.x_label, *self.series]
        rows = [
            [number(value), *(number(values[i]) for values in self.series.values())] for i, value in enumerate(self.x)
        ]
        if self.ratio:
            header.append(" / ".join(self.ratio))
            for row, above, below in zip(rows, *(self.series[name] for name in self.ratio), strict=True):
                row.append(number(above / below) if below else "–")
        return f"{self.y_label}\n{text_table(header, rows)}"

    def _notes(self) -> list[str]:
        """Limits, marks, points and sides in words."""
        notes = [f"{name}: {self.y_label} {number(y)}" for name, y in self.limits.items()]
        notes += [f"{name}: at {self.x_label} {number(x)}" for name, x in self.marks.items()]
        notes += [f"{name}: at {number(x)}, {number(y)}" for name, (x, y) in self.points.items()]
        if self.sides:
            x, left, right = self.sides
            notes.append(f"below {number(x)}: {left}; above: {right}")
        return notes

    def alt(self) -> str:
        told = []
        for name, values in self.series.items():
            drawn = [number(value) for value in values if not math.isnan(value)]
            told.append(f"{name} from {drawn[0]} to {drawn[-1]}" if drawn else name)
        words = f"{', '.join(told)} over {self.x_label} from {number(self.x[0])} to {number(self.x[-1])}"
        return f"{self.title}: {self.y_label}: {words}" if self.title else f"{self.y_label}: {words}"

    def _size(self) -> tuple[float, float]:
        return min(9.0, 5.6 + 0.08 * max(len(line) for name in self.series for line in _name_lines(name))), 3.6

    def _title_width(self) -> float:
        return 5

    @property
    def _title_pad(self) -> float:
        return 8 + 12 * (len(set(self.marks.values())) + bool(self.sides))

    def _draw(self, axes, step: int | None = None) -> None:
        axes.set(xlabel=literal(self.x_label), ylabel=literal(self.y_label))
        if self.log_x:
            axes.set_xscale("log")
        if self.log_y:
            axes.set_yscale("log")
        self._draw_ticks(axes)
        ends = []
        for name, values in self.series.items():
            color = self.looks[name].color
            axes.plot(self.x, values, markersize=5, label=name, **self.looks[name].style())
            drawn = [(x, y) for x, y in zip(self.x, values, strict=True) if not math.isnan(y)]
            if drawn:
                ends.append((*drawn[-1], name, color))
        for name, limit in self.limits.items():
            axes.axhline(limit, color=BLACK, linewidth=1.2, linestyle="--")
            ends.append((self.x[-1], limit, f"{name} {limit:,g}", BLACK))
        if not self.log_y:
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.grid(color="#EEEEEE", linewidth=0.8)
        axes.set_axisbelow(True)
        self._label_ends(axes, ends)
        self._draw_marks(axes)
        self._draw_points(axes)
        if self.sides:
            self._draw_sides(axes, *self.sides)

    def _draw_ticks(self, axes) -> None:
        """Plain numbers; on a logarithmic x axis the measured values, as many as have room for their labels."""
        from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

        for axis, is_log in ((axes.xaxis, self.log_x), (axes.yaxis, self.log_y)):
            axis.set_major_formatter(lambda value, _: _tick_label(value))
            if is_log:
                axis.set_minor_formatter(NullFormatter())
        heights = [y for values in self.series.values() for y in values if not math.isnan(y)]
        if self.log_y and heights and max(heights) < 100 * min(heights):  # powers of ten give one tick
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        if self.log_x and len(self.x) <= 12:
            every = 1 + sum(len(_tick_label(x)) + 1 for x in self.x) // MOST_TICK_LETTERS
            axes.xaxis.set_major_locator(FixedLocator(self.x[::every]))
            axes.xaxis.set_minor_locator(NullLocator())

    def _label_ends(self, axes, ends: list[tuple[float, float, str, str]]) -> None:
        """Write each series' name right of the axes, at the height of its end; names that would touch are moved."""
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # from here on the scales are fixed
        to_fraction = axes.transData + axes.transAxes.inverted()
        line = 0.06  # height of a line of small type as a share of the axes
        lowest = -math.inf
        for x, y, name, color in sorted(ends, key=lambda end: end[1]):
            across, height = to_fraction.transform((x, y))
            lines = _name_lines(name)
            place = max(height, lowest + line * len(lines) / 2)
            lowest = place + line * len(lines) / 2
            axes.annotate(
                literal("\n".join(lines)), (across, height), (1.03, place),
                xycoords="axes fraction", textcoords="axes fraction",
                color=color, size=SMALL_SIZE, va="center", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 4},
            )  # fmt: skip

    def _draw_marks(self, axes) -> None:
        """Draw vertical lines, and above the axes the names of their series, one per line."""
        places = sorted(set(self.marks.values()))
        for index, place in enumerate(places):
            names = [name for name, x in self.marks.items() if x == place]
            color = self.looks[names[0]].color if len(names) == 1 and names[0] in self.looks else BLACK
            axes.axvline(place, color=color, linewidth=1.2, linestyle=":")
            words = literal(f"{self.marks_say}{', '.join(names)}: {place:,g}")
            above = 3 + 12 * (len(places) - 1 - index)
            axes.annotate(
                words, (place, 1), (0, above), xycoords=("data", "axes fraction"), ha="center", color=color, **ABOVE
            )  # fmt: skip

    def _draw_points(self, axes) -> None:
        """Draw dots, and their names to the upper left, or to the right of a dot at the left end."""
        for name, place in self.points.items():
            axes.plot(*place, "o", color=BLACK, markersize=6, zorder=4)
            side = "left" if place[0] <= self.x[0] else "right"
            axes.annotate(
                literal(name), place, (4 if side == "left" else -4, 7), ha=side,
                textcoords="offset points", size=SMALL_SIZE,
            )  # fmt: skip

    def _draw_sides(self, axes, x: float, left: str, right: str) -> None:
        """Draw a line between two halves, and their names above it on either side."""
        axes.axvline(x, color=GREY, linewidth=1.2, linestyle=":")
        for side, words in (("right", f"← {left}  "), ("left", f"  {right} →")):
            axes.annotate(
                literal(words), (x, 1), (0, 4), xycoords=("data", "axes fraction"), ha=side, color=GREY, **ABOVE
            )  # fmt: skip


class CacheGrowth(Picture):
    """Tokens in the key-value cache, and their bytes, after each step of a trace. Steps = forward passes.

    `bytes_per_token` = 2 · layers · KV heads · head size · bytes per number. Raises PictureError if it is < 1 or the
    trace has no steps.
    """

    def __init__(self, trace: Trace, bytes_per_token: int, *, title: str | None = None):
        if bytes_per_token < 1:
            raise PictureError(f"bytes_per_token is {bytes_per_token}; a cached token takes at least 1 byte")
        if not trace.steps:
            raise PictureError("the trace has no steps, so there is no growth to draw")
        self.cached_tokens = [step.cached_tokens for step in trace.steps]
        self.bytes_per_token = bytes_per_token
        self.dropped = trace.dropped
        self.title = titled(title, self.dropped)
        self.num_steps = len(self.cached_tokens)

    def text(self) -> str:
        rows = []
        for step in self._listed():
            tokens = self.cached_tokens[step]
            size = tokens * self.bytes_per_token
            rows.append([str(step), f"{tokens:,}", f"{size:,}", decimal_bytes(size), binary_bytes(size)])
        return noted(text_table(["step", "cached tokens", "bytes", "decimal", "binary"], rows), self.dropped)

    def _listed(self) -> list[int]:
        """All steps of a short run; of a long one about twenty, always including the last."""
        every = -(-self.num_steps // 20)
        return sorted({*range(0, self.num_steps, every), self.num_steps - 1})

    def caption(self, step: int) -> str:
        tokens = self.cached_tokens[step]
        size = both_bytes(tokens * self.bytes_per_token)
        return f"after step {step}: {tokens:,} tokens cached, {size}"

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}cache growth; at its largest {self.caption(self._peak())}"

    def _peak(self) -> int:
        return max(range(self.num_steps), key=lambda step: (self.cached_tokens[step], step))

    def _size(self) -> tuple[float, float]:
        return 7.0, 3.2

    def _draw(self, axes, step: int | None = None) -> None:
        last = self.num_steps - 1 if step is None else step
        marked = self._peak() if step is None else step
        axes.stairs(
            self.cached_tokens[: last + 1], range(last + 2), fill=True, facecolor=HELD.color, linewidth=0, alpha=0.3
        )
        axes.stairs(self.cached_tokens[: last + 1], range(last + 2), color=HELD.color, linewidth=1.5)
        top = 1.25 * max(*self.cached_tokens, 1)
        axes.set(xlim=(0, self.num_steps), ylim=(0, top), xlabel="step", ylabel="cached tokens")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        unit, size = _decimal_unit(top * self.bytes_per_token)
        scale = self.bytes_per_token / size
        right = axes.secondary_yaxis("right", functions=(lambda tokens: tokens * scale, lambda amount: amount / scale))
        right.set_ylabel(f"{unit}  (1 {unit} = {size:,} bytes)")
        tokens = self.cached_tokens[marked]
        axes.annotate(
            f"{tokens:,} tokens × {self.bytes_per_token:,} B = {both_bytes(tokens * self.bytes_per_token)}",
            (marked + 1, tokens), (-2, 6), textcoords="offset points",
            ha="right" if 2 * marked > self.num_steps else "left", size=SMALL_SIZE,
        )  # fmt: skip


class Bars(Picture):
    """Horizontal bars of counts, plain or stacked, against limits.

    `values`: name -> a number, or name -> {part -> number}. `limits`: name -> number, drawn as lines across; the text
    then says which bars fit. `form` formats a number (e.g. `decimal_bytes`). Parts named in `waste` are grey and
    hatched. `x_end` is the end of the axis, for a share its whole, or a common end of panels side by side. `width` is
    in inches, without the bars' names. Raises PictureError if there is no value, one below 0, or one beyond
    `x_end`.
    """

    def __init__(
        self,
        values: Mapping[str, float | Mapping[str, float]],
        *,
        limits: Mapping[str, float] | None = None,
        form: Callable[[float], str] = number,
        x_label: str = "",
        x_end: float | None = None,
        waste: Sequence[str] = (),
        width: float = 5.2,
        title: str | None = None,
    ):
        self.values = {
            name: dict(value) if isinstance(value, Mapping) else {"": value} for name, value in values.items()
        }
        self.limits = dict(limits or {})
        amounts = [amount for parts in self.values.values() for amount in parts.values()]
        if not amounts or min([*amounts, *self.limits.values()]) < 0:
            raise PictureError(f"bars need at least one value, and none below 0; got {dict(values)}")
        self.parts = list(dict.fromkeys(part for parts in self.values.values() for part in parts))
        self.form = form
        self.x_label = x_label
        self.x_end, self.width, self.waste = x_end, width, tuple(waste)
        most = max([*map(self.total, self.values), *self.limits.values()])
        if x_end is not None and most > x_end * (1 + 1e-6):
            raise PictureError(f"a bar or limit of {most} does not fit on an axis that ends at {x_end}")
        self.title = title

    @property
    def _title_pad(self) -> float:
        return 20 if self.limits else 8

    def total(self, name: str) -> float:
        """The sum of all parts of one bar."""
        return sum(self.values[name].values())

    def text(self) -> str:
        named = [part for part in self.parts if part]
        header = ["", *named, "total" if named else self.x_label or "value", *self.limits]
        rows = []
        for name, parts in self.values.items():
            cells = [self.form(parts[part]) if part in parts else "–" for part in named]
            fits = ["fits" if self.total(name) <= limit else "too large" for limit in self.limits.values()]
            rows.append([name, *cells, self.form(self.total(name)), *fits])
        return text_table(header, rows)

    def alt(self) -> str:
        bars = ", ".join(f"{name} {self.form(self.total(name))}" for name in self.values)
        return f"{self.title + ': ' if self.title else ''}{bars}"

    def _size(self) -> tuple[float, float]:
        extra = 0.3 * bool(self.x_label) + 0.35 * bool(any(self.parts)) + 0.25 * bool(self.limits)
        return self.width + 0.09 * max(map(len, self.values)), 0.42 * len(self.values) + 0.6 + extra

    def _draw(self, axes, step: int | None = None) -> None:
        top = self.x_end or 1.28 * max([*map(self.total, self.values), *self.limits.values(), 1e-12])
        for row, (name, parts) in enumerate(self.values.items()):
            left = 0.0
            for part, amount in parts.items():
                bar = axes.barh(row, amount, 0.62, left, **self._look(part))
                bar.set_label(part if part not in axes.get_legend_handles_labels()[1] else "_")
                left += amount
            axes.annotate(
                self.form(self.total(name)), (left, row), (5, 0), textcoords="offset points",
                va="center", size=SMALL_SIZE, bbox={"facecolor": WHITE, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        for name, limit in self.limits.items():
            axes.axvline(limit, color=BLACK, linewidth=1.2, linestyle="--", zorder=0)
            axes.annotate(
                literal(name), (limit, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="center", size=SMALL_SIZE, annotation_clip=False,
            )  # fmt: skip
        axes.set(xlim=(0, top), ylim=(len(self.values) - 0.5, -0.5), xlabel=literal(self.x_label))
        axes.set_yticks(range(len(self.values)), [literal(name) for name in self.values])
        axes.tick_params(axis="y", length=0)
        plain = self.form is number
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}" if plain else _whole(self.form(value)))
        axes.xaxis.get_major_locator().set_params(nbins=5)
        if any(self.parts):
            axes.legend(
                loc="upper left", bbox_to_anchor=(0, -0.42 / len(self.values) - 0.12), ncols=4, frameon=False,
                fontsize=SMALL_SIZE, borderaxespad=0, handlelength=1.6,
            )  # fmt: skip

    def _look(self, part: str) -> dict:
        """The colour and hatch of a part: those of a series, or of waste."""
        if part in self.waste:
            hatch = _of(WASTE_HATCHES, self.waste.index(part))
            return {"facecolor": WHITE, "edgecolor": GREY, "hatch": hatch, "linewidth": 0.6}
        index = [each for each in self.parts if each not in self.waste].index(part)
        hatch = _of(SERIES_HATCHES, index)
        return {"facecolor": _of(SERIES_COLORS, index), "edgecolor": WHITE, "hatch": hatch, "linewidth": 0}


def _value(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _name_lines(name: str) -> list[str]:
    return textwrap.wrap(name, 24) or [""]


def _of(choices: Sequence[str], index: int) -> str:
    return choices[index % len(choices)]


def _decimal_unit(most: float) -> tuple[str, int]:
    """The largest decimal unit of bytes in which `most` is at least 1."""
    units = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
    return next((unit for unit in units if most >= unit[1]), ("bytes", 1))


def _whole(label: str) -> str:
    """The label of a tick without zero decimals: "50.00 GB" -> "50 GB"."""
    return re.sub(r"\.0+(?!\d)", "", label)


def _tick_label(value: float) -> str:
    """Whole numbers in full, others in their shortest form."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,g}"
