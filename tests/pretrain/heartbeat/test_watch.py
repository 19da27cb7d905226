"""Ranks that hang, lag or are silent are reported within ten seconds with their stack, and no other ranks are."""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from pretrain.heartbeat.beats import ABORT, STOP, read_beat, write_order
from pretrain.heartbeat.diagnosis import SILENT_SECONDS
from pretrain.heartbeat.watch import (
    LEAVE_SECONDS,
    LEAVE_SECONDS_ENDING,
    LEAVE_SECONDS_SAVING,
    SAVE_THREAD,
    Watch,
    recent,
)
from tests.support.launching import wait_for

REPORTED_WITHIN = 60.0  # seconds, on a busy machine; benchmarks/watching.py measures that ten are enough on a quiet one
WORLD_SIZE = 3


def train_forever(
    run_dir: Path, rank: int, barrier: Any, reported: Any, slow: bool, hang_at: int, hang_seconds: float
) -> None:
    """Act as a rank: do its own work, then wait for the other ranks, as a collective does."""
    report = lambda sentence: reported.put((rank, sentence))  # noqa: E731
    with Watch(run_dir, rank, WORLD_SIZE, report=report, hang_seconds=hang_seconds) as watch:
        for step in range(100_000):
            watch.enter("data", step)
            time.sleep(0.005)
            watch.enter("forward")
            time.sleep(0.06 if slow else 0.02)
            if step == hang_at:
                sleep_in_this_function()
            watch.enter("backward")
            barrier.wait()


def sleep_in_this_function() -> None:
    time.sleep(1000)


@contextmanager
def ranks(run_dir: Path, slow: int = -1, hangs: int = -1, hang_seconds: float = 0.0) -> Iterator[tuple[list[Any], Any]]:
    """Start three ranks; yield their processes and the queue of what they report."""
    context = multiprocessing.get_context("fork")
    barrier, reported = context.Barrier(WORLD_SIZE), context.Queue()
    arguments = [
        (run_dir, rank, barrier, reported, rank == slow, 60 if rank == hangs else -1, hang_seconds)
        for rank in range(WORLD_SIZE)
    ]
    processes = [context.Process(target=train_forever, args=each, daemon=True) for each in arguments]
    try:
        for process in processes:
            process.start()
        wait_for(lambda: all((beat := read_beat(run_dir, rank)) and beat.step > 20 for rank in range(WORLD_SIZE)))
        yield processes, reported
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.processes
@pytest.mark.parametrize("victim", [0, 2])
def test_stopped_rank_is_reported_with_its_stack(tmp_path: Path, victim: int) -> None:
    with ranks(tmp_path) as (processes, reported):
        for _ in range(2):  # the second stop must be reported again
            os.kill(processes[victim].pid, signal.SIGSTOP)
            rank, sentence = reported.get(timeout=REPORTED_WITHIN)
            assert rank == (1 if victim == 0 else 0)  # the lowest rank that is alive
            assert sentence.startswith(f"rank {victim} (process {processes[victim].pid} on ")
            assert "is silent: no heartbeat for" in sentence
            assert "in train_forever" in sentence
            os.kill(processes[victim].pid, signal.SIGCONT)
            stopped_at = read_beat(tmp_path, victim)
            wait_for(lambda at=stopped_at: read_beat(tmp_path, victim).num_beats > at.num_beats + 2)


@pytest.mark.processes
def test_slow_rank_is_reported(tmp_path: Path) -> None:
    with ranks(tmp_path, slow=1) as (_, reported):
        rank, sentence = reported.get(timeout=REPORTED_WITHIN)
    assert rank == 0
    assert sentence.startswith("rank 1 ")
    assert " lags: 0.0" in sentence


@pytest.mark.processes
def test_hanging_rank_is_reported_and_ends_the_run(tmp_path: Path) -> None:
    with ranks(tmp_path, hangs=2, hang_seconds=3.0) as (processes, reported):
        rank, sentence = reported.get(timeout=REPORTED_WITHIN + 10)  # it hangs some seconds after the start
        assert (rank, sentence.split(" (")[0]) == (0, "rank 2")
        assert "hangs: " in sentence
        assert "sleep_in_this_function" in sentence
        processes[0].join(timeout=120)
        assert processes[0].exitcode == 1


@pytest.mark.processes
@pytest.mark.parametrize(("order", "code"), [(STOP, -signal.SIGTERM), (ABORT, 1)])
def test_order_reaches_every_rank(tmp_path: Path, order: str, code: int) -> None:
    """A supervisor cannot send signals to another machine, so it writes orders."""
    with ranks(tmp_path) as (processes, _):
        write_order(tmp_path, order)
        for process in processes:
            process.join(timeout=120)
        assert [process.exitcode for process in processes] == [code] * WORLD_SIZE


@pytest.mark.processes
def test_healthy_ranks_are_not_reported_after_a_suspension(tmp_path: Path) -> None:
    """If Slurm suspends all processes, or a laptop sleeps, no rank counts as silent."""
    with ranks(tmp_path, hang_seconds=1.0) as (processes, reported):
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                os.kill(process.pid, number)
            time.sleep(SILENT_SECONDS + 3)
        assert reported.empty()
        assert all(process.is_alive() for process in processes)


