"""Run commands and wait for conditions without ever hanging, and a recipe that pretrains in seconds."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil
from typer.testing import CliRunner

from launch.cli import app

ROOT = Path(__file__).resolve().parents[2]

TINY = """
run_dir: {run_dir}
seed: 3
data: {{train: {shards}/train, validation: {shards}/validation, num_workers: 1, shuffle_window: 4}}
preprocessing: {{image_mean: [0.5, 0.5, 0.5], image_std: [0.5, 0.5, 0.5]}}
model: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, mlp_ratio: 2, patch_size: 8, image_size: 32}}
objective: {{label_smoothing: 0.1, augment: {{crop_scale: [0.5, 1.0], brightness: 0.2, mixup: 0.8, cutmix: 1.0}}}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{total_steps: 8, warmup_steps: 2}}
engine: {{zero_stage: 2, precision: fp32, global_batch_size: 16, micro_batch_size: 4}}
logging: {{every_steps: 1}}
checkpoint: {{every_steps: 4, keep_last: 9}}
tracking: {{experiment: tests}}
"""

IDLE_SHARE = 0.05  # of a core; a process that only polls and sends heartbeats uses less
POLL_SECONDS = 0.02
SAMPLE_SECONDS = 1.0


@dataclass(frozen=True)
class Limits:
    """When a command counts as hanging. Neither of the first two limits depends on how busy the machine is.

    Attributes:
        idle_seconds: Longest time in which it writes nothing and uses next to no CPU time.
        silent_cpu_seconds: Most CPU time that it may use without writing anything.
        seconds: Longest time in all.
    """

    idle_seconds: float = 120.0
    silent_cpu_seconds: float = 400.0
    seconds: float = 1500.0


class Progress:
    """What a process and all that it started have written and computed, and whether that has come to a stop.

    Args:
        process: First process of the tree.
        outputs: Files that the processes write to.
        limits: When the tree counts as hanging.
    """

    def __init__(self, process: "subprocess.Popen[str]", outputs: Sequence[Path], limits: Limits) -> None:
        self.process, self.outputs, self.limits = process, outputs, limits
        self.started = self.sampled = self.active = self.written = time.monotonic()
        self.size = self.cpu = self.cpu_when_active = self.cpu_when_written = 0.0

    def check(self) -> None:
        """Look at the processes, at most once a second.

        Raises:
            AssertionError: If they hang. All of them are ended, and the message has their output and stacks.
        """
        now = time.monotonic()
        if now < self.sampled + SAMPLE_SECONDS:
            return
        self.sampled, self.cpu = now, cpu_seconds(self.process.pid)
        size = sum(path.stat().st_size for path in self.outputs if path.exists())
        if size != self.size:
            self.size, self.written, self.cpu_when_written = size, now, self.cpu
            self.active, self.cpu_when_active = now, self.cpu
        if abs(self.cpu - self.cpu_when_active) > IDLE_SHARE * self.limits.idle_seconds:
            self.active, self.cpu_when_active = now, self.cpu
        if now - self.active > self.limits.idle_seconds:
            self.fail(f"no output and no CPU time for {now - self.active:.0f} s")
        if self.cpu - self.cpu_when_written > self.limits.silent_cpu_seconds:
            self.fail(f"no output during {self.cpu - self.cpu_when_written:.0f} s of CPU time")
        if now - self.started > self.limits.seconds:
            self.fail(f"still running after {now - self.started:.0f} s")

    def fail(self, reason: str) -> None:
        """End all processes and raise an AssertionError with their output; each Python process prints its stacks."""
        abort_with_stacks(self.process)
        end(self.process)
        texts = [path.read_text(errors="replace")[-20_000:] for path in self.outputs if path.exists()]
        raise AssertionError("\n".join([f"{reason}: {self.process.args}", *texts]))


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str


@dataclass
class Running:
    """A command at work. Leaving its `with` block ends it, with all that it started."""

    process: "subprocess.Popen[str]"
    out: Path
    err: Path
    limits: Limits
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = Progress(self.process, [self.out, self.err], self.limits)

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        end(self.process)
        for path in (self.out, self.err):
            path.unlink(missing_ok=True)

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds, as long as the command makes progress."""
        while not condition():
            assert self.process.poll() is None or condition(), self.finish().err[-3000:]
            self.progress.check()
            time.sleep(POLL_SECONDS)

    def finish(self) -> Finished:
        """Wait until the command ends, as long as it makes progress."""
        while True:
            try:
                code = self.process.wait(timeout=SAMPLE_SECONDS)
            except subprocess.TimeoutExpired:
                self.progress.check()
            else:
                return Finished(code, *(path.read_text(errors="replace") for path in (self.out, self.err)))


@dataclass(frozen=True)
class Shell:
    """Run commands from a folder that is not the project's; a command that hangs is ended, with all that it started."""

    folder: Path

    def __call__(self, command: Sequence[str | Path], limits: Limits | None = None, **env: str) -> Finished:
        with self.start(command, limits, **env) as running:
            return running.finish()

    def start(self, command: Sequence[str | Path], limits: Limits | None = None, **env: str) -> Running:
        out, err = open_output(), open_output()
        with out, err:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.folder,
                env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1", **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )
        return Running(process, Path(out.name), Path(err.name), limits or Limits())


Vitrail = Callable[..., Finished]


def run_vitrail(*arguments: str | Path) -> Finished:
    """Run the `vitrail` command in this process, which saves the seconds that a new one needs to import torch."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Finished(done.exit_code, done.stdout, done.stderr)


def open_output() -> IO[bytes]:
    """Open a file for a command's output, outside of the folders that tests look into."""
    return tempfile.NamedTemporaryFile(prefix="vitrail-test-", suffix=".log", delete=False)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, of all that it started, and of those of them that have ended."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


def abort_with_stacks(process: "subprocess.Popen[str]") -> None:
    """Abort a process and all that it started; each Python process prints the stacks of all of its threads."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGABRT)
                time.sleep(0.5)  # one after the other, so that their stacks are not mixed


def end(process: "subprocess.Popen[str]") -> None:
    """Kill a process and all that it started; torchrun puts its ranks into sessions of their own."""
    started = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def wait_for(condition: Callable[[], object], timeout: float = 600) -> None:
    """Wait until a condition holds; where a command brings it about, use `Running.wait_until` instead."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(POLL_SECONDS)


def free_port() -> str:
    """Return a port that nobody listens on, below those that the system gives to any connection made meanwhile."""
    generator = random.SystemRandom()  # tests that run at once would get the same port from a seed
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", generator.randrange(20_000, 32_000)))
            return str(free.getsockname()[1])
