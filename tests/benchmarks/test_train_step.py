"""The benchmark of a training step: it records real steps, and a contender that fails has a row of its own.

What the numbers are is for docs/benchmarks.md, not for a test.
"""

import json
import sys

import pytest

from benchmarks import train_step
from benchmarks.recording import Measurement
from benchmarks.train_step import Result
from tests.support.launching import ROOT, Shell

BENCHMARK = [sys.executable, ROOT / "benchmarks" / "train_step.py", "--model", "Ti/8 at 64"]
FEW_STEPS = ["--micro-batch", "2", "--steps", "1", "--warmup", "1", "--rounds", "1"]
RESULT_OF_LAST_STEP = "copy to the host in pretrain/health.py:flush"
MEASURED = Measurement(
    images_per_second=20.0,
    peak_memory_gb=1.0,
    step_milliseconds=100.0,
    cpu_milliseconds_per_image=50.0,
    host_waits=[],
    operations=400,
    kernels=None,
    joules_per_image=None,
)


def test_a_failing_contender_leaves_the_others_their_rows(shell: Shell) -> None:
    library = shell.folder / "libraries" / "timm"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("raise RuntimeError('broken on purpose')")
    command = [*BENCHMARK, *FEW_STEPS, "--contenders", "timm eager", "ours eager", "--json", shell.folder / "out.json"]
    done = shell(command, PYTHONPATH=str(library.parent))
    assert done.code == 0, done.err[-3000:]
    timm, ours = done.out.splitlines()[-2:]
    assert timm.startswith("| timm eager | failed: RuntimeError: broken on purpose |")
    assert ours.startswith("| ours eager | ")
    content = json.loads((shell.folder / "out.json").read_text())
    assert content["failures"] == {"timm eager": "RuntimeError: broken on purpose"}
    [found] = content["figures"]["ours eager"]
    assert found["images_per_second"] > 0
    assert found["host_waits"] == [RESULT_OF_LAST_STEP]
    assert 400 < found["operations"] < 700


def test_ratios_are_relative_to_the_baseline() -> None:
    rounds = [MEASURED, MEASURED, MEASURED]
    results = {"timm compiled": Result(rounds), "ours compiled": Result(rounds), "ours eager": Result([], "no memory")}
    header, _, timm, ours, failed = train_step.table("S/16", 1e12, results).splitlines()
    assert "relative to timm compiled" in header
    assert "energy" not in header
    assert "1.00x" in timm
    assert "20.0 (20.0, 20.0)" in ours
    assert failed.startswith("| ours eager | failed: no memory |")
    assert {line.count("|") for line in (header, timm, ours, failed)} == {header.count("|")}


def test_without_the_baseline_there_is_no_ratio() -> None:
    results = {"timm compiled": Result([], "no memory"), "ours compiled": Result([MEASURED])}
    assert "relative" not in train_step.table("S/16", 1e12, results)


@pytest.mark.parametrize(("failing", "code"), [("ours compiled", 1), ("timm compiled", 0)])
def test_the_exit_code_is_that_of_ours(failing: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {name: Result([MEASURED]) for name in ("timm compiled", "ours compiled")}
    results[failing] = Result([], "no memory")
    monkeypatch.setattr(sys, "argv", ["train_step.py"])
    monkeypatch.setattr(train_step, "compare", lambda arguments: results)
    monkeypatch.setattr(train_step, "matmul_peak", lambda: 1e12)
    assert train_step.main() == code


@pytest.mark.processes
def test_a_process_that_takes_too_long_has_failed_and_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        train_step, "contender_command", lambda name: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    result = Result()
    train_step.measure_in_process("ours eager", result, timeout=1.0)
    assert result.failure == "no result after 1 s"


def test_the_reason_of_a_failure_is_the_line_of_the_exception() -> None:
    errors = "Traceback ...\ntorch.OutOfMemoryError: out of memory\n[rank0] warning: not destroyed\n"
    assert train_step.last_error(errors, 1) == "torch.OutOfMemoryError: out of memory"
    assert train_step.last_error("", -9) == "exit code -9"


def test_quick_changes_defaults_only() -> None:
    quick = train_step.parse_arguments(["--quick", "--rounds", "5"])
    assert quick.contenders == ["timm compiled", "ours compiled", "transformers compiled"]
    assert quick.rounds == 5
    assert quick.steps < train_step.parse_arguments([]).steps
