"""What host and device do at the same time: the lanes of a run, and single launches against a graph.

All times are seconds: of a Trace whose steps have `launched` and `device` times, or of kernels, measured or assumed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from minillm.trace import StepEvent, Trace
from minillm.viz.activity import columns_of
from minillm.viz.base import (
    LEGEND_LINE,
    SMALL_SIZE,
    Picture,
    PictureError,
    add_box,
    add_legend,
    add_letter,
    legend_lines,
    literal,
    noted,
    number,
    pad,
    plural,
    titled,
)
from minillm.viz.palette import BLACK, COMPUTES, IDLE, PREPARES, READS, WAITS, State

HOST, DEVICE = "host", "device"
AXES_WIDTH = 7.6  # inches
LANE = 0.52  # inches from lane to lane
HEIGHT = 0.62  # of a box, as a share of its lane
WIDE = 0.17  # inches a box needs for its label
BESIDE = 0.45  # lanes from the middle of a lane to a number above or below its boxes
NARROW = 0.03  # inches below which a box has no border
TOUCH = 1e-9  # seconds; spans no further apart than this touch
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


class Span(NamedTuple):
    """A stretch of time of one lane in one state."""

    start: float  # seconds
    end: float
    state: State
    label: str = ""  # instead of the state's letter

    @property
    def seconds(self) -> float:
        return self.end - self.start


class DeviceUse(NamedTuple):
    """For how much of a stretch of time the device computed."""

    seconds: float  # in all
    busy: float
    gaps: tuple[float, ...]  # seconds of each stretch in which it was idle

    @property
    def idle_share(self) -> float:
        """The idle part of the time, from 0 to 1."""
        return 1 - self.busy / self.seconds if self.seconds else 0.0


class LaneChart(Picture):
    """Lanes of spans on one time axis, which begins with the first span; the lane "device" also shows its gaps.

    `lanes`: name -> spans in order of time, which do not overlap within a lane. `window` = (start, end) in seconds
    shows only that part. Raises PictureError if it has no span, no lane is "device", or spans of one lane overlap.
    """

    def __init__(
        self,
        lanes: Mapping[str, Sequence[Span]],
        *,
        window: tuple[float, float] | None = None,
        title: str | None = None,
    ):
        for name, spans in lanes.items():
            if any(after.start < before.end - TOUCH for before, after in pairwise(spans)):
                raise PictureError(f"spans of lane {name!r} overlap; a lane does one thing at a time")
        everything = [span for spans in lanes.values() for span in spans]
        if not everything or DEVICE not in lanes:
            raise PictureError(f"lanes {list(lanes)}, {len(everything)} spans: give one or more, and a lane {DEVICE!r}")
        begin, end = window or (min(span.start for span in everything), max(span.end for span in everything))
        self.lanes = {name: list(_clipped(spans, begin, end)) for name, spans in lanes.items()}
        self.end = end - begin
        if not any(self.lanes.values()):
            raise PictureError(f"no span lies between {begin} and {end} seconds")
        self.lanes[DEVICE] = list(_with_gaps(self.lanes[DEVICE], self.end))
        self.title = title

    # --- words ---

    def device_use(self) -> DeviceUse:
        """The device's use over the time that is drawn."""
        gaps = tuple(span.seconds for span in self.lanes[DEVICE] if span.state is IDLE)
        return DeviceUse(self.end, self.end - sum(gaps), gaps)

    def summary(self) -> str:
        """The whole time, and the share of it in which the device is idle."""
        use = self.device_use()
        longest = f", the longest {seconds_in_words(max(use.gaps))}" if len(use.gaps) > 1 else ""
        idle = f"{seconds_in_words(sum(use.gaps))} in {plural(len(use.gaps), 'gap')}{longest}" if use.gaps else "no gap"
        return f"{seconds_in_words(self.end)}, device idle {use.idle_share:.0%}: {idle}"

    def totals(self) -> str:
        """For how long each lane is in each of its states."""
        parts = []
        for name, spans in self.lanes.items():
            amounts: Counter[State] = Counter()
            for span in spans:
                amounts[span.state] += span.seconds
            each = (f"{state.name} {seconds_in_words(amounts[state])}" for state in self._states() if amounts[state])
            parts.append(f"{name}: {', '.join(each) or 'nothing'}")
        return "\n".join(parts)

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}{' and '.join(self.lanes)}: {self.summary()}"

    # --- text ---

    def text(self) -> str:
        column, count = columns_of(self.end, whole=False)
        width = max(map(len, self.lanes))
        lines = [f"{pad(name, width)} |{_letters(spans, column, count)}|" for name, spans in self.lanes.items()]
        legend = "   ".join(f"{state.letter} {state.name}" for state in self._states())
        return "\n".join([*lines, f"a column is {seconds_in_words(column)};   {legend}", self.totals(), self.summary()])

    def _states(self) -> list[State]:
        """The states that occur, lane by lane; idle comes last."""
        states = dict.fromkeys(span.state for spans in self.lanes.values() for span in spans)
        return sorted(states, key=lambda state: state is IDLE)

    # --- figure ---

    def _size(self) -> tuple[float, float]:
        return AXES_WIDTH + 0.8, LANE * len(self.lanes) + 1.1 + self._legend_inches

    @property
    def _legend_inches(self) -> float:
        return LEGEND_LINE * len(legend_lines(self._states(), AXES_WIDTH))

    def _x_end(self) -> float:
        return self.end

    def _draw(self, axes, step: int | None = None) -> None:
        if axes.get_autoscalex_on():
            axes.set_xlim(0, self.end)
        axes.set_ylim(len(self.lanes) - 0.5, -0.5)
        scale = AXES_WIDTH / axes.get_xlim()[1]
        for row, spans in enumerate(self.lanes.values()):
            for span in spans:
                self._draw_span(axes, row, span, scale)
        axes.set_yticks(range(len(self.lanes)), [literal(name) for name in self.lanes])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        unit, name = _unit(axes.get_xlim()[1])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / unit:g}")
        axes.set_xlabel(name)
        words = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top", "annotation_clip": False}
        axes.annotate(literal(self.summary()), (0, 0), (0, -34), size=SMALL_SIZE, color=BLACK, **words)
        written = {span.state for spans in self.lanes.values() for span in spans if _says_letter(span, scale)}
        for row, states in enumerate(legend_lines(self._states(), AXES_WIDTH)):
            legend = [state if state in written else replace(state, letter="") for state in states]
            add_legend(axes, legend, y=50 + 16 * row)

    def _draw_span(self, axes, row: int, span: Span, scale: float) -> None:
        border = {"linewidth": 0.6 if span.seconds * scale >= NARROW else 0, "clip_on": False}
        box = add_box(axes, span.start, row - HEIGHT / 2, span.seconds, HEIGHT, span.state, **border)
        box.set_gid(span.state.letter)
        if _has_room(span, scale):
            label, state = span.label or span.state.letter, span.state
            add_letter(axes, (span.start + span.end) / 2, row, State(label, state.name, state.color, state.ink))


