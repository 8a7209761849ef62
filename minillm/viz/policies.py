"""The same requests under several batching policies, above each other on one axis."""

from collections.abc import Mapping

from minillm.trace import Trace
from minillm.viz.activity import columns_of, legend
from minillm.viz.base import SMALL_SIZE, Panels, PictureError, add_legend, plural, text_table, titled
from minillm.viz.palette import BLACK
from minillm.viz.timeline import AXES_WIDTH, Timeline, legend_states

MARGIN = 1.12  # the axis is longer than the longest run, to have room for its makespan
MOMENTS = 60  # frames of the stepper, at most


class PolicyTimelines(Panels):
    """Timelines of several traces on one common axis, with one legend, and the makespan of each marked.

    `unit` = "s" (to scale), "tokens" (computed tokens with padding, the same on every machine) or "steps".
    Steps = moments of the common axis. Raises PictureError if there is no trace, or an empty one.
    """

    def __init__(self, traces: Mapping[str, Trace], unit: str = "s", *, title: str | None = None):
        if not traces:
            raise PictureError("no traces were given; name at least one, such as {'continuous': trace}")
        self.timelines = {name: _CompactTimeline(name, trace, unit) for name, trace in traces.items()}
        super().__init__(list(self.timelines.values()), columns=1, share_x=True, title=title)
        self.unit = unit
        self.longest = max(timeline.end() for timeline in self.timelines.values())
        self.moment, self.num_steps = columns_of(self.longest, MOMENTS, whole=unit != "s")
        list(self.timelines.values())[-1].is_last = True

    def text(self) -> str:
        timelines = list(self.timelines.values())
        column, columns = columns_of(self.longest, whole=self.unit != "s")
        charts = ["\n".join([timeline.title, *timeline.chart(column, columns)]) for timeline in timelines]
        key = f"a column is {timelines[0].amount(column)}\n{legend(timelines)}"
        return "\n\n".join([*charts, key, self._table()])

    def _table(self) -> str:
        first = next(iter(self.timelines))
        rows = [
            [
                name,
                timeline.amount(timeline.end()),
                f"{self.timelines[first].end() / timeline.end():.2f}x",
                f"{timeline.num_steps:,}",
                f"{timeline.num_tokens:,}",
                f"{timeline.num_useful:,}",
                f"{timeline.num_useful / timeline.num_tokens:.1%}",
            ]
            for name, timeline in self.timelines.items()
        ]
        return text_table(["", "makespan", f"against {first}", "steps", "computed tokens", "useful", "share"], rows)

    def caption(self, step: int) -> str:
        now = (step + 1) * self.moment
        timelines = list(self.timelines.values())
        done = [f"{timeline.name} {timeline.progress(now)}" for timeline in timelines]
        return f"after {timelines[0].amount(min(now, self.longest))}: {', '.join(done)}"

    def alt(self) -> str:
        spans = [f"{name} {timeline.amount(timeline.end())}" for name, timeline in self.timelines.items()]
        return f"{self.title + ': ' if self.title else ''}timelines on one axis; makespans: {', '.join(spans)}"

    def _fill(self, figure, step: int | None) -> None:
        self._set_title_of_all(figure)
        heights = [len(timeline.request_ids) for timeline in self.timelines.values()]
        places = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        for place, timeline in zip(places, self.timelines.values(), strict=True):
            axes = figure.add_subplot(place)
            axes.set_xlim(0, MARGIN * self.longest)
            now = None if step is None else (step + 1) * self.moment
            timeline._draw(axes, None if now is None else timeline.step_at(now))
            timeline._set_title(axes)
            if now is not None:
                axes.axvline(min(now, self.longest), color=BLACK, linewidth=1, linestyle=":")
        add_legend(axes, legend_states(list(self.timelines.values())), y=44)


class _CompactTimeline(Timeline):
    """A low timeline without its own legend, with a mark at the makespan."""

    is_last = False
    _title_pad = 5
    _legend_inches = 0.0  # PolicyTimelines draws one

    def __init__(self, name: str, trace: Trace, unit: str):
        super().__init__(trace, unit)
        self.name = name
        self.num_tokens = sum(step.num_tokens for step in trace.steps)
        self.num_useful = sum(step.num_useful for step in trace.steps)
        self.title = f"{titled(name, trace.dropped)}: {self.measures()}"

    def measures(self) -> str:
        """The makespan and the computed tokens."""
        makespan = [] if self.unit == "tokens" else [self.amount(self.end())]
        useful = f"{self.num_useful:,} useful ({self.num_useful / self.num_tokens:.1%})"
        return ", ".join([*makespan, plural(self.num_tokens, "computed token"), useful])

    def step_at(self, moment: float) -> int:
        """The last step that has begun by `moment`."""
        return max(0, sum(start < moment * (1 - 1e-9) for start, _ in self._spans) - 1)

    def progress(self, moment: float) -> str:
        """How many requests have ended by `moment`."""
        done = sum(self._spans[finish][1] <= moment * (1 + 1e-9) for finish in self._finish.values())
        return f"{done} of {len(self.request_ids)} finished"

    def _bracketed(self) -> bool:
        return False

    def _measured(self) -> bool:
        return False

    def _title_width(self) -> float:
        return AXES_WIDTH + 0.6

    def _row_height(self) -> float:
        return max(0.03, min(0.24, 2.4 / len(self.request_ids)))

    def _size(self) -> tuple[float, float]:
        return AXES_WIDTH + 1, self._row_height() * len(self.request_ids) + 0.2 + 0.75 * self.is_last

    def _draw(self, axes, step: int | None = None) -> None:
        self._draw_rows(axes, step)
        self._label_axes(axes)
        end = self.end()
        axes.axvline(end, color=BLACK, linewidth=1.5)
        axes.annotate(
            self.amount(end), (end, 0.5), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
            size=SMALL_SIZE, va="center", fontweight="bold",
        )  # fmt: skip
        if not self.is_last:
            axes.set_xlabel("")
            axes.tick_params(axis="x", labelbottom=False)