def test_heartbeat_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    """Otherwise a rank that is stopped during a write would not be reported."""
    with Watch(tmp_path, 0, 1) as watch:
        reader = threading.Thread(target=lambda: [missed.append(read_beat(tmp_path, 0) is None) for _ in range(1000)])
        missed: list[bool] = []
        reader.start()
        while reader.is_alive():
            watch.enter("a longer name" if watch._num_beats % 2 else "data")
            watch._beat()
    assert not any(missed)


def test_fewer_steps_are_timed_if_they_are_long() -> None:
    assert recent([0.1] * 8) == [0.1] * 8
    assert recent([1.0] * 6 + [3.0] * 2) == [3.0, 3.0, 1.0]
    assert recent([0.5] * 8) == [0.5] * 4


@pytest.mark.slow
def test_errors_of_the_watch_thread_are_reported_and_do_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[str] = []
    with Watch(tmp_path, 0, 1, report=reported.append):
        monkeypatch.setattr("pretrain.heartbeat.watch.read_order", lambda _: 1 / 0)
        wait_for(lambda: len(reported) >= 2)
        monkeypatch.undo()
        monkeypatch.setattr("pretrain.heartbeat.watch.write_beat", fail_to_write)
        wait_for(lambda: "cannot write its heartbeat" in reported[-1])
        monkeypatch.undo()
    expected = "rank 0: error in the watch thread, which continues: ZeroDivisionError('division by zero')"
    assert reported[:2] == [expected] * 2
    assert reported[-1].endswith("rank 0: cannot write its heartbeat: [Errno 28] No space left on device")
    assert read_beat(tmp_path, 0).has_ended


def fail_to_write(run_dir: Path, beat: object) -> None:
    raise OSError(28, "No space left on device")


class Event:
    """An event of a GPU that has failed: every use raises the same error again."""

    broken = False
    threads: set[int] = set()  # noqa: RUF012

    def __init__(self, enable_timing: bool) -> None:
        self._use()

    def record(self) -> None:
        self._use()

    def query(self) -> bool:
        self._use()
        return True

    def elapsed_time(self, other: "Event") -> float:
        self._use()
        return 20.0

    def _use(self) -> None:
        Event.threads.add(threading.get_ident())
        if Event.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[Event]:
    """Replace the events of the GPU, and return their class."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "broken", False)
    monkeypatch.setattr(Event, "threads", set())
    return Event


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_rank_whose_gpu_failed_reports_its_failure(tmp_path: Path, gpu: type[Event], phase: str) -> None:
    with pytest.raises(ValueError, match="the error of the step"), Watch(tmp_path, 0, 1, on_gpu=True) as watch:
        watch.enter("forward", 3)
        watch.enter(phase)
        gpu.broken = True
        raise ValueError("the error of the step")
    beat = read_beat(tmp_path, 0)
    assert (beat.outcome, beat.step, beat.phase) == ("failed", 3, "end")


def test_error_of_the_gpu_in_a_step_is_not_hidden(tmp_path: Path, gpu: type[Event]) -> None:
    with pytest.raises(RuntimeError, match="CUDA error"), Watch(tmp_path, 0, 1, on_gpu=True) as watch:
        watch.enter("forward", 3)
        gpu.broken = True
        watch.enter("backward")
    assert read_beat(tmp_path, 0).outcome == "failed"


@pytest.mark.slow
def test_heartbeats_go_on_while_the_main_thread_waits_in_c(tmp_path: Path, gpu: type[Event]) -> None:
    """As in a wait for the GPU, which also releases Python's lock. The watch itself calls nothing of torch."""
    called: list[str] = []

    def note_call(frame: FrameType, event: str, argument: object) -> None:
        called.append(frame.f_code.co_filename if event == "call" else str(getattr(argument, "__module__", "")))

    threading.setprofile(note_call)
    try:
        watch = Watch(tmp_path, 0, 1, on_gpu=True)
    finally:
        threading.setprofile(None)
    with watch:
        for step in range(3):
            watch.enter("forward", step)
            watch.enter("backward")
        before = read_beat(tmp_path, 0)
        ctypes.CDLL(None).usleep(4_000_000)
        after = read_beat(tmp_path, 0)
    assert after.num_beats >= before.num_beats + 2
    assert "usleep" in after.stack
    assert any(path.endswith("heartbeat/beats.py") for path in called)
    assert not [name for name in called if "/torch/" in name or name.partition(".")[0] == "torch"]
    assert gpu.threads == {threading.get_ident()}


@pytest.mark.slow
def test_rank_leaves_later_while_it_saves_or_ends_by_itself(tmp_path: Path) -> None:
    saved = threading.Event()
    with Watch(tmp_path, 0, 1) as watch:
        assert watch._seconds_to_leave() == LEAVE_SECONDS
        saver = threading.Thread(target=saved.wait, name=SAVE_THREAD)
        saver.start()
        assert watch._seconds_to_leave() == LEAVE_SECONDS_SAVING
        saved.set()
        saver.join()
        try:
            raise ValueError
        except ValueError:
            assert watch._seconds_to_leave() == LEAVE_SECONDS_ENDING
        assert watch._seconds_to_leave() == LEAVE_SECONDS
