"""Measure how soon a stopped, hanging or slow rank is reported, and count false alarms.

    python benchmarks/watching.py --faults 20      # in turn, a rank is stopped, hangs, or runs at a third of its speed
    python benchmarks/watching.py --quiet 3600     # one hour without faults, including evaluations and probes

A fault ends as soon as the rank has been reported with its stack, or after 30 seconds. The next fault starts when both
ranks train again. A rank hangs in a signal handler: its process continues to write heartbeats, but its main thread does
not return.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.digits_run import prepare, start
from pretrain.config import PretrainConfig
from pretrain.configfile import read_command_line
from pretrain.heartbeat.beats import Beat, read_beat
from pretrain.heartbeat.watch import MAX_STEPS_TIMED

REPORT = re.compile(r"rank (\d+) \(process \d+ on [^)]*\) (hangs|lags|saves slowly|is silent)[^\n]*\n +File ")
MAX_FAULT_SECONDS = 30.0  # a fault ends after this time even if it is not reported
RUN_SECONDS = 0.005  # a slow rank runs for this time, then is stopped for twice as long
IS_RANK = "VITRAIL_BENCHMARK_WATCHED"  # environment variable that makes this script a rank
EVALUATION = ["evaluation.every_steps=200", "evaluation.probe_every_steps=400"]
LARGER_MODEL = ["model.image_size=64", "model.hidden_size=192", "model.num_hidden_layers=6"]


@contextlib.contextmanager
def signaled(first: int, last: int, pid: int) -> Iterator[None]:
    """Send a process the signal `first`, and the signal `last` when the block ends."""
    os.kill(pid, first)
    try:
        yield
    finally:
        os.kill(pid, last)


stopped = partial(signaled, signal.SIGSTOP, signal.SIGCONT)
hung = partial(signaled, signal.SIGUSR2, signal.SIGUSR2)


@contextlib.contextmanager
def slowed(pid: int) -> Iterator[None]:
    """Let a process run only a third of the time until the block ends."""
    ended = threading.Event()

    def stop_and_go() -> None:
        while not ended.is_set():
            with stopped(pid):
                time.sleep(2 * RUN_SECONDS)
            time.sleep(RUN_SECONDS)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def read_reports(log: Path) -> list[tuple[int, str]]:
    """Return the rank and the kind of each report in a log so far."""
    return [(int(rank), kind) for rank, kind in REPORT.findall(log.read_text(errors="replace"))]


def wait_for_steps(run_dir: Path, steps: int) -> list[Beat]:
    """Wait until both ranks have trained more than `steps` further steps, and return their heartbeats.

    Raises:
        TimeoutError: If this takes more than 300 seconds.
    """
    first, deadline = -1, time.monotonic() + 300
    while time.monotonic() < deadline:
        time.sleep(0.2)
        beats = [beat for rank in range(2) if (beat := read_beat(run_dir, rank)) and beat.phase != "start"]
        if len(beats) == 2 and first < 0:
            first = beats[0].step
        if first >= 0 and all(beat.step > first + steps for beat in beats):
            return beats
    raise TimeoutError


def train_and_hang_on_signal() -> int:
    """Train as one rank, like `launch/pretrain.py`, but hang between one SIGUSR2 and the next."""
    from pretrain.train import main as pretrain

    hanging = False

    def hang(number: int, frame: object) -> None:
        nonlocal hanging
        hanging = not hanging
        while hanging:
            time.sleep(0.1)

    signal.signal(signal.SIGUSR2, hang)
    return pretrain(read_command_line(PretrainConfig, description="", example="", resumable=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20, help="number of faults of each kind")
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--quiet", type=float, default=0.0, help="run without faults for this many seconds")
    arguments = parser.parse_args()
    kinds: dict[str, Callable[[int], contextlib.AbstractContextManager[None]]] = {
        "stopped": stopped,
        "hanging": hung,
        "slow": slowed,
    }
    seconds_until_report: dict[str, list[float]] = {kind: [] for kind in kinds}
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        work, run_dir, log = Path(name), Path(name) / "run", Path(name) / "log"
        command = prepare(work, steps=10_000_000, save_every=500, script=Path(__file__).resolve())
        settings = [f"run_dir={run_dir}", f"engine.zero_stage={arguments.stage}", *LARGER_MODEL]
        settings += [f"data.validation={work / 'shards' / 'train'}", *EVALUATION] if arguments.quiet else []
        process = start([*command, *settings], log, **{IS_RANK: "1"})
        try:
            beats = wait_for_steps(run_dir, 2 * MAX_STEPS_TIMED)
            started, first_step, alarms = time.monotonic(), beats[0].step, []
            while arguments.quiet and time.monotonic() < started + arguments.quiet and process.poll() is None:
                time.sleep(1)
            for kind in [] if arguments.quiet else list(kinds) * arguments.faults:
                victim = generator.choice(wait_for_steps(run_dir, 2 * MAX_STEPS_TIMED))
                num_before = len(read_reports(log))
                fault_start = time.monotonic()
                with kinds[kind](victim.pid):
                    while time.monotonic() < fault_start + MAX_FAULT_SECONDS:
                        time.sleep(0.05)
                        if victim.rank in [rank for rank, _ in read_reports(log)[num_before:]]:
                            seconds_until_report[kind].append(time.monotonic() - fault_start)
                            break
                wait_for_steps(run_dir, 1)
                others = [report for rank, report in read_reports(log)[num_before:] if rank != victim.rank]
                alarms += [f"rank {1 - victim.rank} {report} while rank {victim.rank} is {kind}" for report in others]
            alarms += [f"rank {rank} {report}" for rank, report in read_reports(log)] if arguments.quiet else []
            num_steps = wait_for_steps(run_dir, 1)[0].step - first_step
        except TimeoutError:
            sys.exit(f"the ranks make no progress; the end of their log:\n{log.read_text(errors='replace')[-3000:]}")
        finally:
            for rank in range(2):
                if beat := read_beat(run_dir, rank):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(beat.pid, signal.SIGKILL)
            os.killpg(process.pid, signal.SIGKILL)
        for kind, seconds in seconds_until_report.items():
            if not arguments.quiet:
                in_time = sum(value <= 10 for value in seconds)
                shown = f"; median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s" if seconds else ""
                print(f"{kind}: reported within 10 s in {in_time} of {arguments.faults} cases{shown}")
        print(
            f"{len(alarms)} false alarms in {time.monotonic() - started:.0f} s and {num_steps} steps",
            *alarms,
            sep="\n  ",
        )


if __name__ == "__main__":
    if IS_RANK in os.environ:
        sys.exit(train_and_hang_on_signal())
    main()
