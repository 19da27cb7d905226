"""The interface of a dataset: labeled images that are read one by one, as the order and the loader need them."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pretrain.data.dataset.order import NO_REPEATS, Order, Part, RepeatedAugmentation
from pretrain.data.transforms.decode import DecodeError, ImageArray, decode
from pretrain.errors import BadSampleError, DataError


class EncodedSample(NamedTuple):
    """A sample as it is stored; its checksum has been verified if the dataset has one."""

    shard: str
    key: str
    data: bytes
    label: int


class Sample(NamedTuple):
    """A decoded sample: its key, its pixels [height, width, 3] and its class."""

    key: str
    image: ImageArray
    label: int


class Dataset(ABC):
    """Labeled images in shards.

    Attributes:
        class_names: Name of each class; empty if the dataset has no labels.
        class_shares: Share of each class among the samples that a run visits.
        parts: Parts that the order is made of: one, or several that are mixed by weight.
        weights: Relative frequency of each part in the mix.
        new_labels: Class of each stored label; None if they are the same, because no class was left out.
        notes: Remarks for the user about what was left out or how a folder was understood, one sentence each.
    """

    class_names: list[str]
    class_shares: list[float]
    parts: list[Part]
    weights: Sequence[float] = (1.0,)
    notes: Sequence[str] = ()
    new_labels: Mapping[int, int] | None = None

    @abstractmethod
    def fetch(self, shard: int, row: int) -> EncodedSample:
        """Read the bytes of one sample.

        Raises:
            BadSampleError: If the sample is missing or differs from what the index says.
        """

    @abstractmethod
    def labels(self, shard: int) -> Sequence[int]:
        """Return the label of each row of a shard."""

    @property
    def shard_sizes(self) -> list[int]:
        """Number of samples in each shard, over all parts."""
        return [size for part in self.parts for size in part.shard_sizes]

    @property
    def digest(self) -> str:
        """Digest of everything that the order depends on: the content of the parts and, in a mix, their weights."""
        if len(self.parts) == 1:
            return self.parts[0].digest
        content = json.dumps([[part.digest for part in self.parts], list(self.weights)])
        return hashlib.sha256(content.encode()).hexdigest()

    def set_read_schedule(  # noqa: B027  # local datasets do not prefetch
        self, distance: Callable[[int], float], upcoming: Callable[[], Iterable[int]]
    ) -> None:
        """Set the schedule by which remote shards are prefetched and evicted; a no-op for local data.

        Args:
            distance: Returns the number of positions until a shard is read.
            upcoming: Returns the shards that are read next, in order.
        """

    def for_sparse_reads(self) -> "Dataset":
        """Return the same dataset for reading few samples of each shard: it fetches byte ranges, not whole shards."""
        return self

    def check_cache_size(self, window: int) -> None:  # noqa: B027  # local datasets need no cache
        """Check that the cache can hold the remote shards of a shuffle window and the next one."""

    def take_cache_counts(self) -> dict[str, int]:
        """Return this process's use of the shard cache since the last call; empty for local data."""
        return {}

    def class_of(self, label: int) -> int | None:
        """Return the class of a stored label; None if it is out of range."""
        if self.new_labels is not None:
            return self.new_labels.get(label)
        return label if 0 <= label < len(self.class_names) else None

    def leave_out_classes(self, names: Sequence[str]) -> None:
        """Remove classes without samples; the labels of the others are numbered again from 0.

        Raises:
            DataError: If such a class has samples.
        """
        for name, share in zip(self.class_names, self.class_shares, strict=True):
            if name in names and share:
                raise DataError(
                    f"class {name}: has validation images but no training images; add some, or take the class out of "
                    "the validation data"
                )
        kept = [label for label, name in enumerate(self.class_names) if name not in names]
        self.new_labels = {label: new for new, label in enumerate(kept)}
        self.class_names = [self.class_names[label] for label in kept]
        self.class_shares = [self.class_shares[label] for label in kept]

    def describe(self) -> str:
        """Return the number of images and classes in words."""
        classes = f"in {len(self.class_names)} classes" if self.class_names else "without labels"
        return f"{sum(self.shard_sizes)} images {classes}"

    def order(self, seed: int, window: int, repeats: RepeatedAugmentation = NO_REPEATS) -> Order:
        """Return the order in which a run visits the samples.

        Args:
            seed: Seed of the run.
            window: Number of shards whose samples are shuffled together.
            repeats: Number of views per image, and the batch in which they are.
        """
        return Order(self.parts, seed, window, self.weights, repeats)

    def read(self, shard: int, row: int) -> Sample:
        """Read and decode one sample; raises BadSampleError like `fetch` and `decode_sample`."""
        return decode_sample(self.fetch(shard, row))


def decode_sample(encoded: EncodedSample, decoder: Callable[[bytes], Any] = decode) -> Sample:
    """Decode a sample.

    Args:
        encoded: Sample as it is stored.
        decoder: Function that decodes its bytes; its result becomes the sample's `image`.

    Raises:
        BadSampleError: If the bytes are not a usable image.
    """
    try:
        return Sample(encoded.key, decoder(encoded.data), encoded.label)
    except DecodeError as error:
        raise BadSampleError(encoded.shard, encoded.key, f"no usable image: {error}") from None
