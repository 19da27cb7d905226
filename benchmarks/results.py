"""The rows of a long comparison, kept in a file as they come: one that was stopped goes on where it was."""

import json
import sys
import time
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Results:
    """Rows in a file of JSON lines, one for each thing measured; without a path they are only kept."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.started = path, time.monotonic()
        self.rows: list[Row] = []
        if path and path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def note(self, **row: Any) -> None:
        """Keep a row and say it."""
        self.rows.append(row)
        print(f"[{time.monotonic() - self.started:.0f} s] {row}", file=sys.stderr, flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def top1s(self, **case: Any) -> list[float]:
        """Return the top-1 of the rows that are of this case."""
        return [row["top1"] for row in self.rows if case.items() <= row.items()]
