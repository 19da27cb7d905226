"""Tars of other tools are indexed as webdataset reads them, and no part of one is lost silently."""

import contextlib
import hashlib
import io
import json
import tarfile
from functools import partial
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from benchmarks.unreliable_server import UnreliableServer, serve
from pretrain.data.dataset.open import open_dataset
from pretrain.data.shards.check import check_set
from pretrain.data.shards.scan import IndexedShards
from pretrain.data.shards.scan import index_shards as index_tars
from pretrain.data.shards.tasks import run_tasks
from pretrain.errors import DataError


def index_shards(
    tars: list[Path], class_names: list[str] | None = None, label_key: str | None = "label"
) -> IndexedShards:
    return index_tars([tar.name for tar in tars], tars[0].parent, class_names, label_key)


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, label: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(label)), (f"{key}.cls", str(label).encode())]


def test_tars_from_webdatasets_writer_are_indexed(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(5):
            content = {"__key__": f"n{i}", "png": Image.new("RGB", (9, 7), (i, 0, 0)), "json": {"label": i % 3}}
            writer.write({**content, "caption.txt": "a photo"})
    indexed = index_shards([tmp_path / "a.tar"])
    assert indexed.info.class_counts == [2, 2, 1]
    assert indexed.notes == ["5 members .caption.txt, ignored"]
    samples = open_dataset(tmp_path)
    assert [samples.read(0, row).label for row in range(5)] == [0, 1, 2, 0, 1]
    assert samples.read(0, 4).image[0, 0].tolist() == [4, 0, 0]


def test_indexing_our_shards_gives_the_same_files(digits: Path, tmp_path: Path) -> None:
    tars = sorted((digits / "train").glob("*.tar"))
    for tar in tars:
        (tmp_path / tar.name).write_bytes(tar.read_bytes())
    index_shards([tmp_path / tar.name for tar in tars])
    for path in (digits / "train").glob("*.json"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_class_names_come_from_a_list_or_the_labels(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", sample("x", 0) + sample("y", 1))
    assert index_shards([tar]).info.class_names == ["0", "1"]
    indexed = index_shards([tar], ["cat", "dog", "owl"])
    assert indexed.info.class_names == ["cat", "dog", "owl"]
    assert indexed.notes == ["1 class without samples: owl"]
    with pytest.raises(DataError, match="label 1 is out of range because there are 1 class names"):
        index_shards([tar], ["cat"])


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (sample("x", 0) + sample("y", 1) + sample("x", 0), "the key x is also in|has two members"),
        ([("x.png", png(0)), ("x.png", png(1))], "sample x has two members .png"),
        ([("x.cls", b"1")], "sample x has no images among .cls"),
        ([("x.png", png(0)), ("x.jpg", png(0)), ("x.cls", b"1")], "sample x has 2 images"),
        ([("x.png", png(0))], "sample x has no label"),
        ([("x.png", png(0)), ("x.cls", b"cat")], "sample x has no label.*got 'cat'"),
        ([("x.png", png(0)), ("x.cls", b"\xff")], "sample x has no label"),
        ([("x.png", png(0)[:30]), ("x.cls", b"1")], "sample x is not a usable image"),
        ([("readme", b"no key")], "the tars contain no usable samples"),
        ([("x.png", png(0)), ("x.cls", b"-1")], "sample x has the label -1"),
        ([("x.png", png(0)), ("x.json", b"{")], "sample x has invalid JSON"),
    ],
)
def test_unusable_samples_are_refused(tmp_path: Path, members: list[tuple[str, bytes]], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        index_shards([write_tar(tmp_path / "a.tar", members)])
    assert not (tmp_path / "dataset.json").exists()


def test_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{name}.tar", sample("x", 0)) for name in "ab"]
    with pytest.raises(DataError, match=r"the key x is also in a\.tar"):
        index_shards(tars)


def test_all_faults_are_found_at_once_and_can_be_left_out(tmp_path: Path) -> None:
    """A tar from the web: samples without a label or an image, a cut image, a key that is taken, a cut tar."""
    bad = [("1.png", png(9)), ("2.json", b"{}"), ("2.cls", b"0"), ("3.png", png(9)[:40]), ("3.cls", b"0")]
    twice = [("5.png", png(1)), ("5.png", png(2)), ("5.cls", b"1")]
    a = write_tar(tmp_path / "a.tar", [*sample("0", 0), *bad, *sample("4", 1), *twice, *sample("6", 0)])
    b = write_tar(tmp_path / "b.tar", [*sample("7", 1), *sample("0", 2), *sample("8", 0), *sample("9", 0)])
    b.write_bytes(b.read_bytes()[: 6 * 1024 + 700])
    tars = ["a.tar", "b.tar", "c.tar"]
    with pytest.raises(DataError) as refused:
        index_tars(tars, tmp_path)
    counted, way_out = str(refused.value).splitlines()
    assert counted.startswith("7 samples or tars that cannot be used: ")
    assert way_out == "repair them, or leave them out with --skip-bad"
    assert not (tmp_path / "dataset.json").exists()

    indexed = index_tars(tars, tmp_path, skip_bad=True)
    expected = {
        "sample 1 has no label": a,
        "sample 2 has no images": a,
        "sample 3 is not a usable image": a,
        "sample 5 has two members .png": a,
        "not a readable tar (unexpected end of data)": b,
        "cannot be read: No such file": tmp_path / "c.tar",
    }
    for fault, (reason, tar) in zip(indexed.left_out, expected.items(), strict=False):
        assert fault.startswith(f"{tar}: {reason}")
    assert indexed.left_out[6:] == ["b.tar: the key 0 is also in a.tar; keys must be unique"]
    assert (tmp_path / "left_out.txt").read_text().splitlines() == indexed.left_out
    samples = open_dataset(tmp_path)
    assert [samples.fetch(0, row).key for row in range(3)] == ["0", "4", "6"]
    assert samples.fetch(1, 0).key == "7"
    assert samples.shard_sizes == [3, 2]  # the cut tar's last sample may not be whole
    assert indexed.info.class_counts == [3, 2, 0]
    assert {finding.reason for finding in check_set(str(tmp_path))} >= {"is in the tar but not in the index"}

    (tmp_path / "c.tar").unlink(missing_ok=True)
    index_tars(["d.tar"], write_tar(tmp_path / "d.tar", sample("x", 0)).parent)
    assert not (tmp_path / "left_out.txt").exists()


def test_nothing_left_names_a_fault(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x.png", png(0))])
    with pytest.raises(DataError, match=r"no usable samples; .*; the first of 1 faults: .*sample x has no label"):
        index_tars(["a.tar"], tmp_path, skip_bad=True)


def test_tars_with_one_name_are_refused(tmp_path: Path) -> None:
    """Their indexes would have one name, too."""
    with pytest.raises(DataError, match=r"http://h/a/0.tar and http://h/b/0.tar: have the same file name; index each"):
        index_tars(["http://h/a/0.tar", "http://h/b/0.tar"], tmp_path)


def test_every_damage_to_the_tar_structure_is_found(tmp_path: Path) -> None:
    """Flip a byte in each header and truncate at each block: webdataset continues silently, the index refuses."""
    whole = write_tar(tmp_path / "whole.tar", [m for i in range(4) for m in sample(f"k{i}", i)]).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        members = archive.getmembers()
        end = members[-1].offset_data + 512
    damaged = tmp_path / "damaged.tar"
    silent = 0
    cases = [whole[: m.offset + 3] + bytes([whole[m.offset + 3] ^ 0x55]) + whole[m.offset + 4 :] for m in members]
    cases += [whole[:cut] for cut in range(512, end + 1, 512)]
    for data in cases:
        damaged.write_bytes(data)
        with pytest.raises(DataError, match=r"damaged.tar: (damaged|truncated|not a readable)"):
            index_shards([damaged])
        with contextlib.suppress(tarfile.TarError, ValueError):
            silent += len(list(webdataset.WebDataset(str(damaged), shardshuffle=False))) < 4
    assert silent > len(members) // 2  # the reason for this check: webdataset loses samples without an error


def test_ignored_members_are_counted(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("README", b"hello"), *sample("x", 0)])
    with tarfile.open(tar, "a") as archive:
        link = tarfile.TarInfo("y.png")
        link.type, link.linkname = tarfile.SYMTYPE, "x.png"
        archive.addfile(link)
    assert index_shards([tar]).notes == [
        "1 members without a key and an extension, ignored",
        "1 links or special files, ignored",
    ]


def test_label_key_selects_the_label(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("x.png", png(0)), ("x.json", b'{"species": 1, "label": 0}')])
    assert index_shards([tar], label_key="species").info.class_counts == [0, 1]


def test_missing_index_is_reported(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("x", 0))
    with pytest.raises(DataError, match="run `vitrail shards index"):
        open_dataset(tmp_path)
    index_shards([tmp_path / "a.tar"])
    (tmp_path / "a.index.json").unlink()
    with pytest.raises(DataError, match=r"a.index.json: missing index; create it with `vitrail shards index`"):
        open_dataset(tmp_path).read(0, 0)
    assert json.loads((tmp_path / "dataset.json").read_text())["num_samples"] == 1


def test_unlabeled_tars_are_indexed_on_request(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("x.png", png(0)), ("x.txt", b"a black square")])
    with pytest.raises(
        DataError, match=r"sample x has no label.*pass --unlabeled to `vitrail shards` if no sample has a label"
    ):
        index_shards([tar])
    indexed = index_shards([tar], label_key=None)
    assert (indexed.info.class_names, indexed.notes) == ([], ["1 members .txt, ignored"])
    assert open_dataset(tmp_path).read(0, 0).label == -1