class HostDeviceLanes(LaneChart):
    """Host and device of a run, step by step: when each works and when it waits; the numbers are the steps'.

    The host schedules, prepares and launches a step, waits until the device is done, reads the tokens and updates. In
    between, the caller's code runs. A model in the host's own thread computes during the launch. `first_step` and
    `num_steps` choose consecutive steps: from the end of reading the previous step to the end of reading the last, so
    that exactly `num_steps` are read. Raises PictureError for a trace whose steps have no `launched` and `device`
    times, and for steps that are not in it.
    """

    def __init__(self, trace: Trace, *, first_step: int = 0, num_steps: int | None = None, title: str | None = None):
        timed = sum(step.launched is not None and step.device is not None for step in trace.steps)
        if not trace.steps or timed < len(trace.steps):
            raise PictureError(
                f"{timed} of {plural(len(trace.steps), 'step')} say when they were launched and when the device had "
                "them; draw a run of the engine"
            )
        last = len(trace.steps) - 1 if num_steps is None else first_step + num_steps - 1
        if not 0 <= first_step <= last < len(trace.steps):
            raise PictureError(f"steps {first_step} to {last} are not in the trace, which has {len(trace.steps)}")
        host = host_spans(trace.steps)
        planned = next(span.start for span in host if span.state is PREPARES and span.label == str(first_step))
        begin = trace.steps[first_step - 1].end_time if first_step else planned
        device = device_spans(trace.steps)
        super().__init__(
            {HOST: host, DEVICE: device}, window=(begin, trace.steps[last].end_time), title=titled(title, trace.dropped)
        )
        self.dropped = trace.dropped

    def text(self) -> str:
        return noted(super().text(), self.dropped)

    def _draw(self, axes, step: int | None = None) -> None:
        super()._draw(axes, step)
        for state, side in ((PREPARES, -1), (READS, 1)):
            self._number_beside(axes, [span for span in self.lanes[HOST] if span.state is state], side)

    def _number_beside(self, axes, spans: Sequence[Span], side: int) -> None:
        """Write step numbers above (side -1) or below boxes that are too narrow for them, if there is room for all."""
        scale = AXES_WIDTH / axes.get_xlim()[1]
        middles = [(span.start + span.end) / 2 for span in spans]
        widest = max((len(span.label) for span in spans), default=0) * WIDE / 2 + 0.05
        if any((after - before) * scale < widest for before, after in pairwise(middles)):
            return
        for span, middle in zip(spans, middles, strict=True):
            if not _has_room(span, scale):
                at_end = (axes.get_xlim()[1] - middle) * scale < widest / 2
                words = {"ha": "right" if at_end else "center", "va": "center", "size": SMALL_SIZE, "color": BLACK}
                axes.text(span.end if at_end else middle, side * BESIDE, span.label, **words).set_in_layout(False)


