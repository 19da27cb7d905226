"""Fine-tune a Hugging Face folder: started by `accelerate launch`, `deepspeed`, `torchrun` or plain `python`."""

import sys
from pathlib import Path

# A launcher puts this folder first on the path, where `finetune` would be this very file.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune.config import FinetuneConfig
from pretrain.configfile import read_command_line

if __name__ == "__main__":
    command = read_command_line(
        FinetuneConfig,
        description="Adapt a Hugging Face image-classification folder to your classes.",
        example="python launch/finetune.py --config configs/quickstart/finetune.yaml model=runs/quickstart/export",
        resumable=False,
    )
    from finetune.train import main  # torch and transformers come only now, when there is no mistake left

    sys.exit(main(command))
