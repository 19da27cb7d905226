"""Shards are plain tars that webdataset reads, have the same bytes each time, and lose no data silently."""

import fcntl
import io
import tarfile
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from pretrain.data.dataset.open import open_dataset
from pretrain.data.shards.encoding import Encoding
from pretrain.data.shards.make import MadeShards, ShardTask, WrittenShard, make_shards
from pretrain.data.shards.plan import ShardOptions, split
from pretrain.data.shards.tasks import run_tasks, run_tasks_on_ray
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.folder import list_folder
from pretrain.data.sources.open import list_source
from pretrain.data.sources.source import Source, keep_classes
from pretrain.data.storage.index import DatasetInfo, ShardIndex
from pretrain.errors import DataError

pytestmark = pytest.mark.slow  # many short tests


def make(source: Source, out: Path, **options: Any) -> MadeShards:
    """Make shards with default options; keyword arguments replace single options or go to make_shards."""
    default = ShardOptions(validation_fraction=0.2, shard_bytes=20_000, seed=0)
    changes = {name: options.pop(name) for name in list(options) if hasattr(default, name)}
    return make_shards(source, out, replace(default, **changes), **options)


def test_digits_are_complete_and_split_by_class(tmp_path: Path) -> None:
    made = make(list_digits(), tmp_path / "out")
    target = load_digits().target
    counts = np.bincount(target)
    train, validation = made.splits["train"], made.splits["validation"]
    assert [a + b for a, b in zip(train.class_counts, validation.class_counts, strict=True)] == counts.tolist()
    assert validation.class_counts == [round(0.2 * count) for count in counts]
    assert train.class_names == [str(i) for i in range(10)]


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_webdataset_reads_our_shards(tmp_path: Path, photos: Path, extension: str) -> None:
    for path in photos.rglob("*.*"):
        if path.suffix != ".jpg":
            path.unlink()
    source = keep_classes(list_digits(), ["3", "8"]) if extension == "png" else list_folder(photos)
    make(source, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    theirs = {
        sample["__key__"]: (sample[extension].tobytes(), sample["cls"], sample["json"]["class"])
        for sample in webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False).decode("rgb8")
    }
    ours = open_dataset(folder)
    records = [ours.read(shard, row) for shard, size in enumerate(ours.shard_sizes) for row in range(size)]
    assert len(records) == len(theirs) == DatasetInfo.load(folder).num_samples
    for record in records:
        assert theirs[record.key] == (record.image.tobytes(), record.label, ours.class_names[record.label])


def test_same_source_and_seed_give_the_same_bytes(tmp_path: Path, photos: Path) -> None:
    for name in ("a", "b"):
        make(list_folder(photos), tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    other = make(list_folder(photos), tmp_path / "c", seed=1)
    assert other.splits["train"].digest != DatasetInfo.load(tmp_path / "a" / "train").digest


def test_images_of_a_folder_keep_their_bytes_and_names(tmp_path: Path, photos: Path) -> None:
    (photos / "notes.txt").write_text("not an image")
    source = list_folder(photos)
    assert source.notes == ["1 file that is not an image, skipped: notes.txt"]
    make(source, tmp_path / "out", validation_fraction=0)
    assert not (tmp_path / "out" / "validation").exists()
    samples = open_dataset(tmp_path / "out" / "train")
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


def test_long_and_non_ascii_names_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "鳥類"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / f"{'長' * 60}.png")
    make(list_folder(folder.parent), tmp_path / "out", validation_fraction=0)
    samples = open_dataset(tmp_path / "out" / "train")
    assert samples.read(0, 0).key == f"鳥類/{'長' * 60}"
    tar = tmp_path / "out" / "train" / "shard-000000.tar"
    [theirs] = webdataset.WebDataset(str(tar), shardshuffle=False)
    assert theirs["__key__"] == f"鳥類/{'長' * 60}"


