"""Folders of images as a source: nothing is skipped or listed twice silently."""

import errno
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.data.dataset.open import open_dataset
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.folder import find_splits, list_folder
from pretrain.data.storage.index import DatasetInfo
from pretrain.data.transforms.decode import SUFFIXES
from pretrain.errors import DataError


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Three images each of two classes."""
    for label, name in enumerate(("cat", "dog")):
        folder = tmp_path / "animals" / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (32, 32), (60 * i, 90 * label, 30)).save(folder / f"{i}.jpg")
    return tmp_path / "animals"


def test_skipped_and_repeated_folders_are_reported(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = len(list_folder(photos))
    (photos / "china" / "loop").symlink_to(photos / "china")
    (photos / ".cache").mkdir()
    source = list_folder(photos)
    assert len(source) == whole
    assert source.notes == ["1 hidden file or folder, skipped: .cache"]
    assert source.problems == [
        f"1 file or folder not readable: {photos}/china/loop (links to one of its parent folders)"
    ]
    (photos / "china" / "loop").unlink()

    (photos / "china" / "far").symlink_to(photos / "flower")  # a link to another folder is followed
    assert len(list_folder(photos)) == whole + len(list(photos.glob("flower/**/*.*")))
    (photos / "china" / "far").unlink()

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: _refuse() if str(path).endswith("deep") else scandir(path))
    [problem] = list_folder(photos).problems
    assert "2 files or folders not readable" in problem
    assert "deep (Permission denied)" in problem


def _refuse() -> NoReturn:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_unusable_folders_are_refused(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        list_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no subfolders, so its images have no classes; expected one subfolder per"):
        list_folder(photos / "china" / "deep")


def test_images_are_known_by_their_content(animals: Path) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    suffixes = {
        "jfif": "JPEG",
        "JPE": "JPEG",
        "avif": "AVIF",
        "jp2": "JPEG2000",
        "ico": "ICO",
        "tga": "TGA",
        "dat": "PNG",
    }
    for suffix, kind in suffixes.items():
        picture.save(animals / "cat" / f"photo_{suffix}.{suffix}", kind)
    picture.save(animals / "cat" / "photo", "JPEG")
    (animals / "cat" / "damaged").write_bytes(b"\xff\xd8\xff")  # an image all the same
    (animals / "cat" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (animals / "cat" / "notes.txt").write_text("no image")
    (animals / "dog" / "dog.eps").write_text("%!PS-Adobe-3.0")  # would need another program
    source = list_folder(animals)
    assert len(source) == 6 + len(suffixes) + 3
    assert source.notes == ["2 files that are not images, skipped: cat/notes.txt, dog/dog.eps"]
    assert not source.problems


def test_hidden_copies_are_left_out_at_any_depth(animals: Path) -> None:
    for folder in ("cat/.ipynb_checkpoints", "dog/.thumbnails", "__MACOSX/cat"):
        (animals / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(animals / folder / "0.jpg")
    (animals / "cat" / "._0.jpg").write_bytes(b"\0\5\x16\7")
    source = list_folder(animals)
    assert (len(source), source.class_names) == (6, ["cat", "dog"])
    hidden = "__MACOSX, cat/._0.jpg, cat/.ipynb_checkpoints, dog/.thumbnails"
    assert source.notes == [f"4 hidden files or folders, skipped: {hidden}"]


def test_all_problems_are_named_at_once(animals: Path) -> None:
    (animals / "bird").symlink_to("/no/such/disk/bird")
    (animals / "cat" / "gone.jpg").symlink_to("/no/such/disk/gone.jpg")
    (animals / "empty").mkdir()
    (animals / "cat" / "more.tar").touch()
    (animals / "loose.png").write_bytes((animals / "cat" / "0.jpg").read_bytes())
    (animals / "dog" / "a\nb.jpg").write_bytes((animals / "cat" / "0.jpg").read_bytes())
    source = list_folder(animals)
    assert source.problems == [
        "2 links that lead nowhere: bird, cat/gone.jpg",
        "1 archive whose images are not read: cat/more.tar",
        "1 name with control characters: 'dog/a\\nb.jpg'",
        "1 image outside of the classes: loose.png",
        "1 class without images: empty",
    ]
    assert (len(source), source.class_names) == (6, ["cat", "dog"])
    assert set(source.labels.tolist()) == {0, 1}


def test_images_that_differ_only_by_suffix_get_keys_that_differ(animals: Path) -> None:
    for name in ("0.png", "0.webp", "0_png.jpg", "1.x.jpg", "1_x.jpg"):
        Image.new("RGB", (8, 8)).save(animals / "cat" / name)
    source = list_folder(animals)
    keys = [source.image(i).key for i in range(len(source))]
    assert not source.problems
    assert len(set(keys)) == len(source) == 11
    assert [key for key in keys if key.startswith("cat/0")] == ["cat/0", "cat/0_png", "cat/0_webp", "cat/0_png_jpg"]


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=6, unique=True))
def test_any_name_is_kept_or_named(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    folder = tmp_path_factory.mktemp("names")
    (folder / "class").mkdir()
    written = 0
    for name in names:
        try:
            Image.new("RGB", (4, 4)).save(folder / "class" / f"{name}.png")
            written += 1
        except (OSError, ValueError, UnicodeError):  # a slash, a zero byte, half of a pair of surrogates
            continue
    (folder / "class" / "plain.gif").write_bytes(b"GIF89a")
    source = list_folder(folder)
    named = [*source.notes, *source.problems]
    counted = sum(int(line.split()[0]) for line in named)
    assert len(source) + counted == len(list((folder / "class").iterdir()))
    assert all(name.isprintable() or "\n" not in name for name in source.names)


CHARACTERS = st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="/")
ENDINGS = st.sampled_from(["", ".png", ".JPG", ".txt", ".csv", ".tar", ".zip", ".json", ".webp ", ".x.y"])
FORMATS = st.sampled_from(["PNG", "BMP", "GIF", "TIFF", "WEBP", ""])  # "": not an image


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.tuples(st.text(CHARACTERS, min_size=1, max_size=20), ENDINGS), FORMATS, max_size=6))
def test_content_decides_whatever_the_name(
    tmp_path_factory: pytest.TempPathFactory, files: dict[tuple[str, str], str]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    (folder / "a class").mkdir()
    colors = {}
    for number, ((stem, suffix), kind) in enumerate({("first", ".png"): "PNG", **files}.items()):
        name = f"a class/{stem}{suffix}"
        if stem.startswith(".") or f"{stem}{suffix}" == "__MACOSX" or (folder / name).exists():
            continue
        if kind:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(
                folder / name, kind, **({"lossless": True} if kind == "WEBP" else {})
            )
            colors[name] = number
        elif Path(name).suffix.lower() not in SUFFIXES:  # else it is an image that is damaged
            (folder / name).write_text("no image")
    source = list_folder(folder)
    assert set(source.names) == colors.keys()
    source.problems.clear()  # archives, which a user would have to unpack or remove
    make_shards(source, folder / "set", ShardOptions(validation_fraction=0.0))
    dataset = open_dataset(folder / "set" / "train")
    samples = [dataset.read(0, row) for row in range(dataset.shard_sizes[0])]
    assert sorted(int(sample.image[0, 0, 0]) for sample in samples) == sorted(colors.values())
    assert len({sample.key for sample in samples}) == len(samples)


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (["train", "val"], ("train", "val")),
        (["Training", "valid", "test"], ("Training", "valid")),
        (["train", "test"], ("train", "test")),
        (["train", "val", "cat"], None),
        (["train"], None),
        (["cat", "dog"], None),
    ],
)
def test_folders_called_train_and_val_are_splits(tmp_path: Path, folders: list[str], splits: object) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    assert find_splits(tmp_path) == splits


def test_other_folders_do_not_make_splits_classes(animals: Path, tmp_path: Path) -> None:
    """Notes beside them are left alone; images beside them would be lost."""
    whole = tmp_path / "whole"
    whole.mkdir()
    animals.rename(whole / "train")
    for name in ("cat", "dog"):
        (whole / "val" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (0, 0, 9)).save(whole / "val" / name / "v.png")
    (whole / "annotations").mkdir()
    (whole / "annotations" / "labels.xml").touch()
    source = list_folder(whole)
    assert "train/ and val/ are taken as its splits" in source.notes[1]
    assert (source.class_names, source.problems) == (["cat", "dog"], [])
    (whole / "extra" / "cat").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(whole / "extra" / "cat" / "e.png")
    assert list_folder(whole).problems == ["1 image outside of the classes: extra/"]


def test_folders_without_classes_say_what_they_have(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no images; expected one subfolder per class"):
        list_folder(tmp_path)
    (tmp_path / "a.tar.gz").touch()
    assert list_folder(tmp_path).problems == ["1 archive whose images are not read: a.tar.gz"]


def test_splits_of_a_folder_are_kept(animals: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    animals.rename(tmp_path / "whole" / "train")
    for name, count in (("cat", 1), ("dog", 2)):
        (tmp_path / "whole" / "val" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (16, 16), (0, 0, 9 * i)).save(tmp_path / "whole" / "val" / name / f"{i}.png")
    source = list_folder(tmp_path / "whole")
    assert "train/ and val/ are taken as its splits, with 6 training and 3 validation images" in source.notes[0]
    made = make_shards(source, tmp_path / "out", ShardOptions(validation_fraction=0.5))
    assert {name: info.class_counts for name, info in made.splits.items()} == {"train": [3, 3], "validation": [1, 2]}
    assert DatasetInfo.load(tmp_path / "out" / "validation").class_names == ["cat", "dog"]
    for place in (tmp_path / "whole", tmp_path / "out"):
        assert sum(open_dataset(place, split="train").shard_sizes) == 6
        assert sum(open_dataset(place, split="validation").shard_sizes) == 3
        with pytest.raises(DataError, match="contains several splits"):
            open_dataset(place)
    (tmp_path / "whole" / "val" / "bird").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "whole" / "val" / "bird" / "0.png")
    assert list_folder(tmp_path / "whole").problems == [
        "1 validation class that has no training images: val/bird",
    ]
    for name in ("cat", "dog"):
        (tmp_path / "whole" / "val" / name).rename(tmp_path / name)
    assert list_folder(tmp_path / "whole").problems == ["1 validation class that has no training images: val/bird"]
    for name in ("cat", "dog"):
        (tmp_path / name).rename(tmp_path / "whole" / "val" / name)
    shutil.rmtree(tmp_path / "whole" / "val" / "bird")
    (tmp_path / "whole" / "test").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "whole" / "beside.png")
    beside = list_folder(tmp_path / "whole")
    assert beside.problems == ["1 image outside of the classes: beside.png"]
    assert beside.notes[-1] == "1 further split, not used: test"
    assert len(list_folder(tmp_path / "whole", labeled=False, may_have_splits=False)) == 10
    (tmp_path / "whole" / "beside.png").unlink()
    shutil.copy(tmp_path / "whole" / "train" / "cat" / "2.jpg", tmp_path / "whole" / "val" / "cat" / "2.jpg")
    copied = list_folder(tmp_path / "whole")
    assert copied.problems == ["1 image that is in both splits: val/cat/2.jpg"]
    assert (len(copied), int(copied.held_out.sum())) == (9, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("labeled", [True, False])
def test_splits_below_the_top_are_a_problem(animals: Path, tmp_path: Path, labeled: bool) -> None:
    """Their validation images would be trained on. A class of trains may have one of the names."""
    for name in ("train", "Test"):
        (animals / "cat" / name).mkdir()
        Image.new("RGB", (16, 16)).save(animals / "cat" / name / "0.png")
        if name == "train":
            assert (len(list_folder(animals, labeled)), list_folder(animals, labeled).problems) == (7, [])
    source = list_folder(animals, labeled)
    [problem] = source.problems
    assert problem.startswith("1 folder with splits of its own, whose validation images would be trained on; move ")
    assert problem.endswith(": cat")
    assert (len(source), source.class_names) == (3, ["dog"] if labeled else [])
    with pytest.raises(DataError, match="1 folder with splits of its own"):
        open_dataset(animals, labeled=labeled)
    assert list_folder(animals, labeled=False, may_have_splits=False).problems == []

    (tmp_path / "data").mkdir()
    shutil.copytree(animals / "dog", tmp_path / "data" / "photos" / "train" / "dog")
    shutil.copytree(animals / "dog", tmp_path / "data" / "photos" / "val" / "dog")
    assert [line.rpartition(": ")[2] for line in list_folder(tmp_path / "data", labeled).problems] == ["photos"]


def test_a_flat_folder_needs_no_classes_where_no_labels_are_used(animals: Path) -> None:
    dataset = open_dataset(animals / "cat", labeled=False)
    assert (sum(dataset.shard_sizes), dataset.class_names) == (3, [])
    assert dataset.describe() == "3 images without labels"
    (animals / "README.txt").write_text("two classes")
    assert open_dataset(animals, labeled=False).class_names == ["cat", "dog"]
    with pytest.raises(DataError, match="has no subfolders, so its images have no classes"):
        open_dataset(animals / "cat")
