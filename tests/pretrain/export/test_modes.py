"""What kinds of images reach the exported processor as they reach training, loaded as transformers loads a file."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers.image_utils import load_image

from pretrain.data.decode import decode

PHOTO = Image.fromarray(load_sample_image("flower.jpg")[:120, :180])
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (PHOTO, "PNG", {}),
        (PHOTO, "JPEG", {"exif": TURNED}),
        (PHOTO.convert("CMYK"), "JPEG", {}),
        (PHOTO.convert("L"), "PNG", {}),
        (PHOTO.convert("P"), "PNG", {}),
    ],
    ids=["colour", "exif", "cmyk", "grey", "palette"],
)
def test_transformers_sees_what_training_sees(
    tmp_path: Path, image: Image.Image, kind: str, options: dict[str, object]
) -> None:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    (tmp_path / "image").write_bytes(buffer.getvalue())
    assert np.array_equal(np.asarray(load_image(str(tmp_path / "image"))), decode(buffer.getvalue()))
