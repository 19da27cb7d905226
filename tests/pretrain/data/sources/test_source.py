"""Parts of a source: single positions, single classes."""

import pytest

from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes, summarize
from pretrain.errors import DataError


def test_kept_classes_are_renumbered_in_the_order_of_the_source() -> None:
    digits = list_digits()
    source = keep_classes(digits, ["8", "3"])
    assert source.class_names == ["3", "8"]
    assert len(source) == sum(label in (3, 8) for label in digits.labels.tolist())
    images = [source.image(i) for i in range(len(source))]
    assert [image.label for image in images] == source.labels.tolist()
    assert {(image.key[0], image.label) for image in images} == {("3", 0), ("8", 1)}
    with pytest.raises(DataError, match="the source has no class bird; its classes are 3, 8"):
        keep_classes(source, ["bird"])


def test_taken_positions_keep_their_images() -> None:
    digits = list_digits()
    source = digits.take([5, 3]).take([1])
    assert (len(source), source.names, source.image(0)) == (1, [digits.names[3]], digits.image(3))


def test_summary_counts_all_names_and_shows_the_first() -> None:
    assert summarize([], "file", "files") == []
    assert summarize(["a"], "file", "files") == ["1 file: a"]
    assert summarize(list("abcdef"), "file", "files") == ["6 files: a, b, c, d, e, ..."]
