"""Export and warm start use the teacher of a self-distilled run."""

import json
from pathlib import Path

import torch
import transformers

from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.warm_start import warm_start
from pretrain.config import DataConfig, PretrainConfig, ScheduleConfig, SupervisedConfig
from pretrain.export.folder import export
from pretrain.model.vit import ViT
from pretrain.objectives import build_objective
from pretrain.state import TrainState
from tests.support.checkpoints import write_checkpoint
from tests.support.self_distillation import MODEL, build_self_distillation


def test_teacher_is_exported_and_started_from(tmp_path: Path) -> None:
    objective = build_self_distillation()
    with torch.no_grad():
        for tensor in objective.state_dict().values():
            tensor.add_(0.05 * torch.randn_like(tensor))  # so that student and teacher differ
    config = PretrainConfig(
        run_dir=tmp_path,
        data=DataConfig(train=str(tmp_path)),
        model=MODEL,
        objective=objective.config,
        schedule=ScheduleConfig(total_steps=9),
    )
    resolved = json.loads(config.model_dump_json())
    manifest = Manifest(TrainState(9, 99, 72), 1, {"training": "digest"}, ["a", "b"], resolved, "commit")
    write_checkpoint(tmp_path / "checkpoints" / "step-00000009", manifest, objective.state_dict(), num_files=2)
    export(tmp_path, tmp_path / "export")
    folder = transformers.AutoModel.from_pretrained(tmp_path / "export", add_pooling_layer=False)
    assert folder.config.architectures == ["ViTModel"]  # no classifier, though the data had classes
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = objective.encoder.eval()(images)
        torch.testing.assert_close(folder(images).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(objective.student.eval()(images), expected, atol=0.1)
        for source in (tmp_path, tmp_path / "export"):
            target = build_objective(SupervisedConfig(), ViT(MODEL), [0.5, 0.5], config.preprocessing).eval()
            warm_start(target, source, ["a", "b"], 1e-6)
            torch.testing.assert_close(target.encoder(images), expected, rtol=1e-5, atol=1e-5)
            other = build_self_distillation().eval()
            warm_start(other, source, ["c"], 1e-6)
            other.after_warm_start()
            torch.testing.assert_close(other.student(images), expected, rtol=1e-5, atol=1e-5)
        again = build_self_distillation().eval()
        warm_start(again, tmp_path, ["a", "b"], 1e-6)  # the classes are equal, so heads are copied too
        again.after_warm_start()
        for name, tensor in again.student_cls_head.state_dict().items():
            torch.testing.assert_close(tensor, objective.cls_head.state_dict()[name])
