"""A folder of images with one subfolder per class, read as a dataset without shards."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from pretrain.data.dataset.dataset import Dataset, EncodedSample
from pretrain.data.dataset.order import Part
from pretrain.data.sources.folder import has_classes, list_folder
from pretrain.errors import BadSampleError, DataError

Split = Literal["train", "validation"]


class FolderDataset(Dataset):
    """A folder with one subfolder per class, read as a single shard.

    Args:
        folder: Path of the folder.
        labeled: Whether the images must have classes. If not, and some stand outside of any subfolder, none has.
        split: Split to take, if the folder has several.

    Raises:
        DataError: If images would be lost, or the folder has several splits and none is chosen.
    """

    def __init__(self, folder: Path, labeled: bool = True, split: Split | None = None) -> None:
        source = list_folder(folder, labeled or has_classes(folder))
        if source.problems:
            raise DataError("\n".join(f"{folder}: {problem}" for problem in source.problems))
        if source.held_out is not None:
            if split is None:
                raise DataError(f"{folder}: contains several splits; name the folder of one of them")
            source = source.take(np.flatnonzero(source.held_out == (split == "validation")))
        self.notes = source.notes
        self.folder = folder
        self.source = source
        self.class_names = source.class_names
        counts = np.bincount(source.labels, minlength=len(self.class_names)) if self.class_names else np.zeros(0)
        self.class_shares = (counts / max(1, len(source))).tolist()
        content = list(zip(source.names, source.sizes.tolist(), strict=True))
        digest = hashlib.sha256(json.dumps([self.class_names, content]).encode()).hexdigest()
        self.parts = [Part(digest, [len(source)])]

    def unusable_classes(self) -> dict[str, BadSampleError | None]:
        """Return the classes of which no image can be used, each with the first fault, or None without images.

        Of the other classes, a few images are read.
        """

        def fault_of(row: int) -> BadSampleError | None:
            try:
                self.read(0, row)
            except BadSampleError as error:
                return error
            return None

        def first_fault(label: int) -> tuple[bool, BadSampleError | None]:
            first = None
            for row in np.flatnonzero(self.source.labels == label).tolist():
                if (fault := fault_of(row)) is None:
                    return True, None
                first = first or fault
            return False, first

        with ThreadPoolExecutor() as pool:
            found = list(pool.map(first_fault, range(len(self.class_names))))
        return {name: fault for name, (usable, fault) in zip(self.class_names, found, strict=True) if not usable}

    def fetch(self, shard: int, row: int) -> EncodedSample:
        image = self.source.image(row)
        try:
            label = image.label if self.new_labels is None else self.new_labels[image.label]
            return EncodedSample(str(self.folder), image.origin, image.read().image, label)
        except OSError as error:
            raise BadSampleError(str(self.folder), image.origin, f"cannot be read: {error}") from None

    def labels(self, shard: int) -> Sequence[int]:
        labels: list[int] = self.source.labels.tolist()
        return labels if self.new_labels is None else [self.new_labels[label] for label in labels]
