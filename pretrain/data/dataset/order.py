"""The order in which a run visits its samples: a pure function of (digests of the parts, seed, weights).

The order of one part is a windowed block shuffle: the shards are permuted and divided into windows, and the samples of
each window are permuted. A reader therefore needs only the shards of one window at a time, and the sample at any
position is found directly. Several parts are mixed by weight: in each block of 65,536 positions every part has exactly
its share, spread by a keyed permutation, and each part counts its own epochs.

A run is one endless sequence of positions. Optimizer step t takes the positions [t*G, (t+1)*G), where G is the global
batch size, and rank r of W takes the r-th of W slices of them. The slices differ by one sample if W does not divide G.
The order never depends on the number of ranks or workers.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, zip_longest
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

MIX_BLOCK = 65_536


class SampleLocation(NamedTuple):
    """Where a sample is stored, and in which epoch it is visited. Shards are numbered over all parts."""

    epoch: int
    shard: int
    row: int


class Part(NamedTuple):
    """One part of a dataset, as the order sees it: a digest of its content and the number of samples per shard."""

    digest: str
    shard_sizes: Sequence[int]


class RepeatedAugmentation(NamedTuple):
    """Several views of each image in a global batch (arXiv 1901.09335).

    The views of an image are as far apart in the batch as possible, so that neighbors are different images.

    Attributes:
        views: Number of views per image.
        batch_size: Global batch size, a multiple of `views`.
    """

    views: int = 1
    batch_size: int = 1

    def image_at(self, position: int) -> int:
        """Return the number of the image at a position, counted without repeats."""
        batch, offset = divmod(position, self.batch_size)
        images = self.batch_size // self.views
        return batch * images + offset % images

    def view_at(self, position: int) -> int:
        """Return which view of its image is at a position, from 0."""
        return position % self.batch_size // (self.batch_size // self.views)


NO_REPEATS = RepeatedAugmentation()


class MicroBatch(NamedTuple):
    """Positions of the samples that one rank passes through the model at once.

    The mean over ranks and micro-batches of (weight x mean loss) is the mean loss of the global batch.
    """

    positions: range
    weight: float


def random_bits(*key: str | int) -> np.random.Philox:
    """Return the counter-based bit generator of a key; it is the same on every machine and rank."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of torch's generators, for dropout and drop path, on a rank in a step; below 2**63."""
    return int(random_bits(seed, step, rank).random_raw() >> 1)


def permutation(n: int, *key: str | int) -> Integers:
    """Return a permutation of 0..n-1 that depends on the key only: it uses raw bits, so no numpy release changes it."""
    return np.argsort(np.asarray(random_bits(*key).random_raw(n)), kind="stable")


class Order:
    """The order of a run: maps each position to a sample of the shards.

    Args:
        parts: Parts of the dataset; shards may be empty, parts may not.
        seed: Seed of the run.
        window: Number of shards whose samples are shuffled together.
        weights: Relative frequency of each part in the mix.
        repeats: Number of views per image, and the batch in which they are.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        seed: int,
        window: int,
        weights: Sequence[float] = (1.0,),
        repeats: RepeatedAugmentation = NO_REPEATS,
    ) -> None:
        self.repeats = repeats
        self.parts = [_PartOrder(part, seed, window) for part in parts]
        self.first_shards = np.cumsum([0, *(len(part.shard_sizes) for part in parts)])
        self.key: tuple[str | int, ...] = (*(part.digest for part in parts), *map(repr, weights), seed)
        self.quotas = _quotas(weights, MIX_BLOCK)
        self._mix = lru_cache(maxsize=2)(self._make_mix)

    def locate(self, position: int) -> SampleLocation:
        """Return the location of the sample at a position."""
        part, number = self._source(position)
        return self._global(part, self.parts[part].locate(number))

    def substitutes(self, position: int) -> Iterator[SampleLocation]:
        """Yield replacements for an unusable sample: the other samples of its window, in a keyed order."""
        part, number = self._source(position)
        for substitute in self.parts[part].substitutes(number):
            yield self._global(part, substitute)

    def epochs(self, position: int) -> list[float]:
        """Return the number of epochs of each part before `position`."""
        return [count / part.num_samples for count, part in zip(self._counts(position), self.parts, strict=True)]

    def upcoming(self, position: int) -> list[int]:
        """Return the next shards to read: each part's current window at `position`, then its next window."""
        windows = []
        for part, count in enumerate(self._counts(position)):
            windows.append([shard + int(self.first_shards[part]) for shard in self.parts[part].upcoming(count)])
        return [shard for shards in zip_longest(*windows) for shard in shards if shard is not None]

    def distance(self, shard: int, position: int) -> float:
        """Return the number of positions until the window of a shard starts; 0 or less if it has started."""
        part = int(np.searchsorted(self.first_shards, shard, side="right")) - 1
        ahead = self.parts[part].distance(shard - int(self.first_shards[part]), self._counts(position)[part])
        return ahead * self.repeats.views * MIX_BLOCK / float(self.quotas[part])

    def _counts(self, position: int) -> list[int]:
        """Return the number of images of each part before `position`."""
        image = self.repeats.image_at(position)
        if len(self.parts) == 1:
            return [image]
        block, offset = divmod(image, MIX_BLOCK)
        counts = block * self.quotas + np.bincount(self._mix(block)[0][:offset], minlength=len(self.parts))
        return [int(count) for count in counts]

    def _source(self, position: int) -> tuple[int, int]:
        """Return the part that a position takes its image from, and the number of that image within the part."""
        image = self.repeats.image_at(position)
        if len(self.parts) == 1:
            return 0, image
        block, offset = divmod(image, MIX_BLOCK)
        parts, ordinals = self._mix(block)
        part = int(parts[offset])
        return part, block * int(self.quotas[part]) + int(ordinals[offset])

    def _make_mix(self, block: int) -> tuple[Integers, Integers]:
        """Return the part of each position of a block, and the number of its earlier positions with the same part."""
        parts = np.repeat(np.arange(len(self.parts)), self.quotas)[permutation(MIX_BLOCK, *self.key, block, "turns")]
        ordinals = np.empty_like(parts)
        for part, quota in enumerate(self.quotas):
            ordinals[parts == part] = np.arange(quota)
        return parts, ordinals

    def _global(self, part: int, location: SampleLocation) -> SampleLocation:
        """Turn a shard's number within its part into its number over all parts."""
        return location._replace(shard=location.shard + int(self.first_shards[part]))


