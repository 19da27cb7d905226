"""The progress line: its text, what other ranks print, and when the bottleneck is printed again."""

import pytest

from pretrain.tracking.progress import ProgressLine, duration, summary

ROW = {"train/loss": 0.51234, "speed/images_per_second": 812.4, "data/wait_fraction": 0.034}


def test_metrics_are_printed_as_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLine(100, 10, enabled=True).print_metrics(ROW, 100)
    assert capsys.readouterr().out == "step 100/100  loss 0.5123  812 images/s  waiting for data 3%  ETA 0:00:00\n"


def test_a_row_without_a_loss_says_that_all_steps_were_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    row = {name: value for name, value in ROW.items() if name != "train/loss"}
    ProgressLine(100, 10, enabled=True).print_metrics(row, 20)
    assert capsys.readouterr().out.startswith("step 20/100  all steps skipped  812 images/s")


def test_other_ranks_print_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressLine(100, 10, enabled=False)
    progress.print_metrics(ROW, 100)
    progress.print_message("silent")
    progress.print_bottleneck("input-bound")
    progress.print_warning("disk full")
    assert capsys.readouterr() == ("", "disk full\n")


def test_a_bottleneck_is_printed_only_when_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressLine(100, 10, enabled=True)
    for bottleneck in (None, "input-bound 19%", "input-bound 7%", None, None):
        progress.print_bottleneck(bottleneck)
    assert capsys.readouterr().out == "input-bound 19%\nno longer input-bound\n"


def test_the_first_step_is_announced_and_does_not_count_for_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = ProgressLine(100, 10, enabled=True)
    progress.begin_first_step(compiles=True)
    now = 90.0  # seconds of compilation
    progress.end_step()
    progress.print_metrics(ROW, 11)
    now = 100.0
    progress.end_step()
    progress.print_metrics(ROW, 31)  # twenty steps in ten seconds
    compiling, first, *rows = capsys.readouterr().out.splitlines()
    assert compiling == "compiling the model in the first step; this can take some minutes ..."
    assert first == "first step after 90.0 s"
    assert [row.rpartition("  ")[2] for row in rows] == ["ETA unknown", "ETA 0:00:34"]
    progress.begin_first_step(compiles=False)
    assert not capsys.readouterr().out


def test_a_summary_aligns_its_facts() -> None:
    assert summary("done", {"metrics": "a", "next": "b"}) == "done\n  metrics  a\n  next     b"


def test_duration_has_hours_minutes_and_seconds() -> None:
    assert duration(3_725.4) == "1:02:05"
    assert duration(90_000.0) == "1 day, 1:00:00"
