"""Pretrain a Vision Transformer; start it with `deepspeed`, `torchrun` or `python`, from any directory."""

import signal
import sys
from pathlib import Path

# Python puts the folder of this script first on the path, where `pretrain` would be this file, not the package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.quiet import hide_warnings
from pretrain.config import PretrainConfig
from pretrain.configfile import read_command_line
from pretrain.outcome import exit_rank

DESCRIPTION = "Pretrain a Vision Transformer. If the run folder has a checkpoint, the run resumes from it."
EXAMPLE = "deepspeed launch/pretrain.py --config configs/quickstart/pretrain.yaml optimizer.learning_rate=3e-4"

if __name__ == "__main__":
    hide_warnings()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training handles it, Ctrl-C ends this process at once
    command = read_command_line(PretrainConfig, DESCRIPTION, EXAMPLE, resumable=True)
    from pretrain.train import main  # slow: imports torch and deepspeed, so config errors are reported first

    exit_rank(main(command))
