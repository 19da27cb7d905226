"""Batches, by torch's own DataLoader over a map-style dataset of positions. The loader's whole state is one integer.

A sample that cannot be used is replaced by another of its window, so that no step and no other sample changes. The
fault travels with its batch, and so does the time that each stage took.
"""

import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import chain, islice, tee
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from pretrain.data.dataset.dataset import Dataset, EncodedSample, Sample, decoded
from pretrain.data.dataset.order import Order, Repeats, micro_batches, random_bits
from pretrain.data.transforms.decode import Jpeg, Pixels, decode, decode_unless_jpeg
from pretrain.data.transforms.device_decode import collate
from pretrain.data.transforms.views import View
from pretrain.errors import BadSampleError, DataError

Batch = dict[str, torch.Tensor]

BATCHES_AHEAD = 4
SUBSTITUTES_TRIED = 100
FEW = 10  # of as many samples only one is read: its bytes alone are less than a shard
VALIDATION = -1  # the position of what is not drawn by a run
GRACE_SECONDS = 30  # as long as the deepspeed launcher waits for a training process


class Fault(NamedTuple):
    """A sample that could not be used where it stood."""

    position: int
    shard: str
    key: str
    reason: str


class Work(NamedTuple):
    """What the loader did: seconds of each stage over all workers, bytes read, and what the cache had to do."""

    fetch: float = 0.0
    decode: float = 0.0
    augment: float = 0.0
    bytes: float = 0.0
    hits: float = 0.0
    downloads: float = 0.0
    downloaded_bytes: float = 0.0
    retries: float = 0.0

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


class Loaded(NamedTuple):
    """A batch: what the objective sees, what its mean loss counts, and how it came about."""

    tensors: Batch
    weight: float
    faults: list[Fault]
    work: Work
    done_at: float


class _Item(NamedTuple):
    """One sample on its way into a batch."""

    fields: dict[str, Any]
    faults: list[Fault]
    work: Work


class _Positions(TorchDataset[_Item]):
    """The sample at a position of the run, as the objective sees it."""

    def __init__(
        self,
        samples: Dataset,
        view: View,
        seed: int,
        window: int,
        repeats: Repeats,
        num_threads: int,
        decode_here: bool,
    ) -> None:
        self.samples = samples
        self.view = view
        self.seed = seed
        self.window = window
        self.repeats = repeats
        self.num_threads = num_threads
        self.decoder = decode if decode_here else decode_unless_jpeg
        self.pool: ThreadPoolExecutor | None = None
        self.order: Order | None = None
        self.position = 0  # the first that is still needed

    def __getitems__(self, positions: Sequence[int]) -> list[_Item]:
        """Return a whole batch: torch's loader asks so where it can."""
        order = self._order()
        if self.num_threads == 1:
            return [self._next_item(order, position) for position in positions]
        self.position = positions[0]  # until the whole batch is done: it may stand in two windows
        if self.pool is None:
            self.pool = ThreadPoolExecutor(self.num_threads)
        return list(self.pool.map(partial(self._item, order), positions))

    def _next_item(self, order: Order, position: int) -> _Item:
        self.position = position
        return self._item(order, position)

    def _order(self) -> Order:
        """Return the order, built where it is used, so that nothing but this object travels to a worker."""
        if self.order is None:
            self.order = order = self.samples.order(self.seed, self.window, self.repeats)
            self.samples.expect(
                lambda shard: order.distance(shard, self.position), lambda: order.upcoming(self.position)
            )
        return self.order

    def _item(self, order: Order, position: int) -> _Item:
        record, faults, work = self._read(order, position)
        started = time.perf_counter()
        view = self.repeats.view(position)
        key = (*order.locate(position), *([view] if view else []))  # the first view is that of a run without repeats
        random = np.random.Generator(random_bits(self.samples.digest, self.seed, *key))
        fields = {**self.view(record.image, random), "label": record.label, "position": position}
        return _Item(fields, faults, work._replace(augment=time.perf_counter() - started))

    def _read(self, order: Order, position: int) -> tuple[Sample, list[Fault], Work]:
        """Read the sample at a position, or the first usable substitute."""
        faults: list[Fault] = []
        places = chain([order.locate(position)], order.substitutes(position))
        for _, shard, row in islice(places, 1 + SUBSTITUTES_TRIED):
            try:
                record, work = _timed_read(self.samples, shard, row, self.decoder)
            except BadSampleError as bad:
                faults.append(Fault(position, bad.shard, bad.key, bad.reason))
            else:
                return record, faults, work
        raise DataError(f"{faults[0].shard}: nothing near sample {faults[0].key} can be used: {faults[0].reason}")


