"""A thread in every rank that writes heartbeats, compares those of all ranks, and ends a run that is stuck."""

import contextlib
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from typing_extensions import Self

from pretrain.heartbeat.beats import (
    ABORT,
    BEAT_SECONDS,
    CONTINUE,
    END,
    START,
    STOP,
    Beat,
    beats_folder,
    read_beat,
    read_order,
    write_beat,
)
from pretrain.heartbeat.diagnosis import SILENT_SECONDS, Diagnosis
from pretrain.heartbeat.peers import Peers
from pretrain.heartbeat.stacks import read_stack
from pretrain.outcome import EXIT_FAILED, Outcome, outcome_of

# A step's own work is known once 8 steps were timed. It is the median of the last 8, or of fewer (at least 3) if these
# take 2 seconds together, so that a rank that becomes slow is found soon even if steps are long.
MAX_STEPS_TIMED, MIN_STEPS_TIMED, SECONDS_TIMED = 8, 3, 2.0
MAX_INTERVAL_SECONDS = 2.0  # a longer interval between two heartbeats means that this process was suspended
OWN_WORK_PHASES = ("data", "forward")  # other ranks are not waited for here, except for ZeRO 3's parameter gathers

# Seconds until this rank leaves after another one has failed. Meanwhile it may fail by itself and print its own error.
LEAVE_SECONDS = 3.0
LEAVE_SECONDS_SAVING = 6.0  # a checkpoint may still become complete if the failed rank has written its part
LEAVE_SECONDS_ENDING = 120.0  # the main thread already ends with an error, and may be waiting for MLflow
SAVE_THREAD = "checkpoint"  # name of the thread that writes a checkpoint


