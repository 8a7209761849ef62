"""Several runs of the same requests, step by step: one panel per quantity, on one axis of steps."""

from collections.abc import Mapping, Sequence

from minillm.viz.base import SMALL_SIZE, Picture, PictureError, literal, number, plural, text_table
from minillm.viz.palette import SERIES_COLORS

PANEL = 1.15  # inches, the height of one
DASHES = ("-", "--", ":", "-.")


class RunOverview(Picture):
    """Quantities of several runs, step by step, one panel per quantity; a line ends where its run ends.

    `panels`: quantity -> run -> a value per step; a run has as many in every panel. Raises PictureError if there is
    nothing to draw, a run is missing from a panel, or its lengths differ.
    """

    def __init__(self, panels: Mapping[str, Mapping[str, Sequence[float]]], *, title: str | None = None):
        self.panels = {name: {run: list(values) for run, values in runs.items()} for name, runs in panels.items()}
        self.runs = {run: len(values) for run, values in next(iter(self.panels.values()), {}).items()}
        if not self.runs or not all(self.runs.values()):
            raise PictureError("nothing to draw: give at least one quantity of one run with one step")
        for name, runs in self.panels.items():
            if {run: len(values) for run, values in runs.items()} != self.runs:
                raise PictureError(f"{name!r} must have the runs and steps of the first panel, {self.runs}")
        self.title = title

    def text(self) -> str:
        header = ["per step, mean (most)", *(f"{run}, {plural(steps, 'step')}" for run, steps in self.runs.items())]
        rows = [
            [name, *(f"{number(sum(values) / len(values))} ({number(max(values))})" for values in runs.values())]
            for name, runs in self.panels.items()
        ]
        return text_table(header, rows)

    def alt(self) -> str:
        runs = ", ".join(f"{run} {plural(steps, 'step')}" for run, steps in self.runs.items())
        return f"{self.title + ': ' if self.title else ''}{', '.join(self.panels)} step by step; {runs}"

    def _size(self) -> tuple[float, float]:
        return 8.6, PANEL * len(self.panels) + 0.5

    def _draw(self, axes, step: int | None = None) -> None:
        raise NotImplementedError("the panels are drawn by _fill, each into its own axes")

    def _fill(self, figure, step: int | None) -> None:
        panels = figure.subplots(len(self.panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, runs) in zip(panels, self.panels.items(), strict=True):
            for index, values in enumerate(runs.values()):
                look = {"color": SERIES_COLORS[index % len(SERIES_COLORS)], "linestyle": DASHES[index % len(DASHES)]}
                axes.stairs(values, range(len(values) + 1), baseline=None, linewidth=1.4, **look)
                axes.stairs(values, range(len(values) + 1), fill=True, color=look["color"], alpha=0.12)
            axes.set_ylabel(literal(name.replace(" ", "\n", 1)), size=SMALL_SIZE, rotation=0, ha="right", va="center")
            axes.set(xlim=(0, 1.02 * max(self.runs.values())))
            axes.set_ylim(0, 1.15 * max(max(values) for values in runs.values()) or 1)
            axes.yaxis.get_major_locator().set_params(nbins=3)
        panels[-1].set_xlabel("forward pass")
        self._name_runs(panels[0])
        self._set_title(panels[0])

    def _name_runs(self, axes) -> None:
        """Write each run's name and number of steps above the first panel, at the end of the run."""
        for index, (run, steps) in enumerate(self.runs.items()):
            color = SERIES_COLORS[index % len(SERIES_COLORS)]
            axes.axvline(steps, color=color, linewidth=1, linestyle=DASHES[index % len(DASHES)])
            axes.annotate(
                literal(f"{run}: {plural(steps, 'step')}"), (steps, 1), (-4, -3 - 13 * index), color=color, va="top",
                xycoords=("data", "axes fraction"), textcoords="offset points", ha="right", size=SMALL_SIZE,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
            )  # fmt: skip
