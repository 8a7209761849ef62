"""Many small kernels: launched one by one, which may be too slow for the device, or all at once as a graph."""

from collections.abc import Mapping, Sequence

from minillm.viz.base import (
    LEGEND_LINE,
    SMALL_SIZE,
    Panels,
    Picture,
    PictureError,
    add_box,
    add_legend,
    add_letter,
    number,
    plural,
    text_table,
)
from minillm.viz.lanes import AXES_WIDTH, DEVICE, HOST, LaneChart, Span, seconds_in_words
from minillm.viz.palette import BLACK, IDLE, LIGHT_GREY, PART_COLORS, State, ink_on

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LAUNCHES = State("L", "launches", LIGHT_GREY, BLACK)
MOST_NAMES = 6  # kernels with a letter and a colour of their own
GAP_SECONDS = 1e-6  # from the end of one kernel to the start of the next: the order of magnitude on today's cards


class LaunchOverhead(Panels):
    """Above, the host launches each kernel; below, one launch starts all of them as a CUDA graph.

    `kernels`: (name, seconds on the device) in order, measured or assumed. `launch_seconds`: the host's time for one
    launch. The device begins a kernel once it is launched and `gap_seconds` have passed since the previous one ended.
    `graph_seconds`: the host's time to launch the graph. `enlarged`: if there are too many kernels to tell apart, those
    to draw; the totals are then two bars. Raises PictureError without kernels, for a time below 0, or for kernels to
    enlarge that do not exist.
    """

    def __init__(
        self,
        kernels: Sequence[tuple[str, float]],
        *,
        launch_seconds: float,
        graph_seconds: float,
        gap_seconds: float = GAP_SECONDS,
        enlarged: range | None = None,
        title: str | None = None,
    ):
        times = [seconds for _, seconds in kernels]
        if not times or min(*times, launch_seconds, graph_seconds, gap_seconds) < 0 or not sum(times):
            raise PictureError(
                f"kernels of {times} seconds, launches of {launch_seconds} and {graph_seconds}, gaps of {gap_seconds}: "
                "give at least one kernel that takes time, and no time below 0"
            )
        self.kernels = list(kernels)
        self.states = kernel_states([name for name, _ in kernels])
        eager = self._one_by_one(launch_seconds, gap_seconds)
        graph = self._as_graph(graph_seconds, gap_seconds)
        self.charts = eager, graph
        pictures = self.charts if enlarged is None else self._enlarged(enlarged)
        super().__init__(pictures, columns=1, share_x=True, title=title)

    def _one_by_one(self, launch_seconds: float, gap_seconds: float) -> LaneChart:
        host, device, free = [], [], 0.0
        for index, (name, seconds) in enumerate(self.kernels):
            host.append(Span(index * launch_seconds, (index + 1) * launch_seconds, LAUNCHES, self.states[name].letter))
            begin = max(host[-1].end, free)
            device.append(Span(begin, begin + seconds, self.states[name]))
            free = begin + seconds + gap_seconds
        title = f"launched one by one: {len(host):,} launch{'es' if len(host) > 1 else ''}"
        return LaneChart({HOST: host, DEVICE: device}, title=title)

    def _as_graph(self, graph_seconds: float, gap_seconds: float) -> LaneChart:
        device, begin = [], graph_seconds
        for name, seconds in self.kernels:
            device.append(Span(begin, begin + seconds, self.states[name]))
            begin += seconds + gap_seconds
        host = [Span(0.0, graph_seconds, LAUNCHES, "graph")]
        return LaneChart({HOST: host, DEVICE: device}, title="launched as a CUDA graph: 1 launch")

    def _enlarged(self, kernels: range) -> Sequence[Picture]:
        """The totals of both ways, then an excerpt of each, as long as the kernels to enlarge take one by one."""
        if not kernels or not 0 <= kernels[0] <= kernels[-1] < len(self.kernels):
            raise PictureError(f"kernels {kernels} to enlarge: there are 0 to {len(self.kernels) - 1}")
        spans = [[span for span in chart.lanes[DEVICE] if span.state is not IDLE] for chart in self.charts]
        begin, end = self.charts[0].lanes[HOST][kernels[0]].start, spans[0][kernels[-1]].end
        graph_begin = spans[1][kernels[0]].start
        graph_end = min(graph_begin + end - begin, self.charts[1].end)
        shown = sum(graph_begin <= span.start < graph_end for span in spans[1])
        titles = (
            f"{plural(len(kernels), 'kernel')}, enlarged: one by one",
            f"as much time of the graph: {shown} kernels",
        )
        windows = (begin, end), (graph_begin, graph_end)
        return [
            _DeviceTotals({"one by one": self.charts[0], "as a graph": self.charts[1]}),
            *(
                LaneChart(chart.lanes, window=window, title=title)
                for chart, window, title in zip(self.charts, windows, titles, strict=True)
            ),
        ]

    def summary(self) -> str:
        """Both times, and the time of the kernels alone."""
        eager, graph = (chart.end for chart in self.charts)
        alone = sum(seconds for _, seconds in self.kernels)
        return (
            f"{plural(len(self.kernels), 'kernel')}, {seconds_in_words(alone)} of work: one by one "
            f"{seconds_in_words(eager)}, as a graph {seconds_in_words(graph)}: {number(eager / graph)} times as fast"
        )

    def text(self) -> str:
        return f"{super().text()}\n\n{self.summary()}"

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}{self.summary()}"


