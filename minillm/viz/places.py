"""Which request holds which place of the batch, step by step; waste shows as holes."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from minillm.trace import StepEvent, Trace
from minillm.viz.activity import columns_of
from minillm.viz.base import (
    SMALL_SIZE,
    Picture,
    PictureError,
    add_box,
    add_legend,
    literal,
    noted,
    plural,
)
from minillm.viz.palette import BLACK, GREY, STATES, State

ROW, BETWEEN, WIDTH = 0.085, 0.42, 8.8  # inches: height of a place, space between runs, whole width
MARGIN = 1.13  # the axis is longer than the longest run, to have room for its number of steps


class Stay(NamedTuple):
    """Consecutive steps in which a place is in one state for one request."""

    place: int
    request_id: str
    state: str  # "prefill", "decode", "recompute" or "padding"
    start: int  # step
    end: int  # the step after the last


class Places(Picture):
    """Several runs of the same requests above each other, with a row per place of the batch and an axis of steps.

    A request gets the first free place, from its first step to its last. A place is hatched while it computes only
    padding, and empty while no request holds it. Raises PictureError for a trace without steps.
    """

    def __init__(self, traces: Mapping[str, Trace], *, title: str | None = None):
        if not traces or not all(trace.steps for trace in traces.values()):
            raise PictureError("nothing to draw: give at least one trace, and each with a step")
        self.steps = {name: len(trace.steps) for name, trace in traces.items()}
        self.stays = {name: stays(trace.steps) for name, trace in traces.items()}
        self.num_places = {name: 1 + max(stay.place for stay in found) for name, found in self.stays.items()}
        self.dropped = "; ".join(dict.fromkeys(trace.dropped for trace in traces.values() if trace.dropped))
        self.title = title

    def share_useful(self, name: str) -> float:
        """The share of places, over all steps of a run, that computed a useful token."""
        useful = sum(stay.end - stay.start for stay in self.stays[name] if stay.state != "padding")
        return useful / (self.num_places[name] * self.steps[name])

    def text(self) -> str:
        longest = max(self.steps.values())
        column, columns = columns_of(longest, whole=True)
        charts = []
        for name, found in self.stays.items():
            rows = [
                "".join(self._sign(found, place, at * column, (at + 1) * column) for at in range(int(columns)))
                for place in range(self.num_places[name])
            ]
            charts.append("\n".join([self._heading(name), *(f"{i:3} |{row.rstrip()}" for i, row in enumerate(rows))]))
        key = "   ".join(f"{state.letter} {state.name}" for state in self._states())
        return noted("\n\n".join([*charts, f"a column is {plural(int(column), 'step')}; {key}"]), self.dropped)

    def _sign(self, found: list[Stay], place: int, start: float, end: float) -> str:
        """The letter of the state that takes most of these steps; a blank for none."""
        shares: dict[str, float] = {}
        for stay in found:
            if stay.place == place and stay.start < end and stay.end > start:
                taken = min(end, stay.end) - max(start, stay.start)
                shares[stay.state] = shares.get(stay.state, 0) + taken
        return STATES[max(shares, key=lambda state: shares[state])].letter if shares else " "

    def _heading(self, name: str) -> str:
        return f"{name}: {plural(self.steps[name], 'step')}, {self.share_useful(name):.0%} of the places in use"

    def _states(self) -> list[State]:
        seen = {stay.state for found in self.stays.values() for stay in found}
        return [state for key, state in STATES.items() if key in seen]

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}{'; '.join(map(self._heading, self.stays))}"

    # --- figure ---

    def _size(self) -> tuple[float, float]:
        return WIDTH, ROW * sum(self.num_places.values()) + BETWEEN * len(self.steps) + 0.75

    def _draw(self, axes, step: int | None = None) -> None:
        top, ticks = 0.0, {}
        longest = max(self.steps.values())
        for name, found in self.stays.items():
            axes.annotate(
                literal(self._heading(name)), (0, top + 0.8 * BETWEEN), (0, 2), textcoords="offset points",
                size=SMALL_SIZE, fontweight="bold",
            )  # fmt: skip
            top += BETWEEN
            for stay in found:
                edge = {"edgecolor": GREY, "linewidth": 0} if stay.state == "padding" else {"linewidth": 0.5}
                state = STATES[stay.state]
                hatch = 3 * state.hatch
                place = stay.start, top + ROW * stay.place, stay.end - stay.start, 0.9 * ROW
                add_box(axes, *place, state, **edge, hatch=hatch).set_gid(f"{name}:{stay.state}")
            bottom = top + ROW * self.num_places[name]
            axes.plot(2 * [self.steps[name]], [top - 0.04, bottom + 0.03], color=BLACK, linewidth=1.5)
            axes.annotate(
                plural(self.steps[name], "step"), (self.steps[name], (top + bottom) / 2), (5, 0), va="center",
                textcoords="offset points", size=SMALL_SIZE, fontweight="bold",
            )  # fmt: skip
            ticks[(top + bottom) / 2] = f"{self.num_places[name]} places"
            top = bottom
        axes.set(xlim=(0, MARGIN * longest), ylim=(top + 0.06, 0), xlabel="step: a forward pass")
        axes.set_yticks(list(ticks), list(ticks.values()), rotation=90, va="center")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        add_legend(axes, self._states(), y=40)


def stays(steps: Sequence[StepEvent]) -> list[Stay]:
    """The place of each request, and its states there."""
    states: dict[str, dict[int, str]] = {}
    for number, step in enumerate(steps):
        for part in step.scheduled:
            doing = states.setdefault(part.request_id, {})
            if doing.get(number, "padding") == "padding":  # padding beside real tokens is not shown
                doing[number] = part.why
    free_from: list[int] = []  # of each place
    found = []
    for request_id, doing in states.items():  # in the order of their first steps
        first, last = min(doing), max(doing)
        place = next((at for at, free in enumerate(free_from) if free <= first), len(free_from))
        free_from[place : place + 1] = [last + 1]
        for state, numbers in groupby(sorted(doing), key=doing.__getitem__):
            every = list(numbers)
            found.append(Stay(place, request_id, state, every[0], every[-1] + 1))
    return found
