"""Throughput and latency, against the offered load and against each other: the load from which a server cannot keep up,
and the load from which it misses its latency target.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from minillm.errors import check_choice, check_number
from minillm.viz.base import SMALL_SIZE, Panels, Picture, PictureError, literal, number, text_table
from minillm.viz.curves import Curves, Look
from minillm.viz.palette import BLACK, SERIES_COLORS, WHITE

KEEPS_UP = 0.9  # up to the knee, at least this part of the best share of the load is served


class LoadPoint(NamedTuple):
    """One run of a load test."""

    loop: str  # "open": requests arrive at a given rate; "closed": each client waits for its answer
    offered: float | None  # requests per second; None in a closed loop
    served: float  # requests per second
    latency: float  # seconds

    @property
    def saturated(self) -> bool:
        """Whether a queue grew during the run, so that the latency depends on the length of the run."""
        return self.offered is not None and self.served < KEEPS_UP * self.offered


class ThroughputLatency(Picture):
    """Latency, on a logarithmic axis, against requests served per second: a line per system, a point per run.

    `systems` maps a name to its `LoadPoint`s in the order of the load. Points of a saturated system are hollow, closed
    loops are dashed, `limit` (seconds) is a line across. `best` are the most requests per second that each serves
    within the limit, without saturated points. Raises PictureError without points, for a loop that is neither open nor
    closed, or a latency that is not above 0.
    """

    def __init__(
        self,
        systems: Mapping[str, Sequence[tuple]],
        *,
        limit: float | None = None,
        latency_label: str = "latency",
        title: str | None = None,
    ):
        self.systems = {name: [LoadPoint(*point) for point in points] for name, points in systems.items()}
        if not self.systems or not all(self.systems.values()):
            raise PictureError("nothing to draw: give at least one system, and each at least one point")
        for name, points in self.systems.items():
            if len({point.loop for point in points}) > 1:
                raise PictureError(f"{name!r} has points of an open and of a closed loop; make two systems of it")
            check_choice(f"loop of {name!r}", points[0].loop, ("open", "closed"), error=PictureError)
            for point in points:
                check_number(f"latency of {name!r}", point.latency, "above 0", lambda s: s > 0, error=PictureError)
        self.limit, self.latency_label, self.title = limit, latency_label, title
        self.best = {} if limit is None else {name: self._best(points) for name, points in self.systems.items()}

    def _best(self, points: Sequence[LoadPoint]) -> float | None:
        return max((each.served for each in points if not each.saturated and each.latency <= self.limit), default=None)

    def text(self) -> str:
        rows = [
            [
                name, point.loop, "–" if point.offered is None else number(point.offered), number(point.served),
                number(point.latency), "saturated" * point.saturated,
            ]
            for name, points in self.systems.items() for point in points
        ]  # fmt: skip
        table = text_table(["", "loop", "offered", "served", f"{self.latency_label}, s", ""], rows)
        return "\n".join([*(line.rstrip() for line in table.splitlines()), *self.summary().splitlines()])

    def summary(self) -> str:
        """The most requests per second that each serves within the limit, one line each; "" without a limit."""
        names = {name: f"{name} (closed loop)" if self._is_closed(name) else name for name in self.systems}
        return "\n".join(
            f"{names[name]}: within {self.limit:g} s {_in_words(most)}" for name, most in self.best.items()
        )

    def _is_closed(self, name: str) -> bool:
        return self.systems[name][0].loop == "closed"

    def alt(self) -> str:
        what = self.title or f"{self.latency_label} against requests served"
        return f"{what}: {', '.join(self.systems)}. {self.summary()}".replace("\n", "; ").removesuffix(". ")

    def _size(self) -> tuple[float, float]:
        return 6.4, 3.8

    def _draw(self, axes, step: int | None = None) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_yscale("log")
        for index, (name, points) in enumerate(self.systems.items()):
            look, closed = Look(index), self._is_closed(name)
            line = {"color": look.color, "linestyle": "--" if closed else "-", "zorder": 2}
            marker = look.style()["marker"]
            xs, ys = [point.served for point in points], [point.latency for point in points]
            axes.plot(xs, ys, marker=marker, label=literal(f"{name} (closed loop)" if closed else name), **line)
            hollow = [point for point in points if point.saturated]
            axes.plot(
                [point.served for point in hollow], [point.latency for point in hollow],
                color=look.color, linestyle="", marker=marker, markerfacecolor=WHITE, zorder=3,
            )  # fmt: skip
        if any(point.saturated for points in self.systems.values() for point in points):
            axes.plot([], [], color=BLACK, linestyle="", marker="o", markerfacecolor=WHITE, label="saturated")
        if self.limit is not None:
            axes.axhline(self.limit, color=BLACK, linewidth=1.2, linestyle=":", label=f"limit {self.limit:g} s")
        axes.set_xlim(left=0)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="requests served per second", ylabel=literal(f"{self.latency_label}, seconds"))
        axes.grid(color="#EEEEEE", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=SMALL_SIZE, borderaxespad=0)


class LoadCurves(Panels):
    """Above, served against offered requests, both per second; below, latencies on a logarithmic axis.

    `throughput` and `latencies` map a name to as many values as `offered` has; latencies are seconds. The share served
    is throughput / offered. In a short run it is below 1 even without a queue, because the last requests are still
    computed after the load has ended. The knee is the last load up to which it is at least `keeps_up` times the best
    share of its series. `slo` (seconds) is a line across; for each latency in `judged` the last load within it is
    marked. `judged` is by default the latencies of the highest percentile, else the last one. Raises PictureError if
    lengths disagree, loads do not rise from above 0, or a name is unknown.
    """

    def __init__(
        self,
        offered: Sequence[float],
        throughput: Mapping[str, Sequence[float | None]],
        latencies: Mapping[str, Sequence[float | None]],
        *,
        slo: float | None = None,
        judged: Sequence[str] | None = None,
        keeps_up: float = KEEPS_UP,
        latency_label: str = "latency",
        title: str | None = None,
    ):
        self.offered = list(offered)
        if not self.offered or any(a >= b for a, b in zip([0, *self.offered], self.offered, strict=False)):
            raise PictureError(f"the offered loads must be above 0 and rise; they are {self.offered}")
        self.slo, self.keeps_up = slo, keeps_up
        self.judged = _most_severe(latencies) if judged is None else list(judged)
        if unknown := [name for name in self.judged if name not in latencies]:
            raise PictureError(f"judged names {unknown}; the latencies are {list(latencies)}")
        served = {"all offered": self.offered, **throughput}
        label = "requests offered per second"
        above = Curves(
            self.offered, served, label, "requests served per second", kinds={"all offered": "predicted"}, title=title
        )
        below = Curves(
            self.offered, latencies, label, f"{latency_label}, seconds", log_y=True,
            limits={} if slo is None else {"SLO": slo},
        )  # fmt: skip
        self.knees = {name: self._knee(values) for name, values in throughput.items()}
        self.within = {} if slo is None else {name: self._within(latencies[name]) for name in self.judged}
        above.marks = {name: knee for name, knee in self.knees.items() if knee is not None}
        below.marks = {name: load for name, load in self.within.items() if load is not None}
        above.marks_say, below.marks_say = "knee, ", "SLO, "
        above.looks = {"all offered": Look(SERIES_COLORS.index(BLACK), dashed=True)}
        above.looks |= {name: Look(index) for index, name in enumerate(throughput)}
        below.looks = {name: self._look(name, index, list(throughput)) for index, name in enumerate(latencies)}
        super().__init__([above, below], columns=1, share_x=True)

    @classmethod
    def of_reports(
        cls,
        reports: Mapping[str, Mapping[float, object]],
        *,
        time: str = "ttft",
        percentiles: Sequence[str] = ("p50", "p99"),
        slo: float | None = None,
        title: str | None = None,
    ) -> "LoadCurves":
        """From {batching: {offered load: `simulation.reporting.Report`}}; all with the same loads.

        `time` is one of the report's "ttft", "itl" and "e2e".
        """
        loads = sorted(next(iter(reports.values()), ()))
        if not loads or any(sorted(runs) != loads for runs in reports.values()):
            raise PictureError("every way of batching needs reports of the same loads, at least one")
        throughput = {name: [runs[load].requests_per_second for load in loads] for name, runs in reports.items()}
        latencies = {
            f"{name} {percentile}": [getattr(getattr(runs[load], time), percentile) for load in loads]
            for percentile in percentiles
            for name, runs in reports.items()
        }
        return cls(loads, throughput, latencies, slo=slo, latency_label=time.upper(), title=title)

    def _look(self, name: str, index: int, throughputs: list[str]) -> Look:
        """A latency is drawn like the throughput whose name its own begins with, and dotted if it is not judged."""
        owners = [place for place, owner in enumerate(throughputs) if f"{name} ".startswith(f"{owner} ")]
        return Look(owners[0] if owners else index, dotted=name not in self.judged)

    def _knee(self, values: Sequence[float | None]) -> float | None:
        shares = [value / load for load, value in zip(self.offered, values, strict=True) if value is not None]
        least = self.keeps_up * max(shares, default=0.0)
        return self._last(values, lambda load, value: value / load >= least)

    def _within(self, values: Sequence[float | None]) -> float | None:
        return self._last(values, lambda load, value: value <= self.slo)

    def _last(self, values: Sequence[float | None], is_good: Callable[[float, float], bool]) -> float | None:
        """The last load up to which all values are good; None if the first is not."""
        good = takewhile(lambda pair: pair[1] is not None and is_good(*pair), zip(self.offered, values, strict=True))
        return max((load for load, _ in good), default=None)

    def text(self) -> str:
        return "\n\n".join([*(picture.table() for picture in self.pictures), self.summary()])

    def summary(self) -> str:
        """The loads up to the knees, and within the SLO."""
        lines = [f"{name}: knee at {_in_words(knee)}" for name, knee in self.knees.items()]
        promise = "" if self.slo is None else f"last load within the SLO of {self.slo:g} s"
        lines += [f"{name}: {promise}: {_in_words(load)}" for name, load in self.within.items()]
        return "\n".join(lines)

    def alt(self) -> str:
        return f"{super().alt()}. {self.summary()}".replace("\n", "; ")


def _in_words(load: float | None) -> str:
    return "none" if load is None else f"{number(load)} requests per second"


def _most_severe(latencies: Mapping[str, object]) -> list[str]:
    """The names that end in the highest percentile, such as "p99"; without percentiles the last name."""
    ranks = {name: float(name.rsplit("p", 1)[-1]) for name in latencies if name.rsplit("p", 1)[-1].isdigit()}
    return [name for name, rank in ranks.items() if rank == max(ranks.values())] or list(latencies)[-1:]