class _DeviceTotals(Picture):
    """A bar per chart: the time its device spends in each state, and in total."""

    _legend_inches = LEGEND_LINE

    def __init__(self, charts: Mapping[str, LaneChart]):
        self.totals = {name: _seconds_by_state(chart.lanes[DEVICE]) for name, chart in charts.items()}
        self.states = list(dict.fromkeys(state for totals in self.totals.values() for state in totals))

    def text(self) -> str:
        header = ["device", *(f"{state.letter} {state.name}" for state in self.states), "in all"]
        rows = [
            [name, *(seconds_in_words(totals.get(state, 0.0)) for state in self.states), self._in_all(name)]
            for name, totals in self.totals.items()
        ]
        return text_table(header, rows)

    def alt(self) -> str:
        return "the device: " + ", ".join(f"{name} {self._in_all(name)}" for name in self.totals)

    def _in_all(self, name: str) -> str:
        return seconds_in_words(sum(self.totals[name].values()))

    def _size(self) -> tuple[float, float]:
        return AXES_WIDTH + 0.8, 0.42 * len(self.totals) + 0.55 + self._legend_inches

    def _draw(self, axes, step: int | None = None) -> None:
        most = max(sum(totals.values()) for totals in self.totals.values())
        for row, (name, totals) in enumerate(self.totals.items()):
            left = 0.0
            for state in self.states:
                seconds = totals.get(state, 0.0)
                add_box(axes, left, row - 0.36, seconds, 0.72, state, linewidth=0.6).set_gid(f"{name}:{state.letter}")
                if seconds / most * AXES_WIDTH > 0.2 and state is not IDLE:
                    add_letter(axes, left + seconds / 2, row, state)
                left += seconds
            axes.annotate(
                self._in_all(name), (left, row), (5, 0), textcoords="offset points", va="center", size=SMALL_SIZE,
                annotation_clip=False,
            )  # fmt: skip
        axes.set(xlim=(0, 1.12 * most), ylim=(len(self.totals) - 0.5, -0.5))
        axes.set_yticks(range(len(self.totals)), list(self.totals))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{1e6 * value:g}")
        axes.set_xlabel("µs of the device in all")
        add_legend(axes, self.states, y=44)


def _seconds_by_state(spans: Sequence[Span]) -> dict[State, float]:
    """Seconds per state in order of appearance, idle last."""
    totals: dict[State, float] = {}
    for span in spans:
        totals[span.state] = totals.get(span.state, 0.0) + span.seconds
    return dict(sorted(totals.items(), key=lambda item: item[0] is IDLE))


def kernel_states(names: Sequence[str]) -> dict[str, State]:
    """A letter and a colour for each name, in order of appearance; from the sixth on they share one."""
    distinct = list(dict.fromkeys(names))
    own = distinct if len(distinct) <= MOST_NAMES else [*distinct[: MOST_NAMES - 1], "others"]
    looks = zip(own, LETTERS, PART_COLORS, strict=False)
    states = {name: State(letter, name, color, ink_on(color)) for name, letter, color in looks}
    return {name: states.get(name) or states["others"] for name in distinct}
