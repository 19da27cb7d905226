"""Turn SIGINT, SIGTERM and SIGUSR1 into a request to stop at the next safe point."""

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECONDS_BETWEEN_INTERRUPTS = 1.0  # a terminal and a launcher both forward one Ctrl-C


class StopSignal:
    """Handles the signals that ask a run to stop. A second Ctrl-C raises KeyboardInterrupt and so stops at once.

    Attributes:
        is_requested: Whether this process was asked to stop.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._requested_at = 0.0
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_later = time.monotonic() > self._requested_at + SECONDS_BETWEEN_INTERRUPTS
        if self.is_requested and number == signal.SIGINT and is_later:
            raise KeyboardInterrupt
        self.is_requested, self._requested_at = True, time.monotonic()
