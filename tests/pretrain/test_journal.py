"""Rows survive a crash, a rollback to an earlier step, and a full disk."""

from pathlib import Path

import pytest

from pretrain.errors import MachineError
from pretrain.journal import Journal, read_rows
from tests.support.disk import full_disk


def journal(path: Path, last: int = 99, *, writes: bool = True) -> Journal:
    return Journal(path, lambda row: row["step"] <= last, writes=writes)


def test_rows_after_the_resumed_step_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    journal(path).add({"step": step, "name": "é"} for step in (1, 2, 3))
    with path.open("a") as file:
        file.write('{"step": 4, "na')  # killed in the middle of a line
    again = journal(path, last=2)
    assert again.kept == [{"step": 1, "name": "é"}, {"step": 2, "name": "é"}]
    again.add([{"step": 3, "name": "e"}])
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def test_only_the_writing_rank_changes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    journal(path, writes=False).add([{"step": 1}])
    assert not path.exists()
    journal(path).add([{"step": 1}, {"step": 2}])
    assert journal(path, last=1, writes=False).kept == [{"step": 1}]
    assert len(read_rows(path)) == 2


@pytest.mark.parametrize("room", range(14, 40, 3))
def test_rows_that_a_full_disk_rejected_are_written_later(
    tmp_path: Path, room: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = journal(path)
    rows.add([{"step": 1}])
    with full_disk(room):
        for step in (2, 3, 4):
            rows.add([{"step": step}])
            assert [row["step"] for row in read_rows(path)] == list(range(1, len(read_rows(path)) + 1))
            assert path.read_bytes().endswith(b"\n")  # no partial row is left
        assert len(read_rows(path)) < 4
    [message] = capsys.readouterr().err.splitlines()  # one for all failures
    expected = f"{path}: File too large; the run continues and keeps the rows in memory until a write succeeds"
    assert message == expected
    rows.add([])
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]


def test_a_full_disk_is_named_if_rows_must_be_removed(tmp_path: Path) -> None:
    journal(tmp_path / "rows.jsonl").add({"step": step} for step in range(20))
    with (
        full_disk(100),
        pytest.raises(MachineError, match=r"rows\.jsonl: cannot be rewritten \(File too large\); "),
    ):
        journal(tmp_path / "rows.jsonl", last=15)
    assert len(read_rows(tmp_path / "rows.jsonl")) == 20
