"""Training, validation, prediction and the exported processor see the same pixels of every kind of image."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from torch import Tensor
from transformers.image_utils import load_image

from pretrain.config import AugmentConfig, DataConfig, ModelConfig, PreprocessingConfig, PretrainConfig, ScheduleConfig
from pretrain.data.shards.encoding import Encoding
from pretrain.data.transforms.batch import augment
from pretrain.data.transforms.decode import FORMATS, DecodeError, decode
from pretrain.data.transforms.views import TrainView
from pretrain.export.folder import build_processor
from pretrain.export.proof import evaluation_pixels

pytestmark = pytest.mark.slow  # many short tests

PHOTO = Image.fromarray(load_sample_image("flower.jpg")[100:164, 200:264])
TRANSPARENT = PHOTO.convert("RGBA")
TRANSPARENT.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
DEEP = np.asarray(PHOTO.convert("L")).astype(np.uint16) << 4  # 12 bits
IMAGES = {
    **{mode: PHOTO.convert(mode) for mode in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F")},
    **{mode: TRANSPARENT.convert(mode) for mode in ("LA", "RGBA", "RGBa")},
    "PA": TRANSPARENT.quantize(64),
    "I;16": Image.fromarray(DEEP),
    "I;16B": Image.fromarray(DEEP.astype(">u2")),
}
WHOLE = AugmentConfig(crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip=0.0)
LEVEL = 1 / 255 / min(PreprocessingConfig().image_std)


def files_of(kind: str) -> Iterator[tuple[str, bytes]]:
    """Yield an image of each mode that Pillow can write in this format: the mode and the file's content."""
    for mode, image in IMAGES.items():
        buffer = io.BytesIO()
        try:
            image.save(buffer, kind)
        except (OSError, ValueError, KeyError, SystemError):  # a mode that the format does not have
            continue
        yield mode, buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    """Open an image as Pillow's documentation shows: upright."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


def run_config(image_size: int) -> PretrainConfig:
    return PretrainConfig(
        run_dir=Path("run"),
        data=DataConfig(train="set"),
        model=ModelConfig(image_size=image_size, patch_size=16),
        schedule=ScheduleConfig(total_steps=1),
    )


def training_pixels(config: PretrainConfig, data: bytes) -> Tensor:
    """Send a sample through training's view: normalized pixels [1, 3, H, W]."""
    fields = TrainView(WHOLE, config.model.image_size)(decode(data), np.random.default_rng(0))
    return augment({"image": fields["image"][None]}, config.preprocessing.image_mean, config.preprocessing.image_std)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind in Image.SAVE and kind != "ICNS"])
def test_every_format_and_mode_has_the_same_pixels_everywhere(kind: str) -> None:
    modes = []
    for mode, data in files_of(kind):
        try:
            stored = Encoding()(data).data  # by `vitrail shards make`
        except DecodeError as error:
            assert "grayscale of 32 bits, whose range of values is unknown" in str(error)
            continue
        config = run_config(64)
        trained = training_pixels(config, stored)
        assert torch.equal(evaluation_pixels(config, Image.fromarray(decode(stored))), trained), mode
        assert torch.equal(evaluation_pixels(config, Image.fromarray(decode(data, scales=True))), trained), mode
        processor = build_processor(config)
        # Two builds of libjpeg-turbo may round a value differently.
        atol = 2.1 * LEVEL if kind == "JPEG" else 1e-5
        torch.testing.assert_close(
            processor(opened(stored), return_tensors="pt")["pixel_values"], trained, rtol=0, atol=atol, msg=mode
        )
        modes.append(mode)
    assert modes or kind == "SPIDER"  # which has only 32 bits


def test_icons_have_the_pixels_of_their_largest_image() -> None:
    ((_, data),) = [(mode, data) for mode, data in files_of("ICNS") if mode == "RGBA"]
    config = run_config(1024)
    exported = build_processor(config)(opened(data), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(exported, training_pixels(config, Encoding()(data).data), rtol=0, atol=1e-5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "JPEG2000"])
def test_every_orientation_has_the_same_pixels_everywhere(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    PHOTO.save(buffer, kind, exif=exif)
    data, config = buffer.getvalue(), run_config(64)
    stored = Encoding()(data).data
    trained = training_pixels(config, stored)
    assert torch.equal(evaluation_pixels(config, Image.fromarray(decode(data))), trained)
    processor, atol = build_processor(config), 2.1 * LEVEL if kind == "JPEG" else 1e-5
    for number, content in enumerate((data, stored)):
        (tmp_path / f"{number}").write_bytes(content)
        exported = processor(load_image(str(tmp_path / f"{number}")), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(exported, trained, rtol=0, atol=atol)
