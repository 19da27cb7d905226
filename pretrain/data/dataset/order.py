"""The order of the samples: a pure function of (digests of the sets, seed, weights), never of ranks or workers.

One set is a windowed block shuffle: the shards are permuted, cut into windows, and the samples of a window are
permuted. So a reader needs only a window's shards at a time, and any place is found without walking there. Several sets
take turns by weight: of each 65,536 positions every set has exactly its share, spread by a keyed permutation, and each
set counts its own epochs.

A run is one endless sequence of positions. Optimizer step t takes the positions [t*G, (t+1)*G), and rank r of W takes
the r-th of W slices of them, which differ by one sample where W does not divide G.
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


class Place(NamedTuple):
    """A sample of an epoch; shards are counted over all sets."""

    epoch: int
    shard: int
    row: int


class Part(NamedTuple):
    """What the order needs to know of a set: a digest of its content, and the samples of each shard."""

    digest: str
    shard_sizes: Sequence[int]


class Repeats(NamedTuple):
    """Repeated augmentation (arXiv 1901.09335): each batch holds some views of each of its images.

    The views of an image are as far apart in the batch as can be, so neighbors are different images.
    """

    views: int = 1
    batch: int = 1

    def image(self, position: int) -> int:
        """Return which image of the run, counted without repeats, stands at a position."""
        batch, place = divmod(position, self.batch)
        images = self.batch // self.views
        return batch * images + place % images

    def view(self, position: int) -> int:
        """Return which of its image's views that is."""
        return position % self.batch // (self.batch // self.views)


ONCE = Repeats()


class MicroBatch(NamedTuple):
    """Positions that one rank takes through the model at a time, and what the mean of their losses counts.

    The mean over ranks and micro-batches of (weight x mean loss) is the mean loss over the global batch.
    """

    positions: range
    weight: float


def random_bits(*key: str | int) -> np.random.Philox:
    """Return the counter-based generator that belongs to `key`: the same on every machine and rank."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def permutation(n: int, *key: str | int) -> Integers:
    """Return the permutation of 0..n-1 that belongs to `key`; from raw bits, so no numpy release changes it."""
    return np.argsort(np.asarray(random_bits(*key).random_raw(n)), kind="stable")


class Order:
    """Where each position of a run stands in the shards.

    Args:
        parts: the sets; a shard may be empty, a set may not.
        seed: of the run.
        window: shards whose samples are shuffled together.
        weights: how often each of several sets is drawn, one number a set.
        repeats: of each image.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        seed: int,
        window: int,
        weights: Sequence[float] = (1.0,),
        repeats: Repeats = ONCE,
    ) -> None:
        self.repeats = repeats
        self.sets = [_Windows(part, seed, window) for part in parts]
        self.first_shards = np.cumsum([0, *(len(part.shard_sizes) for part in parts)])
        self.key: tuple[str | int, ...] = (*(part.digest for part in parts), *map(repr, weights), seed)
        self.quotas = _quotas(weights, MIX_BLOCK)
        self._turns = lru_cache(maxsize=2)(self._make_turns)

    def locate(self, position: int) -> Place:
        """Return the sample that stands at a position."""
        part, place = self._turn(position)
        return self._shifted(part, self.sets[part].locate(place))

    def substitutes(self, position: int) -> Iterator[Place]:
        """Yield samples to take where that of `position` cannot be used: others of its window, in a keyed order."""
        part, place = self._turn(position)
        for substitute in self.sets[part].substitutes(place):
            yield self._shifted(part, substitute)

    def epochs(self, position: int) -> list[float]:
        """Return how often each set has been gone through before `position`."""
        return [place / part.num_samples for place, part in zip(self._places(position), self.sets, strict=True)]

    def upcoming(self, position: int) -> list[int]:
        """Return the shards that are read from `position` on: those of each set's window, then those of its next."""
        windows = []
        for part, place in enumerate(self._places(position)):
            windows.append([shard + int(self.first_shards[part]) for shard in self.sets[part].upcoming(place)])
        return [shard for shards in zip_longest(*windows) for shard in shards if shard is not None]

    def distance(self, shard: int, position: int) -> float:
        """Return how many positions from `position` on a shard's window begins; 0 or less while it is open."""
        part = int(np.searchsorted(self.first_shards, shard, side="right")) - 1
        ahead = self.sets[part].distance(shard - int(self.first_shards[part]), self._places(position)[part])
        return ahead * self.repeats.views * MIX_BLOCK / float(self.quotas[part])

    def _places(self, position: int) -> list[int]:
        """Return how many images each set has had before `position`."""
        image = self.repeats.image(position)
        if len(self.sets) == 1:
            return [image]
        block, offset = divmod(image, MIX_BLOCK)
        drawn = block * self.quotas + np.bincount(self._turns(block)[0][:offset], minlength=len(self.sets))
        return [int(count) for count in drawn]

    def _turn(self, position: int) -> tuple[int, int]:
        """Return the set whose turn a position is, and which of its own images that is."""
        image = self.repeats.image(position)
        if len(self.sets) == 1:
            return 0, image
        block, offset = divmod(image, MIX_BLOCK)
        parts, ordinals = self._turns(block)
        part = int(parts[offset])
        return part, block * int(self.quotas[part]) + int(ordinals[offset])

    def _make_turns(self, block: int) -> tuple[Integers, Integers]:
        """Return the set of each position of a block, and how many positions of the block it had before."""
        parts = np.repeat(np.arange(len(self.sets)), self.quotas)[permutation(MIX_BLOCK, *self.key, block, "turns")]
        ordinals = np.empty_like(parts)
        for part, quota in enumerate(self.quotas):
            ordinals[parts == part] = np.arange(quota)
        return parts, ordinals

    def _shifted(self, part: int, place: Place) -> Place:
        return place._replace(shard=place.shard + int(self.first_shards[part]))


