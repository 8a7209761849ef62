"""Where the memory of a cache goes: a pool of blocks over a run, and reservation for the maximum against paging."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from minillm.trace import Trace
from minillm.viz.base import (
    SMALL_SIZE,
    Panels,
    Picture,
    PictureError,
    add_box,
    add_legend,
    literal,
    number,
    pad,
    plural,
    request_label,
    text_table,
    text_width,
)
from minillm.viz.batches import MOST_BARS, MOST_TEXT_BARS, TEXT_BAR
from minillm.viz.block_replay import Replay
from minillm.viz.palette import BLACK, CACHED, EMPTY, EXTERNAL, FREE, HELD, STATES, State

KINDS = {"held": HELD, "empty": EMPTY, "cached": CACHED, "free": FREE}  # from the bottom of a bar to its top
MODES = {"recompute": STATES["preempted"], "swap": STATES["swapped"]}


class PoolMoment(NamedTuple):
    """The pool after some consecutive steps: means in blocks, and the preemptions before them."""

    first_step: int
    last_step: int
    blocks: dict[str, float]  # kind -> blocks; "held" and "empty" are the filled and the empty part of used ones
    preempted: Counter[str]  # mode -> how many


class PoolUse(Picture):
    """A bar per forward pass: the blocks of a paged pool after it, used, cached and free; preemptions marked.

    With asynchronous scheduling the next pass is already planned, and the bar includes what it takes and writes. The
    part of used blocks that holds no token, the internal fragmentation, is hatched. In long runs a bar is the mean of
    several passes. Only `block_size` is not read from the trace. Steps = forward passes. Raises PictureError for
    a trace without block tables, or with a step that does not say how the blocks are used.
    """

    _legend_inches = 0.3

    def __init__(self, trace: Trace, block_size: int, *, title: str | None = None):
        replay = Replay(trace, block_size)
        without = [step.step for step in trace.steps if step.blocks is None]
        if without:
            raise PictureError(f"step {without[0]} of the trace does not say how the blocks of the pool are used")
        self.block_size = block_size
        self.num_blocks = trace.steps[0].blocks.total - trace.steps[0].blocks.null  # that can be allocated
        self.title = title
        self.num_steps = len(trace.steps)
        self.moments = []
        begun = False
        for index, step in enumerate(trace.steps):
            if not begun:
                replay.begin(index)
            replay.end(index)
            begun = index + 1 < self.num_steps and trace.steps[index + 1].planned is not None
            if begun:
                replay.begin(index + 1)
            use = step.blocks
            empty = min(replay.num_empty / block_size, use.used)  # after a failed step it has obsolete tables
            blocks = {"held": use.used - empty, "empty": empty, "cached": use.cached, "free": use.free}
            self.moments.append(PoolMoment(index, index, blocks, Counter(each.mode for each in step.preempted)))

    @property
    def empty_share(self) -> float:
        """Internal fragmentation over all steps: the share of slots in used blocks that held no token, 0 to 1."""
        empty = sum(moment.blocks["empty"] for moment in self.moments)
        used = empty + sum(moment.blocks["held"] for moment in self.moments)
        return empty / used if used else 0.0

    def bars(self, most: int) -> list[PoolMoment]:
        """All steps in at most `most` bars; all but the last have the same number of steps."""
        every = -(-self.num_steps // most)
        groups = [self.moments[first : first + every] for first in range(0, self.num_steps, every)]
        return [
            PoolMoment(
                group[0].first_step,
                group[-1].last_step,
                {kind: sum(moment.blocks[kind] for moment in group) / len(group) for kind in KINDS},
                sum((moment.preempted for moment in group), Counter()),
            )
            for group in groups
        ]

    def summary(self) -> str:
        """The fullest step, internal fragmentation, preemptions."""
        used = [moment.blocks["held"] + moment.blocks["empty"] for moment in self.moments]
        most = max(used)
        modes = sum((moment.preempted for moment in self.moments), Counter())
        parts = [
            f"{plural(self.num_blocks, 'block')} of {plural(self.block_size, 'slot')} to hand out",
            f"at most {number(round(most))} used ({most / self.num_blocks:.1%}), after step {used.index(most)}",
            f"{self.empty_share:.1%} of the slots in used blocks empty",
            plural(modes.total(), "preemption") + _modes(modes),
        ]
        return f"{parts[0]}; {parts[1]}\n{parts[2]}; {parts[3]}"

    def text(self) -> str:
        bars = self.bars(MOST_TEXT_BARS)
        scale = min(1.0, TEXT_BAR / self.num_blocks)
        rows = []
        for bar in bars:
            name = f"{bar.first_step}" + (f"–{bar.last_step}" if bar.last_step > bar.first_step else "")
            used, tokens = bar.blocks["held"] + bar.blocks["empty"], bar.blocks["held"] * self.block_size
            counts = (used, bar.blocks["cached"], bar.blocks["free"], tokens, bar.blocks["empty"] * self.block_size)
            marks = "".join(MODES[mode].letter * count for mode, count in sorted(bar.preempted.items()))
            rows.append([name, self._letters(bar, scale), *(number(round(count, 6), 2) for count in counts), marks])
        header = ["step", "", "used", "cached", "free", "tokens held", "slots empty", "preempted"]
        width = max(len(row[1]) for row in rows)
        for row in rows:
            row[1] = pad(row[1], width)
        notes = [f"{state.letter} {name}" for name, state in KINDS.items()]
        notes += [f"{state.letter} {state.name}" for state in self._modes_used()]
        notes += [f"a letter is {number(1 / scale)} blocks"] if scale < 1 else []
        notes += ["numbers are means of the steps"] if len(bars) < self.num_steps else []
        return f"{text_table(header, rows)}\n{'   '.join(notes)}\n{self.summary()}"

    def _letters(self, bar: PoolMoment, scale: float) -> str:
        """One letter per `1 / scale` blocks, rounded so that the sums are right."""
        letters, total = "", 0.0
        for kind, state in KINDS.items():
            total += bar.blocks[kind]
            letters += state.letter * max(0, round(total * scale) - len(letters))
        return letters

    def _modes_used(self) -> list[State]:
        return [state for mode, state in MODES.items() if any(moment.preempted[mode] for moment in self.moments)]

    def caption(self, step: int) -> str:
        blocks, preempted = self.moments[step].blocks, self.moments[step].preempted
        used, empty = blocks["held"] + blocks["empty"], round(blocks["empty"] * self.block_size)
        gone = f"; {plural(preempted.total(), 'preemption')} before it" if preempted else ""
        return (
            f"after step {step + 1} of {self.num_steps}: {plural(round(used), 'block')} used with {empty} empty slots, "
            f"{blocks['cached']} cached, {blocks['free']} free{gone}"
        )

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}use of a pool of blocks: {self.summary()}".replace("\n", "; ")

    def _size(self) -> tuple[float, float]:
        return 8.0, 3.6

    def _draw(self, axes, step: int | None = None) -> None:
        bars = self.bars(MOST_BARS)
        border = 0.6 if len(bars) <= 60 else 0.0
        for index, bar in enumerate(bars):
            faded = step is not None and bar.first_step > step
            self._draw_bar(axes, index, bar, {"alpha": 0.12 if faded else None, "linewidth": border}, len(bars))
            if step is not None and bar.first_step <= step <= bar.last_step:
                frame = {"facecolor": "none", "edgecolor": BLACK, "linewidth": 1.5, "hatch": "", "zorder": 4}
                add_box(axes, index, 0, 1, self.num_blocks, FREE, **frame)
            if not faded:
                self._draw_marks(axes, index, bar)
                self._say_if_empty(axes, index, bar, len(bars))
        axes.set(xlim=(0, len(bars)), ylim=(0, 1.13 * self.num_blocks), ylabel="blocks")
        axes.axhline(self.num_blocks, color=BLACK, linewidth=1.3, linestyle="--")
        axes.annotate(
            f"all\n{self.num_blocks:,}", (1, self.num_blocks), (5, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", size=SMALL_SIZE, annotation_clip=False,
        )  # fmt: skip
        self._label_steps(axes, bars)
        axes.annotate(
            self.summary(), (0, 0), (0, -40), xycoords="axes fraction", textcoords="offset points", va="top",
            size=SMALL_SIZE, annotation_clip=False,
        )  # fmt: skip
        kinds = [replace(state, name=KIND_NAMES[kind]) for kind, state in KINDS.items()]
        add_legend(axes, kinds + self._modes_used(), y=74)

    def _draw_bar(self, axes, index: int, bar: PoolMoment, style: dict, num_bars: int) -> None:
        below = 0.0
        for kind, state in KINDS.items():
            if bar.blocks[kind] > 0:
                dense = replace(state, hatch=state.hatch * (1 if num_bars <= 20 else 3))
                add_box(axes, index, below, 1, bar.blocks[kind], dense, **style).set_gid(kind)
                below += bar.blocks[kind]

    def _draw_marks(self, axes, index: int, bar: PoolMoment) -> None:
        """Write above a bar the letter of each preemption mode that occurred."""
        letters = [MODES[mode].letter for mode in sorted(bar.preempted)]
        if letters:
            axes.text(
                index + 0.5, 1.015 * self.num_blocks, "\n".join(letters), ha="center", va="bottom", size=SMALL_SIZE,
                fontweight="bold", clip_on=False,
            ).set_in_layout(False)  # fmt: skip

    def _say_if_empty(self, axes, index: int, bar: PoolMoment, num_bars: int) -> None:
        """Label a column without used blocks: all requests that held one have ended, or were preempted."""
        if bar.blocks["held"] + bar.blocks["empty"] == 0 and num_bars <= 60:
            words = {"rotation": 90, "ha": "center", "va": "center", "size": SMALL_SIZE, "zorder": 5}
            axes.text(index + 0.5, 0.4 * self.num_blocks, "none left", **words).set_in_layout(False)

    def _label_steps(self, axes, bars: Sequence[PoolMoment]) -> None:
        every = next(every for every in (1, 2, 5, 10, 20) if len(bars) <= 25 * every or every == 20)
        places = range(0, len(bars), every)
        axes.set_xticks([place + 0.5 for place in places], [f"{bars[place].first_step:,}" for place in places])
        grouped = bars[0].last_step - bars[0].first_step + 1
        axes.set_xlabel("forward pass" + (f" (a bar is the mean of {grouped})" if grouped > 1 else ""))
        axes.tick_params(axis="x", length=0)
        axes.yaxis.get_major_locator().set_params(integer=True)


KIND_NAMES = {"held": "used, holds tokens", "empty": "used, empty slots", "cached": "cached", "free": "free"}


def _modes(modes: Counter[str]) -> str:
    """ " (2 recompute, 1 swap)"; nothing if there were none."""
    return f" ({', '.join(f'{count} {mode}' for mode, count in sorted(modes.items()))})" if modes else ""


# --- reservation against paging ---------------------------------------------------------------------------------------


class Share(NamedTuple):
    """Slots of a memory by their content; they sum to its size."""

    held: int  # hold a token's keys and values
    empty: int  # reserved for a request, without a token: internal fragmentation
    external: int  # free, but in gaps too small for any waiting request: external fragmentation
    free: int

    @property
    def waste(self) -> float:
        """The fragmented share of the whole memory, 0 to 1."""
        return (self.empty + self.external) / sum(self) if sum(self) else 0.0


class ReservedAgainstPaged(Panels):
    """The same requests in the same memory twice: with slots reserved for the longest possible length, and with blocks.

    All numbers are measured. `tokens`: the tokens each request holds or would hold. `reserved`: its reserved slots;
    `blocks`: the length of its block table; both only for requests that have room. `capacity`: the slots of the memory.
    `external`: free slots in gaps too small for any waiting request. Raises PictureError if a request holds more tokens
    than it has slots, has no tokens given, or all together exceed the capacity.
    """

    def __init__(
        self,
        tokens: Mapping[str, int],
        reserved: Mapping[str, int],
        blocks: Mapping[str, int],
        block_size: int,
        capacity: int,
        *,
        external: int = 0,
        title: str | None = None,
    ):
        slots = {request_id: count * block_size for request_id, count in blocks.items()}
        left = _MemoryRows("reserved", tokens, reserved, capacity, external)
        right = _MemoryRows(f"blocks of {block_size}", tokens, slots, capacity, 0, block_size)
        left.scale = right.scale = max([1, *reserved.values(), *slots.values(), *tokens.values()])
        self.reserved, self.paged = left.share, right.share
        super().__init__([left, right], title=title)

    def alt(self) -> str:
        titles = "; ".join(picture.title for picture in self.pictures)
        return f"{self.title + ': ' if self.title else ''}{titles}"


class _MemoryRows(Picture):
    """A bar per request with held and empty slots, and one for the whole memory."""

    _legend_inches = 0.25

    def __init__(
        self,
        name: str,
        tokens: Mapping[str, int],
        slots: Mapping[str, int],
        capacity: int,
        external: int,
        block_size: int | None = None,
    ):
        unknown = [request_id for request_id in slots if request_id not in tokens]
        if not tokens or unknown:
            raise PictureError(f"tokens are given of {list(tokens)[:8]}, slots of {list(slots)[:8]}; tokens need all")
        for request_id, count in slots.items():
            if tokens[request_id] > count:
                raise PictureError(
                    f"{request_id!r} holds {tokens[request_id]} tokens in {plural(count, 'slot')} ({name})"
                )
        taken = sum(slots.values())
        if taken + external > capacity:
            raise PictureError(
                f"{taken:,} slots taken ({name}) and {external:,} in gaps are more than the capacity of {capacity:,}"
            )
        held = sum(tokens[request_id] for request_id in slots)
        self.share = Share(held, taken - held, external, capacity - taken - external)
        self.tokens, self.slots, self.capacity, self.block_size = tokens, slots, capacity, block_size
        self.scale = 1
        wasted = f"{self.share.waste:.1%} of the memory wasted"
        self.title = f"{name}: {len(slots)} of {plural(len(tokens), 'request')} fit, {wasted}"

    def text(self) -> str:
        names = {request_id: request_label(request_id) for request_id in self.tokens}
        width = max(map(text_width, [*names.values(), "memory"]))
        scale = -(-self.scale // TEXT_BAR)
        lines = [f"{pad(names[request_id], width)} {self._text_row(request_id, scale)}" for request_id in self.slots]
        lines += [self._waiting()] if self._waiting() else []
        letters, total = "", 0
        for state, count in zip(SHARES, self.share, strict=True):
            total += count
            letters += state.letter * (round(total / self.capacity * TEXT_BAR) - len(letters))
        notes = [f"{state.letter} {state.name} {count / self.capacity:.1%}"
                 for state, count in zip(SHARES, self.share, strict=True) if count]  # fmt: skip
        notes += [f"a letter above is {scale} slots"] if scale > 1 else []
        return "\n".join([*lines, f"{pad('memory', width)} |{letters}| {self.capacity:,} slots", "   ".join(notes)])

    def _text_row(self, request_id: str, scale: int) -> str:
        held, slots = self.tokens[request_id], self.slots[request_id]
        letters = HELD.letter * -(-held // scale)
        return f"|{letters.ljust(-(-slots // scale), EMPTY.letter)}| {held:,} of {slots:,}"

    def _waiting(self) -> str:
        """How many requests have no room; empty if all have."""
        count = len(self.tokens) - len(self.slots)
        return f"no room for {count} more" if count else ""

    def _row(self) -> float:
        """Inches from one row to the next."""
        return max(0.09, min(0.26, 5.0 / len(self.tokens)))

    def _size(self) -> tuple[float, float]:
        return 4.45, self._row() * len(self.tokens) + 1.5 + self._legend_inches

    def _draw(self, axes, step: int | None = None) -> None:
        rows, unit = len(self.tokens), self.scale
        for row, request_id in enumerate(self.tokens):
            if request_id in self.slots:
                self._draw_row(axes, row, request_id)
        first = next((row for row, request_id in enumerate(self.tokens) if request_id not in self.slots), 0)
        axes.annotate(self._waiting(), (0, first), (3, -3), textcoords="offset points", va="top", size=SMALL_SIZE)
        whole, below = rows + 1.1 * 0.26 / self._row(), 0.3 / self._row()
        start = 0.0
        for state, count in zip(SHARES, self.share, strict=True):
            width = count / self.capacity * unit
            if count:
                add_box(axes, start, whole, width, below, state, linewidth=0.6).set_gid(f"all:{state.name}")
            if count:
                inside = width > 0.14 * unit
                style = {"color": state.ink, "bbox": {"facecolor": state.color, "edgecolor": "none", "pad": 1.2}}
                axes.text(
                    start + width / 2, whole + below * (0.5 if inside else -0.4), f"{count / self.capacity:.1%}",
                    ha="center", va="center", size=SMALL_SIZE, **(style if inside else {"color": BLACK}),
                ).set_in_layout(False)  # fmt: skip
            start += width
        add_box(axes, 0, whole, unit, below, FREE, facecolor="none", edgecolor=BLACK, hatch="", linewidth=0.8)
        axes.set(xlim=(0, 1.01 * unit), ylim=(whole + 1.1 * below, 0))
        axes.spines[:].set_visible(False)
        axes.xaxis.set_visible(False)
        axes.tick_params(length=0)
        every = 1 if self._row() > 0.15 else -(-rows // 20)
        places = list(range(0, rows, every))
        names = [literal(request_label(list(self.tokens)[place])) for place in places]
        axes.set_yticks([*(place + 0.5 for place in places), whole + below / 2], [*names, "all memory"])
        add_legend(axes, [state for state, count in zip(SHARES, self.share, strict=True) if count], y=8)

    def _draw_row(self, axes, row: int, request_id: str) -> None:
        held, slots = self.tokens[request_id], self.slots[request_id]
        dense = replace(EMPTY, hatch=EMPTY.hatch * (1 if self._row() > 0.16 else 2))
        add_box(axes, 0, row + 0.1, held, 0.8, HELD, linewidth=0).set_gid(f"{request_id}:held")
        if slots > held:
            add_box(axes, held, row + 0.1, slots - held, 0.8, dense, linewidth=0).set_gid(f"{request_id}:empty")
        add_box(axes, 0, row + 0.1, slots, 0.8, FREE, facecolor="none", edgecolor=BLACK, hatch="", linewidth=0.8)
        if self.block_size and self.block_size > 0.015 * self.scale:  # narrower blocks would be only edges
            for edge in range(self.block_size, slots, self.block_size):
                axes.plot([edge, edge], [row + 0.1, row + 0.9], color=BLACK, linewidth=0.8)


SHARES = (HELD, replace(EMPTY, name="empty"), EXTERNAL, FREE)  # in the order of `Share`
