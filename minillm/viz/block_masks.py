"""The block-diagonal mask of ragged batching, step by step: who joins adds a block, who leaves takes it away."""

from collections.abc import Sequence
from typing import NamedTuple

from minillm.trace import StepEvent, Trace
from minillm.viz.base import (
    SMALL_SIZE,
    Picture,
    PictureError,
    add_legend,
    literal,
    pad,
    plural,
    request_label,
    text_width,
)
from minillm.viz.grids import BORDER
from minillm.viz.palette import BLACK, GREEN, GREY, MAY_LOOK, MAY_NOT, PALE_GREEN, State
from minillm.viz.strip import StepStrip

MAX_MARKED = 40  # tokens a side up to which each cell has its mark; and 100 up to which the text has a grid
MAX_WRITTEN = 100
EARLIER = State("o", "looked earlier", PALE_GREEN, BLACK)
NOW = State(MAY_LOOK.letter, "looks now", GREEN, MAY_LOOK.ink)


class Block(NamedTuple):
    """One request's tokens in a step: those whose keys and values are cached, and those computed now."""

    request_id: str
    num_cached: int
    num_new: int

    @property
    def num_tokens(self) -> int:
        return self.num_cached + self.num_new

    @property
    def num_scores(self) -> int:
        """Query-key pairs this step needs for the request."""
        return self.num_new * self.num_cached + self.num_new * (self.num_new + 1) // 2


class BlockMask(Picture):
    """The tokens of all running requests laid one behind the other: who looks at whom in this step, who did before.

    Rows computed in this step are dark and marked, rows of earlier steps, whose keys and values are only read, pale.
    `room`: tokens a side the figure has space for. Raises PictureError if there is no block.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        title: str | None = None,
        room: int | None = None,
        inches: float = 4.5,
        with_legend: bool = True,
    ):
        if not blocks:
            raise PictureError("no request has a token in this step, so there is no mask to draw")
        self.blocks = list(blocks)
        self.num_tokens = sum(block.num_tokens for block in blocks)
        self.room = max(room or 0, self.num_tokens)
        self.inches = inches
        self.with_legend = with_legend
        self.title = title

    def _large(self) -> bool:
        """Too many tokens for a cell each."""
        return self.room > MAX_MARKED

    def mask(self):
        """The bool mask [T_query, T_key] of the tokens computed in this step: rectangular blocks, True = may look."""
        import torch

        from minillm.attention import rectangular

        return torch.block_diag(*(rectangular(block.num_new, block.num_tokens) for block in self.blocks)).bool()

    def summary(self) -> str:
        """The mask's size, and what of it is needed."""
        rows = sum(block.num_new for block in self.blocks)
        needed = sum(block.num_scores for block in self.blocks)
        return f"{rows} × {self.num_tokens} mask, {needed:,} of {rows * self.num_tokens:,} entries True"

    def text(self) -> str:
        names = [request_label(block.request_id) for block in self.blocks]
        width = max(map(text_width, names))
        if self.num_tokens > MAX_WRITTEN:
            lines = [
                f"{pad(name, width)}  {block.num_new:,} × {block.num_tokens:,}, {block.num_cached:,} cached"
                for name, block in zip(names, self.blocks, strict=True)
            ]
            return "\n".join([*lines, self.summary()])
        lines, start = [], 0
        for name, block in zip(names, self.blocks, strict=True):
            for row in range(block.num_tokens):
                mark = (NOW if row >= block.num_cached else EARLIER).letter
                letters = MAY_NOT.letter * start + mark * (row + 1)
                lines.append(
                    f"{pad(name if row == 0 else '', width)}  {letters.ljust(self.num_tokens, MAY_NOT.letter)}"
                )
            start += block.num_tokens
        legend = "   ".join(f"{state.letter} {state.name}" for state in (NOW, EARLIER, MAY_NOT))
        return "\n".join([*lines, legend, self.summary()])

    def alt(self) -> str:
        blocks = ", ".join(f"{request_label(block.request_id)} {block.num_tokens}" for block in self.blocks)
        return f"{self.title + ': ' if self.title else ''}block-diagonal mask, tokens {blocks}; {self.summary()}"

    def _size(self) -> tuple[float, float]:
        legend = 0.4 if self.with_legend else 0.0  # below the summary, which takes two lines in a small frame
        return self.inches + 0.6, self.inches + 1.0 + legend

    def _title_width(self) -> float:
        return self.inches

    def _draw(self, axes, step: int | None = None) -> None:
        from matplotlib.patches import Rectangle

        margin = 1.02 * self.room  # so that the last line is not cut
        axes.set(xlim=(0, margin), ylim=(margin, 0), aspect="equal", anchor="NW")
        axes.add_patch(Rectangle((0, 0), self.num_tokens, self.num_tokens, fill=False, edgecolor=BORDER, linewidth=0.8))
        start = 0
        for block in self.blocks:
            self._draw_block(axes, block, start)
            start += block.num_tokens
        if not self._large():
            self._draw_cells(axes)
        self._label_axes(axes)

    def _draw_block(self, axes, block: Block, start: int) -> None:
        """The staircase of a block, in two parts, and a frame around it."""
        from matplotlib.patches import Polygon, Rectangle

        for first, last, state in ((0, block.num_cached, EARLIER), (block.num_cached, block.num_tokens, NOW)):
            if last > first:
                stairs = [(start, start + last), (start, start + first)]
                for row in range(first, last):
                    stairs += [(start + row + 1, start + row), (start + row + 1, start + row + 1)]
                edge = 2.0 if state is NOW and self._large() else 0.0  # a single row would be too thin to see
                patch = axes.add_patch(Polygon(stairs, facecolor=state.color, edgecolor=state.color, linewidth=edge))
                patch.set(gid=f"{block.request_id}:{state.letter}", zorder=4 if edge else 1)
        size = block.num_tokens
        frame = {"edgecolor": GREY, "linewidth": 0.6} if self._large() else {"edgecolor": BLACK, "linewidth": 0.9}
        axes.add_patch(Rectangle((start, start), size, size, fill=False, zorder=3, **frame))

    def _draw_cells(self, axes) -> None:
        """Cell borders, and a dot where a token looks now."""
        inner = range(1, self.num_tokens)
        for draw in (axes.hlines, axes.vlines):
            draw(inner, 0, self.num_tokens, color=BORDER, linewidth=0.4, zorder=2).set_in_layout(False)
        dots, start = [], 0
        for block in self.blocks:
            for row in range(block.num_cached, block.num_tokens):
                dots += [(start + column + 0.5, start + row + 0.5) for column in range(row + 1)]
            start += block.num_tokens
        if dots:
            size = (0.25 * 72 * self.inches / self.room) ** 2  # a quarter of a cell, in points
            axes.scatter(*zip(*dots, strict=True), s=size, color=NOW.ink, linewidth=0, zorder=3)

    def _label_axes(self, axes) -> None:
        """Each request's name beside its block, if the block is high enough; how many tokens, below."""
        places, names, start = [], [], 0
        for block in self.blocks:
            if block.num_tokens * self.inches / self.room > 0.13:
                places.append(start + block.num_tokens / 2)
                names.append(literal(request_label(block.request_id)))
            start += block.num_tokens
        axes.set_yticks(places, names)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        summary = self.summary().replace(", ", "\n", 1) if self.inches < 4 else self.summary()
        axes.annotate(
            summary, (0, self.num_tokens), (0, -5), textcoords="offset points", va="top", size=SMALL_SIZE, color=GREY,
            annotation_clip=False,
        )  # fmt: skip
        if self.with_legend:
            add_legend(axes, [NOW, EARLIER], y=34 if self.inches < 4 else 24)


