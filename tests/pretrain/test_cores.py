"""The cores of a process are limited by its affinity and by a container's quota."""

import os
from pathlib import Path

import pytest

from pretrain import cores


@pytest.mark.parametrize(("quota", "expected"), [("max 100000\n", 8), ("250000 100000\n", 2), ("20000 100000\n", 1)])
def test_a_quota_limits_the_cores(quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "CPU_QUOTA", tmp_path / "cpu.max")
    assert cores.available_cores() == 8
    (tmp_path / "cpu.max").write_text(quota)
    assert cores.available_cores() == expected
