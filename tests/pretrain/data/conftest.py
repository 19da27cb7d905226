"""Photos for the tests of sources and shards."""

from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of crops from real photos, in two classes and several formats."""
    folder = tmp_path / "photos"
    for name in ("china", "flower"):
        pixels = load_sample_image(f"{name}.jpg")
        (folder / name / "deep").mkdir(parents=True)
        for i in range(6):
            crop = Image.fromarray(pixels[40 * i : 40 * i + 64, 30 * i : 30 * i + 80])
            crop.save(folder / name / f"crop.{i}.jpg")
        Image.fromarray(pixels[:50, :60]).save(folder / name / "deep" / "crop.PNG")
        Image.fromarray(pixels[:50, :60]).save(folder / name / "scan.bmp")
    return folder