class Watch:
    """Writes the heartbeats of this rank, reports ranks that hang, lag or are silent, and leaves if another rank fails.

    The thread runs from construction until the end of the `with` block. It never uses the device, so it also runs
    while the device is busy or broken. Only the lowest rank that is alive compares heartbeats and reports.

    Args:
        run_dir: Run folder, shared by all ranks.
        rank: Rank of this process.
        world_size: Number of ranks.
        hang_seconds: Seconds without progress after which the process exits, so that a supervisor can restart the run;
            0 never exits.
        report: Function that is called with each finding; None prints it to stderr.
        on_gpu: Whether a GPU runs the model, so that the forward pass must be timed on the device.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world_size: int,
        *,
        hang_seconds: float = 0.0,
        report: Callable[[str], None] | None = None,
        on_gpu: bool = False,
    ) -> None:
        self._run_dir = run_dir
        self._rank = rank
        self._world_size = world_size
        self._hang_seconds = hang_seconds
        self._report = report or partial(print, file=sys.stderr, flush=True)
        self._on_gpu = on_gpu
        self._outcome = Outcome.FAILED  # for a process that leaves the watch without `finish` or an error
        self._main_thread = threading.get_ident()
        self._num_phases = self._step = self._num_beats = 0
        self._phase, self._phase_began = START, time.monotonic()
        self._last_order = CONTINUE
        self._phase_seconds: dict[str, float] = defaultdict(float)
        self._work_of_step = 0.0
        self._work_of_steps: deque[float] = deque(maxlen=MAX_STEPS_TIMED)
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=MAX_STEPS_TIMED)
        self._diagnosis = Diagnosis()
        self._peers = Peers(run_dir, rank)
        self._failure, self._failed_at = "", 0.0  # why the run cannot go on, and since when this rank knows
        self._closing = threading.Event()
        beats_folder(run_dir).mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Begin a new phase of work; all ranks must enter the same phases in the same order.

        Args:
            phase: Name of the phase, for example "data", "forward" or "save".
            step: Number of the step if the phase begins a new one, else None.
        """
        now = time.monotonic()
        spent = now - self._phase_began
        self._phase_seconds[self._phase] += spent
        if phase != END:  # where nothing more is timed: after an error of the device, each use of it raises again
            self._time_own_work(phase, step, spent)
        self._step = self._step if step is None else step
        self._phase, self._phase_began = phase, now
        self._num_phases += 1

    def _time_own_work(self, phase: str, step: int | None, spent: float) -> None:
        """Add the time of the phase that ends to the rank's own work, and begin to time the next one.

        Args:
            phase: Phase that begins.
            step: Number of the step if the phase begins a new one, else None.
            spent: Seconds in the phase that ends.
        """
        if self._phase in OWN_WORK_PHASES:
            self._work_of_step += self._gpu_seconds() if self._on_gpu and self._phase == "forward" else spent
        if step is not None and step != self._step:
            if self._work_of_step:
                self._work_of_steps.append(self._work_of_step)
            self._work_of_step = 0.0
        if self._on_gpu and phase == "forward":
            self._events.append((_recorded_event(), _recorded_event()))

    def finish(self, outcome: Outcome) -> None:
        """Record how the run ended. The last heartbeat, which is written at the end of the `with` block, reports it."""
        self._outcome = outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Stop the thread and write the last heartbeat, which stays in the run folder."""
        if error is not None:
            self._outcome = outcome_of(error)
        self.enter(END)
        self._closing.set()
        self._thread.join()
        self._beat()

    def _gpu_seconds(self) -> float:
        """Mark the end of a forward pass; return the duration of the last forward pass that the GPU has finished.

        The host does not wait for the GPU, so that the duration is usually that of an earlier step.
        """
        self._events[-1][1].record()
        done = [pair for pair in self._events if pair[1].query()]  # type: ignore[no-untyped-call]
        return float(done[-1][0].elapsed_time(done[-1][1])) / 1000 if done else 0.0

    def _run(self) -> None:
        # Time counts only while this process is awake, so a run that is suspended as a whole (by Slurm, or a laptop)
        # continues without false alarms.
        awake, last = 0.0, time.monotonic()
        while not self._closing.wait(BEAT_SECONDS):
            now = time.monotonic()
            awake, last = awake + min(now - last, MAX_INTERVAL_SECONDS), now
            try:
                order = read_order(self._run_dir)
                self._follow_order(order)
                beats = self._beats_to_examine(awake) if self._beat() else []
                self._leave_if_failed(order, beats, awake)
                self._examine_ranks(beats, awake)
            except Exception as error:  # without heartbeats, the others would report this rank as silent
                with contextlib.suppress(OSError):
                    self._report(f"rank {self._rank}: error in the watch thread, which continues: {error!r}")

    def _leave_if_failed(self, order: str, beats: list[Beat], now: float) -> None:
        """End this process some seconds after another rank has failed, unless it ends by itself before."""
        if not self._failure:
            self._failure, self._failed_at = self._peers.find_failure(order, beats), now
        if self._failure and now - self._failed_at >= self._seconds_to_leave() and not self._closing.is_set():
            self._leave(f"rank {self._rank}: {self._failure}; leaving in step {self._step}, the run cannot go on")

    def _seconds_to_leave(self) -> float:
        """Return for how many seconds this rank may go on after another one has failed."""
        if sys._current_exceptions().get(self._main_thread) not in (None, (None, None, None)):
            return LEAVE_SECONDS_ENDING
        is_saving = any(thread.name == SAVE_THREAD for thread in threading.enumerate())
        return LEAVE_SECONDS_SAVING if is_saving else LEAVE_SECONDS

    def _examine_ranks(self, beats: list[Beat], now: float) -> None:
        for sentence in self._diagnosis.new_findings(beats, now):  # also without beats, which ends all findings
            self._report(sentence)
        if self._hang_seconds and self._diagnosis.is_stuck(now, self._hang_seconds):
            reason = f"no progress for more than health.hang_seconds={self._hang_seconds:g}"
            self._peers.tell_all(reason)
            self._leave(f"{reason}; ending the run, which the same command resumes from the last checkpoint")

    def _leave(self, sentence: str) -> NoReturn:
        """Print a sentence and end this process, even if nobody reads its output any more."""
        try:
            self._report(sentence)
        finally:
            os._exit(EXIT_FAILED)

    def _follow_order(self, order: str) -> None:
        """Do what the supervisor orders; it may run on another machine, so it cannot send signals to every rank."""
        if order == ABORT:
            os._exit(EXIT_FAILED)
        if order == STOP and self._last_order != STOP:
            os.kill(os.getpid(), signal.SIGTERM)
        self._last_order = order

    def _beats_to_examine(self, now: float) -> list[Beat]:
        """Return the last heartbeats of all ranks; none if a lower rank is alive, since that one examines them."""
        beats = []
        for rank in range(self._world_size):
            beat = read_beat(self._run_dir, rank)
            has_ended = beat is not None and beat.has_ended
            if rank < self._rank and not has_ended and not self._is_silent(beat, now):
                return []
            beats += [beat] if beat else []
        return beats

    def _is_silent(self, beat: Beat | None, now: float) -> bool:
        return beat is not None and self._diagnosis.silent_seconds(beat, now) > SILENT_SECONDS

    def _beat(self) -> bool:
        """Write a heartbeat of this rank; return whether the file system accepted it."""
        work_of_steps = [*self._work_of_steps]
        is_timed = len(work_of_steps) == MAX_STEPS_TIMED
        self._num_beats += 1
        beat = Beat(
            rank=self._rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            num_beats=self._num_beats,
            num_phases=self._num_phases,
            step=self._step,
            phase=self._phase,
            seconds_in_phase=round(time.monotonic() - self._phase_began, 3),
            work_seconds=statistics.median(recent(work_of_steps)) if is_timed else None,
            phase_seconds={name: round(seconds, 3) for name, seconds in self._phase_seconds.copy().items()},
            stack=read_stack(self._main_thread),
            outcome=self._outcome.value if self._phase == END else None,
        )
        try:
            write_beat(self._run_dir, beat)
        except OSError as error:  # a full disk must not end a run
            self._report(f"rank {self._rank}: cannot write its heartbeat: {error}")
            return False
        return True


def recent(seconds_of_steps: Sequence[float]) -> list[float]:
    """Return the durations of the last steps, newest first.

    There are as many as together take SECONDS_TIMED, but no fewer than MIN_STEPS_TIMED.

    Args:
        seconds_of_steps: Durations of steps, oldest first.
    """
    counted: list[float] = []
    for seconds in reversed(seconds_of_steps):
        if len(counted) >= MIN_STEPS_TIMED and sum(counted) >= SECONDS_TIMED:
            break
        counted.append(seconds)
    return counted


def _recorded_event() -> "torch.cuda.Event":
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
