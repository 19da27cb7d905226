"""Check that training and validation data have labels of the same classes."""

from collections.abc import Sequence
from typing import Protocol

from pretrain.config import SourceConfig
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.folder import FolderDataset
from pretrain.data.sources.source import summarize
from pretrain.errors import DataError


class Labeled(Protocol):
    """Data with named classes: an indexed dataset or a stream."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes in the order of the labels; empty without labels."""


def leave_out_empty_classes(training: Dataset, validation: Dataset | None) -> None:
    """Leave out the classes of which the training data has no samples: a model cannot learn them.

    Of a folder of images, such classes are refused, as everywhere where images of a folder would be lost.

    Args:
        training: Training data; it gets a remark about the classes.
        validation: Validation data, or None if there is none. Other classes than those of the training data are left
            to `check_classes`.

    Raises:
        DataError: If the validation data has samples of such a class, or no image of a folder's class can be used.
    """
    if isinstance(training, FolderDataset) and (unusable := training.unusable_classes()):
        [line] = summarize([*unusable], "class without a usable image", "classes without a usable image")
        fault = next((fault for fault in unusable.values() if fault), None)
        reason = f" (the first fault: {fault.key}: {fault.reason})" if fault else ""
        raise DataError(
            f"{training.folder}: {line}{reason}; repair the images, convert them with `vitrail shards make "
            f"{training.folder} OUT`, or move the folders of these classes away"
        )
    empty = [name for name, share in zip(training.class_names, training.class_shares, strict=True) if not share]
    if not empty:
        return
    if validation and validation.class_names == training.class_names:
        validation.leave_out_classes(empty)
    training.leave_out_classes(empty)
    training.notes = [
        *training.notes,
        *summarize(
            empty,
            "class without training images, which the model has no output for",
            "classes without training images, which the model has no outputs for",
        ),
    ]


def check_classes(training: Labeled, validation: Labeled | None, config: SourceConfig, *, needed_by: str) -> None:
    """Check that the training data has labels and that the validation data has the same classes.

    Args:
        training: Training data.
        validation: Validation data, or None if there is none.
        config: Paths of both, for the error message.
        needed_by: Feature that needs the labels, for the error message.

    Raises:
        DataError: If there are no labels, or the classes differ.
    """
    if not training.class_names and not (validation and validation.class_names):
        raise DataError(f"{config.train}: the data has no labels, but {needed_by} needs them; choose labeled data")
    if validation and validation.class_names != training.class_names:
        difference = describe_class_difference(training.class_names, validation.class_names)
        path = getattr(config, "validation", None)
        raise DataError(
            f"{path}: validation classes differ from training classes: {difference}; make both sets with the same "
            "class names in the same order"
        )


def describe_class_difference(training: Sequence[str], validation: Sequence[str]) -> str:
    """Return which class names occur in only one of two datasets, or that only their order differs."""
    only_training = ", ".join(name for name in training if name not in set(validation))
    only_validation = ", ".join(name for name in validation if name not in set(training))
    parts = [f"only in training: {only_training}"] * bool(only_training)
    parts += [f"only in validation: {only_validation}"] * bool(only_validation)
    return "; ".join(parts) or "the names are the same, but in another order"
