"""What a source is: images in any form, before they become shards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.storage.index import NO_LABEL
from pretrain.errors import DataError

Integers = npt.NDArray[np.int64]

NAMES_SHOWN = 5


class Content(NamedTuple):
    """What a sample holds: the encoded image; what its JSON says; other members by extension, as a caption's txt."""

    image: bytes
    metadata: dict[str, Any]
    members: dict[str, bytes]


@dataclass(frozen=True)
class SourceImage:
    """An image before it is in a shard; `read` gets its content, in this process or another."""

    key: str
    label: int
    origin: str
    read: Callable[[], Content]


@dataclass
class Source:
    """Images in columns, so that millions can be listed, and everything that was noticed while listing them.

    `names` are a person's words for the images; `labels` count from 0, NO_LABEL where there are no classes; `sizes`
    are in bytes, 0 where they are not known beforehand; `image` gives the i-th.
    """

    class_names: list[str]
    names: Sequence[str]
    labels: Integers
    sizes: Integers
    image: Callable[[int], SourceImage]
    remarks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int] | Integers) -> "Source":
        """Return some of the images, with all that was noticed."""
        rows = np.asarray(rows, np.int64)
        return Source(
            self.class_names,
            [self.names[row] for row in rows],
            self.labels[rows],
            self.sizes[rows],
            lambda i: self.image(int(rows[i])),
            self.remarks,
            self.faults,
        )


def keep_classes(source: Source, names: Sequence[str]) -> Source:
    """Keep only some classes; their labels are counted anew from 0, in the source's order."""
    unknown = [name for name in names if name not in source.class_names]
    if unknown:
        raise DataError(f"no class {', '.join(unknown)}; the classes are {', '.join(source.class_names)}")
    kept = [name for name in source.class_names if name in names]
    new_labels = np.full(len(source.class_names), NO_LABEL)
    for label, name in enumerate(kept):
        new_labels[source.class_names.index(name)] = label
    taken = source.take(np.flatnonzero(new_labels[source.labels] != NO_LABEL))
    labels = new_labels[taken.labels]
    return replace(
        taken, class_names=kept, labels=labels, image=lambda i: replace(taken.image(i), label=int(labels[i]))
    )


def counted(names: list[str], one: str, many: str) -> list[str]:
    """Return one line that counts and names, or none."""
    if not names:
        return []
    shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
    return [f"{len(names)} {one if len(names) == 1 else many}: {shown}"]
