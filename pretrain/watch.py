"""Where every rank is: each writes a beat a second, and one of them names whoever hangs, lags or has gone silent.

A beat is a small file in the run folder, so that a rank which is stopped, or a machine that is gone, is missed by the
others within seconds, and not after a collective's ten minutes; and so that a person can look. The last beat says how
the rank has ended, which a launcher's exit code may hide. Beside them stands an order to all ranks, on any machine.
"""

import contextlib
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from typing_extensions import Self

from pretrain.outcome import Outcome, outcome_of

BEAT_SECONDS = 1.0
READ_TRIES = 10
SILENT_SECONDS = 5.0  # without a beat
BEHIND_SECONDS = 6.0  # in a phase that others have left
FIRST_STEPS_SECONDS = 120.0  # the same for a rank that may still be compiling
STANDSTILL = 4.0  # times as patient as with one that hangs, when none gets on: they may all be at something long
WAITING = ("torch/distributed/", "deepspeed/comm/", "torch/cuda/streams.py")
LAG, LEAST_LAG = 2.0, 0.02  # times the others' own work, and seconds a step beyond it: less is not worth a word
STEPS_TIMED = 8  # at most; fewer where they last long, so that a slow rank is named soon
LEAST_STEPS_TIMED, SECONDS_TIMED = 3, 2.0
FRAMES = 12  # of a stack, the innermost
START, END = "start", "end"  # the phases of a rank before its first step, and of one that is through
GO_ON, STOP, LEAVE = "", "stop", "leave"  # orders: save and end; end at once
OWN_WORK = ("data", "forward")  # what no other rank is waited for in; at ZeRO 3 its gathers are part of it


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        rank: its number.
        pid: of its process on `host`.
        host: its machine.
        beats: how many it has written; a number that stands still is silence.
        turns: how many phases it has entered; all ranks enter the same ones.
        step: of the run, counted from 0.
        phase: what it does.
        since: seconds it has been at that.
        work: seconds of a step that it spends on its own work, the median of the last ones.
        seconds: spent in each phase since it began.
        stack: the innermost frames of its main thread.
        outcome: how it has ended, once it has.
    """

    rank: int
    pid: int
    host: str
    beats: int
    turns: int
    step: int
    phase: str
    since: float
    work: float | None
    seconds: dict[str, float]
    stack: str
    outcome: str | None = None

    @property
    def waits(self) -> bool:
        """Say whether it waits for others, or for its device, by its stack."""
        return any(place in self.stack for place in WAITING)

    @property
    def is_over(self) -> bool:
        """Say whether it is through."""
        return self.phase == END

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def beats_folder(run_dir: Path) -> Path:
    """Return where a run's ranks write their beats."""
    return run_dir / "ranks"


def give_order(run_dir: Path, order: str) -> None:
    """Leave an order for every rank of a run; each looks for it once a second."""
    (beats_folder(run_dir) / "order").write_text(order, encoding="utf-8")


def read_beats(run_dir: Path) -> list[Beat]:
    """Read the last beat of every rank that has written one."""
    numbers = sorted(int(path.stem.partition("-")[2]) for path in beats_folder(run_dir).glob("rank-*.json"))
    return [beat for number in numbers if (beat := read_beat(run_dir, number))]


def find_living(run_dir: Path, seconds: float = 2.5 * BEAT_SECONDS) -> Beat | None:
    """Return a rank that beats in a run folder; it takes that long to tell, where some rank's end is not known."""
    before = {beat.rank: beat for beat in read_beats(run_dir) if beat.outcome is None}
    if before:
        time.sleep(seconds)
    return next((beat for beat in read_beats(run_dir) if beat.rank in before and beat != before[beat.rank]), None)


def read_beat(run_dir: Path, rank: int) -> Beat | None:
    """Read a rank's last beat; None where there is none."""
    path = beats_folder(run_dir) / f"rank-{rank:05d}.json"
    for _ in range(READ_TRIES):
        try:
            return Beat(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):  # it is just being written
            continue
        except OSError:
            break
    return None


