"""Many small kernels: launched one by one, where the host may be too slow for the device, or all at once as a graph."""

from collections.abc import Sequence

from minillm.viz.base import Panels, PictureError, number, plural
from minillm.viz.lanes import DEVICE, HOST, LaneChart, Span, seconds_in_words
from minillm.viz.palette import BLACK, LIGHT_GREY, PART_COLORS, State, ink_on

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LAUNCHES = State("L", "launches", LIGHT_GREY, BLACK)
MOST_NAMES = 6  # kernels with a letter and a colour of their own
GAP_SECONDS = 1e-6  # from the end of one kernel to the begin of the next: the order of magnitude on today's cards


class LaunchOverhead(Panels):
    """Above, each of the kernels is launched by the host; below, one launch starts them all as a CUDA graph.

    `kernels`: (name, seconds on the device) in order, measured or assumed. `launch_seconds`: what the host needs for
    one launch; the device begins a kernel when it has been launched, and `gap_seconds` after the one before has ended.
    `graph_seconds`: what the host needs to launch the graph. Raises PictureError without kernels, or for a time below
    0.
    """

    def __init__(
        self,
        kernels: Sequence[tuple[str, float]],
        *,
        launch_seconds: float,
        graph_seconds: float,
        gap_seconds: float = GAP_SECONDS,
        title: str | None = None,
    ):
        times = [seconds for _, seconds in kernels]
        if not times or min(*times, launch_seconds, graph_seconds, gap_seconds) < 0 or not sum(times):
            raise PictureError(
                f"kernels of {times} seconds, launches of {launch_seconds} and {graph_seconds}, gaps of {gap_seconds}: "
                "give at least one kernel that takes time, and no time below 0"
            )
        self.kernels = list(kernels)
        self.states = kernel_states([name for name, _ in kernels])
        eager = self._one_by_one(launch_seconds, gap_seconds)
        graph = self._as_graph(graph_seconds, gap_seconds)
        super().__init__([eager, graph], columns=1, share_x=True, title=title)

    def _one_by_one(self, launch_seconds: float, gap_seconds: float) -> LaneChart:
        host, device, free = [], [], 0.0
        for index, (name, seconds) in enumerate(self.kernels):
            host.append(Span(index * launch_seconds, (index + 1) * launch_seconds, LAUNCHES, self.states[name].letter))
            begin = max(host[-1].end, free)
            device.append(Span(begin, begin + seconds, self.states[name]))
            free = begin + seconds + gap_seconds
        title = f"launched one by one: {len(host):,} launch{'es' if len(host) > 1 else ''}"
        return LaneChart({HOST: host, DEVICE: device}, title=title)

    def _as_graph(self, graph_seconds: float, gap_seconds: float) -> LaneChart:
        device, begin = [], graph_seconds
        for name, seconds in self.kernels:
            device.append(Span(begin, begin + seconds, self.states[name]))
            begin += seconds + gap_seconds
        host = [Span(0.0, graph_seconds, LAUNCHES, "graph")]
        return LaneChart({HOST: host, DEVICE: device}, title="launched as a CUDA graph: 1 launch")

    def summary(self) -> str:
        """Both times, and what the kernels take alone."""
        eager, graph = (picture.end for picture in self.pictures)
        alone = sum(seconds for _, seconds in self.kernels)
        return (
            f"{plural(len(self.kernels), 'kernel')}, {seconds_in_words(alone)} of work: one by one "
            f"{seconds_in_words(eager)}, as a graph {seconds_in_words(graph)}: {number(eager / graph)} times as fast"
        )

    def text(self) -> str:
        return f"{super().text()}\n\n{self.summary()}"

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}{self.summary()}"


def kernel_states(names: Sequence[str]) -> dict[str, State]:
    """A letter and a colour for each name, in order of appearance; from the sixth on they share one."""
    distinct = list(dict.fromkeys(names))
    own = distinct if len(distinct) <= MOST_NAMES else [*distinct[: MOST_NAMES - 1], "others"]
    looks = zip(own, LETTERS, PART_COLORS, strict=False)
    states = {name: State(letter, name, color, ink_on(color)) for name, letter, color in looks}
    return {name: states.get(name) or states["others"] for name in distinct}
