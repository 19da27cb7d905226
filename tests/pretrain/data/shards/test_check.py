"""The check finds every fault of a shard set; for comparison, the faults that webdataset notices."""

import hashlib
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.damage import DAMAGES, webdataset_images
from benchmarks.unreliable_server import UnreliableServer, serve
from pretrain.data.shards.check import Finding, check_set
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.shards.scan import index_shards
from pretrain.data.shards.tasks import run_tasks
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes
from pretrain.data.storage.index import DatasetInfo, ShardIndex
from pretrain.errors import DataError
from tests.support.launching import Vitrail

FAULTS = 300


@pytest.fixture
def folder(digits: Path, tmp_path: Path) -> Path:
    shutil.copytree(digits / "validation", tmp_path / "set")
    return tmp_path / "set"


def check(folder: Path, num_workers: int = 1) -> list[Finding]:
    return list(check_set(str(folder), executor=partial(run_tasks, num_workers=num_workers)))


def edit_index(folder: Path, change: Callable[[ShardIndex], None]) -> None:
    """Change an index as a bug would: all checksums match."""
    info = DatasetInfo.load(folder)
    path = folder / "shard-000000.index.json"
    index = ShardIndex.parse(path.read_bytes(), path, info.shards[0].index_sha256)
    change(index)
    info.shards[0] = index.save(folder)
    info.save(folder)


def test_intact_set_has_no_findings(folder: Path) -> None:
    assert check(folder) == check(folder, num_workers=2) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda index: index.crc32.__setitem__(3, 7), "its checksum is wrong"),
        (lambda index: index.size.__setitem__(3, 7), "bytes, but the index says 7"),
        (lambda index: index.offset.__setitem__(3, 7), "the tar has no member at the offset in the index"),
        (lambda index: index.width.__setitem__(3, 7), "is 32 x 32 pixels, but the index says 7 x 32"),
        (lambda index: index.label.__setitem__(3, 7), "label 7 is out of range because there are 3 classes"),
        (lambda index: index.key.__setitem__(3, index.key[4]), "the same key is in shard-000000.tar"),
    ],
)
def test_index_that_disagrees_with_the_tar_is_found(
    folder: Path, change: Callable[[ShardIndex], None], expected: str
) -> None:
    edit_index(folder, change)
    [finding] = [finding for finding in check(folder) if expected in finding.reason]
    assert finding.file == "shard-000000.tar"
    assert finding.key is not None


def test_damaged_header_does_not_hide_later_faults(folder: Path) -> None:
    info = DatasetInfo.load(folder)
    tar = folder / "shard-000000.tar"
    index = ShardIndex.parse((folder / "shard-000000.index.json").read_bytes(), "", info.shards[0].index_sha256)
    data = bytearray(tar.read_bytes())
    data[index.offset[2] - 512] ^= 0x55  # the third image's header
    data[index.offset[5] + 10] ^= 0x55  # the sixth image
    tar.write_bytes(data)
    findings = check(folder)
    assert [finding.key for finding in findings] == [None, index.key[5]]
    assert "damaged header at byte" in findings[0].reason


