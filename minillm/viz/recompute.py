"""The waste of naive generation: which tokens each forward pass computes, and which of them again."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.trace import Trace
from minillm.viz.base import (
    SMALL_SIZE,
    Picture,
    PictureError,
    add_box,
    add_legend,
    literal,
    noted,
    number,
    pad,
    plural,
    request_label,
    text_width,
    titled,
    token_labels,
)
from minillm.viz.palette import AGAIN, BLACK, GREY, KEPT, NEW, State

MAX_LETTERED = 24  # steps or positions up to which every box has its letter


@dataclass(frozen=True)
class Pass:
    """One forward pass of a request: the positions it computed for the first time, again, or had in the cache."""

    step: int
    new: frozenset[int]
    again: frozenset[int]
    kept: frozenset[int]

    @property
    def computed(self) -> int:
        return len(self.new) + len(self.again)

    def state(self, position: int) -> State | None:
        """The state of the pass's box at `position`, or None if it does not reach it."""
        found = ((NEW, self.new), (AGAIN, self.again), (KEPT, self.kept))
        return next((state for state, positions in found if position in positions), None)


class RecomputeGrid(Picture):
    """Row = forward pass of one request, column = token position, as recorded in the trace.

    A token computed in an earlier pass is computed *again*. A position before those that a pass computes was read from
    the cache. Padding is left out. `token_labels` names the positions, prompt and output. Steps =
    the passes. Raises PictureError if `request_id` is not in the trace or took no part; None = its only request.
    """

    def __init__(
        self,
        trace: Trace,
        request_id: str | None = None,
        *,
        token_labels: Sequence[str] | None = None,
        title: str | None = None,
    ):
        self.request_id = _the_request(trace, request_id)
        self.passes = passes(trace, self.request_id)
        if not self.passes:
            raise PictureError(f"request {self.request_id!r} took part in no step of the trace")
        self.num_positions = 1 + max(max(each.new | each.again) for each in self.passes)
        self.labels = _labels(token_labels, self.num_positions)
        self.dropped = trace.dropped
        self.title = titled(title, self.dropped)
        self.num_steps = len(self.passes)

    @property
    def num_computed(self) -> int:
        """Tokens computed, over all passes."""
        return sum(each.computed for each in self.passes)

    @property
    def num_needed(self) -> int:
        """Tokens that had to be computed, each counted once."""
        return sum(len(each.new) for each in self.passes)

    def summary(self) -> str:
        """Both totals and their ratio."""
        return _summary(self.passes)

    def text(self) -> str:
        short = self.num_positions <= 100
        rows = [(str(row + 1), *self._text_row(each, short)) for row, each in enumerate(self.passes)]
        header = ("pass", "position" if short else "positions computed", "computed / new")
        widths = [max(text_width(row[column]) for row in [header, *rows]) for column in range(3)]
        lines = [
            f"{pad(a, widths[0], right=True)}  {pad(b, widths[1])}  {pad(c, widths[2], right=True)}"
            for a, b, c in [header, *rows]
        ]
        states = [state for state in (NEW, AGAIN, KEPT) if any(self._uses(state))]
        legend = "   ".join(f"{state.letter} {state.name}" for state in states)
        return noted("\n".join(line.rstrip() for line in [*lines, legend, self.summary()]), self.dropped)

    def _text_row(self, each: Pass, short: bool) -> tuple[str, str]:
        totals = f"{each.computed} / {len(each.new)}"
        if not short:
            computed = each.new | each.again
            return f"{min(computed)}–{max(computed)}", totals
        states = [each.state(position) for position in range(self.num_positions)]
        return "".join(state.letter if state else " " for state in states), totals

    def _uses(self, state: State) -> list[bool]:
        return [bool(positions) for each in self.passes for positions in [_positions(each, state)]]

    def caption(self, step: int) -> str:
        each = self.passes[step]
        what = f"computes {plural(each.computed, 'token')}, {len(each.again)} of them again"
        done = self.passes[: step + 1]
        computed, needed = sum(other.computed for other in done), sum(len(other.new) for other in done)
        return f"pass {step + 1} of {self.num_steps} {what}; so far {computed:,} computed, {needed:,} needed"

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}{self.summary()}"

    # --- figure ---

    def _cell_size(self) -> tuple[float, float]:
        return min(0.34, 5.4 / self.num_positions), min(0.34, 5.4 / self.num_steps)

    def _size(self) -> tuple[float, float]:
        width, height = self._cell_size()
        tall = 0.085 * max(map(text_width, self.labels)) if self.labels else 0.1
        return max(3.9, width * self.num_positions + 1.9), height * self.num_steps + 1.35 + tall

    def _draw(self, axes, step: int | None = None) -> None:
        shown = self.passes if step is None else self.passes[: step + 1]
        axes.set(xlim=(0, self.num_positions), ylim=(self.num_steps, 0))
        lettered = max(self.num_positions, self.num_steps) <= MAX_LETTERED
        for row, each in enumerate(shown):
            for state in (NEW, AGAIN, KEPT):
                for start, end in _spans(_positions(each, state)):
                    self._draw_span(axes, row, start, end, state, lettered)
        if step is not None:
            add_box(
                axes,
                0,
                step,
                self.num_positions,
                1,
                NEW,
                facecolor="none",
                edgecolor=BLACK,
                linewidth=1.8,
                clip_on=False,
            )
        self._draw_totals(axes, shown, lettered)
        self._label_axes(axes, lettered)

    def _draw_span(self, axes, row: int, start: int, end: int, state: State, lettered: bool) -> None:
        if not lettered:
            border = {"linewidth": 0, "edgecolor": state.ink if state.hatch else "none"}
            add_box(axes, start, row, end - start, 1, state, **border).set_gid(state.letter)
            return
        for position in range(start, end):
            add_box(axes, position, row, 1, 1, state, letter=True, edgecolor="white").set_gid(state.letter)
            if state.hatch:
                add_box(axes, position, row, 1, 1, state, facecolor="none", linewidth=0, zorder=1.5)

    def _draw_totals(self, axes, shown: Sequence[Pass], lettered: bool) -> None:
        """Write tokens computed / new at the end of each row, and below each column how often its token was
        computed."""
        to_the_right = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
        below = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "annotation_clip": False}
        small = {"size": SMALL_SIZE, "va": "center"}
        if lettered:
            for row, each in enumerate(shown):
                axes.annotate(f"{each.computed} / {len(each.new)}", (1, row + 0.5), (8, 0), **small, **to_the_right)
            times = Counter(position for each in shown for position in each.new | each.again)
            for position in range(self.num_positions):
                axes.annotate(str(times[position]), (position + 0.5, 0), (0, -9), ha="center", **small, **below)
            axes.annotate("times computed", (1, 0), (8, -9), xycoords="axes fraction", textcoords="offset points",
                          color=GREY, annotation_clip=False, **small)  # fmt: skip
        axes.annotate("computed / new", (1, 1), (8, 9), xycoords="axes fraction", textcoords="offset points",
                      color=GREY, annotation_clip=False, **small)  # fmt: skip
        axes.annotate(_summary(shown), (0, 0), (0, -28), xycoords="axes fraction", textcoords="offset points",
                      annotation_clip=False, **small)  # fmt: skip

    def _label_axes(self, axes, lettered: bool) -> None:
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.tick_top()
        axes.set_ylabel("forward pass")
        every = 1 if lettered else 10 if max(self.num_positions, self.num_steps) <= 200 else 100
        rows = list(range(0 if lettered else every - 1, self.num_steps, every))
        axes.set_yticks([row + 0.5 for row in rows], [str(row + 1) for row in rows])
        columns = list(range(0, self.num_positions, every))
        names = [literal(self.labels[column]) if self.labels and lettered else str(column) for column in columns]
        turned = {"rotation": 60, "ha": "left", "rotation_mode": "anchor"} if self.labels and lettered else {}
        axes.set_xticks([column + 0.5 for column in columns], names, **turned)
        if not (self.labels and lettered):
            axes.set_xlabel("token position", loc="left", color=GREY, size=SMALL_SIZE)
            axes.xaxis.set_label_position("top")
        add_legend(axes, [state for state in (NEW, AGAIN, KEPT) if any(self._uses(state))], y=40)


