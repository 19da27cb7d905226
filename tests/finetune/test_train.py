"""The fine-tuning loop by itself: what is trained, what is kept, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from finetune.backbone import load_classifier
from finetune.config import FinetuneConfig
from finetune.predict import predict
from finetune.train import Run, build_run, open_tracker, train
from pretrain.configfile import load_config
from pretrain.data.dataset.open import open_dataset
from pretrain.errors import UserError
from tests.finetune.test_backbone import families, folder_of

RECIPE = """
run_dir: {folder}/run
model: {folder}/model
data: {{train: {digits}/train, validation: {digits}/validation, num_workers: 0, labels_per_class: 8}}
augment: {{crop_scale: [0.8, 1.0], flip: 0.0}}
optimizer: {{learning_rate: 2e-3}}
schedule: {{epochs: 6}}
engine: {{global_batch_size: 12, micro_batch_size: 6}}
evaluation: {{every_epochs: 3}}
tracking: {{uri: off}}
"""


@pytest.fixture
def recipe(tmp_path: Path, digits: Path) -> Path:
    folder_of(families()["vit"], tmp_path / "model")
    path = tmp_path / "finetune.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, digits=digits))
    return path


def run_of(recipe: Path, *overrides: str) -> Run:
    return build_run(load_config(FinetuneConfig, recipe, overrides).config, Accelerator(cpu=True))


def fit(run: Run) -> Any:
    with open_tracker(run, "") as tracker:
        return train(run, tracker)


def test_the_best_model_is_kept_and_predicts(recipe: Path, digits: Path, tmp_path: Path) -> None:
    run = run_of(recipe)
    best = fit(run)
    assert run.steps_after(6) == 12
    folder = tmp_path / "run" / "model"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
    }
    samples, right = open_dataset(digits / "validation"), 0
    paths = []
    for shard, row in [(shard, row) for shard, size in enumerate(samples.shard_sizes) for row in range(size)]:
        record = samples.read(shard, row)
        paths.append(tmp_path / f"{record.label}-{shard}-{row}.png")
        Image.fromarray(record.image).save(paths[-1])
    for path, prediction in zip(paths, predict(folder, paths, top_k=2), strict=True):
        assert prediction.path == path
        right += prediction.classes[0][0] == path.name[0]
    assert right / len(paths) == pytest.approx(best.top1)  # the card's number is the folder's number
    assert f"{best.top1:.4f}" in (folder / "README.md").read_text()


def test_a_frozen_backbone_does_not_move(recipe: Path) -> None:
    run = run_of(recipe, "freeze_backbone=true")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    fit(run)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("vit."), name


def test_all_of_a_model_is_trained_otherwise(recipe: Path) -> None:
    run = run_of(recipe)
    before = {name: value.clone() for name, value in run.classifier.named_parameters()}
    fit(run)
    assert not any(torch.equal(value, before[name]) for name, value in run.classifier.named_parameters())


def test_the_best_is_not_the_last(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the accuracy fall from evaluation to evaluation: the first model is kept."""
    falling = iter([0.9, 0.5])
    weights: list[torch.Tensor] = []

    def evaluate(model: Any, *_: Any, **__: Any) -> dict[str, float]:
        weights.append(model.classifier.weight.detach().clone())
        return {"loss": 1.0, "top1": next(falling), "count": 3.0}

    monkeypatch.setattr("finetune.train.evaluate", evaluate)
    assert fit(run_of(recipe)).epoch == 3
    kept = load_classifier(tmp_path / "run" / "model").classifier.weight  # type: ignore[union-attr]
    assert torch.equal(kept, weights[0])  # type: ignore[arg-type]
    assert not torch.equal(weights[0], weights[1])


def test_folders_of_images_train_as_their_shards_do(recipe: Path, tmp_path: Path) -> None:
    """The same images as files: the same classes and count, and a model that learns from them."""
    for name in ("one", "two"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            level = 40 + 10 * i if name == "one" else 255
            Image.new("RGB", (32, 32), (level, 0, 255 - level)).save(tmp_path / "images" / name / f"{i}.png")
    folder = f"data={{train: {tmp_path}/images, validation: {tmp_path}/images, num_workers: 0}}"
    run = run_of(recipe, folder, "schedule.epochs=8", "evaluation.every_epochs=8")
    assert run.training.class_names == ["one", "two"]
    assert run.num_samples == 24
    assert fit(run).top1 > 0.8


def test_accumulation_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    weights = []
    for i, size in enumerate((12, 4)):
        run = run_of(
            recipe,
            f"engine.micro_batch_size={size}",
            f"run_dir={tmp_path}/{i}",
            "augment.mixup=0.5",
            "schedule.epochs=1",
        )
        fit(run)
        weights.append(run.model.state_dict())
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-4), name


def test_bf16_trains(recipe: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = load_config(FinetuneConfig, recipe, ["engine.precision=bf16"]).config
    run = build_run(config, Accelerator(cpu=True, mixed_precision="bf16"))
    assert run.model(pixel_values=torch.zeros(1, 3, 32, 32)).logits.dtype == torch.float32  # accelerate casts back
    assert fit(run).top1 > 0.2
    AcceleratorState._reset_state(reset_partial_state=True)


def test_neighbors_that_are_mixed_are_not_parted(recipe: Path) -> None:
    with pytest.raises(UserError, match="so 9 must be even"):
        load_config(FinetuneConfig, recipe, ["engine.global_batch_size=9", "augment.cutmix=1"])


def test_runs_that_are_refused(recipe: Path, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="class 0 has 160 samples, 500 labels a class were asked for"):
        run_of(recipe, "data.labels_per_class=500")
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a fine-tuned model already; choose another run_dir or set overwrite"):
        run_of(recipe)
    (tmp_path / "pre" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a pretraining run; choose another run_dir"):
        run_of(recipe, f"run_dir={tmp_path}/pre")


def test_a_loss_that_is_not_finite_stops_the_run(recipe: Path) -> None:
    run = run_of(recipe, "optimizer.learning_rate=1e30", "logging.every_steps=1")
    with pytest.raises(FloatingPointError, match="is not finite"):
        fit(run)
