"""Block tables and the pool: which request holds which physical block, what the block holds, what is shared.

Everything is read from a Trace (`BlockTables.of_step`, `BlockTableSteps`), or given as a `PoolState`.
"""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from minillm.trace import Trace
from minillm.viz.base import (
    MAX_WIDTH,
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
    token_label,
)
from minillm.viz.block_replay import PoolState, pool_states
from minillm.viz.palette import BLACK, CACHED, EMPTY, FREE, GREY, LIGHT_GREY, OWNER_COLORS, WHITE, State
from minillm.viz.strip import StepStrip

MOST_BLOCKS = 256  # the largest pool that is drawn block by block
MOST_LISTED = 32  # blocks up to which each has a line of its own in the text, and its slots in the figure
MOST_REQUESTS = 10  # tables drawn
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
LABELS = (9, 8, 7, 6, 5, 4)  # letters of a token in the figure, depending on the room; a longer one is cut
LETTER, BESIDE = 0.07, 0.09  # inches: a letter, and the space beside a word
MARGIN, LITTLE = 0.3, 0.12  # inches left and right of a drawing, together; and of a frame beside others
WIDTH, LEAST = MAX_WIDTH - MARGIN, 5.6  # inches: the widest drawing, and the narrowest that has room for its legend
NARROW = MAX_WIDTH / 3 - LITTLE  # inches: a frame, three side by side
TOP = 0.3  # inches above tables and pool
LINE, HEADING, BELOW = 0.32, 0.27, 0.09  # inches: a line of blocks, a table's heading, the space below it
HEIGHT, MORE = 0.25, 0.22  # inches: a block; the line on requests left out
BAND = 0.08  # inches: part of a shared block's height, in the colours of all its owners
ENTRY, ENTRY_WIDTH, ENTRY_LEFT = 0.2, 0.34, 0.42  # inches: an entry of a table, and the space left of it
TABLES, ARROWS = 1.55, 0.55  # inches: tables, and from there to the pool
POOL_NUMBER = 0.3  # inches: room for "12" before a block of the pool
SMALL, COLUMNS = 0.36, 20  # inches: a small block; blocks per line
MOST_ROWS = 16  # of the pool beside the tables
MOST_HEIGHT = 8.0  # inches of tables beside the pool; else blocks are drawn small
FEW_FREE = 2  # adjacent free blocks that have a line each; more share one


