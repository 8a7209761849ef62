"""Tiles and splits of paged decode: which program of the Triton kernel reads which keys, in which blocks.

The schedule follows `_decode_kernel` of kernels/triton_kernels.py, written again in plain Python so that the
picture needs no Triton. A test compares the keys that each program of the kernel reads.
"""

from collections.abc import Sequence
from dataclasses import replace

from minillm.viz.base import (
    MAX_WIDTH,
    SMALL_SIZE,
    Picture,
    PictureError,
    add_box,
    add_legend,
    add_letter,
    pad,
    plural,
    text_table,
)
from minillm.viz.palette import BLACK, GREY, NOT_LOADED, PART_COLORS, State, ink_on

TILE_KEYS = 64  # of the kernel

SIGNS = "0123456789abcdefghijklmnopqrstuvwxyz"  # of the splits
MOST_SPLITS = len(SIGNS)
MOST_TILES = 128  # of keys, in one row
MOST_ROWS = 16  # requests or programs drawn
MOST_SIGNS = 96  # in a line of text
ROW, HEIGHT, TABLE = 0.62, 0.26, 0.2  # inches: from request to request, a tile's height, the blocks below it
NAME, NOTE = 0.62, 1.75  # inches: room left and right of the keys
WIDE = 0.13  # inches a box needs for its letter
NUMBER = 0.085  # inches that a digit takes


