"""Our tar writer produces the same bytes as tarfile, and tarfile reads them."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.shards.encoding import StoredImage
from pretrain.data.shards.writer import MAX_FILE_BYTES, ShardWriter, header
from pretrain.data.storage.index import NO_LABEL

PLAIN = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=100).filter(
    lambda name: not name.endswith("/")
)


@settings(max_examples=300)
@given(name=PLAIN, size=st.integers(0, MAX_FILE_BYTES))
def test_plain_header_equals_tarfiles(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert header(name, size) == info.tobuf(tarfile.PAX_FORMAT)


@settings(max_examples=300)
@given(name=st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=300), size=st.integers(0, 99))
def test_tarfile_reads_any_name_back(name: str, size: int) -> None:
    name = f"n{name}.png"
    data = header(name, size) + b"x" * size + b"\0" * (-size % 512 + 1024)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        [info] = archive.getmembers()
        assert (info.name, info.size, info.mode, info.mtime) == (name, size, 0o644, 0)


def test_file_too_large_for_tar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"big\.png: 8589934592 bytes, but a file in a tar must not exceed 8 GiB"):
        header("big.png", MAX_FILE_BYTES + 1)


def test_shard_has_its_final_name_only_when_complete(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.tar")
    writer.add("k", StoredImage(b"image", "png", 3, 4), NO_LABEL, {"txt": b"a caption"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.partial"]
    index = writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames() == ["k.png", "k.txt"]
    assert (index.label, index.width, index.height) == ([NO_LABEL], [3], [4])
    abandoned = ShardWriter(tmp_path / "b.tar")
    abandoned.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