def host_spans(steps: Sequence[StepEvent]) -> list[Span]:
    """The host's spans in order: it launches a step, waits for one, reads it."""
    spans, now = [], float("-inf")
    moments = [(step.launched, 0, index) for index, step in enumerate(steps)]
    moments += [(step.end_time, 1, index) for index, step in enumerate(steps)]
    for end, is_read, index in sorted(moments):
        if is_read:
            ready = min(max(now, steps[index].device[1]), end)
            spans += [Span(now, ready, WAITS)] if ready > now else []
            spans.append(Span(ready, end, READS, str(index)))
        else:
            step = steps[index]
            begin = step.start_time if step.planned is None else step.planned
            spans.append(Span(min(max(now, begin), end), end, PREPARES, str(index)))
        now = end
    return spans


def device_spans(steps: Iterable[StepEvent]) -> list[Span]:
    """The device's spans. It takes one step after the other, so overlaps from rounding of its clock are removed."""
    spans, free = [], float("-inf")
    for index, step in enumerate(steps):
        start = max(free, step.device[0])
        free = max(start, step.device[1])
        spans.append(Span(start, free, COMPUTES, str(index)))
    return spans


def device_use(trace: Trace) -> DeviceUse:
    """Use of the device from the begin of a run's first step to the end of its last; errors as in HostDeviceLanes."""
    return HostDeviceLanes(trace).device_use()


def _has_room(span: Span, scale: float) -> bool:
    """Whether the span's label fits into its box; `scale` = inches per second."""
    label = span.label or span.state.letter
    return span.state is not IDLE and span.seconds * scale >= WIDE + 0.08 * (len(label) - 1)


def _says_letter(span: Span, scale: float) -> bool:
    """Whether the span's box shows the letter of its state."""
    return not span.label and _has_room(span, scale)


def _clipped(spans: Iterable[Span], begin: float, end: float) -> Iterable[Span]:
    """The parts of spans between `begin` and `end`, relative to `begin`."""
    for span in spans:
        start, stop = max(span.start, begin), min(span.end, end)
        if stop > start + TOUCH or (start, stop) == span[:2]:  # whole spans stay, however short
            yield span._replace(start=start - begin, end=stop - begin)


def _with_gaps(spans: Sequence[Span], end: float) -> Iterable[Span]:
    """The spans, with idle ones in the gaps."""
    now = 0.0
    for span in spans:
        if span.start > now + TOUCH:
            yield Span(now, span.start, IDLE)
        yield span
        now = span.end
    if end > now + TOUCH:
        yield Span(now, end, IDLE)


def _letters(spans: Iterable[Span], column: float, count: int) -> str:
    """For each stretch of `column` seconds the letter of the state that takes most of it; blank if none."""
    shares: list[Counter[str]] = [Counter() for _ in range(count)]
    for span in spans:
        for index in range(int(span.start / column), min(count, int(span.end / column) + 1)):
            share = min(span.end, (index + 1) * column) - max(span.start, index * column)
            if share > 1e-6 * column:
                shares[index][span.state.letter] += share
    return "".join(max(found, key=found.__getitem__) if found else " " for found in shares)


def _unit(seconds: float) -> tuple[float, str]:
    """The largest unit in which `seconds` is at least 2."""
    return next((unit for unit in UNITS if seconds >= 2 * unit[0]), UNITS[-1])


def seconds_in_words(seconds: float) -> str:
    """ "1.25 ms", "800 µs"."""
    unit, name = next((unit for unit in UNITS if seconds >= unit[0]), UNITS[-1])
    return f"{number(float(f'{seconds / unit:.3g}'))} {name}"
