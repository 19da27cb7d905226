"""Quarantine: each bad sample once, also after a resume; and the limits that end a run with a report."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import FaultBudget
from pretrain.data.loading.loader import VALIDATION_POSITION, BadSample
from pretrain.data.loading.quarantine import Quarantine
from pretrain.errors import DataError
from pretrain.journal import read_rows


def fault(position: int, shard: str = "a.tar") -> BadSample:
    return BadSample(position, shard, f"key{position}", "damaged: its checksum is off")


def ledger(folder: Path, resume: int = 0, **budget: float) -> Quarantine:
    return Quarantine(folder / "quarantine.jsonl", FaultBudget(**budget), resume, writes=True)  # type: ignore[arg-type]


def read_quarantine(path: Path) -> list[BadSample]:
    return [BadSample(**row) for row in read_rows(path)]


def test_bad_sample_is_written_once(tmp_path: Path) -> None:
    quarantine = ledger(tmp_path)
    quarantine.add([fault(7), fault(3)])
    quarantine.add([fault(7), fault(VALIDATION_POSITION)])
    assert read_quarantine(quarantine.path) == [fault(3), fault(7), fault(VALIDATION_POSITION)]
    assert len(quarantine) == 2


def test_resume_removes_rows_after_the_resume_position(tmp_path: Path) -> None:
    ledger(tmp_path).add([fault(3), fault(7)])
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"position": 9, "sha')  # killed in the middle of a line
    resumed = ledger(tmp_path, resume=5)
    assert read_quarantine(resumed.path) == [fault(3)]
    resumed.add([fault(7)])
    assert read_quarantine(resumed.path) == [fault(3), fault(7)]
    reader = Quarantine(resumed.path, FaultBudget(), 5, writes=False)
    reader.add([fault(8)])
    assert len(reader) == 2
    assert read_quarantine(resumed.path) == [fault(3), fault(7)]


def test_too_many_bad_samples_end_the_run_with_a_report(tmp_path: Path) -> None:
    quarantine = ledger(tmp_path, max_bad_fraction=0.01)
    quarantine.add(fault(2 * i, "b.tar") for i in range(10))
    quarantine.check(500)  # 10 of the first 1,000 are allowed
    quarantine.add([fault(100)])
    quarantine.check(2000)
    with pytest.raises(DataError) as caught:
        quarantine.check(1050)
    assert str(caught.value).splitlines() == [
        "11 of 1050 samples could not be used, more than data.max_bad_fraction=0.01 allows",
        "  10 in b.tar, for example key18: damaged: its checksum is off",
        "  1 in a.tar, for example key100: damaged: its checksum is off",
        f"{quarantine.path} lists all of them; repair the data, or raise the limit in the config",
    ]


def test_too_many_bad_samples_in_a_row_end_the_run(tmp_path: Path) -> None:
    quarantine = ledger(tmp_path, max_bad_consecutive=4)
    quarantine.add(fault(i) for i in [1, 2, 3, 4, 6, 7])
    quarantine.check(10**6)
    quarantine.add([fault(5)])
    with pytest.raises(DataError, match=r"7 samples in a row .* data.max_bad_consecutive=4 allows"):
        quarantine.check(10**6)


@given(st.sets(st.integers(0, 40)), st.integers(1, 10))
def test_longest_run_equals_a_simple_count(positions: set[int], limit: int) -> None:
    quarantine = Quarantine(Path("nowhere"), FaultBudget(max_bad_consecutive=limit), 0, writes=False)
    quarantine.add(map(fault, positions))
    pattern = "".join("x" if i in positions else " " for i in range(41))
    if max(map(len, pattern.split(" "))) > limit:
        with pytest.raises(DataError, match="in a row"):
            quarantine.check(10**6)
    else:
        quarantine.check(10**6)
