"""A run that is killed and goes on with another number of ranks, again and again: is a sample lost, or seen twice?

    python benchmarks/changing_ranks.py --kills 50 --seconds 2

Each start is on 2, 1 or 3 ranks in turn, under the `deepspeed` launcher, and ends with SIGKILL for a random rank after
about so many seconds of training. Every rank notes the position in the order and the pixels' checksum of each sample it
trains on. What has lasted, from the checkpoint that each start went on from, is compared with an undisturbed run.
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

from benchmarks.digits_run import disturb, prepare, start
from pretrain.config import PretrainConfig
from pretrain.configfile import read_command_line
from pretrain.data.transforms.batch import Batch, to_device

RECORDS = "RECORDS"  # the variable that tells a rank where to note its samples
BATCH = 32
WORLD_SIZES = (2, 1, 3)
GRACE_SECONDS = 3.0  # after a kill; the launcher would give the ranks that are left 30

Notes = dict[int, list[tuple[int, int]]]  # step -> position and checksum of each sample, of all ranks


def train_and_note(folder: Path) -> int:
    """Be a rank: train as `launch/pretrain.py` does, and note every sample."""
    from pretrain.train import main as pretrain

    folder.mkdir(parents=True, exist_ok=True)

    def noted(batch: Batch, device: torch.device) -> Batch:
        with (folder / f"{os.getpid()}.txt").open("a") as file:
            for position, image in zip(batch["position"].tolist(), batch["image"], strict=True):
                file.write(f"{position} {zlib.crc32(image.numpy().tobytes())}\n")
        return to_device(batch, device)

    with mock.patch("pretrain.steps.to_device", noted):
        return pretrain(read_command_line(PretrainConfig, description="", example="", resumable=True))


def read_notes(folder: Path) -> Notes:
    """Read what all ranks of one start have noted."""
    notes: Notes = {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            position, checksum = map(int, line.split())
            notes.setdefault(position // BATCH, []).append((position, checksum))
    return {step: sorted(samples) for step, samples in notes.items()}


def wait(process: "subprocess.Popen[bytes]", timeout: float) -> int | None:
    """Return the exit code; None where there is none yet."""
    try:
        return process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        return None


def run_to_the_end(command: list[str], run_dir: Path, log: Path, kills: int, seconds: float) -> Iterator[Path]:
    """Start a run until it is through, and disturb it; yields where the ranks of each start have noted samples."""
    chance, killed, attempt = random.Random(0), 0, 0
    while True:
        world_size, records = WORLD_SIZES[attempt % 3], run_dir.with_name(f"{run_dir.name}-{attempt}")
        command[command.index("--num_gpus") + 1] = str(world_size)
        process = start([*command, f"run_dir={run_dir}"], log, **{RECORDS: str(records)})
        try:
            hit = disturb(run_dir, process, min(1, kills - killed), seconds, chance, world_size)
            killed += len(hit)
            code = wait(process, GRACE_SECONDS if hit else 600)
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
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=2, help="of training between two kills, on average")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save-every", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        command = prepare(work, arguments.steps, arguments.save_every, Path(__file__).resolve())
        (whole,) = map(read_notes, run_to_the_end(command, work / "whole", work / "log", 0, 1.0))
        lasting: Notes = {}
        for records in run_to_the_end(command, work / "broken", work / "log", arguments.kills, arguments.seconds):
            notes = read_notes(records)
            first = min(notes, default=arguments.steps)  # what earlier starts did from here on was lost with them
            lasting = {step: samples for step, samples in lasting.items() if step < first} | notes
        own = [list(range(step * BATCH, (step + 1) * BATCH)) for step in range(arguments.steps)]
        once = sum([position for position, _ in lasting.get(step, [])] == own[step] for step in range(arguments.steps))
        same = sum(lasting.get(step) == whole[step] for step in range(arguments.steps))
        print(f"{once} of {arguments.steps} steps were made of each of their samples once")
        print(f"{same} of {arguments.steps} steps had the pixels of the undisturbed run")


if __name__ == "__main__":
    if RECORDS in os.environ:
        sys.exit(train_and_note(Path(os.environ[RECORDS])))
    main()
