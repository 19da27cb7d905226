"""What a run over a shard set would be like, before any GPU is rented: computed from the order itself."""

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

BATCHES_DRAWN = 50


@dataclass(frozen=True)
class Simulation:
    """The answers; counts of classes are means over batches drawn from anywhere in the first epoch."""

    samples: int
    steps_per_epoch: float
    samples_per_rank: tuple[int, int]
    classes_in_a_batch: float
    classes_if_fully_shuffled: float
    bytes_of_two_windows: int
    first_epoch_bytes_per_node: int
    later_epoch_bytes_per_node: int


def simulate(
    samples: Dataset,
    *,
    global_batch_size: int,
    ranks: int,
    window: int,
    cache_bytes: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Simulation:
    """Simulate an epoch.

    Args:
        samples: the set or the mix.
        global_batch_size: samples of a step.
        ranks: processes that train.
        window: shards that are shuffled together.
        cache_bytes: of the cache of each node.
        progress: called with 1 after each batch that is drawn.

    Raises:
        DataError: it is no shard set.
    """
    if not isinstance(samples, ShardDataset):
        raise DataError("a plain folder has no shards; make them first, with `vitrail shards make`")
    shard_bytes = [entry.num_bytes for entry in samples.entries]
    order = samples.order(0, window)
    labels = lru_cache(maxsize=2 * window)(samples.labels)
    total = sum(samples.shard_sizes)
    downloads = [
        downloaded_bytes(part, sizes, cache_bytes * sum(sizes) // max(sum(shard_bytes), 1))
        for part, sizes in _by_part(samples, shard_bytes)
    ]
    return Simulation(
        samples=total,
        steps_per_epoch=total / global_batch_size,
        samples_per_rank=(global_batch_size // ranks, -(-global_batch_size // ranks)),
        classes_in_a_batch=classes_in_a_batch(order, labels, global_batch_size, BATCHES_DRAWN, seed=0, done=progress),
        classes_if_fully_shuffled=_expected_classes(samples, global_batch_size),
        bytes_of_two_windows=sum(sorted(shard_bytes)[-2 * window :]),
        first_epoch_bytes_per_node=sum(first for first, _ in downloads),
        later_epoch_bytes_per_node=sum(later for _, later in downloads),
    )


def classes_in_a_batch(
    order: Order,
    labels: Callable[[int], Sequence[int]],
    global_batch_size: int,
    batches: int,
    seed: int,
    done: Callable[[int], None] = lambda _: None,
) -> float:
    """Return the mean number of distinct classes in batches from anywhere in the first epoch."""
    total = sum(part.num_samples for part in order.parts)
    steps = max(total // global_batch_size, 1)
    counts = []
    for step in permutation(steps, seed, "simulated batches")[:batches].tolist():
        places = [order.locate(step * global_batch_size + i) for i in range(global_batch_size)]
        counts.append(len({int(labels(shard)[row]) for _, shard, row in places}))
        done(1)
    return float(np.mean(counts))


def downloaded_bytes(part: Part, shard_bytes: Sequence[int], cache_bytes: int) -> tuple[int, int]:
    """Return what a node downloads in the first epoch and in a later one, where every node reads every shard.

    The cache gives up what is needed last, as `Cache` does.
    """
    count = len(part.shard_sizes)
    epochs = [permutation(count, part.digest, 0, epoch, "shards").tolist() for epoch in range(4)]
    next_use = [{shard: i + count for i, shard in enumerate(epoch)} for epoch in epochs[1:]]
    resident: dict[int, int] = {}
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


def _by_part(samples: Dataset, shard_bytes: Sequence[int]) -> list[tuple[Part, Sequence[int]]]:
    ends = np.cumsum([len(part.shard_sizes) for part in samples.parts])
    return [
        (part, shard_bytes[end - len(part.shard_sizes) : end]) for part, end in zip(samples.parts, ends, strict=True)
    ]


def _expected_classes(samples: Dataset, global_batch_size: int) -> float:
    """Return how many classes a batch would have if all samples were shuffled at once, none drawn twice."""
    if not samples.class_names:
        return 1.0
    counts = np.zeros(len(samples.class_names), np.int64)
    for shard in range(len(samples.shard_sizes)):
        counts += np.bincount(samples.labels(shard), minlength=len(counts))
    return expected_classes(counts, global_batch_size)


def expected_classes(counts: npt.NDArray[np.int64], drawn: int) -> float:
    """Return the mean number of classes in so many samples drawn without replacement.

    A class of n among N samples is missing with the chance C(N - n, drawn) / C(N, drawn).
    """
    total = int(counts.sum())
    if drawn >= total:
        return float((counts > 0).sum())
    missing = [
        math.exp(_log_choose(total - n, drawn) - _log_choose(total, drawn)) if total - n >= drawn else 0.0
        for n in counts.tolist()
    ]
    return len(counts) - sum(missing)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
