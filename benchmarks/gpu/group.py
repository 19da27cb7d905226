"""The command line of one group of checks, which `python -m benchmarks.gpu` starts in processes of its own."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.gpu.checks import Check, Task, append, make_checks
from launch.quiet import hide_warnings


@dataclass(frozen=True)
class Place:
    """Where a group runs.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal with tiny sizes.
        work: Folder for its files.
        seconds: Time for all of its checks.
    """

    device: str
    work: Path
    seconds: float

    @property
    def on_gpu(self) -> bool:
        """Whether the group runs on a GPU."""
        return self.device == "cuda"


def run_group(describe: str, tasks_of: Callable[[Place], Mapping[str, Task]]) -> None:
    """Make all checks of a group on every rank; the main rank writes the results.

    Args:
        describe: Purpose of the group, for --help.
        tasks_of: Function that returns the checks by name.
    """
    parser = argparse.ArgumentParser(description=describe)
    parser.add_argument("--group", required=True, help="name of the group in the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True, help="device of the checks")
    parser.add_argument("--work", type=Path, required=True, help="folder for temporary files")
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines file to which the results are appended")
    parser.add_argument("--seconds", type=float, required=True, help="time for all checks")
    options = parser.parse_args()
    hide_warnings()
    tasks = tasks_of(Place(options.device, options.work, options.seconds))
    make_checks(options.group, tasks, options.seconds, partial(_write, options.rows))


def _write(path: Path, check: Check) -> None:
    from pretrain import distributed

    if distributed.is_main():
        append(path, check)
