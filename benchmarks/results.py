"""Keep the rows of a long comparison in a file, so that an interrupted benchmark continues where it stopped."""

import json
import sys
import time
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Results:
    """Rows of measurements, one per line in a JSON lines file.

    Args:
        path: JSON lines file to continue and to extend, or None to keep the rows in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.started = path, time.monotonic()
        self.rows: list[Row] = []
        if path and path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def add(self, **row: Any) -> None:
        """Append a row, print it to stderr and save all rows."""
        self.rows.append(row)
        print(f"[{time.monotonic() - self.started:.0f} s] {row}", file=sys.stderr, flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def top1_values(self, **case: Any) -> list[float]:
        """Return the top-1 accuracy of each row that contains all the given keys and values."""
        return [row["top1"] for row in self.rows if case.items() <= row.items()]
