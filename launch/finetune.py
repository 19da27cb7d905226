"""Fine-tune a Hugging Face folder; start it with `accelerate launch`, `deepspeed`, `torchrun` or `python`."""

import sys
from pathlib import Path

# Python puts the folder of this script first on the path, where `finetune` would be this file, not the package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune.config import FinetuneConfig
from pretrain.configfile import read_command_line

DESCRIPTION = "Fine-tune a Hugging Face folder of an image model on your classes."
EXAMPLE = "python launch/finetune.py --config configs/quickstart/finetune.yaml model=runs/quickstart/export"

if __name__ == "__main__":
    command = read_command_line(FinetuneConfig, DESCRIPTION, EXAMPLE, resumable=False)
    from finetune.train import main  # slow: imports torch and transformers, so config errors are reported first

    sys.exit(main(command))
