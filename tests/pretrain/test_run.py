"""A run's folder: one run at a time, and the same one for all ranks."""

from pathlib import Path

import pytest

from pretrain.errors import UserError
from pretrain.heartbeat.beats import read_beats
from pretrain.heartbeat.watch import Watch
from pretrain.outcome import Outcome
from pretrain.run_folder import claim, find_main


def test_a_folder_into_which_another_run_trains_is_refused(tmp_path: Path) -> None:
    claim(tmp_path / "run")
    with Watch(tmp_path / "run", 0, 1) as watch:
        with pytest.raises(UserError, match=r"run: rank 0 \(process \d+ on .*\) is training into it; end that run"):
            claim(tmp_path / "run")
        watch.finish(Outcome.STOPPED)
    assert [beat.outcome for beat in read_beats(tmp_path / "run")] == ["stopped"]
    claim(tmp_path / "run")
    assert not read_beats(tmp_path / "run")


def test_what_a_crash_has_left_is_no_run(tmp_path: Path) -> None:
    claim(tmp_path)
    with Watch(tmp_path, 0, 1):
        beat = (tmp_path / "ranks" / "rank-00000.json").read_text()
    (tmp_path / "ranks" / "rank-00000.json").write_text(beat)  # as it was before its end
    claim(tmp_path)
    assert not read_beats(tmp_path)


def test_a_folder_that_is_another_one_on_each_machine_is_refused(tmp_path: Path) -> None:
    claim(tmp_path)
    with pytest.raises(UserError, match=r"is not seen by rank 0 on .*; put run_dir on a file system that all machines"):
        find_main(tmp_path, "node-1 4711")
    with pytest.raises(UserError, match="is not seen by rank 0"):
        find_main(tmp_path / "elsewhere", "node-1 4711")