class BlockTables(Picture):
    """Every request's block table, with arrows into the physical pool, at the moment given by `state`.

    A request has a letter and a colour; a block shared by several has a band in the colours of all and its ref count.
    Slots that the step writes are framed; empty slots of used blocks are hatched; a block that was copied has an arrow
    to its copy. `tokens` (request id -> its tokens) are written into the slots if there is room. Several adjacent free
    blocks have one line. `BlockTables.of_step` takes a step of a trace. Raises PictureError for a pool of more than
    256 blocks.
    """

    _legend_inches = 0.25

    def __init__(
        self,
        state: PoolState,
        *,
        tokens: Mapping[str, Sequence[str]] | None = None,
        title: str | None = None,
        room: Mapping[str, int] | None = None,
        idle: Collection[int] | None = None,
        narrow: bool = False,
    ):
        """`room`: requests that get a place, and the blocks for which each of their tables has space, so that all steps
        of a run have one scale. `idle`: the blocks that are free in all steps. By default both are those of `state`.
        `narrow`: as a frame beside others, with the tables as lists of numbers above the pool.
        """
        if state.num_blocks > MOST_BLOCKS:
            raise PictureError(
                f"a pool of {state.num_blocks:,} blocks is more than can be drawn block by block ({MOST_BLOCKS}); "
                "draw PoolUse, or a run with a smaller pool"
            )
        self.state = state
        self.title = title
        self.room = dict(room or _room([state]))
        self.letters = owner_letters([*self.room, *state.tables])
        self.tokens = {
            request_id: [token_label(each) for each in texts] for request_id, texts in (tokens or {}).items()
        }
        for request_id, count in state.num_tokens.items():
            if request_id in self.tokens and len(self.tokens[request_id]) < count:
                raise PictureError(
                    f"{len(self.tokens[request_id])} labels were given for the {count} tokens that {request_id!r} holds"
                )
        shown = self.room if room else {request_id: self.room[request_id] for request_id in self._shown()}
        self.narrow, self.is_frame = narrow, room is not None
        self.rows = pool_rows(state.num_blocks, state.idle() if idle is None else idle)
        more = len(self.room) > len(self._shown())
        owners = max(text_width(self._short_owner(block)) for block in range(state.num_blocks))
        owners = max(owners, len(CACHED.name)) if room else owners
        self._layout = _layout(state, shown, self._widths(), owners, self.rows, more, narrow)

    @classmethod
    def of_step(
        cls,
        trace: Trace,
        block_size: int,
        step: int | None = None,
        *,
        tokens: Mapping[str, Sequence[str]] | None = None,
        num_blocks: int | None = None,
        title: str | None = None,
    ) -> "BlockTables":
        """The pool during step `step` of a trace, by default the last; `len(trace.steps)` is the state after the last.

        Raises PictureError for a step that is not in the trace, and as `pool_states` does.
        """
        states = pool_states(trace, block_size, tokens=tokens, num_blocks=num_blocks)
        step = len(states) - 2 if step is None else step
        if not 0 <= step < len(states):
            raise PictureError(f"step {step} is outside the trace's steps 0..{len(states) - 1}")
        return cls(states[step], tokens=tokens, title=title)

    # --- words ---

    def summary(self) -> str:
        """Blocks by use, blocks saved by sharing, and empty slots."""
        state, use = self.state, self.state.use
        parts = [f"{use.used} used", f"{use.cached} cached", f"{use.free} free", f"{use.null} null"]
        slots = use.used * state.block_size
        lines = [f"{plural(use.total, 'block')} of {plural(state.block_size, 'slot')}: {', '.join(parts)}"]
        if slots:
            share = f"{state.num_empty / slots:.1%}"
            lines.append(f"{state.num_empty} of {plural(slots, 'slot')} in used blocks empty ({share})")
        if state.num_saved:
            lines.append(f"sharing saves {plural(state.num_saved, 'block')}")
        return "; ".join(lines)

    def copies(self) -> str:
        """The blocks that were copied before the step; empty if none were."""
        pairs = [f"block {source} copied to {target}" for source, target in self.state.copies]
        return ", ".join(pairs)

    def _shown(self) -> list[str]:
        """The requests that get a place; if they are too many, those with a table."""
        if len(self.room) <= MOST_REQUESTS:
            return list(self.room)
        return [request_id for request_id in self.room if request_id in self.state.tables][:MOST_REQUESTS]

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}block tables and pool: {self.summary()}"

    def heading(self, request_id: str) -> str:
        """A request's name unless it is its letter, and its status."""
        name = "" if request_id == self.letters[request_id] else f"{request_label(request_id)}: "
        return name + self._standing(request_id)

    def _standing(self, request_id: str) -> str:
        state = self.state
        if request_id not in state.tables:
            return state.fates.get(request_id, "no table")
        parts = [plural(state.num_tokens[request_id], "token")]
        if request_id in state.written:
            start, end = state.written[request_id]
            parts.append(f"{end - start} written now")
        if request_id in state.ending:
            parts.append("ends with this step")
        return ", ".join(parts)

    def _widths(self) -> list[int]:
        """Letters of the longest token in each slot of a block; 0 without tokens."""
        size = self.state.block_size
        widths = [0] * size
        for texts in self.tokens.values():
            for position, each in enumerate(texts):
                widths[position % size] = max(widths[position % size], text_width(each))
        return widths

    def _label(self, block: int, slot: int) -> str:
        """The token in a slot; "" if no tokens were given."""
        content = self.state.content(block)
        if content is None:
            return ""
        request_id, index = content
        tokens, position = self.tokens.get(request_id, ()), index * self.state.block_size + slot
        return tokens[position] if position < len(tokens) else ""

    def owner(self, block: int) -> str:
        """The letters of a block's owners and its ref count, or "cached", "free" or "null"."""
        state = self.state
        letters = [self.letters[request_id] for request_id in state.owners(block)]
        if len(letters) > 1:
            return (" ".join(letters[:3]) + ("…" if len(letters) > 3 else "")) + f" ×{len(letters)}"
        if letters:
            return letters[0]
        return "null" if block < state.num_null else CACHED.name if block in state.cached else FREE.name

    def _short_owner(self, block: int) -> str:
        return self.owner(block).replace(" ", "")

    def _short_heading(self, request_id: str) -> str:
        """The part of the heading that fits above a table; slots written now have a frame instead."""
        words = self.heading(request_id).split(", ")
        return words[0] + (", ends" if request_id in self.state.ending else "")

    # --- text ---

    def text(self) -> str:
        state = self.state
        shown = self._shown()
        heads = [f"{self.letters[request_id]}  {self.heading(request_id)}" for request_id in shown]
        width = max(map(text_width, heads), default=0)
        lines = [
            f"{pad(head, width)}  {self._text_table(request_id)}".rstrip()
            for head, request_id in zip(heads, shown, strict=True)
        ]
        lines += [f"and {plural(len(self.room) - len(shown), 'request')} more"] if len(self.room) > len(shown) else []
        pool = self._text_list() if state.num_blocks <= MOST_LISTED else self._text_map()
        return "\n".join([*lines, "", *pool, *filter(None, [self.copies()]), self.summary()])

    def _text_table(self, request_id: str) -> str:
        table = self.state.tables.get(request_id, ())
        return "  ".join(f"{index}→{block} {self._text_slots(block)}" for index, block in enumerate(table))

    def _text_slots(self, block: int) -> str:
        """The tokens of a block, or one sign per slot."""
        filled = self.state.filled(block)
        labels = [self._label(block, slot) for slot in range(filled)]
        if all(labels):
            return "[" + " ".join(labels + [EMPTY.letter] * (self.state.block_size - filled)) + "]"
        return self._signs(block)

    def _text_list(self) -> list[str]:
        """A line per block: its number, its owners, its slots."""
        state = self.state
        owners = [self.owner(block) for block in range(state.num_blocks)]
        width = max(map(text_width, [*owners, "owner"]))
        lines = [f"block  {pad('owner', width)}  slots"]
        for row in self.rows:
            block, owner = row[0], owners[row[0]]
            held = block in state.cached or state.owners(block)
            slots = self._signs(block) if held else ""
            lines.append(f"{_span(row):>5}  {pad(owner, width)}  {slots}".rstrip())
        return [*lines, f"# held   + written now   {EMPTY.letter} empty"]

    def _signs(self, block: int) -> str:
        """One sign per slot: # held, + written now, . empty."""
        filled, written = self.state.filled(block), self.state.slots_written(block) or (0, 0)
        signs = "".join("+" if written[0] <= slot < written[1] else "#" for slot in range(filled))
        return signs + EMPTY.letter * (self.state.block_size - filled)

    def _text_map(self) -> list[str]:
        """One sign per block: its owner's letter, or the number of its owners if there are several."""
        signs = "".join(self._sign(block) for block in range(self.state.num_blocks))
        lines = [f"{first:5}  {signs[first : first + 50]}" for first in range(0, len(signs), 50)]
        return ["block", *lines, f"a letter: the owner   2–9: ref count   * cached   {FREE.letter} free   0 null"]

    def _sign(self, block: int) -> str:
        owners = self.state.owners(block)
        if owners:
            return self.letters[owners[0]] if len(owners) == 1 else str(min(9, len(owners)))
        return "0" if block < self.state.num_null else "*" if block in self.state.cached else FREE.letter

    # --- figure ---

    def _size(self) -> tuple[float, float]:
        margin = LITTLE if self.narrow else MARGIN
        notes = 3 if self.is_frame and not self.narrow else len(self._notes())  # the same number in all steps of a run
        return self._layout.width + margin, self._layout.height + 0.22 * notes + 0.1 + self._legend_inches

    def _notes(self) -> list[str]:
        """The notes below the pool."""
        if self.narrow:
            use = self.state.use
            copies = ", ".join(f"{source} → {target}" for source, target in self.state.copies)
            counts = f"{use.used} used, {use.cached} cached, {use.free} free"
            return [f"{counts}; copied: {copies}" if copies else counts]
        notes = filter(None, [self.copies(), self.summary()])
        return [line for note in notes for line in textwrap.wrap(note, int(14.5 * self._layout.width))]

    def _draw(self, axes, step: int | None = None) -> None:
        layout, shown = self._layout, self._shown()
        axes.set(xlim=(0, layout.width), ylim=(layout.height, 0))
        axes.axis("off")
        x, y = layout.pool
        if not self.narrow:
            self._write(axes, 0, 0.1, "block tables", color=GREY)
            self._write(axes, 0 if layout.small else x - POOL_NUMBER, y - 0.2, "the pool: physical blocks", color=GREY)
        top = 0.0 if self.narrow else TOP
        for request_id in shown:
            top = (self._draw_list if self.narrow else self._draw_table)(axes, request_id, top)
        if len(self.room) > len(shown):
            self._write(axes, 0, top + 0.08, f"and {plural(len(self.room) - len(shown), 'request')} more", color=GREY)
        if layout.small:
            for block in range(self.state.num_blocks):
                self._draw_pool_block(axes, block)
        else:
            for row in self.rows:
                self._draw_pool_row(axes, row)
            for source, target in self.state.copies:
                self._draw_copy(axes, source, target)
        axes.annotate(
            "\n".join(self._notes()), (0, 0), (0, -4), xycoords="axes fraction", textcoords="offset points", va="top",
            size=SMALL_SIZE, annotation_clip=False,
        )  # fmt: skip
        extra = "thick frame: written in this step" if self.state.written else ""
        add_legend(axes, self._legend(), y=10 + 14 * len(self._notes()), extra=extra)

    def _legend(self) -> list[State]:
        use = self.state.use
        kinds = [(EMPTY, self.state.num_empty), (CACHED, use.cached), (FREE, use.free)]
        return [state for state, count in kinds if count]

    def _draw_name(self, axes, request_id: str, y: float) -> None:
        """Write a request's letter in its colour at height `y`."""
        state = State(self.letters[request_id], request_id, self._color(request_id))
        add_box(axes, 0.02, y - 0.1, 0.2, 0.2, state, linewidth=0)
        self._write(axes, 0.12, y, state.letter, ha="center", fontweight="bold")

    def _draw_list(self, axes, request_id: str, top: float) -> float:
        """Draw a request's table as numbers in a line at `top`; returns the top of the next one."""
        table = self.state.tables.get(request_id)
        self._draw_name(axes, request_id, top + 0.12)
        words = f"[{', '.join(map(str, table))}]" if table is not None else self._short_heading(request_id)
        self._write(axes, 0.3, top + 0.12, words)
        return top + HEADING

    def _draw_table(self, axes, request_id: str, top: float) -> float:
        """Draw a request's heading and table at `top`; returns the top of the next one."""
        layout = self._layout
        self._draw_name(axes, request_id, top + 0.12)
        for index, block in enumerate(self.state.tables.get(request_id, ())):
            if layout.small:
                line, place = divmod(index, COLUMNS)
                x, y = place * layout.pool_cell + POOL_NUMBER, top + HEADING + line * LINE
                self._draw_block(axes, block, x, y)
                self._write_onto(axes, x, y, str(block))
            else:
                self._draw_entry(axes, request_id, index, block, top + HEADING + index * ENTRY)
        heading = (self.heading if layout.small else self._short_heading)(request_id)
        behind = {"facecolor": WHITE, "edgecolor": "none", "pad": 0.6}  # hides arrows of the tables above
        self._write(axes, 0.3, top + 0.12, heading, zorder=5, bbox=behind)
        return top + HEADING + layout.table_height(self.room[request_id]) + BELOW

    def _draw_entry(self, axes, request_id: str, index: int, block: int, top: float) -> None:
        """Draw an entry of a table: the logical block, the physical block in a box, and an arrow to it."""
        from matplotlib.colors import to_rgb
        from matplotlib.patches import FancyArrowPatch

        middle, right = top + ENTRY / 2, ENTRY_LEFT + ENTRY_WIDTH
        self._write(axes, ENTRY_LEFT - 0.07, middle, str(index), ha="right", color=GREY)
        entry = add_box(
            axes, ENTRY_LEFT, top, ENTRY_WIDTH, ENTRY, State("", "", self._color(request_id)), edgecolor=BLACK
        )
        entry.set_gid("entry")
        self._write(axes, ENTRY_LEFT + ENTRY_WIDTH / 2, middle, str(block), ha="center")
        x, y = self._layout.place(block)
        ends = (right + 0.03, middle), (x - POOL_NUMBER + 0.04, y + HEIGHT / 2)
        form = {"arrowstyle": "-|>", "mutation_scale": 7, "shrinkA": 0, "shrinkB": 0, "linewidth": 0.8, "zorder": 2}
        color = [0.65 * part for part in to_rgb(self._color(request_id))]  # darker, so that yellow is readable on white
        arrow = axes.add_patch(FancyArrowPatch(*ends, color=color, clip_on=False, **form))
        arrow.set(gid="points", in_layout=False)

    def _draw_copy(self, axes, source: int, target: int) -> None:
        """Draw an arrow from a block to its copy, right of both."""
        from matplotlib.patches import FancyArrowPatch

        right = self._layout.pool[0] + self._layout.block + 0.22
        places = [(right, self._layout.place(block)[1] + HEIGHT / 2) for block in (source, target)]
        bend = -0.35 if target > source else 0.35
        form = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2, "zorder": 5}
        arrow = FancyArrowPatch(*places, connectionstyle=f"arc3,rad={bend}", color=BLACK, clip_on=False, **form)
        axes.add_patch(arrow).set(gid="copy", in_layout=False)

    def _draw_pool_row(self, axes, row: range) -> None:
        """Draw a block with its number and owners, or several free blocks in one line."""
        x, y = self._layout.place(row[0])
        if len(row) > 1:
            words = f"{_span(row)}: {len(row)} blocks {FREE.name}"
            self._write(axes, x, y + HEIGHT / 2, words, color=GREY)
            return
        style = {"fontweight": "bold"} if self.state.owners(row[0]) else {"color": GREY}
        self._write(axes, x - 0.06, y + HEIGHT / 2, str(row[0]), ha="right")
        self._draw_block(axes, row[0], x, y)
        self._write(axes, x + 0.06 + self._layout.block, y + HEIGHT / 2, self._short_owner(row[0]), **style)

    def _draw_pool_block(self, axes, block: int) -> None:
        """Draw a small block with a sign for its owner."""
        x, y = self._layout.place(block)
        if block % COLUMNS == 0:
            self._write(axes, x - 0.06, y + HEIGHT / 2, str(block), ha="right")
        self._draw_block(axes, block, x, y)
        self._write_onto(axes, x, y, self._sign(block))

    def _write_onto(self, axes, x: float, y: float, sign: str) -> None:
        behind = {"facecolor": WHITE, "edgecolor": "none", "pad": 0.8}
        self._write(axes, x + self._layout.block / 2, y + HEIGHT / 2, sign, ha="center", bbox=behind, zorder=6)

    def _draw_block(self, axes, block: int, x: float, y: float) -> None:
        """Draw a block's slots in its owner's colour, or with a band of all owners' colours; frame written ones."""
        state, edges, width = self.state, self._layout.edges, self._layout.block
        filled, owners = state.filled(block), state.owners(block)
        colors = [self._color(owner) for owner in owners[:3]] or [CACHED.color if filled else WHITE]
        band = HEIGHT if len(colors) == 1 else BAND
        for stripe, color in enumerate(colors):
            height = band / len(colors)
            self._fill_box(axes, x, y + HEIGHT - band + stripe * height, edges[filled], height, color)
        if owners and filled < state.block_size:
            empty = add_box(axes, x + edges[filled], y, width - edges[filled], HEIGHT, EMPTY, linewidth=0)
            empty.set_gid("empty")
        for index in range(1, state.block_size if edges[1] >= 0.06 and (owners or filled) else 0):
            inside = {"color": WHITE if index < filled and len(colors) == 1 else LIGHT_GREY, "linewidth": 0.7}
            axes.plot([x + edges[index]] * 2, [y, y + HEIGHT], **inside)
        self._frame(axes, x, y, width, 0.8, BLACK if owners else GREY, linestyle="-" if owners or filled else ":")
        above = 0.0 if len(colors) == 1 else BAND / 2
        for index in range(filled):
            middle = x + (edges[index] + edges[index + 1]) / 2
            self._draw_label(axes, self._label(block, index), middle, y + HEIGHT / 2 - above)
        written = state.slots_written(block)
        if written:
            left, right = edges[written[0]], edges[written[1]]
            self._frame(axes, x + left, y, right - left, 2.2, BLACK, zorder=4)

    def _fill_box(self, axes, x: float, y: float, width: float, height: float, color: str) -> None:
        if width:
            add_box(axes, x, y, width, height, State("", "", color), linewidth=0, edgecolor="none").set_gid("held")

    def _frame(self, axes, x: float, y: float, width: float, line: float, color: str, **style) -> None:
        none = {"facecolor": "none", "hatch": "", "edgecolor": color, "linewidth": line, "clip_on": False}
        add_box(axes, x, y, width, HEIGHT, FREE, **none, **style)

    def _draw_label(self, axes, label: str, x: float, y: float) -> None:
        most = self._layout.letters
        if label and most:
            self._write(axes, x, y, label if text_width(label) <= most else label[: most - 1] + "…", ha="center")

    def _write(self, axes, x: float, y: float, label: str, **style) -> None:
        words = {"ha": "left", "va": "center", "size": SMALL_SIZE, **style}
        axes.text(x, y, literal(label), **words).set_in_layout(False)

    def _color(self, request_id: str) -> str:
        return OWNER_COLORS[list(self.letters).index(request_id) % len(OWNER_COLORS)]


