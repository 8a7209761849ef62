"""The block-diagonal mask of ragged batching, step by step: each request has a block while it runs."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from minillm.trace import StepEvent, Trace
from minillm.viz.base import (
    SMALL_SIZE,
    Picture,
    PictureError,
    add_box,
    add_legend,
    literal,
    pad,
    plural,
    request_label,
    text_width,
)
from minillm.viz.grids import BORDER
from minillm.viz.palette import BLACK, GREY, KEPT, MAY_LOOK, MAY_NOT, NEW
from minillm.viz.strip import StepStrip

MAX_MARKED = 40  # tokens per side up to which each cell has its mark; the text has a grid up to 100
MAX_WRITTEN = 100
LOOKS = replace(MAY_LOOK, name="looks")
CACHED = replace(KEPT, letter="o", name="key from the cache")
COMPUTED = replace(NEW, letter="+", name="key of this pass")
HEADER = 2.2  # cells above the mask: the request of each key, and whether the key is cached


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
    """A row per token computed in this step, a column per key: those computed now and those from the cache.

    Above the columns are the requests whose keys they are, and marks for cached keys. `room`: rows and columns that the
    figure has space for. Raises PictureError if there is no block.
    """

    _legend_inches = 0.3

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        title: str | None = None,
        room: tuple[int, int] = (0, 0),
        inches: float = 4.5,
    ):
        if not blocks:
            raise PictureError("no request has a token in this step, so there is no mask to draw")
        self.blocks = list(blocks)
        self.num_tokens = sum(block.num_tokens for block in blocks)
        self.num_new = sum(block.num_new for block in blocks)
        self.room = max(room[0], self.num_new), max(room[1], self.num_tokens)
        self.inches = inches
        self.title = title

    def _large(self) -> bool:
        """Whether there are too many tokens to draw single cells."""
        return max(self.room) > MAX_MARKED

    def _starts(self) -> list[tuple[int, int]]:
        """For each block the row and the column at which it starts."""
        rows = accumulate((block.num_new for block in self.blocks), initial=0)
        columns = accumulate((block.num_tokens for block in self.blocks), initial=0)
        return list(zip(rows, columns, strict=True))[:-1]

    def mask(self):
        """The bool mask [T_query, T_key] of the tokens computed in this step: rectangular blocks, True = may look."""
        import torch

        from minillm.attention import rectangular

        return torch.block_diag(*(rectangular(block.num_new, block.num_tokens) for block in self.blocks)).bool()

    def summary(self) -> str:
        """The mask's size, and how many of its entries are True."""
        needed, entries = sum(block.num_scores for block in self.blocks), self.num_new * self.num_tokens
        return f"{self.num_new} × {self.num_tokens} mask, {needed:,} of {entries:,} entries True"

    def text(self) -> str:
        names = [request_label(block.request_id) for block in self.blocks]
        width = max(map(text_width, names))
        if self.num_tokens > MAX_WRITTEN:
            lines = [
                f"{pad(name, width)}  {block.num_new:,} × {block.num_tokens:,}, {block.num_cached:,} cached"
                for name, block in zip(names, self.blocks, strict=True)
            ]
            return "\n".join([*lines, self.summary()])
        lines, keys = [], ""
        for name, block, (_, start) in zip(names, self.blocks, self._starts(), strict=True):
            for row in range(block.num_new):
                letters = MAY_NOT.letter * start + LOOKS.letter * (block.num_cached + row + 1)
                lines.append(
                    f"{pad(name if row == 0 else '', width)}  {letters.ljust(self.num_tokens, MAY_NOT.letter)}"
                )
            keys += CACHED.letter * block.num_cached + COMPUTED.letter * block.num_new
        legend = "   ".join(f"{state.letter} {state.name}" for state in (LOOKS, MAY_NOT, CACHED, COMPUTED))
        return "\n".join([*lines, f"{' ' * width}  {keys}", legend, self.summary()])

    def alt(self) -> str:
        blocks = ", ".join(f"{request_label(block.request_id)} {block.num_tokens}" for block in self.blocks)
        return f"{self.title + ': ' if self.title else ''}block-diagonal mask, tokens {blocks}; {self.summary()}"

    def _cell(self) -> float:
        """Side of a cell, in inches."""
        return min(0.3, self.inches / self.room[1])

    def _size(self) -> tuple[float, float]:
        rows, columns = self.room
        return self._cell() * columns + 0.6, self._cell() * (rows + HEADER) + 0.8 + self._legend_inches

    def _title_width(self) -> float:
        return self.inches

    def _draw(self, axes, step: int | None = None) -> None:
        from matplotlib.patches import Rectangle

        rows, columns = self.room
        axes.set(xlim=(0, columns + 0.1), ylim=(rows + 0.1, -HEADER), aspect="equal", anchor="NW")
        axes.add_patch(Rectangle((0, 0), self.num_tokens, self.num_new, fill=False, edgecolor=BORDER, linewidth=0.8))
        for block, (row, column) in zip(self.blocks, self._starts(), strict=True):
            self._draw_block(axes, block, row, column)
        if not self._large():
            self._draw_cells(axes)
        self._label_axes(axes)

    def _draw_block(self, axes, block: Block, top: int, left: int) -> None:
        """Draw the block's keys above, the staircase of keys that its rows look at, and a frame around it."""
        from matplotlib.patches import Polygon, Rectangle

        for first, count, state in ((0, block.num_cached, CACHED), (block.num_cached, block.num_new, COMPUTED)):
            if count:
                key = {"edgecolor": GREY, "linewidth": 0.6}
                add_box(axes, left + first, -0.9, count, 0.7, state, **key).set_gid(
                    f"{block.request_id}:{state.letter}"
                )
        if block.num_new:
            stairs = [(left, top + block.num_new), (left, top)]
            for row in range(block.num_new):
                edge = left + block.num_cached + row + 1
                stairs += [(edge, top + row), (edge, top + row + 1)]
            width = 2.0 if self._large() else 0.0  # a single row would be too thin to see
            patch = axes.add_patch(Polygon(stairs, facecolor=LOOKS.color, edgecolor=LOOKS.color, linewidth=width))
            patch.set(gid=f"{block.request_id}:{LOOKS.letter}", zorder=4 if width else 1)
            frame = {"edgecolor": GREY, "linewidth": 0.6} if self._large() else {"edgecolor": BLACK, "linewidth": 0.9}
            axes.add_patch(Rectangle((left, top), block.num_tokens, block.num_new, fill=False, zorder=3, **frame))

    def _draw_cells(self, axes) -> None:
        """Draw cell borders, and a dot where a token looks."""
        lines = {"color": BORDER, "linewidth": 0.4, "zorder": 2}
        axes.hlines(range(1, self.num_new), 0, self.num_tokens, **lines).set_in_layout(False)
        axes.vlines(range(1, self.num_tokens), 0, self.num_new, **lines).set_in_layout(False)
        dots = [
            (left + column + 0.5, top + row + 0.5)
            for block, (top, left) in zip(self.blocks, self._starts(), strict=True)
            for row in range(block.num_new)
            for column in range(block.num_cached + row + 1)
        ]
        if dots:
            size = (0.25 * 72 * self._cell()) ** 2  # a quarter of a cell, in points
            axes.scatter(*zip(*dots, strict=True), s=size, color=LOOKS.ink, linewidth=0, zorder=3)

    def _label_axes(self, axes) -> None:
        """Each request's name beside its rows and above its keys, if there is room; the number of entries below."""
        names = [literal(request_label(block.request_id)) for block in self.blocks]
        places = [
            (row + block.num_new / 2, name)
            for name, block, (row, _) in zip(names, self.blocks, self._starts(), strict=True)
            if block.num_new * self._cell() > 0.1
        ]
        axes.set_yticks([place for place, _ in places], [name for _, name in places])
        for name, block, (_, column) in zip(names, self.blocks, self._starts(), strict=True):
            if block.num_tokens * self._cell() > 0.09 * len(name):
                middle = column + block.num_tokens / 2
                axes.text(middle, -1.05, name, ha="center", va="bottom", size=SMALL_SIZE).set_in_layout(False)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.annotate(
            self.summary().replace(", ", "\n", 1), (0, self.num_new), (0, -5), textcoords="offset points", va="top",
            size=SMALL_SIZE, color=GREY, annotation_clip=False,
        )  # fmt: skip
        add_legend(axes, [LOOKS, COMPUTED, CACHED], y=38)


class BlockMaskSteps(StepStrip):
    """The block-diagonal mask of each step of a trace; the steps in which a request joins or leaves, or one per step.

    A block has the request's cached tokens and those it computes, without padding. `steps` chooses the frames of the
    static picture. Steps = forward passes. Raises PictureError for a trace without steps.
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
        rows = max(sum(block.num_new for block in self.blocks[each]) for each in steps)
        columns = max(sum(block.num_tokens for block in self.blocks[each]) for each in steps)
        return BlockMask(self.blocks[step], title=f"step {step}", room=(rows, columns), inches=4.5 if alone else 2.3)


def blocks_of(trace: Trace) -> list[list[Block]]:
    """The blocks of every step, in order of admission. A preempted request has none until it resumes."""
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
    """For each request that computes something: the start and the number of its new tokens."""
    new: dict[str, tuple[int, int]] = {}
    for part in step.scheduled:
        if part.why != "padding":
            start, num_tokens = new.get(part.request_id, (part.start, 0))
            new[part.request_id] = (min(start, part.start), num_tokens + part.num_tokens)
    return new
