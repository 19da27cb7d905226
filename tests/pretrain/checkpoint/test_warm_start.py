"""A run starts from the weights of a Hugging Face folder or of another run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from pretrain.checkpoint.warm_start import warm_start
from pretrain.config import ModelConfig, PreprocessingConfig, SupervisedConfig
from pretrain.errors import CheckpointError, UserError
from pretrain.model.hub_names import encoder_to_hub, fold_layer_scale, hub_encoder_config
from pretrain.model.vit import ViT
from pretrain.objectives import build_objective
from pretrain.objectives.objective import Objective
from tests.support.checkpoints import MANIFEST, write_checkpoint

MODEL = ModelConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=8, image_size=32)
NAMES = ["cat", "dog"]


def objective(classes: int = 2, **changes: float) -> Objective:
    model = MODEL.model_copy(update=changes)
    return build_objective(SupervisedConfig(), ViT(model), [1 / classes] * classes, PreprocessingConfig())


def hf_config() -> transformers.ViTConfig:
    return transformers.ViTConfig(**hub_encoder_config(MODEL))


@pytest.mark.parametrize("kind", ["classifier", "backbone"])
def test_folder_of_transformers_gives_the_same_features(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    theirs = (transformers.ViTForImageClassification if kind == "classifier" else transformers.ViTModel)(hf_config())
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.train(False)
    theirs.save_pretrained(tmp_path)
    ours = objective().eval()
    sentence = warm_start(ours, tmp_path, NAMES, 1e-6)
    assert sentence == f"started from {tmp_path}; random values for classifier.bias, classifier.weight"
    images = torch.randn(2, 3, 32, 32)
    encoder = theirs.vit if kind == "classifier" else theirs
    with torch.no_grad():
        assert torch.allclose(ours.encoder(images), encoder(images).last_hidden_state, atol=1e-5)


def test_positions_are_interpolated_as_in_transformers(tmp_path: Path) -> None:
    theirs = transformers.ViTModel(hf_config(), add_pooling_layer=False).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = objective(image_size=48).eval()
    assert "; positions interpolated from 16 patches to 36; " in warm_start(ours, tmp_path, NAMES, 1e-6)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(ours.encoder(images), expected, rtol=1e-5, atol=1e-5)


def test_layer_scale_starts_at_one_if_it_was_folded_into_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = objective(layer_scale=0.1).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs = transformers.ViTModel(hf_config(), add_pooling_layer=False)
    theirs.load_state_dict(encoder_to_hub(fold_layer_scale(source.encoder.state_dict()), MODEL), strict=True)
    theirs.save_pretrained(tmp_path)
    target = objective(layer_scale=1e-5).eval()
    sentence = warm_start(target, tmp_path, NAMES, 1e-6)
    assert sentence.startswith(f"started from {tmp_path}; LayerScale starts at 1, because the source has none; ")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(target.encoder(images), source.encoder(images), rtol=1e-5, atol=1e-5)

    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    write_checkpoint(folder, replace(MANIFEST, class_names=NAMES), source.state_dict())
    assert warm_start(target, folder, NAMES, 1e-6) == f"started from {folder}"
    assert all(torch.equal(weight, target.state_dict()[name]) for name, weight in source.state_dict().items())


def test_head_is_copied_from_a_run_with_the_same_classes(tmp_path: Path) -> None:
    source = objective()
    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    write_checkpoint(folder, replace(MANIFEST, class_names=NAMES), source.state_dict(), num_files=3)
    target = objective()
    assert warm_start(target, tmp_path / "run", NAMES, 1e-6) == f"started from {tmp_path / 'run'}"
    assert all(torch.equal(weight, target.state_dict()[name]) for name, weight in source.state_dict().items())
    other = objective(classes=5)
    assert "random values for classifier.bias, classifier.weight" in warm_start(
        other, folder, ["a", "b", "c", "d", "e"], 1e-6
    )


def test_unusable_weights_are_explained(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    write_checkpoint(folder, MANIFEST, objective(image_size=64, patch_size=16).state_dict())
    with pytest.raises(
        CheckpointError, match=r"encoder.patch_embedding.weight: \[48, 768\] in the source, \[48, 192\] in this model"
    ):
        warm_start(objective(), folder, NAMES, 1e-6)
    with pytest.raises(CheckpointError, match=r"layers.1.norm_after.bias: missing in the source, \[48\] in this model"):
        deep = tmp_path / "one" / "checkpoints" / "step-00000004"
        write_checkpoint(deep, MANIFEST, objective(num_hidden_layers=1).state_dict())
        warm_start(objective(), deep, NAMES, 1e-6)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        warm_start(objective(), tmp_path / "nowhere", NAMES, 1e-6)
    transformers.ViTConfig().save_pretrained(tmp_path / "eps")
    with pytest.raises(CheckpointError, match=r"layer_norm_eps is 1e-12; set model.layer_norm_eps=1e-12"):
        warm_start(objective(), tmp_path / "eps", NAMES, 1e-6)
    transformers.DeiTConfig(layer_norm_eps=1e-6).save_pretrained(tmp_path / "deit")
    with pytest.raises(CheckpointError, match="has model type deit, but init_from reads vit and vit_mae; choose"):
        warm_start(objective(), tmp_path / "deit", NAMES, 1e-6)
    transformers.ViTConfig(layer_norm_eps=1e-6).save_pretrained(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"has no \*.safetensors; save it again with save_pretrained"):
        warm_start(objective(), tmp_path / "empty", NAMES, 1e-6)


def test_another_normalization_of_the_source_is_named(tmp_path: Path) -> None:
    theirs = transformers.ViTModel(hf_config(), add_pooling_layer=False)
    theirs.save_pretrained(tmp_path / "hub")
    ours, usual = objective(), PreprocessingConfig()
    sentence = f"started from {tmp_path / 'hub'}; random values for classifier.bias, classifier.weight"
    assert warm_start(ours, tmp_path / "hub", NAMES, 1e-6, usual) == sentence  # without a processor
    transformers.ViTImageProcessorPil().save_pretrained(tmp_path / "hub")
    assert warm_start(ours, tmp_path / "hub", NAMES, 1e-6, usual) == (
        f"{sentence}; the source normalizes images otherwise; set preprocessing.image_mean=[0.5, 0.5, 0.5] "
        "preprocessing.image_std=[0.5, 0.5, 0.5] so that it sees the images that it knows"
    )
    half = PreprocessingConfig(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    assert warm_start(ours, tmp_path / "hub", NAMES, 1e-6, half) == sentence

    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    config = {**MANIFEST.config, "preprocessing": half.model_dump(mode="json")}
    write_checkpoint(folder, replace(MANIFEST, class_names=NAMES, config=config), ours.state_dict())
    assert warm_start(ours, folder, NAMES, 1e-6, half) == f"started from {folder}"
    assert "; set preprocessing.image_mean=[0.5, 0.5, 0.5] prepro" in warm_start(ours, folder, NAMES, 1e-6, usual)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of a backbone, without an image processor."""
    transformers.ViTModel(hf_config(), add_pooling_layer=False).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "image_mean", "image_std"),
    [
        ({"image_mean": 0.5, "image_std": 0.25, "do_flip_channel_order": None}, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        ({"do_normalize": False, "image_mean": [0.5] * 3}, (0, 0, 0), (1, 1, 1)),
        ({"do_normalize": None, "rescale_factor": 0.00392156862745098}, (0, 0, 0), (1, 1, 1)),
    ],
)
def test_the_normalization_is_what_the_processor_does(
    source: Path, settings: dict[str, object], image_mean: tuple[float, ...], image_std: tuple[float, ...]
) -> None:
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    size = {"height": 32, "width": 32}
    processor = transformers.ViTImageProcessorPil(**{**settings, "size": size})
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    pixels = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(pixels, (image / 255 - image_mean) / image_std, atol=1e-5)
    same = PreprocessingConfig.model_validate({"image_mean": image_mean, "image_std": image_std})
    assert "normalizes" not in warm_start(objective(), source, NAMES, 1e-6, same)
    mean, std = ([*map(float, values)] for values in (image_mean, image_std))
    advice = f"; set preprocessing.image_mean={mean} preprocessing.image_std={std} so that"
    assert advice in warm_start(objective(), source, NAMES, 1e-6, PreprocessingConfig())


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"do_rescale": False}, "has do_rescale=False, but a run rescales pixels to"),
        ({"rescale_factor": None}, "has rescale_factor=None, but a run rescales pixels to"),
        ({"rescale_factor": 0.5}, "has rescale_factor=0.5, but a run rescales pixels to"),
        ({"rescale_factor": "x"}, "has rescale_factor=x, but a run rescales pixels to"),
        ({"rescale_offset": True}, "has rescale_offset=True, but a run rescales"),
        ({"do_flip_channel_order": True}, "has do_flip_channel_order=True, .* red, green, blue; choose a folder"),
        ({"image_std": ["a", 1, 2]}, r"image_std=\['a', 1, 2\] is not a number or a list of three; correct it or"),
        ({"image_mean": [0.5]}, r"image_mean=\[0.5\] is not a number or a list of three; correct it or"),
    ],
)
def test_images_that_no_setting_can_repeat_are_an_error(source: Path, settings: dict[str, object], found: str) -> None:
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: {found}"):
        warm_start(objective(), source, NAMES, 1e-6, PreprocessingConfig())


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_config_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: .*; export or download the folder again"):
        warm_start(objective(), tmp_path, NAMES, 1e-6)