def test_all_faults_of_a_folder_are_reported_at_once(tmp_path: Path, photos: Path) -> None:
    (photos / "bird").mkdir()
    (photos / "china" / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for name in ("one", "two"):
        data = (photos / "china" / "crop.1.jpg").read_bytes()
        (photos / "china" / f"{name}.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError) as caught:
        make(list_folder(photos), tmp_path / "out")
    links, classes, unreadable, one, two, fix = str(caught.value).splitlines()[1:]
    assert links == "  1 link that leads nowhere: china/link.jpg"
    assert classes == "  1 class without images: bird"
    assert unreadable == "2 unreadable files:"
    assert one.startswith("  china/one.jpg: ")
    assert two.startswith("  china/two.jpg: ")
    assert fix == "fix this, or leave it out with --skip-bad"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("empty", "1 class without images: bird"),
        ("outside", "1 image outside of the classes: stray.png"),
        ("text", "china/broken.jpg"),
        ("cut", "china/cut.jpg"),
        ("link", "1 link that leads nowhere: china/link.jpg"),
        ("name", "1 name with control characters: 'china/new\\nline.png'"),
    ],
)
def test_lost_images_are_an_error_without_skip_bad(tmp_path: Path, photos: Path, fault: str, expected: str) -> None:
    whole = len(list_folder(photos))
    image = Image.new("RGB", (8, 8))
    if fault == "empty":
        (photos / "bird").mkdir()
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
        make(list_folder(photos), tmp_path / "out")
    assert expected in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    assert not (tmp_path / "out").exists()
    made = make(list_folder(photos), tmp_path / "out", skip_bad=True)
    assert sum(info.num_samples for info in made.splits.values()) == whole


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9])
def test_a_class_without_a_usable_training_image_is_no_class(tmp_path: Path, photos: Path, fraction: float) -> None:
    """The result is that of a source without the class; the other classes keep their images."""
    without = make(list_folder(photos), tmp_path / "without", validation_fraction=fraction)
    (photos / "bird").mkdir()
    for name in ("a", "b", "c"):
        (photos / "bird" / f"{name}.jpg").write_text("no image")
    made = make(list_folder(photos), tmp_path / "out", validation_fraction=fraction, skip_bad=True)
    assert made.splits == without.splits
    assert made.splits["train"].class_names == ["china", "flower"]
    counted, *faults = made.left_out
    num_held_out = {0.0: 0, 0.5: 2, 0.9: 2}[fraction]
    held_out = f", nor are its {num_held_out} validation images" * bool(num_held_out)
    assert counted == (
        f"class bird: none of its {3 - num_held_out} training images can be used, so it is no class{held_out}"
    )
    assert len(faults) == 3 - num_held_out
    assert all(fault.startswith("bird/") for fault in faults)
    for path in photos.rglob("*.*"):
        path.write_text("no image")
    with pytest.raises(DataError, match=r"no training image is readable; check the source. The first fault: bird/"):
        make(list_folder(photos), tmp_path / "none", validation_fraction=fraction, skip_bad=True)


def test_a_single_image_of_a_class_is_for_training(tmp_path: Path, photos: Path) -> None:
    (photos / "bird").mkdir()
    Image.new("RGB", (8, 8)).save(photos / "bird" / "one.png")
    made = make(list_folder(photos), tmp_path / "out", validation_fraction=0.9)
    assert (made.splits["train"].class_counts[0], made.splits["validation"].class_counts[0]) == (1, 0)
    assert made.notes == []


def test_classes_without_training_images_are_noted(tmp_path: Path, photos: Path) -> None:
    """Numbers stay as they are, so that sets that were made one by one have the same classes."""
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"{path},2\n" for path in photos.glob("china/*.jpg")))
    made = make(list_source(str(tmp_path / "t.csv")), tmp_path / "out")
    assert made.splits["train"].class_names == ["0", "1", "2"]
    assert made.notes == ["2 classes without training images: 0, 1"]


def test_unreadable_files_of_both_splits_are_reported(tmp_path: Path, photos: Path) -> None:
    for path in (photos / "china").rglob("*.*"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="8 unreadable files") as caught:
        make(list_folder(photos), tmp_path / "out", validation_fraction=0.5)
    named = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert len(named) == 6  # the first five, and an ellipsis
    assert named[-1] == "  ..."
    made = make(list_folder(photos), tmp_path / "out", validation_fraction=0.5, skip_bad=True)
    assert len(made.left_out) == 1 + 4  # the class, and why each of its training images cannot be used
    assert made.splits["train"].class_names == ["flower"]
    assert sorted(made.splits) == ["train", "validation"]


