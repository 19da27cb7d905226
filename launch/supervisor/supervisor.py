"""`vitrail supervise`: start a run again after a crash or a hang, and account for where its time went."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from launch.supervisor.resources import adapt, with_fewer_ranks
from pretrain.checkpoint.history import list_checkpoints, step_of
from pretrain.config import PretrainConfig
from pretrain.configfile import load_config
from pretrain.errors import UserError
from pretrain.heartbeat.beats import GO_ON, LEAVE, START, STOP, Beat, beats_folder, give_order, read_beats
from pretrain.heartbeat.diagnosis import SILENT_SECONDS
from pretrain.outcome import Outcome

GOODPUT_FILE = "goodput.json"
POLL_SECONDS = 0.2
GRACE_SECONDS = 3.0  # for a launcher to end what is left when a rank has died
LONGEST_PAUSE = 60.0  # seconds
COMPUTE = ("forward", "backward", "step", "report")
FINAL = {outcome.exit_code: outcome for outcome in (Outcome.DONE, Outcome.USER_ERROR, Outcome.STOPPED)}


@dataclass
class Attempt:
    """One start of the command, and what became of it.

    Attributes:
        outcome: how it ended.
        exit_code: of the command, which a launcher may have changed.
        wall: seconds.
        seconds: of rank 0, by phase.
        first_step: where it began.
        last_step: where it ended.
        saved_step: of the newest checkpoint then.
        world_size: how many ranks there were; 0 if none came so far.
    """

    outcome: Outcome
    exit_code: int
    wall: float
    seconds: dict[str, float]
    first_step: int
    last_step: int
    saved_step: int
    world_size: int = 0

    @property
    def lost_seconds(self) -> float:
        """Work on steps that no checkpoint has kept."""
        done = self.last_step - self.first_step
        lost = max(0, self.last_step - max(self.saved_step, self.first_step))
        return self.compute * lost / done if done else 0.0

    @property
    def compute(self) -> float:
        """Seconds in which the model was trained, whether or not it was kept."""
        return sum(self.seconds.get(phase, 0.0) for phase in COMPUTE)

    @property
    def trained(self) -> float:
        """Seconds since its first step began."""
        return sum(seconds for phase, seconds in self.seconds.items() if phase != START)


@dataclass
class Goodput:
    """Where the time of all attempts went."""

    attempts: list[Attempt] = field(default_factory=list)
    pauses: float = 0.0

    def shares(self) -> dict[str, float]:
        """Return seconds by what they were spent on; they add up to the whole."""
        total = sum(attempt.wall for attempt in self.attempts) + self.pauses
        phases = {name: sum(a.seconds.get(name, 0.0) for a in self.attempts) for name in ("data", "save", "evaluate")}
        lost = sum(attempt.lost_seconds for attempt in self.attempts)
        compute = sum(attempt.compute for attempt in self.attempts) - lost
        first = self.attempts[0].wall - self.attempts[0].trained if self.attempts else 0.0
        known = {
            "compute": compute,
            "data wait": phases["data"],
            "save stall": phases["save"],
            "evaluation": phases["evaluate"],
            "lost work": lost,
            "first start": max(0.0, first),
        }
        return {**known, "restart": total - sum(known.values())}

    def report(self) -> str:
        """Say it in one line."""
        shares = self.shares()
        total = sum(shares.values())
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in shares.items())
        restarts = len(self.attempts) - 1
        return f"goodput {shares['compute'] / total:.1%} of {total:.0f} s, {restarts} restarts: {parts}"

    def save(self, run_dir: Path) -> None:
        """Write it beside the run."""
        content = {"seconds": self.shares(), "attempts": [asdict(attempt) for attempt in self.attempts]}
        (run_dir / GOODPUT_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")


class Supervisor:
    """Runs a command until it is done, a person stops it, or starting it again does not help.

    Args:
        command: starts `launch/pretrain.py` with its config and overrides.
        max_failures: in a row, without a new checkpoint between them.
        fewer_after: failures in a row after which one rank fewer is started; 0: never.
        say: is told what happens.
    """

    def __init__(
        self, command: Sequence[str], max_failures: int = 5, fewer_after: int = 2, say: Callable[[str], None] = print
    ) -> None:
        self.command = list(command)
        self.run_dir = find_run_dir(command)
        self.max_failures = max_failures
        self.fewer_after = fewer_after
        self.say = say
        self.goodput = Goodput()
        self.asked = 0
        self.told: set[int] = set()  # ranks that were asked to stop
        self.child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Return the exit code of the run as it ended."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)
        failures, in_doubt, world_size = 0, False, 0
        while True:
            saved = self._saved_step()
            command = adapt(self.command, self.say, world_size) if in_doubt else self.command
            attempt = self._attempt(command, saved)
            self.goodput.attempts.append(attempt)
            if attempt.outcome is not Outcome.FAILED or self.asked:
                break
            failures = 1 if attempt.saved_step > saved else failures + 1
            if failures > self.max_failures:
                self.say(f"failed {failures} times without a new checkpoint, last with exit code {attempt.exit_code}")
                break
            in_doubt = in_doubt or failures > 1  # whether all GPUs and machines are still there
            world_size = attempt.world_size or world_size
            if self.fewer_after and failures % self.fewer_after == 0:
                self.command = with_fewer_ranks(self.command, self.say, world_size)
            pause = min(LONGEST_PAUSE, 2.0 ** (failures - 1))
            ended = f"exit code {attempt.exit_code} at step {attempt.last_step}"
            self.say(f"{ended}; again in {pause:.0f} s from step {attempt.saved_step}")
            paused = time.monotonic()
            while time.monotonic() < paused + pause and not self.asked:
                time.sleep(POLL_SECONDS)
            self.goodput.pauses += time.monotonic() - paused
            if self.asked:
                break
        if self.run_dir.exists():
            self.goodput.save(self.run_dir)
        self.say(self.goodput.report())
        stopped = self.asked and attempt.outcome is Outcome.FAILED
        return (Outcome.STOPPED if stopped else attempt.outcome).exit_code

    def _attempt(self, command: list[str], first_step: int) -> Attempt:
        """Start a command once, and see it end."""
        for path in beats_folder(self.run_dir).glob("rank-*.json"):
            path.unlink(missing_ok=True)
        self.told.clear()
        started, died = time.monotonic(), None
        self.child = subprocess.Popen(command, start_new_session=True)
        try:
            while self.child.poll() is None:
                time.sleep(POLL_SECONDS)
                if died is None and any(not is_alive(beat.pid) for beat in self._living() if is_here(beat)):
                    died = time.monotonic()
                if self.asked:
                    self._pass_on()
                elif died is not None and time.monotonic() > died + GRACE_SECONDS:
                    break
        finally:
            self._kill()
        code = self.child.wait()
        beats = read_beats(self.run_dir)
        beat = next(iter(beats), None)
        seconds = dict(beat.seconds) if beat else {}
        if beat and not beat.is_over:
            seconds[beat.phase] = seconds.get(beat.phase, 0.0) + beat.since
        return Attempt(
            outcome=outcome_of(code, beats),
            exit_code=code,
            wall=time.monotonic() - started,
            seconds=seconds,
            first_step=first_step,
            last_step=max(first_step, beat.step + beat.is_over if beat else 0),
            saved_step=self._saved_step(),
            world_size=len(beats),
        )

    def _living(self) -> list[Beat]:
        """Return the last beats of the ranks that have not said that they are through."""
        return [beat for beat in read_beats(self.run_dir) if not beat.is_over]

    def _saved_step(self) -> int:
        found = list_checkpoints(self.run_dir)
        return step_of(found[-1]) if found else 0

    def _kill(self) -> None:
        """End what is left of an attempt: here by signals, elsewhere by an order.

        torchrun's ranks have sessions of their own. A rank elsewhere that has fallen silent is taken for dead.
        """
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
        living = self._living()
        for beat in filter(is_here, living):
            send(beat, signal.SIGKILL)
        elsewhere = [beat for beat in living if not is_here(beat)]
        if elsewhere:
            give_order(self.run_dir, LEAVE)
            while elsewhere:
                time.sleep(SILENT_SECONDS)
                beats = {beat.rank: beat for beat in self._living()}
                elsewhere = [beats[beat.rank] for beat in elsewhere if beats.get(beat.rank, beat) != beat]
            give_order(self.run_dir, GO_ON)

    def _pass_on(self) -> None:
        """Let the ranks save and stop: each once, whenever it has come so far. When asked again, end them."""
        living = self._living()
        if self.asked > 1 or not (living or self.told):
            self._kill()
            return
        for beat in living:
            if is_here(beat) and beat.rank not in self.told:
                send(beat, signal.SIGTERM)
        if not self.told and not all(map(is_here, living)):
            give_order(self.run_dir, STOP)
        self.told |= {beat.rank for beat in living}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1


def find_run_dir(command: Sequence[str]) -> Path:
    """Return the run folder that a command's config names.

    Raises:
        UserError: the command does not start `launch/pretrain.py` with a config.
    """
    words = list(command)
    scripts = [i for i, word in enumerate(words) if Path(word).name == "pretrain.py"]
    after = words[scripts[0] + 1 :] if scripts else []
    configs = [word.partition("=")[2] for word in after if word.startswith("--config=")]
    configs += [after[i + 1] for i, word in enumerate(after[:-1]) if word == "--config"]
    if not configs:
        raise UserError(
            f"{' '.join(words) or 'nothing'}: starts no run; after --, give a command such as "
            "deepspeed launch/pretrain.py --config configs/quickstart/pretrain.yaml"
        )
    overrides = [word for word in after if "=" in word and not word.startswith("-")]
    return load_config(PretrainConfig, Path(configs[0]), overrides).config.run_dir


def outcome_of(code: int, beats: Sequence[Beat]) -> Outcome:
    """Say how an attempt ended, by its ranks' own words if they have said any, else by its exit code."""
    said = {beat.outcome for beat in beats}
    for outcome in (Outcome.USER_ERROR, Outcome.DIVERGED):
        if outcome in said:
            return outcome
    if beats and said <= {Outcome.DONE, Outcome.STOPPED}:
        return Outcome.STOPPED if Outcome.STOPPED in said else Outcome.DONE
    return Outcome.FAILED if beats else FINAL.get(code, Outcome.FAILED)


def is_here(beat: Beat) -> bool:
    """Say whether a rank is on this machine."""
    return beat.host == socket.gethostname()


def send(beat: Beat, number: int) -> None:
    """Send a rank of this machine a signal."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(beat.pid, number)


def is_alive(pid: int) -> bool:
    """Say whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def say(sentence: str) -> None:
    """Tell the person at the terminal."""
    print(f"supervise: {sentence}", file=sys.stderr, flush=True)
