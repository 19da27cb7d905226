"""Two ranks under the `deepspeed` launcher, a ViT on scikit-learn's digits: the run that other benchmarks disturb."""

import os
import subprocess
import sys
from pathlib import Path

from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import Recipe
from pretrain.data.sources import keep_classes, list_digits
from tests.launching import free_port

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


def prepare(work: Path, steps: int, save_every: int) -> list[str]:
    """Write the shards and the config; return the command that trains, without its run folder."""
    make_shards(keep_classes(list_digits(), ["0", "1", "2"]), work / "shards", Recipe(validation=0.0))
    config = CONFIG.format(shards=work / "shards", steps=steps, save_every=save_every)
    (work / "config.yaml").write_text(config)
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [launcher, "--num_gpus", "2", "--master_port", free_port(), str(PRETRAIN)]
    return [*command, "--config", str(work / "config.yaml")]


def start(command: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start a command in a session of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=environment)
