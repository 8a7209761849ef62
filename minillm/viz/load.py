"""Throughput and latency against the load offered: where a server stops keeping up, and where it breaks its promise."""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile

from minillm.viz.base import Panels, PictureError, number
from minillm.viz.curves import Curves, Look
from minillm.viz.palette import BLACK, SERIES_COLORS

KEEPS_UP = 0.9  # of the share of the load that is served at best is served up to the knee


class LoadCurves(Panels):
    """Above, requests served against requests offered, both a second; below, latencies on a logarithmic axis.

    `throughput` and `latencies` map a name to as many values as `offered` has; latencies are seconds. The share served
    is throughput / offered (below 1 in a short run even without a queue, as it ends with a drain); the knee is the last
    load up to which it is at least `keeps_up` times the best share of its series. `slo` (seconds) is a line across; of
    each latency in `judged` (by default those of the highest percentile, else the last) the last load within it is
    marked. Raises PictureError if lengths disagree, loads do not rise from above 0, or a name is unknown.
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
        label = "requests offered a second"
        above = Curves(
            self.offered, served, label, "requests served a second", kinds={"all offered": "predicted"}, title=title
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
        """From {way of batching: {offered load: `simulation.report.Report`}}; all ways with the same loads.

        `time` is one of the report's "ttft", "itl", "e2e".
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
        """A latency looks like the throughput whose name its own begins with; dotted if it is not judged."""
        owners = [place for place, owner in enumerate(throughputs) if f"{name} ".startswith(f"{owner} ")]
        return Look(owners[0] if owners else index, dotted=name not in self.judged)

    def _knee(self, values: Sequence[float | None]) -> float | None:
        shares = [value / load for load, value in zip(self.offered, values, strict=True) if value is not None]
        least = self.keeps_up * max(shares, default=0.0)
        return self._last(values, lambda load, value: value / load >= least)

    def _within(self, values: Sequence[float | None]) -> float | None:
        return self._last(values, lambda load, value: value <= self.slo)

    def _last(self, values: Sequence[float | None], is_good: Callable[[float, float], bool]) -> float | None:
        """The last load up to which all values are good; None if already the first is not."""
        good = takewhile(lambda pair: pair[1] is not None and is_good(*pair), zip(self.offered, values, strict=True))
        return max((load for load, _ in good), default=None)

    def text(self) -> str:
        return "\n\n".join([*(picture.text() for picture in self.pictures), self.summary()])

    def summary(self) -> str:
        """The loads up to the knees, and within the SLO."""
        lines = [f"{name}: knee at {_in_words(knee)}" for name, knee in self.knees.items()]
        promise = "" if self.slo is None else f"last load within the SLO of {self.slo:g} s"
        lines += [f"{name}: {promise}: {_in_words(load)}" for name, load in self.within.items()]
        return "\n".join(lines)

    def alt(self) -> str:
        return f"{super().alt()}. {self.summary()}".replace("\n", "; ")


def _in_words(load: float | None) -> str:
    return "none" if load is None else f"{number(load)} requests a second"


def _most_severe(latencies: Mapping[str, object]) -> list[str]:
    """The names that end in the highest percentile, such as "p99"; without percentiles the last name."""
    ranks = {name: float(name.rsplit("p", 1)[-1]) for name in latencies if name.rsplit("p", 1)[-1].isdigit()}
    return [name for name, rank in ranks.items() if rank == max(ranks.values())] or list(latencies)[-1:]
