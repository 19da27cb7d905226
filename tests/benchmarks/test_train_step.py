"""The benchmark runs: what it says is for docs/benchmarks.md, not for a test."""

import json
import sys

from tests.support.launching import ROOT, Shell


def test_our_contender_takes_a_step(shell: Shell) -> None:
    benchmark = [sys.executable, ROOT / "benchmarks" / "train_step.py", "--model", "Ti/8 at 64"]
    done = shell([*benchmark, "--one", "ours eager", "--micro-batch", "2", "--steps", "1", "--warmup", "0"])
    assert done.code == 0, done.err[-3000:]
    assert json.loads(done.out.splitlines()[-1])["images_per_second"] > 0
