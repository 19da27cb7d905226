"""Batches, by torch's own DataLoader over a map-style dataset of positions. The loader's whole state is one integer."""

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.data.augment import View
from pretrain.data.order import Order, micro_batches, random_bits
from pretrain.data.samples import Samples

Batch = dict[str, torch.Tensor]

BATCHES_AHEAD = 4
GRACE_SECONDS = 30  # as long as the deepspeed launcher waits for a training process


class _Positions(Dataset[dict[str, Any]]):
    """The sample at a position of the run, as the objective sees it."""

    def __init__(self, samples: Samples, view: View, seed: int, window: int) -> None:
        self.samples = samples
        self.view = view
        self.seed = seed
        self.window = window
        self.order: Order | None = None

    def __getitem__(self, position: int) -> dict[str, Any]:
        if self.order is None:  # built where it is used, so that nothing but this object travels to a worker
            self.order = Order(self.samples.shard_sizes, self.samples.digest, self.seed, self.window)
        epoch, shard, row = self.order.locate(position)
        record = self.samples.read(shard, row)
        random = np.random.Generator(random_bits(self.samples.digest, self.seed, epoch, shard, row))
        view = self.view(record.image, random)
        return {**view, "label": record.label, "position": position}


class _Rows(Dataset[dict[str, Any]]):
    """Every sample once, in the order of the shards."""

    def __init__(self, samples: Samples, view: View) -> None:
        self.samples = samples
        self.view = view
        self.ends = np.cumsum(samples.shard_sizes)

    def __getitem__(self, i: int) -> dict[str, Any]:
        shard = int(np.searchsorted(self.ends, i, side="right"))
        row = i - int(self.ends[shard]) + self.samples.shard_sizes[shard]
        record = self.samples.read(shard, row)
        view = self.view(record.image, np.random.Generator(np.random.Philox(0)))
        return {**view, "label": record.label, "position": i}


def training_batches(
    samples: Samples,
    view: View,
    *,
    seed: int,
    window: int,
    start: int,
    stop: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of the positions from `start` to before `stop`.

    A batch has what `view` returns, "label" [B] and "position" [B].
    """
    batches = micro_batches(start, stop, global_batch_size, micro_batch_size, rank, world_size)
    return _load(_Positions(samples, view, seed, window), batches, num_workers)


def evaluation_batches(
    samples: Samples, view: View, *, batch_size: int, rank: int, world_size: int, num_workers: int
) -> Iterator[Batch]:
    """Yield this rank's share of all samples: each sample is weighted 1 on exactly one rank.

    All ranks get equally many batches (ZeRO-3 needs that), so the last may hold copies; their "weight" [B] is 0.
    """
    num_samples = sum(samples.shard_sizes)
    stride = batch_size * world_size
    firsts = range(rank * batch_size, num_samples + (-num_samples) % stride, stride)
    batches = ([min(i, num_samples - 1) for i in range(first, first + batch_size)] for first in firsts)
    for first, batch in zip(firsts, _load(_Rows(samples, view), batches, num_workers), strict=True):
        batch["weight"] = (torch.arange(first, first + batch_size) < num_samples).float()
        yield batch


def _load(dataset: Dataset[Any], batches: Iterator[Any], num_workers: int) -> Iterator[Batch]:
    """Yield the dataset's batches; the workers end with the last one, with an error, or when nobody wants more."""
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_sampler=batches,  # an iterator does: a run is gone through once
        num_workers=num_workers,
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


def _start_worker(_: int) -> None:
    """One thread a worker. A launcher signals everyone, but the training process needs batches until it has saved."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
