"""The fine-tuning loop: which parameters are trained, which model is kept, and how a run ends."""

import ast
import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image
from torch._dynamo.testing import CompileCounter

import pretrain.machine
from finetune.backbone import load_classifier
from finetune.config import FinetuneConfig
from finetune.evaluate import Evaluation
from finetune.predict import predict
from finetune.run import FinetuneRun, build_accelerator, build_run, check_run_dir, open_tracker
from finetune.steps import batch_loss
from finetune.train import FinetuneResult, main, train
from pretrain.configfile import CommandLine, load_config
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.limits import BatchSize, Limits
from pretrain.errors import DivergedError, MachineError, UserError
from pretrain.heartbeat.beats import read_beats
from pretrain.journal import read_rows
from pretrain.outcome import EXIT_INTERRUPTED, EXIT_USER_ERROR
from tests.support.classifiers import save_classifier, tiny_configs
from tests.support.disk import full_disk
from tests.support.launching import ROOT, Shell, Vitrail
from tests.support.runs import FINETUNE, losses

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
    save_classifier(tiny_configs()["vit"], tmp_path / "model")
    path = tmp_path / "finetune.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, digits=digits))
    return path


def build(recipe: Path, *overrides: str) -> FinetuneRun:
    return build_run(load_config(FinetuneConfig, recipe, overrides).config, Accelerator(cpu=True))


def test_new_tars_are_indexed(recipe: Path, digits: Path, tmp_path: Path) -> None:
    overrides = [f"data.cache_dir={tmp_path / 'cache'}"]
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        for tar in (digits / name).glob("*.tar"):
            shutil.copy(tar, tmp_path / name)
        overrides.append(f"data.{name}={tmp_path / name}")
    run = build(recipe, *overrides)
    assert (tmp_path / "validation" / "dataset.json").exists()
    assert run.validation.digest == open_dataset(digits / "validation").digest


def fit(run: FinetuneRun, should_stop: Callable[[], bool] = lambda: False) -> FinetuneResult:
    with open_tracker(run, "") as tracker:
        return train(run, tracker, should_stop)


def fit_to_the_end(run: FinetuneRun) -> tuple[float, int]:
    """Train all epochs; return the top-1 accuracy and the epoch of the saved model."""
    result = fit(run)
    assert result.stopped_after is None
    assert result.best is not None
    return result.best.top1, result.best.epoch


def fake_evaluations(monkeypatch: pytest.MonkeyPatch, accuracies: Sequence[float]) -> list[torch.Tensor]:
    """Let the evaluations return these accuracies; return the weights of the head at each of them."""
    remaining = iter(accuracies)
    weights: list[torch.Tensor] = []

    def evaluate(model: Any, *_: Any, **__: Any) -> Evaluation:
        weights.append(model.classifier.weight.detach().clone())
        return Evaluation(loss=1.0, top1=next(remaining), num_samples=3)

    monkeypatch.setattr("finetune.train.evaluate", evaluate)
    return weights


@contextmanager
def recorded_dtypes(run: FinetuneRun) -> Iterator[dict[bool, set[torch.dtype]]]:
    """Record the types of the logits: by whether the model is training."""
    dtypes: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    head = run.classifier.classifier
    hook = head.register_forward_hook(lambda _, images, logits: dtypes[run.classifier.training].add(logits.dtype))
    yield dtypes
    hook.remove()


def saved_head(run_dir: Path) -> torch.Tensor:
    weight: torch.Tensor = load_classifier(run_dir / "model").classifier.weight  # type: ignore[assignment, union-attr]
    return weight


