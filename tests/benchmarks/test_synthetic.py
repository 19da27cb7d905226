"""Random images go through the project's own loop: the same copies, the same steps and the same checkpoint."""

import json
import sys

from tests.support.launching import ROOT, Shell

TRAIN = """
import json, sys
from pathlib import Path
from unittest import mock

from benchmarks.recording import StepActions
from benchmarks.synthetic import open_synthetic_run, synthetic_config, train_synthetic
from pretrain import steps, train
from pretrain.config import MAEConfig, ModelConfig, SelfDistillationConfig, SupervisedConfig
from pretrain.engine.deepspeed import start_distributed

MODEL = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32)
SIZES = dict(micro_batch_size=2, accumulation_steps=2, total_steps=3, compiled=False, precision="fp32")
start_distributed()
found = {}
for objective in (SupervisedConfig(), MAEConfig(), SelfDistillationConfig()):
    run_dir = Path(sys.argv[1]) / objective.name
    ended = []
    actions = {step: lambda step=step: ended.append(step) for step in range(1, 4)}
    with (
        mock.patch.object(steps, "to_device", wraps=steps.to_device) as copy,
        mock.patch.object(train, "take_step", wraps=train.take_step) as take_step,
        open_synthetic_run(synthetic_config(run_dir, MODEL, objective, **SIZES), num_classes=10) as run,
    ):
        outcome = train_synthetic(run, StepActions(3, actions))
    batches = [call.args[0] for call in copy.call_args_list]
    found[objective.name] = {
        "outcome": outcome.name,
        "ended": ended,
        "steps_taken": take_step.call_count,
        "copies": len(batches),
        "keys": sorted(batches[0]),
        "pixels": [str(each["image"].dtype) for each in batches if "image" in each],
        "position": run.state.position,
        "skipped": run.skipped_steps.total,
        "average": run.ema.decay,
        "checkpoints": [path.name for path in (run_dir / "checkpoints").iterdir()],
    }
print(json.dumps(found))
"""


def test_random_images_go_through_the_real_loop(shell: Shell) -> None:
    done = shell([sys.executable, "-c", TRAIN, shell.folder], PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.code == 0, done.err[-3000:]
    found = json.loads(done.out.splitlines()[-1])
    for seen in found.values():
        assert seen["outcome"] == "DONE"
        assert seen["ended"] == [1, 2, 3]
        assert seen["steps_taken"] == 3
        assert seen["copies"] == 6  # two micro-batches per step
        assert seen["position"] == 12
        assert seen["skipped"] == 0
        assert seen["checkpoints"] == ["step-00000003"]
    assert found["supervised"]["keys"] == ["flip", "image", "label", "position"]
    assert found["supervised"]["pixels"] == ["torch.uint8"] * 6
    assert found["supervised"]["average"] > 0
    assert "patch_order" in found["mae"]["keys"]
    assert {"mask", "all_positions", "global_crops"} <= {*found["self_distillation"]["keys"]}
