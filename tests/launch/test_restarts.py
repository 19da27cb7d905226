"""Ranks that are stopped, frozen and killed under the deepspeed launcher: identical losses."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoint.history import list_checkpoints
from pretrain.checkpoint.manifest import Manifest
from pretrain.heartbeat.beats import START, Beat, read_beat
from pretrain.tracking.tracker import git_commit
from tests.support.launching import Running, Shell, free_port
from tests.support.runs import PRETRAIN, losses, mlflow_runs
from tests.support.training import LONG, LONG_RUN, Trained, column

Tool = Callable[[str], str]


@pytest.mark.usefixtures("stores")
def test_run_that_is_stopped_hangs_and_is_killed_gives_identical_losses(
    shell: Shell, tiny: Path, tool: Tool, trained: Trained, tmp_path: Path
) -> None:
    """One rank gets a stop signal. Then, under a supervisor, one rank is frozen by SIGSTOP, and later one is killed."""
    settings = ["--config", tiny, *LONG_RUN, "health.hang_seconds=10"]
    deepspeed = [tool("deepspeed"), "--num_gpus", "2", "--master_port", free_port(), PRETRAIN, *settings]
    run_dir = tmp_path / "runs" / "stopped"
    with shell.start([*deepspeed, f"run_dir={run_dir}"]) as process:
        process.wait_until(lambda: len(losses(run_dir)) >= 3)
        os.kill(process_of(process, run_dir, 1), signal.SIGUSR1)
        done = process.finish()
    assert done.code == 75, done.err[-3000:]
    assert "stopped as requested; the same command continues the run" in done.out, done.err[-3000:]
    stopped_at = len(losses(run_dir))
    assert 3 <= stopped_at < 150
    if "MLflow: not all metrics arrived in time" not in done.err:  # it waits 10 s, and on a busy machine says so
        assert mlflow_runs(tmp_path)["stopped"].info.status == "KILLED"
    manifest = Manifest.load(list_checkpoints(run_dir)[-1])
    assert (manifest.state.step, manifest.state.position, manifest.world_size) == (stopped_at, 16 * stopped_at, 2)
    assert manifest.state.images_seen == 16 * stopped_at
    assert manifest.git_commit == git_commit()
    assert manifest.data_digests.keys() == {"training", "validation"}

    with shell.start([tool("vitrail"), "supervise", "--", *deepspeed, f"run_dir={run_dir}", "--resume"]) as process:
        process.wait_until(lambda: len(losses(run_dir)) >= stopped_at + 15)
        hanging = process_of(process, run_dir, 1)
        os.kill(hanging, signal.SIGSTOP)
        again, saved = process_of(process, run_dir, 1, other_than=hanging), list_checkpoints(run_dir)
        process.wait_until(lambda: list_checkpoints(run_dir) != saved)  # a second failure without one costs a rank
        os.kill(again, signal.SIGKILL)
        done = process.finish()
    out, err = done.out, done.err
    assert done.code == 0, err[-3000:]
    assert len(re.findall(r"batch 16, from step [1-9]", out)) == 3
    assert f"rank 1 (process {hanging} on " in err
    assert "no progress for more than health.hang_seconds=10; ending the run, which the same command resumes" in err
    assert len(re.findall(r"supervise: exit code -?\d+ at step \d+; restarting from step \d+ in 1 s", err)) == 2, err[
        -3000:
    ]
    assert re.search(r"goodput \d+.\d% of \d+ s, 2 restarts: compute \d+ s, ", err)
    assert losses(run_dir) == column(trained(2, LONG), "train/loss")
    run = mlflow_runs(tmp_path)["stopped"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["goodput.restart"].endswith(" s")
    assert run.info.run_id == Manifest.load(list_checkpoints(run_dir)[-1]).mlflow_run_id


def process_of(launcher: Running, run_dir: Path, rank: int, other_than: int = 0) -> int:
    """Return the process ID of a rank once it trains, in a process other than `other_than`."""
    beats: list[Beat] = []

    def is_training() -> bool:
        beats[:] = [beat for beat in [read_beat(run_dir, rank)] if beat and beat.phase != START]
        return bool(beats) and beats[0].pid != other_than

    launcher.wait_until(is_training)
    return beats[0].pid
