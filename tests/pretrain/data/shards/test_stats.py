"""Statistics of a shard set, compared with the image files; and their plot."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from pretrain.captions import fit
from pretrain.data.dataset.open import open_dataset
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.shards.stats import CAPTION, MOSAIC_COLUMNS, MOSAIC_ROWS, TILE, _mosaic, plot, read_stats, summary
from pretrain.data.sources.folder import list_folder
from pretrain.errors import DataError
from tests.support.launching import Vitrail


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces of two photos in two classes, of many sizes, one of them twice."""
    folder = tmp_path_factory.mktemp("stats")
    chance = np.random.default_rng(0)
    for name, count in {"china": 40, "flower": 25}.items():
        (folder / "in" / name).mkdir(parents=True)
        photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
        for i in range(count):
            width, height = chance.integers(60, 300, 2).tolist()
            left, top = chance.integers(0, 120, 2).tolist()
            photo.crop((left, top, left + width, top + height)).save(folder / "in" / name / f"{i}.jpg")
    shutil.copy(folder / "in" / "china" / "3.jpg", folder / "in" / "flower" / "copy.jpg")
    make_shards(
        list_folder(folder / "in"), folder / "out", ShardOptions(validation_fraction=0, shard_bytes=10**5, seed=0)
    )
    return folder


def test_statistics_match_the_image_files(photos: Path) -> None:
    samples = open_dataset(photos / "out" / "train")
    stats = read_stats(samples)
    files = sorted((photos / "in").rglob("*.jpg"))
    assert Counter(zip(stats.widths.tolist(), stats.heights.tolist(), strict=True)) == Counter(
        Image.open(path).size for path in files
    )
    assert sorted(stats.sizes.tolist()) == sorted(path.stat().st_size for path in files)
    found = summary(stats)
    assert found["classes"] == {
        "count": 2,
        "smallest": "flower (26)",
        "largest": "china (40)",
        "imbalance": round(40 / 26, 1),
        "holding half of the samples": 1,
    }
    assert found["shorter side"]["median"] == int(np.median([min(Image.open(path).size) for path in files]))
    assert found["formats"] == {"jpg": 66}
    assert found["width"]["median"] == int(np.median([Image.open(path).width for path in files]))
    assert stats.duplicates == stats.conflicts == [["china/3", "flower/copy"]]
    with pytest.raises(DataError, match="a folder of images has no index; create shards from it"):
        read_stats(open_dataset(photos / "in"))


def test_tiles_are_named_by_their_classes(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("pretrain.data.shards.stats.fit", lambda text, *box: drawn.append(text) or fit(text, *box))
    mosaic = _mosaic(open_dataset(photos / "out" / "train"))
    assert Counter(drawn) == {"china": 40, "flower": 26}
    assert mosaic.shape == (MOSAIC_ROWS * (TILE + CAPTION), MOSAIC_COLUMNS * TILE, 3)
    names = mosaic.reshape(MOSAIC_ROWS, TILE + CAPTION, MOSAIC_COLUMNS, TILE, 3)[:, TILE:]
    has_name = (names.min(axis=(1, 3, 4)) < 128).flatten()
    assert has_name.sum() == has_name[:66].sum() == 66


@pytest.mark.slow
def test_plot_shows_samples_and_histograms(photos: Path) -> None:
    samples = open_dataset(photos / "out" / "train")
    plot(samples, read_stats(samples), photos / "stats.png")
    with Image.open(photos / "stats.png") as picture:
        assert (np.asarray(picture.convert("RGB"))[[0, -1]] == 255).all()  # nothing is cut off
        assert picture.width > 1500
        pixels = np.asarray(picture.convert("RGB").resize((64, 64))).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 500


def test_command_prints_duplicates_and_json(photos: Path, vitrail: Vitrail) -> None:
    text = vitrail("shards", "stats", photos / "out" / "train").out
    assert re.search("identical images +china/3  flower/copy", text)
    assert re.search("identical, different classes +china/3  flower/copy", text)
    answer = vitrail("shards", "stats", photos / "out" / "train", "--json")
    assert json.loads(answer.out)["duplicates"] == 1
