"""The READMEs' pictures of recorded runs: `python -m minillm.bench.figures [FOLDER]`, a part of `make figures`."""

import sys
from pathlib import Path

from minillm.bench.chapter_scores import scoreboard
from minillm.bench.ladder_report import waterfall
from minillm.bench.recorded import latest
from minillm.viz import Picture

FOLDER = Path(__file__).parents[2] / "figures"
SHAPE = "storyteller"


def ladder() -> Picture:
    """Every rung's factor over the one before it."""
    return waterfall(latest("ladder", part=SHAPE)["parts"][SHAPE])


FIGURES = {"ladder.svg": ladder, "scoreboard.svg": lambda: scoreboard(shape=SHAPE)}


if __name__ == "__main__":
    for name, make in FIGURES.items():
        print(make().save(Path(*sys.argv[1:2] or [FOLDER]) / name).name)
