"""Timelines: what each request does in each step of a run, drawn from its Trace."""

from collections.abc import Sequence
from dataclasses import replace

from minillm.trace import Trace
from minillm.viz.activity import MOST_COLUMNS, Activity, Box, columns_of, joined, legend, runs
from minillm.viz.base import (
    SMALL_SIZE,
    Picture,
    add_box,
    add_legend,
    add_letter,
    literal,
    noted,
    number,
    pad,
    plural,
    request_label,
    text_table,
    text_width,
    titled,
    token_label,
)
from minillm.viz.palette import BLACK, GREY, LIGHT_GREY, STATES, WAITING, State

MOST_LINES = 3  # lines per request up to which a text timeline has a column per step
NARROW = 0.05  # inches; steps in one state that are narrower are drawn as one box
LOW = 0.1  # inches; lower rows have neither borders nor wide hatches
WIDE = 0.17  # inches; a box as wide as this has room for its letter
MAX_LISTED = 6  # requests up to which the text in milliseconds lists every stretch
MAX_BRACKETED = 2  # requests up to which TTFT and ITL get brackets in the figure; beyond, a column of numbers
MOST_PADDING = 0.5  # share of a box's height up to which padding is drawn to scale, so that the rest has a letter
HIGH = 0.1  # inches; a partly padded box of this height has room for its letter
AXES_WIDTH = 6.6  # inches