def decode_tiles(length: int, num_splits: int, tile_keys: int = TILE_KEYS, window: int | None = None) -> list[range]:
    """For each split of a request with `length` keys, the tiles of keys it reads; tile t begins at t * tile_keys.

    Tiles with a visible key are divided evenly among the splits; the last splits may get none.
    """
    first = max(0, length - window) // tile_keys if window else 0
    end = -(-length // tile_keys)
    share = -(-(end - first) // num_splits)
    begins = [min(first + split * share, end) for split in range(num_splits)]
    return [range(begin, min(begin + share, end)) for begin in begins]


class DecodeTiles(Picture):
    """The programs of the split-KV decode kernel, one per request, KV head and split, over the keys they read.

    `lengths`: keys of each request, 0 for a padding row. `tables`: each request's block table; the numbers of its
    physical blocks are then written below the tiles. Only the last `window` keys are seen. Raises PictureError for
    lengths below 0, more than 16 requests or 128 tiles, or a table too short for its request.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        num_splits: int,
        *,
        block_size: int,
        tables: Sequence[Sequence[int]] | None = None,
        window: int | None = None,
        num_kv_heads: int = 1,
        tile_keys: int = TILE_KEYS,
        title: str | None = None,
    ):
        self.lengths, self.num_splits, self.block_size = [int(length) for length in lengths], num_splits, block_size
        self.window, self.num_kv_heads, self.tile_keys, self.title = window, num_kv_heads, tile_keys, title
        self._check(tables)
        self.tables = [[int(block) for block in table] for table in tables] if tables is not None else None
        self.splits = [decode_tiles(length, num_splits, tile_keys, window) for length in self.lengths]
        self.num_tiles = max(1, -(-max(self.lengths) // tile_keys))

    def _check(self, tables: Sequence[Sequence[int]] | None) -> None:
        if not 1 <= len(self.lengths) <= MOST_ROWS or min(self.lengths) < 0:
            raise PictureError(f"lengths {self.lengths}: give 1 to {MOST_ROWS} requests with 0 keys or more each")
        if max(self.lengths) > MOST_TILES * self.tile_keys:
            most = MOST_TILES * self.tile_keys
            raise PictureError(f"{max(self.lengths):,} keys are more than can be drawn tile by tile ({most:,})")
        if not 1 <= self.num_splits <= MOST_SPLITS:
            raise PictureError(f"num_splits is {self.num_splits}; draw 1 to {MOST_SPLITS}")
        if self.window is not None and self.window < 1:
            raise PictureError(f"window is {self.window}; pass 1 key or more, or None for all")
        needed = [-(-length // self.block_size) for length in self.lengths]
        short = tables is not None and any(len(table) < count for table, count in zip(tables, needed, strict=False))
        if short or (tables is not None and len(tables) != len(needed)):
            raise PictureError(f"give one table per request; they need {needed} blocks of {self.block_size}")

    # --- words ---

    def keys(self, request: int, tile: int) -> range:
        """The keys of a tile that are loaded: those within the window, and before the end."""
        length, first = self.lengths[request], tile * self.tile_keys
        start = max(0, length - self.window) if self.window else 0
        return range(max(first, start), min(first + self.tile_keys, length))

    def split_keys(self, request: int, split: int) -> range:
        """The keys that one program reads; an empty range if it has none."""
        tiles = self.splits[request][split]
        return range(self.keys(request, tiles[0])[0], self.keys(request, tiles[-1])[-1] + 1) if tiles else range(0)

    def blocks(self, request: int, split: int) -> list[int]:
        """The table entries (from 0), or with `tables` the physical blocks, that one program reads from."""
        keys = self.split_keys(request, split)
        if not keys:
            return []
        entries = range(keys[0] // self.block_size, keys[-1] // self.block_size + 1)
        return [self.tables[request][entry] for entry in entries] if self.tables else list(entries)

    def summary(self) -> str:
        """The grid, and the length of its longest program."""
        shares = [len(tiles) for splits in self.splits for tiles in splits]
        total, idle = len(shares) * self.num_kv_heads, shares.count(0) * self.num_kv_heads
        grid = f"{plural(len(self.lengths), 'request')} × {plural(self.num_kv_heads, 'KV head')} × "
        whole = max(sum(map(len, splits)) for splits in self.splits)
        return (
            f"{grid}{plural(self.num_splits, 'split')} = {plural(total, 'program')}, {idle:,} without a key; the "
            f"longest takes {plural(max(shares), 'tile')} of {self.tile_keys} keys (unsplit: {whole})"
        )

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}tiles and splits of decode: {self.summary()}"

    def _note(self, request: int) -> str:
        length = self.lengths[request]
        if length == 0:
            return "padding: zeros, no load"
        idle = [split for split, tiles in enumerate(self.splits[request]) if not tiles]  # always the last ones
        rest = (
            f"\nnothing for {'split' if len(idle) == 1 else 'splits'} {span(range(idle[0], idle[-1] + 1))}"
            if idle
            else ""
        )
        return f"{plural(length, 'key')}, {plural(sum(map(len, self.splits[request])), 'tile')}{rest}"

    # --- text ---

    def text(self) -> str:
        rows = [
            [
                f"req {request}",
                str(split),
                span(tiles),
                span(self.split_keys(request, split)),
                " ".join(map(str, self.blocks(request, split))),
            ]
            for request, splits in enumerate(self.splits)
            for split, tiles in enumerate(splits)
            if tiles
        ]
        blocks = "physical blocks" if self.tables else "table entries"
        table = text_table(["", "split", "tiles", "keys", blocks], rows)
        return "\n".join([*self._chart(), self.summary(), "", table] if rows else [*self._chart(), self.summary()])

    def _chart(self) -> list[str]:
        """A line per request: the sign of the split that reads there, several signs per tile if there is room."""
        per_tile = 4 if 5 * self.num_tiles <= MOST_SIGNS and self.tile_keys % 4 == 0 else 1
        step = self.tile_keys // per_tile
        width = len(f"req {len(self.lengths) - 1}")
        lines = []
        for request in range(len(self.lengths)):
            signs = [self._sign(request, key, step) for key in range(0, self.num_tiles * self.tile_keys, step)]
            tiles = ["".join(signs[i : i + per_tile]) for i in range(0, len(signs), per_tile)]
            joint = "|" if per_tile > 1 else ""
            lines.append(
                f"{pad(f'req {request}', width)} |{joint.join(tiles)}|  {self._note(request)}".replace("\n", "; ")
            )
        bars = "; | ends a tile" if per_tile > 1 else ""
        return [*lines, f"a sign is {plural(step, 'key')}: the split that reads it, . not loaded{bars}"]

    def _sign(self, request: int, key: int, count: int) -> str:
        for split in range(self.num_splits):
            keys = self.split_keys(request, split)
            if keys and keys[0] < key + count and key <= keys[-1]:
                return SIGNS[split]
        return NOT_LOADED.letter

    # --- figure ---

    def _size(self) -> tuple[float, float]:
        return MAX_WIDTH, self._row() * len(self.lengths) + 1.25

    def _row(self) -> float:
        return ROW if self._named() else ROW - TABLE

    def _scale(self) -> float:
        """Inches per key."""
        return (MAX_WIDTH - NAME - NOTE - 0.3) / (self.num_tiles * self.tile_keys)

    def _named(self) -> bool:
        """Whether blocks are wide enough for their physical numbers."""
        digits = max((len(str(block)) for table in self.tables or () for block in table), default=9)
        return self.block_size * self._scale() > NUMBER * digits + 0.04

    def _draw(self, axes, step: int | None = None) -> None:
        scale = self._scale()
        axes.set(xlim=(-NAME / scale, (self.num_tiles * self.tile_keys) + NOTE / scale))
        axes.set_ylim(self._row() * len(self.lengths) - 0.1, -0.32)
        axes.axis("off")
        for tile in range(self.num_tiles + 1):
            if tile % max(1, -(-self.num_tiles // 8)) == 0:
                self._write(axes, tile * self.tile_keys, -0.16, str(tile * self.tile_keys), color=GREY, ha="center")
        self._write(axes, -NAME / scale, -0.16, "key", color=GREY)
        for request in range(len(self.lengths)):
            self._draw_request(axes, request, request * self._row())
        axes.annotate(
            self.summary(), (0, 0), (0, -4), xycoords="axes fraction", textcoords="offset points", va="top",
            size=SMALL_SIZE, annotation_clip=False,
        )  # fmt: skip
        legend = [*self._states()[:6], replace(NOT_LOADED, letter="")]
        add_legend(axes, legend, y=24, extra="thick line: end of a tile")

    def _states(self) -> list[State]:
        return [
            State(SIGNS[split], f"split {split}", color, ink_on(color))
            for split in range(self.num_splits)
            for color in [PART_COLORS[split % len(PART_COLORS)]]
        ]

    def _draw_request(self, axes, request: int, top: float) -> None:
        self._write(axes, -NAME / self._scale(), top + HEIGHT / 2, f"req {request}", fontweight="bold")
        for split, (tiles, state) in enumerate(zip(self.splits[request], self._states(), strict=True)):
            for tile in tiles:
                self._draw_tile(axes, request, tile, top, state)
            own = [self.split_keys(request, split)]
            if min((len(self.keys(request, tile)) for tile in tiles), default=0) * self._scale() >= WIDE:
                own = [self.keys(request, tile) for tile in tiles]
            for keys in own:
                if len(keys) * self._scale() >= WIDE:
                    add_letter(axes, (keys[0] + keys[-1] + 1) / 2, top + HEIGHT / 2, state)
        if self._named():
            self._draw_blocks(axes, request, top + HEIGHT)
        self._write(axes, self.num_tiles * self.tile_keys + 0.1 / self._scale(), top + HEIGHT / 2, self._note(request))

    def _draw_tile(self, axes, request: int, tile: int, top: float, state: State) -> None:
        first, keys = tile * self.tile_keys, self.keys(request, tile)
        if len(keys) < self.tile_keys:
            add_box(axes, first, top, self.tile_keys, HEIGHT, NOT_LOADED, linewidth=0)
        add_box(axes, keys[0], top, len(keys), HEIGHT, state, linewidth=0).set_gid(f"{request}:{state.letter}")
        frame = {"facecolor": "none", "hatch": "", "edgecolor": BLACK, "linewidth": 1.2}
        add_box(axes, first, top, self.tile_keys, HEIGHT, NOT_LOADED, **frame)

    def _draw_blocks(self, axes, request: int, top: float) -> None:
        """The physical block below each block's keys."""
        start = max(0, self.lengths[request] - self.window) if self.window else 0
        for entry in range(-(-self.lengths[request] // self.block_size)):
            x, is_read = entry * self.block_size, (entry + 1) * self.block_size > start
            outline = {"hatch": "", "edgecolor": GREY, "linestyle": "-" if is_read else ":"}
            add_box(axes, x, top, self.block_size, TABLE, NOT_LOADED, **outline)
            number = str(self.tables[request][entry])
            color = BLACK if is_read else GREY
            self._write(axes, x + self.block_size / 2, top + TABLE / 2, number, ha="center", color=color)

    def _write(self, axes, x: float, y: float, label: str, **style) -> None:
        words = {"ha": "left", "va": "center", "size": SMALL_SIZE, **style}
        axes.text(x, y, label, **words).set_in_layout(False)


def span(numbers: range) -> str:
    """A range in words: "64–127"; for a single number, the number."""
    return f"{numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
