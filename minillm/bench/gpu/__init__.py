"""`minillm bench gpu`: ceilings of the card, kernels, serving beside peers, and the gain from each part of the engine.

`command` is the command line, `session` runs the parts and keeps the record, `report` prints it. May import every room.
"""

from minillm.bench.gpu.command import main

__all__ = ["main"]
