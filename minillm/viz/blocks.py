"""Block tables and the pool they point into: who holds which physical block, what it holds, what is shared.

Everything is read from a Trace (`BlockTables.of_step`, `BlockTableSteps`), or given as a `PoolState`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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

MOST_BLOCKS = 256  # of a pool that can be drawn block by block
MOST_LISTED = 32  # blocks up to which each has a line of its own in the text, and its slots in the figure
MOST_REQUESTS = 10  # tables drawn
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
LABELS = (7, 6, 5, 4)  # letters of a token in the figure, as many as there is room for; a longer one is cut
LETTER = 0.072  # inches that one takes
WIDTH, GAP = MAX_WIDTH - 0.3, 0.3  # inches: the drawing, and between tables and pool
TOP = 0.3  # inches: what stands above tables and pool
LINE, HEADING, BELOW = 0.36, 0.3, 0.06  # inches: a line of blocks, what stands above a table, what is free below it
HEIGHT, MORE = 0.27, 0.22  # inches: a block; a line that says how many requests are left out
NUMBERS, POOL_NUMBER, OWNER = 0.46, 0.3, 0.78  # inches: room for "0→12" and "12" before a block, for its owners behind
SMALL, COLUMNS = 0.36, 20  # inches: a small block; and how many stand in a line
MOST_ROWS = 16  # of the pool beside the tables
MOST_HEIGHT = 8.0  # inches of tables beside the pool; else blocks are drawn small


class BlockTables(Picture):
    """Every request's block table beside the physical pool at one moment; `state` says what is where.

    A request has a letter and a colour; a block shared by several has the colours of all and its ref count. Slots that
    the step writes are framed; empty slots of used blocks are hatched. `tokens` (request id -> its tokens) is written
    into the slots where there is room. `BlockTables.of_step` takes a step of a trace. Raises PictureError for a pool
    of more than 256 blocks.
    """

    def __init__(
        self,
        state: PoolState,
        *,
        tokens: Mapping[str, Sequence[str]] | None = None,
        title: str | None = None,
        room: Mapping[str, int] | None = None,
    ):
        """`room`: requests that get a place, and blocks that the figure has space for in the table of each, so that
        the steps of a run come out alike; by default those of `state`.
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
        longest = max((text_width(each) for texts in self.tokens.values() for each in texts), default=0)
        shown = self.room if room else {request_id: self.room[request_id] for request_id in self._shown()}
        self._layout = _layout(state, shown, longest, more=len(self.room) > len(self._shown()))

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
        """While step `step` of a trace runs, by default the last one; `len(trace.steps)` is what that one leaves.

        Raises PictureError for a step that is not in the trace, and as `pool_states` does.
        """
        states = pool_states(trace, block_size, tokens=tokens, num_blocks=num_blocks)
        step = len(states) - 2 if step is None else step
        if not 0 <= step < len(states):
            raise PictureError(f"step {step} is outside the trace's steps 0..{len(states) - 1}")
        return cls(states[step], tokens=tokens, title=title)

    # --- words ---

    def summary(self) -> str:
        """Blocks by use, what sharing saves, and what is empty."""
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
        """The blocks that were copied before the step wrote; empty if none were."""
        pairs = [f"block {source} copied to {target}" for source, target in self.state.copies]
        return ", ".join(pairs)

    def _shown(self) -> list[str]:
        """The requests that get a place; of very many, those with a table."""
        if len(self.room) <= MOST_REQUESTS:
            return list(self.room)
        return [request_id for request_id in self.room if request_id in self.state.tables][:MOST_REQUESTS]

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}block tables and pool: {self.summary()}"

    def heading(self, request_id: str) -> str:
        """A request's name unless it is its letter, and how it stands."""
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

    def _label(self, block: int, slot: int) -> str:
        """The token in a slot; "" if nobody said which."""
        content = self.state.content(block)
        if content is None:
            return ""
        request_id, index = content
        tokens, position = self.tokens.get(request_id, ()), index * self.state.block_size + slot
        return tokens[position] if position < len(tokens) else ""

    def owner(self, block: int) -> str:
        """The letters of a block's owners and its ref count, or what it is instead."""
        state = self.state
        letters = [self.letters[request_id] for request_id in state.owners(block)]
        if len(letters) > 1:
            return (" ".join(letters[:3]) + ("…" if len(letters) > 3 else "")) + f" ×{len(letters)}"
        if letters:
            return letters[0]
        return "null" if block < state.num_null else CACHED.name if block in state.cached else FREE.name

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
        """The tokens of a block, or a sign a slot."""
        filled = self.state.filled(block)
        labels = [self._label(block, slot) for slot in range(filled)]
        if all(labels):
            return "[" + " ".join(labels + [EMPTY.letter] * (self.state.block_size - filled)) + "]"
        return self._signs(block)

    def _text_list(self) -> list[str]:
        """A line a block: its number, its owners, its slots."""
        state = self.state
        owners = [self.owner(block) for block in range(state.num_blocks)]
        width = max(map(text_width, [*owners, "owner"]))
        lines = [f"block  {pad('owner', width)}  slots"]
        for block, owner in enumerate(owners):
            held = block in state.cached or state.owners(block)
            slots = self._signs(block) if held else ""
            lines.append(f"{block:5}  {pad(owner, width)}  {slots}".rstrip())
        return [*lines, f"# held   + written now   {EMPTY.letter} empty"]

    def _signs(self, block: int) -> str:
        """A sign a slot: # held, + written now, . empty."""
        filled, written = self.state.filled(block), self.state.slots_written(block) or (0, 0)
        signs = "".join("+" if written[0] <= slot < written[1] else "#" for slot in range(filled))
        return signs + EMPTY.letter * (self.state.block_size - filled)

    def _text_map(self) -> list[str]:
        """A sign a block: its owner's letter, the number of its owners if they are several."""
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
        return MAX_WIDTH, self._layout.height + 0.75

    def _draw(self, axes, step: int | None = None) -> None:
        layout, shown = self._layout, self._shown()
        axes.set(xlim=(0, WIDTH), ylim=(layout.height, 0))
        axes.axis("off")
        self._write(axes, 0, 0.1, "block tables: logical → physical", color=GREY)
        top = TOP
        for request_id in shown:
            top = self._draw_table(axes, request_id, top)
        if len(self.room) > len(shown):
            self._write(axes, 0, top + 0.08, f"and {plural(len(self.room) - len(shown), 'request')} more", color=GREY)
        x, y = layout.pool
        self._write(axes, 0 if layout.small else x - POOL_NUMBER, y - 0.2, "the pool: physical blocks", color=GREY)
        for block in range(self.state.num_blocks):
            self._draw_pool_block(axes, block)
        notes = "\n".join(filter(None, [self.copies(), self.summary()]))
        axes.annotate(
            notes, (0, 0), (0, -4), xycoords="axes fraction", textcoords="offset points", va="top", size=SMALL_SIZE,
            annotation_clip=False,
        )  # fmt: skip
        extra = "thick frame: written in this step" if self.state.written else ""
        add_legend(axes, self._legend(), y=38 if self.copies() else 24, extra=extra)

    def _legend(self) -> list[State]:
        use = self.state.use
        kinds = [(EMPTY, self.state.num_empty), (CACHED, use.cached), (FREE, use.free)]
        return [state for state, count in kinds if count]

    def _draw_table(self, axes, request_id: str, top: float) -> float:
        """A request's heading and table, from `top` on; returns where the next one begins."""
        layout, state = self._layout, State(self.letters[request_id], request_id, self._color(request_id))
        add_box(axes, 0.02, top + 0.03, 0.21, 0.21, state, linewidth=0)
        self._write(axes, 0.125, top + 0.135, state.letter, ha="center", fontweight="bold")
        self._write(axes, 0.32, top + 0.135, self.heading(request_id))
        for index, block in enumerate(self.state.tables.get(request_id, ())):
            line, place = divmod(index, layout.blocks_a_line)
            x, y = place * layout.table_cell + layout.number, top + HEADING + line * LINE
            self._draw_block(axes, block, x, y)
            if layout.small:
                self._write_onto(axes, x, y, str(block))
            else:
                self._write(axes, x - 0.06, y + HEIGHT / 2, f"{index}→{block}", ha="right")
        return top + HEADING + LINE * layout.lines(self.room[request_id]) + BELOW

    def _draw_pool_block(self, axes, block: int) -> None:
        layout, (x, y) = self._layout, self._layout.place(block)
        if not layout.small or block % layout.columns == 0:
            self._write(axes, x - 0.06, y + HEIGHT / 2, str(block), ha="right")
        self._draw_block(axes, block, x, y)
        owner = self.owner(block)
        if layout.small:
            self._write_onto(axes, x, y, self._sign(block))
        else:
            style = {"fontweight": "bold"} if self.state.owners(block) else {"color": GREY}
            self._write(axes, x + 0.06 + layout.block, y + HEIGHT / 2, owner, **style)

    def _write_onto(self, axes, x: float, y: float, sign: str) -> None:
        behind = {"facecolor": WHITE, "edgecolor": "none", "pad": 0.8}
        self._write(axes, x + self._layout.block / 2, y + HEIGHT / 2, sign, ha="center", bbox=behind, zorder=6)

    def _draw_block(self, axes, block: int, x: float, y: float) -> None:
        """The slots of a block: stripes in the colours of its owners, hatched where empty, framed where written."""
        state, slot, width = self.state, self._layout.slot, self._layout.block
        filled, owners = state.filled(block), state.owners(block)
        colors = [self._color(owner) for owner in owners[:3]] or [CACHED.color if filled else WHITE]
        for stripe, color in enumerate(colors):
            height = HEIGHT / len(colors)
            self._fill_box(axes, x, y + stripe * height, filled * slot, height, color)
        if owners and filled < state.block_size:
            empty = add_box(axes, x + filled * slot, y, width - filled * slot, HEIGHT, EMPTY, linewidth=0)
            empty.set_gid("empty")
        for index in range(1, state.block_size if slot >= 0.06 and (owners or filled) else 0):
            inside = {"color": WHITE if index < filled else LIGHT_GREY, "linewidth": 0.7}
            axes.plot([x + index * slot] * 2, [y, y + HEIGHT], **inside)
        self._frame(axes, x, y, width, 0.8, BLACK if owners else GREY, linestyle="-" if owners or filled else ":")
        for index in range(filled):
            self._draw_label(axes, self._label(block, index), x + (index + 0.5) * slot, y + HEIGHT / 2)
        written = state.slots_written(block)
        if written:
            self._frame(axes, x + written[0] * slot, y, (written[1] - written[0]) * slot, 2.2, BLACK, zorder=4)

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

    Steps = forward passes, and behind them what the last one left. `tokens` (request id -> its tokens) is written into
    the slots. By default up to six steps are chosen, in which a block table changes. Raises PictureError as
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
        self.tokens, self.room = tokens, _room(self.states)
        super().__init__(trace, [(state.tables, state.fates) for state in self.states], steps, title)

    def caption(self, step: int) -> str:
        where = f"step {step + 1} of {self.num_steps - 1}" if step < self.num_steps - 1 else "after the last step"
        frame = self.frame(step, alone=True)
        return f"{where}: " + "; ".join(filter(None, [frame.copies(), frame.summary()]))

    def frame(self, step: int, *, alone: bool) -> BlockTables:
        title = f"step {step}" if step < self.num_steps - 1 else "after the last step"
        room = self.room if alone else None
        return BlockTables(self.states[step], tokens=self.tokens, title=title, room=room)