class BlockTableSteps(StepStrip):
    """The block tables and the pool of a run; some of its steps, or one after the other in the stepper.

    Steps = forward passes, and then the state after the last one. `tokens` (request id -> its tokens) are written into
    the slots. By default up to six steps in which a block table changes are chosen. Raises PictureError as
    `pool_states` and `BlockTables` do.
    """

    def __init__(
        self,
        trace: Trace,
        block_size: int,
        *,
        steps: Sequence[int] | None = None,
        tokens: Mapping[str, Sequence[str]] | None = None,
        num_blocks: int | None = None,
        title: str | None = None,
    ):
        self.states = pool_states(trace, block_size, tokens=tokens, num_blocks=num_blocks)
        most = {each: max(state.num_tokens.get(each, 0) for state in self.states) for each in tokens or {}}
        self.tokens = {each: texts[: most[each]] for each, texts in (tokens or {}).items()}  # never holds the last
        self.room = _room(self.states)
        super().__init__(trace, [(state.tables, state.fates) for state in self.states], steps, title)

    def caption(self, step: int) -> str:
        where = f"step {step + 1} of {self.num_steps - 1}" if step < self.num_steps - 1 else "after the last step"
        frame = self.frame(step, alone=True)
        return f"{where}: " + "; ".join(filter(None, [frame.copies(), frame.summary()]))

    def frame(self, step: int, *, alone: bool) -> BlockTables:
        title = f"step {step}" if step < self.num_steps - 1 else "after the last step"
        others = range(self.num_steps) if alone else self.chosen
        idle = set.intersection(*(self.states[each].idle() for each in others))
        form = {"room": self.room, "idle": idle, "narrow": not alone}
        return BlockTables(self.states[step], tokens=self.tokens, title=title, **form)


