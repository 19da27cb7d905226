"""Tars as a source: every sample with all its members, from local and remote tars."""

import io
import re
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from benchmarks.unreliable_server import UnreliableServer, serve
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.open import SourceOptions, list_source
from pretrain.data.sources.source import MAX_NAMES_SHOWN
from pretrain.data.storage.index import DatasetInfo
from pretrain.data.storage.remote import FetchPolicy
from pretrain.errors import DataError

PATIENT = FetchPolicy(request_seconds=10, stall_seconds=20)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Two tars from webdataset's writer, with captions, long names and a class in the JSON."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"part-{number}.tar")) as writer:
            for i in range(5):
                label = (number + i) % 3
                writer.write(
                    {
                        "__key__": f"{'deep/' * 30}{number}-{i}",
                        "jpg": Image.new("RGB", (40 + i, 30), (50 * i, 0, 0)),
                        "json": {"label": label, "class": "abc"[label], "author": f"n{i}"},
                        "caption.txt": f"caption {number} {i}",
                    }
                )
    return folder


def contents(folder: Path) -> dict[str, dict[str, object]]:
    """Read all samples of a folder's tars with webdataset."""
    tars = sorted(map(str, folder.glob("*.tar")))
    return {sample["__key__"]: sample for sample in webdataset.WebDataset(tars, shardshuffle=False).decode()}


def test_all_members_are_kept(tmp_path: Path, foreign: Path) -> None:
    source = list_source(str(foreign))
    assert source.class_names == ["a", "b", "c"]
    made = make_shards(source, tmp_path / "out", ShardOptions(validation_fraction=0.0, shard_bytes=9_000))
    assert len(made.splits["train"].shards) > 2
    before, after = contents(foreign), contents(tmp_path / "out" / "train")
    assert before.keys() == after.keys()
    for key, sample in before.items():
        assert after[key]["caption.txt"] == sample["caption.txt"]
        assert after[key]["cls"] == sample["json"]["label"]  # type: ignore[index]
        assert after[key]["json"]["author"] == sample["json"]["author"]  # type: ignore[index]
        assert after[key]["json"]["source"].endswith(f".tar: {key}")  # type: ignore[index]


def test_our_own_shards_can_be_divided_again(tmp_path: Path, digits: Path) -> None:
    source = list_source(str(digits / "train"))
    whole = DatasetInfo.load(digits / "train")
    assert source.class_names == whole.class_names
    made = make_shards(source, tmp_path / "out", ShardOptions(validation_fraction=0.0, shard_bytes=200_000))
    assert made.splits["train"].class_counts == whole.class_counts
    assert len(made.splits["train"].shards) < len(whole.shards)
    before, after = contents(digits / "train"), contents(tmp_path / "out" / "train")
    assert before.keys() == after.keys()
    assert all(after[key]["json"] == before[key]["json"] for key in before)  # with the original source
    with pytest.raises(DataError, match="contains several splits; name one"):
        list_source(str(digits))


def test_remote_tars_are_listed_and_read_in_any_order(tmp_path: Path, foreign: Path) -> None:
    with serve(UnreliableServer(foreign, unavailable=0.1, reset=0.1)) as server:
        source = list_source(f"{server.url}/part-{{0..1}}.tar", SourceOptions(policy=PATIENT))
        made = make_shards(source, tmp_path / "out", ShardOptions(validation_fraction=0.0, seed=1))
    assert made.splits["train"].num_samples == 10
    assert contents(tmp_path / "out" / "train").keys() == contents(foreign).keys()


def test_unlabeled_tars_have_no_classes(foreign: Path, tmp_path: Path) -> None:
    source = list_source(str(foreign), SourceOptions(labeled=False))
    made = make_shards(source, tmp_path / "out", ShardOptions(validation_fraction=0.2))
    assert made.splits["train"].class_names == []
    assert made.splits["train"].num_samples + made.splits["validation"].num_samples == 10
    assert "cls" not in next(iter(contents(tmp_path / "out" / "train").values()))


