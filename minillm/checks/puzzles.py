"""The mask to draw beside the mask the reader's function draws, also while the function is still a stub."""

from collections.abc import Callable, Sequence

from torch import Tensor

from minillm.viz import MaskGrid, Panels, PictureError, side_by_side


def beside(target: Tensor, function: Callable, *args, labels: Sequence[str] | None = None) -> Panels:
    """Two mask grids: `target`, and what `function(*args)` returns. `labels` name the tokens of the columns.

    Never raises for what the function does: a stub, an error or an answer that is no mask leaves the second grid
    empty, and its title says why.
    """
    wanted = MaskGrid(target, key_labels=labels, title="target")
    try:
        answer = function(*args)
        yours = MaskGrid(answer, key_labels=labels, title="yours")
    except NotImplementedError:
        return side_by_side([wanted, _empty(target, labels, "yours: not written yet")])
    except PictureError:
        return side_by_side([wanted, _empty(target, labels, "yours: no mask of this size")])
    except Exception as error:
        return side_by_side([wanted, _empty(target, labels, f"yours: {type(error).__name__}")])
    return side_by_side([wanted, yours])


def _empty(target: Tensor, labels: Sequence[str] | None, title: str) -> MaskGrid:
    return MaskGrid(target & False, key_labels=labels, title=title)
