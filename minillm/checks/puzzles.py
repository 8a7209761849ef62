"""The target picture beside the picture of the reader's function, also while that is a stub."""

from collections.abc import Callable, Sequence

from torch import Tensor

from minillm.checks.base import own
from minillm.checks.chapter_09 import HEAD_SIZE, NUM_LOADS, NUMBER_BYTES, VECTOR, first_number, reads_of
from minillm.viz import MaskGrid, Panels, PictureError, WarpAccess, side_by_side


def beside(target: Tensor, function: Callable, *args, labels: Sequence[str] | None = None) -> Panels:
    """Two mask grids: `target`, and the result of `function(*args)`. `labels` are the tokens of the columns.

    The function cannot make it raise: for a stub, an error or an answer that is not a mask, the second grid is empty
    and its title says why.
    """
    wanted = MaskGrid(target, key_labels=labels, title="target")
    try:
        answer = own(function)(*args)
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


def key_reads(function: Callable | None = None, head: int = 1, num_heads: int = 2) -> Panels:
    """The first load of a warp: above, a first try that reads everything and moves sectors twice; below, `function`.

    The function cannot make it raise: the title says why there is no second picture.
    """
    wasteful = _warp(_in_a_row, head, num_heads, "a first try: half of what moves is not asked for")
    if function is None:
        return Panels([wasteful], columns=1)
    try:
        return Panels([wasteful, _warp(own(function), head, num_heads, "yours")], columns=1)
    except NotImplementedError:
        return Panels([wasteful], columns=1, title="yours: not written yet")
    except Exception as error:
        return Panels([wasteful], columns=1, title=f"yours: {type(error).__name__}")


def _warp(function: Callable, head: int, num_heads: int, title: str) -> WarpAccess:
    """What each thread reads in load 0."""
    first = reads_of(function, head, num_heads).first[0]
    places = {thread: (number * NUMBER_BYTES, VECTOR * NUMBER_BYTES) for thread, number in enumerate(first)}
    call = f"load=0, head={head}, num_heads={num_heads}, {NUMBER_BYTES} bytes per number"
    return WarpAccess(places, title=f"{title} ({call})")


def _in_a_row(load: int, thread: int, head: int, num_heads: int) -> int:
    """Each thread reads consecutive pieces, one per load, so that neighbouring threads never share a sector."""
    key, eighth = divmod(NUM_LOADS * thread + load, HEAD_SIZE // VECTOR)
    return first_number(key, head, num_heads) + eighth * VECTOR
