"""A run under the `deepspeed` launcher, a small ViT on scikit-learn's digits: the one that other benchmarks disturb."""

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
    """Write the shards and the config; return the command that trains on two ranks, without its run folder."""
    make_shards(keep_classes(list_digits(), ["0", "1", "2"]), work / "shards", ShardOptions(validation_fraction=0.0))
    config = CONFIG.format(shards=work / "shards", steps=steps, save_every=save_every)
    (work / "config.yaml").write_text(config)
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [launcher, "--num_gpus", "2", "--master_port", free_port(), str(script)]
    return [*command, "--config", str(work / "config.yaml")]


def free_port() -> str:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(command: list[str], log: Path, **variables: str) -> "subprocess.Popen[bytes]":
    """Start a command in a session of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **variables}
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=environment)


def disturb(
    run_dir: Path,
    process: "subprocess.Popen[bytes]",
    kills: int,
    seconds: float,
    chance: random.Random,
    world_size: int = 2,
) -> list[bool]:
    """Kill a random rank again and again, each time after all have trained for a while.

    Returns:
        For each kill, whether a checkpoint was being written.
    """
    killed: list[bool] = []
    while process.poll() is None and len(killed) < kills:
        pause = chance.uniform(0.5, 1.5) * seconds
        trained, last = 0.0, time.monotonic()
        while process.poll() is None and trained < pause:
            time.sleep(0.05)
            beats, now = read_beats(run_dir), time.monotonic()
            all_train = len(beats) == world_size and all(map(trains, beats))  # so none that was killed before
            trained += (now - last) if all_train else 0.0
            last = now
        if trained >= pause:
            killed.append(bool(list_unfinished(run_dir)))
            os.kill(chance.choice(read_beats(run_dir)).pid, signal.SIGKILL)
    return killed


def trains(beat: Beat) -> bool:
    """Say whether a rank lives and has begun."""
    return beat.phase not in (START, END) and is_alive(beat.pid)
