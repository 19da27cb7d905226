"""Pretrain a Vision Transformer: started by `deepspeed`, `torchrun` or plain `python`, from any directory."""

import sys
from pathlib import Path

# A launcher puts this folder first on the path, where `pretrain` would be this very file.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.config import PretrainConfig
from pretrain.configfile import read_command_line

if __name__ == "__main__":
    command = read_command_line(
        PretrainConfig,
        description="Pretrain a Vision Transformer. A run folder with a checkpoint is continued.",
        example="deepspeed launch/pretrain.py --config configs/quickstart/pretrain.yaml optimizer.learning_rate=3e-4",
        resumable=True,
    )
    from pretrain.train import main  # torch and deepspeed come only now, when there is no mistake left

    sys.exit(main(command))
