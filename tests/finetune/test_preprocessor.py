"""Whatever an image processor does, training and evaluation give the model the same pixels, or it is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from finetune.folder import ModelError
from finetune.preprocessor import Preprocessor, load_preprocessor, measure_normalization
from pretrain.config import AugmentConfig
from pretrain.data.transforms.views import TrainView

SQUARE = {"height": 32, "width": 32}
CROP = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
WHOLE = AugmentConfig(crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip=0.0)

USABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "mean and std": ("ViT", {"size": SQUARE, **IMAGENET}),
    "resize and crop": ("CLIP", CROP),
    "channel order": ("MobileViT", CROP),
    "second normalization": ("EfficientNet", {"size": SQUARE, **IMAGENET}),
    "offset": ("EfficientNet", {"size": SQUARE, "rescale_offset": True, "rescale_factor": 1 / 127.5}),
    "another scale": ("ViT", {"size": SQUARE, "rescale_factor": 1 / 127.5}),
    "no scale": ("ViT", {"size": SQUARE, "do_rescale": False, **IMAGENET}),
    "bytes": ("ViT", {"size": SQUARE, "do_rescale": False, "do_normalize": False}),
}


def save(folder: Path, kind: str, settings: dict[str, Any], model_type: str = "vit") -> Path:
    """Save a processor, without a model."""
    getattr(transformers, f"{kind}ImageProcessorPil")(**settings).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize(("kind", "settings"), USABLE.values(), ids=USABLE)
def test_training_sees_the_pixels_of_evaluation(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    preprocessor = load_preprocessor(save(tmp_path, kind, settings))
    assert preprocessor.image_size == 32
    normalization = measure_normalization(preprocessor)
    assert normalization.is_bgr == (kind == "MobileViT")
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (32, 32, 3), np.uint8)  # of the size that neither view resizes
    trained = normalization({"image": TrainView(WHOLE, 32)(image, random)["image"][None]})[0]
    evaluated = preprocessor(image, random)["image"]
    assert evaluated.dtype == trained.dtype == torch.float32
    torch.testing.assert_close(trained, evaluated, rtol=1e-5, atol=1e-5)


def test_mean_and_std_are_those_of_the_file(tmp_path: Path) -> None:
    normalization = measure_normalization(load_preprocessor(save(tmp_path, "ViT", {"size": SQUARE, **IMAGENET})))
    assert normalization.mean == pytest.approx(IMAGENET["image_mean"], rel=1e-6)
    assert normalization.std == pytest.approx(IMAGENET["image_std"], rel=1e-6)


NO_PIXELS = {
    "patches": ("Siglip2", {}, r"Siglip2ImageProcessor returns values of shape 256 x 768 in place of 3 x height x wid"),
    "clusters": (
        "ImageGPT",
        {"clusters": [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]], "size": SQUARE},
        r"ImageGPTImageProcessor returns input_ids in place of pixels; choose a model whose image processor returns",
    ),
    "one channel": (
        "ViT",
        {"size": SQUARE, "image_mean": [0.5], "image_std": [0.5]},
        r"ViTImageProcessor cannot process a color image: mean must have 3 elements .* of three channels",
    ),
    "sizes of the images": (
        "ViT",
        {"size": {"shortest_edge": 32}},
        r"makes images of 32 x 32 and 32 x 85 and .* but all must be squares of one size; set do_center_crop=true and",
    ),
    "no square": (
        "ViT",
        {"size": {"height": 32, "width": 64}},
        r"makes images of 32 x 64 pixels, but all must be sq",
    ),
}


@pytest.mark.parametrize(("kind", "settings", "message"), NO_PIXELS.values(), ids=NO_PIXELS)
def test_a_processor_without_square_pixels_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=rf"preprocessor_config\.json: {message}"):
        load_preprocessor(save(tmp_path, kind, settings))


BORDERS = {
    "padding": ("Donut", {"size": SQUARE}, "60 x 160"),
    "crop of a smaller image": ("MobileViT", {"size": {"shortest_edge": 28}, "crop_size": SQUARE}, "32 x 32"),
    "no resize": ("CLIP", {"do_resize": False, "crop_size": SQUARE}, "16 x 16"),
    "default crop of DeiT": ("DeiT", {"size": SQUARE}, "224 x 224"),
    "default crop of LeViT": ("Levit", {"size": {"shortest_edge": 32}}, "224 x 224"),
    "default crop of Perceiver": ("Perceiver", {"size": SQUARE}, "32 x 32"),
}


@pytest.mark.parametrize(("kind", "settings", "shape"), BORDERS.values(), ids=BORDERS)
def test_a_processor_that_adds_a_border_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], shape: str
) -> None:
    preprocessor = load_preprocessor(save(tmp_path, kind, settings))
    with pytest.raises(ModelError, match=f"puts a border around an image of {shape} pixels, .* set do_resize=true and"):
        measure_normalization(preprocessor)


class Gamma(transformers.ViTImageProcessorPil):  # type: ignore[misc]
    """A processor that is not linear."""

    def rescale(self, image: Any, scale: float, **_: Any) -> Any:
        return (image * scale) ** 2


class Rotation(transformers.ViTImageProcessorPil):  # type: ignore[misc]
    """A processor whose channels are green, blue, red."""

    def rescale(self, image: Any, scale: float, **_: Any) -> Any:
        return image[[1, 2, 0]] * scale


@pytest.mark.parametrize(
    "processor",
    [Gamma(size=SQUARE), Rotation(size=SQUARE), transformers.ViTImageProcessorPil(size=SQUARE, image_std=[0.0] * 3)],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_colors_that_training_cannot_repeat_are_refused(processor: Any, tmp_path: Path) -> None:
    preprocessor = Preprocessor(processor, tmp_path / "preprocessor_config.json", 32)
    with pytest.raises(ModelError, match=r"changes colors in a way that training cannot repeat; turn off what it does"):
        measure_normalization(preprocessor)
