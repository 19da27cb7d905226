"""Any Hugging Face backbone gets a new head, and no tensor is silently left at random values."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from finetune.backbone import check_input, load_classifier, new_classifier, save_folder
from finetune.folder import ModelError
from finetune.preprocessor import load_preprocessor
from pretrain.errors import MachineError
from tests.support.classifiers import SMALL, save_classifier, tiny_configs
from tests.support.disk import full_disk

NAMES = ["cat", "dog", "owl"]
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
    assert preprocessor.image_size == 32
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("from_scratch", [False, True])
def test_the_precision_of_the_folder_does_not_matter(tmp_path: Path, dtype: torch.dtype, from_scratch: bool) -> None:
    folder = save_classifier(tiny_configs()["siglip"], tmp_path / "model")
    transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    assert str(dtype) == f"torch.{json.loads((folder / 'config.json').read_text())['dtype']}"
    model: Any = new_classifier(folder, NAMES, from_scratch=from_scratch, freeze_backbone=False)
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert not torch.equal(model.classifier.weight, model.classifier.weight.to(dtype).float())  # drawn in float32
    save_folder(model, load_preprocessor(folder), "card", tmp_path / "out")
    saved = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["vision_config"]["dtype"] == "float32"
    assert next(load_classifier(folder).parameters()).dtype == torch.float32


@pytest.mark.parametrize("kind", [transformers.ViTMAEForPreTraining, transformers.ViTMAEModel])
def test_the_encoder_of_a_masked_autoencoder_is_an_ordinary_vit(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(0)
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    source = kind(transformers.ViTMAEConfig(**SMALL, **decoder, intermediate_size=64, layer_norm_eps=1e-3))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    source.save_pretrained(tmp_path)
    model: Any = new_classifier(tmp_path, NAMES, from_scratch=False, freeze_backbone=False).eval()
    images = torch.rand(2, 3, 32, 32)
    order = torch.arange(16.0).expand(2, -1)  # keeps the patches in their order
    encoder = transformers.ViTMAEModel.from_pretrained(tmp_path, mask_ratio=0.0)
    with torch.no_grad():
        expected = encoder(images, noise=order).last_hidden_state
        torch.testing.assert_close(model.vit(images).last_hidden_state, expected)
    assert model.vit.embeddings.position_embeddings.requires_grad
    assert model.config.model_type == "vit"
    assert not hasattr(model.config, "mask_ratio")
    with pytest.raises(ModelError, match=r"no trained classification head \(missing: classifier.bias"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "image_size",
            r"3 channels of 32 x 32 pixels: .*; make it agree with config.json \(image_size=64, num_channels=3",
        ),
        (
            "num_channels",
            r"the model cannot use the images that the processor makes, .*\(image_size=32, num_channels=1\)",
        ),
    ],
)
@pytest.mark.parametrize("architecture", ["vit", "siglip"])
def test_a_model_that_cannot_use_the_images_of_its_processor_is_refused(
    tmp_path: Path, architecture: str, setting: str, message: str
) -> None:
    config = tiny_configs()[architecture]
    setattr(getattr(config, "vision_config", config), setting, {"image_size": 64, "num_channels": 1}[setting])
    folder = save_classifier(config, tmp_path / "model")
    with pytest.raises(ModelError, match=message):
        check_input(load_classifier(folder), load_preprocessor(folder))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = save_classifier(tiny_configs()["vit"], tmp_path / "model")
    model: Any = load_classifier(folder)
    check_input(model, load_preprocessor(folder))
    model.classifier.bias.data[0] = torch.inf
    with pytest.raises(ModelError, match="output for a gray image is not finite; download or export the folder again"):
        check_input(model, load_preprocessor(folder))


@pytest.mark.parametrize("architecture", tiny_configs())
def test_checking_the_input_changes_nothing(tmp_path: Path, architecture: str) -> None:
    folder = save_classifier(tiny_configs()[architecture], tmp_path / "model")
    model = new_classifier(folder, NAMES, from_scratch=True, freeze_backbone=False).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_input(model, load_preprocessor(folder))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_folder_of_timm_is_fine_tuned_if_timm_is_installed(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    timm.models.save_for_hf(source, tmp_path / "model", safe_serialization=True)
    preprocessor = load_preprocessor(tmp_path / "model")
    model: Any = new_classifier(tmp_path / "model", NAMES, from_scratch=False, freeze_backbone=True).eval()
    check_input(model, preprocessor)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["timm_model.head.weight", "timm_model.head.bias"]
    save_folder(model, preprocessor, "card", tmp_path / "out")
    images = torch.rand(2, 3, 224, 224)
    assert torch.equal(load_classifier(tmp_path / "out")(images).logits, model(images).logits)
    assert load_preprocessor(tmp_path / "out").image_size == 224
