"""A picture per step: all steps in the stepper, and in a static picture the few in which something changes."""

from abc import abstractmethod
from collections.abc import Sequence

from minillm.trace import Trace
from minillm.viz.base import Panels, Picture, PictureError, noted, titled

MOST_FRAMES = 6  # of the static picture


class StepStrip(Picture):
    """Frames of single steps side by side; each subclass defines a frame.

    `looks` has a value per step, and may have one more for the state after the last. A step whose value differs from
    the one before is chosen, up to six; `steps` names others. Raises PictureError for a trace without steps, and for a
    step that is not in it.
    """

    def __init__(self, trace: Trace, looks: Sequence[object], steps: Sequence[int] | None, title: str | None):
        if not trace.steps:
            raise PictureError("the trace has no steps, so there is nothing to draw")
        self.trace = trace
        self.title = titled(title, trace.dropped)
        self.num_steps = len(looks)
        changes = [index for index, look in enumerate(looks) if index == 0 or look != looks[index - 1]]
        self.chosen = tuple(changes[:MOST_FRAMES] if steps is None else steps)
        for step in self.chosen:
            self._check_step(step)

    @abstractmethod
    def frame(self, step: int, *, alone: bool) -> Picture:
        """The picture of one step; `alone`: large, and the same size for all steps."""

    def strip(self) -> Panels:
        """The chosen steps side by side."""
        return Panels([self.frame(step, alone=False) for step in self.chosen], title=self.title)

    def text(self) -> str:
        return noted(self.strip().text(), self.trace.dropped)

    def alt(self) -> str:
        return f"{self.title + ': ' if self.title else ''}" + "; ".join(map(self.caption, self.chosen))

    def figure(self, step: int | None = None):
        """The chosen steps side by side, or step `step` alone. Raises PictureError for a step out of range."""
        self._check_step(step)
        return (self.strip() if step is None else self.frame(step, alone=True)).figure()

    def _size(self) -> tuple[float, float]:
        return self.strip()._size()

    def _draw(self, axes, step: int | None = None) -> None:
        raise NotImplementedError("a strip is drawn by its frames")
