"""Tars of another tool are indexed at their first use, once, wherever the index can be written."""

import errno
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.open import open_dataset
from pretrain.data.shards import first_use
from pretrain.data.shards.first_use import LOCK_FILE, index_tars, tars_without_index
from pretrain.data.shards.scan import index_shards
from pretrain.data.storage.cache import Cache
from pretrain.data.storage.index import DATASET_FILE
from pretrain.data.storage.remote import FetchPolicy
from pretrain.data.storage.tar_set import TarSet, local_tar_sets
from pretrain.errors import BadSampleError, DataError
from tests.support.launching import Vitrail

NUM_TARS, SAMPLES_PER_TAR = 3, 4


def write_tars(folder: Path, label: Callable[[int], dict[str, Any]]) -> Path:
    """Write tars with webdataset's own writer; `label` returns the other members of a sample."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_TARS):
        with webdataset.TarWriter(str(folder / f"part-{number}.tar")) as writer:
            for row in range(SAMPLES_PER_TAR):
                i = number * SAMPLES_PER_TAR + row
                image = Image.new("RGB", (40 + i, 30), (20 * i, 0, 0))
                writer.write({"__key__": f"photo{i:03d}", "png": image, **label(i)})
    return folder


def labeled_by_cls(i: int) -> dict[str, Any]:
    return {"cls": i % 3}


def labeled_by_json(i: int) -> dict[str, Any]:
    return {"json": {"label": i % 3, "class": ["ibis", "heron", "stork"][i % 3]}, "txt": f"caption {i}"}


def unlabeled(i: int) -> dict[str, Any]:
    return {"txt": f"caption {i}"}


def index_new(path: Path, cache_dir: Path, *, labels_required: bool = True) -> list[str]:
    """Index tars if they have no index; return the notes."""
    sets = tars_without_index([path], cache_dir)
    return [note for tars in sets for note in index_tars(tars, cache_dir, labels_required=labels_required)]


def whole(folder: Path) -> TarSet:
    [tars] = local_tar_sets(str(folder))
    return tars


def opened(folder: Path, cache_dir: Path) -> Dataset:
    return open_dataset(folder, cache=Cache(cache_dir, 10**9, FetchPolicy()))


def labels_of(dataset: Dataset) -> list[int]:
    return [dataset.read(shard, row).label for shard, size in enumerate(dataset.shard_sizes) for row in range(size)]


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Make a folder look read-only: permission bits do not stop root, so creating a file fails by itself."""

    def protect(folder: Path) -> Path:
        create = tempfile.NamedTemporaryFile

        def refuse(*arguments: Any, **options: Any) -> Any:
            if Path(options["dir"]) == folder:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))
            return create(*arguments, **options)

        monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
        return folder

    return protect


@pytest.mark.parametrize(
    ("label", "class_names"), [(labeled_by_cls, ["0", "1", "2"]), (labeled_by_json, ["ibis", "heron", "stork"])]
)
def test_tars_of_another_tool_can_be_read_at_once(
    tmp_path: Path, label: Callable[[int], dict[str, Any]], class_names: list[str]
) -> None:
    folder = write_tars(tmp_path / "tars", label)
    first, *others = index_new(folder, tmp_path / "cache")
    assert first == f"{folder}: indexed 12 samples in 3 classes in 3 tars"
    assert others == ([f"{folder}: 12 members .txt, ignored"] if label is labeled_by_json else [])
    dataset = opened(folder, tmp_path / "cache")
    assert dataset.class_names == class_names
    assert labels_of(dataset) == [i % 3 for i in range(12)]
    assert dataset.read(1, 2).image.shape == (30, 46, 3)
    assert not (tmp_path / "cache").exists()


def test_index_equals_that_of_the_command(tmp_path: Path) -> None:
    ours, theirs = (write_tars(tmp_path / name, labeled_by_json) for name in ("ours", "theirs"))
    for tar in ours.iterdir():
        (theirs / tar.name).write_bytes(tar.read_bytes())  # webdataset writes the time into the tar
    index_new(ours, tmp_path / "cache")
    index_shards([tar.name for tar in sorted(theirs.glob("*.tar"))], theirs)
    files = sorted(path.name for path in ours.iterdir())
    assert files == sorted(path.name for path in theirs.iterdir())
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in files)