def test_damaged_or_truncated_tar_is_found_while_listing(foreign: Path) -> None:
    path = foreign / "part-1.tar"
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        header = archive.getmembers()[4].offset
    path.write_bytes(data[:header] + b"\x01" + data[header + 1 :])
    [problem] = list_source(str(foreign)).problems
    assert re.search(r"part-1.tar: (damaged header|not a readable tar)", problem)
    for kept in (len(data) // 2, header + 600, len(data) - 10_300):
        path.write_bytes(data[:kept])
        [problem] = list_source(str(foreign)).problems
        assert re.search(r"part-1.tar: (truncated|not a readable tar)", problem)


def test_samples_that_cannot_be_used_are_listed_at_once(tmp_path: Path) -> None:
    members = [
        ("0.jpg", 0),
        ("0.cls", b"0"),
        ("1.jpg", 9),
        ("2.json", b"{}"),
        ("2.cls", b"0"),
        ("3.jpg", 90),
        ("3.cls", b"1"),
    ]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in members:
            data = content if isinstance(content, bytes) else jpeg(content)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = list_source(str(tmp_path / "a.tar"))
    assert len(source) == 2
    [problem] = source.problems
    assert problem.startswith("2 samples or tars that cannot be used: ")
    assert "sample 1 has no label" in problem
    assert "sample 2 has no images among .json, .cls" in problem
    made = make_shards(source, tmp_path / "out", ShardOptions(validation_fraction=0.0), skip_bad=True)
    assert made.splits["train"].class_counts == [1, 1]


def jpeg(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (level, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_what_is_beside_tars_is_said_or_a_problem(tmp_path: Path, foreign: Path) -> None:
    (foreign / "part-1.tar").rename(foreign / "PART-1.TAR")
    (foreign / "._part-0.tar").touch()  # a Mac's
    (foreign / "stats.json").touch()
    source = list_source(str(foreign))
    assert (len(source), source.notes, source.problems) == (10, ["1 hidden tar, skipped: ._part-0.tar"], [])
    (foreign / "cat").mkdir()
    (foreign / "cat" / "0.jpg").write_bytes(jpeg(0))
    (foreign / "gone.tar").symlink_to(tmp_path / "nowhere")
    assert list_source(str(foreign)).problems == [
        f"1 sample or tar that cannot be used: {foreign}/gone.tar: cannot be read: No such file or directory",
        "1 image, archive or folder beside the tars: cat/",
    ]
    (foreign / "cat" / "0.jpg").rename(foreign / "cat" / "0.dat")
    (foreign / "x.dat").write_bytes(jpeg(1))
    for name in ("more.7z", "more.rar", "more.ZIP", "notes.txt"):
        (foreign / name).write_text(name)
    assert list_source(str(foreign)).problems[1] == (
        "5 images, archives or folders beside the tars: cat/, more.7z, more.ZIP, more.rar, x.dat"
    )
    (foreign / "dataset.json").touch()
    with pytest.raises(DataError, match=r"dataset.json: damaged"):
        list_source(str(foreign))


def test_images_of_other_formats_are_images_in_tars(tmp_path: Path) -> None:
    """If there is one of a usual format, another may be something else, such as a mask."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("0.bmp", "0.cls", "1.jpg", "1.pgm", "1.cls"):
            content = b"0" if name.endswith("cls") else jpeg(0)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    source = list_source(str(tmp_path / "a.tar"))
    assert (len(source), source.problems) == (2, [])
    made = make_shards(source, tmp_path / "out", ShardOptions(validation_fraction=0))
    assert made.splits["train"].num_samples == 2


def test_key_in_two_tars_is_a_problem(foreign: Path) -> None:
    (foreign / "part-2.tar").write_bytes((foreign / "part-0.tar").read_bytes())
    source = list_source(str(foreign))
    assert len(source) == 10
    [problem] = source.problems
    assert problem.startswith("5 samples whose keys are taken: ")
    assert problem.count("also in") == MAX_NAMES_SHOWN


def test_missing_and_unusable_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.tar: no such file; check the path"):
        list_source(str(tmp_path / "a.tar"))
    with pytest.raises(DataError, match="the output of a command has no random access"):
        list_source("pipe:cat a.tar")
    (tmp_path / "b.tar").write_bytes(b"x" * 5000)
    assert "b.tar: not a readable tar" in list_source(str(tmp_path / "b.tar")).problems[0]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("k.txt"))
    (tmp_path / "b.tar").write_bytes(buffer.getvalue())
    assert "sample k has no images among .txt" in list_source(str(tmp_path / "b.tar")).problems[0]