class Timeline(Activity, Picture):
    """One row per request: waiting, preempted, prefill, decode, recompute, padding, finished, and its TTFT and ITL.

    `unit` = "s": widths are to scale; "steps": all forward passes are equally wide, so that the picture is the same on
    every machine; "tokens": the width of a pass is its computed tokens, padding included. If a row has padding beside
    real tokens, its share is hatched, and the letter of the text is in lower case. `sampled_tokens` (request id -> its
    output tokens) are written where they were sampled, if there is room, for one or two requests. Steps = forward
    passes. Raises PictureError for a trace without steps or
    requests.
    """

    _legend_inches = 0.3

    def __init__(
        self,
        trace: Trace,
        unit: str = "s",
        *,
        title: str | None = None,
        sampled_tokens: dict[str, Sequence[str]] | None = None,
    ):
        super().__init__(trace, unit)
        self.title = titled(title, trace.dropped)
        self.sampled_tokens = sampled_tokens or {}

    # --- text ---

    def text(self) -> str:
        if self.unit == "s":
            return noted(self._text_in_milliseconds(), self.trace.dropped)
        every_step = self.unit == "steps" and self.num_steps <= MOST_LINES * MOST_COLUMNS
        column, columns = (1.0, self.num_steps) if every_step else columns_of(self.end(), whole=True)
        note = [] if column == 1 else [f"a column is {number(column)} {self.unit}"]
        text = "\n".join([*self.chart(column, columns), *note, legend([self])])
        return noted(text, self.trace.dropped)

    def chart(self, column: float, num_columns: int) -> list[str]:
        """A line of letters per request below a ruler, one letter per `column` units; long lines are wrapped."""
        names = [request_label(request_id) for request_id in self.request_ids]
        head = self.unit.removesuffix("s") or "time"
        width = max(map(text_width, [*names, head]))
        rows = [self.letters(request_id, column, num_columns) for request_id in self.request_ids]
        lines = []
        for first in range(0, num_columns, MOST_COLUMNS):
            last = min(first + MOST_COLUMNS, num_columns)
            lines.append(f"{pad(head, width)}  {_ruler(first, last, column, self.unit)}".rstrip())
            for name, letters in zip(names, rows, strict=True):
                lines.append(f"{pad(name, width)} |{letters[first:last]}".rstrip())
        return lines

    def _text_in_milliseconds(self) -> str:
        if len(self.request_ids) > MAX_LISTED:
            rows = [self._milestones(request_id) for request_id in self.request_ids]
            return text_table(["milliseconds", "arrival", "starts", "first token", "ends", "TTFT", "mean ITL"], rows)
        lines = []
        for request_id in self.request_ids:
            lines.append(request_label(request_id))
            for box in runs(self.boxes(request_id)):
                span = f"{1000 * box.start:10,.1f} –{1000 * box.end:10,.1f} ms"
                lines.append(f"  {STATES[box.state].letter} {STATES[box.state].name:9} {span}  {_tokens(box)}".rstrip())
            lines.append(f"  {self._measures(request_id)}")
        return "\n".join(lines)

    def _milestones(self, request_id: str) -> list[str]:
        computing = [box for box in self.boxes(request_id) if box.state not in (*WAITING, "padding")]
        arrival = self._records[request_id].arrival_time - self.begin
        ttft, itl = self.ttft(request_id), self.mean_itl(request_id)
        first = None if ttft is None else arrival + ttft
        times = [arrival, *((computing[0].start, first, computing[-1].end) if computing else (None,) * 3), ttft, itl]
        return [request_label(request_id), *("–" if time is None else f"{1000 * time:,.1f}" for time in times)]

    def _measures(self, request_id: str) -> str:
        ttft, itl = self.ttft(request_id), self.mean_itl(request_id)
        return f"TTFT {self.amount(ttft)}, ITL {self.amount(itl)}"

    def caption(self, step: int) -> str:
        event = self.trace.steps[step]
        parts = [
            f"{request_label(part.request_id)} {part.why} {plural(part.num_tokens, 'token')}"
            for part in event.scheduled
        ]
        shown = ", ".join(parts[:6]) + (f" and {len(parts) - 6} more" if len(parts) > 6 else "")
        gone = f"; finished: {', '.join(map(request_label, event.finished))}" if event.finished else ""
        waiting = f"; {event.num_waiting} waiting" if event.num_waiting else ""
        gave_way = ", ".join(f"{request_label(each.request_id)} ({each.mode})" for each in event.preempted)
        preempted = f"; preempted: {gave_way}" if gave_way else ""
        return f"step {step + 1} of {self.num_steps}: {shown or 'nothing to do'}{preempted}{waiting}{gone}"

    def alt(self) -> str:
        title = f"{self.title}: " if self.title else ""
        return f"{title}timeline of {plural(len(self.request_ids), 'request')} over {plural(self.num_steps, 'step')}"

    # --- figure ---

    def _bracketed(self) -> bool:
        return len(self.request_ids) <= MAX_BRACKETED

    def _with_tokens(self) -> bool:
        return self._bracketed() and bool(self.sampled_tokens)

    def _measured(self) -> bool:
        """Whether TTFT and ITL are written right of each row."""
        return not self._bracketed() and self._row_height() > 0.18

    def _row_height(self) -> float:
        """Inches from one row to the next."""
        if self._bracketed():
            return 1.2 if self._with_tokens() else 0.85
        return max(0.1, min(0.36, 12 / len(self.request_ids)))

    def _size(self) -> tuple[float, float]:
        right = 1.7 if self._measured() else 0
        return AXES_WIDTH + 0.7 + right, self._row_height() * len(self.request_ids) + 1.0 + self._tall_tokens()

    @property
    def _title_pad(self) -> float:
        return 8 + 72 * self._tall_tokens()

    def _tall_tokens(self) -> float:
        """Inches by which the first row's longest token sticks out of the axes."""
        tokens = self.sampled_tokens.get(self.request_ids[0], ()) if self._with_tokens() else ()
        return max([0.062 * text_width(token_label(token)) - 0.4 for token in tokens] + [0])

    def _x_end(self) -> float:
        return self.end()

    def _draw(self, axes, step: int | None = None) -> None:
        self._draw_rows(axes, step)
        self._label_axes(axes)
        add_legend(axes, legend_states([self]), y=44)

    def _draw_rows(self, axes, step: int | None) -> None:
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
            (start, end), margin = self._spans[step], 0.22 if self._bracketed() else 0.44
            frame = {"facecolor": "none", "edgecolor": BLACK, "linewidth": 1.5, "zorder": 4, "clip_on": False}
            add_box(axes, start, -margin, end - start, rows - 1 + 2 * margin, STATES["decode"], **frame)

    def _draw_row(self, axes, row: int, request_id: str, shown: int, scale: float) -> None:
        height = 0.72 if not self._bracketed() else 0.3 if self._with_tokens() else 0.4
        for run in runs(self.boxes(request_id)):
            boxes = self._drawable(run, scale)
            for box in boxes:
                for part, faded in self._split(box, shown):
                    bordered = len(boxes) > 1 or bool(STATES[box.state].hatch)
                    border = 0.6 if bordered and self._row_height() >= LOW else 0
                    style = {"linewidth": border, "alpha": 0.12 if faded else None}
                    self._draw_box(axes, row, part, height, style)
            if self._row_height() > 0.2:
                self._draw_letters(axes, row, boxes, shown, scale, height)
        finish = self._finish.get(request_id, self.num_steps)
        if finish < shown and self._row_height() >= LOW:
            rest = [self._spans[finish][1], self._x_end()]
            axes.plot(rest, [row, row], color=LIGHT_GREY, linewidth=1.2, linestyle=":", zorder=0)
        if self._bracketed():
            self._draw_brackets(axes, row, request_id, shown, scale)
            self._draw_tokens(axes, row, request_id, shown, scale)
        elif self._measured():
            self._draw_measures(axes, row, request_id, shown)

    def _draw_box(self, axes, row: int, box: Box, height: float, style: dict) -> None:
        """Draw the box, and at its foot the share of padding beside real tokens."""
        states = {key: replace(STATES[key], hatch=self._hatch(key)) for key in (box.state, "padding")}
        patch = add_box(axes, box.start, row - height / 2, box.width, height, states[box.state], **style)
        patch.set_gid(f"{box.request_id}:{box.state}")
        if box.partly_padding:
            part = height * _padded(box)
            foot = add_box(axes, box.start, row + height / 2 - part, box.width, part, states["padding"], **style)
            foot.set_gid(f"{box.request_id}:padding")

    def _hatch(self, key: str) -> str:
        """The state's hatch: denser in low rows, which show little of a wide one; in the lowest, waiting is plain
        grey."""
        hatch = STATES[key].hatch
        if self._row_height() >= LOW:
            return hatch * (2 if self._row_height() < 0.4 else 1)
        return "" if key in WAITING else 4 * hatch

    def _drawable(self, run: Box, scale: float) -> list[Box]:
        """The single steps of a run of boxes, or one box if they would be too narrow to tell apart."""
        boxes = [box for box in self.boxes(run.request_id) if run.first_step <= box.first_step <= run.last_step]
        return boxes if run.width * scale >= NARROW * len(boxes) else [run]

    def _split(self, box: Box, shown: int) -> list[tuple[Box, bool]]:
        """The part of a box before the end of step `shown` - 1, and the part after it, faded."""
        now = self._spans[shown - 1][1]
        if box.end <= now or box.start >= now:
            return [(box, box.start >= now)]
        return [(replace(box, end=now), False), (replace(box, start=now), True)]

    def _draw_letters(self, axes, row: int, boxes: list[Box], shown: int, scale: float, height: float) -> None:
        """Write a letter in each box, or one in the middle if the boxes are too narrow; above padding if it fits."""
        boxes = [parts[0][0] for parts in (self._split(box, shown) for box in boxes) if not parts[0][1]]
        if not boxes:
            return
        if min(box.width for box in boxes) * scale < WIDE:
            boxes = [joined(boxes[0], boxes[-1])]
        for box in boxes:
            padded = _padded(box) if box.partly_padding else 0
            if box.width * scale >= WIDE and self._row_height() * height * (1 - padded) >= HIGH:
                middle = (box.start + box.end) / 2, row - height * padded / 2
                add_letter(axes, *middle, STATES[box.state], patch=not padded)

    def _draw_measures(self, axes, row: int, request_id: str, shown: int) -> None:
        """Write TTFT and mean ITL right of the row, once they are known."""
        sampled = self._sampling_steps(request_id)
        ttft = self.ttft(request_id) if sampled and sampled[0] < shown else None
        itl = self.mean_itl(request_id) if sampled and sampled[-1] < shown else None
        axes.annotate(
            f"{self.amount(ttft)} / {self.amount(itl)}", (1, row), (6, 0),
            xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", size=SMALL_SIZE, annotation_clip=False,
        )  # fmt: skip

    def _draw_brackets(self, axes, row: int, request_id: str, shown: int, scale: float) -> None:
        """Draw brackets: TTFT from arrival to the first token; ITL over one gap, with the mean of all gaps."""
        ends = [self._spans[index][1] for index in self._sampling_steps(request_id)]
        if not ends or self._sampling_steps(request_id)[0] >= shown:
            return
        letter = 0.08 / scale
        ttft, below = self.ttft(request_id), row + (0.2 if self._with_tokens() else 0.26)
        label = f"TTFT {self.amount(ttft)}"
        _bracket(axes, ends[0] - ttft, ends[0], below)
        middle = max(ends[0] - ttft / 2, letter * len(label) / 2)
        axes.text(middle, below + 0.11, label, ha="center", va="top", size=SMALL_SIZE)
        if len(ends) > 1 and self._sampling_steps(request_id)[1] < shown:
            _bracket(axes, ends[0], ends[1], below)
            mean = f" (mean of {len(ends) - 1})" if len(ends) > 2 else ""
            left = max(ends[0] + 0.5 * letter, middle + letter * (len(label) / 2 + 2))
            text = f"ITL {self.amount(self.mean_itl(request_id))}{mean}"
            axes.text(left, below + 0.11, text, ha="left", va="top", size=SMALL_SIZE)

    def _draw_tokens(self, axes, row: int, request_id: str, shown: int, scale: float) -> None:
        """Write output tokens above the ends of their steps, as many as do not touch."""
        tokens = self.sampled_tokens.get(request_id, ())
        free = float("-inf")
        for index, token in zip(self._sampling_steps(request_id), tokens, strict=False):
            end = self._spans[index][1]
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
        if self.unit != "s":
            axes.set_xlabel("forward passes" if self.unit == "steps" else "computed tokens, padding included")
            axes.xaxis.get_major_locator().set_params(integer=True)
        elif axes.get_xlim()[1] < 2:
            axes.xaxis.set_major_formatter(lambda value, _: f"{1000 * value:g}")
            axes.set_xlabel("milliseconds")
        else:
            axes.set_xlabel("seconds")
        if self._measured():
            axes.annotate(
                "TTFT / mean ITL", (1, 1), (6, 3), xycoords="axes fraction", textcoords="offset points",
                size=SMALL_SIZE, color=GREY, annotation_clip=False,
            )  # fmt: skip


