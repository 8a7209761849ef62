"""The two clocks of a run. Calling one returns the time, in seconds since it was made."""

import time
from collections.abc import Callable

from minillm.errors import check_seconds, checked


class VirtualClock:
    """Time that only passes when the program says so: simulations are exact, repeatable and fast."""

    device_time_at_zero = 0.0  # simulated devices give their times by this clock

    def __init__(self, now: float = 0.0):
        self.now = check_seconds("now", now)

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass. Raises ConfigError if `seconds` is negative: time does not run backwards."""
        self.now += check_seconds("seconds", seconds, 0)

    def advance_to(self, moment: float) -> None:
        """Let time pass until `moment`; nothing happens if that is over."""
        self.now = max(self.now, check_seconds("moment", moment))


class RealClock:
    """Time that passes by itself; `advance_to` sleeps.

    `timer` is its source. On a shared machine, `time.process_time` counts only the time this process was computing. It
    stands still in a sleep, so all requests must then arrive at 0.
    """

    @checked
    def __init__(self, timer: Callable[[], float] = time.perf_counter):
        self._timer = timer
        self._began = timer()

    def __call__(self) -> float:
        return self._timer() - self._began

    def advance_to(self, moment: float) -> None:
        """Sleep until `moment`; nothing happens if that is over."""
        time.sleep(max(0.0, check_seconds("moment", moment) - self()))
