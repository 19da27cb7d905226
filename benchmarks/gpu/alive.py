"""Check that a run stays observable and ends as documented when its device is slow, stopped or broken.

- While the device is busy for five seconds in the middle of a step, heartbeats go on.
- SIGTERM ends a run with exit code 75, after a checkpoint.
- After an error of the device in the forward pass, the last heartbeat says that the rank has failed.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu import runs
from benchmarks.gpu.checks import Check, Task, judge
from benchmarks.gpu.group import Place, run_group
from pretrain.checkpoint.history import list_checkpoints
from pretrain.configfile import CommandLine
from pretrain.engine.deepspeed import start_distributed
from pretrain.heartbeat.beats import BEAT_SECONDS, read_beat
from pretrain.outcome import EXIT_DONE, EXIT_RESUMABLE, EXIT_USER_ERROR, Outcome
from pretrain.run import Run
from pretrain.train import main, take_step

BUSY = 3  # step in which the device is busy or fails, counted from 0
BUSY_SECONDS = 5.0
LEAST_BEATS = 3  # of about five; the thread that writes them may be late
WAIT_SECONDS = 60.0
LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
BREAK = "break"
NOT_FAILED = (EXIT_DONE, EXIT_USER_ERROR, EXIT_RESUMABLE)
EXPECTED = f"last beat end, {Outcome.FAILED.value}"


def tasks(place: Place) -> dict[str, Task]:
    """Return all checks of the group by name."""
    start_distributed()
    recipe = runs.make_recipe(place.work)
    return {
        "beats while the device is busy": Task(partial(spin, place, recipe), 15),
        "SIGTERM": Task(partial(stop, place, recipe), 30),
        "error in forward": Task(partial(break_forward, place, recipe), 30),
    }


def spin(place: Place, recipe: Path) -> Check:
    """Keep the device busy in the forward pass of a step; count the heartbeats until its result is known."""
    one_forward = f"engine.micro_batch_size={runs.BATCH_SIZE}"
    config = runs.load(recipe, place.work / "spin", one_forward, "logging.every_steps=1000")  # a row of metrics waits
    keep_busy = spinner(place)
    seen: dict[int, tuple[float, int]] = {}  # step -> time and number of heartbeats when it began

    def take(run: Run, *arguments: Any) -> Any:
        seen[run.state.step] = time.monotonic(), beats_of(run)
        if run.state.step != BUSY:
            return take_step(run, *arguments)
        with before_forward(run, keep_busy):
            return take_step(run, *arguments)

    with runs.around_steps(take):
        runs.train(config)
    # The result of a step is awaited in the next one, so the step after that begins when the device is done.
    (began, beats_before), (ended, beats_after) = seen[BUSY], seen[BUSY + 2]
    seconds, num_beats = ended - began, beats_after - beats_before
    was_busy = seconds >= 0.8 * BUSY_SECONDS
    reason = "" if was_busy else f"the device was busy for {seconds:.1f} s only, so the check proves nothing"
    return judge(
        was_busy and num_beats >= LEAST_BEATS,
        f"{num_beats} beats in {seconds:.1f} s",
        f"at least {LEAST_BEATS}, one every {BEAT_SECONDS:.0f} s",
        reason,
    )


def spinner(place: Place) -> Callable[[], None]:
    """Return a function that keeps the device busy for five seconds; on a CPU it sleeps."""
    if not place.on_gpu:
        return lambda: time.sleep(BUSY_SECONDS)
    cycles = int(cycles_per_second() * BUSY_SECONDS)
    return lambda: torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def cycles_per_second() -> float:
    """Return how many cycles `torch.cuda._sleep` spins in a second."""
    cycles = 200_000_000
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]  # the first kernel also loads code
    torch.cuda.synchronize()
    started = time.monotonic()
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return cycles / (time.monotonic() - started)


def beats_of(run: Run) -> int:
    """Return how many heartbeats this rank has written to its file."""
    beat = read_beat(run.config.run_dir, 0)
    return beat.num_beats if beat else 0


def before_forward(run: Run, work: Callable[[], None]) -> Any:
    """Do some work at the beginning of the objective's forward passes, while the context is entered."""
    forward = type(run.objective).forward

    def work_then_forward(objective: Any, *inputs: Any, **options: Any) -> dict[str, Tensor]:
        work()
        found: dict[str, Tensor] = forward(objective, *inputs, **options)
        return found

    return mock.patch.object(type(run.objective), "forward", work_then_forward)


