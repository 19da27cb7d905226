"""Any Hugging Face backbone gets a new head, and no tensor is silently left at random values."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from finetune.backbone import ModelError, load_classifier, load_preprocessor, new_classifier, save_folder
from pretrain.errors import MachineError
from tests.support.classifiers import save_classifier, tiny_configs
from tests.support.disk import full_disk

NAMES = ["cat", "dog", "owl"]
NEW = {"from_scratch": False, "freeze_backbone": False}
HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.")


@pytest.mark.parametrize("architecture", tiny_configs())
def test_backbone_is_loaded_and_head_is_new(tmp_path: Path, architecture: str) -> None:
    folder = save_classifier(tiny_configs()[architecture], tmp_path / "model")
    source = transformers.AutoModelForImageClassification.from_pretrained(folder)
    torch.manual_seed(7)
    model = new_classifier(folder, NAMES, from_scratch=False, freeze_backbone=True)
    assert model.config.id2label == dict(enumerate(NAMES))  # type: ignore[union-attr]
    original = source.state_dict()
    heads = 0
    for name, value in model.state_dict().items():
        if name.startswith(HEADS):
            heads += 1
            assert not torch.equal(value, original[name]), name  # new, although the number of classes is the same
        else:
            assert torch.equal(value, original[name]), name
    assert heads
    assert all(p.requires_grad == name.startswith(HEADS) for name, p in model.named_parameters())


def test_from_scratch_loads_no_weights(tmp_path: Path) -> None:
    folder = save_classifier(tiny_configs()["vit"], tmp_path / "model")
    original = transformers.AutoModelForImageClassification.from_pretrained(folder).state_dict()
    model = new_classifier(folder, NAMES, from_scratch=True, freeze_backbone=False)
    weights = {name: value for name, value in model.state_dict().items() if name.endswith("weight")}
    assert weights
    assert not any(torch.equal(value, original[name]) for name, value in weights.items())


def test_missing_or_mismatched_backbone_tensors_are_an_error(tmp_path: Path) -> None:
    folder = save_classifier(tiny_configs()["vit"], tmp_path / "model")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    config = (folder / "config.json").read_text()

    (folder / "config.json").write_text(config.replace('"image_size": 32', '"image_size": 64'))
    with pytest.raises(
        ModelError,
        match=r"missing or of another shape: vit\.embeddings\.position_embeddings; export",
    ):
        new_classifier(folder, NAMES, from_scratch=False, freeze_backbone=False)

    (folder / "config.json").write_text(config)
    lost = [name for name in weights if ".layer.1." in name]
    for name in lost:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError,
        match=f"missing or of another shape: .* and {len(lost) - 1} more; export or download the folder again",
    ):
        new_classifier(folder, NAMES, from_scratch=False, freeze_backbone=False)


def test_an_encoder_without_a_head_can_be_fine_tuned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = transformers.ViTModel(tiny_configs()["vit"], add_pooling_layer=False)
    encoder.save_pretrained(tmp_path)
    model = new_classifier(tmp_path, NAMES, from_scratch=False, freeze_backbone=False)
    for name, value in encoder.state_dict().items():
        assert torch.equal(model.state_dict()[f"vit.{name}"], value)


def test_folders_that_are_not_classifiers_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not a Hugging Face folder \(config.json is missing\); create one with"):
        new_classifier(tmp_path, NAMES, from_scratch=False, freeze_backbone=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_classifier(tmp_path)
    with pytest.raises(ModelError, match=r"no usable preprocessor_config.json"):
        load_preprocessor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="Unrecognized configuration class"):
        new_classifier(tmp_path, NAMES, from_scratch=False, freeze_backbone=False)


def test_pickled_weights_are_an_error(tmp_path: Path) -> None:
    folder = save_classifier(tiny_configs()["vit"], tmp_path / "model")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_classifier(folder)


def test_preprocessor_matches_transformers_and_survives_saving(tmp_path: Path) -> None:
    folder = save_classifier(tiny_configs()["vit"], tmp_path / "model")
    preprocessor = load_preprocessor(folder)
    assert (preprocessor.image_size, preprocessor.mean, preprocessor.std) == (32, (0.5,) * 3, (0.5,) * 3)
    photo = load_sample_image("china.jpg")
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")(
        Image.fromarray(photo), return_tensors="pt"
    )["pixel_values"][0]
    assert torch.equal(preprocessor(photo, None)["image"], theirs)  # type: ignore[arg-type]

    model = load_classifier(folder)
    save_folder(model, preprocessor, "card", tmp_path / "out")
    save_folder(model, preprocessor, "card", tmp_path / "out")  # replaces the existing folder
    assert torch.equal(load_preprocessor(tmp_path / "out")(photo, None)["image"], theirs)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("limit_bytes", [500, 5_000])  # in config.json, in model.safetensors
def test_a_folder_that_cannot_be_saved_is_an_error_and_leaves_nothing(tmp_path: Path, limit_bytes: int) -> None:
    folder = save_classifier(tiny_configs()["vit"], tmp_path / "model")
    model, preprocessor = load_classifier(folder), load_preprocessor(folder)
    with full_disk(limit_bytes), pytest.raises(MachineError, match=r"out: the model cannot be saved: .*too large"):
        save_folder(model, preprocessor, "card", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_folder_with_code_of_its_own_is_refused(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_classifier(tiny_configs()["vit"], tmp_path / "model")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, "auto_map": {"AutoConfig": "mine.Config"}}))
    (folder / "mine.py").write_text("raise AssertionError('this was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on the terminal"))
    for use in (load_classifier, load_preprocessor, lambda path: new_classifier(path, NAMES, **NEW)):
        with pytest.raises(ModelError, match=r"needs code of its own \(auto_map\), which is never run"):
            use(folder)