def test_every_fault_is_found(tmp_path: Path) -> None:
    source = keep_classes(list_digits(), ["0", "1"])
    source = source.take(range(0, len(source), 30))
    make_shards(source, tmp_path / "made", ShardOptions(validation_fraction=0.0, shard_bytes=3_000, seed=0))
    whole = tmp_path / "made" / "train"
    files, images = sorted(whole.iterdir()), webdataset_images(whole)
    assert images
    chance, silent, tried = random.Random(0), 0, 0
    for number in range(FAULTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in files:
            (folder / path.name).hardlink_to(path)
        victim = folder / chance.choice(files).name
        before = victim.read_bytes()
        after = DAMAGES[chance.choice(list(DAMAGES))](before, chance)
        victim.unlink()
        if after is not None:
            victim.write_bytes(after)
        assert bool(check(folder)) == (after != before), victim
        if victim.suffix == ".tar" and after != before:
            tried += 1
            silent += webdataset_images(folder) not in (None, images)
    print(f"webdataset did not notice {silent} of {tried} damaged tars")
    assert silent > 0


def test_every_flipped_bit_of_dataset_json_is_found(folder: Path) -> None:
    """A flip that does not change the content, such as the case of a letter in a JSON escape, is no fault."""
    path = folder / "dataset.json"
    whole, info = path.read_bytes(), DatasetInfo.load(folder)
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        try:
            read = DatasetInfo.parse(bytes(data), path)
        except DataError:
            continue
        assert read == info, bit


def test_missing_sample_is_found_although_all_checksums_match(folder: Path) -> None:
    """Tar, index and dataset.json agree, but an image is missing from the index and the class counts are wrong."""
    edit_index(folder, lambda index: [column.pop(3) for column in vars(index).values() if isinstance(column, list)])
    info = DatasetInfo.load(folder)
    findings = check(folder)
    assert findings[0].reason == "is in the tar but not in the index"
    assert findings[1].reason.startswith(f"lists {info.class_counts} samples per class, but there are ")


def test_damaged_index_does_not_hide_a_broken_image(folder: Path) -> None:
    index = folder / "shard-000000.index.json"
    content = json.loads(index.read_text())
    tar = folder / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[content["offset"][3] : content["offset"][3] + 8] = b"no image"
    tar.write_bytes(data)
    index.write_text("{")
    reasons = {finding.key: finding.reason for finding in check(folder)}
    assert reasons[content["key"][3]].startswith("not a usable image")
    assert len(reasons) == 2


def test_damaged_dataset_json_does_not_hide_a_missing_shard(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(digits / "train", folder)
    (folder / "dataset.json").write_bytes((folder / "dataset.json").read_bytes()[:100])
    (folder / "shard-000002.tar").unlink()
    first, second = check(folder)
    assert (first.file, second.file) == ("dataset.json", "shard-000002.tar")
    assert second.reason == "cannot be read: No such file or directory"


def test_remote_tars_are_checked(digits: Path, tmp_path: Path) -> None:
    with serve(UnreliableServer(digits / "validation")) as server:
        info = DatasetInfo.load(digits / "validation")
        index = ShardIndex.parse(
            (digits / "validation" / "shard-000000.index.json").read_bytes(), "", info.shards[0].index_sha256
        )
        index.name = f"{server.url}/shard-000000.tar"
        counts = [index.label.count(label) for label in range(3)]
        DatasetInfo(info.class_names, counts, [index.save(tmp_path)]).save(tmp_path)
        assert check(tmp_path) == []
        edit = DatasetInfo.load(tmp_path).shards[0]
        assert edit.sha256 == hashlib.sha256((digits / "validation" / "shard-000000.tar").read_bytes()).hexdigest()
        server.folder = tmp_path
        [finding] = check(tmp_path)
        assert finding.reason == "does not exist"


def test_command_lists_faults_and_exits_with_1(folder: Path, vitrail: Vitrail) -> None:
    sound = vitrail("shards", "check", folder)
    assert (sound.code, "no faults" in sound.out) == (0, True)
    tar = folder / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    (folder / "notes.txt").write_text("stray")
    broken = vitrail("shards", "check", folder, "--json")
    assert broken.code == 1
    assert json.loads(broken.out.splitlines()[0])["file"] == "shard-000000.tar"
    assert "notes.txt: does not belong to any shard" in broken.err
    assert f"{folder}: {len(broken.out.splitlines())} faults" in broken.err
    (folder / "dataset.json").write_text("{")
    torn = vitrail("shards", "check", folder)
    assert torn.code == 1
    assert "dataset.json  damaged" in torn.out
    assert "shard-000000.tar  truncated" in torn.out
    shutil.rmtree(folder)
    folder.mkdir()
    nothing = vitrail("shards", "check", folder)
    assert nothing.code == 2
    assert "dataset.json: does not exist; `vitrail shards make` writes it for new shards" in nothing.err


def test_hidden_members_are_no_samples(tmp_path: Path) -> None:
    """A Mac's tar has a second member for each file, which no index lists."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("x.png", png_bytes()), ("x.cls", b"0"), ("deep/._x.png", b"\0\5\26\7")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    index_shards(["a.tar"], tmp_path)
    assert check(tmp_path) == []


def png_bytes() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()
