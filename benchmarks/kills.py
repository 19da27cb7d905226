"""A run whose ranks are killed again and again, under `tessera supervise`: is anything lost, and what does it cost?

    python benchmarks/kills.py --kills 50 --seconds 4          # what is lost: random ranks, at random moments
    python benchmarks/kills.py --kills 15 --seconds 60         # what it costs: goodput, a failure a minute
    python benchmarks/kills.py --kills 15 --seconds 60 --plain # the same in a shell's restart loop around `deepspeed`

Two ranks under the `deepspeed` launcher train a small ViT on scikit-learn's digits; a random rank gets SIGKILL about
every so many seconds of training. A run that nobody disturbs is compared with it: every row of losses, and the weights.
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


def rows(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Return loss and gradient norm of every step."""
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: (row["train/loss"], row["optim/grad_norm"]) for row in lines if "train/loss" in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60, help="of training between two kills, on average")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--plain", action="store_true", help="no supervisor: start the command again when it ends")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        command = prepare(work, arguments.steps, arguments.save_every)
        whole, broken = work / "whole", work / "broken"
        start([*command, f"run_dir={whole}"], work / "log").wait()

        supervise = [str(Path(sys.executable).parent / "tessera"), "supervise", "--max-failures", "99"]
        supervise += ["--fewer-after", "0", "--"]
        loop = ["bash", "-c", 'until "$@"; do sleep 1; done', "loop"]
        begun = time.monotonic()
        process = start([*(loop if arguments.plain else supervise), *command, f"run_dir={broken}"], work / "log")
        try:
            killed = disturb(broken, process, arguments.kills, arguments.seconds, random.Random(0))
            process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        took = time.monotonic() - begun
        before, after = rows(whole), rows(broken)
        same = sum(before[step] == after.get(step) for step in before)
        weights = [load_weights(list_checkpoints(run)[-1]) for run in (whole, broken)]
        equal = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        print(
            f"{killed} kills, exit code {process.returncode}, {took:.0f} s, "
            f"{'a restart loop' if arguments.plain else 'tessera supervise'}"
        )
        print(
            f"{same} of {len(before)} steps have bitwise the loss and norm of the undisturbed run, "
            f"the last weights are {'equal' if equal else 'NOT equal'}"
        )
        said = [line for line in (work / "log").read_text(errors="replace").splitlines() if "goodput" in line]
        print("\n".join(said))


if __name__ == "__main__":
    main()
