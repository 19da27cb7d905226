"""What all verbs need at a terminal: stages imported late, mistakes answered, progress shown, sizes read."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from pretrain.errors import UserError
from pretrain.outcome import EXIT_INTERRUPTED, EXIT_USER_ERROR

UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


def stage(module: str) -> Any:
    """Import the part of Vitrail that a verb needs."""
    return importlib.import_module(module)


@contextmanager
def mistakes() -> Iterator[None]:
    """Answer a user's mistake with its sentence and exit code 2; anything else keeps its traceback."""
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(EXIT_USER_ERROR) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), file=sys.stderr)
        raise typer.Exit(1) from None


@contextmanager
def progress_bar(label: str, total: int | None, unit: str) -> Iterator[Any]:
    """Show how far a long piece of work is and when it will end, if that is known; nothing where nobody looks."""
    rich = stage("rich.progress")
    speed = rich.TransferSpeedColumn() if unit == "bytes" else rich.MofNCompleteColumn()
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), speed, rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=stage("rich.console").Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)

        def advance(amount: int, total: int | None = total) -> None:
            bar.update(task, advance=amount, total=total)

        yield advance


def parse_size(text: str, option: str) -> int:
    """Read a size such as 256MB; a plain number is bytes."""
    for unit, factor in UNITS.items():
        if text.endswith(unit) and text.removesuffix(unit).isdigit():
            return int(text.removesuffix(unit)) * factor
    if text.isdigit():
        return int(text)
    raise typer.BadParameter(f"expected a size such as 256MB, got {text!r}", param_hint=option)
