"""Which replica got which request, and where a beginning had to be computed once more."""

from collections.abc import Hashable, Sequence

from minillm.viz.base import SMALL_SIZE, Picture, PictureError, literal, pad, plural
from minillm.viz.palette import BLACK, GREY, OWNER_COLORS

CELL = 0.2  # inches


class Routes(Picture):
    """A row for each replica, and in it a letter for each request that it got, in order: the beginning of its prompt.

    `routed` has a pair (replica, letter) for each request. Where a replica gets a beginning for the first time it
    computes it: there the cell has a frame, and the letter is large in the text; later ones find it in the cache.
    Raises PictureError without requests, or for a replica that is not in 0 .. `num_replicas` - 1.
    """

    def __init__(self, routed: Sequence[tuple[int, str]], num_replicas: int, *, title: str | None = None):
        if not routed:
            raise PictureError("nothing to draw: give at least one request")
        if unknown := [replica for replica, _ in routed if replica not in range(num_replicas)]:
            raise PictureError(f"replica {unknown[0]!r}; there are {num_replicas}, from 0 on")
        self.rows: list[list[tuple[str, bool]]] = [[] for _ in range(num_replicas)]
        seen: set[Hashable] = set()
        for replica, letter in routed:
            self.rows[replica].append((letter, (replica, letter) not in seen))
            seen.add((replica, letter))
        self.letters = sorted({letter for _, letter in routed})
        self.num_computed, self.num_requests, self.title = len(seen), len(routed), title

    def text(self) -> str:
        lines = []
        for replica, row in enumerate(self.rows):
            letters = "".join(letter.upper() if is_new else letter.lower() for letter, is_new in row)
            lines.append(f"replica {replica} |{letters}|")
        width = max(map(len, lines))
        counts = [plural(sum(is_new for _, is_new in row), "beginning") + " computed" for row in self.rows]
        return "\n".join(f"{pad(line, width)}  {count}" for line, count in zip(lines, counts, strict=True))

    def alt(self) -> str:
        counts = ", ".join(str(len({letter for letter, _ in row})) for row in self.rows)
        return (
            f"{self.title + ': ' if self.title else ''}{plural(self.num_requests, 'request')} with "
            f"{plural(len(self.letters), 'beginning')} on {plural(len(self.rows), 'replica')}; these hold {counts} of "
            f"them, so {self.num_computed} times a beginning was computed"
        )

    def _columns(self) -> int:
        return max(map(len, self.rows))

    def _size(self) -> tuple[float, float]:
        return 0.9 + CELL * self._columns(), (CELL + 0.1) * len(self.rows) + 0.15

    def _title_width(self) -> float:
        return 6

    def _draw(self, axes, step: int | None = None) -> None:
        from matplotlib.patches import Rectangle

        height = CELL + 0.1
        axes.set(xlim=(-0.02, CELL * self._columns() + 0.02), ylim=(height * len(self.rows), -0.05))
        axes.set_aspect("equal")
        axes.spines[:].set_visible(False)
        axes.set_xticks([])
        axes.set_yticks([height * number + CELL / 2 for number in range(len(self.rows))])
        axes.set_yticklabels([f"replica {number}" for number in range(len(self.rows))])
        axes.tick_params(axis="y", length=0)
        for number, row in enumerate(self.rows):
            for place, (letter, is_new) in enumerate(row):
                color = OWNER_COLORS[self.letters.index(letter) % len(OWNER_COLORS)]
                edge = {"edgecolor": BLACK, "linewidth": 1.8, "zorder": 3} if is_new else {"edgecolor": GREY, "lw": 0.4}
                axes.add_patch(Rectangle((place * CELL, number * height), CELL, CELL, facecolor=color, **edge))
                axes.annotate(
                    literal(letter), ((place + 0.5) * CELL, number * height + CELL / 2), ha="center", va="center",
                    size=SMALL_SIZE, weight="bold" if is_new else "normal", zorder=4,
                )  # fmt: skip