def test_second_use_does_not_index_again(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", labeled_by_cls)
    index_new(folder, tmp_path / "cache")
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert index_new(folder, tmp_path / "cache") == []
    assert index_tars(whole(folder), tmp_path / "cache", labels_required=True) == []
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_index_of_a_read_only_folder_is_in_the_cache(tmp_path: Path, read_only: Callable[[Path], Path]) -> None:
    writable = write_tars(tmp_path / "writable", labeled_by_cls)
    folder = tmp_path / "tars"
    folder.mkdir()
    for tar in writable.iterdir():
        (folder / tar.name).write_bytes(tar.read_bytes())
    read_only(folder)
    cache_dir = tmp_path / "cache"
    [note] = index_new(folder, cache_dir)
    index = whole(folder).cached_index(cache_dir)
    assert note.endswith(f"; the folder is read-only, so the index is in {index}")
    assert sorted(path.name for path in folder.iterdir()) == [f"part-{number}.tar" for number in range(NUM_TARS)]
    assert index_new(folder, cache_dir) == []
    dataset = opened(folder, cache_dir)
    assert labels_of(dataset) == [i % 3 for i in range(12)]
    index_new(writable, cache_dir)
    assert dataset.digest == opened(writable, cache_dir).digest  # the order does not depend on where the index is
    with pytest.raises(DataError, match=r"the tars have no index; run `vitrail shards index"):
        open_dataset(folder)  # without a cache folder


def test_tars_that_a_path_names_are_a_set_of_their_own(tmp_path: Path) -> None:
    folder, cache_dir = write_tars(tmp_path / "tars", labeled_by_cls), tmp_path / "cache"
    (folder / "validation-0.tar").write_bytes((folder / "part-2.tar").read_bytes())
    training, validation = folder / "part-{0..1}.tar", folder / "validation-0.tar"
    [note] = index_new(training, cache_dir)
    assert note.startswith(f"{folder}: indexed 8 samples in 3 classes in 2 tars; the index of this part of the folder")
    assert " in 3 classes in 1 tar; " in index_new(validation, cache_dir)[0]
    assert labels_of(opened(training, cache_dir)) == [i % 3 for i in range(8)]
    assert labels_of(opened(validation, cache_dir)) == [i % 3 for i in range(8, 12)]
    assert index_new(training, cache_dir) == index_new(validation, cache_dir) == []
    assert not (folder / DATASET_FILE).exists()


def test_faults_of_named_tars(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", labeled_by_cls)
    with pytest.raises(DataError, match=r"part-3\.tar: no such tar; correct the path .*\{0\.\.3\}\.tar"):
        index_new(folder / "part-{0..3}.tar", tmp_path / "cache")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "part-0.tar").touch()
    with pytest.raises(DataError, match="names tars in several folders; give one path for each folder, as a list"):
        index_new(tmp_path / "{tars,more}" / "part-0.tar", tmp_path / "cache")
    with pytest.raises(DataError, match=r"tars: the tars have no index"):
        open_dataset(folder / "part-0.tar")


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_read_only_mount_is_noticed(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", labeled_by_cls)
    if os.system(f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}"):
        pytest.skip("this machine cannot mount a file system")
    try:
        [note] = index_new(folder, tmp_path / "cache")
        assert "the folder is read-only" in note
        assert sum(opened(folder, tmp_path / "cache").shard_sizes) == 12
    finally:
        os.system(f"umount {folder}")


def test_cached_index_of_changed_tars_is_not_used(tmp_path: Path, read_only: Callable[[Path], Path]) -> None:
    folder, cache_dir = read_only(write_tars(tmp_path / "tars", labeled_by_cls)), tmp_path / "cache"
    index_new(folder, cache_dir)
    with webdataset.TarWriter(str(folder / "part-3.tar")) as writer:
        writer.write({"__key__": "new", "png": Image.new("RGB", (8, 8)), "cls": 1})
    [note] = index_new(folder, cache_dir)
    assert "indexed 13 samples" in note
    assert sum(opened(folder, cache_dir).shard_sizes) == 13


def test_cache_that_cannot_be_written_is_reported(tmp_path: Path, read_only: Callable[[Path], Path]) -> None:
    folder = read_only(write_tars(tmp_path / "tars", labeled_by_cls))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        DataError,
        match=r"tars: the index of its tars cannot be stored: .*cannot be created .*; set data\.cache_dir "
        r"to a folder that you can write to, or use `vitrail shards index TARS --out FOLDER`, and name FOLDER in the",
    ):
        index_new(folder, tmp_path / "cache")


def test_faults_of_read_only_tars_name_a_command_that_can_index_them(
    tmp_path: Path, read_only: Callable[[Path], Path]
) -> None:
    folder = read_only(write_tars(tmp_path / "tars", unlabeled))
    with pytest.raises(
        DataError,
        match=r"(?s)12 samples or tars that cannot be used.*repair them, or leave them out with `vitrail shards index "
        r"TARS --out FOLDER --skip-bad`, and name FOLDER in the config",
    ):
        index_new(folder, tmp_path / "cache")


def test_images_and_tars_of_subfolders_are_not_lost(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", labeled_by_cls)
    write_tars(folder / "more", labeled_by_cls)
    (folder / "notes").mkdir()
    (folder / "notes" / "read.me").touch()
    with pytest.raises(
        DataError,
        match=rf"{folder}: 1 image, archive or folder beside the tars: more/; move them away, or use `vitrail shards "
        rf"index {folder} --skip-bad`",
    ):
        index_new(folder, tmp_path / "cache")


def test_one_sample_without_label_does_not_take_the_labels_of_all(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", lambda i: labeled_by_cls(i) if i else {})
    with pytest.raises(DataError, match=r"1 sample or tar that cannot be used: .*photo000 has no label"):
        index_new(folder, tmp_path / "cache", labels_required=False)


def test_damaged_tar_is_reported_as_by_the_command(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", labeled_by_cls)
    tar = folder / "part-1.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(DataError) as ours:
        index_new(folder, tmp_path / "cache")
    with pytest.raises(DataError) as theirs:
        index_shards([path.name for path in sorted(folder.glob("*.tar"))], folder)
    faults, _, way_out = str(ours.value).partition("\n")
    assert faults == str(theirs.value).partition("\n")[0]
    assert faults.startswith(f"1 sample or tar that cannot be used: {tar}: not a readable tar")
    assert way_out == f"repair them, or leave them out with `vitrail shards index {folder} --skip-bad`"
    assert not (folder / DATASET_FILE).exists()
    assert not (folder / LOCK_FILE).exists()
    tar.write_bytes(write_tars(tmp_path / "again", labeled_by_cls).joinpath("part-1.tar").read_bytes())
    assert index_new(folder, tmp_path / "cache")  # the next attempt succeeds


def test_tar_changed_after_indexing_is_reported(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", labeled_by_cls)
    index_new(folder, tmp_path / "cache")
    tar = folder / "part-0.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"IDAT") + 10] ^= 0x55  # in the first image
    tar.write_bytes(data)
    assert index_new(folder, tmp_path / "cache") == []
    with pytest.raises(BadSampleError, match=r"part-0\.tar: sample photo000: damaged"):
        opened(folder, tmp_path / "cache").fetch(0, 0)


def test_labels_are_read_if_required_or_present(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "unlabeled", unlabeled)
    with pytest.raises(DataError, match=r"sample photo000 has no label.*pass --unlabeled to `vitrail shards`"):
        index_new(folder, tmp_path / "cache", labels_required=True)
    first, *_ = index_new(folder, tmp_path / "cache", labels_required=False)
    assert first == f"{folder}: indexed 12 samples without labels in 3 tars"
    assert opened(folder, tmp_path / "cache").class_names == []
    for name, label in (("cls", labeled_by_cls), ("json", labeled_by_json)):
        index_new(write_tars(tmp_path / name, label), tmp_path / "cache", labels_required=False)
        assert len(opened(tmp_path / name, tmp_path / "cache").class_names) == 3


def test_only_local_folders_of_tars_need_an_index(tmp_path: Path) -> None:
    folders = [write_tars(tmp_path / name, labeled_by_cls) for name in ("a", "b")]
    (tmp_path / "images" / "cat").mkdir(parents=True)
    paths = [f"{tmp_path}/{{a,b}}", folders[0], "s3://bucket/train", tmp_path / "images", tmp_path / "missing"]
    assert [tars.folder for tars in tars_without_index(paths, tmp_path / "cache")] == folders


def test_progress_counts_the_tars(tmp_path: Path) -> None:
    folder, calls = write_tars(tmp_path / "tars", labeled_by_cls), list[tuple[int, int]]()
    index_tars(whole(folder), tmp_path / "cache", labels_required=True, progress=lambda *call: calls.append(call))
    assert calls[0] == (0, NUM_TARS)
    assert [call for call in calls if call[0]] == [(1, NUM_TARS)] * NUM_TARS


def index_slowly(folder: Path, cache_dir: Path, started: Path, notes: "multiprocessing.Queue[list[str]]") -> None:
    def wait(done: int, total: int) -> None:
        started.touch()
        time.sleep(0.2)

    notes.put(index_tars(whole(folder), cache_dir, labels_required=True, progress=wait))


@pytest.mark.processes
def test_two_processes_index_a_folder_once(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", labeled_by_cls)
    context = multiprocessing.get_context("fork")
    notes: multiprocessing.Queue[list[str]] = context.Queue()
    processes = []
    try:
        for number in range(2):
            started = tmp_path / f"started-{number}"
            processes.append(context.Process(target=index_slowly, args=(folder, tmp_path / "cache", started, notes)))
            processes[-1].start()
            _wait(started.exists)
        results = [notes.get(timeout=600) for _ in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert sorted(map(len, results)) == [0, 1]  # one has indexed, the other has waited
    assert labels_of(opened(folder, tmp_path / "cache")) == [i % 3 for i in range(12)]
    assert not (folder / LOCK_FILE).exists()


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", labeled_by_cls)
    (folder / LOCK_FILE).touch()
    (folder / "part-0.index.json.partial").write_text("half")
    assert index_new(folder, tmp_path / "cache")
    assert sorted(path.suffix for path in folder.iterdir()) == [".json"] * (NUM_TARS + 1) + [".tar"] * NUM_TARS


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the cache folder below tmp_path."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("home")
def test_statistics_of_new_tars(tmp_path: Path, vitrail: Vitrail) -> None:
    folder = write_tars(tmp_path / "tars", labeled_by_json)
    done = vitrail("shards", "stats", folder)
    assert done.code == 0, done.err
    assert f"{folder}: indexed 12 samples in 3 classes in 3 tars" in done.err
    assert "3/3" in done.err  # the progress bar
    assert "samples                       12" in done.out
    again = vitrail("shards", "stats", folder)
    assert (again.out, "indexed" in again.err) == (done.out, False)


@pytest.mark.usefixtures("home")
def test_an_index_in_the_cache_folder_is_found_by_check(tmp_path: Path, vitrail: Vitrail) -> None:
    part = write_tars(tmp_path / "tars", labeled_by_cls) / "part-{0..1}.tar"
    answers = [vitrail("shards", verb, part) for verb in ("stats", "check")]
    assert [answer.code for answer in answers] == [0, 0], [answer.err for answer in answers]
    assert answers[1].out == f"{part}: 8 images in 3 classes, 2 shards, 0.0 MB, no faults\n"
    damaged = tmp_path / "tars" / "part-1.tar"
    times = damaged.stat()
    data = bytearray(damaged.read_bytes())
    data[data.index(b"IDAT") + 10] ^= 0x55
    damaged.write_bytes(data)
    os.utime(damaged, ns=(times.st_atime_ns, times.st_mtime_ns))  # otherwise the tars count as new ones
    broken = vitrail("shards", "check", part)
    assert broken.code == 1
    assert "part-1.tar  photo004  its checksum is wrong" in broken.out


def _wait(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_other_errors_of_the_folder_are_not_taken_for_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tars(tmp_path / "tars", labeled_by_cls)

    def fail(**_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(first_use.tempfile, "NamedTemporaryFile", fail)
    with pytest.raises(OSError, match="No space left on device"):
        index_new(folder, tmp_path / "cache")
