"""`python -m benchmarks.gpu` without a GPU: its exit codes, its limits, and a rehearsal of its groups on the CPU."""

import json
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu import __main__ as runner
from benchmarks.gpu.__main__ import Group, main
from benchmarks.gpu.checks import COLUMNS, FAILED, MISSED, OK, SKIPPED, Check, Task, judge, judge_speed, make_checks
from benchmarks.gpu.runs import OBJECTIVES, OPTIMIZERS
from benchmarks.gpu.waits import FIRST, LAST, RESULT_OF_LAST_STEP, judge_counted

PASSING = """
    from benchmarks.gpu.checks import Task, judge
    from benchmarks.gpu.group import run_group
    if __name__ == "__main__":
        run_group("", lambda place: {"sum": Task(lambda: judge(1 + 1 == 2, 2, 2)), "wrong": Task(lambda: 1 / 0)})
"""
BREAKING = "raise ValueError('cannot be imported')"
HANGING = """
    import subprocess, sys, time
    from pathlib import Path
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(__file__).with_suffix(".pid").write_text(str(child.pid))
    time.sleep(600)
"""


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four small groups in place of the real ones; one breaks, one hangs, and one needs more time than there is."""
    folder = tmp_path / "groups"
    folder.mkdir()
    for name, text in {"breaking": BREAKING, "hanging": HANGING, "passing": PASSING}.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    small = {"breaking": Group("breaking", 2), "hanging": Group("hanging", 3), "passing": Group("passing", 14)}
    monkeypatch.setattr(runner, "GROUPS", {**small, "long": Group("passing", 600)})
    monkeypatch.setattr(runner, "END_SECONDS", 1.0)
    return folder


def test_without_a_gpu_one_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "gpu.json")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("no NVIDIA GPU found: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.processes
def test_a_group_that_breaks_or_hangs_stops_no_other(
    groups: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GROUPS", {name: runner.GROUPS[name] for name in ("breaking", "hanging", "passing")})
    out = tmp_path / "results" / "gpu.json"
    assert main(["--device", "cpu", "--minutes", str(30 / 60), "--out", str(out)]) == 1
    checks = {(each["group"], each["check"]): each for each in json.loads(out.read_text())["checks"]}
    assert {name: each["verdict"] for name, each in checks.items()} == {
        ("breaking", "the process"): FAILED,
        ("hanging", "the process"): FAILED,
        ("passing", "sum"): OK,
        ("passing", "wrong"): FAILED,
    }
    assert "ValueError: cannot be imported" in checks["breaking", "the process"]["reason"]
    assert "time limit" in checks["hanging", "the process"]["reason"]
    assert checks["passing", "wrong"]["reason"].startswith("ZeroDivisionError")
    child = int((groups / "hanging.pid").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert_written_alike(out, capsys.readouterr().out)


def assert_written_alike(out: Path, printed: str) -> None:
    """Assert that the table, the JSON file and the Markdown rows contain the same results in the same order."""
    rows = [[each[column] for column in COLUMNS] for each in json.loads(out.read_text())["checks"]]
    table = printed.splitlines()[1 : len(rows) + 1]
    markdown = out.with_suffix(".md").read_text().splitlines()[-len(rows) :]
    for row, line, cells in zip(rows, table, markdown, strict=True):
        assert line.split() == " ".join(row).split()
        assert [cell.strip() for cell in cells.strip("|").split("|")] == row


@pytest.mark.processes
def test_a_group_that_does_not_fit_into_the_time_is_skipped_with_the_reason(groups: Path, tmp_path: Path) -> None:
    assert runner.run_groups({"long": runner.GROUPS["long"]}, "cpu", 60.0, tmp_path / "work") == [
        Check(SKIPPED, check="all", group="long", reason="needs 600 s, 60 s of --minutes are left")
    ]


def test_a_check_that_fails_fails_alone_and_one_without_time_is_skipped() -> None:
    def wait() -> Check:
        time.sleep(0.2)
        return judge(True, "", "")

    written: list[Check] = []
    tasks = {"wrong": Task(lambda: 1 // 0), "slow": Task(wait), "late": Task(wait, seconds=9.95)}  # type: ignore[arg-type, return-value]
    make_checks("some", tasks, 10.0, written.append)
    assert [(each.group, each.check, each.verdict) for each in written] == [
        ("some", "wrong", FAILED),
        ("some", "slow", OK),
        ("some", "late", SKIPPED),
    ]


def test_a_bar_that_is_not_reached_is_missed() -> None:
    assert judge_speed(1.1, 1.1).verdict == OK
    assert judge_speed(1.09, 1.1).verdict == MISSED
    assert judge_speed(float("nan"), 1.1).verdict == MISSED


def test_waits_of_ours_and_a_blind_counter_fail() -> None:
    expected = [RESULT_OF_LAST_STEP] * (LAST - FIRST + 1)
    assert judge_counted(expected, {RESULT_OF_LAST_STEP}).verdict == OK
    assert judge_counted([*expected, "a wait"], {RESULT_OF_LAST_STEP}).reason == "a wait"
    assert judge_counted([], {RESULT_OF_LAST_STEP}).verdict == FAILED


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", ["waits", "right"])  # what "alive" checks, tests/pretrain/heartbeat tests too
def test_rehearsal_on_the_cpu(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    code = main(["--device", "cpu", "--only", name, "--out", str(out)])
    checks = json.loads(out.read_text())["checks"]
    assert code == 0, capsys.readouterr()
    assert len(checks) >= 3
    assert {each["verdict"] for each in checks} == {OK}


@pytest.mark.gpu
@pytest.mark.processes
def test_no_step_waits_for_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert main(["--only", "waits", "--out", str(out)]) == 0
    checks = json.loads(out.read_text())["checks"]
    assert len(checks) >= len(OBJECTIVES) * len(OPTIMIZERS)
    assert {each["verdict"] for each in checks} == {OK}
