"""WebDataset's conventions: samples, labels and the names of classes."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from pretrain.data.storage.archive import Member, TarReader
from pretrain.data.storage.webdataset import label_of, name_classes, read_class_names, samples_of
from pretrain.errors import DataError


def test_members_with_the_same_key_are_one_sample() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("a/1.JPG", "a/1.seg.png", "a/1.cls", "README", "b/1.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    buffer.seek(0)
    ignored: Counter[str] = Counter()
    samples = [(key, list(members)) for key, members in samples_of(TarReader("x.tar", buffer), ignored)]
    assert samples == [("a/1", ["jpg", "seg.png", "cls"]), ("b/1", ["jpg"])]
    assert ignored == {"members without a key and an extension": 1}


def test_classes_are_named_by_the_list_the_samples_or_their_labels() -> None:
    assert name_classes(2, None, {1: "cat"}) == ["0", "cat", "2"]
    assert name_classes(1, ["cat", "dog", "owl"], {1: "ignored"}) == ["cat", "dog", "owl"]
    with pytest.raises(DataError, match="label 2 is out of range because there are 1 class names"):
        name_classes(2, ["cat"], {})


def test_class_names_are_the_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\n\n great dane \n")
    assert read_class_names(tmp_path / "names.txt") == ["cat", "great dane"]
    with pytest.raises(DataError, match=r"nowhere: cannot read the class names: No such file or directory; name a"):
        read_class_names(tmp_path / "nowhere")
    (tmp_path / "names.txt").write_text("\n")
    with pytest.raises(DataError, match=r"names\.txt: has no class names; write one per line"):
        read_class_names(tmp_path / "names.txt")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_label_may_have_a_byte_order_mark(encoding: str) -> None:
    cls = Member("0.cls", True, False, 0, 512, 8, "7\n".encode(encoding))
    assert label_of("a.tar", "0", cls, {}, "label") == 7
