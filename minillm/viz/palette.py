"""The colours of all pictures, and the letter and hatch that go with each state, so that colour is never alone.

Colours are those of Okabe and Ito (2008), told apart in every common kind of colour blindness, plus two greys.
"""

from dataclasses import dataclass

BLACK = "#000000"
ORANGE = "#E69F00"
SKY_BLUE = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#767676"
LIGHT_GREY = "#DDDDDD"
WHITE = "#FFFFFF"

# Lines and bars take these in turn; the markers make them readable without colour.
SERIES_COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, BLACK)
SERIES_MARKERS = ("o", "s", "^", "D", "v", "P")
SERIES_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")


@dataclass(frozen=True)
class State:
    """What a box shows: a letter for the text form, and for the figure a fill, an ink that reads on it, a hatch."""

    letter: str
    name: str
    color: str
    ink: str = BLACK
    hatch: str = ""


# What a request does in a step (timelines). The keys are the `why` of `trace.ScheduledTokens`, ways to wait, the end.
STATES = {
    "waiting": State("w", "waiting", LIGHT_GREY, GREY, ".."),
    "preempted": State("!", "preempted", YELLOW, BLACK, "\\\\"),
    "swapped": State("s", "swapped", SKY_BLUE, BLACK, "--"),
    "prefill": State("P", "prefill", BLUE, WHITE),
    "decode": State("D", "decode", ORANGE, BLACK),
    "recompute": State("R", "recompute", VERMILLION, BLACK, "///"),
    "padding": State("x", "padding", WHITE, GREY, "xx"),
    "finished": State(".", "finished", WHITE, GREY),
}

WAITING = ("waiting", "preempted", "swapped")  # the states in which nothing is computed for a request

# What a slot of a paged pool holds beside a request's token (block tables, use of the pool).
HELD = State("#", "holds tokens", BLUE, WHITE)
EXTERNAL = State("x", "gaps too small", VERMILLION, BLACK, "///")
EMPTY = State(".", "empty slot of a used block", WHITE, GREY, "xx")
CACHED = State("*", "cached", LIGHT_GREY, BLACK)
FREE = State("-", "free", WHITE, GREY)
OWNER_COLORS = (SKY_BLUE, ORANGE, GREEN, YELLOW, PURPLE, VERMILLION)  # of requests, beside their letters

# What happens to a token in a forward pass (recomputation grids).
NEW = State("N", "new", SKY_BLUE, BLACK)
AGAIN = State("R", "computed again", VERMILLION, BLACK, "///")
KEPT = State("c", "from the cache", "#EEEEEE", GREY)

# Who may look at whom (mask grids).
MAY_LOOK = State("#", "may look", GREEN, WHITE)
MAY_NOT = State(".", "may not", WHITE, GREY)
CHANGED = State("#", "changed", GREEN, WHITE)  # influence, measured
SAME = State(".", "stayed the same", WHITE, GREY)

# What a kernel's program does with a tile of keys (tiles), and what of a sector's bytes is asked for (memory access).
SEEN = State("#", "seen", SKY_BLUE, BLACK)
MASKED = State("/", "loaded, but masked", ORANGE, BLACK, "///")
NOT_LOADED = State(".", "not loaded", WHITE, GREY, "..")
ASKED = State("#", "asked for", BLUE, WHITE)
UNASKED = State("x", "moved, not asked for", WHITE, VERMILLION, "xxx")

# What host and device do (lanes, launches).
PREPARES = State("L", "schedules and launches", SKY_BLUE, BLACK)
WAITS = State("w", "waits for the device", WHITE, GREY, "..")
READS = State("R", "reads and updates", PURPLE, BLACK, "///")
COMPUTES = State("D", "computes", ORANGE, BLACK)
IDLE = State("_", "idle", WHITE, VERMILLION, "xx")
