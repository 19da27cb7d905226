"""The exported processor and training see the same pixels for every kind of image."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers.image_utils import load_image

from pretrain.config import DataConfig, PretrainConfig, ScheduleConfig
from pretrain.data.transforms.decode import decode
from pretrain.export.folder import build_processor

PHOTO = Image.fromarray(load_sample_image("flower.jpg")[:120, :180])
ROTATED = Image.Exif()
ROTATED[0x0112] = 6


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (PHOTO, "PNG", {}),
        (PHOTO, "JPEG", {"exif": ROTATED}),
        (PHOTO.convert("CMYK"), "JPEG", {}),
        (PHOTO.convert("L"), "PNG", {}),
        (PHOTO.convert("P"), "PNG", {}),
    ],
    ids=["color", "exif", "cmyk", "grayscale", "palette"],
)
def test_transformers_decodes_images_as_training_does(
    tmp_path: Path, image: Image.Image, kind: str, options: dict[str, object]
) -> None:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    (tmp_path / "image").write_bytes(buffer.getvalue())
    assert np.array_equal(np.asarray(load_image(str(tmp_path / "image"))), decode(buffer.getvalue()))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_processor_puts_transparent_images_on_white_as_training_does(mode: str) -> None:
    image = PHOTO.convert("L" if mode == "LA" else "RGB").convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    buffer = io.BytesIO()
    (image.quantize(64) if mode == "PA" else image.convert(mode)).save(buffer, "PNG")
    config = PretrainConfig(run_dir=Path("run"), data=DataConfig(train="set"), schedule=ScheduleConfig(total_steps=1))
    processor = build_processor(config)
    processed = processor(images=Image.open(buffer), return_tensors="np")["pixel_values"]
    trained = processor(images=Image.fromarray(decode(buffer.getvalue())), return_tensors="np")["pixel_values"]
    assert np.array_equal(processed, trained)