def stop(place: Place, recipe: Path) -> Check:
    """Start a long run by its script, and end it with SIGTERM once it trains."""
    run_dir = place.work / "stopped"
    overrides = [f"run_dir={run_dir}", "schedule.total_steps=100000", "logging.every_steps=1000"]
    process = subprocess.Popen([sys.executable, str(LAUNCH), "--config", str(recipe), *overrides])
    try:
        wait_until(lambda: has_trained(run_dir, process), "the run has not begun to train")
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code = process.wait(WAIT_SECONDS)
    finally:
        process.kill()
    seconds, saved = time.monotonic() - began, len(list_checkpoints(run_dir))
    figure = f"exit code {code} after {seconds:.1f} s, {saved} checkpoints"
    return judge(code == EXIT_RESUMABLE and saved == 1, figure, f"exit code {EXIT_RESUMABLE}, 1 checkpoint")


def has_trained(run_dir: Path, process: "subprocess.Popen[bytes]") -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"the run ended with exit code {process.returncode}")
    beat = read_beat(run_dir, 0)
    return beat is not None and beat.step >= 2


def wait_until(holds: Callable[[], bool], problem: str) -> None:
    """Wait until a condition holds.

    Raises:
        RuntimeError: If it does not hold after a minute.
    """
    end = time.monotonic() + WAIT_SECONDS
    while not holds():
        if time.monotonic() > end:
            raise RuntimeError(f"{problem} after {WAIT_SECONDS:.0f} s")
        time.sleep(0.1)


def break_forward(place: Place, recipe: Path) -> Check:
    """Run this file as a process whose device fails in a forward pass; read its last heartbeat."""
    run_dir = place.work / "broken"
    command = [sys.executable, "-m", "benchmarks.gpu.alive", BREAK, "--recipe", str(recipe), "--run-dir", str(run_dir)]
    code = subprocess.run(command, timeout=WAIT_SECONDS, check=False).returncode
    beat = read_beat(run_dir, 0)
    if beat is None:
        return judge(False, f"exit code {code}, no heartbeat", EXPECTED)
    figure = f"exit code {code}, last beat {beat.phase} in step {beat.step}, {beat.outcome}"
    # A GPU reports the error later, perhaps when the next step waits for the result of this one.
    has_failed = beat.has_failed and beat.outcome == Outcome.FAILED and beat.step in (BUSY, BUSY + 1)
    return judge(has_failed and code not in NOT_FAILED, figure, EXPECTED)


def train_and_break(recipe: Path, run_dir: Path) -> int:
    """Train; in one forward pass, read beyond the end of a tensor, which a GPU reports some operations later."""

    def read_beyond_the_end(device: torch.device) -> None:
        torch.zeros(1, device=device)[torch.full((1,), 7, device=device)].sum()

    def take(run: Run, *arguments: Any) -> Any:
        if run.state.step != BUSY:
            return take_step(run, *arguments)
        with before_forward(run, partial(read_beyond_the_end, run.engine.device)):
            return take_step(run, *arguments)

    with runs.around_steps(take):
        return main(CommandLine(runs.load(recipe, run_dir), "", resume=False))


if __name__ == "__main__":
    if sys.argv[1:2] == [BREAK]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--recipe", type=Path, required=True)
        parser.add_argument("--run-dir", type=Path, required=True)
        options = parser.parse_args(sys.argv[2:])
        sys.exit(train_and_break(options.recipe, options.run_dir))
    else:
        run_group(__doc__, tasks)
