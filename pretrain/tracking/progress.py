"""Show progress: that of a run as a line of metrics, that of other long work as a bar."""

import re
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
        self._first_step_ended: float | None = None
        self._first_step_began = time.monotonic()
        self._bottleneck: str | None = None
        self._is_terminal = sys.stdout.isatty()

    def begin_first_step(self, *, compiles: bool) -> None:
        """Start to time the first step; if it compiles the model, say so, because this can take minutes."""
        self._first_step_began = time.monotonic()
        if compiles:
            self.print_message("compiling the model in the first step; this can take some minutes ...")

    def end_step(self) -> None:
        """Print the duration of the first step; a no-op for later ones, from which the time left is estimated."""
        if self._first_step_ended is None:
            self._first_step_ended = time.monotonic()
            self.start_step += 1
            self.print_message(f"first step after {self._first_step_ended - self._first_step_began:.1f} s")

    def print_metrics(self, row: Mapping[str, float], step: int) -> None:
        """Print a row of metrics on the line that is rewritten."""
        if not self.enabled:
            return
        loss = f"loss {row['train/loss']:.4f}" if "train/loss" in row else "all steps skipped"
        line = (
            f"step {step}/{self.total_steps}  {loss}  "
            f"{row['speed/images_per_second']:.0f} images/s  waiting for data {row['data/wait_fraction']:.0%}  "
            f"ETA {self._time_left(step)}"
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
        """Print what limits data loading whenever that changes; other percentages of the same are no change.

        Args:
            bottleneck: Sentence that names the slowest stage, or None if the run is not input-bound.
        """
        kind = bottleneck and re.sub(r"\d+%", "", bottleneck)
        if kind != self._bottleneck:
            self._bottleneck = kind
            self.print_message(bottleneck or "no longer input-bound")

    def _time_left(self, step: int) -> str:
        steps_done = step - self.start_step
        if step == self.total_steps:
            return duration(0)
        if self._first_step_ended is None or steps_done < 1:
            return "unknown"
        return duration((self.total_steps - step) * (time.monotonic() - self._first_step_ended) / steps_done)

    def _write(self, line: str, end: str) -> None:
        print(f"\r\x1b[K{line}" if self._is_terminal else line, end=end, flush=True)


def summary(title: str, facts: Mapping[str, str]) -> str:
    """Return what a finished stage prints: a title, and below it one line per fact with the names aligned."""
    width = max(map(len, facts)) + 2
    return "\n".join([title, *(f"  {name:<{width}}{fact}" for name, fact in facts.items())])


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
