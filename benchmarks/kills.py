"""A run whose ranks are killed again and again, under `vitrail supervise`: is anything lost, and what does it cost?

    python benchmarks/kills.py --kills 50 --seconds 4 --steps 1200           # what is lost
    python benchmarks/kills.py --kills 15 --seconds 60 --steps 9000 --cost   # what it costs, with a failure a minute

Two ranks under the `deepspeed` launcher train a small ViT on scikit-learn's digits; a random rank gets SIGKILL about
every so many seconds of training. What is lost: a run that nobody disturbs is compared with it, every row of losses and
the weights. What it costs: `vitrail supervise` is disturbed, and then a shell's restart loop, on a machine that should
do nothing else. Achievable is what only the steps would take, each as long as their mean, and a start for each kill, as
long as the shorter one of the two ways' first: to notice, to pause, to load and to do steps again comes on top.
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

from benchmarks.digits_run import disturb, prepare, start
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


def run_disturbed(
    command: list[str], run_dir: Path, log: Path, kills: int, seconds: float
) -> tuple[list[bool], float, float]:
    """Train while random ranks are killed; return the kills (whether in a save), when it began and when it ended."""
    begun = time.time()
    process = start([*command, f"run_dir={run_dir}"], log)
    try:
        killed = disturb(run_dir, process, kills, seconds, random.Random(0))
        process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return killed, begun, time.time()


def what_is_lost(work: Path, arguments: argparse.Namespace) -> None:
    """Compare a disturbed run with one that nobody disturbs."""
    command = prepare(work, arguments.steps, arguments.save_every)
    whole, broken, log = work / "whole", work / "broken", work / "log"
    start([*command, f"run_dir={whole}"], log).wait()
    killed, begun, ended = run_disturbed([*SUPERVISE, *command], broken, log, arguments.kills, arguments.seconds)
    before, after = rows(whole), rows(broken)
    same = sum(before[step] == after.get(step) for step in before)
    weights = [load_weights(list_checkpoints(run)[-1]) for run in (whole, broken)]
    equal = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    print(f"{len(killed)} kills, {sum(killed)} of them while a checkpoint was written, {ended - begun:.0f} s")
    print(
        f"{same} of {len(before)} steps have bitwise the loss and norm of the undisturbed run, "
        f"the last weights are {'equal' if equal else 'NOT equal'}"
    )
    print(*goodput_of(log), sep="\n")


def what_it_costs(work: Path, arguments: argparse.Namespace) -> None:
    """Disturb a supervised run, then a restart loop; say how near each is to the achievable."""
    ways = {"vitrail supervise": SUPERVISE, "a restart loop": ["bash", "-c", 'until "$@"; do sleep 1; done', "loop"]}
    seen = {}
    for number, (way, words) in enumerate(ways.items()):
        place = work / str(number)
        command = [*words, *prepare(place, arguments.steps, arguments.save_every)]
        killed, begun, ended = run_disturbed(command, place / "run", place / "log", arguments.kills, arguments.seconds)
        times = [row["time"] for row in read_rows(place / "run" / "metrics.jsonl") if "train/loss" in row]
        seen[way] = len(killed), ended - begun, times[0] - begun, times
        print(*goodput_of(place / "log"), sep="\n", flush=True)
    first_start = min(start for _, _, start, _ in seen.values())
    for way, (killed, seconds, _, times) in seen.items():
        apart = [later - earlier for earlier, later in pairwise(times)]
        steps = arguments.steps * statistics.mean(each for each in apart if each < first_start / 2)  # else a restart
        achievable = steps + (killed + 1) * first_start
        print(
            f"{way}: {killed} kills, {seconds:.0f} s; {steps:.0f} s of steps and {killed + 1} starts of "
            f"{first_start:.0f} s: {achievable / seconds:.1%} of the achievable"
        )


def rows(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Return loss and gradient norm of every step."""
    found = (row for row in read_rows(run_dir / "metrics.jsonl") if "train/loss" in row)
    return {row["step"]: (row["train/loss"], row["optim/grad_norm"]) for row in found}


def goodput_of(log: Path) -> list[str]:
    """Return what the supervisor has said at the end."""
    return [line for line in log.read_text(errors="replace").splitlines() if "goodput" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60, help="of training between two kills, on average")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--cost", action="store_true", help="what it costs, beside a restart loop")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        (what_it_costs if arguments.cost else what_is_lost)(Path(name), arguments)


if __name__ == "__main__":
    main()
