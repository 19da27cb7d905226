"""A folder of images with one subfolder per class, read as a dataset without shards."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain.data.dataset.dataset import Dataset, EncodedSample
from pretrain.data.dataset.order import Part
from pretrain.data.sources.folder import list_folder
from pretrain.errors import BadSampleError, DataError


class FolderDataset(Dataset):
    """A folder with one subfolder per class, read as a single shard.

    Args:
        folder: Path of the folder.

    Raises:
        DataError: If the folder contains images outside of any class, or none at all.
    """

    def __init__(self, folder: Path) -> None:
        source = list_folder(folder)
        if source.problems:
            raise DataError("\n".join(f"{folder}: {problem}" for problem in source.problems))
        self.folder = folder
        self.source = source
        self.class_names = source.class_names
        self.class_shares = (np.bincount(source.labels, minlength=len(self.class_names)) / len(source)).tolist()
        content = list(zip(source.names, source.sizes.tolist(), strict=True))
        digest = hashlib.sha256(json.dumps([self.class_names, content]).encode()).hexdigest()
        self.parts = [Part(digest, [len(source)])]

    def fetch(self, shard: int, row: int) -> EncodedSample:
        image = self.source.image(row)
        try:
            return EncodedSample(str(self.folder), image.origin, image.read().image, image.label)
        except OSError as error:
            raise BadSampleError(str(self.folder), image.origin, f"cannot be read: {error}") from None

    def labels(self, shard: int) -> Sequence[int]:
        labels: list[int] = self.source.labels.tolist()
        return labels
