"""What a source is: images in any form, before they are written as shards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.storage.index import NO_LABEL
from pretrain.errors import DataError

Integers = npt.NDArray[np.int64]

MAX_NAMES_SHOWN = 5


class Content(NamedTuple):
    """The content of one sample.

    Attributes:
        image: Encoded image.
        metadata: JSON object that is stored with the image.
        members: Other files of the sample by extension, such as the txt of a caption.
    """

    image: bytes
    metadata: dict[str, Any]
    members: dict[str, bytes]


@dataclass(frozen=True)
class SourceImage:
    """An image that is not in a shard yet.

    Attributes:
        key: Key of the sample in its shard.
        label: Label of the image, NO_LABEL if it has none.
        origin: Description of the original file, for messages and metadata.
        read: Function that reads the content; it can be pickled, to run in another process.
    """

    key: str
    label: int
    origin: str
    read: Callable[[], Content]


@dataclass
class Source:
    """A list of images in columns, which is small enough for millions of images.

    Attributes:
        class_names: Name of each class, in the order of the labels; empty if the images have no labels.
        names: Name of each image, for messages.
        labels: Label of each image [N], NO_LABEL if the images have none.
        sizes: Size of each encoded image in bytes [N], 0 if it is unknown.
        image: Function that returns the image at a position.
        notes: Remarks for the user, one sentence each.
        problems: Reasons why images would be lost, one sentence each; making shards refuses them unless told otherwise.
        held_out: Whether each image belongs to the validation split of the source [N]; None if it has no splits.
    """

    class_names: list[str]
    names: Sequence[str]
    labels: Integers
    sizes: Integers
    image: Callable[[int], SourceImage]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    held_out: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Sequence[int] | Integers) -> "Source":
        """Return a source with the images at some positions, and with all notes and problems."""
        rows = np.asarray(positions, np.int64)
        return Source(
            self.class_names,
            [self.names[row] for row in rows],
            self.labels[rows],
            self.sizes[rows],
            _Taken(self.image, rows),
            self.notes,
            self.problems,
            None if self.held_out is None else self.held_out[rows],
        )


@dataclass(frozen=True)
class _Taken:
    """A callable that returns the image at a position of a selection; it can be sent to loader workers."""

    image: Callable[[int], SourceImage]
    rows: Integers

    def __call__(self, i: int) -> SourceImage:
        return self.image(int(self.rows[i]))


def keep_classes(source: Source, names: Sequence[str]) -> Source:
    """Return a source with only some of the classes; their labels are renumbered from 0 in the source's order.

    Args:
        source: Labeled source.
        names: Names of the classes to keep.

    Raises:
        DataError: If the source has no class of a given name.
    """
    unknown = [name for name in names if name not in source.class_names]
    if unknown:
        choices = ", ".join(source.class_names) or "none, because the source has no labels"
        raise DataError(f"--classes: the source has no class {', '.join(unknown)}; its classes are {choices}")
    kept = [name for name in source.class_names if name in names]
    new_labels = np.full(len(source.class_names), NO_LABEL)
    for label, name in enumerate(kept):
        new_labels[source.class_names.index(name)] = label
    taken = source.take(np.flatnonzero(new_labels[source.labels] != NO_LABEL))
    labels = new_labels[taken.labels]
    return replace(
        taken, class_names=kept, labels=labels, image=lambda i: replace(taken.image(i), label=int(labels[i]))
    )


def summarize(names: list[str], singular: str, plural: str) -> list[str]:
    """Return one line with the number of names and the first few of them; no line if there are no names.

    Args:
        names: Names of what is counted.
        singular: Description of one.
        plural: Description of several.
    """
    if not names:
        return []
    shown = ", ".join(names[:MAX_NAMES_SHOWN]) + (", ..." if len(names) > MAX_NAMES_SHOWN else "")
    return [f"{len(names)} {singular if len(names) == 1 else plural}: {shown}"]


def summarize_faults(faults: list[str]) -> list[str]:
    """Return one line with the number of faults of samples and tars and the first few of them; none without faults."""
    more = "; ..." if len(faults) > MAX_NAMES_SHOWN else ""
    number = "1 sample or tar" if len(faults) == 1 else f"{len(faults)} samples or tars"
    return [f"{number} that cannot be used: {'; '.join(faults[:MAX_NAMES_SHOWN])}{more}"] if faults else []
