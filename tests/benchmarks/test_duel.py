"""A duel of a few steps: both sides learn, and what was measured is not measured again."""

import json
import sys

import pytest

from benchmarks import duel
from tests.support.launching import ROOT, Shell


def test_both_sides_learn(shell: Shell) -> None:
    results = shell.folder / "results.jsonl"
    command = [sys.executable, ROOT / "benchmarks" / "duel.py", "--objective", "mae", "--seeds", "0", "--batch", "8"]
    command += ["--steps", "12", "--results", results]
    done = shell(command)
    assert done.code == 0, done.err[-3000:]
    [row] = [json.loads(line) for line in results.read_text().splitlines()]
    assert 0 < row["ours"] < 1.2
    assert row["theirs"] == pytest.approx(row["ours"], abs=1e-3)
    assert row["ratio"] > 0
    again = shell(command)
    assert again.out == done.out
    assert len(results.read_text().splitlines()) == 1


def test_quick_changes_defaults_only() -> None:
    assert duel.parse_arguments(["--quick"]).seeds == [0]
    assert duel.parse_arguments(["--quick"]).steps < duel.parse_arguments([]).steps
    assert duel.parse_arguments(["--quick", "--steps", "300"]).steps == 300
