"""Shards and folders of images as torch Datasets: their samples, their errors, and their use in a DataLoader."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import vitrail
from benchmarks.unreliable_server import UnreliableServer, serve
from pretrain.data.dataset.open import open_dataset
from pretrain.data.dataset.sharded import load_info
from pretrain.data.loading.workers import CONTEXT
from pretrain.errors import BadSampleError


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image).mean())


@pytest.fixture
def damaged(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits' validation shards with a damaged byte in the first sample."""
    folder = Path(shutil.copytree(digits / "validation", tmp_path / "damaged"))
    tar = folder / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    return folder


def test_shards_have_the_images_and_labels_of_the_training_loader(digits: Path) -> None:
    found, expected = vitrail.open_dataset(digits / "train"), open_dataset(digits / "train")
    locations = [(shard, row) for shard, size in enumerate(expected.shard_sizes) for row in range(size)]
    assert len(expected.shard_sizes) > 1
    assert len(found) == len(locations)
    for (image, label), location in zip(found, locations, strict=True):  # ends with an IndexError
        sample = expected.read(*location)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), sample.image)
        assert label == sample.label
    assert found.labels.tolist() == [label for _, label in found]
    assert found.class_names == ["0", "1", "2"]
    assert repr(found) == f"<ImageDataset: {len(found)} images in 3 classes>"
    assert found[-1][1] == found[np.int64(len(found) - 1)][1]
    with pytest.raises(IndexError, match=f"{len(found)} is out of range: there are {len(found)} images"):
        found[len(found)]
    assert vitrail.open_dataset(str(digits), split="validation").labels.tolist() == [
        label for _, label in vitrail.open_dataset(digits / "validation")
    ]
    both = vitrail.open_dataset([digits / "train", digits / "validation"])
    assert len(both) == len(found) + len(vitrail.open_dataset(digits / "validation"))


def test_a_folder_is_opened_with_and_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "dog").mkdir()
    Image.new("L", (5, 4), 9).save(tmp_path / "photos" / "dog" / "1.png")
    Image.new("L", (7, 6), 3).save(tmp_path / "photos" / "cat" / "1.png")
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("a cat")
    with pytest.warns(UserWarning, match=r"notes\.txt"):
        photos = vitrail.open_dataset(tmp_path / "photos")
    assert [(image.size, label) for image, label in photos] == [((7, 6), 0), ((5, 4), 1)]
    assert photos.class_names == ["cat", "dog"]
    assert "notes.txt" in "".join(photos.notes)
    monkeypatch.setenv("HOME", str(tmp_path))
    flat = vitrail.open_dataset("~/photos/dog", brightness, labeled=False)
    assert flat[0] == (9.0, -1)
    assert flat.class_names == []
    with pytest.raises(vitrail.UserError, match=r"photos/dog: .*"):
        vitrail.open_dataset(tmp_path / "photos" / "dog")


def test_a_url_is_read_through_the_cache(digits: Path, tmp_path: Path) -> None:
    local, cache = vitrail.open_dataset(digits / "validation"), tmp_path / "cache"
    with serve(UnreliableServer(digits)) as server:
        remote = vitrail.open_dataset(f"{server.url}/validation", cache_dir=cache)
        assert [label for _, label in remote] == local.labels.tolist()
    shards = load_info(str(digits / "validation")).shards
    assert {shard.sha256 for shard in shards} <= {path.name for path in cache.iterdir()}
    assert np.array_equal(np.asarray(remote[0][0]), np.asarray(local[0][0]))  # the server is gone


def test_mistakes_are_errors_of_the_user(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(vitrail.UserError, match=r"fotos: no such folder; expected one with a dataset\.json or"):
        vitrail.open_dataset(tmp_path / "fotos")
    with pytest.raises(vitrail.UserError, match=r"shard-000000\.tar: sample .*: damaged: its checksum is off") as error:
        vitrail.open_dataset(damaged)[0]
    assert not isinstance(error.value, BadSampleError)  # which torch could not raise again


@pytest.mark.processes
def test_data_workers_read_the_same_samples_and_raise_the_same_errors(damaged: Path) -> None:
    photos = vitrail.open_dataset(damaged, brightness)
    expected = [pickle.loads(pickle.dumps(photos))[i] for i in range(1, 9)]
    loader = DataLoader(photos, 4, sampler=range(1, 9), num_workers=1, multiprocessing_context=CONTEXT)
    values, labels = (torch.cat(parts).tolist() for parts in zip(*loader, strict=True))
    assert [*zip(values, labels, strict=True)] == expected
    broken = DataLoader(photos, 4, num_workers=1, multiprocessing_context=CONTEXT)
    with pytest.raises(vitrail.UserError, match="damaged: its checksum is off"):
        next(iter(broken))
