"""A rank's watch over itself and the others: a thread that beats, looks, and ends what is stuck."""

import contextlib
import os
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from typing_extensions import Self

from pretrain.heartbeat.beats import (
    BEAT_SECONDS,
    END,
    GO_ON,
    LEAVE,
    START,
    STOP,
    Beat,
    beats_folder,
    read_beat,
    read_order,
    write_beat,
)
from pretrain.heartbeat.diagnosis import SILENT_SECONDS, Diagnosis
from pretrain.outcome import Outcome, outcome_of

STEPS_TIMED = 8  # at most; fewer where they last long, so that a slow rank is named soon
LEAST_STEPS_TIMED, SECONDS_TIMED = 3, 2.0
FRAMES = 12  # of a stack, the innermost
SECONDS_AT_ONCE = 2.0  # between two looks; more of it was this rank's own sleep, which says nothing of the others
OWN_WORK = ("data", "forward")  # what no other rank is waited for in; at ZeRO 3 its gathers are part of it


class Watch:
    """A rank's own beats, and its look at the others'. The lowest rank that still beats is the one that speaks.

    Args:
        run_dir: of the run.
        rank: of this process.
        world_size: how many there are.
        hang_seconds: after so long the run is ended, for a supervisor to start again; 0: never.
        say: is told what is wrong; by default it goes to stderr.
        on_gpu: whether the device, and not this process, does the work.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world_size: int,
        *,
        hang_seconds: float = 0.0,
        say: Callable[[str], None] | None = None,
        on_gpu: bool = False,
    ) -> None:
        self.run_dir = run_dir
        self.rank = rank
        self.world_size = world_size
        self.hang_seconds = hang_seconds
        self.say = say or partial(print, file=sys.stderr, flush=True)
        self.on_gpu = on_gpu
        self._outcome = Outcome.FAILED  # for a process that leaves the watch without `finish` or an error
        self._main = threading.get_ident()
        self._turns = self._step = self._beats = 0
        self._phase, self._entered = START, time.monotonic()
        self._obeyed = GO_ON
        self._seconds: dict[str, float] = defaultdict(float)
        self._own = 0.0
        self._work: deque[float] = deque(maxlen=STEPS_TIMED)
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=STEPS_TIMED)
        self._diagnosis = Diagnosis()
        self._ended = threading.Event()
        beats_folder(run_dir).mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread = threading.Thread(target=self._go, name="watch", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Say what comes now; `step` where a new one begins."""
        now = time.monotonic()
        spent = now - self._entered
        self._seconds[self._phase] += spent
        if self._phase in OWN_WORK:
            self._own += self._gpu_seconds() if self.on_gpu and self._phase == "forward" else spent
        if step is not None and step != self._step:
            if self._own:
                self._work.append(self._own)
            self._step, self._own = step, 0.0
        if self.on_gpu and phase == "forward":
            self._events.append((_recorded(), _recorded()))
        self._phase, self._entered = phase, now
        self._turns += 1

    def finish(self, outcome: Outcome) -> None:
        """Record how the run ended. The last beat, which is written when the watch closes, reports it."""
        self._outcome = outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the beats; the last one stays."""
        if error is not None:
            self._outcome = outcome_of(error)
        self.enter(END)
        self._ended.set()
        self._thread.join()
        self._beat()

    def _gpu_seconds(self) -> float:
        """Mark the end of a forward pass, and return how long the last one took that the device has finished."""
        self._events[-1][1].record()
        done = [pair for pair in self._events if pair[1].query()]  # type: ignore[no-untyped-call]
        return float(done[-1][0].elapsed_time(done[-1][1])) / 1000 if done else 0.0

    def _go(self) -> None:
        awake, last = 0.0, time.monotonic()  # a run that is suspended as a whole, as Slurm can, goes on in peace
        while not self._ended.wait(BEAT_SECONDS):
            now = time.monotonic()
            awake, last = awake + min(now - last, SECONDS_AT_ONCE), now
            try:
                self._obey()
                if self._beat():
                    self._look(awake)
            except Exception as error:  # a watch that stumbles goes on, or its rank would be called silent
                with contextlib.suppress(OSError):
                    self.say(f"rank {self.rank}: its watch has stumbled: {error!r}")

    def _look(self, now: float) -> None:
        beats = self._all_beats(now)  # without any, what was told before is over
        for sentence in self._diagnosis.look(beats, now):
            self.say(sentence)
        if self.hang_seconds and self._diagnosis.is_stuck(now, self.hang_seconds):
            self.say("stuck for longer than health.hang_seconds; the run is ended, and can be continued")
            os._exit(1)

    def _obey(self) -> None:
        """Do what the run's supervisor asks, who may be on another machine."""
        order = read_order(self.run_dir)
        if order == LEAVE:
            os._exit(1)
        if order == STOP and self._obeyed != STOP:
            os.kill(os.getpid(), signal.SIGTERM)
        self._obeyed = order

    def _all_beats(self, now: float) -> list[Beat]:
        """Read every rank's beat, if it is for this rank to look: no lower one still beats. Else there are none."""
        beats = []
        for rank in range(self.world_size):
            beat = read_beat(self.run_dir, rank)
            if rank < self.rank and (beat is None or self._diagnosis.silence(beat, now) <= SILENT_SECONDS):
                return []
            beats += [beat] if beat else []
        return beats

    def _beat(self) -> bool:
        """Write this rank's beat; return whether the disk has taken it."""
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)[-FRAMES:]) if frame else ""
        self._beats += 1
        beat = Beat(
            rank=self.rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            beats=self._beats,
            turns=self._turns,
            step=self._step,
            phase=self._phase,
            since=round(time.monotonic() - self._entered, 3),
            work=statistics.median(recent(work)) if len(work := [*self._work]) == STEPS_TIMED else None,
            seconds={name: round(seconds, 3) for name, seconds in self._seconds.copy().items()},
            stack=stack,
            outcome=self._outcome.value if self._phase == END else None,
        )
        try:
            write_beat(self.run_dir, beat)
        except OSError as error:  # a full disk must not end a run
            self.say(f"rank {self.rank}: its beat cannot be written: {error}")
            return False
        return True


def recent(work: Sequence[float]) -> list[float]:
    """Return the last of these seconds: as many as make up SECONDS_TIMED, and no fewer than LEAST_STEPS_TIMED."""
    counted: list[float] = []
    for seconds in reversed(work):
        if len(counted) >= LEAST_STEPS_TIMED and sum(counted) >= SECONDS_TIMED:
            break
        counted.append(seconds)
    return counted


def _recorded() -> "torch.cuda.Event":
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
