"""Worker processes: the training process is never forked, and no process outlives it."""

import ast
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

SCRIPT = Path(__file__).with_name("script_workers.py")
TIMEOUT_SECONDS = 240


@contextmanager
def script(name: str, digits: Path) -> "Iterator[subprocess.Popen[str]]":
    """Run one function of the script, which has a pipe for its answers and one for commands."""
    command = [sys.executable, str(SCRIPT), name, str(digits / "train")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def answer(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def tell(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    print(file=process.stdin, flush=True)


def assert_all_end(pids: list[int]) -> None:
    """Wait for processes that nobody here can reap: `psutil.wait_procs` polls them."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=TIMEOUT_SECONDS)
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.processes
def test_training_process_is_never_forked(digits: Path) -> None:
    with script("count_forks", digits) as process:
        found = answer(process)
        process.wait(TIMEOUT_SECONDS)
    assert found["batches"] == [10, 10, 10]
    assert found["forks"] == 0
    assert found["forks_with_fork_context"] == 1  # the count does count
    assert found["server_threads"] == 1
    assert found["worker_parents"] == [found["server"]] * 2
    assert_all_end([found["server"], found["tracker"]])


@pytest.mark.processes
@pytest.mark.parametrize("moment", ["load", "start_only"])
def test_killed_training_process_leaves_no_process_behind(digits: Path, moment: str) -> None:
    """While it loads; and before the server has imported torch."""
    with script(moment, digits) as process:
        pids = answer(process)
        assert len(pids) == (4 if moment == "load" else 2)  # server and resource tracker; two workers
        process.send_signal(signal.SIGKILL)
        assert_all_end(pids)


@pytest.mark.processes
def test_signals_to_all_processes_do_not_interrupt_loading(digits: Path) -> None:
    """A launcher or a terminal sends its signal to the workers and their server too; training still has to save."""
    with script("load", digits) as process:
        pids = answer(process)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            for pid in pids:
                psutil.Process(pid).send_signal(number)
        time.sleep(1)
        tell(process)
        assert answer(process) == {"batches": 9}
        assert process.wait(TIMEOUT_SECONDS) == 0
    assert_all_end(pids)


@pytest.mark.processes
@pytest.mark.parametrize("num_killed", [1, 2])
def test_killed_worker_is_reported(digits: Path, num_killed: int) -> None:
    with script("load", digits) as process:
        workers = [pid for pid in answer(process) if psutil.Process(pid).ppid() != process.pid]
        for pid in workers[:num_killed]:
            psutil.Process(pid).kill()
        tell(process)
        error = answer(process)["error"]
        assert re.fullmatch(r"data worker (\d+) ended unexpectedly with exit code -9; if memory ran out, .*", error)
        assert int(error.split()[2]) in workers


@pytest.mark.processes
def test_worker_killed_while_it_hands_over_a_batch_is_reported(digits: Path) -> None:
    with script("load_cut_off", digits) as process:
        assert "ended unexpectedly with exit code -9; if memory ran out, " in answer(process)["error"]


@pytest.mark.processes
def test_workers_have_current_environment_and_classes_of_the_script(digits: Path) -> None:
    with script("environment", digits) as process:
        assert answer(process) == {
            "VITRAIL_TEST": "set after the server was started",
            "threads": "3",
            "same_path": True,
        }


def forks_in(code: str) -> list[str]:
    """Return the calls of some source code that fork the process or may do so."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        call, keywords = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
        start_method = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        if (
            "preexec_fn" in keywords
            or call
            in ("os.fork", "os.forkpty", "pty.fork", "multiprocessing.Process", "multiprocessing.Pool", "Process")
            or (call.endswith("get_context") and start_method in ([], ["fork"]))
            or (call.endswith("DataLoader") and "multiprocessing_context" not in keywords)
            or (call.endswith("ProcessPoolExecutor") and len(node.args) < 2 and "mp_context" not in keywords)
        ):
            found.append(ast.unparse(node))
    return found


@pytest.mark.processes
@pytest.mark.parametrize(
    "code",
    [
        "subprocess.Popen(command, preexec_fn=ignore)",
        "os.fork()",
        "multiprocessing.get_context('fork')",
        "multiprocessing.Process(target=work)",
        "DataLoader(dataset, num_workers=2)",
        "ProcessPoolExecutor(4)",
    ],
)
def test_forks_are_found_in_code(code: str) -> None:
    assert forks_in(code)


@pytest.mark.processes
def test_no_package_forks_its_process() -> None:
    root = Path(__file__).parents[4]
    files = [
        path for package in ("pretrain", "finetune", "launch", "vitrail") for path in (root / package).rglob("*.py")
    ]
    assert len(files) > 100
    assert {str(path): found for path in files if (found := forks_in(path.read_text(encoding="utf-8")))} == {}
