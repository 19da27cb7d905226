"""The tar that we write by hand: tarfile's own bytes, and tarfile reads it."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.shards.encoding import Stored
from pretrain.data.shards.writer import LONGEST_FILE, ShardWriter, header
from pretrain.data.storage.index import NO_LABEL

PLAIN = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=100).filter(
    lambda name: not name.endswith("/")
)


@settings(max_examples=300)
@given(name=PLAIN, size=st.integers(0, LONGEST_FILE))
def test_a_plain_header_is_tarfiles(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert header(name, size) == info.tobuf(tarfile.PAX_FORMAT)


@settings(max_examples=300)
@given(name=st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=300), size=st.integers(0, 99))
def test_any_name_comes_back_from_tarfile(name: str, size: int) -> None:
    name = f"n{name}.png"
    data = header(name, size) + b"x" * size + b"\0" * (-size % 512 + 1024)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        [info] = archive.getmembers()
        assert (info.name, info.size, info.mode, info.mtime) == (name, size, 0o644, 0)


def test_a_member_that_tar_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"big\.png: 8589934592 bytes, more than the 8 GiB"):
        header("big.png", LONGEST_FILE + 1)


def test_a_shard_is_invisible_until_it_is_whole(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.tar")
    writer.add("k", Stored(b"image", "png", 3, 4), NO_LABEL, {"txt": b"a caption"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.partial"]
    index = writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames() == ["k.png", "k.txt"]
    assert (index.label, index.width, index.height) == ([NO_LABEL], [3], [4])
    abandoned = ShardWriter(tmp_path / "b.tar")
    abandoned.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
