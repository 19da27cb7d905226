"""Predict a run over a shard set before any GPU is rented: its numbers are computed from the actual sample order."""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.order import Order, Part, permutation
from pretrain.data.dataset.sharded import ShardDataset
from pretrain.errors import DataError

NUM_SAMPLED_BATCHES = 50


@dataclass(frozen=True)
class Simulation:
    """The predicted numbers of a run.

    Attributes:
        samples: Number of samples per epoch.
        steps_per_epoch: Number of optimizer steps per epoch.
        samples_per_rank: Smallest and largest number of samples per rank and step.
        classes_in_a_batch: Mean number of distinct classes in a batch, over random batches of the first epoch.
        classes_if_fully_shuffled: The same if all samples were shuffled at once.
        bytes_of_two_windows: Bytes that the cache must hold: the largest shards of two shuffle windows.
        first_epoch_bytes_per_node: Bytes that each node downloads in the first epoch if the data is remote.
        later_epoch_bytes_per_node: Bytes that each node downloads in each later epoch.
    """

    samples: int
    steps_per_epoch: float
    samples_per_rank: tuple[int, int]
    classes_in_a_batch: float
    classes_if_fully_shuffled: float
    bytes_of_two_windows: int
    first_epoch_bytes_per_node: int
    later_epoch_bytes_per_node: int


def simulate(
    dataset: Dataset,
    *,
    global_batch_size: int,
    ranks: int,
    window: int,
    cache_bytes: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Simulation:
    """Simulate an epoch.

    Args:
        dataset: Shard set, or several of them.
        global_batch_size: Number of samples per optimizer step.
        ranks: Number of training processes.
        window: Number of shards whose samples are shuffled together.
        cache_bytes: Size limit of each node's cache.
        progress: Function called with 1 after each sampled batch.

    Raises:
        DataError: If the data is a folder of images.
    """
    if not isinstance(dataset, ShardDataset):
        raise DataError("a folder of images has no shards; create them with `vitrail shards make`")
    shard_bytes = [entry.num_bytes for entry in dataset.entries]
    order = dataset.order(0, window)
    labels = lru_cache(maxsize=2 * window)(dataset.labels)
    total = sum(dataset.shard_sizes)
    downloads = [
        downloaded_bytes(part, sizes, cache_bytes * sum(sizes) // max(sum(shard_bytes), 1))
        for part, sizes in _by_part(dataset, shard_bytes)
    ]
    return Simulation(
        samples=total,
        steps_per_epoch=total / global_batch_size,
        samples_per_rank=(global_batch_size // ranks, -(-global_batch_size // ranks)),
        classes_in_a_batch=classes_in_a_batch(
            order, labels, global_batch_size, NUM_SAMPLED_BATCHES, seed=0, progress=progress
        ),
        classes_if_fully_shuffled=_classes_if_fully_shuffled(dataset, global_batch_size),
        bytes_of_two_windows=sum(sorted(shard_bytes)[-2 * window :]),
        first_epoch_bytes_per_node=sum(first for first, _ in downloads),
        later_epoch_bytes_per_node=sum(later for _, later in downloads),
    )


def classes_in_a_batch(
    order: Order,
    labels: Callable[[int], Sequence[int]],
    global_batch_size: int,
    num_batches: int,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> float:
    """Return the mean number of distinct classes in random batches of the first epoch.

    Args:
        order: Order of the samples.
        labels: Function that returns the label of each row of a shard.
        global_batch_size: Number of samples per batch.
        num_batches: Number of batches to sample.
        seed: Random seed for the choice of batches.
        progress: Function called with 1 after each batch.
    """
    total = sum(part.num_samples for part in order.parts)
    steps = max(total // global_batch_size, 1)
    counts = []
    for step in permutation(steps, seed, "simulated batches")[:num_batches].tolist():
        locations = [order.locate(step * global_batch_size + i) for i in range(global_batch_size)]
        counts.append(len({int(labels(shard)[row]) for _, shard, row in locations}))
        progress(1)
    return float(np.mean(counts))


def downloaded_bytes(part: Part, shard_bytes: Sequence[int], cache_bytes: int) -> tuple[int, int]:
    """Return the bytes that a node downloads in the first epoch and in each later one, if it reads every shard.

    The simulated cache evicts the shard that is needed last, as `Cache` does.

    Args:
        part: Shard set.
        shard_bytes: Size of each shard.
        cache_bytes: Size limit of the cache.
    """
    count = len(part.shard_sizes)
    epochs = [permutation(count, part.digest, 0, epoch, "shards").tolist() for epoch in range(4)]
    next_use = [{shard: i + count for i, shard in enumerate(epoch)} for epoch in epochs[1:]]
    resident: dict[int, int] = {}  # shard -> position of its next use
    farthest: list[tuple[int, int]] = []
    used, downloaded = 0, [0, 0, 0]
    for epoch in range(3):
        for shard in epochs[epoch]:
            if shard not in resident:
                downloaded[epoch] += shard_bytes[shard]
                used += shard_bytes[shard]
            resident[shard] = epoch * count + next_use[epoch][shard]
            heapq.heappush(farthest, (-resident[shard], shard))
            while used > cache_bytes and farthest:
                when, victim = heapq.heappop(farthest)
                if resident.get(victim) == -when:
                    used -= shard_bytes[victim]
                    del resident[victim]
    return downloaded[0], downloaded[2]


def _by_part(dataset: Dataset, shard_bytes: Sequence[int]) -> list[tuple[Part, Sequence[int]]]:
    ends = np.cumsum([len(part.shard_sizes) for part in dataset.parts])
    return [
        (part, shard_bytes[end - len(part.shard_sizes) : end]) for part, end in zip(dataset.parts, ends, strict=True)
    ]


def _classes_if_fully_shuffled(dataset: Dataset, global_batch_size: int) -> float:
    if not dataset.class_names:
        return 1.0
    counts = np.zeros(len(dataset.class_names), np.int64)
    for shard in range(len(dataset.shard_sizes)):
        counts += np.bincount(dataset.labels(shard), minlength=len(counts))
    return expected_classes(counts, global_batch_size)


def expected_classes(counts: npt.NDArray[np.int64], num_samples: int) -> float:
    """Return the expected number of distinct classes in samples that are taken at random without replacement.

    A class with n of all N samples is missing with the probability C(N - n, num_samples) / C(N, num_samples).

    Args:
        counts: Number of samples of each class [C].
        num_samples: Number of samples taken.
    """
    total = int(counts.sum())
    if num_samples >= total:
        return float((counts > 0).sum())
    missing = [
        math.exp(_log_choose(total - count, num_samples) - _log_choose(total, num_samples))
        if total - count >= num_samples
        else 0.0
        for count in counts.tolist()
    ]
    return len(counts) - sum(missing)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