@pytest.mark.processes
def test_the_saved_model_has_the_accuracy_of_its_card(
    recipe: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build(recipe)
    top1, epoch = fit_to_the_end(run)
    assert run.total_steps == 12
    folder = tmp_path / "run" / "model"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
    }
    dataset, correct = open_dataset(digits / "validation"), 0
    paths = []
    for shard, row in [(shard, row) for shard, size in enumerate(dataset.shard_sizes) for row in range(size)]:
        sample = dataset.read(shard, row)
        paths.append(tmp_path / f"{sample.label}-{shard}-{row}.png")
        Image.fromarray(sample.image).save(paths[-1])
    for path, prediction in zip(paths, predict(folder, paths, top_k=2), strict=True):
        assert prediction.path == path
        correct += prediction.classes[0][0] == path.name[0]
    assert correct / len(paths) == pytest.approx(top1)
    card = (folder / "README.md").read_text()
    for line in (
        "This model has the backbone of `model`, of type `vit` in transformers. It was fine-tuned with Vitrail on",
        "24 images.",
        "It classifies images into 3 classes: `0`, `1`, `2`.",
        "| on the validation data `digits` | value |",
        f"| top-1 accuracy on {len(paths)} images | {top1:.4f} |",
        f"| epoch | {epoch} of 6, the one with the best accuracy |",
        f"| data digest | `{run.training.digest}` |",
        f"| written by | vitrail 0.1.0, torch {torch.__version__}, transformers {transformers.__version__} |",
    ):
        assert line in card.splitlines(), line
    [result] = ModelCard(card).data.eval_results or []
    assert (result.metric_type, result.metric_value) == ("accuracy", pytest.approx(top1, abs=1e-4))
    for path in folder.iterdir():
        for place in (tmp_path, digits.parent):
            assert str(place).encode() not in path.read_bytes(), path
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code.replace("path/to/this/folder", str(folder)).replace("image.jpg", str(paths[0])), {})
    shown = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    [prediction] = predict(folder, paths[:1])
    assert [(row["label"], pytest.approx(row["score"], abs=1e-4)) for row in shown] == prediction.classes


@pytest.mark.processes
def test_a_frozen_backbone_does_not_change(recipe: Path) -> None:
    run = build(recipe, "freeze_backbone=true")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    fit(run)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("vit."), name


@pytest.mark.processes
def test_all_parameters_are_trained_by_default(recipe: Path) -> None:
    run = build(recipe)
    before = {name: value.clone() for name, value in run.classifier.named_parameters()}
    fit(run)
    assert not any(torch.equal(value, before[name]) for name, value in run.classifier.named_parameters())


