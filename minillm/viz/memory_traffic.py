"""How much memory the versions of a kernel move, beside the bytes their threads request and the least possible."""

from collections.abc import Mapping

from minillm.viz.base import SMALL_SIZE, Picture, PictureError, decimal_bytes, literal, number, text_table
from minillm.viz.palette import BLACK, PART_COLORS, WHITE, ink_on

HATCHES = ("", "///", "...", "xxx", "\\\\\\")  # of the parts
LITTLE = 0.08  # share of a version's bytes; an array below it in all versions has no part of its own


class MemoryTraffic(Picture):
    """The traffic of several versions of a kernel: bytes requested, bytes moved, and each byte once.

    `versions`: name -> the emulator's Traffic. Both bars have a part for each array above 8 % in some version.
    Raises PictureError if there is no version, or one that moved nothing.
    """

    def __init__(self, versions: Mapping[str, object], *, title: str | None = None):
        self.versions = {name: traffic.loads() for name, traffic in versions.items()}
        if not versions or any(counts.bytes_moved < 1 for counts in self.versions.values()):
            raise PictureError(f"nothing to draw: every version must have moved something; got {list(versions)}")
        self.parts = _parts(versions)
        self.title = title

    def text(self) -> str:
        header = ["", "thread loads", "warp requests", "sectors/request", "asked", "moved", "efficiency", "each once"]
        whole = text_table([*header, "moved/once"], [self._cells(name) for name in self.versions])
        rows = [
            [name, *(" / ".join(map(decimal_bytes, counts[name])) for counts in self.parts.values())]
            for name in self.versions
        ]
        return f"{whole}\n\n{text_table(['asked / moved', *self.parts], rows)}"

    def _cells(self, name: str) -> list[str]:
        each = self.versions[name]
        asked, moved, once = map(decimal_bytes, (each.bytes_asked, each.bytes_moved, each.unique_bytes))
        loads = [f"{each.num_loads:,}", f"{each.requests:,}", number(each.sectors_per_request)]
        return [name, *loads, asked, moved, percent(each.efficiency), once, times_once(each)]

    def alt(self) -> str:
        moved = (f"{name} {decimal_bytes(each.bytes_moved)}" for name, each in self.versions.items())
        return f"{self.title + ': ' if self.title else ''}memory moved: {', '.join(moved)}"

    def _size(self) -> tuple[float, float]:
        return 7.0 + 0.09 * max(map(len, self.versions)), 0.62 * len(self.versions) + 0.95

    def _draw(self, axes, step: int | None = None) -> None:
        most = max(max(each.bytes_moved, each.bytes_asked) for each in self.versions.values())
        for row, (name, each) in enumerate(self.versions.items()):
            first = "" if row == 0 else "_"
            for side, of in ((-0.19, 0), (0.19, 1)):
                left = 0
                for index, (array, counts) in enumerate(self.parts.items()):
                    color = PART_COLORS[2 * index % len(PART_COLORS)]
                    look = {"facecolor": color, "edgecolor": ink_on(color), "hatch": HATCHES[index % len(HATCHES)]}
                    label = f"{first or '_' * of}{array}"
                    axes.barh(row + side, counts[name][of], 0.34, left, linewidth=0.4, label=label, **look)
                    left += counts[name][of]
            axes.plot(
                [each.unique_bytes] * 2, [row - 0.42, row + 0.42], color=BLACK, linewidth=2,
                label=f"{first}every byte once",
            )  # fmt: skip
            self._say(axes, row - 0.19, each.bytes_asked, f"asked for: {decimal_bytes(each.bytes_asked)}")
            share = f"{times_once(each)} every byte once; efficiency {percent(each.efficiency)}"
            moved = f"moved: {decimal_bytes(each.bytes_moved)}  ({share})"
            self._say(axes, row + 0.19, each.bytes_moved, moved)
        axes.set(xlim=(0, 1.9 * most), ylim=(len(self.versions) - 0.4, -0.6))
        axes.set_yticks(range(len(self.versions)), [literal(name) for name in self.versions])
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(lambda value, _: decimal_bytes(value))
        axes.xaxis.get_major_locator().set_params(nbins=4)
        axes.legend(
            loc="upper left", bbox_to_anchor=(0, -0.55 / (0.62 * len(self.versions))), ncols=len(self.parts) + 1,
            frameon=False, fontsize=SMALL_SIZE, borderaxespad=0, handlelength=1.6,
        )  # fmt: skip

    def _say(self, axes, row: float, end: float, words: str) -> None:
        behind = {"facecolor": WHITE, "edgecolor": "none", "pad": 0.6}
        axes.annotate(
            words, (end, row), (6, 0), textcoords="offset points", va="center", size=SMALL_SIZE, bbox=behind, zorder=3
        )


def _parts(versions: Mapping[str, object]) -> dict[str, dict[str, tuple[int, int]]]:
    """array -> version -> bytes requested and moved; arrays that are small in all versions are one part together."""
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    others = dict.fromkeys(versions, (0, 0))
    wholes = {name: traffic.loads().bytes_moved for name, traffic in versions.items()}
    for array in dict.fromkeys(array for traffic in versions.values() for array in traffic.names):
        loads = {name: traffic.loads(array) for name, traffic in versions.items() if array in traffic.names}
        counts = {
            name: (loads[name].bytes_asked, loads[name].bytes_moved) if name in loads else (0, 0) for name in versions
        }
        if any(moved > LITTLE * wholes[name] for name, (_, moved) in counts.items()):
            parts[array] = counts
        else:
            others = {name: tuple(map(sum, zip(others[name], counts[name], strict=True))) for name in versions}
    return parts | ({"others": others} if any(moved for _, moved in others.values()) else {})


def times_once(counts) -> str:
    """Bytes moved, relative to moving every byte once: "36×"."""
    return f"{number(counts.bytes_moved / counts.unique_bytes)}×"


def percent(share: float) -> str:
    """ "12.5%", "100%"."""
    return f"{share:.1%}".replace(".0%", "%")
