"""`vitrail supervise`: restart a run after a crash or a hang, and account for where its time went."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from launch.supervisor.goodput import Attempt, Goodput
from launch.supervisor.resources import with_fewer_ranks, without_lost_resources
from pretrain.checkpoint.history import list_checkpoints, step_of
from pretrain.config import PretrainConfig
from pretrain.configfile import load_config
from pretrain.errors import UserError
from pretrain.heartbeat.beats import ABORT, CONTINUE, STOP, Beat, beats_folder, read_beats, write_order
from pretrain.heartbeat.diagnosis import SILENT_SECONDS
from pretrain.heartbeat.processes import is_alive
from pretrain.outcome import Outcome

POLL_SECONDS = 0.2
GRACE_SECONDS = 3.0  # for the launcher to end the other ranks after one has died
LONGEST_PAUSE = 60.0  # seconds between two attempts
# Exit codes that keep their meaning when no rank has reported an outcome; a launcher fails with 1.
FINAL_OUTCOMES = {outcome.exit_code: outcome for outcome in (Outcome.DONE, Outcome.USER_ERROR, Outcome.STOPPED)}


class Supervisor:
    """Runs a command until it is done, is asked to stop, or another restart would not help.

    Args:
        command: Command that starts `launch/pretrain.py` with its config and overrides.
        max_failures: Number of failures in a row, without a new checkpoint in between, that are tolerated.
        fewer_after: Number of failures in a row after which one rank fewer is started; 0 keeps the number of ranks.
        report: Function that is called with a sentence about every event.

    Attributes:
        run_dir: Run folder that the command's config names.
        goodput: Time account of all attempts.
    """

    def __init__(
        self, command: Sequence[str], max_failures: int = 5, fewer_after: int = 2, report: Callable[[str], None] = print
    ) -> None:
        self.run_dir = find_run_dir(command)
        self.goodput = Goodput()
        self._command = list(command)
        self._max_failures = max_failures
        self._fewer_after = fewer_after
        self._report = report
        self._stop_requests = 0
        self._stopping_ranks: set[int] = set()  # the ranks that know of the stop request
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run the command with restarts; return the exit code of the run as it finally ended."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._request_stop)
        num_failures, probes_resources, world_size = 0, False, 0
        while True:
            saved_step = self._saved_step()
            command = self._command
            if probes_resources:
                command = without_lost_resources(command, self._report, world_size)
            attempt = self._run_once(command, saved_step)
            self.goodput.add(attempt)
            if attempt.outcome is not Outcome.FAILED or self._stop_requests:
                break
            num_failures = 1 if attempt.saved_step > saved_step else num_failures + 1
            if num_failures > self._max_failures:
                failures = f"{num_failures} {'failure' if num_failures == 1 else 'failures'}"
                self._report(
                    f"giving up after {failures} without a new checkpoint; the last exit code was {attempt.exit_code}"
                )
                break
            probes_resources = probes_resources or num_failures > 1
            world_size = attempt.world_size or world_size
            if self._fewer_after and num_failures % self._fewer_after == 0:
                self._command = with_fewer_ranks(self._command, self._report, world_size)
            self._pause(attempt, min(LONGEST_PAUSE, 2.0 ** (num_failures - 1)))
            if self._stop_requests:
                break
        if self.run_dir.exists():
            self.goodput.save(self.run_dir)
        self._report(self.goodput.report())
        is_stopped = self._stop_requests and attempt.outcome is Outcome.FAILED
        return (Outcome.STOPPED if is_stopped else attempt.outcome).exit_code

    def _pause(self, attempt: Attempt, seconds: float) -> None:
        """Wait before the next attempt, unless a stop is requested."""
        self._report(
            f"exit code {attempt.exit_code} at step {attempt.last_step}; "
            f"restarting from step {attempt.saved_step} in {seconds:.0f} s"
        )
        started = time.monotonic()
        while time.monotonic() < started + seconds and not self._stop_requests:
            time.sleep(POLL_SECONDS)
        self.goodput.add_pause(time.monotonic() - started)

    def _run_once(self, command: list[str], first_step: int) -> Attempt:
        """Start a command and wait for its end."""
        for path in beats_folder(self.run_dir).glob("rank-*.json"):
            path.unlink(missing_ok=True)
        self._stopping_ranks.clear()
        started, rank_died = time.monotonic(), None
        self._process = subprocess.Popen(command, start_new_session=True)
        try:
            while self._process.poll() is None:
                time.sleep(POLL_SECONDS)
                if rank_died is None and any(not is_alive(beat.pid) for beat in filter(is_local, self._running())):
                    rank_died = time.monotonic()
                if self._stop_requests:
                    self._forward_stop()
                elif rank_died is not None and time.monotonic() > rank_died + GRACE_SECONDS:
                    break
        finally:
            self._kill()
        exit_code = self._process.wait()
        beats = read_beats(self.run_dir)
        beat = next(iter(beats), None)
        phase_seconds = dict(beat.phase_seconds) if beat else {}
        if beat and not beat.has_ended:
            phase_seconds[beat.phase] = phase_seconds.get(beat.phase, 0.0) + beat.seconds_in_phase
        return Attempt(
            outcome=outcome_of_attempt(exit_code, beats),
            exit_code=exit_code,
            wall_seconds=time.monotonic() - started,
            phase_seconds=phase_seconds,
            first_step=first_step,
            last_step=max(first_step, beat.step + beat.has_ended if beat else 0),
            saved_step=self._saved_step(),
            world_size=len(beats),
        )

    def _running(self) -> list[Beat]:
        """Return the last heartbeats of the ranks that have not reported their end."""
        return [beat for beat in read_beats(self.run_dir) if not beat.has_ended]

    def _saved_step(self) -> int:
        checkpoints = list_checkpoints(self.run_dir)
        return step_of(checkpoints[-1]) if checkpoints else 0

    def _kill(self) -> None:
        """End all remaining processes of an attempt: local ones by signals, ranks on other machines by an order.

        Ranks are killed by their own process IDs as well, because torchrun starts each in a session of its own. A rank
        on another machine counts as ended once its heartbeats have stopped.
        """
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        running = self._running()
        for beat in filter(is_local, running):
            send_signal(beat, signal.SIGKILL)
        remote = [beat for beat in running if not is_local(beat)]
        if remote:
            write_order(self.run_dir, ABORT)
            while remote:
                time.sleep(SILENT_SECONDS)
                latest = {beat.rank: beat for beat in self._running()}
                remote = [latest[beat.rank] for beat in remote if latest.get(beat.rank, beat) != beat]
            write_order(self.run_dir, CONTINUE)

    def _forward_stop(self) -> None:
        """Ask every rank once, as soon as it runs, to save and stop. A second stop request ends them at once."""
        running = self._running()
        if self._stop_requests > 1 or not (running or self._stopping_ranks):
            self._kill()
            return
        for beat in filter(is_local, running):
            if beat.rank not in self._stopping_ranks:
                send_signal(beat, signal.SIGTERM)
        if not self._stopping_ranks and not all(map(is_local, running)):
            write_order(self.run_dir, STOP)
        self._stopping_ranks |= {beat.rank for beat in running}

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_requests += 1


def find_run_dir(command: Sequence[str]) -> Path:
    """Return the run folder that a command's config and overrides name.

    Raises:
        UserError: If the command does not start `launch/pretrain.py` with a config.
    """
    words = list(command)
    scripts = [i for i, word in enumerate(words) if Path(word).name == "pretrain.py"]
    after = words[scripts[0] + 1 :] if scripts else []
    configs = [word.partition("=")[2] for word in after if word.startswith("--config=")]
    configs += [after[i + 1] for i, word in enumerate(after[:-1]) if word == "--config"]
    if not configs:
        raise UserError(
            f"{' '.join(words) or 'no command'}: does not start launch/pretrain.py with a config; after --, give a "
            "command such as deepspeed launch/pretrain.py --config configs/quickstart/pretrain.yaml"
        )
    overrides = [word for word in after if "=" in word and not word.startswith("-")]
    return load_config(PretrainConfig, Path(configs[0]), overrides).config.run_dir


def outcome_of_attempt(exit_code: int, beats: Sequence[Beat]) -> Outcome:
    """Return how an attempt ended.

    What the ranks reported in their last heartbeats decides; the exit code counts only if no rank wrote any, because
    launchers replace the exit codes of their ranks.

    Args:
        exit_code: Exit code of the command.
        beats: Last heartbeat of each rank.
    """
    reported = {beat.outcome for beat in beats}
    for outcome in (Outcome.USER_ERROR, Outcome.DIVERGED):
        if outcome in reported:
            return outcome
    if beats and reported <= {Outcome.DONE, Outcome.STOPPED}:
        return Outcome.STOPPED if Outcome.STOPPED in reported else Outcome.DONE
    return Outcome.FAILED if beats else FINAL_OUTCOMES.get(exit_code, Outcome.FAILED)


def is_local(beat: Beat) -> bool:
    """Return whether a rank runs on this machine."""
    return beat.host == socket.gethostname()


def send_signal(beat: Beat, number: int) -> None:
    """Send a signal to a rank on this machine, if its process still exists."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(beat.pid, number)
