"""The path of one request through the three layers: the book's eight steps, and how often each happens."""

from itertools import pairwise

from minillm.trace import Trace, find_request, stages_of
from minillm.viz.base import SMALL_SIZE, Picture, add_box, add_letter, literal, noted, pad, plural, text_table, titled
from minillm.viz.lanes import seconds_in_words
from minillm.viz.palette import BLACK, GREY, LIGHT_GREY, PART_COLORS, WHITE, State

LANES = {None: "user", 1: "1  interfaces", 2: "2  model authoring", 3: "3  runtime"}  # layer -> name, from the top
COLORS = dict(zip(LANES, (WHITE, *PART_COLORS[:3]), strict=True))
COLUMN, LANE = 0.98, 0.72  # inches from step to step, from lane to lane
WIDTH, HEIGHT = 0.5, 0.42  # of a box, in columns and lanes
MIDDLE = 0.06 - HEIGHT / 2  # of a box, in lanes from the middle of its lane
NAME = 0.33  # lanes from the middle of a box down to its name


class LayerPath(Picture):
    """The eight steps of a request, each in the lane of its layer, and below them how often it happens.

    Steps 1 to 4 happen once. Steps 5 to 7 happen in every pass that the request takes part in; step 8 for each token.
    `times` adds when each step began, for the first pass; times differ from run to run. Raises UnknownRequestError.
    """

    def __init__(self, trace: Trace, request_id: str, *, times: bool = False, title: str | None = None):
        record = find_request(trace, request_id)
        self.stages = stages_of(trace, record)
        parts = list(trace.parts(record.request_id))
        self.num_passes = len({step.step for step, _ in parts})
        self.num_tokens = sum(part.num_sampled for _, part in parts)
        self.times, self.dropped, self.title = times, trace.dropped, titled(title, trace.dropped)

    def count(self, number: int) -> int:
        """How often step `number` happens."""
        return 1 if number <= 4 else self.num_tokens if number == 8 else self.num_passes

    def text(self) -> str:
        width = max(map(len, LANES.values()))
        lanes = [f"{pad(name, width)} |{self._row(layer)}|" for layer, name in LANES.items()]
        rows = [[f"{stage.number}  {stage.part}", *self._cells(stage)] for stage in self.stages]
        header = ["step", "layer", "times", *(["began after"] if self.times else [])]
        return noted("\n".join([*lanes, "", text_table(header, rows)]), self.dropped)

    def _row(self, layer: int | None) -> str:
        return " ".join(str(stage.number) if stage.layer == layer else "." for stage in self.stages)

    def _cells(self, stage) -> list[str]:
        began = "" if stage.seconds is None else seconds_in_words(stage.seconds)
        return [str(stage.layer or "–"), str(self.count(stage.number)), *([began] if self.times else [])]

    def alt(self) -> str:
        told = f"steps 1 to 4 once, 5 to 7 in {self._passes()}, 8 for {self._tokens()}"
        return f"{self.title + ': ' if self.title else ''}{told}"

    def _passes(self) -> str:
        return "1 pass" if self.num_passes == 1 else f"{self.num_passes:,} passes"

    def _tokens(self) -> str:
        return plural(self.num_tokens, "token")

    # --- figure ---

    def _size(self) -> tuple[float, float]:
        return COLUMN * 8 + 1.1, LANE * (len(LANES) + (1.1 if self.times else 0.7))

    def _draw(self, axes, step: int | None = None) -> None:
        rows = {layer: row for row, layer in enumerate(LANES)}
        axes.set(xlim=(-0.5, 7.6), ylim=(len(LANES) + (0.55 if self.times else 0.15), -0.5))
        for row in range(len(LANES)):
            axes.axhline(row + 0.5, color=LIGHT_GREY, linewidth=0.8)
        for column, (one, other) in enumerate(pairwise(self.stages)):
            begin = column + WIDTH / 2, rows[one.layer] + MIDDLE
            arrow(axes, begin, (column + 1 - WIDTH / 2, rows[other.layer] + MIDDLE))
        for column, stage in enumerate(self.stages):
            self._draw_stage(axes, column, rows[stage.layer], stage)
        if len(self.stages) == 8:
            arrow(axes, (7, 1 - HEIGHT), (7, 0))
        for first, last, what in self._brackets():
            self._draw_bracket(axes, first, last, what)
        names = dict(enumerate(LANES.values())) | ({len(LANES) + 0.3: "began after"} if self.times else {})
        axes.set_yticks(list(names), list(names.values()))
        axes.xaxis.set_visible(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    def _draw_stage(self, axes, column: int, row: int, stage) -> None:
        state = State(str(stage.number), stage.part, COLORS[stage.layer])
        box = add_box(axes, column - WIDTH / 2, row - HEIGHT, WIDTH, HEIGHT + 0.12, state, edgecolor=BLACK)
        box.set_gid(f"step {stage.number}")
        add_letter(axes, column, row + MIDDLE, state)
        words = {"ha": "center", "va": "center", "size": SMALL_SIZE, "color": BLACK}
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # hides arrows behind a name
        axes.text(column, row + NAME, literal(stage.part), bbox=behind, **words).set_in_layout(False)
        if self.times and stage.seconds is not None:
            began = seconds_in_words(stage.seconds)
            axes.text(column, len(LANES) + 0.3, began, **words).set_in_layout(False)

    def _brackets(self) -> list[tuple[int, int, str]]:
        brackets = [(0, 3, "once")]
        if len(self.stages) == 8:
            brackets += [(4, 6, f"in each of {self._passes()}"), (7, 7, self._tokens())]
        return brackets

    def _draw_bracket(self, axes, first: int, last: int, what: str) -> None:
        below = len(LANES) - 0.4
        axes.plot([first - 0.4, last + 0.4], [below, below], color=GREY, linewidth=1.5)
        words = {"ha": "center", "va": "top", "size": SMALL_SIZE, "color": BLACK}
        axes.text((first + last) / 2, below + 0.08, what, **words).set_in_layout(False)


def arrow(axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    """From one point to another."""
    axes.annotate("", end, begin, arrowprops={"arrowstyle": "->", "color": GREY}).set_in_layout(False)
