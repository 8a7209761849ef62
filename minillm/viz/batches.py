"""The tokens of a forward pass: prefill, decode and padding against a budget; padded rectangles."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from minillm.trace import StepEvent, Trace
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
    text_table,
    text_width,
    titled,
)
from minillm.viz.palette import BLACK, STATES, State
from minillm.viz.strip import StepStrip

KINDS = ("decode", "prefill", "recompute", "padding")  # from the bottom of a bar to its top: decodes are planned first
MOST_BARS = 110  # bars of a figure; more steps are averaged in groups
MOST_TEXT_BARS = 40
TEXT_BAR = 50  # letters of the longest bar in the text
MAX_LETTERED = 40  # tokens per row up to which each token of a rectangle has its own cell


class Bar(NamedTuple):
    """Some consecutive steps, and the mean tokens per step of each kind."""

    first_step: int
    last_step: int
    tokens: dict[str, float]  # kind -> tokens

    @property
    def total(self) -> float:
        return sum(self.tokens.values())


class BatchComposition(Picture):
    """A bar per forward pass: tokens of decode, prefill, recomputation and padding, against the token budget.

    `budget` is the scheduler's `max_num_batched_tokens`; None leaves the line out. In long runs a bar is the mean of
    several passes. Steps = forward passes. Raises PictureError for a trace without steps or a budget below 1.
    """

    _legend_inches = 0.3

    def __init__(self, trace: Trace, budget: int | None = None, *, title: str | None = None):
        if not trace.steps:
            raise PictureError("the trace has no steps, so there are no batches to draw")
        if budget is not None and budget < 1:
            raise PictureError(f"budget is {budget}; a step computes at least 1 token")
        self.tokens = [tokens_by_kind(step) for step in trace.steps]
        self.budget = budget
        self.dropped = trace.dropped
        self.title = titled(title, self.dropped)
        self.num_steps = len(self.tokens)
        self.kinds = [kind for kind in KINDS if any(tokens[kind] for tokens in self.tokens)]

    def bars(self, most: int) -> list[Bar]:
        """All steps in at most `most` bars; all but the last have the same number of steps."""
        every = -(-self.num_steps // most)
        groups = [range(first, min(first + every, self.num_steps)) for first in range(0, self.num_steps, every)]
        return [
            Bar(group[0], group[-1], {kind: sum(self.tokens[i][kind] for i in group) / len(group) for kind in KINDS})
            for group in groups
        ]

    def _most(self, bars: list[Bar]) -> float:
        """The budget or the longest bar."""
        return max([self.budget or 1, *(bar.total for bar in bars)])

    def text(self) -> str:
        bars = self.bars(MOST_TEXT_BARS)
        scale = int(-(-self._most(bars) // TEXT_BAR))
        edge = round(self.budget / scale) if self.budget else None
        header = ["step", "", "tokens", *self.kinds]
        names = [str(bar.first_step) if len(bars) == self.num_steps else _range(bar) for bar in bars]
        drawn = [_with_edge(self._letters(bar, scale), edge) for bar in bars]
        width = max(map(len, drawn))
        cells = [
            [name, pad(letters, width), number(bar.total, 2), *(number(bar.tokens[kind], 2) for kind in self.kinds)]
            for name, letters, bar in zip(names, drawn, bars, strict=True)
        ]
        notes = [f"{STATES[kind].letter} {kind}" for kind in self.kinds] + [f"a letter is {plural(scale, 'token')}"]
        if self.budget:
            notes.append(f"| the budget of {plural(self.budget, 'token')}")
        if len(bars) < self.num_steps:
            notes.append("numbers are means of the steps")
        return noted(f"{text_table(header, cells)}\n{'   '.join(notes)}\n{self.summary()}", self.dropped)

    def _letters(self, bar: Bar, scale: float) -> str:
        """The bar's letters; a kind that occurs has at least one."""
        letters, total = "", 0.0
        for kind in self.kinds:
            total += bar.tokens[kind]
            if bar.tokens[kind]:
                letters += STATES[kind].letter * max(1, round(total / scale) - len(letters))
        return letters

    def summary(self) -> str:
        """Totals over the run, and how full the passes were."""
        total = Counter[str]()
        for tokens in self.tokens:
            total.update(tokens)
        parts = ", ".join(f"{total[kind]:,} {kind}" for kind in self.kinds)
        full = f"; {total.total() / self.num_steps / self.budget:.1%} of the budget" if self.budget else ""
        return f"{plural(self.num_steps, 'step')}, {plural(total.total(), 'token')}: {parts}{full}"

    def caption(self, step: int) -> str:
        tokens = self.tokens[step]
        parts = " + ".join(f"{tokens[kind]:,} {kind}" for kind in self.kinds if tokens[kind])
        of = f" of {self.budget:,}" if self.budget else ""
        return f"step {step + 1} of {self.num_steps}: {parts or 'nothing'} = {tokens.total():,}{of} tokens"

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}tokens of each forward pass: {self.summary()}"

    def _size(self) -> tuple[float, float]:
        return 8.0, 3.2

    def _draw(self, axes, step: int | None = None) -> None:
        bars = self.bars(MOST_BARS)
        border = 0.6 if len(bars) <= 60 else 0.0
        for index, bar in enumerate(bars):
            faded = step is not None and bar.first_step > step
            below = 0.0
            for kind in self.kinds:
                if bar.tokens[kind]:
                    style = {"alpha": 0.12 if faded else None, "linewidth": border}
                    state = replace(STATES[kind], hatch=STATES[kind].hatch * (1 if len(bars) <= 20 else 3))
                    add_box(axes, index, below, 1, bar.tokens[kind], state, **style).set_gid(kind)
                    below += bar.tokens[kind]
            if step is not None and bar.first_step <= step <= bar.last_step:
                frame = {"facecolor": "none", "edgecolor": BLACK, "linewidth": 1.5, "hatch": "", "zorder": 4}
                add_box(axes, index, 0, 1, below, STATES["decode"], **frame)
        axes.set(xlim=(0, len(bars)), ylim=(0, 1.12 * self._most(bars)), ylabel="tokens in the pass")
        self._draw_budget(axes)
        self._label_steps(axes, bars)
        add_legend(axes, [STATES[kind] for kind in self.kinds], y=44)

    def _draw_budget(self, axes) -> None:
        if self.budget:
            axes.axhline(self.budget, color=BLACK, linewidth=1.3, linestyle="--")
            axes.annotate(
                f"budget\n{self.budget:,}", (1, self.budget), (5, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center", size=SMALL_SIZE, annotation_clip=False,
            )  # fmt: skip

    def _label_steps(self, axes, bars: list[Bar]) -> None:
        """Number every bar, or every fifth, ...; a bar of several steps gets the number of its first."""
        every = next(every for every in (1, 2, 5, 10, 20) if len(bars) <= 25 * every or every == 20)
        places = range(0, len(bars), every)
        axes.set_xticks([place + 0.5 for place in places], [f"{bars[place].first_step:,}" for place in places])
        grouped = bars[0].last_step - bars[0].first_step + 1
        axes.set_xlabel("forward pass" + (f" (a bar is the mean of {grouped})" if grouped > 1 else ""))
        axes.tick_params(axis="x", length=0)
        axes.yaxis.get_major_locator().set_params(integer=True)


def tokens_by_kind(step: StepEvent) -> Counter[str]:
    """How many tokens of each kind a step computes."""
    tokens = Counter[str]()
    for part in step.scheduled:
        tokens[part.why] += part.num_tokens
    return tokens


def _range(bar: Bar) -> str:
    return f"{bar.first_step}" + (f"–{bar.last_step}" if bar.last_step > bar.first_step else "")


def _with_edge(letters: str, edge: int | None) -> str:
    """The bar with a mark where the budget ends."""
    if edge is None:
        return letters
    return letters.ljust(edge)[:edge] + "|" + letters[edge:]


# --- rectangles ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of a padded batch: pads in front, real tokens behind."""

    label: str
    num_tokens: int  # real ones
    why: str = "prefill"  # the reason they are computed


class PaddingRectangle(Picture):
    """A padded batch of one forward pass: a row per request with hatched pads in front, and the share of useful tokens.

    `lengths` are the real tokens of each row; `padded_length` is the length of all rows, by default the longest.
    `labels` name the rows. `PaddingRectangle.of_step` takes a step of a trace. Raises PictureError if a row does not
    fit or labels are missing.
    """

    _legend_inches = 0.25

    def __init__(
        self,
        lengths: Sequence[int],
        padded_length: int | None = None,
        labels: Sequence[str] | None = None,
        *,
        why: Sequence[str] | None = None,
        title: str | None = None,
        room: tuple[int, int] | None = None,
        legend: Sequence[State] | None = None,
    ):
        """`why` says per row whether its tokens are "prefill" (default), "decode" or "recompute".

        `room`: rows and tokens that the figure has space for, so that all steps of a run have one scale. `legend`: the
        states to explain, by default those that occur.
        """
        labels = [request_label(str(index)) for index in range(len(lengths))] if labels is None else list(labels)
        why = ["prefill"] * len(lengths) if why is None else list(why)
        if not lengths or len(labels) != len(lengths) or len(why) != len(lengths):
            raise PictureError(f"{len(lengths)} rows, {len(labels)} labels and {len(why)} reasons; these must agree")
        self.padded_length = max(lengths) if padded_length is None else padded_length
        if min(lengths) < 0 or max(lengths) > self.padded_length or self.padded_length < 1:
            raise PictureError(
                f"rows of {min(lengths)} to {max(lengths)} tokens do not fit a padded length of {self.padded_length}"
            )
        self.rows = [Row(*row) for row in zip(labels, lengths, why, strict=True)]
        self.room = room or (len(self.rows), self.padded_length)
        self.legend = self._states() if legend is None else list(legend)
        self.title = title

    @classmethod
    def of_step(cls, step: StepEvent, **options) -> "PaddingRectangle":
        """The rectangle that a step of a trace computed. Raises PictureError if its rows have different lengths."""
        real, computed, why = Counter[str](), Counter[str](), {}
        for part in step.scheduled:
            computed[part.request_id] += part.num_tokens
            if part.why != "padding":
                real[part.request_id] += part.num_tokens
                why[part.request_id] = part.why
        if len(set(computed.values())) != 1:
            raise PictureError(
                f"step {step.step} is no rectangle: its rows have lengths {sorted(set(computed.values()))}; "
                "use a trace of static or dynamic batching"
            )
        lengths = [real[request_id] for request_id in computed]
        labels = [request_label(request_id) for request_id in computed]
        reasons = [why.get(request_id, "padding") for request_id in computed]
        return cls(lengths, next(iter(computed.values())), labels, why=reasons, **options)

    @property
    def num_tokens(self) -> int:
        """Tokens computed, pads included."""
        return len(self.rows) * self.padded_length

    @property
    def num_useful(self) -> int:
        """Real tokens computed."""
        return sum(row.num_tokens for row in self.rows)

    def summary(self) -> str:
        """How many tokens were computed, how many were useful, and how many were padding."""
        padding = self.num_tokens - self.num_useful
        shape = f"{len(self.rows)} × {self.padded_length} = {plural(self.num_tokens, 'computed token')}"
        return f"{shape}: {self.num_useful:,} useful ({self.num_useful / self.num_tokens:.1%}), {padding:,} padding"

    def text(self) -> str:
        width = max(text_width(row.label) for row in self.rows)
        scale = -(-self.padded_length // 100)
        lines = []
        for row in self.rows:
            real = round(row.num_tokens / scale) or min(1, row.num_tokens)
            pads = -(-self.padded_length // scale) - real
            letters = STATES["padding"].letter * pads + STATES[row.why].letter * real
            lines.append(f"{pad(row.label, width)} |{letters}| {row.num_tokens:,} of {self.padded_length:,} useful")
        notes = [f"{state.letter} {state.name}" for state in self.legend]
        notes += [f"a letter is {scale} tokens"] if scale > 1 else []
        return "\n".join([*lines, *(["   ".join(notes)] if notes else []), self.summary()])

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}padded batch of {self.summary()}"

    def _states(self) -> list[State]:
        used = {row.why for row in self.rows if row.num_tokens}
        if self.num_tokens > self.num_useful:
            used.add("padding")
        return [state for key, state in STATES.items() if key in used]

    def _cell(self) -> tuple[float, float]:
        rows, tokens = self.room
        return min(0.34, 5.6 / tokens), max(0.05, min(0.34, 5.0 / rows))

    def _size(self) -> tuple[float, float]:
        (width, height), (rows, tokens) = self._cell(), self.room
        labels = 0.085 * max(text_width(row.label) for row in self.rows)
        return max(4.2, width * tokens + labels + 1.6), height * rows + (1.05 if self.legend else 0.7)

    def _draw(self, axes, step: int | None = None) -> None:
        width, height = self._cell()
        lettered = min(width, height) > 0.16
        for index, row in enumerate(self.rows):
            pads = self.padded_length - row.num_tokens
            self._draw_tokens(axes, index, 0, pads, STATES["padding"], lettered)
            self._draw_tokens(axes, index, pads, self.padded_length, STATES[row.why], lettered)
            if height > 0.14:
                axes.annotate(
                    f"{row.num_tokens:,} of {self.padded_length:,} useful", (1, index + 0.5), (6, 0),
                    xycoords=("axes fraction", "data"), textcoords="offset points",
                    va="center", size=SMALL_SIZE, annotation_clip=False,
                )  # fmt: skip
        rows, tokens = self.room
        axes.set(xlim=(0, tokens), ylim=(rows, 0))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelbottom=False)
        every = 1 if height > 0.14 else -(-len(self.rows) // 20)
        places = range(0, len(self.rows), every)
        axes.set_yticks([place + 0.5 for place in places], [literal(self.rows[place].label) for place in places])
        axes.annotate(
            self.summary(), (0, 0), (0, -8), xycoords="axes fraction", textcoords="offset points", va="top",
            size=SMALL_SIZE, annotation_clip=False,
        )  # fmt: skip
        if self.legend:
            add_legend(axes, self.legend, y=26)

    def _draw_tokens(self, axes, row: int, start: int, end: int, state: State, lettered: bool) -> None:
        """Cells from `start` to `end`, or one box if they would be too small."""
        if end == start:
            return
        if not lettered:
            dense = replace(state, hatch=state.hatch * (1 if self._cell()[1] > 0.16 else 2))
            add_box(axes, start, row + 0.06, end - start, 0.88, dense).set_gid(state.name)
            return
        for token in range(start, end):
            add_box(axes, token, row + 0.06, 1, 0.88, state, letter=True).set_gid(state.name)


class PaddingSteps(StepStrip):
    """The rectangles of a padded trace, which change as requests join and leave; some of them, or one per step.

    Steps = forward passes. Raises PictureError if the trace has no steps, or one that is no rectangle.
    """

    def __init__(self, trace: Trace, *, steps: Sequence[int] | None = None, title: str | None = None):
        rectangles = [PaddingRectangle.of_step(step) for step in trace.steps]
        shapes = [(tuple(row.label for row in each.rows), each.padded_length, each.num_useful) for each in rectangles]
        super().__init__(trace, shapes, steps, title)
        self.room = (max(len(each.rows) for each in rectangles), max(each.padded_length for each in rectangles))
        self.rectangles = rectangles

    def caption(self, step: int) -> str:
        return f"step {step + 1} of {self.num_steps}: {self.rectangles[step].summary()}"

    def frame(self, step: int, *, alone: bool) -> Picture:
        chosen = [self.rectangles[each] for each in self.chosen]
        used = [state for state in STATES.values() if any(state in each.legend for each in chosen)]
        legend = None if alone else used if step == self.chosen[-1] else []  # once, below the last
        return PaddingRectangle.of_step(self.trace.steps[step], title=f"step {step}", room=self.room, legend=legend)
