"""Check that no sample is lost or repeated when a run is killed and resumes on a different number of ranks.

    python benchmarks/changing_ranks.py --kills 50 --seconds 2

The run is started on 2, 1 and 3 ranks in turn, under the `deepspeed` launcher. After about `--seconds` of training, a
random rank is killed by SIGKILL and the run is started again. Each rank records the position in the data order and a
checksum of the pixels of every sample that it trains on. The final history of the run (without the steps after the last
checkpoint, which a kill loses) is compared with that of an undisturbed run.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.digits_run import kill_ranks, prepare, start
from pretrain.config import PretrainConfig
from pretrain.configfile import read_command_line
from pretrain.data.transforms.batch import Batch, to_device

RECORDS = "RECORDS"  # environment variable with the folder to which a rank writes its samples
BATCH = 32
WORLD_SIZES = (2, 1, 3)
GRACE_SECONDS = 3.0  # time for the remaining ranks to end after a kill; the launcher would wait 30 seconds
TIMEOUT_SECONDS = 600.0

History = dict[int, list[tuple[int, int]]]  # step -> position and checksum of each of its samples


def train_and_record(folder: Path) -> int:
    """Train as one rank, like `launch/pretrain.py`, and record every sample in a file in `folder`."""
    from pretrain.train import main as pretrain

    folder.mkdir(parents=True, exist_ok=True)

    def record_and_move(batch: Batch, device: torch.device) -> Batch:
        with (folder / f"{os.getpid()}.txt").open("a") as file:
            for position, image in zip(batch["position"].tolist(), batch["image"], strict=True):
                file.write(f"{position} {zlib.crc32(image.numpy().tobytes())}\n")
        return to_device(batch, device)

    with mock.patch("pretrain.steps.to_device", record_and_move):
        return pretrain(read_command_line(PretrainConfig, description="", example="", resumable=True))


def read_history(folder: Path) -> History:
    """Return the samples that all ranks recorded between one start and its end."""
    history: History = {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            position, checksum = map(int, line.split())
            history.setdefault(position // BATCH, []).append((position, checksum))
    return {step: sorted(samples) for step, samples in history.items()}


def wait(process: "subprocess.Popen[bytes]", timeout: float) -> int | None:
    """Return the exit code of a process, or None if it is still running after `timeout` seconds."""
    try:
        return process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        return None


def run_until_done(command: list[str], run_dir: Path, log: Path, kills: int, seconds: float) -> Iterator[Path]:
    """Start a run until it is complete, and kill a random rank in each of the first `kills` starts.

    Args:
        command: Command from `prepare`.
        run_dir: Run folder.
        log: File for the output of all starts.
        kills: Total number of kills.
        seconds: Mean training time before a kill, in seconds.

    Yields:
        For each start, the folder to which its ranks wrote their samples.
    """
    generator, killed, attempt = random.Random(0), 0, 0
    while True:
        world_size, records = WORLD_SIZES[attempt % 3], run_dir.with_name(f"{run_dir.name}-{attempt}")
        command[command.index("--num_gpus") + 1] = str(world_size)
        process = start([*command, f"run_dir={run_dir}"], log, **{RECORDS: str(records)})
        try:
            kills_now = kill_ranks(run_dir, process, min(1, kills - killed), seconds, generator, world_size)
            killed += len(kills_now)
            code = wait(process, GRACE_SECONDS if kills_now else TIMEOUT_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if records.exists():
            yield records
        if code == 0:
            print(f"{killed} kills, {attempt + 1} starts")
            return
        attempt += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--seconds", type=float, default=2, help="mean seconds of training between two kills")
    parser.add_argument("--steps", type=int, default=2000, help="number of training steps")
    parser.add_argument("--save-every", type=int, default=20, help="number of steps between two checkpoints")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        command = prepare(work, arguments.steps, arguments.save_every, Path(__file__).resolve())
        (undisturbed,) = map(read_history, run_until_done(command, work / "undisturbed", work / "log", 0, 1.0))
        final: History = {}
        for records in run_until_done(command, work / "killed", work / "log", arguments.kills, arguments.seconds):
            history = read_history(records)
            # Steps of earlier starts from here on came after their last checkpoint and were lost.
            first = min(history, default=arguments.steps)
            final = {step: samples for step, samples in final.items() if step < first} | history
        steps = range(arguments.steps)
        expected = [list(range(step * BATCH, (step + 1) * BATCH)) for step in steps]
        once = sum([position for position, _ in final.get(step, [])] == expected[step] for step in steps)
        same = sum(final.get(step) == undisturbed[step] for step in steps)
        print(f"{once} of {len(steps)} steps used each of their samples exactly once")
        print(f"{same} of {len(steps)} steps had the pixels of the undisturbed run")


if __name__ == "__main__":
    if RECORDS in os.environ:
        sys.exit(train_and_record(Path(os.environ[RECORDS])))
    main()
