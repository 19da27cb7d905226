"""Heartbeats: small files in the run folder that every rank rewrites once per second, and orders to all ranks.

They let the other ranks notice within seconds that a process was stopped or a machine was lost, long before a
collective times out after ten minutes. A person can read them too. The last heartbeat records how the rank ended, which
the exit code of a launcher may hide.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.heartbeat.stacks import Wait, wait_of
from pretrain.outcome import Outcome

BEAT_SECONDS = 1.0
READ_ATTEMPTS = 10
START, END = "start", "end"  # the phase before a rank's first step, and the phase after its last
# Orders to all ranks. STOP saves a checkpoint first, ABORT ends the process at once. A rank orders LEAVE if the run
# cannot go on. The next lines are the process of the main rank, which tells one start from another, and the reason.
CONTINUE, STOP, ABORT, LEAVE = "", "stop", "abort", "leave"


@dataclass(frozen=True)
class Beat:
    """One heartbeat: what a rank is doing.

    Attributes:
        rank: Rank of the process in the run.
        pid: Process ID on `host`.
        host: Name of the machine.
        num_beats: Number of heartbeats written so far; a rank is silent while it does not grow.
        num_phases: Number of phases entered so far; all ranks enter the same phases in the same order.
        step: Current step of the run, counted from 0.
        phase: Current phase, for example "forward" or "save".
        seconds_in_phase: Seconds since the current phase began.
        work_seconds: Median seconds of a step that the rank spends on its own work, without waiting for other ranks;
            None before enough steps are timed.
        phase_seconds: Total seconds spent in each phase.
        stack: Innermost frames of the main thread, or of autograd's thread if that one runs the backward pass.
        outcome: Value of the rank's `Outcome` once it has ended, else None.
    """

    rank: int
    pid: int
    host: str
    num_beats: int
    num_phases: int
    step: int
    phase: str
    seconds_in_phase: float
    work_seconds: float | None
    phase_seconds: dict[str, float]
    stack: str
    outcome: str | None = None

    @property
    def wait(self) -> Wait:
        """Whether the rank waits for other ranks or for its device."""
        return wait_of(self.stack)

    @property
    def has_failed(self) -> bool:
        """Whether the rank has ended with an error."""
        return self.has_ended and self.outcome not in (None, Outcome.DONE, Outcome.STOPPED)

    @property
    def has_ended(self) -> bool:
        """Whether this is the rank's last heartbeat."""
        return self.phase == END

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def beats_folder(run_dir: Path) -> Path:
    """Return the folder of a run's heartbeats."""
    return run_dir / "ranks"


def write_order(run_dir: Path, order: str) -> None:
    """Leave an order, such as STOP, for every rank of a run; each rank reads it once per second."""
    (beats_folder(run_dir) / "order").write_text(order, encoding="utf-8")


def read_order(run_dir: Path) -> str:
    """Return the current order to the ranks of a run; CONTINUE if there is none."""
    try:
        return (beats_folder(run_dir) / "order").read_text(encoding="utf-8")
    except OSError:
        return CONTINUE


def read_beats(run_dir: Path) -> list[Beat]:
    """Return the last heartbeat of every rank that has written one, ordered by rank."""
    ranks = sorted(int(path.stem.partition("-")[2]) for path in beats_folder(run_dir).glob("rank-*.json"))
    return [beat for rank in ranks if (beat := read_beat(run_dir, rank))]


def find_live_rank(run_dir: Path, seconds: float = 2.5 * BEAT_SECONDS) -> Beat | None:
    """Return a heartbeat of a rank that is still running in a run folder, or None.

    Args:
        run_dir: Run folder.
        seconds: Time to wait for a new heartbeat, if there is a rank that has not reported its end.
    """
    before = {beat.rank: beat for beat in read_beats(run_dir) if beat.outcome is None}
    if before:
        time.sleep(seconds)
    return next((beat for beat in read_beats(run_dir) if beat.rank in before and beat != before[beat.rank]), None)


def read_beat(run_dir: Path, rank: int) -> Beat | None:
    """Return the last heartbeat of a rank, or None if there is none."""
    path = _path_of(run_dir, rank)
    for _ in range(READ_ATTEMPTS):
        try:
            return Beat(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):  # the rank is just writing it
            continue
        except OSError:
            break
    return None


def write_beat(run_dir: Path, beat: Beat) -> None:
    """Write the heartbeat of a rank in place, because network file systems show a new file late.

    It is a single write call, so a process that is stopped in between leaves either the old heartbeat or the new one.
    The file never becomes shorter (spaces fill the rest), because truncating it would be a second operation.
    """
    file = os.open(_path_of(run_dir, beat.rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(file, json.dumps(asdict(beat)).encode().ljust(os.fstat(file).st_size))
    finally:
        os.close(file)


def _path_of(run_dir: Path, rank: int) -> Path:
    return beats_folder(run_dir) / f"rank-{rank:05d}.json"