def test_shards_have_the_requested_size_and_the_seed_selects_the_split(tmp_path: Path) -> None:
    source = list_digits()
    make(source, tmp_path / "out", shard_bytes=100_000)
    for name in ("train", "validation"):
        shards = DatasetInfo.load(tmp_path / "out" / name).shards
        assert len(shards) > 2
        assert all(85_000 < shard.num_bytes < 105_000 for shard in shards)
    draws = [{*split(source, 0.2, seed)[1]} for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_existing_output_and_empty_source_are_refused(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="already exists; choose another folder"):
        make(list_folder(photos), tmp_path / "out")
    with pytest.raises(DataError, match="no images"):
        make(list_digits().take([]), tmp_path / "none")


def test_interrupted_call_leaves_no_output_and_can_be_repeated(tmp_path: Path, photos: Path) -> None:
    class StopError(Exception):
        pass

    def stop(_: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        make(list_folder(photos), tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    assert make(list_folder(photos), tmp_path / "out").splits


def test_split_holds_out_at_least_one_of_each_class() -> None:
    source = list_digits()
    train, held_out = split(source, 0.001, seed=0)
    assert sorted(source.labels[held_out]) == list(range(10))
    assert len(held_out) == 10
    assert len(train) + len(held_out) == len(source)
    assert not {*train} & {*held_out}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize("validation", [0.0, 0.3])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, photos: Path, validation: float) -> None:
    options = ShardOptions(validation_fraction=validation, shard_bytes=20_000, encoding=Encoding(shorter_side=40))
    outs = [tmp_path / name for name in ("one", "two", "five")]
    for out, num_workers in zip(outs, (1, 2, 5), strict=True):
        done: list[int] = []
        executor = partial(run_tasks, num_workers=num_workers)
        make_shards(list_folder(photos), out, options, executor=executor, progress=done.append)
        assert sum(done) == len(list_folder(photos))
        assert not out.with_name(out.name + ".partial").exists()
    one, *others = map(files, outs)
    assert len(one) > 6
    assert all(other == one for other in others)


def test_interrupted_call_continues_and_gives_the_same_bytes(tmp_path: Path) -> None:
    """Interrupted at every task with partial files left behind, it writes the same bytes and no shard twice."""
    source, options = list_digits(), ShardOptions(shard_bytes=500_000)
    make_shards(source, tmp_path / "whole", options)
    whole = files(tmp_path / "whole")
    written: list[str] = []

    def executor(
        work: Callable[[ShardTask], WrittenShard], tasks: Iterable[ShardTask]
    ) -> Generator[WrittenShard, None, None]:
        for number, task in enumerate(tasks):
            if number == 1:
                task.tar.with_name(task.tar.name + ".partial").write_bytes(b"half")
                raise KeyboardInterrupt
            written.append(task.tar.name)
            yield work(task)

    for _ in range(100):
        done: list[int] = []
        try:
            make_shards(source, tmp_path / "out", options, executor=executor, progress=done.append)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out").exists()
    assert len(written) == len([name for name in whole if name.endswith(".tar")])
    assert sum(done) == len(source)
    assert files(tmp_path / "out") == whole


def test_shards_truncated_by_a_power_failure_are_written_again(tmp_path: Path) -> None:
    source, options = list_digits(), ShardOptions(validation_fraction=0.0, shard_bytes=1_000_000)

    def stop_late(
        work: Callable[[ShardTask], WrittenShard], tasks: Iterable[ShardTask]
    ) -> Generator[WrittenShard, None, None]:
        yield from islice(map(work, tasks), 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards(source, tmp_path / "out", options, executor=stop_late)
    begun = tmp_path / "out.partial"
    (begun / "out" / "train" / "shard-000000.tar").write_bytes(b"")
    (begun / "done" / "train-000001.json").write_bytes(b"")
    make_shards(source, tmp_path / "out", options)
    make_shards(source, tmp_path / "whole", options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_repaired_source_continues(tmp_path: Path, photos: Path) -> None:
    path = photos / "china" / "crop.1.jpg"
    good = path.read_bytes()
    path.write_bytes(b"x" * len(good))
    options = ShardOptions(shard_bytes=20_000)
    with pytest.raises(DataError, match="1 unreadable file"):
        make_shards(list_folder(photos), tmp_path / "out", options)
    path.write_bytes(good)
    made = make_shards(list_folder(photos), tmp_path / "out", options)
    assert sum(info.num_samples for info in made.splits.values()) == len(list_folder(photos))


def test_skipped_images_are_listed_in_a_file(tmp_path: Path, photos: Path) -> None:
    for path in photos.glob("china/*.jpg"):
        path.write_bytes(b"no image")
    make_shards(list_folder(photos), tmp_path / "out", ShardOptions(), skip_bad=True)
    lines = (tmp_path / "out" / "left_out.txt").read_text().splitlines()
    assert sorted(lines) == [f"china/crop.{i}.jpg: not an image of a known format" for i in range(6)]


def test_working_folder_with_other_content_is_refused(tmp_path: Path, photos: Path) -> None:
    begun = tmp_path / "out.partial"

    def stop(
        work: Callable[[ShardTask], WrittenShard], tasks: Iterable[ShardTask]
    ) -> Generator[WrittenShard, None, None]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        make_shards(list_folder(photos), tmp_path / "out", ShardOptions(), executor=stop)
    with pytest.raises(DataError, match="was started with other images or options; remove it to start again"):
        make_shards(list_folder(photos), tmp_path / "out", ShardOptions(seed=1))
    (photos / "china" / "crop.1.jpg").unlink()
    with pytest.raises(DataError, match="was started with other images"):
        make_shards(list_folder(photos), tmp_path / "out", ShardOptions())
    with (begun / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another command is writing to this folder"):
            make_shards(list_folder(photos), tmp_path / "out", ShardOptions())
    (begun / "thesis.docx").touch()
    with pytest.raises(DataError, match="contains other files; move them away"):
        make_shards(list_folder(photos), tmp_path / "out", ShardOptions())
    assert (begun / "thesis.docx").exists()


def test_shards_of_resized_images_have_the_requested_size(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    pixels = load_sample_image("china.jpg")
    for i in range(60):
        Image.fromarray(pixels[: 300 + i, : 400 + i]).save(tmp_path / "in" / "a" / f"{i}.png")
    options = ShardOptions(
        validation_fraction=0.0, shard_bytes=100_000, encoding=Encoding(shorter_side=64, format="jpg")
    )
    made = make_shards(list_folder(tmp_path / "in"), tmp_path / "out", options)
    sizes = [shard.num_bytes for shard in made.splits["train"].shards]
    assert len(sizes) > 2
    assert all(60_000 < size < 110_000 for size in sizes)
    sample = open_dataset(tmp_path / "out" / "train").fetch(0, 0)
    assert sample.data.startswith(b"\xff\xd8")
    assert min(Image.open(io.BytesIO(sample.data)).size) == 64


def test_sizes_cannot_be_estimated_without_a_usable_image(tmp_path: Path, photos: Path) -> None:
    for path in photos.rglob("*.*"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of 16 sampled images can be used; .* The first error: .*not an image"):
        make(list_folder(photos), tmp_path / "out", encoding=Encoding(shorter_side=40))


def test_unlabeled_images_at_any_depth_are_found(tmp_path: Path, photos: Path) -> None:
    Image.new("RGB", (8, 8)).save(photos / "stray.png")
    source = list_folder(photos, labeled=False)
    assert not source.problems
    made = make_shards(source, tmp_path / "out", ShardOptions())
    assert made.splits["train"].class_names == []
    assert made.splits["validation"].num_samples == round(0.1 * len(source))
    extensions = set()
    for tar in (tmp_path / "out").rglob("*.tar"):
        with tarfile.open(tar) as archive:
            extensions |= {name.partition(".")[2] for name in archive.getnames()}
    assert extensions == {"jpg", "png", "json"}


@pytest.mark.processes
def test_ray_writes_the_same_bytes(tmp_path: Path, photos: Path) -> None:
    options = ShardOptions(shard_bytes=20_000)
    make_shards(list_folder(photos), tmp_path / "local", options)
    make_shards(list_folder(photos), tmp_path / "ray", options, executor=run_tasks_on_ray)
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    source = list_folder(photos)
    (photos / "china" / "crop.1.jpg").unlink()
    with pytest.raises(DataError, match="1 unreadable file"):
        make_shards(source, tmp_path / "gone", options, executor=run_tasks_on_ray)
