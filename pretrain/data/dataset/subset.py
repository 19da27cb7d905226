"""A subset of a dataset with the same number of samples per class."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from pretrain.data.dataset.dataset import Dataset, EncodedSample
from pretrain.data.dataset.order import Part, permutation
from pretrain.errors import DataError


class LabelSubset(Dataset):
    """The same number of samples of each class, drawn by seed: for learning from few labels."""

    def __init__(self, samples: Dataset, per_class: int, seed: int) -> None:
        self.samples = samples
        self.class_names = samples.class_names
        self.class_shares = [1 / len(self.class_names)] * len(self.class_names)
        sizes = samples.shard_sizes
        labels = np.asarray(list(chain.from_iterable(samples.labels(shard) for shard in range(len(sizes)))))
        starts = np.cumsum([0, *sizes])
        chosen: list[int] = []
        for label, name in enumerate(self.class_names):
            rows = np.flatnonzero(labels == label)
            if len(rows) < per_class:
                raise DataError(f"class {name} has {len(rows)} samples, {per_class} labels a class were asked for")
            chosen += sorted(rows[permutation(len(rows), seed, name, "few labels")[:per_class]].tolist())
        shards = np.searchsorted(starts, chosen, side="right") - 1
        self.places = [(int(shard), int(place - starts[shard])) for shard, place in zip(shards, chosen, strict=True)]
        self.parts = [Part(f"{samples.digest}/{per_class} a class/{seed}", [len(self.places)])]

    def fetch(self, shard: int, row: int) -> EncodedSample:
        return self.samples.fetch(*self.places[row])

    def labels(self, shard: int) -> Sequence[int]:
        return [self.samples.labels(shard)[row] for shard, row in self.places]
