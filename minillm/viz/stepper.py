"""The one widget: a play button and a slider over the steps of a picture. Needs ipywidgets and matplotlib."""

import html

import ipywidgets

from minillm.viz.base import image_tag


class Stepper(ipywidgets.VBox):
    """Shows one frame of `picture` at a time: the figure at that step, and its caption.

    The slider takes the arrow keys. Each frame is drawn when it is first shown, and kept.
    """

    def __init__(self, picture, *, interval: int = 1000):
        last = picture.num_steps - 1
        self.picture = picture
        self.play = ipywidgets.Play(min=0, max=last, step=1, interval=interval, description="play the steps")
        self.slider = ipywidgets.IntSlider(
            min=0, max=last, step=1, description="step", continuous_update=True, readout=False
        )
        self.caption = ipywidgets.HTML()
        self.image = ipywidgets.HTML()
        self._frames: dict[int, str] = {}
        ipywidgets.jslink((self.play, "value"), (self.slider, "value"))
        self.slider.observe(self._show, names="value")
        self._show()
        super().__init__([ipywidgets.HBox([self.play, self.slider]), self.caption, self.image])

    def _show(self, change=None) -> None:
        step = self.slider.value
        if step not in self._frames:
            self._frames[step] = image_tag(self.picture.png(step), self.picture.caption(step))
        self.caption.value = f'<div role="status">{html.escape(self.picture.caption(step))}</div>'
        self.image.value = self._frames[step]

    def __repr__(self) -> str:
        return f"Stepper({self.picture.num_steps} steps)"
