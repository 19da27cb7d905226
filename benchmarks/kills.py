"""A run whose ranks are killed again and again, under `tessera supervise`: is anything lost, and what does it cost?

    python benchmarks/kills.py --kills 50 --seconds 4 --steps 1200   # what is lost: random ranks, at random moments
    python benchmarks/kills.py --kills 15 --seconds 60 --plain       # what it costs: a failure a minute, goodput

Two ranks under the `deepspeed` launcher train a small ViT on scikit-learn's digits; a random rank gets SIGKILL about
every so many seconds of training. A run that nobody disturbs is compared with it: every row of losses, the weights, and
the time. Achievable is the undisturbed run's time and, for each kill, the time that it needed to start.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.digits_run import disturb, prepare, start
from pretrain.checkpoint.history import list_checkpoints
from pretrain.checkpoint.pieces import load_weights
from pretrain.watch import read_beat


def rows(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Return loss and gradient norm of every step."""
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: (row["train/loss"], row["optim/grad_norm"]) for row in lines if "train/loss" in row}


def run_whole(command: list[str], run_dir: Path, log: Path) -> tuple[float, float]:
    """Train without being disturbed; return the seconds it took, and those of them before and after the training."""
    begun = time.monotonic()
    start([*command, f"run_dir={run_dir}"], log).wait()
    took = time.monotonic() - begun
    beat = read_beat(run_dir, 0)
    assert beat is not None, log.read_text(errors="replace")[-3000:]
    return took, took - sum(beat.seconds.values())


def run_disturbed(command: list[str], run_dir: Path, log: Path, kills: int, seconds: float) -> tuple[int, float]:
    """Train while random ranks are killed; return how many were, and the seconds it took."""
    begun = time.monotonic()
    process = start([*command, f"run_dir={run_dir}"], log)
    try:
        killed = disturb(run_dir, process, kills, seconds, random.Random(0))
        process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return killed, time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60, help="of training between two kills, on average")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--plain", action="store_true", help="the same in a shell's restart loop, beside")
    arguments = parser.parse_args()
    supervise = [str(Path(sys.executable).parent / "tessera"), "supervise", "--max-failures", "99"]
    ways = {"tessera supervise": [*supervise, "--fewer-after", "0", "--"]}
    if arguments.plain:
        ways["a restart loop"] = ["bash", "-c", 'until "$@"; do sleep 1; done', "loop"]
    with tempfile.TemporaryDirectory() as name:
        work, log = Path(name), Path(name) / "log"
        command = prepare(work, arguments.steps, arguments.save_every)
        whole = work / "whole"
        took, aside = run_whole(command, whole, log)
        before, weights = rows(whole), load_weights(list_checkpoints(whole)[-1])
        print(f"undisturbed: {took:.0f} s, {aside:.0f} s of them to start and to end")
        for number, (way, words) in enumerate(ways.items()):
            broken = work / f"broken-{number}"
            killed, seconds = run_disturbed([*words, *command], broken, log, arguments.kills, arguments.seconds)
            after, last = rows(broken), load_weights(list_checkpoints(broken)[-1])
            same = sum(before[step] == after.get(step) for step in before)
            equal = all(torch.equal(weights[name], last[name]) for name in weights)
            achievable = took + killed * aside
            print(f"{way}: {killed} kills, {seconds:.0f} s, {achievable / seconds:.1%} of the achievable")
            print(
                f"{same} of {len(before)} steps have bitwise the loss and norm of the undisturbed run, "
                f"the last weights are {'equal' if equal else 'NOT equal'}"
            )
        print(*(line for line in log.read_text(errors="replace").splitlines() if "goodput" in line), sep="\n")


if __name__ == "__main__":
    main()