@dataclass
class Diagnosis:
    """Compares the ranks' beats from second to second, and says each thing once."""

    _seen: dict[int, tuple[int, float]] = field(default_factory=dict)  # rank -> beats, when they last grew
    _behind: dict[int, tuple[int, float]] = field(default_factory=dict)  # rank -> turns, since when others wait for it
    _told: dict[tuple[int, str], float] = field(default_factory=dict)  # since when something has been so
    _moved: tuple[list[int], float] = ([], 0.0)  # everyone's turns, when they last grew

    def look(self, beats: list[Beat], now: float) -> list[str]:
        """Return what is new to say.

        Args:
            beats: the last one of each rank.
            now: seconds of this process's own clock.
        """
        found = {(beat.rank, what): sentence for beat, what, sentence in self._findings(beats, now)}
        self._told = {key: since for key, since in self._told.items() if key in found}
        fresh = [sentence for key, sentence in found.items() if key not in self._told]
        for key in found:
            self._told.setdefault(key, now)
        return fresh

    def is_stuck(self, now: float, seconds: float) -> bool:
        """Say whether some rank has hung or been silent for that long, or all have stood still for much longer."""
        stands_still = bool(self._moved[0]) and now - self._moved[1] > STANDSTILL * seconds
        return stands_still or any(now - since > seconds for (_, what), since in self._told.items() if what != "lags")

    def silence(self, beat: Beat, now: float) -> float:
        """Return for how many seconds a rank has not written a new beat."""
        count, since = self._seen.get(beat.rank, (-1, now))
        if beat.beats != count:
            self._seen[beat.rank] = (beat.beats, now)
            return 0.0
        return now - since

    def _findings(self, beats: list[Beat], now: float) -> Iterator[tuple[Beat, str, str]]:
        ended, beats = [b for b in beats if b.is_over], [b for b in beats if not b.is_over]
        for beat in ended if beats else []:
            if beat.outcome not in (None, Outcome.DONE, Outcome.STOPPED):
                yield beat, "ended", f"{beat} has ended in step {beat.step} ({beat.outcome}), the others wait"
        turns = [beat.turns for beat in beats]
        if turns != self._moved[0]:
            self._moved = turns, now
        silent = set()
        for beat in beats:
            if (seconds := self.silence(beat, now)) > SILENT_SECONDS:
                silent.add(beat.rank)
                sentence = f"{beat} has been silent for {seconds:.0f} s; it was in {beat.phase} of step {beat.step}"
                yield beat, "silent", _with_stack(sentence, beat)
        farthest = max((beat.turns for beat in beats), default=0)
        others_wait = any(beat.turns == farthest and beat.waits for beat in beats)
        for beat in beats:
            behind = beat.turns < farthest or (others_wait and not beat.waits)
            patience = FIRST_STEPS_SECONDS if beat.work is None else max(BEHIND_SECONDS, beat.work)
            if beat.rank not in silent and behind and self._waited_for(beat, now) >= patience:
                sentence = f"{beat} hangs: {beat.since:.0f} s in {beat.phase} of step {beat.step}, the others wait"
                yield beat, "hangs", _with_stack(sentence, beat)
            elif not behind:
                self._behind.pop(beat.rank, None)
        timed = {beat.rank: beat.work for beat in beats if beat.work is not None}
        for beat in beats:
            others = [work for rank, work in timed.items() if rank != beat.rank]
            if beat.rank not in silent and beat.rank in timed and others:
                usual = statistics.median(others)
                if timed[beat.rank] > max(LAG * usual, usual + LEAST_LAG):
                    times = f"{timed[beat.rank]:.3f} s a step for its data and forward, the others {usual:.3f} s"
                    yield beat, "lags", _with_stack(f"{beat} lags: {times}", beat)

    def _waited_for(self, beat: Beat, now: float) -> float:
        """Return for how long a rank that is behind has not got on."""
        turns, since = self._behind.get(beat.rank, (-1, now))
        if turns != beat.turns:
            turns, since = beat.turns, now
        self._behind[beat.rank] = turns, since
        return now - since


class Watch:
    """A rank's own beats, and its look at the others'. The lowest rank that still beats is the one that speaks.

    Args:
        run_dir: of the run.
        rank: of this process.
        world_size: how many there are.
        hang_seconds: after so long the run is ended, for a supervisor to start again; 0: never.
        say: is told what is wrong; by default it goes to stderr.
        on_gpu: whether the device, and not this process, does the work.

    Attributes:
        outcome: how the run ends here, to be set before the watch ends, unless an error says it.
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
        self.outcome = Outcome.FAILED
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
        self._path = beats_folder(run_dir) / f"rank-{rank:05d}.json"
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the beats; the last one stays."""
        if error is not None:
            self.outcome = outcome_of(error)
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
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._obey()
                if self._beat():
                    self._look(time.monotonic())
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
        try:
            order = (beats_folder(self.run_dir) / "order").read_text(encoding="utf-8")
        except OSError:
            order = GO_ON
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
        """Write this rank's beat, in place: a new file would be seen late on a network's file system."""
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
            outcome=self.outcome.value if self._phase == END else None,
        )
        try:
            _write_over(self._path, json.dumps(asdict(beat)).encode())
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


def _write_over(path: Path, text: bytes) -> None:
    """Replace what a file holds in one write, so that whoever is stopped in between has left the old or the new.

    It never becomes shorter, for to cut it would be a second stroke.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(file, text.ljust(os.fstat(file).st_size))
    finally:
        os.close(file)


def _recorded() -> "torch.cuda.Event":
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _with_stack(sentence: str, beat: Beat) -> str:
    return f"{sentence}\n{beat.stack}".rstrip()