def legend_states(timelines: Sequence[Activity]) -> list[State]:
    """The states in the legend of timelines: all that have a box."""
    used = set().union(*(timeline.states_used() for timeline in timelines)) - {"finished"}
    return [state for key, state in STATES.items() if key in used]


def _tokens(box: Box) -> str:
    steps = box.last_step - box.first_step + 1
    if box.state in WAITING:
        return ""
    each = f" in {steps} steps of {1000 * box.width / steps:,.1f} ms" if steps > 1 else ""
    of_padding = f", {box.num_padding:,} of them padding" if box.partly_padding else ""
    return plural(box.num_tokens, "token") + of_padding + each


def _ruler(first: int, last: int, column: float, unit: str) -> str:
    """A ruler with the start of every 5th column if columns are steps, else of every 10th."""
    every = 5 if column == 1 and unit == "steps" else 10
    factor, name = (1, "") if unit != "s" else (1000, " ms") if column < 0.02 else (1, " s")
    ruler = ""
    for index in range(first, last):
        if index % every == 0 and len(ruler) <= index - first:
            ruler = ruler.ljust(index - first) + f"{factor * index * column:g}{name if index else ''}"
    return ruler


def _padded(box: Box) -> float:
    """The share of a partly padded box's height that is drawn as padding."""
    return min(MOST_PADDING, box.padding_share)


def _bracket(axes, start: float, end: float, y: float) -> None:
    """A bracket open to the top from `start` to `end`."""
    axes.plot([start, start, end, end], [y, y + 0.07, y + 0.07, y], color=BLACK, linewidth=1)
