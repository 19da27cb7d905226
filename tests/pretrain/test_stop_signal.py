"""Signals become a request to stop; only a second Ctrl-C stops at once."""

import signal
from collections.abc import Callable

import pytest

from pretrain.stop_signal import StopSignal


def test_only_a_second_ctrl_c_raises_keyboard_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal and a launcher both forward one Ctrl-C, so another one within a second does not count."""
    handlers: dict[int, Callable[[int, None], None]] = {}
    now = 100.0
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr("time.monotonic", lambda: now)
    stop = StopSignal()
    assert handlers.keys() == {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
    assert not stop.is_requested
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        handlers[number](number, None)
        assert stop.is_requested
    now += 2
    handlers[signal.SIGTERM](signal.SIGTERM, None)  # from an impatient launcher, while the run is saving
    now += 2
    with pytest.raises(KeyboardInterrupt):
        handlers[signal.SIGINT](signal.SIGINT, None)