def owner_letters(request_ids: Sequence[str]) -> dict[str, str]:
    """A letter for each request: its id if all ids are letters, else A, B, C, ... in the order given."""
    ids = list(dict.fromkeys(request_ids))
    if all(each in LETTERS and len(each) == 1 for each in ids):
        return {each: each for each in ids}
    return {each: LETTERS[index % len(LETTERS)] for index, each in enumerate(ids)}


def _room(states: Sequence[PoolState]) -> dict[str, int]:
    """Every request, in order of arrival if that is known, and the largest number of blocks in its table."""
    room: dict[str, int] = {}
    for state in states:
        for request_id in [*state.fates, *state.tables]:
            room[request_id] = max(room.get(request_id, 0), len(state.tables.get(request_id, ())))
    return room


def pool_rows(num_blocks: int, idle: Collection[int]) -> list[range]:
    """The blocks of a pool one by one, but runs of more than two `idle` ones together."""
    rows: list[range] = []
    block = 0
    while block < num_blocks:
        end = block
        while end < num_blocks and end in idle:
            end += 1
        if end - block <= FEW_FREE:
            end = block + 1
        rows.append(range(block, end))
        block = end
    return rows


def _span(row: range) -> str:
    return f"{row[0]}–{row[-1]}" if len(row) > 1 else str(row[0])


