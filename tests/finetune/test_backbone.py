"""Any Hugging Face backbone under a new head; nothing is re-initialized in silence."""

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

NAMES = ["cat", "dog", "owl"]
SMALL = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.")


def families() -> dict[str, transformers.PretrainedConfig]:
    return {
        "vit": transformers.ViTConfig(**SMALL, intermediate_size=64),
        "deit": transformers.DeiTConfig(**SMALL, intermediate_size=64),
        "dinov2": transformers.Dinov2Config(**SMALL, mlp_ratio=2),
        "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        "convnext": transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
        "swin": transformers.SwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
        "clip": transformers.CLIPConfig(vision_config={**SMALL, "intermediate_size": 64}, text_config=TEXT),
        "siglip": transformers.SiglipConfig(vision_config={**SMALL, "intermediate_size": 64}, text_config=TEXT),
    }


def folder_of(config: transformers.PretrainedConfig, path: Path) -> Path:
    torch.manual_seed(0)
    config.num_labels = 3
    config.architectures = [config.__class__.__name__.replace("Config", "ForImageClassification")]
    model = transformers.AutoModelForImageClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessorPil(size=size, do_convert_rgb=True).save_pretrained(path)
    return path


@pytest.mark.parametrize("family", families())
def test_the_backbone_is_kept_and_the_head_is_new(tmp_path: Path, family: str) -> None:
    folder = folder_of(families()[family], tmp_path / "model")
    source = transformers.AutoModelForImageClassification.from_pretrained(folder)
    torch.manual_seed(7)
    model = new_classifier(folder, NAMES, from_scratch=False, freeze_backbone=True)
    assert model.config.id2label == dict(enumerate(NAMES))  # type: ignore[union-attr]
    original = source.state_dict()
    heads = 0
    for name, value in model.state_dict().items():
        if name.startswith(HEADS):
            heads += 1
            assert not torch.equal(value, original[name]), name  # though the number of classes is the same
        else:
            assert torch.equal(value, original[name]), name
    assert heads
    assert all(p.requires_grad == name.startswith(HEADS) for name, p in model.named_parameters())


def test_from_scratch_keeps_the_architecture_alone(tmp_path: Path) -> None:
    folder = folder_of(families()["vit"], tmp_path / "model")
    original = transformers.AutoModelForImageClassification.from_pretrained(folder).state_dict()
    model = new_classifier(folder, NAMES, from_scratch=True, freeze_backbone=False)
    weights = {name: value for name, value in model.state_dict().items() if name.endswith("weight")}
    assert weights
    assert not any(torch.equal(value, original[name]) for name, value in weights.items())


def test_a_backbone_that_would_not_load_whole_is_refused(tmp_path: Path) -> None:
    folder = folder_of(families()["vit"], tmp_path / "model")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    config = (folder / "config.json").read_text()

    (folder / "config.json").write_text(config.replace('"image_size": 32', '"image_size": 64'))
    with pytest.raises(ModelError, match=r"1 of the backbone's tensors .* vit\.embeddings\.position"):
        new_classifier(folder, NAMES, from_scratch=False, freeze_backbone=False)

    (folder / "config.json").write_text(config)
    lost = [name for name in weights if ".layer.1." in name]
    for name in lost:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{len(lost)} of the backbone's tensors are missing"):
        new_classifier(folder, NAMES, from_scratch=False, freeze_backbone=False)


def test_an_encoder_without_a_head_will_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = transformers.ViTModel(families()["vit"], add_pooling_layer=False)
    encoder.save_pretrained(tmp_path)
    model = new_classifier(tmp_path, NAMES, from_scratch=False, freeze_backbone=False)
    for name, value in encoder.state_dict().items():
        assert torch.equal(model.state_dict()[f"vit.{name}"], value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no Hugging Face folder here \(config.json is missing\)"):
        new_classifier(tmp_path, NAMES, from_scratch=False, freeze_backbone=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_classifier(tmp_path)
    with pytest.raises(ModelError, match=r"no usable preprocessor_config.json"):
        load_preprocessor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="Unrecognized configuration class"):
        new_classifier(tmp_path, NAMES, from_scratch=False, freeze_backbone=False)


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = folder_of(families()["vit"], tmp_path / "model")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_classifier(folder)


def test_the_preprocessor_is_the_folders_own(tmp_path: Path) -> None:
    folder = folder_of(families()["vit"], tmp_path / "model")
    preprocessor = load_preprocessor(folder)
    assert (preprocessor.image_size, preprocessor.mean, preprocessor.std) == (32, (0.5,) * 3, (0.5,) * 3)
    photo = load_sample_image("china.jpg")
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")(
        Image.fromarray(photo), return_tensors="pt"
    )["pixel_values"][0]
    assert torch.equal(preprocessor(photo, None)["image"], theirs)  # type: ignore[arg-type]

    model = load_classifier(folder)
    save_folder(model, preprocessor, "card", tmp_path / "out")
    save_folder(model, preprocessor, "card", tmp_path / "out")  # replaces what was there
    assert torch.equal(load_preprocessor(tmp_path / "out")(photo, None)["image"], theirs)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*.partial"))
