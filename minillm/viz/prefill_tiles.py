"""Tiles of paged prefill: the keys that a program of the Triton kernel loads for its queries, and the tiles it skips.

The schedule follows `_prefill_kernel` of kernels/triton_kernels.py, written again in plain Python so that the
picture needs no Triton. A test compares the keys that each program of the kernel reads.
"""

from typing import NamedTuple

from minillm.viz.base import SMALL_SIZE, Picture, PictureError, add_box, add_legend, pad, plural
from minillm.viz.decode_tiles import span
from minillm.viz.palette import BLACK, GREY, MASKED, NOT_LOADED, SEEN, State

TILE_ROWS, TILE_KEYS = 64, 64  # of the kernel in 16 bits; in float32 they are half as large
MOST_PROGRAMS, MOST_TILES = 24, 128  # drawn


class QueryTile(NamedTuple):
    """One program of the prefill kernel: consecutive queries of one request, in one KV head."""

    first_query: int  # among the request's new tokens
    end_query: int
    tiles: range  # of keys that it loads
    edge: int  # from this tile on, keys are masked; earlier keys are visible to all its queries


def prefill_tiles(
    length: int, num_queries: int, tile_queries: int, tile_keys: int = TILE_KEYS, window: int | None = None
) -> list[QueryTile]:
    """The programs of a request (in one KV head) whose last `num_queries` of `length` tokens are new."""
    found = []
    for first in range(0, num_queries, tile_queries):
        position = length - num_queries + first  # of the tile's first query
        end = max(0, min(position + tile_queries, length))  # keys from here on come after all its queries
        begin = max(position - window + 1, 0) // tile_keys if window else 0
        edge = begin if window else max(position + 1, 0) // tile_keys
        found.append(QueryTile(first, min(first + tile_queries, num_queries), range(begin, -(-end // tile_keys)), edge))
    return found


class PrefillTiles(Picture):
    """The programs of the prefill kernel for one request and KV head: tiles of queries against tiles of keys.

    The last `num_queries` of `length` tokens are new; the tokens before them are the cached prefix. A tile that only
    some of its queries may see whole is masked, a tile that none may see is not loaded. `group` query heads share a
    tile's `tile_rows` rows. Raises PictureError if no token is new, a tile holds no query, or there are more than 24
    programs or 128 tiles.
    """

    def __init__(
        self,
        length: int,
        num_queries: int,
        *,
        group: int = 1,
        window: int | None = None,
        tile_rows: int = TILE_ROWS,
        tile_keys: int = TILE_KEYS,
        title: str | None = None,
    ):
        if not 1 <= num_queries <= length or not 1 <= group <= tile_rows:
            raise PictureError(
                f"{num_queries} new of {length} tokens, {group} heads in {tile_rows} rows: there must be 1 new token "
                "or more, and no more than tokens; 1 head or more, and no more than rows"
            )
        if window is not None and window < 1:
            raise PictureError(f"window is {window}; pass 1 key or more, or None for all")
        self.length, self.num_queries, self.group, self.window = length, num_queries, group, window
        self.tile_queries, self.tile_keys, self.title = tile_rows // group, tile_keys, title
        self.num_tiles = -(-length // tile_keys)
        self.programs = prefill_tiles(length, num_queries, self.tile_queries, tile_keys, window)
        if len(self.programs) > MOST_PROGRAMS or self.num_tiles > MOST_TILES:
            raise PictureError(
                f"{len(self.programs)} programs over {self.num_tiles} tiles of keys; at most {MOST_PROGRAMS} and "
                f"{MOST_TILES} can be drawn: give fewer new tokens"
            )

    # --- words ---

    def state(self, program: QueryTile, tile: int) -> State:
        """What the program does with a tile of keys: use all of it, mask it, or not load it."""
        if tile not in program.tiles:
            return NOT_LOADED
        return SEEN if tile < program.edge else MASKED

    def loaded(self, program: QueryTile, tile: int) -> range:
        """The keys of a tile that the program loads: in a masked tile, those that some of its queries may see."""
        first, before = tile * self.tile_keys, self.length - self.num_queries
        keys = range(first, first + self.tile_keys)
        if self.state(program, tile) is not MASKED:
            return keys if tile in program.tiles else range(0)
        start = max(0, before + program.first_query - self.window + 1) if self.window else 0
        return range(max(first, start), min(keys.stop, before + program.end_query))

    def num_seen(self) -> int:
        """Query-key pairs that may look at each other, in one head."""
        reach = self.window or self.length
        return sum(min(position + 1, reach) for position in range(self.length - self.num_queries, self.length))

    def summary(self) -> str:
        """Tiles by kind, and the share of the computed pairs that the mask allows."""
        states = [self.state(program, tile) for program in self.programs for tile in range(self.num_tiles)]
        counts = {state.letter: states.count(state) for state in (SEEN, MASKED, NOT_LOADED)}
        loaded = counts[SEEN.letter] + counts[MASKED.letter]
        computed = sum(len(each.tiles) * (each.end_query - each.first_query) * self.tile_keys for each in self.programs)
        return (
            f"{plural(len(self.programs), 'program')} per KV head, {self.tile_queries} queries × "
            f"{plural(self.group, 'head')} each: {plural(loaded, 'tile')} of {self.tile_keys} keys loaded "
            f"({counts[MASKED.letter]} masked), {counts[NOT_LOADED.letter]} never; "
            f"{self.num_seen() / computed:.0%} of the computed pairs are seen"
        )

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}tiles of prefill: {self.summary()}"

    def _queries(self, program: QueryTile) -> str:
        """The positions of a program's queries in the request."""
        before = self.length - self.num_queries
        return span(range(before + program.first_query, before + program.end_query))

    # --- text ---

    def text(self) -> str:
        names = [f"queries {self._queries(program)}" for program in self.programs]
        width = max(map(len, names))
        lines = [
            f"{pad(name, width)} |{''.join(self.state(program, tile).letter for tile in range(self.num_tiles))}|"
            for name, program in zip(names, self.programs, strict=True)
        ]
        signs = f"{SEEN.letter} taken whole   {MASKED.letter} masked   {NOT_LOADED.letter} not loaded"
        return "\n".join([*lines, f"a sign is a tile of {self.tile_keys} keys:   {signs}", self.summary()])

    # --- figure ---

    def _height(self) -> float:
        """Inches of all query tiles: to the scale of the keys unless that is too flat or too tall."""
        true = self.num_queries * self._width() / (self.num_tiles * self.tile_keys)
        return min(max(true, 0.3 * len(self.programs)), 4.5)

    def _width(self) -> float:
        return min(6.6, 0.9 * self.num_tiles)

    def _size(self) -> tuple[float, float]:
        return max(7.9, self._width() + 1.4), self._height() + 1.5

    def _title_width(self) -> float:
        return 6.4

    def _draw(self, axes, step: int | None = None) -> None:
        before, width = self.length - self.num_queries, self.num_tiles * self.tile_keys
        inch = width / self._width()
        axes.set(xlim=(0, width * max(1, 6.5 / self._width())), ylim=(self.length, before))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        every = max(1, round(0.6 * inch / self.tile_keys))
        axes.set_xticks([tile * self.tile_keys for tile in range(0, self.num_tiles + 1, every)])
        axes.set_yticks([before + (each.first_query + each.end_query) / 2 for each in self.programs],
                        [self._queries(each) for each in self.programs])  # fmt: skip
        axes.set_ylabel("queries of a program")
        axes.set_xlabel("key" if not before else f"key (the first {before} are cached)", loc="left")
        for program in self.programs:
            self._draw_program(axes, program, before)
        axes.annotate(
            _two_lines(self.summary()), (0, 0), (0, -4), xycoords="axes fraction", textcoords="offset points",
            va="top", size=SMALL_SIZE, annotation_clip=False,
        )  # fmt: skip
        add_legend(axes, [SEEN, MASKED, NOT_LOADED], y=38, extra="thick frame: the tiles that a program multiplies")

    def _draw_program(self, axes, program: QueryTile, before: int) -> None:
        top, height = before + program.first_query, program.end_query - program.first_query
        for tile in range(self.num_tiles):
            first, keys = tile * self.tile_keys, self.loaded(program, tile)
            if len(keys) < self.tile_keys:
                add_box(axes, first, top, self.tile_keys, height, NOT_LOADED, edgecolor=GREY)
            if keys:
                state = self.state(program, tile)
                add_box(axes, keys[0], top, len(keys), height, state, linewidth=0).set_gid(state.letter)
            if keys and state is MASKED:
                self._draw_seen(axes, program, keys, before)
            outline = {"facecolor": "none", "hatch": "", "edgecolor": GREY}
            add_box(axes, first, top, self.tile_keys, height, NOT_LOADED, **outline)
        frame = {"facecolor": "none", "hatch": "", "edgecolor": BLACK, "linewidth": 1.4, "clip_on": False}
        first, end = program.tiles[0] * self.tile_keys, (program.tiles[-1] + 1) * self.tile_keys
        add_box(axes, first, top, end - first, height, SEEN, **frame)

    def _draw_seen(self, axes, program: QueryTile, keys: range, before: int) -> None:
        """Draw, over a masked tile, the keys that its queries may see: a step per query."""
        positions = range(before + program.first_query, before + program.end_query)
        edges = [*positions, positions.stop]
        starts = [max(keys[0], position - self.window + 1) if self.window else keys[0] for position in positions]
        ends = [max(begin, min(keys.stop, query + 1)) for begin, query in zip(starts, positions, strict=True)]
        fill = {"facecolor": SEEN.color, "linewidth": 0, "step": "post"}
        axes.fill_betweenx(edges, [*starts, starts[-1]], [*ends, ends[-1]], **fill)


def _two_lines(words: str) -> str:
    """The words in two lines, broken at the comma or semicolon nearest the middle."""
    places = [place for place in range(len(words)) if words[place : place + 2] in (", ", "; ")]
    place = min(places, key=lambda place: abs(place - len(words) / 2))
    return f"{words[: place + 1]}\n{words[place + 2 :]}"
