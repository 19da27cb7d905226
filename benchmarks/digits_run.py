"""Start a small training run under the `deepspeed` launcher and kill its ranks; shared by several benchmarks.

The run trains a small ViT on scikit-learn's digits.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from launch.supervisor.supervisor import is_alive
from pretrain.checkpoint.history import list_unfinished
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes
from pretrain.heartbeat.beats import END, START, Beat, read_beats

PRETRAIN = Path(__file__).resolve().parents[1] / "launch" / "pretrain.py"
CONFIG = """
run_dir: unused
data: {{train: {shards}/train, num_workers: 1, shuffle_window: 4}}
model: {{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 8, image_size: 32}}
optimizer: {{learning_rate: 3e-4}}
schedule: {{total_steps: {steps}, warmup_steps: 20}}
engine: {{zero_stage: 1, precision: fp32, global_batch_size: 32, micro_batch_size: 16}}
logging: {{every_steps: 1}}
checkpoint: {{every_steps: {save_every}}}
tracking: {{uri: "off"}}
"""


def prepare(work: Path, steps: int, save_every: int, script: Path = PRETRAIN) -> list[str]:
    """Write the shards and the config, and return the command that trains on two ranks.

    Args:
        work: Folder for the shards and the config.
        steps: Number of training steps.
        save_every: Number of steps between two checkpoints.
        script: Script that each rank runs.

    Returns:
        Words of the command; the caller appends `run_dir=...`.
    """
    make_shards(keep_classes(list_digits(), ["0", "1", "2"]), work / "shards", ShardOptions(validation_fraction=0.0))
    config = CONFIG.format(shards=work / "shards", steps=steps, save_every=save_every)
    (work / "config.yaml").write_text(config)
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [launcher, "--num_gpus", "2", "--master_port", free_port(), str(script)]
    return [*command, "--config", str(work / "config.yaml")]


def free_port() -> str:
    """Return a TCP port that is not in use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(command: list[str], log: Path, **variables: str) -> "subprocess.Popen[bytes]":
    """Start a command in a new session.

    Args:
        command: Words of the command.
        log: File to which its output is appended.
        **variables: Additional environment variables.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **variables}
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=environment)


def kill_ranks(
    run_dir: Path,
    process: "subprocess.Popen[bytes]",
    kills: int,
    seconds: float,
    generator: random.Random,
    world_size: int = 2,
) -> list[bool]:
    """Repeatedly kill a random rank by SIGKILL, each time after all ranks have trained for a while.

    Args:
        run_dir: Run folder, for its heartbeats and checkpoints.
        process: Launcher of the run.
        kills: Maximum number of kills; fewer if the run ends earlier.
        seconds: Mean training time between two kills, in seconds.
        generator: Generator that decides the pauses and the ranks.
        world_size: Number of ranks.

    Returns:
        For each kill, whether a checkpoint was being written.
    """
    killed: list[bool] = []
    while process.poll() is None and len(killed) < kills:
        pause = generator.uniform(0.5, 1.5) * seconds
        trained, last = 0.0, time.monotonic()
        while process.poll() is None and trained < pause:
            time.sleep(0.05)
            beats, now = read_beats(run_dir), time.monotonic()
            # Heartbeats of killed ranks remain, so the processes are checked as well.
            all_train = len(beats) == world_size and all(map(is_training, beats))
            trained += (now - last) if all_train else 0.0
            last = now
        if trained >= pause:
            killed.append(bool(list_unfinished(run_dir)))
            os.kill(generator.choice(read_beats(run_dir)).pid, signal.SIGKILL)
    return killed


def is_training(beat: Beat) -> bool:
    """Return whether a rank's process is alive and between its first and its last step."""
    return beat.phase not in (START, END) and is_alive(beat.pid)
