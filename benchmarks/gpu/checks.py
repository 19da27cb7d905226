"""One line of the table: what was measured, what it is compared with, and the verdict."""

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

OK, FAILED, MISSED, SKIPPED = "ok", "failed", "missed", "skipped"
COLUMNS = ("group", "check", "figure", "limit", "verdict", "reason")


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        verdict: "ok", "failed", "missed" (a bar of speed that was not reached) or "skipped".
        figure: What was measured.
        limit: What the figure is compared with.
        reason: Why the check failed or was skipped, or what explains its limit.
        check: Name of the check in its group.
        group: Name of the group.
    """

    verdict: str
    figure: str = ""
    limit: str = ""
    reason: str = ""
    check: str = ""
    group: str = ""


@dataclass(frozen=True)
class Task:
    """A check that is still to be made.

    Attributes:
        run: Function that makes it, and may make several results.
        seconds: Time that it needs on a GPU; it is skipped if less is left.
    """

    run: Callable[[], Check | Sequence[Check]]
    seconds: float = 0.0


def judge(holds: bool, figure: object, limit: object, reason: str = "", otherwise: str = FAILED) -> Check:
    """Return a check with the verdict "ok" if it holds, else with another one."""
    return Check(OK if holds else otherwise, str(figure), str(limit), reason)


def judge_speed(ratio: float, bar: float, reason: str = "") -> Check:
    """Return a check of a ratio of speeds, which is missed, not failed, below its bar."""
    return judge(ratio >= bar, f"{ratio:.2f}x", f"at least {bar:.2f}x", reason, otherwise=MISSED)


def make_checks(group: str, tasks: Mapping[str, Task], seconds: float, write: Callable[[Check], None]) -> None:
    """Make each check of a group, and write its result as soon as it is known; a check that fails, fails alone.

    Args:
        group: Name of the group.
        tasks: The checks by name, in the order in which they are made.
        seconds: Time for all of them.
        write: Function that is called with each result.
    """
    end = time.monotonic() + seconds
    for name, task in tasks.items():
        left = end - time.monotonic()
        if left < task.seconds:
            results: Sequence[Check] = [Check(SKIPPED, reason=f"needs {task.seconds:.0f} s, {max(left, 0):.0f} s left")]
        else:
            results = _results_of(task)
        for result in results:
            write(replace(result, group=group, check=f"{name}{result.check}"))


def _results_of(task: Task) -> Sequence[Check]:
    try:
        results = task.run()
    except Exception as error:
        traceback.print_exc()  # into the log of the group
        return [Check(FAILED, reason=describe_error(error))]
    return [results] if isinstance(results, Check) else results


def describe_error(error: BaseException) -> str:
    """Return the class and the first line of an error, with the innermost line of code that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace else ""
    message = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {message}{place}"


def append(path: Path, check: Check) -> None:
    """Append a result to a JSON lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(check)) + "\n")


def read(path: Path) -> list[Check]:
    """Return the results in a JSON lines file; none if there is no such file."""
    if not path.exists():
        return []
    return [Check(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def print_table(checks: Sequence[Check], file: TextIO | None = None) -> None:
    """Print the results as an aligned table; the last column is as long as it needs to be."""
    rows = [COLUMNS, *([getattr(check, column) for column in COLUMNS] for check in checks)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]).rstrip(), file=file, flush=True)


def markdown_rows(checks: Sequence[Check]) -> list[str]:
    """Return the results as the rows of a Markdown table, with its header."""
    header = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return header + [f"| {' | '.join(getattr(check, c).replace('|', '/') for c in COLUMNS)} |" for check in checks]
