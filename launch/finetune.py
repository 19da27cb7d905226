"""Fine-tune a Hugging Face folder; start it with `accelerate launch`, `deepspeed`, `torchrun` or `python`."""

import signal
import sys
from pathlib import Path

# Python puts the folder of this script first on the path, where `finetune` would be this file, not the package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune.config import FinetuneConfig
from launch.quiet import hide_warnings
from pretrain.configfile import read_command_line
from pretrain.outcome import exit_rank

DESCRIPTION = "Fine-tune a Hugging Face folder of an image model on your classes."
EXAMPLE = "python launch/finetune.py --config configs/quickstart/finetune.yaml model=runs/quickstart/export"

if __name__ == "__main__":
    hide_warnings()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training handles it, Ctrl-C ends this process at once
    command = read_command_line(FinetuneConfig, DESCRIPTION, EXAMPLE, resumable=False)
    from finetune.train import main  # slow: imports torch and transformers, so config errors are reported first

    exit_rank(main(command))
