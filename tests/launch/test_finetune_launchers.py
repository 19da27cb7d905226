"""Fine-tuning of other architectures, started by deepspeed, torchrun and accelerate."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune.backbone import load_classifier, load_preprocessor
from finetune.evaluate import evaluate
from pretrain.config import FaultBudget
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.quarantine import Quarantine
from tests.support.classifiers import save_classifier, tiny_configs
from tests.support.launching import Shell, free_port
from tests.support.runs import FINETUNE, FINETUNE_YAML, logged, losses

Tool = Callable[[str], str]


def test_finetuning_of_other_architectures_on_two_ranks(shell: Shell, digits: Path, tool: Tool, tmp_path: Path) -> None:
    """DINOv2 has a parameter that classification never uses, and ResNet has statistics that differ between ranks.

    They also cover each way to start fine-tuning: deepspeed, torchrun, accelerate.
    """
    recipe = tmp_path / "finetune.yaml"
    recipe.write_text(FINETUNE_YAML.format(folder=tmp_path, digits=digits))
    settings = ["--config", recipe, "schedule.epochs=1", "tracking.uri=off", "data.num_workers=0"]
    launchers = {
        "dinov2": [tool("deepspeed"), "--num_gpus", "2"],
        "resnet": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"],
    }
    for architecture, launcher in launchers.items():
        folder, run_dir = (
            save_classifier(tiny_configs()[architecture], tmp_path / architecture),
            tmp_path / "runs" / architecture,
        )
        two = [*launcher, "--master_port", free_port()]
        done = shell([*two, FINETUNE, *settings, f"model={folder}", f"run_dir={run_dir}"])
        assert done.code == 0, done.err[-3000:]
        evaluation = evaluate(
            load_classifier(run_dir / "model"),
            open_dataset(digits / "validation"),
            load_preprocessor(run_dir / "model"),
            batch_size=8,
            num_workers=0,
            device=torch.device("cpu"),
            quarantine=Quarantine(tmp_path / "quarantine.jsonl", FaultBudget(), 0, writes=True),
        )
        assert evaluation is not None
        assert logged(run_dir, "validation/loss") == pytest.approx([evaluation.loss], abs=1e-5)
    one = [tool("accelerate"), "launch", "--cpu", "--num_processes", "1", FINETUNE, *settings]
    alone = shell([*one, f"model={tmp_path}/dinov2", f"run_dir={tmp_path}/runs/alone"])
    assert alone.code == 0, alone.err[-3000:]
    assert losses(tmp_path / "runs" / "alone") == pytest.approx(losses(tmp_path / "runs" / "dinov2"), abs=1e-4)