def test_remote_tar_is_read_once_and_sequentially(tmp_path: Path) -> None:
    members = [m for i in range(9) for m in sample(f"{'long' * 40}{i}", i)]
    data = write_tar(tmp_path / "a.tar", members).read_bytes()
    (tmp_path / "out").mkdir()
    with serve(UnreliableServer(tmp_path, ranges=False)) as server:
        indexed = index_tars([f"{server.url}/a.tar"], tmp_path / "out")
        assert server.requests == {"a.tar": 1}
    [entry] = indexed.info.shards
    assert (entry.name, entry.num_bytes) == (f"{server.url}/a.tar", len(data))
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "out" / "a.index.json").exists()


def test_any_number_of_workers_writes_the_same_index(digits: Path, tmp_path: Path) -> None:
    tars = sorted((digits / "train").glob("*.tar"))
    for tar in tars:
        (tmp_path / tar.name).hardlink_to(tar)
    done: list[int] = []
    executor = partial(run_tasks, num_workers=3)
    index_tars([tar.name for tar in tars], tmp_path, executor=executor, progress=done.append)
    assert sum(done) == len(tars)
    for path in (digits / "train").glob("*.json"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar: cannot be read: No such file"):
        index_tars([tar.name for tar in tars], tmp_path, executor=executor)
