"""Shards: plain tars that webdataset reads, the same bytes each time, and no data lost in silence."""

import errno
import io
import json
import os
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import webdataset
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from pretrain.data.index import DataError, DatasetInfo, ShardIndex
from pretrain.data.sets import open_samples
from pretrain.data.shards.make import Made, make_shards, split
from pretrain.data.sources import Source, keep_classes, list_source


def make(source: Source, out: Path, **options: object) -> Made:
    settings: dict[str, object] = {"validation": 0.2, "shard_bytes": 20_000, "seed": 0, "skip_bad": False}
    return make_shards(source, out, **(settings | options))  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of real photos, cut into crops, of three classes and several formats."""
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


def test_digits_are_all_there_and_split_by_class(tmp_path: Path) -> None:
    made = make(list_source("digits"), tmp_path / "out")
    target = load_digits().target
    counts = np.bincount(target)
    train, validation = made.splits["train"], made.splits["validation"]
    assert [a + b for a, b in zip(train.class_counts, validation.class_counts, strict=True)] == counts.tolist()
    assert validation.class_counts == [round(0.2 * count) for count in counts]
    assert train.class_names == [str(i) for i in range(10)]


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_webdataset_reads_what_we_write(tmp_path: Path, photos: Path, extension: str) -> None:
    for path in photos.rglob("*.*"):
        if path.suffix != ".jpg":
            path.unlink()
    source = keep_classes(list_source("digits"), ["3", "8"]) if extension == "png" else list_source(str(photos))
    make(source, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    theirs = {
        sample["__key__"]: (sample[extension].tobytes(), sample["cls"], sample["json"]["class"])
        for sample in webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False).decode("rgb8")
    }
    ours = open_samples(folder)
    records = [ours.read(shard, row) for shard, size in enumerate(ours.shard_sizes) for row in range(size)]
    assert len(records) == len(theirs) == DatasetInfo.load(folder).num_samples
    for record in records:
        assert theirs[record.key] == (record.image.tobytes(), record.label, ours.class_names[record.label])


def test_the_same_source_gives_the_same_bytes(tmp_path: Path, photos: Path) -> None:
    for name in ("a", "b"):
        make(list_source(str(photos)), tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    other = make(list_source(str(photos)), tmp_path / "c", seed=1)
    assert other.splits["train"].digest != DatasetInfo.load(tmp_path / "a" / "train").digest


def test_a_folder_keeps_its_bytes_and_names(tmp_path: Path, photos: Path) -> None:
    (photos / "notes.txt").write_text("not an image")
    source = list_source(str(photos))
    assert source.remarks == ["1 not an image, left out: notes.txt"]
    make(source, tmp_path / "out", validation=0)
    assert not (tmp_path / "out" / "validation").exists()
    samples = open_samples(tmp_path / "out" / "train")
    assert samples.class_names == ["china", "flower"]
    keys = {samples.read(i, row).key for i, size in enumerate(samples.shard_sizes) for row in range(size)}
    assert {"china/crop_3", "china/deep/crop", "flower/scan"} <= keys
    entry = DatasetInfo.load(tmp_path / "out" / "train").shards[0]
    path = tmp_path / "out" / "train" / "shard-000000.index.json"
    index = ShardIndex.parse(path.read_bytes(), path, entry.index_sha256)
    data = (tmp_path / "out" / "train" / index.name).read_bytes()
    i = next(i for i, key in enumerate(index.key) if "crop_" in key)
    original = photos / f"{index.key[i].replace('_', '.')}.jpg"
    assert data[index.offset[i] : index.offset[i] + index.size[i]] == original.read_bytes()


def test_long_and_foreign_names_survive(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "鳥類"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / f"{'長' * 60}.png")
    make(list_source(str(folder.parent)), tmp_path / "out", validation=0)
    samples = open_samples(tmp_path / "out" / "train")
    assert samples.read(0, 0).key == f"鳥類/{'長' * 60}"
    tar = tmp_path / "out" / "train" / "shard-000000.tar"
    [theirs] = webdataset.WebDataset(str(tar), shardshuffle=False)
    assert theirs["__key__"] == f"鳥類/{'長' * 60}"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("empty", "1 class without images: bird"),
        ("twice", "1 image with a key already taken: china/crop.1.png (as china/crop.1.jpg)"),
        ("outside", "1 image outside of any class: stray.png"),
        ("text", "china/broken.jpg"),
        ("cut", "china/cut.jpg"),
        ("link", "china/link.jpg: [Errno 2] No such file or directory"),
        ("name", "1 name that is not readable text: 'china/new\\nline.png'"),
    ],
)
def test_what_would_be_lost_is_an_error_unless_left_out(
    tmp_path: Path, photos: Path, fault: str, expected: str
) -> None:
    whole = len(list_source(str(photos)).images)
    image = Image.new("RGB", (8, 8))
    if fault == "empty":
        (photos / "bird").mkdir()
    elif fault == "twice":
        image.save(photos / "china" / "crop.1.png")
    elif fault == "outside":
        image.save(photos / "stray.png")
    elif fault == "text":
        (photos / "china" / "broken.jpg").write_text("no image")
    elif fault == "link":
        (photos / "china" / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    elif fault == "name":
        image.save(photos / "china" / "new\nline.png")
    elif fault == "cut":
        data = (photos / "china" / "crop.1.jpg").read_bytes()
        (photos / "china" / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError) as caught:
        make(list_source(str(photos)), tmp_path / "out")
    assert expected in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    assert not (tmp_path / "out").exists()
    made = make(list_source(str(photos)), tmp_path / "out", skip_bad=True)
    assert sum(info.num_samples for info in made.splits.values()) == whole


def test_every_unreadable_file_counts_in_both_splits(tmp_path: Path, photos: Path) -> None:
    for path in (photos / "china").rglob("*.*"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="8 unreadable files") as caught:
        make(list_source(str(photos)), tmp_path / "out", validation=0.5)
    named = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert len(named) == 6  # the first five, and that there are more
    assert named[-1] == "  ..."
    made = make(list_source(str(photos)), tmp_path / "out", validation=0.5, skip_bad=True)
    assert len(made.left_out) == 8
    assert sorted(made.splits) == ["train", "validation"]


def test_folders_that_would_be_passed_over_or_seen_twice(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = len(list_source(str(photos)).images)
    (photos / "china" / "loop").symlink_to(photos / "china")
    (photos / ".cache").mkdir()
    source = list_source(str(photos))
    assert len(source.images) == whole
    assert source.remarks == ["1 hidden folder, left out: .cache"]
    [fault] = source.faults
    assert "1 folder that cannot be listed" in fault
    assert "china/loop (links to a folder above it)" in fault
    (photos / "china" / "loop").unlink()

    (photos / "china" / "far").symlink_to(photos / "flower")  # a link elsewhere is followed
    assert len(list_source(str(photos)).images) == whole + len(list(photos.glob("flower/**/*.*")))
    (photos / "china" / "far").unlink()

    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: _refuse() if path.name == "deep" else iterdir(path))
    [fault] = list_source(str(photos)).faults
    assert "2 folders that cannot be listed" in fault
    assert "deep (Permission denied)" in fault


def _refuse() -> NoReturn:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_shards_have_the_asked_size_and_the_seed_draws_the_split(tmp_path: Path) -> None:
    source = list_source("digits")
    make(source, tmp_path / "out", shard_bytes=100_000)
    for name in ("train", "validation"):
        *full, last = DatasetInfo.load(tmp_path / "out" / name).shards
        assert len(full) > 1
        assert all(100_000 <= shard.num_bytes < 110_000 for shard in full)
        assert last.num_bytes < 110_000
    draws = [{image.key for image in split(source, 0.2, seed)[1]} for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_mistakes_of_the_whole_folder(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        list_source(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="has no subfolders; expected one for each class"):
        list_source(str(photos / "china" / "deep"))
    with pytest.raises(DataError, match="no class bird; the classes are china, flower"):
        keep_classes(list_source(str(photos)), ["bird"])
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="is there already"):
        make(list_source(str(photos)), tmp_path / "out")
    with pytest.raises(DataError, match="no images"):
        make(Source(["a"], []), tmp_path / "none")


def test_a_stopped_command_leaves_no_shards_and_can_run_again(tmp_path: Path, photos: Path) -> None:
    class StopError(Exception):
        pass

    def stop(_: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        make(list_source(str(photos)), tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    assert make(list_source(str(photos)), tmp_path / "out").splits


def test_split_holds_out_at_least_one_of_each_class() -> None:
    source = list_source("digits")
    train, held_out = split(source, 0.001, seed=0)
    assert sorted({image.label for image in held_out}) == list(range(10))
    assert len(held_out) == 10
    assert len(train) + len(held_out) == len(source.images)
    assert not {image.key for image in train} & {image.key for image in held_out}


def test_a_dataset_edited_by_hand_is_noticed(tmp_path: Path) -> None:
    make(keep_classes(list_source("digits"), ["3"]), tmp_path / "out")
    path = tmp_path / "out" / "train" / "dataset.json"
    content = json.loads(path.read_text())
    content["class_names"] = ["three"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="edited by hand"):
        open_samples(path.parent)
    path.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        open_samples(path.parent)
    path.write_text('{"version": 99}')
    with pytest.raises(DataError, match="version 99, this Tessera reads 2"):
        open_samples(path.parent)


def test_pngs_of_digits_are_the_digits() -> None:
    source = list_source("digits")
    digit = Image.open(io.BytesIO(source.images[7].read()))
    small = np.asarray(digit.resize((8, 8), Image.Resampling.BOX), dtype=float) / 255 * 16
    assert np.corrcoef(small.ravel(), load_digits().images[7].ravel())[0, 1] > 0.98
