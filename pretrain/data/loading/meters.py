"""What the input stage did between two rows of metrics, and the sentence that says what it waits for."""

from bisect import bisect_left
from collections.abc import Sequence

from pretrain.data.loading.loader import Loaded, Work

STAGES = {
    "fetch": "put the shards on faster storage, raise data.num_threads, or give data.cache_bytes room for more of them",
    "decode": "add workers (data.num_workers), or make smaller images with `vitrail shards make --resize`",
    "augment": "add workers (data.num_workers)",
}
INPUT_BOUND = 0.1  # share of the time spent waiting from which a run says so
BUSY = 0.5


class Meter:
    """Sums up one rank's batches until the numbers are taken."""

    def __init__(self) -> None:
        self.taken_at: list[float] = []
        self.batches = 0
        self.waited = 0.0
        self.ready = 0
        self.work = Work()

    def note(self, loaded: Loaded, asked_at: float, got_at: float) -> None:
        """Count a batch that was asked for and given at these times (`time.monotonic`)."""
        self.waited += got_at - asked_at
        self.work = self.work + loaded.work
        # It lay ready whenever an earlier batch was taken after it was done: that is how full the queue was.
        self.ready += len(self.taken_at) - bisect_left(self.taken_at, loaded.done_at)
        self.batches += 1
        self.taken_at = [*self.taken_at[-63:], got_at]

    def take(self) -> list[float]:
        """Return what was summed up, to be summed over ranks, and begin anew."""
        values = [self.batches, self.ready, self.waited, *self.work]
        self.batches, self.ready, self.waited, self.work = 0, 0, 0.0, Work()
        return [float(value) for value in values]


def metrics(totals: Sequence[float], seconds: float, world_size: int, num_loading: int) -> dict[str, float]:
    """Turn the sums over all ranks into metrics.

    Args:
        totals: the sum over ranks of `Meter.take`.
        seconds: that all ranks took.
        world_size: how many they are.
        num_loading: workers of each rank, times the threads of each.
    """
    batches, ready, waited = totals[:3]
    work = Work(*totals[3:])
    worker_seconds = seconds * world_size * num_loading
    busy = {f"data/{stage}_busy": getattr(work, stage) / worker_seconds for stage in STAGES}
    row = {
        "data/wait_fraction": waited / world_size / seconds,
        "data/batches_ready": ready / max(batches, 1),
        "data/megabytes_per_second": work.bytes / 1e6 / seconds,
        **busy,
    }
    if asked := work.hits + work.downloads:  # only what is remote asks the cache
        row |= {
            "data/cache_hits": work.hits / asked,
            "data/downloaded_megabytes_per_second": work.downloaded_bytes / 1e6 / seconds,
            "data/retries": work.retries,
        }
    return row


def verdict(row: dict[str, float], num_workers: int) -> str | None:
    """Say in one sentence what an input-bound run waits for; None while it isn't."""
    if row["data/wait_fraction"] < INPUT_BOUND:
        return None
    bound = f"input-bound, {row['data/wait_fraction']:.0%} of the time: "
    if not num_workers:
        return f"{bound}loading takes turns with training; set data.num_workers"
    stage = max(STAGES, key=lambda name: row[f"data/{name}_busy"])
    busy = sum(row[f"data/{name}_busy"] for name in STAGES)
    if busy < BUSY:
        return None  # the workers had little to do: they were starting
    return f"{bound}{stage} {row[f'data/{stage}_busy']:.0%} busy on {num_workers} workers a rank: {STAGES[stage]}"
