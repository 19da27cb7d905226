"""The line a person watches: step, loss, images a second, share of time waiting for data, time left."""

import sys
import time
from collections.abc import Mapping
from datetime import timedelta


class ProgressLine:
    """Rewrites one line in a terminal; writes line after line into a log."""

    def __init__(self, total_steps: int, start_step: int, *, enabled: bool) -> None:
        self.total_steps = total_steps
        self.start_step = start_step
        self.started = time.monotonic()
        self.enabled = enabled
        self.bound: str | None = None
        self.live = sys.stdout.isatty()

    def show(self, row: Mapping[str, float], step: int) -> None:
        """Show where training is."""
        if not self.enabled:
            return
        done = step - self.start_step
        left = (self.total_steps - step) * (time.monotonic() - self.started) / done if done else 0.0
        loss = f"loss {row['train/loss']:.4f}" if "train/loss" in row else "no step taken"
        line = (
            f"step {step}/{self.total_steps}  {loss}  "
            f"{row['speed/images_per_second']:.0f} images/s  waiting for data {row['data/wait_fraction']:.0%}  "
            f"ETA {duration(left)}"
        )
        self._write(line, end="" if self.live and step < self.total_steps else "\n")

    def note(self, text: str) -> None:
        """Write a line that stays."""
        if self.enabled:
            self._write(text, end="\n")

    def judge(self, bound: str | None) -> None:
        """Say what the run waits for, when that has changed."""
        if bound != self.bound:
            self.bound = bound
            self.note(bound or "no longer input-bound")

    def say(self, text: str) -> None:
        """Write a line that matters on whatever rank it comes from."""
        if self.enabled:
            self.note(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def _write(self, line: str, end: str) -> None:
        print(f"\r\x1b[K{line}" if self.live else line, end=end, flush=True)


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss, with the number of days in front from one day on."""
    return str(timedelta(seconds=round(seconds)))
