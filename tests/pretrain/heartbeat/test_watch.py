"""Whoever hangs, lags or falls silent is named within ten seconds, with its stack; nobody else is."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pretrain.heartbeat.beats import LEAVE, STOP, give_order, read_beat
from pretrain.heartbeat.diagnosis import SILENT_SECONDS
from pretrain.heartbeat.watch import Watch, recent
from tests.support.launching import wait_for

NAMED_WITHIN = 10.0  # seconds
WORLD_SIZE = 3


def work_for_ever(
    run_dir: Path, rank: int, barrier: Any, said: Any, slow: bool, hang_at: int, hang_seconds: float
) -> None:
    """Be a rank: its own work, then waiting for the others, as a collective does."""
    report = lambda sentence: said.put((rank, sentence))  # noqa: E731
    with Watch(run_dir, rank, WORLD_SIZE, say=report, hang_seconds=hang_seconds) as watch:
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
    """Three ranks at work; yields their processes and what they say."""
    context = multiprocessing.get_context("fork")
    barrier, said = context.Barrier(WORLD_SIZE), context.Queue()
    arguments = [
        (run_dir, rank, barrier, said, rank == slow, 60 if rank == hangs else -1, hang_seconds)
        for rank in range(WORLD_SIZE)
    ]
    processes = [context.Process(target=work_for_ever, args=each, daemon=True) for each in arguments]
    try:
        for process in processes:
            process.start()
        wait_for(lambda: all((beat := read_beat(run_dir, rank)) and beat.step > 20 for rank in range(WORLD_SIZE)))
        yield processes, said
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_stopped_rank_is_named_with_its_stack(tmp_path: Path, victim: int) -> None:
    with ranks(tmp_path) as (processes, said):
        for _ in range(2):  # also the second time
            os.kill(processes[victim].pid, signal.SIGSTOP)
            rank, sentence = said.get(timeout=NAMED_WITHIN)
            assert rank == (1 if victim == 0 else 0)  # the lowest that still beats
            assert sentence.startswith(f"rank {victim} (process {processes[victim].pid} on ")
            assert "has been silent for" in sentence
            assert "in work_for_ever" in sentence
            os.kill(processes[victim].pid, signal.SIGCONT)
            stopped_at = read_beat(tmp_path, victim)
            wait_for(lambda at=stopped_at: read_beat(tmp_path, victim).beats > at.beats + 2)


def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    with ranks(tmp_path, slow=1) as (_, said):
        rank, sentence = said.get(timeout=NAMED_WITHIN)
    assert rank == 0
    assert sentence.startswith("rank 1 ")
    assert " lags: 0.0" in sentence


def test_a_rank_that_hangs_is_named_and_ends_the_run(tmp_path: Path) -> None:
    with ranks(tmp_path, hangs=2, hang_seconds=3.0) as (processes, said):
        rank, sentence = said.get(timeout=NAMED_WITHIN + 10)  # it hangs some seconds after the start
        assert (rank, sentence.split(" (")[0]) == (0, "rank 2")
        assert "hangs: " in sentence
        assert "sleep_in_this_function" in sentence
        processes[0].join(timeout=10)
        assert processes[0].exitcode == 1


@pytest.mark.parametrize(("order", "code"), [(STOP, -signal.SIGTERM), (LEAVE, 1)])
def test_an_order_reaches_every_rank(tmp_path: Path, order: str, code: int) -> None:
    """A supervisor may be on another machine, and its signals are not heard there."""
    with ranks(tmp_path) as (processes, _):
        give_order(tmp_path, order)
        for process in processes:
            process.join(timeout=10)
        assert [process.exitcode for process in processes] == [code] * WORLD_SIZE


def test_healthy_ranks_are_left_in_peace_also_after_a_suspension(tmp_path: Path) -> None:
    """Slurm suspends a job's processes, a laptop sleeps: nobody has been silent."""
    with ranks(tmp_path, hang_seconds=1.0) as (processes, said):
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                os.kill(process.pid, number)
            time.sleep(SILENT_SECONDS + 3)
        assert said.empty()
        assert all(process.is_alive() for process in processes)


def test_a_beat_can_be_read_at_any_moment(tmp_path: Path) -> None:
    """A rank that is stopped while it writes one must still be missed by the others."""
    with Watch(tmp_path, 0, 1) as watch:
        reader = threading.Thread(target=lambda: [missed.append(read_beat(tmp_path, 0) is None) for _ in range(1000)])
        missed: list[bool] = []
        reader.start()
        while reader.is_alive():
            watch.enter("a longer name" if watch._beats % 2 else "data")
            watch._beat()
    assert not any(missed)


def test_few_steps_are_timed_where_they_last_long() -> None:
    assert recent([0.1] * 8) == [0.1] * 8
    assert recent([1.0] * 6 + [3.0] * 2) == [3.0, 3.0, 1.0]
    assert recent([0.5] * 8) == [0.5] * 4