class _Rows(TorchDataset[_Item]):
    """Every sample once, in the order of the shards; one that cannot be used has weight 0."""

    def __init__(self, samples: Dataset, view: View) -> None:
        self.samples = samples
        self.view = view
        self.sizes = samples.shard_sizes
        self.ends = np.cumsum(self.sizes)

    def __getitem__(self, i: int) -> _Item:
        faults: list[Fault] = []
        try:
            record, work = self._read(i)
        except BadSampleError as bad:
            faults.append(Fault(VALIDATION, bad.shard, bad.key, bad.reason))
            record, work = Sample(bad.key, np.zeros((8, 8, 3), np.uint8), 0), Work()
        fields = self.view(record.image, np.random.Generator(np.random.Philox(i)))  # the same at every evaluation
        weight = np.asarray(not faults, dtype=np.float32)
        return _Item({**fields, "label": record.label, "position": i, "weight": weight}, faults, work)

    def _read(self, i: int) -> tuple[Sample, Work]:
        shard = int(np.searchsorted(self.ends, i, side="right"))
        return _timed_read(self.samples, shard, i - int(self.ends[shard]) + self.sizes[shard])


def _timed_read(
    samples: Dataset, shard: int, row: int, decoder: Callable[[bytes], Pixels | Jpeg] = decode
) -> tuple[Sample, Work]:
    """Fetch and decode a sample; say how long each took."""
    started = time.perf_counter()
    encoded: EncodedSample = samples.fetch(shard, row)
    fetched = time.perf_counter()
    record = decoded(encoded, decoder)
    seconds = {"fetch": fetched - started, "decode": time.perf_counter() - fetched}
    return record, Work(**seconds, bytes=len(encoded.data), **samples.take_counts())


def training_batches(
    samples: Dataset,
    view: View,
    *,
    seed: int,
    window: int,
    start: int,
    stop: int,
    global_batch_size: int,
    accumulation_steps: int,
    rank: int,
    world_size: int,
    num_workers: int,
    num_threads: int = 1,
    decode_here: bool = True,
    group_size: int = 1,
    views: int = 1,
) -> Generator[Loaded, None, None]:
    """Yield this rank's micro-batches of the positions from `start` to before `stop`.

    The tensors are what `view` returns, "label" [B] and "position" [B]; see `micro_batches` for B and the weight.
    Without `decode_here` JPEGs come as they are, for `device_decode.unpack`. A global batch has so many `views` of each
    of its images.
    """
    ahead, behind = tee(
        micro_batches(
            start,
            stop,
            global_batch_size=global_batch_size,
            accumulation_steps=accumulation_steps,
            rank=rank,
            world_size=world_size,
            group_size=group_size,
        )
    )
    positions = (batch.positions for batch in ahead)
    repeats = Repeats(views, global_batch_size)
    dataset = _Positions(samples, view, seed, window, repeats, num_threads, decode_here)
    with closing(_load(dataset, positions, num_workers)) as loading:
        for batch, loaded in zip(behind, loading, strict=True):
            yield loaded._replace(weight=batch.weight)


def evaluation_batches(
    samples: Dataset,
    view: View,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
    at_most: int | None = None,
) -> Generator[Loaded, None, None]:
    """Yield this rank's share of all samples: each usable sample has "weight" [B] 1 on exactly one rank.

    All ranks get equally many batches (ZeRO-3 needs that), so the last may hold copies; their weight is 0. With
    `at_most` so many samples are taken, spread evenly over the set; of remote shards no more than they are.
    """
    total = sum(samples.shard_sizes)
    num_samples = min(total, at_most or total)
    if num_samples * FEW < total:
        samples = samples.few()
    stride = batch_size * world_size
    firsts = range(rank * batch_size, num_samples + (-num_samples) % stride, stride)
    batches = (
        [min(i, num_samples - 1) * total // num_samples for i in range(first, first + batch_size)] for first in firsts
    )
    with closing(_load(_Rows(samples, view), batches, num_workers)) as loading:
        for first, loaded in zip(firsts, loading, strict=True):
            loaded.tensors["weight"] *= torch.arange(first, first + batch_size) < num_samples
            yield loaded


def _load(dataset: TorchDataset[_Item], batches: Iterator[Any], num_workers: int) -> Generator[Loaded, None, None]:
    """Yield the dataset's batches; the workers end with the last one, with an error, or when nobody wants more."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,  # an iterator does: a run is gone through once
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=BATCHES_AHEAD if num_workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # of its own, else starting the workers would move the model's dropout
    )
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        if num_workers:  # left to the garbage collector, torch's iterator can only wait and then kill them
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _collate(items: list[_Item]) -> Loaded:
    """Make a batch of samples."""
    faults = [fault for item in items for fault in item.faults]
    work = sum((item.work for item in items), Work())
    return Loaded(collate([item.fields for item in items]), 1.0, faults, work, time.monotonic())


def _start_worker(_: int) -> None:
    """One thread a worker. A launcher signals everyone, but the training process needs batches until it has saved."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
