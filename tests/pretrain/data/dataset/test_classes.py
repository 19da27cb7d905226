"""Training and validation data must have labels of the same classes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.config import DataConfig
from pretrain.data.dataset.classes import check_classes, describe_class_difference, leave_out_empty_classes
from pretrain.data.dataset.open import open_dataset
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.open import SourceOptions, list_source
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


def write_set(folder: Path, labels: list[int], names: list[str]) -> Path:
    """Write a set whose images have the brightness of their labels."""
    for number, label in enumerate(labels):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (label,) * 3).save(folder / "images" / f"{number}.png")
    rows = "".join(f"images/{number}.png,{label}\n" for number, label in enumerate(labels))
    (folder / "t.csv").write_text(f"path,label\n{rows}")
    source = list_source(str(folder / "t.csv"), SourceOptions(class_names=names))
    make_shards(source, folder / "out", ShardOptions(validation_fraction=0))
    return folder / "out" / "train"


def test_classes_without_training_samples_are_no_outputs(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog"]
    training = open_dataset(write_set(tmp_path / "a", [3, 1, 3, 3], names))
    validation = open_dataset(write_set(tmp_path / "b", [1, 3], names))
    leave_out_empty_classes(training, validation)
    for dataset in (training, validation):
        assert dataset.class_names == ["bee", "dog"]
        samples = [dataset.read(0, row) for row in range(dataset.shard_sizes[0])]
        assert {(int(sample.image[0, 0, 0]), sample.label) for sample in samples} == {(1, 0), (3, 1)}
        assert sorted(dataset.labels(0)) == sorted(sample.label for sample in samples)
    assert training.class_shares == [0.25, 0.75]
    assert training.notes == ["2 classes without training images, which the model has no outputs for: ant, cat"]
    check_classes(training, validation, DataConfig(train="a", validation="b"), needed_by="fine-tuning")
    leave_out_empty_classes(training, validation)  # nothing is left to leave out
    assert training.class_names == ["bee", "dog"]


def test_a_class_of_a_folder_without_a_usable_image_is_refused(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_text("no image")
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    leave_out_empty_classes(open_dataset(tmp_path), None)
    (tmp_path / "bee" / "1.png").unlink()
    message = rf"{tmp_path}: 1 class without a usable image: bee \(the first fault: bee/0.jpg: .*\); repair the images,"
    with pytest.raises(DataError, match=message):
        leave_out_empty_classes(open_dataset(tmp_path), None)
    Image.fromarray(np.full((4, 4), 900, np.uint16)).save(tmp_path / "bee" / "0.png")
    (tmp_path / "bee" / "0.jpg").unlink()
    with pytest.raises(DataError, match=r"bee/0.png: no usable image: 16-bit grayscale.*`vitrail shards make .* OUT`"):
        leave_out_empty_classes(open_dataset(tmp_path), None)


def test_a_class_with_validation_samples_only_is_refused(tmp_path: Path) -> None:
    training = open_dataset(write_set(tmp_path / "a", [0], ["ant", "bee"]))
    validation = open_dataset(write_set(tmp_path / "b", [0, 1], ["ant", "bee"]))
    with pytest.raises(DataError, match=r"class bee: has validation images but no training images; add some, or take"):
        leave_out_empty_classes(training, validation)


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
