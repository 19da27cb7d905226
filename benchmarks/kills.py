"""Repeatedly kill ranks of a run under `vitrail supervise`, and compare its results or measure the lost time.

    python benchmarks/kills.py --kills 50 --seconds 4 --steps 1200           # compare losses and weights
    python benchmarks/kills.py --kills 15 --seconds 60 --steps 9000 --cost   # lost time at one failure per minute

Two ranks under the `deepspeed` launcher train a small ViT on scikit-learn's digits. After about every `--seconds` of
training, a random rank is killed by SIGKILL.

Without `--cost`, the losses and gradient norms of all steps and the final weights are compared with those of an
undisturbed run. With `--cost`, ranks are killed in a run under `vitrail supervise` and then in one under a restart loop
in a shell; nothing else should run on the machine. The achievable time is the number of steps times their mean
duration, plus one start per kill (the shorter of the two first starts); it leaves out the time to notice a failure, to
pause, to load and to repeat steps.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.digits_run import kill_ranks, prepare, start
from pretrain.checkpoint.history import list_checkpoints
from pretrain.checkpoint.pieces import load_weights
from pretrain.journal import read_rows

SUPERVISE = [
    str(Path(sys.executable).parent / "vitrail"),
    "supervise",
    "--max-failures",
    "99",
    "--fewer-after",
    "0",
    "--",
]


def run_with_kills(
    command: list[str], run_dir: Path, log: Path, kills: int, seconds: float
) -> tuple[list[bool], float, float]:
    """Run a command to its end while random ranks are killed.

    Args:
        command: Command of the run, without its run folder.
        run_dir: Run folder.
        log: File for the output.
        kills: Maximum number of kills.
        seconds: Mean training time between two kills, in seconds.

    Returns:
        For each kill, whether a checkpoint was being written; start and end of the command as Unix times.
    """
    started = time.time()
    process = start([*command, f"run_dir={run_dir}"], log)
    try:
        killed = kill_ranks(run_dir, process, kills, seconds, random.Random(0))
        process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return killed, started, time.time()


def compare_results(work: Path, arguments: argparse.Namespace) -> None:
    """Compare a run whose ranks are killed with an undisturbed run."""
    command = prepare(work, arguments.steps, arguments.save_every)
    undisturbed, disturbed, log = work / "undisturbed", work / "disturbed", work / "log"
    start([*command, f"run_dir={undisturbed}"], log).wait()
    killed, started, ended = run_with_kills([*SUPERVISE, *command], disturbed, log, arguments.kills, arguments.seconds)
    expected, found = read_losses(undisturbed), read_losses(disturbed)
    same = sum(expected[step] == found.get(step) for step in expected)
    weights = [load_weights(list_checkpoints(run)[-1]) for run in (undisturbed, disturbed)]
    equal = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    print(f"{len(killed)} kills, {sum(killed)} of them while a checkpoint was being written, {ended - started:.0f} s")
    print(
        f"{same} of {len(expected)} steps have bitwise the loss and gradient norm of the undisturbed run; "
        f"the final weights are {'equal' if equal else 'NOT equal'}"
    )
    print(*goodput_lines(log), sep="\n")


def measure_cost(work: Path, arguments: argparse.Namespace) -> None:
    """Kill ranks of a supervised run and of a restart loop; print which share of the achievable each reaches."""
    restarters = {
        "vitrail supervise": SUPERVISE,
        "restart loop": ["bash", "-c", 'until "$@"; do sleep 1; done', "loop"],
    }
    measured = {}
    for number, (name, words) in enumerate(restarters.items()):
        folder = work / str(number)
        command = [*words, *prepare(folder, arguments.steps, arguments.save_every)]
        killed, started, ended = run_with_kills(
            command, folder / "run", folder / "log", arguments.kills, arguments.seconds
        )
        times = [row["time"] for row in read_rows(folder / "run" / "metrics.jsonl") if "train/loss" in row]
        measured[name] = len(killed), ended - started, times[0] - started, times
        print(*goodput_lines(folder / "log"), sep="\n", flush=True)
    first_start = min(start for _, _, start, _ in measured.values())
    for name, (killed, seconds, _, times) in measured.items():
        intervals = [later - earlier for earlier, later in pairwise(times)]
        # A longer interval contains a restart.
        step_seconds = arguments.steps * statistics.mean(each for each in intervals if each < first_start / 2)
        achievable = step_seconds + (killed + 1) * first_start
        print(
            f"{name}: {killed} kills, total time {seconds:.0f} s, time in steps {step_seconds:.0f} s, "
            f"{killed + 1} starts of {first_start:.0f} s; {achievable / seconds:.1%} of the achievable"
        )


def read_losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Return the loss and gradient norm of each step."""
    found = (row for row in read_rows(run_dir / "metrics.jsonl") if "train/loss" in row)
    return {row["step"]: (row["train/loss"], row["optim/grad_norm"]) for row in found}


def goodput_lines(log: Path) -> list[str]:
    """Return the lines of the supervisor's goodput account in a log."""
    return [line for line in log.read_text(errors="replace").splitlines() if "goodput" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=15, help="number of kills")
    parser.add_argument("--seconds", type=float, default=60, help="mean seconds of training between two kills")
    parser.add_argument("--steps", type=int, default=2000, help="number of training steps")
    parser.add_argument("--save-every", type=int, default=20, help="number of steps between two checkpoints")
    parser.add_argument(
        "--cost",
        action="store_true",
        help="measure the lost time and compare it with a restart loop, instead of comparing results",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        (measure_cost if arguments.cost else compare_results)(Path(name), arguments)


if __name__ == "__main__":
    main()
