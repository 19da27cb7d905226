"""Shard sets and folders of images as a map-style torch Dataset."""

import operator
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils import data

from pretrain.config import SourceConfig
from pretrain.config.section import with_home
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.folder import Split
from pretrain.data.dataset.open import open_cache
from pretrain.data.dataset.open import open_dataset as open_samples
from pretrain.errors import BadSampleError, DataError


class ImageDataset(data.Dataset[tuple[Any, int]]):
    """Images with their labels, in the order in which they are stored; `dataset[i]` is `(image, label)`.

    The image is an RGB `PIL.Image`, or what `transform` makes of it. The label is a number, -1 without labels;
    `class_names[label]` is its name. The dataset can be given to a `torch.utils.data.DataLoader` with workers, if the
    transform can be pickled.

    Args:
        samples: Dataset of the training loader.
        transform: Function of a PIL image, or None.

    Attributes:
        class_names: Name of each class, in the order of the labels; empty without labels.
        notes: Remarks about what was left out or how a folder was understood, one sentence each.
        transform: Function of a PIL image, or None.
    """

    def __init__(self, samples: Dataset, transform: Callable[[Image.Image], Any] | None = None) -> None:
        self.class_names = samples.class_names
        self.notes = list(samples.notes)
        self.transform = transform
        self._samples = samples
        self._ends = np.cumsum(samples.shard_sizes)  # number of samples up to the end of each shard

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> tuple[Any, int]:
        index = operator.index(number)
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(f"{number} is out of range: there are {len(self)} images")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[shard]) + self._samples.shard_sizes[shard]
        try:
            sample = self._samples.read(shard, row)
        except BadSampleError as error:
            raise DataError(str(error)) from None  # an error that a DataLoader can pass on from a worker
        image = Image.fromarray(sample.image)
        return (image if self.transform is None else self.transform(image)), sample.label

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Label of each image, int64 [N], read without decoding an image."""
        shards = range(len(self._samples.shard_sizes))
        return np.fromiter(chain.from_iterable(map(self._samples.labels, shards)), np.int64, len(self))

    def __repr__(self) -> str:
        return f"<ImageDataset: {self._samples.describe()}>"


def open_dataset(
    path: str | Path | Sequence[str | Path],
    transform: Callable[[Image.Image], Any] | None = None,
    *,
    split: Split | None = None,
    labeled: bool = True,
    cache_dir: str | Path | None = None,
) -> ImageDataset:
    """Open a shard set or a folder of images.

    Args:
        path: Path or URL as in `data.train`: a shard set, tars that have an index, a folder with one subfolder per
            class, or a list of shard sets, which are concatenated.
        transform: Function of a PIL image, such as one from torchvision or `load_encoder(...).preprocess`; None returns
            the PIL image.
        split: Split to take, "train" or "validation", if the path is that of a folder with several.
        labeled: Whether the images must have labels. If not, a folder needs no subfolders.
        cache_dir: Folder for downloaded shards; None takes ~/.cache/vitrail.

    Returns:
        Map-style dataset of (image, label). What was left out, if anything, is reported as a warning.

    Raises:
        UserError: If the data cannot be used.
    """
    paths = [with_home(str(each)) for each in ([path] if isinstance(path, str | Path) else path)]
    options = {} if cache_dir is None else {"cache_dir": Path(with_home(str(cache_dir)))}
    cache = open_cache(SourceConfig.model_validate({"train": "", **options}))
    dataset = ImageDataset(open_samples(paths, cache=cache, labeled=labeled, split=split), transform)
    for note in dataset.notes:
        warnings.warn(note, stacklevel=2)
    return dataset
