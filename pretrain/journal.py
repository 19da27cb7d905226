"""Append-only JSON Lines files: metrics, skipped steps and unusable samples of a run."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pretrain.errors import MachineError
from pretrain.files import atomic_write

Row = dict[str, Any]


class Journal:
    """A file to which rows are appended. If the disk rejects rows, they wait in memory and the run continues.

    Args:
        path: File to append to; it may exist.
        keep: Function that returns whether an existing row is still valid. Others are removed, such as rows of steps
            after the checkpoint that the run resumes from.
        writes: Whether this process writes the file; all ranks may open it, but only one may write.

    Attributes:
        kept: Valid rows that were in the file when it was opened.

    Raises:
        MachineError: If rows must be removed and the disk rejects it.
    """

    def __init__(self, path: Path, keep: Callable[[Row], bool], *, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self._pending = ""
        self.kept = [row for row in read_rows(path) if keep(row)]
        text = "".join(map(_line, self.kept))
        if writes and path.exists() and path.read_text(encoding="utf-8") != text:
            try:
                atomic_write(path, text)
            except OSError as error:
                raise MachineError(f"{path}: cannot be rewritten ({error.strerror}); free disk space") from None

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, after those that the disk has rejected before. A first rejection is reported on stderr.

        Args:
            rows: Rows of JSON values.
        """
        pending = self._pending
        text = pending + "".join(map(_line, rows))
        if not text or not self.writes:
            return
        length = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self._pending = text
            with contextlib.suppress(OSError):
                os.truncate(self.path, length)  # a nearly full disk has accepted a part of the text
            if not pending:
                reason = error.strerror or error
                message = (
                    f"{self.path}: {reason}; the run continues and keeps the rows in memory until a write succeeds"
                )
                print(message, file=sys.stderr, flush=True)
        else:
            self._pending = ""


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, up to the first line that is not JSON, which a crash may have left incomplete.

    Args:
        path: File to read; if it does not exist, there are no rows.
    """
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
