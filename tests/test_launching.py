"""A command that hangs is ended with all that it started, and every Python process among it prints its stacks."""

import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.launching import Limits, Shell

SLEEP = """
import time
def sleep_here(): time.sleep(60)
sleep_here()
"""
START_AND_SLEEP = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
pathlib.Path("pid").write_text(str(child.pid))
time.sleep(60)
"""
SPIN = "while True: pass"
PRINT = "import time\nfor i in range(40): print(i, flush=True); time.sleep(0.1)"


def test_a_command_without_output_and_cpu_time_is_ended_with_all_that_it_started(shell: Shell, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)no output and no CPU time.*in sleep_here"):
        shell([sys.executable, "-c", START_AND_SLEEP], Limits(idle_seconds=3))
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20  # its own sleep is longer
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_command_that_computes_without_output_is_ended(shell: Shell) -> None:
    with pytest.raises(AssertionError, match=r"(?s)no output during \d+ s of CPU time.*File \"<string>\", line 1"):
        shell([sys.executable, "-c", SPIN], Limits(silent_cpu_seconds=1.5))


def test_a_command_that_writes_may_take_longer_than_it_may_be_idle(shell: Shell) -> None:
    done = shell([sys.executable, "-c", PRINT], Limits(idle_seconds=3))
    assert (done.code, done.out.split()[-1]) == (0, "39")
    with pytest.raises(AssertionError, match="still running after"):
        shell([sys.executable, "-c", PRINT], Limits(seconds=1))


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
