"""Ranks of a real run that are stopped or slowed down: how soon is each named, and is anybody named wrongly?

    python benchmarks/watching.py --faults 20      # a rank that is stopped, hangs, or has a third of its speed, in turn
    python benchmarks/watching.py --quiet 3600     # an hour in which nothing is wrong; evaluations included

A fault is ended as soon as it has been named with its stack, or after 30 seconds; the next one comes when both ranks
train again. A rank hangs in a signal's handler: its process lives and beats, its main thread does not come back.
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

NAMED = re.compile(r"rank (\d+) \(process \d+ on [^)]*\) (hangs|lags|saves slowly|is silent)[^\n]*\n +File ")
GIVEN_UP = 30.0  # seconds without being named
SLICE = 0.005  # seconds that a slowed rank runs, between twice as long of standing still
WATCHED = "VITRAIL_BENCHMARK_WATCHED"  # in the environment of a rank
EVALUATED = ["evaluation.every_steps=200", "evaluation.probe_every_steps=400"]
LARGER = ["model.image_size=64", "model.hidden_size=192", "model.num_hidden_layers=6"]


@contextlib.contextmanager
def between(begin: int, end: int, pid: int) -> Iterator[None]:
    """Send a process one signal, and after a while another."""
    os.kill(pid, begin)
    try:
        yield
    finally:
        os.kill(pid, end)


stopped = partial(between, signal.SIGSTOP, signal.SIGCONT)
hung = partial(between, signal.SIGUSR2, signal.SIGUSR2)


@contextlib.contextmanager
def slowed(pid: int) -> Iterator[None]:
    """Let a process run a third of the time."""
    over = threading.Event()

    def stop_and_go() -> None:
        while not over.is_set():
            with stopped(pid):
                time.sleep(2 * SLICE)
            time.sleep(SLICE)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def named(log: Path) -> list[tuple[int, str]]:
    """Return whom the ranks have named so far, and as what."""
    return [(int(rank), said) for rank, said in NAMED.findall(log.read_text(errors="replace"))]


def wait_for_steps(run_dir: Path, steps: int) -> list[Beat]:
    """Wait until both ranks have trained so many steps more; return their beats."""
    first, deadline = -1, time.monotonic() + 300
    while time.monotonic() < deadline:
        time.sleep(0.2)
        beats = [beat for rank in range(2) if (beat := read_beat(run_dir, rank)) and beat.phase != "start"]
        if len(beats) == 2 and first < 0:
            first = beats[0].step
        if first >= 0 and all(beat.step > first + steps for beat in beats):
            return beats
    raise TimeoutError


def train_until_asked_to_hang() -> int:
    """Be a rank: train as `launch/pretrain.py` does, but for doing nothing from one SIGUSR2 to the next."""
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
    parser.add_argument("--faults", type=int, default=20, help="of each kind")
    parser.add_argument("--stage", type=int, default=1, help="of ZeRO")
    parser.add_argument("--quiet", type=float, default=0.0, help="seconds; then there are no faults")
    arguments = parser.parse_args()
    kinds: dict[str, Callable[[int], contextlib.AbstractContextManager[None]]] = {
        "stopped": stopped,
        "hanging": hung,
        "slow": slowed,
    }
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        work, run_dir, log = Path(name), Path(name) / "run", Path(name) / "log"
        command = prepare(work, steps=10_000_000, save_every=500, script=Path(__file__).resolve())
        settings = [f"run_dir={run_dir}", f"engine.zero_stage={arguments.stage}", *LARGER]
        settings += [f"data.validation={work / 'shards' / 'train'}", *EVALUATED] if arguments.quiet else []
        process = start([*command, *settings], log, **{WATCHED: "1"})
        try:
            beats = wait_for_steps(run_dir, 2 * MAX_STEPS_TIMED)
            begun, first_step, alarms = time.monotonic(), beats[0].step, []
            while arguments.quiet and time.monotonic() < begun + arguments.quiet and process.poll() is None:
                time.sleep(1)
            for kind in [] if arguments.quiet else list(kinds) * arguments.faults:
                victim = chance.choice(wait_for_steps(run_dir, 2 * MAX_STEPS_TIMED))
                known = len(named(log))
                since = time.monotonic()
                with kinds[kind](victim.pid):
                    while time.monotonic() < since + GIVEN_UP:
                        time.sleep(0.05)
                        if victim.rank in [rank for rank, _ in named(log)[known:]]:
                            took[kind].append(time.monotonic() - since)
                            break
                wait_for_steps(run_dir, 1)
                others = [said for rank, said in named(log)[known:] if rank != victim.rank]
                alarms += [f"rank {1 - victim.rank} {said} while rank {victim.rank} is {kind}" for said in others]
            alarms += [f"rank {rank} {said}" for rank, said in named(log)] if arguments.quiet else []
            trained = wait_for_steps(run_dir, 1)[0].step - first_step
        except TimeoutError:
            sys.exit(f"the ranks do not train:\n{log.read_text(errors='replace')[-3000:]}")
        finally:
            for rank in range(2):
                if beat := read_beat(run_dir, rank):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(beat.pid, signal.SIGKILL)
            os.killpg(process.pid, signal.SIGKILL)
        for kind, seconds in took.items():
            if not arguments.quiet:
                soon = sum(one <= 10 for one in seconds)
                shown = f"median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s" if seconds else ""
                print(f"{kind}: named within 10 s in {soon} of {arguments.faults}; {shown}")
        print(
            f"{len(alarms)} false alarms in {time.monotonic() - begun:.0f} s and {trained} steps", *alarms, sep="\n  "
        )


if __name__ == "__main__":
    if WATCHED in os.environ:
        sys.exit(train_until_asked_to_hang())
    main()
