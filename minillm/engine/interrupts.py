"""Ctrl-C waits while something is changed that must not be left half changed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class HeldInterrupts:
    """Until this block ends, Ctrl-C (SIGINT) is only noted; then KeyboardInterrupt is raised.

    No effect outside the main thread, the only one that Python interrupts, nor where the program has its own handler.

        with HeldInterrupts() as interrupts:
            change_this()
            with interrupts.let_through():
                wait_for_something_long()
            change_that()
    """

    def __init__(self):
        self._replaced = False  # the handler is ours
        self._holds = False
        self._came = False

    def __enter__(self) -> "HeldInterrupts":
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._hear)
            self._replaced = self._holds = True
        return self

    def __exit__(self, *error) -> None:
        if self._replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._replaced = False
        self._let_go()

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Here an interrupt is raised at once, also one that came before."""
        try:
            self._let_go()
            yield
        finally:
            self._holds = self._replaced

    def _let_go(self) -> None:
        self._holds = False
        if self._came:
            self._came = False
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self._holds:
            raise KeyboardInterrupt
        self._came = True
