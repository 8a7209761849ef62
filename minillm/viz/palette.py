"""The colours of all pictures, and the letter and hatch that go with each state, so that colour is never alone.

One colour has one meaning in the whole course (`MEANINGS`). The strong colours are those of Okabe and Ito (2008), with
a darker green: they differ in all common kinds of colour blindness. Lines and bars have five darker colours, in which a
name on white is readable.
"""

from dataclasses import dataclass

BLACK = "#000000"
WHITE = "#FFFFFF"
GREEN = "#007A5A"
BLUE = "#0072B2"
ORANGE = "#E69F00"
SKY_BLUE = "#56B4E9"
VERMILLION = "#D55E00"
YELLOW = "#F0E442"
SLATE = "#8FA3B0"
PURPLE, PALE_PURPLE = "#CC79A7", "#EBC9DC"
GREY = "#595959"  # for hatches and words, readable on the next two
LIGHT_GREY = "#DDDDDD"
PALE_GREY = "#EEEEEE"
VIOLET, RED, TEAL, BROWN, MAGENTA = "#5B2A86", "#B3263A", "#006B75", "#7A5200", "#B0358B"

# For requests, beside their letters: pale, so that none is mistaken for a state.
OWNER_COLORS = ("#A5D8F3", "#F4A9BC", "#EAD68B", "#C9B6EA", "#D6A78C", "#BDBA92")
# For the parts of one thing, beside their letters: a step's kernels, a request's splits, an engine's layers.
PART_COLORS = ("#F0E9F7", "#DCCDEB", "#C4ADDC", "#A98BCB", "#8560B0", VIOLET)

# Lines and bars take these in turn; the markers make them readable without colour.
SERIES_COLORS = (VIOLET, RED, TEAL, BROWN, MAGENTA, BLACK)
SERIES_MARKERS = ("o", "s", "^", "D", "v", "P")
SERIES_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")
WASTE_HATCHES = ("xxx", "...", "///")  # of the parts of a bar that are waste, in grey on white

MEANINGS = {
    GREEN: "may look; attended to; influence",
    BLUE: "prefill",
    ORANGE: "decode; the device computes",
    SKY_BLUE: "computed for the first time",
    VERMILLION: "computed again",
    YELLOW: "preempted",
    SLATE: "swapped out",
    PURPLE: "the host reads and updates",
    PALE_PURPLE: "the host schedules and launches",
    LIGHT_GREY: "waiting (dotted); cached; gaps, what is cut off (striped)",
    PALE_GREY: "read from the cache",
    WHITE: "nothing; padding and waste (crossed)",
    VIOLET: "useful: tokens held, bytes asked for",
}


def contrast(color: str, other: str) -> float:
    """How readable one colour is on the other, from 1 to 21 (WCAG 2.2, "contrast ratio"). Colours are "#RRGGBB"."""
    low, high = sorted(map(_luminance, (color, other)))
    return (high + 0.05) / (low + 0.05)


def ink_on(color: str) -> str:
    """Black or white, whichever is more readable on `color`; the contrast is at least 4.58 for any colour."""
    return max((WHITE, BLACK), key=lambda ink: contrast(ink, color))


def _luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@dataclass(frozen=True)
class State:
    """How a state is shown: a letter for the text form, and for the figure a fill, a readable ink and a hatch."""

    letter: str
    name: str
    color: str
    ink: str = BLACK
    hatch: str = ""


# What a request does in a step (timelines). The keys: the `why` of `trace.ScheduledTokens`, ways to wait, the end.
STATES = {
    "waiting": State("w", "waiting", LIGHT_GREY, GREY, ".."),
    "preempted": State("!", "preempted", YELLOW, BLACK, "\\\\"),
    "swapped": State("s", "swapped", SLATE, BLACK, "--"),
    "prefill": State("P", "prefill", BLUE, WHITE),
    "decode": State("D", "decode", ORANGE, BLACK),
    "recompute": State("R", "recompute", VERMILLION, BLACK, "///"),
    "padding": State("x", "padding", WHITE, GREY, "xx"),
    "finished": State(".", "finished", WHITE, GREY),
}

WAITING = ("waiting", "preempted", "swapped")  # the states in which nothing is computed for a request

# What a slot of a paged pool holds beside a request's token (block tables, use of the pool).
HELD = State("#", "holds tokens", VIOLET, WHITE)
EXTERNAL = State("x", "gaps too small", LIGHT_GREY, GREY, "///")
EMPTY = State(".", "empty slot of a used block", WHITE, GREY, "xx")
CACHED = State("*", "cached", LIGHT_GREY, BLACK)
FREE = State("-", "free", WHITE, GREY)

# What happens to a token in a forward pass (recomputation grids).
NEW = State("N", "new", SKY_BLUE, BLACK)
AGAIN = State("R", "computed again", VERMILLION, BLACK, "///")
KEPT = State("c", "from the cache", PALE_GREY, GREY)

# Which token may look at which (mask grids).
MAY_LOOK = State("#", "may look", GREEN, WHITE)
MAY_NOT = State(".", "may not", WHITE, GREY)
DROPPED = State("x", "cut off, was empty", LIGHT_GREY, GREY, "xx")
CHANGED = State("#", "changed", GREEN, WHITE)  # influence, measured
SAME = State(".", "stayed the same", WHITE, GREY)

# What a kernel's program does with a tile of keys (tiles), and which bytes of a sector are requested (memory access).
SEEN = State("#", "seen", GREEN, WHITE)
MASKED = State("/", "loaded, but masked", WHITE, GREY, "///")
NOT_LOADED = State(".", "not loaded", WHITE, GREY, "..")
ASKED = State("#", "asked for", VIOLET, WHITE)
UNASKED = State("x", "moved, not asked for", WHITE, GREY, "xxx")

# What host and device do (lanes, launches).
PREPARES = State("L", "schedules and launches", PALE_PURPLE, BLACK)
WAITS = State("w", "waits for the device", LIGHT_GREY, GREY, "..")
READS = State("R", "reads and updates", PURPLE, BLACK, "///")
COMPUTES = State("D", "computes", ORANGE, BLACK)
IDLE = State("_", "idle", WHITE, GREY, "xx")
