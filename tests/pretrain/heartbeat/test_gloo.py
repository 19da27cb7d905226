"""Ranks of a gloo group, started without a launcher: which one is named if it hangs, and who leaves if it fails.

A collective would fail after ten minutes only. Without `hang_seconds`, as in fine-tuning, the ranks leave nevertheless.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.heartbeat.beats import read_beat
from tests.support.launching import end, free_port, wait_for

SCRIPT = Path(__file__).with_name("ranks_gloo.py")
WORLD_SIZE = 3
GONE_WITHIN = 60.0  # seconds, on a busy machine

pytestmark = pytest.mark.processes


@contextlib.contextmanager
def ranks(run_dir: Path, faults: dict[int, str], waits: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """Start the ranks as processes of their own, each with its log next to the run folder."""
    processes: list[subprocess.Popen[str]] = []
    port = free_port()
    try:
        for rank in range(WORLD_SIZE):
            environment = {"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "LOCAL_RANK": str(rank)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with log_of(run_dir, rank).open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, str(SCRIPT), str(run_dir), faults.get(rank, "none"), waits],
                    env={**os.environ, **environment},
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            end(process)


def log_of(run_dir: Path, rank: int) -> Path:
    return run_dir.with_name(f"rank-{rank}.log")


def count_left(run_dir: Path, processes: list["subprocess.Popen[str]"], failed: int, sentence: str) -> int:
    """Check that all ranks but one end; return how many of them left with one sentence that names that one."""
    num_left = 0
    for rank, process in enumerate(processes):
        if rank != failed:
            assert process.wait(GONE_WITHIN) != 0
            named = f"rank {rank}: rank {failed} (process {processes[failed].pid} on "
            lines = [line for line in log_of(run_dir, rank).read_text().splitlines() if line.startswith(named)]
            if lines:
                num_left += 1
                assert len(lines) == 1
                assert f"{sentence}; leaving in step " in lines[0]
                assert process.returncode == 1
                assert not read_beat(run_dir, rank).has_ended  # its outcome does not hide that of the failed rank
    return num_left


@pytest.mark.parametrize("failed", [0, 2])  # 0 is the rank that examines the others
def test_ranks_leave_a_collective_after_the_error_of_another(tmp_path: Path, failed: int) -> None:
    run_dir = tmp_path / "run"
    with ranks(run_dir, {failed: "error"}, "gloo") as processes:
        # When the first rank has left, gloo may raise an error on the other one before that one leaves.
        assert count_left(run_dir, processes, failed, "ended in step 5 (failed)") >= 1
        assert processes[failed].poll() is None
        assert read_beat(run_dir, failed).outcome == "failed"


def test_ranks_leave_after_another_was_killed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with ranks(run_dir, {}, "store") as processes:
        wait_for(lambda: (beat := read_beat(run_dir, 1)) and beat.step > 3, timeout=GONE_WITHIN)
        processes[1].kill()
        processes[1].wait()
        assert count_left(run_dir, processes, 1, f"of step {read_beat(run_dir, 1).step}") == 2


def test_ranks_stay_after_another_has_stopped(tmp_path: Path) -> None:
    with ranks(tmp_path / "run", {1: "stopped"}, "none") as processes:
        assert [process.wait(2 * GONE_WITHIN) for process in processes] == [0, 0, 0]


@pytest.mark.parametrize(("fault", "phase"), [("hook", "backward"), ("optimizer", "step")])
def test_rank_that_hangs_in_a_step_is_named(tmp_path: Path, fault: str, phase: str) -> None:
    """The others wait in a collective: of the same backward pass, or of the next one."""
    run_dir = tmp_path / "run"
    with ranks(run_dir, {2: fault}, "gloo") as processes:
        wait_for(lambda: "hangs" in log_of(run_dir, 0).read_text(), timeout=2 * GONE_WITHIN)
        printed = log_of(run_dir, 0).read_text()
        assert f"rank 2 (process {processes[2].pid} on " in printed
        assert f" s in phase {phase} of step 15 while other ranks wait" in printed
        assert "in hang\n" in printed
        assert printed.count(" hangs: ") == 1
