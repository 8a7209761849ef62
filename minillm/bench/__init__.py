"""Benchmarks beside named peers, printed with machine, date and versions: `minillm bench`.

May import every room but `cli`; only `cli` imports it.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "chapter_scores": "scoreboard",
        "contenders": "make_jobs",
        "gpu.report": "report",
        "gpu.scale": "FULL",
        "gpu.session": "driver_version",
        "gpu.timing": "device_seconds",
        "gpu.workloads": "w1_jobs",
        "ladder_report": "ladder_report",
        "ladder_rungs": "Alone Budget Paged Rows",
        "measuring": "measure mixed_requests",
        "recorded": "latest",
    },
)
