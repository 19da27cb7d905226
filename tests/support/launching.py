"""A tiny recipe, commands that always end, and waits that do."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

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


@dataclass(frozen=True)
class Shell:
    """Runs commands from a folder that is not the project's; each ends within its timeout, with all it started."""

    folder: Path

    def __call__(self, command: Sequence[str | Path], timeout: float = 280, **env: str) -> "Finished":
        process = self.start(command, **env)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            let_speak(process)
            out, err = process.communicate(timeout=60)
            raise AssertionError(
                f"after {timeout} s, still running: {command}\n{out[-3000:]}\n{err[-20_000:]}"
            ) from None
        finally:
            end(process)
        return Finished(process.returncode, out, err)

    def start(self, command: Sequence[str | Path], **env: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=self.folder,
            env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@dataclass(frozen=True)
class Finished:
    """What a command left."""

    code: int
    out: str
    err: str


def let_speak(process: "subprocess.Popen[str]") -> None:
    """End a process and all that it started, each Python telling where all of its threads are."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGABRT)
                time.sleep(0.5)  # one after the other, or their words would be mixed


def end(process: "subprocess.Popen[str]") -> None:
    """End a process and all that it started, whatever they do; torchrun puts its ranks into sessions of their own."""
    started = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def wait_for(condition: Callable[[], object], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def free_port() -> str:
    """Return a port that nobody listens on, below those that the system gives to any connection made meanwhile."""
    chance = random.SystemRandom()  # tests that run at once would draw the same from a seed
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", chance.randrange(20_000, 32_000)))
            return str(free.getsockname()[1])
