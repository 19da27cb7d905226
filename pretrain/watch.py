"""Where every rank is: each writes a beat a second, and one of them names whoever hangs, lags or has gone silent.

A beat is a small file in the run folder, so that a rank which is stopped, or a machine that is gone, is missed by the
others within seconds, and not after a collective's ten minutes; and so that a person can look.
"""

import json
import os
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

BEAT_SECONDS = 1.0
READ_TRIES = 10
SILENT_SECONDS = 5.0  # without a beat
BEHIND_SECONDS = 7.0  # in a phase that others have left
FIRST_STEPS_SECONDS = 120.0  # the same for a rank that may still be compiling
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
LAG, LEAST_LAG = 2.0, 0.02  # times the others' own work, and seconds a step beyond it: less is not worth a word
STEPS_TIMED = 8  # at most; fewer where they last long, so that a slow rank is named soon
LEAST_STEPS_TIMED, SECONDS_TIMED = 3, 2.0
FRAMES = 12  # of a stack, the innermost
END = "end"  # the phase of a rank that is through
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

    @property
    def waits(self) -> bool:
        """Say whether it is in a collective, by its stack."""
        return any(place in self.stack for place in COLLECTIVES)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def beats_folder(run_dir: Path) -> Path:
    """Return where a run's ranks write their beats."""
    return run_dir / "ranks"


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
    _told: dict[tuple[int, str], float] = field(default_factory=dict)  # since when something has been so

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
        """Say whether some rank has hung or been silent for that long."""
        return any(now - since > seconds for (_, what), since in self._told.items() if what != "lags")

    def silence(self, beat: Beat, now: float) -> float:
        """Return for how many seconds a rank has not written a new beat."""
        count, since = self._seen.get(beat.rank, (-1, now))
        if beat.beats != count:
            self._seen[beat.rank] = (beat.beats, now)
            return 0.0
        return now - since

    def _findings(self, beats: list[Beat], now: float) -> Iterator[tuple[Beat, str, str]]:
        beats = [beat for beat in beats if beat.phase != END]
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
            patience = BEHIND_SECONDS if beat.work is not None else FIRST_STEPS_SECONDS
            if beat.rank not in silent and behind and beat.since > patience:
                sentence = f"{beat} hangs: {beat.since:.0f} s in {beat.phase} of step {beat.step}, the others wait"
                yield beat, "hangs", _with_stack(sentence, beat)
        timed = {beat.rank: beat.work for beat in beats if beat.work is not None}
        for beat in beats:
            others = [work for rank, work in timed.items() if rank != beat.rank]
            if beat.rank not in silent and beat.rank in timed and others:
                usual = statistics.median(others)
                if timed[beat.rank] > max(LAG * usual, usual + LEAST_LAG):
                    times = f"{timed[beat.rank]:.3f} s a step for its data and forward, the others {usual:.3f} s"
                    yield beat, "lags", _with_stack(f"{beat} lags: {times}", beat)


class Watch:
    """A rank's own beats, and its look at the others'. The lowest rank that still beats is the one that speaks.

    Args:
        run_dir: of the run.
        rank: of this process.
        world_size: how many there are.
        hang_seconds: after so long the run is ended, for a supervisor to start again; 0: never.
        say: is told what is wrong; by default it goes to stderr.
        device: that trains.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world_size: int,
        *,
        hang_seconds: float = 0.0,
        say: Callable[[str], None] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.rank = rank
        self.world_size = world_size
        self.hang_seconds = hang_seconds
        self.say = say or partial(print, file=sys.stderr, flush=True)
        self.on_gpu = device is not None and device.type == "cuda"
        self._main = threading.get_ident()
        self._turns = self._step = self._beats = self._size = 0
        self._phase, self._entered = "start", time.monotonic()
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

    def __exit__(self, *_: object) -> None:
        """End the beats; the last one stays."""
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
            self._beat()
            now = time.monotonic()
            beats = self._all_beats(now)  # without any, what was told before is over
            for sentence in self._diagnosis.look(beats, now):
                self.say(sentence)
            if self.hang_seconds and self._diagnosis.is_stuck(now, self.hang_seconds):
                self.say(f"stuck for {self.hang_seconds:.0f} s; the run is ended, and can be continued")
                os._exit(1)

    def _all_beats(self, now: float) -> list[Beat]:
        """Read every rank's beat, if it is for this rank to look: no lower one still beats. Else there are none."""
        beats = []
        for rank in range(self.world_size):
            beat = read_beat(self.run_dir, rank)
            if rank < self.rank and (beat is None or self._diagnosis.silence(beat, now) <= SILENT_SECONDS):
                return []
            beats += [beat] if beat else []
        return beats

    def _beat(self) -> None:
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
            work=statistics.median(recent(self._work)) if len(self._work) == STEPS_TIMED else None,
            seconds={name: round(seconds, 3) for name, seconds in self._seconds.copy().items()},
            stack=stack,
        )
        text = json.dumps(asdict(beat)).encode().ljust(self._size)  # never shorter than the one it replaces
        self._size = len(text)
        try:
            _write_over(self._path, text)
        except OSError as error:  # a full disk must not end a run
            self.say(f"rank {self.rank}: its beat cannot be written: {error}")


def recent(work: Sequence[float]) -> list[float]:
    """Return the last of these seconds: as many as make up SECONDS_TIMED, and no fewer than LEAST_STEPS_TIMED."""
    counted: list[float] = []
    for seconds in reversed(work):
        if len(counted) >= LEAST_STEPS_TIMED and sum(counted) >= SECONDS_TIMED:
            break
        counted.append(seconds)
    return counted


def _write_over(path: Path, text: bytes) -> None:
    """Replace what a file holds in one write, so that whoever is stopped in between has left the old or the new."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(file, text)
    finally:
        os.close(file)


def _recorded() -> "torch.cuda.Event":
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _with_stack(sentence: str, beat: Beat) -> str:
    return f"{sentence}\n{beat.stack}".rstrip()
