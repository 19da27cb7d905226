"""Labeled images that can be read one by one: what the order and the loader need to know of any data."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.dataset.order import ONCE, Order, Part, Repeats, permutation
from pretrain.data.transforms.decode import DecodeError, Pixels, decode
from pretrain.errors import BadSampleError, DataError


class EncodedSample(NamedTuple):
    """One sample as it is stored, proved by its checksum."""

    shard: str
    key: str
    data: bytes
    label: int


class Sample(NamedTuple):
    """One sample: its name, its pixels [height, width, 3] and its class."""

    key: str
    image: Pixels
    label: int


class Dataset(ABC):
    """Images in shards; what the order and the loader need to know of any data."""

    class_names: list[str]
    class_shares: list[float]  # of the samples that are drawn, how many are of each class
    parts: list[Part]
    weights: Sequence[float] = (1.0,)

    @abstractmethod
    def fetch(self, shard: int, row: int) -> EncodedSample:
        """Read one sample's bytes.

        Raises:
            BadSampleError: they are not there, or not what was promised.
        """

    @abstractmethod
    def labels(self, shard: int) -> Sequence[int]:
        """Return the label of every row of a shard."""

    @property
    def shard_sizes(self) -> list[int]:
        """Dataset in each shard, over all sets."""
        return [size for part in self.parts for size in part.shard_sizes]

    @property
    def digest(self) -> str:
        """What the order depends on: the sets' content and, where they are mixed, their weights."""
        if len(self.parts) == 1:
            return self.parts[0].digest
        content = json.dumps([[part.digest for part in self.parts], list(self.weights)])
        return hashlib.sha256(content.encode()).hexdigest()

    def expect(  # noqa: B027  # most have no use for it
        self, distance: Callable[[int], float], upcoming: Callable[[], Iterable[int]]
    ) -> None:
        """Hear what will be read: how far ahead a shard is, and which come next; what is local does not care."""

    def few(self) -> "Dataset":
        """Return the same samples, of which so few will be read that their shards are not worth a download."""
        return self

    def check_room(self, window: int) -> None:  # noqa: B027
        """Make sure that what is remote can be kept while it is read."""

    def take_counts(self) -> dict[str, int]:
        """Return what the cache has done for this process since the last call; nothing where there is none."""
        return {}

    def order(self, seed: int, window: int, repeats: Repeats = ONCE) -> Order:
        """Return the order of a run over these samples."""
        return Order(self.parts, seed, window, self.weights, repeats)

    def read(self, shard: int, row: int) -> Sample:
        """Read and decode one sample.

        Raises:
            BadSampleError: it cannot be used.
        """
        return decoded(self.fetch(shard, row))


def decoded(encoded: EncodedSample, decoder: Callable[[bytes], Any] = decode) -> Sample:
    """Decode a sample; what another decoder makes of its bytes stands in place of the pixels.

    Raises:
        BadSampleError: it is no usable image.
    """
    try:
        return Sample(encoded.key, decoder(encoded.data), encoded.label)
    except DecodeError as error:
        raise BadSampleError(encoded.shard, encoded.key, f"no usable image: {error}") from None


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
