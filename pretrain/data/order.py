"""The order of the samples: a pure function of (dataset digest, seed, epoch), never of ranks or workers.

A windowed block shuffle: the shards are permuted, cut into windows, and the samples of a window are permuted. So a
reader needs only a window's shards at a time, and any position is found without walking there.

A run is one endless sequence of positions: position p is sample p % N of epoch p // N. Optimizer step t takes the
positions [t*G, (t+1)*G), and rank r of W takes the r-th of W equal slices of them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


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
        shard_sizes: samples in each shard; a shard may be empty, not all of them.
        digest: of the dataset, so that other data gives another order.
        seed: of the run.
        window: shards whose samples are shuffled together.
    """

    def __init__(self, shard_sizes: Sequence[int], digest: str, seed: int, window: int) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.key = (digest, seed)
        self.window = window
        if self.num_samples == 0:
            raise ValueError("a dataset without samples has no order")
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def locate(self, position: int) -> tuple[int, int, int]:
        """Return (epoch, shard, row in the shard) of a position."""
        epoch, place = divmod(position, self.num_samples)
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, place, side="right")) - 1
        shards, rows = self._window(epoch, window)
        place -= int(starts[window])
        return epoch, int(shards[place]), int(rows[place])

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
    start: int, stop: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[range]:
    """Yield one rank's micro-batches of positions, from `start` to before `stop`, both multiples of a global batch."""
    share = global_batch_size // world_size
    for step_start in range(start, stop, global_batch_size):
        first = step_start + rank * share
        for micro_start in range(first, first + share, micro_batch_size):
            yield range(micro_start, micro_start + micro_batch_size)