def owner_letters(request_ids: Sequence[str]) -> dict[str, str]:
    """A letter for each request: its id where all ids are letters, else A, B, C, ... in the order given."""
    ids = list(dict.fromkeys(request_ids))
    if all(each in LETTERS and len(each) == 1 for each in ids):
        return {each: each for each in ids}
    return {each: LETTERS[index % len(LETTERS)] for index, each in enumerate(ids)}


def _room(states: Sequence[PoolState]) -> dict[str, int]:
    """Every request, in order of arrival where that is known, and the most blocks its table has."""
    room: dict[str, int] = {}
    for state in states:
        for request_id in [*state.fates, *state.tables]:
            room[request_id] = max(room.get(request_id, 0), len(state.tables.get(request_id, ())))
    return room


# --- where everything stands in the figure, in inches ---


@dataclass(frozen=True)
class _Layout:
    slot: float  # width of a slot
    block: float  # width of a block
    letters: int  # of a token that is written into its slot
    small: bool  # blocks so small that their number or owner is written onto them
    number: float  # room for a block's numbers left of it
    table_cell: float  # from one block of a table to the next
    blocks_a_line: int
    pool: tuple[float, float]  # left and upper end of the pool
    pool_cell: float  # from one column of the pool to the next
    rows: int
    columns: int
    height: float

    def place(self, block: int) -> tuple[float, float]:
        """Left and upper end of a block of the pool: below each other, or like words if they are small."""
        row, column = divmod(block, self.columns) if self.small else divmod(block, self.rows)[::-1]
        return self.pool[0] + column * self.pool_cell, self.pool[1] + row * LINE

    def lines(self, num_blocks: int) -> int:
        """Lines that a table takes."""
        return -(-num_blocks // self.blocks_a_line)


def _layout(state: PoolState, room: Mapping[str, int], longest_label: int, more: bool) -> _Layout:
    """The widest slots with which tables and pool fit next to each other; small blocks, the pool below, if none do.

    `more`: a line below the tables says how many requests are left out.
    """
    below_tables = MORE if more else 0.0
    if state.num_blocks <= MOST_LISTED:
        labels = [min(letters, longest_label) for letters in LABELS if longest_label]
        widths = [(LETTER * letters + 0.06, letters) for letters in labels]
        widths += [(min(0.3, block / state.block_size), 0) for block in (1.6, 1.2, 0.8, 0.5)]
        for slot, letters in widths:
            layout = _beside_each_other(state, room, slot, letters, below_tables)
            if layout:
                return layout
    return _above_each_other(state, room, below_tables)


def _beside_each_other(
    state: PoolState, room: Mapping[str, int], slot: float, letters: int, below_tables: float
) -> _Layout | None:
    block = slot * state.block_size
    columns = -(-state.num_blocks // MOST_ROWS)
    rows = -(-state.num_blocks // columns)
    pool_cell, table_cell = POOL_NUMBER + block + OWNER, NUMBERS + block + 0.06
    left = WIDTH - columns * pool_cell
    a_line = int((left - GAP) / table_cell)
    if a_line < min(2, max(room.values(), default=1)):
        return None
    height = TOP + max(_tables_height(room, a_line) + below_tables, rows * LINE)
    if height > MOST_HEIGHT:
        return None
    pool = (left + POOL_NUMBER, TOP)
    return _Layout(slot, block, letters, False, NUMBERS, table_cell, a_line, pool, pool_cell, rows, columns, height)


def _above_each_other(state: PoolState, room: Mapping[str, int], below_tables: float) -> _Layout:
    cell = (WIDTH - POOL_NUMBER) / COLUMNS
    rows = -(-state.num_blocks // COLUMNS)
    pool = (POOL_NUMBER, 2 * TOP + _tables_height(room, COLUMNS) + below_tables + 0.1)
    height = pool[1] + rows * LINE
    slot = SMALL / state.block_size
    return _Layout(slot, SMALL, 0, True, POOL_NUMBER, cell, COLUMNS, pool, cell, rows, COLUMNS, height)


def _tables_height(room: Mapping[str, int], blocks_a_line: int) -> float:
    lines = sorted(-(-blocks // blocks_a_line) for blocks in room.values())
    return sum(HEADING + LINE * each + BELOW for each in lines[-MOST_REQUESTS:])