class BlockMaskSteps(StepStrip):
    """The block-diagonal mask of each step of a trace; the steps in which a request joins or leaves, or one a step.

    A block has the request's cached tokens and those it computes; padding has no place in it. `steps` chooses the
    frames of the static picture. Steps = forward passes. Raises PictureError for a trace without steps.
    """

    def __init__(self, trace: Trace, *, steps: Sequence[int] | None = None, title: str | None = None):
        self.blocks = blocks_of(trace)
        super().__init__(trace, [tuple(block.request_id for block in blocks) for blocks in self.blocks], steps, title)

    def caption(self, step: int) -> str:
        now, before = self._running(step), self._running(step - 1) if step else []
        joined = [request_label(request_id) for request_id in now if request_id not in before]
        left = [request_label(request_id) for request_id in before if request_id not in now]
        changes = f"; joined: {', '.join(joined)}" if joined else ""
        changes += f"; left: {', '.join(left)}" if left else ""
        return f"step {step + 1} of {self.num_steps}: {plural(len(now), 'block')}{changes}"

    def _running(self, step: int) -> list[str]:
        return [block.request_id for block in self.blocks[step]]

    def frame(self, step: int, *, alone: bool) -> Picture:
        steps = range(self.num_steps) if alone else self.chosen
        room = max(sum(block.num_tokens for block in self.blocks[each]) for each in steps)
        form = {"inches": 4.5 if alone else 2.3, "with_legend": alone or step == self.chosen[0]}
        return BlockMask(self.blocks[step], title=f"step {step}", room=room, **form)


def blocks_of(trace: Trace) -> list[list[Block]]:
    """The blocks of every step, in order of admission. A request that is preempted loses its block until it returns."""
    found: list[list[Block]] = []
    cached: dict[str, int] = {}
    for step in trace.steps:
        new = _new_tokens(step)
        for request_id, (start, _) in new.items():
            cached[request_id] = start
        found.append([Block(each, num_cached, new.get(each, (0, 0))[1]) for each, num_cached in cached.items()])
        for request_id, (start, num_tokens) in new.items():
            cached[request_id] = start + num_tokens
        for request_id in step.finished:
            cached.pop(request_id, None)
    return found


def _new_tokens(step: StepEvent) -> dict[str, tuple[int, int]]:
    """For each request that computes something: where its new tokens start, and how many they are."""
    new: dict[str, tuple[int, int]] = {}
    for part in step.scheduled:
        if part.why != "padding":
            start, num_tokens = new.get(part.request_id, (part.start, 0))
            new[part.request_id] = (min(start, part.start), num_tokens + part.num_tokens)
    return new