# --- the layout of the figure, in inches ---


@dataclass(frozen=True)
class _Layout:
    width: float
    height: float
    edges: tuple[float, ...]  # of the slots of a block; block size + 1
    letters: int  # the most of a token that are written into its slot
    small: bool  # blocks so small that their number or owner is written onto them
    pool: tuple[float, float]  # left and upper end of the pool
    pool_cell: float  # from one column of the pool to the next
    lines: Mapping[int, tuple[int, int]]  # of a pool that is not small: block -> column and row

    @property
    def block(self) -> float:
        """Width of a block."""
        return self.edges[-1]

    def place(self, block: int) -> tuple[float, float]:
        """Left and upper end of a block of the pool: one per line, or small ones in lines like text."""
        column, row = divmod(block, COLUMNS)[::-1] if self.small else self.lines[block]
        return self.pool[0] + column * self.pool_cell, self.pool[1] + row * LINE

    def table_height(self, num_blocks: int) -> float:
        """Height of a table without its heading."""
        return LINE * -(-num_blocks // COLUMNS) if self.small else ENTRY * num_blocks


def _layout(
    state: PoolState,
    room: Mapping[str, int],
    widths: Sequence[int],
    owners: int,
    rows: Sequence[range],
    more: bool,
    narrow: bool,
) -> _Layout:
    """The layout with the widest slots for which tables and pool fit side by side; else small blocks, the pool below.

    `widths`: letters for which each slot has room, if possible; `owners`: letters to the right of a block. `more`: a
    line below the tables says how many requests are left out. `narrow`: the tables are lines above the pool.
    """
    below_tables = MORE if more else 0.0
    if state.num_blocks > MOST_LISTED:
        return _above_each_other(state, room, below_tables)
    forms = [([LETTER * min(letters, width) + BESIDE for width in widths], letters) for letters in LABELS]
    forms = [form for form in forms if any(widths)]
    forms += [([min(0.3, block / state.block_size)] * state.block_size, 0) for block in (1.6, 1.2, 0.8, 0.5)]
    columns = 1 if narrow else -(-len(rows) // MOST_ROWS)
    per_column = -(-len(rows) // columns)
    lines = {row[0]: divmod(index, per_column) for index, row in enumerate(rows)}
    tables = HEADING * len(room) if narrow else TOP + _tables_height(room) + below_tables
    number = POOL_NUMBER - 0.07 * (state.num_blocks <= 10)
    top, left = (tables + 0.08, number) if narrow else (TOP, TABLES + ARROWS + number)
    height = top + per_column * LINE if narrow else max(tables, TOP + per_column * LINE)
    for slots, letters in forms:
        edges = tuple(accumulate(slots, initial=0.0))
        cell = number + edges[-1] + 0.1 + 1.1 * LETTER * owners
        width = left - number + columns * cell
        if width <= (NARROW if narrow else WIDTH) and (narrow or height <= MOST_HEIGHT):
            return _Layout(
                width if narrow else max(width, LEAST), height, edges, letters, False, (left, top), cell, lines
            )
    if narrow:
        return _Layout(width, height, edges, letters, False, (left, top), cell, lines)
    return _above_each_other(state, room, below_tables)


def _above_each_other(state: PoolState, room: Mapping[str, int], below_tables: float) -> _Layout:
    cell = (WIDTH - POOL_NUMBER) / COLUMNS
    tables = sum(HEADING + LINE * -(-blocks // COLUMNS) + BELOW for blocks in _longest(room))
    pool = (POOL_NUMBER, 2 * TOP + tables + below_tables + 0.1)
    height = pool[1] + LINE * -(-state.num_blocks // COLUMNS)
    edges = tuple(SMALL * slot / state.block_size for slot in range(state.block_size + 1))
    return _Layout(WIDTH, height, edges, 0, True, pool, cell, {})


def _tables_height(room: Mapping[str, int]) -> float:
    return sum(HEADING + ENTRY * blocks + BELOW for blocks in _longest(room))


def _longest(room: Mapping[str, int]) -> list[int]:
    return sorted(room.values())[-MOST_REQUESTS:]
