"""The command line of one group of checks, which `python -m benchmarks.gpu` starts in processes of its own."""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from benchmarks.gpu.checks import Check, Task, append, make_checks
from launch.quiet import hide_warnings

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Place:
    """Where a group runs.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal with tiny sizes.
        work: Folder for its files.
        end: Time of the monotonic clock at which it must have ended.
    """

    device: str
    work: Path
    end: float

    @property
    def on_gpu(self) -> bool:
        """Whether the group runs on a GPU."""
        return self.device == "cuda"

    def run(self, command: Sequence[str | Path], **variables: str) -> str:
        """Run a Python script in what is left of the time, and return its output; its errors go to the group's log.

        Args:
            command: Path of the script, relative to the project, and its arguments.
            variables: Environment variables to add.

        Raises:
            RuntimeError: If it fails or takes longer. All processes that it started are ended.
        """
        full = [sys.executable, *map(str, command)]
        print(*full, file=sys.stderr, flush=True)
        process = subprocess.Popen(full, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True)
        try:
            out, _ = process.communicate(timeout=max(1.0, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{command[0]} did not end in the time of its group") from None
        finally:
            end_tree(process.pid)
        print(out, file=sys.stderr, flush=True)
        if process.returncode:
            raise RuntimeError(f"{command[0]} ended with exit code {process.returncode}")
        return out


def end_tree(pid: int) -> None:
    """End a process of this group and all that it has started, whatever session they are in."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


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
    tasks = tasks_of(Place(options.device, options.work, time.monotonic() + options.seconds))
    make_checks(options.group, tasks, options.seconds, partial(_write, options.rows))


def _write(path: Path, check: Check) -> None:
    from pretrain import distributed

    if distributed.is_main():
        append(path, check)
