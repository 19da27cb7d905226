"""Training and validation data must have labels of the same classes."""

from pathlib import Path

import pytest

from pretrain.config import DataConfig
from pretrain.data.dataset.classes import check_classes, describe_class_difference
from pretrain.data.dataset.open import open_dataset
from pretrain.errors import DataError


@pytest.mark.parametrize(
    ("training", "validation", "expected"),
    [
        (["cat", "dog"], ["Cat", "dog"], "only in training: cat; only in validation: Cat"),
        (["cat", "dog"], ["cat"], "only in training: dog"),
        (["dog", "cat"], ["cat", "dog"], "the names are the same, but in another order"),
    ],
)
def test_the_classes_that_differ_are_named(training: list[str], validation: list[str], expected: str) -> None:
    assert describe_class_difference(training, validation) == expected


def test_missing_labels_and_different_classes_are_refused(digits: Path) -> None:
    config = DataConfig(train="photos", validation="more-photos")
    labeled, unlabeled, other = (open_dataset(digits / "train") for _ in range(3))
    unlabeled.class_names = []
    other.class_names = ["0", "1", "two"]
    check_classes(labeled, labeled, config, needed_by="objective.name=supervised")
    check_classes(labeled, None, config, needed_by="objective.name=supervised")
    sentence = r"^photos: the data has no labels, but objective.name=supervised needs them; choose labeled data"
    with pytest.raises(DataError, match=sentence):
        check_classes(unlabeled, None, config, needed_by="objective.name=supervised")
    with pytest.raises(DataError, match=r"more-photos: validation classes differ .* only in validation: two"):
        check_classes(labeled, other, config, needed_by="objective.name=supervised")
