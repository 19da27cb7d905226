"""A subset of a dataset with the same number of samples per class."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from pretrain.data.dataset.dataset import Dataset, EncodedSample
from pretrain.data.dataset.order import Part, permutation
from pretrain.errors import DataError


class LabelSubset(Dataset):
    """A random subset with the same number of samples per class, for learning from few labels.

    Args:
        dataset: Labeled dataset.
        per_class: Number of samples per class.
        seed: Seed of the selection.

    Raises:
        DataError: If a class has too few samples.
    """

    def __init__(self, dataset: Dataset, per_class: int, seed: int) -> None:
        self.dataset = dataset
        self.class_names = dataset.class_names
        self.notes = dataset.notes
        self.class_shares = [1 / len(self.class_names)] * len(self.class_names)
        sizes = dataset.shard_sizes
        labels = np.asarray(list(chain.from_iterable(dataset.labels(shard) for shard in range(len(sizes)))))
        starts = np.cumsum([0, *sizes])
        chosen: list[int] = []
        for label, name in enumerate(self.class_names):
            rows = np.flatnonzero(labels == label)
            if len(rows) < per_class:
                raise DataError(
                    f"class {name}: has {len(rows)} samples, but data.labels_per_class={per_class}; lower it"
                )
            chosen += sorted(rows[permutation(len(rows), seed, name, "few labels")[:per_class]].tolist())
        shards = np.searchsorted(starts, chosen, side="right") - 1
        self.locations = [(int(shard), int(row - starts[shard])) for shard, row in zip(shards, chosen, strict=True)]
        self.parts = [Part(f"{dataset.digest}/{per_class} a class/{seed}", [len(self.locations)])]

    def fetch(self, shard: int, row: int) -> EncodedSample:
        return self.dataset.fetch(*self.locations[row])

    def labels(self, shard: int) -> Sequence[int]:
        return [self.dataset.labels(shard)[row] for shard, row in self.locations]
