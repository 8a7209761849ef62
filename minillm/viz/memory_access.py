"""Which thread reads which address: one instruction of a warp and the memory it moves.

A GPU runs 32 threads, the *lanes* of a warp, in lockstep, and moves memory in sectors of 32 bytes. The bytes of a
sector that no lane requested are wasted. The loads come from the Traffic that kernels/cuda/emulator.py returns.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from math import gcd

from minillm.viz.base import MAX_WIDTH, SMALL_SIZE, Picture, PictureError, add_box, add_legend, pad, plural
from minillm.viz.memory_traffic import percent
from minillm.viz.palette import ASKED, BLACK, GREY, UNASKED, WHITE, State

WARP = 32  # lanes
SECTOR = 32  # bytes
GAP = 10  # space, in bytes, between sectors that are not neighbours in memory
MOST_ENTRIES = 32  # lane numbers in a line of text
MOST_LINES = 12  # lines of sectors in the text
MOST_SECTORS = 64  # drawn; 32 lanes that each read up to 16 bytes touch no more
WIDTH = MAX_WIDTH - 0.4  # inches
LANE, BETWEEN, MEMORY = 0.24, 0.62, 0.3  # inches: height of the lanes, of the arrows below them, of the sectors
ENLARGED = 0.5  # inches from the sectors to the enlarged one
WIDE = 0.17  # inches a box needs for a lane's number
NUMBER = 0.085  # inches that a digit takes
READER = State("", "lane", "#FFFFFF", BLACK)
RESTING = State("", "lane that reads nothing", "#DDDDDD", GREY)


class WarpAccess(Picture):
    """One instruction of a warp: 32 lanes above, below them the sectors of memory that it moves, and which lane reads
    what.

    `places`: lane -> (address, size) of its read, in bytes from the array's beginning; other lanes read nothing.
    Sectors that are neighbours in memory touch. If they are too narrow to show which lane reads which bytes, the first
    is drawn again, larger. Several pictures `stacked` have one scale, so that a longer strip is more traffic; with
    `share_x=False` each has the largest scale that fits. Raises PictureError for an impossible lane, address or size,
    and for more than 64 sectors.
    """

    _legend_inches = 0.25

    def __init__(self, places: Mapping[int, tuple[int, int]], *, title: str | None = None):
        self.lanes = {int(lane): (int(address), int(size)) for lane, (address, size) in sorted(places.items())}
        bad = {
            lane: place for lane, place in self.lanes.items() if not 0 <= lane < WARP or place[0] < 0 or place[1] < 1
        }
        if bad or not self.lanes:
            raise PictureError(
                f"lanes {bad or 'none'}: give one lane or more of 0 to {WARP - 1}, each an address of 0 or more and a "
                "size of 1 byte or more"
            )
        self.sectors = sorted({sector for place in self.lanes.values() for sector in _sectors(*place)})
        if len(self.sectors) > MOST_SECTORS:
            raise PictureError(f"{len(self.sectors)} sectors are more than can be drawn ({MOST_SECTORS})")
        self.title = title
        self.unit = reduce(gcd, (part for place in self.lanes.values() for part in place), SECTOR)  # bytes
        self._readers = self._find_readers()

    @classmethod
    def of_traffic(
        cls,
        traffic,
        array: str,
        *,
        block: int = 0,
        warp: int = 0,
        line: int | None = None,
        occurrence: int = 0,
        title: str | None = None,
    ) -> "WarpAccess":
        """What a warp's lanes load from an array when a source line runs for the `occurrence`-th time, from 0.

        `traffic` is the emulator's; `line` by default the first from which the warp loads that array. Raises
        PictureError if there is no such load.
        """
        records = traffic.records_of(array)
        found = records[(records["block"] == block) & (records["thread"] // WARP == warp)]
        lines = sorted(set(found["line"].tolist()))
        line = min(lines, default=None) if line is None else line
        found = found[found["line"] == line]
        times = sorted(set(found["occurrence"].tolist()))  # the line may load other arrays in between
        if not 0 <= occurrence < len(times):
            raise PictureError(
                f"no load {occurrence} of {array!r} in block {block}, warp {warp}, line {line}: that line does so "
                f"{len(times)} times; lines that do: {lines}"
            )
        found = found[found["occurrence"] == times[occurrence]]
        places = zip(found["thread"].tolist(), found["address"].tolist(), found["size"].tolist(), strict=True)
        return cls({thread % WARP: (address, size) for thread, address, size in places}, title=title)

    def _find_readers(self) -> dict[int, list[int]]:
        """For each requested unit of memory, the lanes that request it; units are counted from the array's start."""
        readers: dict[int, list[int]] = defaultdict(list)
        for lane, (address, size) in sorted(self.lanes.items()):
            for unit in range(address // self.unit, (address + size) // self.unit):
                readers[unit].append(lane)
        return readers

    @property
    def bytes_asked(self) -> int:
        """Requested bytes; a byte that several lanes read counts once."""
        return self.unit * len(self._readers)

    @property
    def bytes_moved(self) -> int:
        """Whole sectors, each once."""
        return SECTOR * len(self.sectors)

    # --- words ---

    def summary(self) -> str:
        """Bytes requested and bytes moved."""
        share = percent(self.bytes_asked / self.bytes_moved)
        return (
            f"{plural(len(self.lanes), 'lane')} × {self._sizes()} ask for {self.bytes_asked:,} different bytes; "
            f"{plural(len(self.sectors), 'sector')} × {SECTOR} = {self.bytes_moved:,} bytes move; efficiency {share}"
        )

    def distance(self) -> str:
        """How far apart the lanes read."""
        addresses = [address for _, (address, _) in sorted(self.lanes.items())]
        steps = Counter(after - before for before, after in pairwise(addresses)).most_common()
        if not steps:
            return "one lane reads"
        if steps == [(0, len(addresses) - 1)]:
            return "all lanes read the same address"
        return f"from lane to lane {'mostly ' if len(steps) > 1 else ''}{steps[0][0]:,} bytes"

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}{self.distance()}; {self.summary()}"

    def _sizes(self) -> str:
        sizes = sorted({size for _, size in self.lanes.values()})
        return " or ".join(f"{size:,}" for size in sizes) + " bytes"

    # --- text ---

    def text(self) -> str:
        lines = self._lines()
        more = [f"… and {plural(len(lines) - MOST_LINES, 'line')} more like these"] if len(lines) > MOST_LINES else []
        kept = lines[:MOST_LINES] if more else lines
        key = f"[ ] a sector of {SECTOR} bytes, {self.unit} an entry: the lane that reads it, + several, . in vain"
        return "\n".join([*kept, *more, key, self.distance(), self.summary()])

    def _lines(self) -> list[str]:
        """The sectors in order of address; neighbours share a line if there is room."""
        per_line = max(1, MOST_ENTRIES * self.unit // SECTOR)
        rows: list[list[int]] = []
        for sector in self.sectors:
            if rows and sector == rows[-1][-1] + 1 and len(rows[-1]) < per_line:
                rows[-1].append(sector)
            else:
                rows.append([sector])
        width = len(f"{SECTOR * self.sectors[-1]:,}")
        return [
            f"byte {pad(f'{SECTOR * row[0]:,}', width, right=True)}  {' '.join(map(self._entries, row))}"
            for row in rows
        ]

    def _entries(self, sector: int) -> str:
        units = range(sector * SECTOR // self.unit, (sector + 1) * SECTOR // self.unit)
        return "[" + " ".join(f"{self._entry(unit):>2}" for unit in units) + "]"

    def _entry(self, unit: int) -> str:
        lanes = self._readers.get(unit, ())
        return str(lanes[0]) if len(lanes) == 1 else "+" if lanes else "."

    # --- figure ---

    def _size(self) -> tuple[float, float]:
        return MAX_WIDTH, self._height() + 0.51

    def _height(self) -> float:
        """Inches of lanes, arrows and sectors."""
        return LANE + BETWEEN + MEMORY + 0.24 + (ENLARGED + MEMORY) * self._enlarges()

    def _enlarges(self) -> bool:
        """Whether the requested bytes would be too narrow to read."""
        return self.unit * WIDTH / self._x_end() < WIDE and self.unit < SECTOR

    def _x_end(self) -> float:
        return self._left(self.sectors[-1]) + SECTOR

    def _left(self, sector: int) -> int:
        """Where a sector is drawn, in bytes, gaps included."""
        before = self.sectors[: self.sectors.index(sector) + 1]
        jumps = sum(after > first + 1 for first, after in pairwise(before))
        return SECTOR * (len(before) - 1) + GAP * jumps

    def _x(self, address: int) -> int:
        """Where a byte of a sector is drawn."""
        return self._left(address // SECTOR) + address % SECTOR

    def _draw(self, axes, step: int | None = None) -> None:
        if axes.get_autoscalex_on():
            axes.set_xlim(0, self._x_end())
        axes.set_ylim(self._height(), 0)
        axes.axis("off")
        lane_width = axes.get_xlim()[1] / WARP
        for lane in range(WARP):
            state = READER if lane in self.lanes else RESTING
            add_box(axes, lane * lane_width, 0, lane_width, LANE, state, edgecolor=BLACK, linewidth=0.8, clip_on=False)
            self._write(axes, (lane + 0.5) * lane_width, LANE / 2, str(lane), color=state.ink)
        for lane, (address, size) in self.lanes.items():
            self._draw_arrow(axes, (lane + 0.5) * lane_width, address, size)
        for sector in self.sectors:
            self._draw_sector(axes, sector)
        if self._enlarges():
            self._draw_enlarged(axes)
        words = f"{self.distance()}\n{self.summary()}"
        axes.annotate(
            words, (0, 0), (0, -2), xycoords="axes fraction", textcoords="offset points", va="top", size=SMALL_SIZE,
            annotation_clip=False,
        )  # fmt: skip
        legend = [replace(state, letter="") for state in (ASKED, UNASKED)]  # the boxes contain lane numbers
        add_legend(axes, legend, y=34, extra="thin frame: a sector of 32 bytes; neighbours in memory touch")

    def _draw_arrow(self, axes, x: float, address: int, size: int) -> None:
        middle = (self._x(address) + self._x(address + size - 1) + 1) / 2
        (line,) = axes.plot([x, middle], [LANE, LANE + BETWEEN], color=ASKED.color, linewidth=0.7)
        line.set_gid("reads")

    def _draw_sector(self, axes, sector: int) -> None:
        top, left = LANE + BETWEEN, self._left(sector)
        add_box(axes, left, top, SECTOR, MEMORY, UNASKED, linewidth=0).set_gid("moved")
        scale = WIDTH / axes.get_xlim()[1]
        for unit in range(sector * SECTOR // self.unit, (sector + 1) * SECTOR // self.unit):
            if unit in self._readers:
                x = left + unit * self.unit % SECTOR
                edge = {"linewidth": 0.6 if self.unit * scale > 0.04 else 0, "edgecolor": WHITE}
                add_box(axes, x, top, self.unit, MEMORY, ASKED, **edge).set_gid("asked")
                if self.unit * scale >= WIDE:
                    self._write(axes, x + self.unit / 2, top + MEMORY / 2, self._entry(unit), color=WHITE)
        frame = {"facecolor": "none", "hatch": "", "edgecolor": BLACK, "linewidth": 0.9, "clip_on": False}
        add_box(axes, left, top, SECTOR, MEMORY, ASKED, **frame)
        fits = (SECTOR + GAP) * scale > NUMBER * len(f"{SECTOR * sector:,}")
        if sector == self.sectors[0] or (sector - 1 not in self.sectors and fits):
            self._write(axes, left, top + MEMORY + 0.11, f"{SECTOR * sector:,}", color=GREY, ha="left")

    def _draw_enlarged(self, axes) -> None:
        """Draw the first sector again, entry by entry, with the lane that reads each."""
        first, bottom = self.sectors[0], LANE + BETWEEN + MEMORY
        top, entry = bottom + ENLARGED, 0.24 * axes.get_xlim()[1] / WIDTH
        units = range(first * SECTOR // self.unit, (first + 1) * SECTOR // self.unit)
        for corner, end in ((0, 0), (SECTOR, len(units) * entry)):
            axes.plot([corner, end], [bottom, top], color=GREY, linewidth=0.7, linestyle=":")
        for index, unit in enumerate(units):
            state = ASKED if unit in self._readers else UNASKED
            add_box(axes, index * entry, top, entry, MEMORY, state, linewidth=0.6, edgecolor=state.ink)
            if unit in self._readers:
                self._write(axes, (index + 0.5) * entry, top + MEMORY / 2, self._entry(unit), color=WHITE)
        asked = self.unit * sum(unit in self._readers for unit in units)
        words = f"the first sector, enlarged: {asked} of {SECTOR} bytes are asked for"
        self._write(axes, (len(units) + 0.5) * entry, top + MEMORY / 2, words, ha="left")

    def _write(self, axes, x: float, y: float, label: str, **style) -> None:
        words = {"ha": "center", "va": "center", "size": SMALL_SIZE, **style}
        axes.text(x, y, label, **words).set_in_layout(False)


def _sectors(address: int, size: int) -> range:
    """The sectors that bytes lie in."""
    return range(address // SECTOR, (address + size - 1) // SECTOR + 1)