class _Windows:
    """The endless order of one set: position p is sample p % N of epoch p // N."""

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

    def locate(self, position: int) -> Place:
        epoch, window, offset = self._find(position)
        shards, rows = self._window(epoch, window)
        return Place(epoch, int(shards[offset]), int(rows[offset]))

    def substitutes(self, position: int) -> Iterator[Place]:
        epoch, window, offset = self._find(position)
        shards, rows = self._window(epoch, window)
        for other in permutation(len(shards), *self.key, epoch, window, offset, "substitutes"):
            if other != offset:
                yield Place(epoch, int(shards[other]), int(rows[other]))

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
        """Return (epoch, window, place in the window) of a position."""
        epoch, place = divmod(position, self.num_samples)
        starts = self._epoch(epoch)[1]
        window = int(np.searchsorted(starts, place, side="right")) - 1
        return epoch, window, place - int(starts[window])

    def _make_epoch(self, epoch: int) -> tuple[Integers, Integers]:
        """Return the epoch's permutation of the shards, and the first place of each window."""
        shards = permutation(len(self.shard_sizes), *self.key, epoch, "shards")
        ends = np.cumsum(self.shard_sizes[shards])
        return shards, np.concatenate([[0], ends[self.window - 1 : -1 : self.window]])

    def _make_window(self, epoch: int, window: int) -> tuple[Integers, Integers]:
        """Return (shard, row) of every place of a window."""
        shards = self._epoch(epoch)[0][window * self.window : (window + 1) * self.window]
        sizes = self.shard_sizes[shards]
        mixed = permutation(int(sizes.sum()), *self.key, epoch, window)
        owners = np.repeat(np.arange(len(shards)), sizes)[mixed]
        return shards[owners], mixed - (np.cumsum(sizes) - sizes)[owners]


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
    """Yield one rank's micro-batches from position `start` to before `stop`, both multiples of a global batch.

    Every rank has `accumulation_steps` in a step. Their sizes differ by at most `together`, the samples that must not
    be parted (2 where neighbors are mixed; it divides the global batch). A rank with too few samples repeats some,
    with weight 0.
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
    """Share out `total` by weight in whole numbers, the largest remainders first; no set is left with nothing."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    quotas = np.maximum(np.floor(exact), 1).astype(np.int64)
    missing = total - int(quotas.sum())
    if missing > 0:
        quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    else:
        quotas[np.argmax(quotas)] += missing
    return quotas


def past(samples: int, passed: list[list[int]]) -> int:
    """Return the first position from `samples` on that is not passed over."""
    for start, stop in sorted(passed):
        if start <= samples < stop:
            samples = stop
    return samples


def stretches(start: int, count: int, passed: list[list[int]]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of what `count` positions from `start` on are made of, without those that are passed over."""
    while count:
        start = past(start, passed)
        stop = min([start + count, *(first for first, _ in passed if first > start)])
        yield start, stop
        count -= stop - start
        start = stop