class _PartOrder:
    """The endless order of one part with N samples: position p is the sample p % N of epoch p // N."""

    def __init__(self, part: Part, seed: int, window: int) -> None:
        self.shard_sizes = np.asarray(part.shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.key = (part.digest, seed)
        self.window = window
        if self.num_samples == 0:
            raise ValueError("a dataset without samples has no order")
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)
        self._ranks = lru_cache(maxsize=2)(lambda epoch: np.argsort(self._epoch(epoch)[0]))

    def locate(self, position: int) -> SampleLocation:
        epoch, window, offset = self._find(position)
        shards, rows = self._window(epoch, window)
        return SampleLocation(epoch, int(shards[offset]), int(rows[offset]))

    def substitutes(self, position: int) -> Iterator[SampleLocation]:
        epoch, window, offset = self._find(position)
        shards, rows = self._window(epoch, window)
        for other in permutation(len(shards), *self.key, epoch, window, offset, "substitutes"):
            if other != offset:
                yield SampleLocation(epoch, int(shards[other]), int(rows[other]))

    def upcoming(self, position: int) -> list[int]:
        epoch, window, _ = self._find(position)
        shards, starts = self._epoch(epoch)
        found = shards[window * self.window : (window + 2) * self.window].tolist()
        if window + 1 == len(starts):
            found += [shard for shard in self._epoch(epoch + 1)[0][: self.window].tolist() if shard not in found]
        return list(found)

    def distance(self, shard: int, position: int) -> int:
        epoch, window, _ = self._find(position)
        later = self._window_of(epoch, shard) < window
        start = int(self._epoch(epoch + later)[1][self._window_of(epoch + later, shard)])
        return (epoch + later) * self.num_samples + start - position

    def _window_of(self, epoch: int, shard: int) -> int:
        return int(self._ranks(epoch)[shard]) // self.window

    def _find(self, position: int) -> tuple[int, int, int]:
        """Return (epoch, window, offset in the window) of a position."""
        epoch, offset = divmod(position, self.num_samples)
        starts = self._epoch(epoch)[1]
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        return epoch, window, offset - int(starts[window])

    def _make_epoch(self, epoch: int) -> tuple[Integers, Integers]:
        """Return the epoch's permutation of the shards, and the first sample of each window."""
        shards = permutation(len(self.shard_sizes), *self.key, epoch, "shards")
        ends = np.cumsum(self.shard_sizes[shards])
        return shards, np.concatenate([[0], ends[self.window - 1 : -1 : self.window]])

    def _make_window(self, epoch: int, window: int) -> tuple[Integers, Integers]:
        """Return the shard and the row of every sample of a window."""
        shards = self._epoch(epoch)[0][window * self.window : (window + 1) * self.window]
        sizes = self.shard_sizes[shards]
        shuffled = permutation(int(sizes.sum()), *self.key, epoch, window)
        owners = np.repeat(np.arange(len(shards)), sizes)[shuffled]
        return shards[owners], shuffled - (np.cumsum(sizes) - sizes)[owners]


def micro_batches(
    start: int,
    stop: int,
    *,
    global_batch_size: int,
    accumulation_steps: int,
    rank: int,
    world_size: int,
    group_size: int = 1,
) -> Iterator[MicroBatch]:
    """Yield one rank's micro-batches from position `start` to before `stop`.

    Their sizes differ by at most `group_size`. A rank with too few samples repeats some, with weight 0.

    Args:
        start: First position, a multiple of the global batch size.
        stop: Position after the last one, a multiple of the global batch size.
        global_batch_size: Number of samples per optimizer step, over all ranks.
        accumulation_steps: Number of micro-batches per rank and optimizer step.
        rank: Rank whose micro-batches are yielded.
        world_size: Number of ranks.
        group_size: Number of neighboring samples that must be in the same micro-batch (2 for mixup and cutmix). It
            divides the global batch size.
    """
    units = global_batch_size // group_size
    first, last = units * rank // world_size, units * (rank + 1) // world_size
    bounds = [first + (last - first) * i // accumulation_steps for i in range(accumulation_steps + 1)]
    for step_start in range(start, stop, global_batch_size):
        for low, high in pairwise(bounds):
            weight = (high - low) * accumulation_steps * world_size / units
            begin, end = (low, high) if high > low else (min(low, units - 1), min(low, units - 1) + 1)
            yield MicroBatch(range(step_start + begin * group_size, step_start + end * group_size), weight)


def _quotas(weights: Sequence[float], total: int) -> Integers:
    """Divide `total` by weight into whole numbers of at least 1, the largest remainders first."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    quotas = np.maximum(np.floor(exact), 1).astype(np.int64)
    missing = total - int(quotas.sum())
    if missing > 0:
        quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    else:
        quotas[np.argmax(quotas)] += missing
    return quotas
