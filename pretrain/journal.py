"""What a run notes while it goes on, a JSON object a line: metrics, skipped steps, samples that could not be used."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Journal:
    """A file of rows that only grows. A disk that refuses some costs no run: they wait in memory for the next ones.

    Args:
        path: of the file.
        lasts: says which of its rows are still true; the others are of a past that did not last, and are taken out.
        writes: whether this process writes the file.
    """

    def __init__(self, path: Path, lasts: Callable[[Row], bool], *, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self._waiting = ""
        self.kept = [row for row in read_rows(path) if lasts(row)]
        text = "".join(map(_line, self.kept))
        if writes and path.exists() and path.read_text(encoding="utf-8") != text:
            aside = path.with_name(path.name + ".partial")
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows; they are on their way to the disk when this returns, unless it refuses them."""
        late = self._waiting
        text = late + "".join(map(_line, rows))
        if not text or not self.writes:
            return
        length = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self._waiting = text
            with contextlib.suppress(OSError):
                os.truncate(self.path, length)  # a disk that is nearly full has taken a part
            if not late:
                reason = error.strerror or error
                print(f"{self.path}: {reason}; its rows wait in memory, the run goes on", file=sys.stderr, flush=True)
        else:
            self._waiting = ""


def read_rows(path: Path) -> list[Row]:
    """Read a file of rows; a last line that a crash cut off is not a row."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
