"""A command that hangs is ended with all that it started, and every Python among it says where it was."""

import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.launching import Shell

REST = """
import time
def rest(): time.sleep(60)
rest()
"""
HANG = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {REST!r}], start_new_session=True)
pathlib.Path("pid").write_text(str(child.pid))
time.sleep(60)
"""


def test_nothing_outlives_its_timeout(shell: Shell, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)still running.*in rest"):
        shell([sys.executable, "-c", HANG], timeout=3)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20  # its own sleep is longer
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
