"""From one speed to another in factors: a bar per cause on a logarithmic axis, with its range over all orders."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from minillm.errors import check_choice, check_number
from minillm.viz.base import SMALL_SIZE, Picture, PictureError, literal, pad, text_table
from minillm.viz.palette import BLACK, LIGHT_GREY, RED, TEAL, VIOLET

COLUMNS = 40  # of the text's axis


class Step(NamedTuple):
    """One factor, and its range if that is known; a factor below 1 leads back."""

    name: str
    factor: float
    low: float | None = None
    high: float | None = None


class Waterfall(Picture):
    """Factors that multiply: each bar begins where the previous one ends; the last bar is their product.

    `steps`: (name, factor) or (name, factor, low, high), from top to bottom; the thin line beside a bar is where it
    would end for `low` and `high`. `first` and `last` name both ends, `claim` is a range of the axis to compare with.
    `unit` is what a factor counts and `spread` what its range is over. Factors above 1 are drawn as losses unless
    `good_above`. `guesses` (name -> factor) are hollow bars below the measured ones, and o in the text; a guess may be
    missing or None. Raises PictureError without a step, for factors that are not above 0 or not within
    their range, and for a guess of an unknown name.
    """

    def __init__(
        self,
        steps: Sequence[tuple],
        *,
        first: str = "start",
        last: str = "all together",
        claim: tuple[float, float] | None = None,
        title: str | None = None,
        unit: str = "times as long",
        spread: str = "over all orders",
        good_above: bool = False,
        guesses: Mapping[str, float | None] | None = None,
    ):
        self.steps = [Step(*step) for step in steps]
        if not self.steps:
            raise PictureError("no factors were given; a waterfall needs at least one")
        for step in self.steps:
            if (step.low is None) != (step.high is None):
                raise PictureError(f"{step.name!r} has one end of a range; give both, or none")
            for value in step[1:]:
                if value is not None:
                    check_number(f"factor of {step.name!r}", value, "above 0", lambda f: f > 0, error=PictureError)
            if step.low is not None and not step.low <= step.factor * (1 + 1e-9) <= step.high * (1 + 2e-9):
                raise PictureError(f"{step.name!r} is {step.factor}, outside its range {step.low} to {step.high}")
        self.first, self.last, self.claim = first, last, claim
        self.title = title
        self.unit, self.spread, self.good_above = unit, spread, good_above
        self.guesses = {name: guess for name, guess in (guesses or {}).items() if guess is not None}
        for name, guess in self.guesses.items():
            check_choice("guess", name, [step.name for step in self.steps], error=PictureError)
            check_number(f"guess of {name!r}", guess, "above 0", lambda f: f > 0, error=PictureError)

    @classmethod
    def of(cls, decomposition, **options) -> "Waterfall":
        """The waterfall of a `simulation.Decomposition`: Shapley values, the largest first, with their range over all
        orders."""
        factors = sorted(decomposition.factors, key=lambda factor: -factor.shapley)
        return cls([(each.name, each.shapley, each.low, each.high) for each in factors], **options)

    @property
    def ends(self) -> list[float]:
        """The ends of the bars: the product so far."""
        products = [1.0]
        for step in self.steps:
            products.append(products[-1] * step.factor)
        return products[1:]

    @property
    def total(self) -> float:
        """The product of all factors."""
        return self.ends[-1]

    @property
    def _has_ranges(self) -> bool:
        return any(step.low is not None for step in self.steps)

    @property
    def guessed_total(self) -> float:
        """The product of all guesses; 1 without any."""
        return math.prod(self.guesses.values())

    def text(self) -> str:
        low, high = self._limits()

        def column(value: float) -> int:
            return round((COLUMNS - 1) * math.log(value / low) / math.log(high / low))

        rows, begin = [[self.first, "", "", "", "1.00", " " * column(1) + "|"]], 1.0
        for step, end in zip(self.steps, self.ends, strict=True):
            bar = [" "] * COLUMNS
            if step.low is not None:
                for place in range(column(begin * step.low), column(begin * step.high) + 1):
                    bar[place] = "-"
            left, right = sorted((column(begin), column(end)))
            bar[left : right + 1] = "#" * (right + 1 - left)
            guess = self.guesses.get(step.name)
            if guess is not None:
                bar[column(begin * guess)] = "o"
            spread = "" if step.low is None else f"{step.low:.2f} to {step.high:.2f}"
            said = "" if guess is None else f"{guess:.2f}"
            rows.append([step.name, f"{step.factor:.2f}", said, spread, f"{end:.2f}", "".join(bar).rstrip()])
            begin = end
        left, right = sorted((column(1), column(self.total)))
        bar, said = pad(" " * left + "#" * (right + 1 - left), COLUMNS), ""
        if self.guesses:
            said, place = f"{self.guessed_total:.2f}", column(self.guessed_total)
            bar = bar[:place] + "o" + bar[place + 1 :]
        rows.append([self.last, f"{self.total:.2f}", said, "", f"{self.total:.2f}", bar.rstrip()])
        if self.claim:
            begin, end = map(column, self.claim)
            stretch = " " * begin + "=" * (end + 1 - begin)
            rows.append(["claimed", f"{self.claim[0]:g} to {self.claim[1]:g}", "", "", "", stretch])
        rows = [[*cells, pad(picture, COLUMNS)] for *cells, picture in rows]  # else the table aligns them right
        rows.insert(0, ["", "factor", "guess", self.spread, "product", ""])
        unused = [place for place, used in ((2, self.guesses), (3, self._has_ranges)) if not used]
        rows = [[cell for place, cell in enumerate(cells) if place not in unused] for cells in rows]
        return "\n".join(line.rstrip() for line in text_table(rows[0], rows[1:]).splitlines())

    def alt(self) -> str:
        factors = ", ".join(f"{step.name} {step.factor:.2f}" for step in self.steps)
        guessed = ", ".join(f"{name} {guess:.2f}" for name, guess in self.guesses.items())
        guessed = f"; guessed {guessed}, together {self.guessed_total:.2f}" if guessed else ""
        return f"{self.title + ': ' if self.title else ''}{factors}; {self.last} {self.total:.2f}{guessed}"

    def _limits(self) -> tuple[float, float]:
        begins = [1.0, *self.ends[:-1]]
        reached = [*begins, *self.ends, *(self.claim or ())]
        for begin, step in zip(begins, self.steps, strict=True):
            reached += [begin * (step.low or 1), begin * (step.high or 1), begin * self.guesses.get(step.name, 1)]
        reached.append(self.guessed_total)
        low, high = min(reached), max(reached)
        return low, high if high > low else 2 * low

    def _size(self) -> tuple[float, float]:
        names = [self.first, self.last, *(step.name for step in self.steps)]
        return 6.0 + 0.09 * max(map(len, names)), 0.42 * (len(self.steps) + 2) + 0.9

    def _draw(self, axes, step: int | None = None) -> None:
        low, high = self._limits()
        axes.set_xscale("log")
        axes.set(xlim=(low / 1.08, high * 1.25), ylim=(len(self.steps) + 1.6, -0.6))
        if self.claim:
            axes.axvspan(*self.claim, color=LIGHT_GREY, zorder=0)
            axes.annotate(
                "claimed", (math.sqrt(self.claim[0] * self.claim[1]), 1), (0, 3), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", size=SMALL_SIZE, annotation_clip=False,
            )  # fmt: skip
        axes.axvline(1, color=BLACK, linewidth=1, linestyle=":", zorder=0)
        begin = 1.0
        self._draw_guesses(axes)
        for row, (each, end) in enumerate(zip(self.steps, self.ends, strict=True), start=1):
            color = VIOLET if (each.factor >= 1) == self.good_above else RED
            axes.barh(row, end - begin, 0.56, begin, color=color)
            axes.plot([end, end], [row + 0.28, row + 0.72], color=BLACK, linewidth=0.8)
            reach = end
            if each.low is not None:
                low_end, high_end = begin * each.low, begin * each.high
                axes.plot([low_end, high_end], [row, row], color=BLACK, linewidth=1.4, marker="|", markersize=8)
                reach = max(end, high_end)
            guess = self.guesses.get(each.name)
            said = "" if guess is None else f" (guessed {guess:.2f})"
            self._label(axes, f"{each.factor:.2f}{said}", max(reach, begin), row)
            begin = end
        axes.barh(len(self.steps) + 1, self.total - 1, 0.56, 1, color=TEAL, hatch="///", edgecolor="white", linewidth=0)
        said = f" (guessed {self.guessed_total:.1f})" if self.guesses else ""
        self._label(axes, f"{self.total:.1f}{said}", max(1, self.total), len(self.steps) + 1)
        names = [self.first, *(each.name for each in self.steps), self.last]
        axes.set_yticks(range(len(names)), [literal(name) for name in names])
        axes.tick_params(axis="y", length=0)
        thin = f"; thin lines: {self.spread}" if self._has_ranges else ""
        hollow = "; hollow: guessed" if self.guesses else ""
        axes.set_xlabel(f"{self.unit}{thin}{hollow}")
        self._ticks(axes, low, high)

    def _draw_guesses(self, axes) -> None:
        """Draw hollow bars below the measured ones, from the same start."""
        hollow = {"facecolor": "none", "edgecolor": BLACK, "linewidth": 1, "zorder": 3}
        begins = [1.0, *self.ends[:-1]]
        for row, (step, begin) in enumerate(zip(self.steps, begins, strict=True), start=1):
            if step.name in self.guesses:
                axes.barh(row + 0.38, begin * (self.guesses[step.name] - 1), 0.16, begin, **hollow)
        if self.guesses:
            axes.barh(len(self.steps) + 1.38, self.guessed_total - 1, 0.16, 1, **hollow)

    def _label(self, axes, text: str, x: float, row: int) -> None:
        style = {"textcoords": "offset points", "va": "center", "size": SMALL_SIZE}
        axes.annotate(text, (x, row), (6, 0), **style)

    def _ticks(self, axes, low: float, high: float) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.xaxis.set_minor_formatter(NullFormatter())

    @property
    def _title_pad(self) -> float:
        return 20 if self.claim else 8
