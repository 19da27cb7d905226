"""Show progress: that of a run as a line of metrics, that of other long work as a bar."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol


class Advance(Protocol):
    """Moves a progress bar on by an amount of work; `total` replaces the bar's total once it is known."""

    def __call__(self, amount: int, total: int | None = None) -> None: ...


class ProgressLine:
    """Print progress: in a terminal one line that is rewritten, otherwise one line per row of metrics.

    Args:
        total_steps: Last step of the run.
        start_step: Number of steps taken before this process started; the time left is estimated from later steps.
        enabled: Whether this process prints; only the main rank does. Warnings are printed on every rank.
    """

    def __init__(self, total_steps: int, start_step: int, *, enabled: bool) -> None:
        self.total_steps = total_steps
        self.start_step = start_step
        self.enabled = enabled
        self._started = time.monotonic()
        self._bottleneck: str | None = None
        self._is_terminal = sys.stdout.isatty()

    def print_metrics(self, row: Mapping[str, float], step: int) -> None:
        """Print a row of metrics on the line that is rewritten."""
        if not self.enabled:
            return
        steps_done = step - self.start_step
        elapsed = time.monotonic() - self._started
        seconds_left = (self.total_steps - step) * elapsed / steps_done if steps_done else 0.0
        loss = f"loss {row['train/loss']:.4f}" if "train/loss" in row else "all steps skipped"
        line = (
            f"step {step}/{self.total_steps}  {loss}  "
            f"{row['speed/images_per_second']:.0f} images/s  waiting for data {row['data/wait_fraction']:.0%}  "
            f"ETA {duration(seconds_left)}"
        )
        self._write(line, end="" if self._is_terminal and step < self.total_steps else "\n")

    def print_message(self, text: str) -> None:
        """Print a line that is not overwritten."""
        if self.enabled:
            self._write(text, end="\n")

    def print_warning(self, text: str) -> None:
        """Print a line on whichever rank the warning occurs; ranks other than the main one use stderr."""
        if self.enabled:
            self.print_message(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def print_bottleneck(self, bottleneck: str | None) -> None:
        """Print what limits data loading whenever that changes.

        Args:
            bottleneck: Sentence that names the slowest stage, or None if the run is not input-bound.
        """
        if bottleneck != self._bottleneck:
            self._bottleneck = bottleneck
            self.print_message(bottleneck or "no longer input-bound")

    def _write(self, line: str, end: str) -> None:
        print(f"\r\x1b[K{line}" if self._is_terminal else line, end=end, flush=True)


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss, with the number of days in front from one day on."""
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def progress_bar(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Show the progress and the estimated time left on stderr; a log file gets only the final state.

    Args:
        label: Name of the work, shown in front of the bar.
        total: Amount of work in `unit`, or None if it is not known yet.
        unit: Unit of the count; "bytes" are shown as a transfer speed.

    Yields:
        The function that moves the bar on.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount_column = TransferSpeedColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount_column, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)

        def advance(amount: int, total: int | None = None) -> None:
            bar.update(task, advance=amount, total=total)

        yield advance
