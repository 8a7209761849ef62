"""Timelines: what each request does in each step of a run, drawn from its Trace alone."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minillm.trace import ScheduledTokens, Trace
from minillm.viz.base import (
    SMALL_SIZE,
    Picture,
    PictureError,
    add_box,
    add_legend,
    add_letter,
    literal,
    number,
    pad,
    plural,
    request_label,
    text_table,
    text_width,
    token_label,
)
from minillm.viz.palette import BLACK, GREY, LIGHT_GREY, STATES

UNITS = ("s", "steps")
STEPS_A_LINE = 100  # columns of a text timeline before it goes on below
NARROW = 0.05  # inches; steps in one state that are narrower are drawn as one box
WIDE = 0.17  # inches; a box as wide as this has room for its letter
MAX_LISTED = 6  # requests up to which the text in milliseconds lists every stretch
MAX_BRACKETED = 2  # requests up to which TTFT and ITL get brackets in the figure; beyond, a column of numbers
AXES_WIDTH = 6.6  # inches

SHORTEST_WAIT = 0.002  # share of the whole run; a shorter wait is the time it takes to call the model

# A request that does several things in one step shows the first of these.
PRECEDENCE = ("recompute", "prefill", "decode", "padding")


@dataclass(frozen=True)
class Box:
    """What one request does without a break: consecutive steps `first_step`..`last_step` in one state."""

    request_id: str
    state: str  # a key of palette.STATES
    start: float  # seconds since the trace began, or steps
    end: float
    first_step: int
    last_step: int
    num_tokens: int = 0  # pushed through the model for it, padding included

    @property
    def width(self) -> float:
        return self.end - self.start


class Timeline(Picture):
    """One row a request: waiting, prefill, decode, recompute, padding, finished, and its TTFT and ITL.

    `unit` = "s": widths are true to time; "steps": every forward pass is as wide as the next, so that the picture is
    the same on every machine. `sampled_tokens` (request id -> its output tokens) writes each token where it came into
    being, as far as there is room; drawn for one or two requests. Steps = forward passes.
    Raises PictureError for a trace without steps or requests.
    """

    def __init__(
        self,
        trace: Trace,
        unit: str = "s",
        *,
        title: str | None = None,
        sampled_tokens: dict[str, Sequence[str]] | None = None,
    ):
        if unit not in UNITS:
            raise PictureError(f"unit is {unit!r}; use one of {UNITS}")
        if not trace.steps or not trace.requests:
            raise PictureError("the trace is empty: a timeline needs at least one request and one step")
        self.trace = trace
        self.unit = unit
        self.title = title
        self.sampled_tokens = sampled_tokens or {}
        self.num_steps = len(trace.steps)
        self.request_ids = [record.request_id for record in trace.requests]
        self.begin = min(trace.steps[0].start_time, *(record.arrival_time for record in trace.requests), float("inf"))
        self._parts = parts_by_request(trace)
        self._boxes: dict[str, list[Box]] = {}
        self._finish = {request_id: index for index, step in enumerate(trace.steps) for request_id in step.finished}

    # --- from the trace to boxes ---

    def states(self, request_id: str) -> list[str | None]:
        """The state of a request in each step: a key of palette.STATES, or None before it arrives."""
        arrival = self.trace.request(request_id).arrival_time
        parts = self._parts[request_id]
        finish = self._finish.get(request_id, self.num_steps)
        states: list[str | None] = []
        for index, step in enumerate(self.trace.steps):
            if index in parts:
                states.append(next(why for why in PRECEDENCE if any(part.why == why for part in parts[index])))
            elif index > finish:
                states.append("finished")
            else:
                states.append("waiting" if arrival <= step.start_time else None)
        return states

    def boxes(self, request_id: str) -> list[Box]:
        """The states of a request as boxes in this timeline's unit: one a step, and one a stretch of waiting."""
        if request_id not in self._boxes:
            self._boxes[request_id] = self._find_boxes(request_id)
        return self._boxes[request_id]

    def _find_boxes(self, request_id: str) -> list[Box]:
        boxes: list[Box] = []
        for index, state in enumerate(self.states(request_id)):
            if state in (None, "finished"):
                continue
            tokens = sum(part.num_tokens for part in self._parts[request_id].get(index, ()))
            box = Box(request_id, state, *self._span(index), index, index, tokens)
            if state == "waiting" and boxes and boxes[-1].state == "waiting":
                boxes[-1] = _joined(boxes[-1], box)
            else:
                boxes.append(box)
        return boxes if self.unit == "steps" else self._true_to_time(request_id, boxes)

    def _span(self, index: int) -> tuple[float, float]:
        step = self.trace.steps[index]
        return (
            (index, index + 1) if self.unit == "steps" else (step.start_time - self.begin, step.end_time - self.begin)
        )

    def _true_to_time(self, request_id: str, boxes: list[Box]) -> list[Box]:
        """Waiting lasts from the arrival, or the end of the step before, to the start of the next step."""
        computing = [box for box in boxes if box.state != "waiting"]
        stretched: list[Box] = []
        shortest = SHORTEST_WAIT * self._x_end()
        now = self.trace.request(request_id).arrival_time - self.begin
        for box in computing:
            before = stretched[-1].last_step if stretched else None
            if box.start - now > shortest and (before is None or box.first_step > before + 1):
                first = 0 if before is None else before + 1
                stretched.append(Box(request_id, "waiting", now, box.start, first, box.first_step - 1))
            stretched.append(box)
            now = box.end
        if boxes and boxes[-1].state == "waiting":  # the trace ends while it still waits
            stretched.append(replace(boxes[-1], start=now))
        return stretched

    def ttft(self, request_id: str) -> float | None:
        """Time to first token in this timeline's unit, or None if the request got none."""
        if self.unit == "steps":
            sampled = self._sampling_steps(request_id)
            states = self.states(request_id)
            return sampled[0] + 1 - next(i for i, state in enumerate(states) if state) if sampled else None
        return self.trace.ttft(request_id) if self.trace.token_times(request_id) else None

    def mean_itl(self, request_id: str) -> float | None:
        """Mean time between tokens in this timeline's unit, or None for fewer than two tokens."""
        ends = [self._span(index)[1] for index in self._sampling_steps(request_id)]
        return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else None

    def _sampling_steps(self, request_id: str) -> list[int]:
        """The step of each output token."""
        return [
            index for index, parts in self._parts[request_id].items() for part in parts for _ in range(part.num_sampled)
        ]

    # --- text ---

    def text(self) -> str:
        return self._text_in_steps() if self.unit == "steps" else self._text_in_milliseconds()

    def _text_in_steps(self) -> str:
        names = [request_label(request_id) for request_id in self.request_ids]
        width = max(map(text_width, [*names, "step"]))
        rows = [self.states(request_id) for request_id in self.request_ids]
        lines = []
        for first in range(0, self.num_steps, STEPS_A_LINE):
            last = min(first + STEPS_A_LINE, self.num_steps)
            lines.append(f"{pad('step', width)}  {_ruler(first, last)}".rstrip())
            for name, states in zip(names, rows, strict=True):
                letters = "".join(STATES[state].letter if state else " " for state in states[first:last])
                lines.append(f"{pad(name, width)} |{letters}".rstrip())
        used = [state for key, state in STATES.items() if any(key in states for states in rows)]
        return "\n".join([*lines, "   ".join(f"{state.letter} {state.name}" for state in used)])

    def _text_in_milliseconds(self) -> str:
        if len(self.request_ids) > MAX_LISTED:
            rows = [self._milestones(request_id) for request_id in self.request_ids]
            return text_table(["milliseconds", "arrival", "starts", "first token", "ends", "TTFT", "mean ITL"], rows)
        lines = []
        for request_id in self.request_ids:
            lines.append(request_label(request_id))
            for box in _runs(self.boxes(request_id)):
                span = f"{1000 * box.start:10,.1f} –{1000 * box.end:10,.1f} ms"
                lines.append(f"  {STATES[box.state].letter} {STATES[box.state].name:9} {span}  {_tokens(box)}".rstrip())
            lines.append(f"  {self._measures(request_id)}")
        return "\n".join(lines)

    def _milestones(self, request_id: str) -> list[str]:
        computing = [box for box in self.boxes(request_id) if box.state not in ("waiting", "padding")]
        arrival = self.trace.request(request_id).arrival_time - self.begin
        ttft, itl = self.ttft(request_id), self.mean_itl(request_id)
        first = None if ttft is None else arrival + ttft
        times = [arrival, *((computing[0].start, first, computing[-1].end) if computing else (None,) * 3), ttft, itl]
        return [request_label(request_id), *("–" if time is None else f"{1000 * time:,.1f}" for time in times)]

    def _measures(self, request_id: str) -> str:
        ttft, itl = self.ttft(request_id), self.mean_itl(request_id)
        return f"TTFT {self._amount(ttft)}, ITL {self._amount(itl)}"

    def _amount(self, value: float | None) -> str:
        if value is None:
            return "–"
        if self.unit == "steps":
            return f"{number(value)} step" + ("" if value == 1 else "s")
        milliseconds = 1000 * value
        return f"{value:.2f} s" if value >= 1 else f"{milliseconds:.{0 if milliseconds >= 99.95 else 1}f} ms"

    def caption(self, step: int) -> str:
        event = self.trace.steps[step]
        parts = [
            f"{request_label(part.request_id)} {part.why} {plural(part.num_tokens, 'token')}"
            for part in event.scheduled
        ]
        shown = ", ".join(parts[:6]) + (f" and {len(parts) - 6} more" if len(parts) > 6 else "")
        gone = f"; finished: {', '.join(map(request_label, event.finished))}" if event.finished else ""
        waiting = f"; {event.num_waiting} waiting" if event.num_waiting else ""
        return f"step {step + 1} of {self.num_steps}: {shown or 'nothing to do'}{waiting}{gone}"

    def alt(self) -> str:
        title = f"{self.title}: " if self.title else ""
        return f"{title}timeline of {plural(len(self.request_ids), 'request')} over {plural(self.num_steps, 'step')}"

    # --- figure ---

    def _bracketed(self) -> bool:
        return len(self.request_ids) <= MAX_BRACKETED

    def _with_tokens(self) -> bool:
        return self._bracketed() and bool(self.sampled_tokens)

    def _row_height(self) -> float:
        """Inches from one row to the next."""
        if self._bracketed():
            return 1.2 if self._with_tokens() else 0.85
        return max(0.1, min(0.36, 12 / len(self.request_ids)))

    def _size(self) -> tuple[float, float]:
        right = 0 if self._bracketed() else 1.7
        return AXES_WIDTH + 0.7 + right, self._row_height() * len(self.request_ids) + 1.0 + self._tall_tokens()

    @property
    def _title_pad(self) -> float:
        return 8 + 72 * self._tall_tokens()

    def _tall_tokens(self) -> float:
        """Inches by which the first row's longest token sticks out of the axes."""
        tokens = self.sampled_tokens.get(self.request_ids[0], ()) if self._with_tokens() else ()
        return max([0.062 * text_width(token_label(token)) - 0.4 for token in tokens] + [0])

    def _x_end(self) -> float:
        return self._span(self.num_steps - 1)[1]

    def _draw(self, axes, step: int | None = None) -> None:
        rows = len(self.request_ids)
        shown = self.num_steps if step is None else step + 1
        if axes.get_autoscalex_on():
            axes.set_xlim(0, self._x_end())
        above = 0.5 if not self._bracketed() else 0.6 if self._with_tokens() else 0.35
        axes.set_ylim(rows - (0.3 if self._bracketed() else 0.5), -above)
        scale = AXES_WIDTH / axes.get_xlim()[1]
        for row, request_id in enumerate(self.request_ids):
            self._draw_row(axes, row, request_id, shown, scale)
        if step is not None:
            (start, end), margin = self._span(step), 0.22 if self._bracketed() else 0.44
            frame = {"facecolor": "none", "edgecolor": BLACK, "linewidth": 1.5, "zorder": 4, "clip_on": False}
            add_box(axes, start, -margin, end - start, rows - 1 + 2 * margin, STATES["decode"], **frame)
        self._label_axes(axes)
        used = {box.state for request_id in self.request_ids for box in self.boxes(request_id)}
        add_legend(axes, [state for key, state in STATES.items() if key in used], y=44)

    def _draw_row(self, axes, row: int, request_id: str, shown: int, scale: float) -> None:
        height = 0.72 if not self._bracketed() else 0.3 if self._with_tokens() else 0.4
        for run in _runs(self.boxes(request_id)):
            boxes = self._drawable(run, scale)
            for box in boxes:
                for part, faded in self._split(box, shown):
                    state = STATES[box.state]
                    border = {
                        "linewidth": 0.6 if len(boxes) > 1 or state.hatch else 0,
                        "alpha": 0.12 if faded else None,
                    }
                    patch = add_box(axes, part.start, row - height / 2, part.width, height, state, **border)
                    patch.set_gid(f"{request_id}:{box.state}")
            if self._row_height() > 0.2:
                self._draw_letters(axes, row, boxes, shown, scale)
        finish = self._finish.get(request_id, self.num_steps)
        if finish < shown:
            rest = [self._span(finish)[1], self._x_end()]
            axes.plot(rest, [row, row], color=LIGHT_GREY, linewidth=1.2, linestyle=":", zorder=0)
        if self._bracketed():
            self._draw_brackets(axes, row, request_id, shown, scale)
            self._draw_tokens(axes, row, request_id, shown, scale)
        elif self._row_height() > 0.18:
            self._draw_measures(axes, row, request_id, shown)

    def _drawable(self, run: Box, scale: float) -> list[Box]:
        """The single steps of a run, or the run as one box if they would be too narrow to tell apart."""
        boxes = [box for box in self.boxes(run.request_id) if run.first_step <= box.first_step <= run.last_step]
        return boxes if run.width * scale >= NARROW * len(boxes) else [run]

    def _split(self, box: Box, shown: int) -> list[tuple[Box, bool]]:
        """The part of a box before the end of step `shown` - 1, and the part after it, faded."""
        if box.last_step < shown or box.first_step >= shown:
            return [(box, box.first_step >= shown)]
        now = self._span(shown - 1)[1]
        return [(replace(box, end=now), False), (replace(box, start=now), True)]

    def _draw_letters(self, axes, row: int, boxes: list[Box], shown: int, scale: float) -> None:
        """A letter in each box, or if the boxes are too narrow, one in the middle of them."""
        boxes = [parts[0][0] for parts in (self._split(box, shown) for box in boxes) if not parts[0][1]]
        if not boxes:
            return
        if min(box.width for box in boxes) * scale < WIDE:
            boxes = [_joined(boxes[0], boxes[-1])]
        for box in boxes:
            if box.width * scale >= WIDE:
                add_letter(axes, (box.start + box.end) / 2, row, STATES[box.state])

    def _draw_measures(self, axes, row: int, request_id: str, shown: int) -> None:
        """TTFT and mean ITL to the right of the row, once they are known."""
        sampled = self._sampling_steps(request_id)
        ttft = self.ttft(request_id) if sampled and sampled[0] < shown else None
        itl = self.mean_itl(request_id) if sampled and sampled[-1] < shown else None
        axes.annotate(
            f"{self._amount(ttft)} / {self._amount(itl)}", (1, row), (6, 0),
            xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", size=SMALL_SIZE, annotation_clip=False,
        )  # fmt: skip

    def _draw_brackets(self, axes, row: int, request_id: str, shown: int, scale: float) -> None:
        """TTFT from the arrival to the first token; ITL over one gap, with the mean of all gaps."""
        ends = [self._span(index)[1] for index in self._sampling_steps(request_id)]
        if not ends or self._sampling_steps(request_id)[0] >= shown:
            return
        letter = 0.08 / scale
        ttft, below = self.ttft(request_id), row + (0.2 if self._with_tokens() else 0.26)
        label = f"TTFT {self._amount(ttft)}"
        _bracket(axes, ends[0] - ttft, ends[0], below)
        middle = max(ends[0] - ttft / 2, letter * len(label) / 2)
        axes.text(middle, below + 0.11, label, ha="center", va="top", size=SMALL_SIZE)
        if len(ends) > 1 and self._sampling_steps(request_id)[1] < shown:
            _bracket(axes, ends[0], ends[1], below)
            mean = f" (mean of {len(ends) - 1})" if len(ends) > 2 else ""
            left = max(ends[0] + 0.5 * letter, middle + letter * (len(label) / 2 + 2))
            text = f"ITL {self._amount(self.mean_itl(request_id))}{mean}"
            axes.text(left, below + 0.11, text, ha="left", va="top", size=SMALL_SIZE)

    def _draw_tokens(self, axes, row: int, request_id: str, shown: int, scale: float) -> None:
        """The output tokens above the ends of the steps they came out of, where they do not touch."""
        tokens = self.sampled_tokens.get(request_id, ())
        free = float("-inf")
        for index, token in zip(self._sampling_steps(request_id), tokens, strict=False):
            end = self._span(index)[1]
            if index < shown and end * scale >= free:
                label = literal(token_label(token))
                axes.text(
                    end, row - 0.2, label, rotation=50, rotation_mode="anchor", ha="left", va="bottom", size=SMALL_SIZE
                )
                axes.plot([end, end], [row - 0.2, row + 0.15], color=BLACK, linewidth=0.8)
                free = end * scale + 0.2

    def _label_axes(self, axes) -> None:
        labelled = self._row_height() > 0.16
        every = 1 if labelled else -(-len(self.request_ids) // 20)
        places = range(0, len(self.request_ids), every)
        axes.set_yticks(list(places), [literal(request_label(self.request_ids[place])) for place in places])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        if self.unit == "steps":
            axes.set_xlabel("forward passes")
            axes.xaxis.get_major_locator().set_params(integer=True)
        elif axes.get_xlim()[1] < 2:
            axes.xaxis.set_major_formatter(lambda value, _: f"{1000 * value:g}")
            axes.set_xlabel("milliseconds")
        else:
            axes.set_xlabel("seconds")
        if not self._bracketed() and labelled:
            axes.annotate(
                "TTFT / mean ITL", (1, 1), (6, 3), xycoords="axes fraction", textcoords="offset points",
                size=SMALL_SIZE, color=GREY, annotation_clip=False,
            )  # fmt: skip


def parts_by_request(trace: Trace) -> dict[str, dict[int, list[ScheduledTokens]]]:
    """For each request the index of each step it took part in, with what it computed there."""
    found: dict[str, dict[int, list[ScheduledTokens]]] = defaultdict(dict)
    for index, step in enumerate(trace.steps):
        for part in step.scheduled:
            found[part.request_id].setdefault(index, []).append(part)
    return found


def _joined(first: Box, second: Box) -> Box:
    tokens = first.num_tokens + second.num_tokens
    return replace(first, end=second.end, last_step=second.last_step, num_tokens=tokens)


def _runs(boxes: list[Box]) -> list[Box]:
    """Boxes of one state in consecutive steps as one box."""
    runs: list[Box] = []
    for box in boxes:
        if runs and runs[-1].state == box.state and runs[-1].last_step + 1 == box.first_step:
            runs[-1] = _joined(runs[-1], box)
        else:
            runs.append(box)
    return runs


def _tokens(box: Box) -> str:
    steps = box.last_step - box.first_step + 1
    if box.state == "waiting":
        return ""
    each = f" in {steps} steps of {1000 * box.width / steps:,.1f} ms" if steps > 1 else ""
    return plural(box.num_tokens, "token") + each


def _ruler(first: int, last: int) -> str:
    """Step numbers every 5 columns, above their columns."""
    ruler = ""
    for index in range(first, last):
        if index % 5 == 0 and len(ruler) <= index - first:
            ruler = ruler.ljust(index - first) + str(index)
    return ruler


def _bracket(axes, start: float, end: float, y: float) -> None:
    """A bracket open to the top from `start` to `end`."""
    axes.plot([start, start, end, end], [y, y + 0.07, y + 0.07, y], color=BLACK, linewidth=1)