@pytest.mark.processes
def test_the_best_model_is_kept_if_later_ones_are_worse(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = fake_evaluations(monkeypatch, [0.9, 0.5])
    assert fit_to_the_end(build(recipe)) == (0.9, 3)
    assert torch.equal(saved_head(tmp_path / "run"), weights[0])
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.processes
def test_a_later_model_that_is_better_replaces_the_saved_one(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = fake_evaluations(monkeypatch, [0.5, 0.9])
    assert fit_to_the_end(build(recipe)) == (0.9, 6)
    assert torch.equal(saved_head(tmp_path / "run"), weights[1])


@pytest.mark.processes
def test_a_folder_of_images_can_be_fine_tuned_on(recipe: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            level = 40 + 10 * i if name == "one" else 255
            Image.new("RGB", (32, 32), (level, 0, 255 - level)).save(tmp_path / "images" / name / f"{i}.png")
    folder = f"data={{train: {tmp_path}/images, validation: {tmp_path}/images, num_workers: 0}}"
    run = build(recipe, folder, "schedule.epochs=8", "evaluation.every_epochs=8")
    assert run.training.class_names == ["one", "two"]
    assert run.num_samples == 24
    assert fit_to_the_end(run)[0] > 0.8


@pytest.mark.processes
def test_accumulation_does_not_change_the_weights(recipe: Path, tmp_path: Path) -> None:
    weights = []
    for i, size in enumerate((12, 4)):
        run = build(
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


@pytest.mark.processes
def test_bf16_trains(recipe: Path) -> None:
    run = build(recipe, "engine.precision=bf16")
    with recorded_dtypes(run) as dtypes:
        assert fit_to_the_end(run)[0] > 0.2
    assert dtypes == {True: {torch.bfloat16}, False: {torch.float32}}  # in training and in evaluation


@pytest.mark.parametrize(
    ("device", "supports_bf16", "uses_bf16"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_bf16_is_the_default_on_gpus_that_support_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, device: str, supports_bf16: bool, uses_bf16: bool
) -> None:
    run = replace(build(recipe), accelerator=SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: supports_bf16)
    assert run.uses_bf16 == uses_bf16
    assert build(recipe, "engine.precision=bf16").uses_bf16
    assert not build(recipe, "engine.precision=fp32").uses_bf16


def test_a_compiled_model_has_no_graph_breaks_and_the_same_losses(recipe: Path, tmp_path: Path) -> None:
    graphs = CompileCounter()
    compile_and_count = partial(torch.compile, backend=graphs, fullgraph=True)  # a break would be an error
    plain = fit_to_the_end(build(recipe, f"run_dir={tmp_path}/plain", "schedule.epochs=1"))
    torch._dynamo.reset()
    with mock.patch("torch.compile", compile_and_count):
        compiled = fit_to_the_end(build(recipe, "engine.compile=true", "schedule.epochs=1"))
    assert (graphs.frame_count, compiled) == (1, plain)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
    saved = [load_classifier(tmp_path / name / "model").state_dict() for name in ("run", "plain")]
    for name, value in saved[0].items():
        assert torch.allclose(value, saved[1][name], atol=1e-5), name


@pytest.mark.processes
def test_metrics_cover_training_loading_and_validation(recipe: Path, tmp_path: Path) -> None:
    fit(build(recipe, "logging.every_steps=4"))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 4, 6, 8, 12, 12]
    training = {
        "train/loss",
        "optim/grad_norm",
        "optim/learning_rate",
        "speed/images_per_second",
        "data/samples",
        "data/bad_samples",
        "data/wait_fraction",
        "data/decode_busy",
    }
    for row in rows:
        is_validation = "validation/top1" in row
        assert is_validation == (row["step"] in (6, 12) and "train/loss" not in row)
        assert {"validation/loss", "train/epoch"} <= row.keys() if is_validation else training <= row.keys()
    assert [row["data/samples"] for row in rows if "data/samples" in row] == [12, 48, 96, 144]


def test_mixed_neighbors_need_an_even_batch_size(recipe: Path) -> None:
    with pytest.raises(UserError, match="must be even for mixup and cutmix, got 9; change it by one"):
        load_config(FinetuneConfig, recipe, ["engine.global_batch_size=9", "augment.cutmix=1"])


def test_too_few_labels_per_class_are_an_error(recipe: Path) -> None:
    with pytest.raises(UserError, match="class 0: has 160 samples"):
        build(recipe, "data.labels_per_class=500")


def test_a_run_folder_with_other_results_is_an_error(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert main(CommandLine(load_config(FinetuneConfig, recipe, []).config, "", False)) == EXIT_USER_ERROR
    printed = capsys.readouterr().err
    assert "a fine-tuned model already exists here; choose another run_dir or set overwrite=true" in printed
    assert build(recipe, "overwrite=true").num_samples == 24
    (tmp_path / "pre" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="this folder contains a pretraining run; choose another run_dir"):
        check_run_dir(load_config(FinetuneConfig, recipe, [f"run_dir={tmp_path}/pre"]).config)


def test_a_folder_that_another_fine_tuning_is_using_is_refused(
    recipe: Path, tmp_path: Path, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a model yet, nothing but the heartbeats shows that the folder is in use."""
    config = load_config(FinetuneConfig, recipe, ["overwrite=true"]).config
    with shell.start([sys.executable, FINETUNE, "--config", recipe, "schedule.epochs=100000"]) as running:
        running.wait_until(lambda: read_beats(tmp_path / "run"))
        assert main(CommandLine(config, "", False)) == EXIT_USER_ERROR
        assert "is training into this folder; end that run or choose another run_dir" in capsys.readouterr().err
        running.wait_until((tmp_path / "run" / "metrics.jsonl").exists)
        running.process.send_signal(signal.SIGTERM)
        assert running.finish().code == EXIT_INTERRUPTED
    assert [beat.outcome for beat in read_beats(tmp_path / "run")] == ["stopped"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("Cat dog owl", "only in training: cat; only in validation: Cat"),
        ("cat dog", "only in training: owl"),
        ("bee cat dog owl", "only in validation: bee"),
    ],
)
def test_validation_data_with_other_classes_is_an_error(recipe: Path, tmp_path: Path, names: str, message: str) -> None:
    for split, classes in (("train", "cat dog owl"), ("validation", names)):
        for name in classes.split():
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / split / name / "0.png")
    folders = f"data={{train: {tmp_path}/train, validation: {tmp_path}/validation}}"
    with pytest.raises(UserError) as error:
        build(recipe, folders)
    start = f"{tmp_path}/validation: validation classes differ from training classes: {message}; make both sets"
    assert str(error.value).startswith(start)


@pytest.mark.processes
def test_a_loss_that_is_not_finite_stops_the_run(recipe: Path) -> None:
    run = build(recipe, "optimizer.learning_rate=1e30", "logging.every_steps=1")
    with pytest.raises(DivergedError, match=r"NaN or infinite; lower optimizer.learning_rate$"):
        fit(run)


@pytest.mark.processes
def test_a_run_that_diverges_names_the_model_it_saved(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_evaluations(monkeypatch, [0.5] * 6)
    run = build(recipe, "optimizer.learning_rate=1e30", "logging.every_steps=12", "evaluation.every_epochs=1")
    with pytest.raises(DivergedError, match=rf"The best model so far, from epoch 1, is in {tmp_path}/run/model$"):
        fit(run)


@pytest.mark.processes
def test_a_full_disk_keeps_the_model_that_was_saved_before(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = fake_evaluations(monkeypatch, [0.5, 0.9])
    fit(build(recipe, "schedule.epochs=1"))
    with (
        full_disk(20_000),
        pytest.raises(MachineError, match=r"run/model: the model cannot be saved: .*too large"),
    ):
        fit(build(recipe, "schedule.epochs=1", "overwrite=true"))
    assert torch.equal(saved_head(tmp_path / "run"), weights[0])
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.processes
def test_a_stop_before_the_first_evaluation_saves_no_model(recipe: Path, tmp_path: Path) -> None:
    calls: list[bool] = []
    result = fit(build(recipe), lambda: bool(calls.append(True)) or len(calls) == 3)
    assert result == FinetuneResult(best=None, stopped_after=4)  # requested during step 3, agreed on one step later
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.processes
def test_a_stop_keeps_the_model_of_the_last_evaluation(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = fake_evaluations(monkeypatch, [0.5])
    result = fit(build(recipe), lambda: bool(weights))
    assert (result.stopped_after, result.best and result.best.epoch) == (8, 3)
    assert torch.equal(saved_head(tmp_path / "run"), weights[0])


def test_ctrl_c_loses_no_saved_model(recipe: Path, tmp_path: Path, shell: Shell) -> None:
    """Interrupt a long run after its first evaluation: it stops cleanly, with the documented exit code."""
    command = [sys.executable, ROOT / "launch" / "finetune.py", "--config", recipe]
    long = ["schedule.epochs=100000", "evaluation.every_epochs=2", "logging.every_steps=1"]
    with shell.start([*command, *long]) as running:
        running.wait_until((tmp_path / "run" / "model").exists)
        running.process.send_signal(signal.SIGINT)
        done = running.finish()
    assert done.code == EXIT_INTERRUPTED, done.err[-3000:]
    assert "Traceback" not in done.err
    last = done.out.splitlines()[-1]
    assert last.startswith("stopped after step ")
    assert last.endswith(f": {tmp_path}/run/model")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    best = max(row["validation/top1"] for row in rows if "validation/top1" in row)
    assert f"best top-1 {best:.4f}" in last
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["id2label"] == {
        "0": "0",
        "1": "1",
        "2": "2",
    }
    assert not list((tmp_path / "run").glob("*.partial"))


def test_the_config_decides_not_the_variables_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    accelerator = build_accelerator()
    assert (accelerator.gradient_accumulation_steps, accelerator.mixed_precision) == (1, "no")
    assert accelerator.device == torch.device("cpu")
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        monkeypatch.setenv(name, "true")
        with pytest.raises(UserError, match=rf"{name} is set, .*; unset it"):
            build_accelerator()
        monkeypatch.delenv(name)


def test_data_workers_are_fitted_to_the_machine(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches: list[BatchSize] = []
    fit_to_batches = pretrain.machine.fit_workers
    monkeypatch.setattr(
        pretrain.machine,
        "fit_workers",
        lambda data, sizes, *rest: batches.extend(sizes) or fit_to_batches(data, sizes, *rest),
    )
    build(recipe)
    monkeypatch.setattr(
        pretrain.machine, "machine_limits", lambda: Limits(6 * sum(size.num_bytes for size in batches), 999)
    )
    run = build(recipe, "data.num_workers=4", "overwrite=true")
    assert (run.config.data.num_workers, run.config.data.batches_ahead) == (4, 1)
    assert "; this run uses data.num_workers=4 and data.batches_ahead=1\n" in capsys.readouterr().out


def test_a_run_folder_that_cannot_be_made_is_an_error(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    config = load_config(FinetuneConfig, recipe, [f"run_dir={tmp_path}/file/x"]).config
    assert main(CommandLine(config, "", False)) == EXIT_USER_ERROR
    assert f"{tmp_path}/file/x: cannot be created (Not a directory); choose another run_dir" in capsys.readouterr().err


def fails(recipe: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Return what fine-tuning prints when it refuses to start."""
    assert main(CommandLine(load_config(FinetuneConfig, recipe, overrides).config, "", False)) == EXIT_USER_ERROR
    return capsys.readouterr().err


def test_data_of_one_class_is_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "cat" / "1.png")
    photos = str(tmp_path / "photos")
    printed = fails(recipe, capsys, f"data.train={photos}", f"data.validation={photos}")
    assert printed == f"{photos}: all images have the class cat; fine-tuning needs two classes\n"


def test_folders_that_do_not_fit_are_refused_before_the_first_step(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], vitrail: Vitrail
) -> None:
    file = tmp_path / "model" / "preprocessor_config.json"
    image = tmp_path / "red.png"
    Image.new("RGB", (40, 40), "red").save(image)
    changes: dict[str, dict[str, object]] = {
        "the model cannot use the images that the processor makes": {"size": {"height": 16, "width": 16}},
        "cannot process a color image": {"image_mean": [0.5], "image_std": [0.5]},
        "in place of 3 x height x width": {"image_processor_type": "Siglip2ImageProcessor"},
        "puts a border around": {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
    }
    original = json.loads(file.read_text())
    for message, change in changes.items():
        file.write_text(json.dumps({**original, **change}))
        assert f"{file}: " in (printed := fails(recipe, capsys)), message
        assert message in printed
        done = vitrail("predict", tmp_path / "model", image)
        if message == "puts a border around":  # which predictions may have
            continue
        assert (done.code, message in done.err) == (2, True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_training_gives_the_model_the_channel_order_of_the_processor(recipe: Path, tmp_path: Path) -> None:
    square = {"height": 32, "width": 32}
    processor = transformers.MobileViTImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
    processor.save_pretrained(tmp_path / "model")
    run = build(recipe)
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[:, 0] = 255  # red
    seen: list[torch.Tensor] = []

    def model(pixel_values: torch.Tensor) -> Any:
        seen.append(pixel_values)
        return run.model(pixel_values=pixel_values)

    batch_loss(replace(run, model=model), {"image": image, "label": torch.zeros(1, dtype=torch.int64)})
    evaluated = run.preprocessor(image[0].permute(1, 2, 0).numpy(), np.random.default_rng(0))["image"]
    assert torch.equal(seen[0][0], evaluated)
    assert evaluated[:, 0, 0].tolist() == [0, 0, 1]


def test_predictions_go_on_after_a_file_that_is_no_image(tmp_path: Path, vitrail: Vitrail) -> None:
    folder = save_classifier(tiny_configs()["vit"], tmp_path / "model")
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name in ("a.png", "c.png", "deep/d.png"):
        Image.new("RGB", (40, 40), "red").save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "b.png").write_text("no image")
    shutil.copy(tmp_path / "photos" / "a.png", tmp_path / "photos" / ".b.png")
    done = vitrail("predict", folder, tmp_path / "photos")
    assert done.code == 1
    assert [line.partition(":")[0] for line in done.out.splitlines()] == [
        str(tmp_path / "photos" / name) for name in ("a.png", "c.png", "deep/d.png")
    ]
    assert done.err == (
        f"{tmp_path}/photos: 1 hidden file or folder, skipped: .b.png\n"
        f"{tmp_path}/photos/b.png: cannot be used as an image: not an image of a known format\n"
    )
    found = vitrail("predict", folder, tmp_path / "photos" / "[.ac]*.png", tmp_path / "photos" / "deep" / "d.png")
    assert (found.code, len(found.out.splitlines())) == (0, 3)
    nothing = vitrail("predict", folder, tmp_path / "photos" / "*.jpg", tmp_path / "gone.png")
    assert nothing.code == 2
    assert "*.jpg: no images here; name image files, " in nothing.err
    assert f"{tmp_path}/gone.png: no such file or folder; check the path\n" in nothing.err


def test_predictions_go_on_without_what_has_no_images(tmp_path: Path, vitrail: Vitrail) -> None:
    folder = save_classifier(tiny_configs()["vit"], tmp_path / "model")
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (40, 40), "red").save(photos / "a.png")
    (photos / "more.zip").touch()
    (photos / "dead.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    done = vitrail("predict", folder, tmp_path / "*.jpg", photos, tmp_path / "empty", tmp_path / "gone.png")
    assert (done.code, done.out.partition(":")[0]) == (1, str(photos / "a.png"))
    assert [line.partition(";")[0] for line in done.err.splitlines()] == [
        f"{tmp_path}/*.jpg: no images here",
        f"{photos}: 1 link that leads nowhere: dead.jpg",
        f"{photos}: 1 archive whose images are not read: more.zip",
        f"{tmp_path}/empty: no images here",
        f"{tmp_path}/gone.png: no such file or folder",
    ]
