"""A flag that the ranks agree on is known one call later, and reading it waits for the copy of that call only."""

import pytest
import torch

from pretrain.delayed_flag import DelayedFlag
from pretrain.device_copies import HostCopy


def test_a_flag_is_known_one_call_later() -> None:
    flag = DelayedFlag(torch.device("cpu"))
    assert [flag.any_over_ranks(value) for value in (True, False, False, True, True)] == [
        False,
        True,
        False,
        False,
        True,
    ]


def test_only_the_copy_of_the_previous_call_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of a call begins before the previous one is read, so the device always has something to do."""
    calls: list[str] = []

    class RecordedCopy(HostCopy):
        def __init__(self, values: torch.Tensor) -> None:
            super().__init__(values)
            self.number = sum(call.startswith("copy") for call in calls)
            calls.append(f"copy {self.number}")

        def read(self) -> torch.Tensor:
            calls.append(f"read {self.number}")
            return super().read()

    monkeypatch.setattr("pretrain.delayed_flag.HostCopy", RecordedCopy)
    flag = DelayedFlag(torch.device("cpu"))
    for _ in range(3):
        flag.any_over_ranks(False)
    assert calls == ["copy 0", "copy 1", "read 0", "copy 2", "read 1"]
