"""Measure data loading between two rows of metrics, and explain what an input-bound run waits for."""

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from pretrain.data.loading.loader import BadSample, LoadedBatch, LoadingStats

STAGES = {  # stage -> what it does, and how to speed it up
    "fetch": (
        "fetching",
        "use faster storage, increase data.num_threads, or increase data.cache_bytes to keep more shards",
    ),
    "decode": ("decoding", "increase data.num_workers, or make smaller images with `vitrail shards make --resize`"),
    "augment": ("augmentation", "increase data.num_workers"),
}
INPUT_BOUND_FRACTION = 0.1  # share of the time spent waiting from which a run counts as input-bound
BUSY_FRACTION = 0.5  # below it the workers cannot be the bottleneck
BATCHES_REMEMBERED = 64


class Meter:
    """Sums the loading statistics of one rank, and lists its unusable samples, until they are taken."""

    def __init__(self) -> None:
        self.taken_at: list[float] = []
        self.batches = 0
        self.waited = 0.0
        self.ready = 0
        self.stats = LoadingStats()
        self._bad_samples: list[BadSample] = []

    @property
    def num_bad_samples(self) -> int:
        """Number of unusable samples since the last call of `take_bad_samples`."""
        return len(self._bad_samples)

    def next_batch(self, batches: Iterator[LoadedBatch]) -> LoadedBatch:
        """Take the next batch of an iterator and count it, with the time spent waiting for it."""
        asked_at = time.monotonic()
        loaded = next(batches)
        self.add(loaded, asked_at, time.monotonic())
        return loaded

    def add(self, loaded: LoadedBatch, asked_at: float, got_at: float) -> None:
        """Count a batch.

        Args:
            loaded: The batch.
            asked_at: Time at which it was requested (`time.monotonic`).
            got_at: Time at which it arrived.
        """
        self.waited += got_at - asked_at
        self.stats = self.stats + loaded.stats
        # The batch was waiting in the queue whenever an earlier one was taken after this one was done.
        self.ready += len(self.taken_at) - bisect_left(self.taken_at, loaded.done_at)
        self.batches += 1
        self._bad_samples += loaded.bad_samples
        self.taken_at = [*self.taken_at[-BATCHES_REMEMBERED + 1 :], got_at]

    def take(self) -> list[float]:
        """Return the sums since the last call, for `loading_metrics`, and reset them."""
        values = [self.batches, self.ready, self.waited, *self.stats]
        self.batches, self.ready, self.waited, self.stats = 0, 0, 0.0, LoadingStats()
        return [float(value) for value in values]

    def take_bad_samples(self) -> list[BadSample]:
        """Return the unusable samples since the last call."""
        bad_samples, self._bad_samples = self._bad_samples, []
        return bad_samples


def loading_metrics(
    totals: Sequence[float], seconds: float, world_size: int, num_reader_threads: int
) -> dict[str, float]:
    """Turn the sums over all ranks into metrics.

    Args:
        totals: Sum of `Meter.take` over the ranks.
        seconds: Duration of the interval.
        world_size: Number of ranks.
        num_reader_threads: Number of reader threads per rank: workers times threads.
    """
    batches, ready, waited = totals[:3]
    stats = LoadingStats(*totals[3:])
    loader_seconds = seconds * world_size * num_reader_threads
    busy = {f"data/{stage}_busy": getattr(stats, stage) / loader_seconds for stage in STAGES}
    row = {
        "data/wait_fraction": waited / world_size / seconds,
        "data/batches_ready": ready / max(batches, 1),
        "data/megabytes_per_second": stats.bytes / 1e6 / seconds,
        **busy,
    }
    if requests := stats.hits + stats.downloads:  # local data does not use the cache
        row |= {
            "data/cache_hits": stats.hits / requests,
            "data/downloaded_megabytes_per_second": stats.downloaded_bytes / 1e6 / seconds,
            "data/retries": stats.retries,
        }
    return row


def describe_bottleneck(row: dict[str, float], num_workers: int) -> str | None:
    """Return one sentence that says which loading stage limits training; None if none does.

    Args:
        row: Result of `loading_metrics`.
        num_workers: Number of workers per rank.
    """
    if row["data/wait_fraction"] < INPUT_BOUND_FRACTION:
        return None
    bound = f"input-bound {row['data/wait_fraction']:.0%} of the time: "
    if not num_workers:
        return f"{bound}the training process loads the data itself; set data.num_workers"
    stage = max(STAGES, key=lambda name: row[f"data/{name}_busy"])
    busy = sum(row[f"data/{name}_busy"] for name in STAGES)
    if busy < BUSY_FRACTION:
        return None  # the workers were mostly idle: they had just been started
    activity, cure = STAGES[stage]
    workers = f"{num_workers} worker{'s' if num_workers > 1 else ''} per rank"
    return f"{bound}{activity} keeps {workers} {row[f'data/{stage}_busy']:.0%} busy; {cure}"
