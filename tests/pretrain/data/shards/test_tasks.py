"""Tasks in several processes: ordered results, original errors, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from pretrain.data.shards import tasks
from pretrain.data.shards.tasks import run_tasks, run_tasks_in_threads, run_tasks_on_ray
from tests.support.launching import wait_for
from tests.support.tasks import note_and_sleep


def late_square(number: int) -> int:
    time.sleep(0.05 * (number % 3))
    return number * number


def fail_at_3(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("num_workers", [1, 3])
def test_results_keep_the_order_of_the_tasks(num_workers: int) -> None:
    assert list(run_tasks(late_square, iter(range(20)), num_workers)) == [i * i for i in range(20)]


def test_error_reaches_the_caller_and_ends_the_workers() -> None:
    results = run_tasks(fail_at_3, range(1000), 2)
    with pytest.raises(ValueError, match="three"):
        list(results)
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_killed_worker_is_reported() -> None:
    with pytest.raises(ChildProcessError, match="a worker process died, possibly because memory ran out"):
        list(run_tasks(die, range(3), 2))


def test_closing_the_generator_does_not_wait(tmp_path: Path) -> None:
    results = run_tasks(partial(note_and_sleep, tmp_path), range(-1, 5), 2)
    started = time.monotonic()
    results.close()  # nothing has started before the first result is requested
    assert time.monotonic() - started < 5


@pytest.mark.processes
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    code = f"""
if __name__ == "__main__":
    from functools import partial
    from pathlib import Path
    from pretrain.data.shards.tasks import run_tasks
    from tests.support.tasks import note_and_sleep
    list(run_tasks(partial(note_and_sleep, Path({str(tmp_path)!r})), range(9), 2))
"""
    script = tmp_path.parent / f"{tmp_path.name}.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        workers = [int(path.name) for path in tmp_path.iterdir()]
        parent.send_signal(how)
        parent.wait(300)
        wait_for(lambda: not any(psutil.pid_exists(worker) for worker in workers), 50)  # their own sleep is longer
    finally:
        parent.kill()


def test_threads_report_that_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "WAIT_SECONDS", 0.01)
    waits: list[int] = []
    assert list(run_tasks_in_threads(late_square, range(10), 3, lambda: waits.append(1))) == [i * i for i in range(10)]
    assert waits
    with pytest.raises(ValueError, match="three"):
        list(run_tasks_in_threads(fail_at_3, range(1000), 2))


def test_missing_ray_is_reported_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Exception, match=r"--engine ray needs Ray: pip install 'vitrail\[ray\]'"):
        list(run_tasks_on_ray(late_square, range(3)))
