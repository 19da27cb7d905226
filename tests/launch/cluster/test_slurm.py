"""launch/cluster/slurm.sbatch on a real Slurm with two nodes."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from pretrain.checkpoint.history import list_checkpoints
from pretrain.checkpoint.manifest import Manifest
from pretrain.heartbeat.beats import read_beats
from tests.support.launching import ROOT, wait_for
from tests.support.runs import losses
from tests.support.slurm import Slurm, start_slurm
from tests.support.training import LONG, LONG_RUN, Trained, column

SCRIPT = ROOT / "launch" / "cluster" / "slurm.sbatch"
STATES = ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "COMPLETED")


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, start_slurm(Path(folder)) as cluster:
        yield cluster


@pytest.mark.processes
def test_job_that_reaches_its_time_limit_saves_goes_back_into_the_queue_and_finishes(
    slurm: Slurm, tiny: Path, trained: Trained, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "runs" / "tiny", tmp_path / "job.log"
    submit = ["sbatch", "--parsable", f"--chdir={ROOT}", f"--output={log}", SCRIPT]
    number = slurm(*submit, "--config", tiny, *LONG_RUN, "tracking.uri=off").strip()

    def wait_until(condition: Callable[[], object]) -> None:
        def holds() -> object:
            state = slurm.job(number)["JobState"]
            assert state in STATES, f"{state}: {log.read_text()[-5000:]}"
            return condition()

        wait_for(holds)

    wait_until(lambda: len(losses(run_dir)) >= 3)
    ranks = [beat.pid for beat in read_beats(run_dir)]
    assert len(ranks) == 2
    # Slurm looks at the time limits twice a minute, when this short run would be over, so its ranks are frozen.
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    shorten_time_limit(slurm, number)
    wait_until(lambda: "the time limit is near; saving a checkpoint" in log.read_text())
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    wait_until(lambda: slurm.job(number)["Restarts"] == "1")
    slurm("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    text, stopped_at = log.read_text(), len(losses(run_dir))
    assert f"saved; job {number} goes back into the queue and continues from its checkpoint" in text
    assert 3 <= stopped_at < 150
    manifest = Manifest.load(list_checkpoints(run_dir)[-1])
    assert (manifest.state.step, manifest.world_size) == (stopped_at, 2)

    wait_until(lambda: slurm.job(number)["JobState"] == "COMPLETED")
    assert f"from step {stopped_at}" in log.read_text().removeprefix(text)
    assert slurm.job(number)["ExitCode"] == "0:0"
    assert losses(run_dir) == column(trained(2, LONG), "train/loss")


def shorten_time_limit(slurm: Slurm, number: str) -> None:
    """Let a job end in two to three minutes, which is less than the script's lead."""
    started = datetime.fromisoformat(slurm.job(number)["StartTime"]).timestamp()
    minutes = int((time.time() - started) // 60) + 3
    slurm("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")
