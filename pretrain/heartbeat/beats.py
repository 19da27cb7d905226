"""What every rank says of itself once a second, and what all are told: small files in the run folder.

So a rank which is stopped, or a machine that is gone, is missed by the others within seconds, and not after a
collective's ten minutes; and a person can look. The last beat says how the rank has ended, which a launcher's exit code
may hide.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

BEAT_SECONDS = 1.0
READ_TRIES = 10
START, END = "start", "end"  # the phases of a rank before its first step, and of one that is through
GO_ON, STOP, LEAVE = "", "stop", "leave"  # orders: save and end; end at once
WAITING = ("torch/distributed/", "deepspeed/comm/", "torch/cuda/streams.py")


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
        """Say whether it waits for others, or for its device, by its innermost frame: what hangs may hang above one."""
        innermost = self.stack.rpartition('File "')[2]
        return any(place in innermost for place in WAITING)

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


def read_order(run_dir: Path) -> str:
    """Read what the ranks of a run are to do."""
    try:
        return (beats_folder(run_dir) / "order").read_text(encoding="utf-8")
    except OSError:
        return GO_ON


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
    path = _path_of(run_dir, rank)
    for _ in range(READ_TRIES):
        try:
            return Beat(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):  # it is just being written
            continue
        except OSError:
            break
    return None


def write_beat(run_dir: Path, beat: Beat) -> None:
    """Write a rank's beat, in place: a new file would be seen late on a network's file system.

    It is one write, so that whoever is stopped in between has left the old or the new; and the file never becomes
    shorter, for to cut it would be a second stroke.
    """
    file = os.open(_path_of(run_dir, beat.rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(file, json.dumps(asdict(beat)).encode().ljust(os.fstat(file).st_size))
    finally:
        os.close(file)


def _path_of(run_dir: Path, rank: int) -> Path:
    return beats_folder(run_dir) / f"rank-{rank:05d}.json"
