"""Stopping from outside: a handler that only sets a flag, read by the training loop between steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set once a stop was asked for; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.reason = ""

    def __bool__(self) -> bool:
        return bool(self.reason)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Listen to SIGINT, SIGTERM and SIGUSR1 while the block runs; the former handlers come back afterwards."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    former = {number: signal.signal(number, flag.handle) for number in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