def passes(trace: Trace, request_id: str) -> list[Pass]:
    """The forward passes of one request, with the new, repeated and cached positions of each, without padding."""
    seen: set[int] = set()
    found = []
    for index, step in enumerate(trace.steps):
        parts = [part for part in step.scheduled if part.request_id == request_id and part.why != "padding"]
        computed = {position for part in parts for position in range(part.start, part.end)}
        if computed:
            kept = frozenset(range(min(computed)))
            found.append(Pass(index, frozenset(computed - seen), frozenset(computed & seen), kept))
            seen |= computed
    return found


def _summary(done: Sequence[Pass]) -> str:
    computed, needed = sum(each.computed for each in done), sum(len(each.new) for each in done)
    verdict = "each just once" if computed == needed else f"{number(computed / needed)} times the work"
    return f"{plural(computed, 'token')} computed, {needed:,} needed: {verdict}"


def _the_request(trace: Trace, request_id: str | None) -> str:
    known = [record.request_id for record in trace.requests]
    if request_id is None:
        if len(known) != 1:
            raise PictureError(f"the trace has {plural(len(known), 'request')}; name one: {known[:8]}")
        return known[0]
    if request_id not in known:
        raise PictureError(f"{request_label(request_id)!r} is not in the trace; it has {known[:8]}")
    return request_id


def _labels(labels: Sequence[str] | None, num_positions: int) -> list[str] | None:
    """The last sampled token is never computed, so one label more than there are positions is also accepted."""
    if labels is not None and len(labels) == num_positions + 1:
        labels = labels[:-1]
    return token_labels(labels, num_positions, "positions")


def _positions(each: Pass, state: State) -> frozenset[int]:
    return {NEW.letter: each.new, AGAIN.letter: each.again, KEPT.letter: each.kept}[state.letter]


def _spans(positions: frozenset[int]) -> list[tuple[int, int]]:
    """Consecutive positions as [start, end)."""
    spans: list[tuple[int, int]] = []
    for position in sorted(positions):
        if spans and spans[-1][1] == position:
            spans[-1] = (spans[-1][0], position + 1)
        else:
            spans.append((position, position + 1))
    return spans
