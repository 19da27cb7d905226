"""Batches for training and evaluation, loaded by torch's DataLoader from a map-style dataset.

The training loader's whole state is one integer: the position in the run's order of samples. A sample that cannot be
used is replaced by another one of its shuffle window, so the number of steps and all other samples stay the same. Each
batch carries its unusable samples and the time that each loading stage took.
"""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from pretrain.config.data import BATCHES_AHEAD
from pretrain.data.dataset.dataset import Dataset, EncodedSample, Sample, decode_sample
from pretrain.data.dataset.order import MicroBatch, Order, RepeatedAugmentation, micro_batches, random_bits
from pretrain.data.loading import limits
from pretrain.data.loading.workers import CONTEXT, check_workers, initialize_worker, start_server
from pretrain.data.transforms.batch import Batch
from pretrain.data.transforms.decode import EncodedJpeg, ImageArray, decode, decode_unless_jpeg
from pretrain.data.transforms.device_decode import collate
from pretrain.data.transforms.views import View
from pretrain.errors import BadSampleError, DataError

SUBSTITUTES_TRIED = 100
SPARSE_STRIDE = 10  # an evaluation of fewer than one in 10 samples fetches byte ranges instead of whole shards
VALIDATION_POSITION = -1  # position of a validation sample: it is not part of the run's order
NO_POSITION = -1  # fills up the positions of a rank with fewer samples than another


class BadSample(NamedTuple):
    """A sample that could not be used, and its position in the run."""

    position: int
    shard: str
    key: str
    reason: str


class LoadingStats(NamedTuple):
    """Work of the data workers: seconds of each stage, bytes read, and the use of the shard cache."""

    fetch: float = 0.0
    decode: float = 0.0
    augment: float = 0.0
    bytes: float = 0.0
    hits: float = 0.0
    downloads: float = 0.0
    downloaded_bytes: float = 0.0
    retries: float = 0.0

    def __add__(self, other: "LoadingStats") -> "LoadingStats":  # type: ignore[override]
        return LoadingStats(*(a + b for a, b in zip(self, other, strict=True)))


class LoadedBatch(NamedTuple):
    """A batch with its bookkeeping.

    Attributes:
        tensors: The batch itself.
        weight: Factor of the batch's mean loss in the mean over the global batch, see `order.MicroBatch`.
        bad_samples: Samples that could not be used while the batch was loaded.
        stats: Work that loading the batch took.
        done_at: Time at which the batch was complete (`time.monotonic`).
        names: Shard and key of each sample; empty for an indexed dataset, where they follow from the position.
        next_tar: Number of the first tar that this rank has not opened yet; 0 for an indexed dataset.
    """

    tensors: Batch
    weight: float
    bad_samples: list[BadSample]
    stats: LoadingStats
    done_at: float
    names: Sequence[tuple[str, str]] = ()
    next_tar: int = 0


@dataclass(frozen=True)
class BatchPlan:
    """How a run divides its order of samples into this rank's micro-batches, and how they are loaded.

    Attributes:
        seed: Seed of the run: determines the order of the samples and their augmentation.
        shuffle_window: Number of shards whose samples are shuffled together.
        global_batch_size: Number of samples per optimizer step, over all ranks.
        accumulation_steps: Number of micro-batches per rank and optimizer step.
        rank: Rank of this process.
        world_size: Number of ranks.
        num_workers: Number of worker processes per rank; 0 loads in the training process.
        batches_ahead: Number of batches that each worker prepares ahead.
        num_threads: Number of reader threads per worker.
        group_size: Number of neighboring samples that must be in the same micro-batch.
        views_per_image: Number of views of each image in a global batch (repeated augmentation).
        decodes_jpegs: Whether the workers decode JPEGs; if not, they leave them to `device_decode.decode_on_device`.
    """

    seed: int
    shuffle_window: int
    global_batch_size: int
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    batches_ahead: int = BATCHES_AHEAD
    num_threads: int = 1
    group_size: int = 1
    views_per_image: int = 1
    decodes_jpegs: bool = True

    def micro_batches(self, start: int, stop: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of the positions from `start` to before `stop`, see `order.micro_batches`."""
        return micro_batches(
            start,
            stop,
            global_batch_size=self.global_batch_size,
            accumulation_steps=self.accumulation_steps,
            rank=self.rank,
            world_size=self.world_size,
            group_size=self.group_size,
        )

    def concurrent_micro_batches(self, start: int, stop: int) -> Iterator[tuple[MicroBatch, ...]]:
        """Yield the micro-batches that the ranks process at the same time: one per rank, in the order of the ranks."""
        ranks = (replace(self, rank=rank) for rank in range(self.world_size))
        return zip(*(each.micro_batches(start, stop) for each in ranks), strict=True)

    def order(self, dataset: Dataset) -> Order:
        """Return the order in which the run visits the samples of a dataset."""
        repeats = RepeatedAugmentation(self.views_per_image, self.global_batch_size)
        return dataset.order(self.seed, self.shuffle_window, repeats)


class LoadedSample(NamedTuple):
    """One sample before it becomes part of a batch.

    Attributes:
        fields: Fields that the view returned, with the label and the position.
        bad_samples: Samples that could not be used in its place.
        stats: Work that loading the sample took.
        name: Shard and key, if the batch must carry them.
    """

    fields: dict[str, Any]
    bad_samples: list[BadSample]
    stats: LoadingStats
    name: tuple[str, str] | None = None


class _TrainingSamples(TorchDataset[LoadedSample]):
    """The sample at each position of a run, transformed by the view."""

    def __init__(self, dataset: Dataset, view: View, plan: BatchPlan) -> None:
        self.dataset = dataset
        self.view = view
        self.plan = plan
        self.decoder = decode if plan.decodes_jpegs else decode_unless_jpeg
        self.threads: ThreadPoolExecutor | None = None
        self.order: Order | None = None
        self.position = 0  # first position that is still needed

    def __getitems__(self, positions: Sequence[int]) -> list[LoadedSample]:
        """Return the samples of a batch; torch's DataLoader prefers this method to `__getitem__`."""
        order = self._ensure_order()
        if self.plan.num_threads == 1:
            return [self._next_item(order, position) for position in positions]
        self.position = positions[0]  # for the whole batch, because it may reach into the next window
        if self.threads is None:
            self.threads = ThreadPoolExecutor(self.plan.num_threads)
        return list(self.threads.map(partial(self._item, order), positions))

    def _next_item(self, order: Order, position: int) -> LoadedSample:
        self.position = position
        return self._item(order, position)

    def _ensure_order(self) -> Order:
        """Return the order. Each worker builds its own, because it is cheap to build and large to send."""
        if self.order is None:
            self.order = order = self.plan.order(self.dataset)
            self.dataset.set_read_schedule(
                lambda shard: order.distance(shard, self.position), lambda: order.upcoming(self.position)
            )
        return self.order

    def _item(self, order: Order, position: int) -> LoadedSample:
        sample, bad_samples, stats = self._read(order, position)
        started = time.perf_counter()
        view = order.repeats.view_at(position)
        key = (*order.locate(position), *([view] if view else []))  # view 0 equals the view of a run without repeats
        random = np.random.Generator(random_bits(self.dataset.digest, self.plan.seed, *key))
        fields = {**self.view(sample.image, random), "label": sample.label, "position": position}
        return LoadedSample(fields, bad_samples, stats._replace(augment=time.perf_counter() - started))

    def _read(self, order: Order, position: int) -> tuple[Sample, list[BadSample], LoadingStats]:
        """Read the sample at a position, or the first usable substitute."""
        bad_samples: list[BadSample] = []
        locations = chain([order.locate(position)], order.substitutes(position))
        for _, shard, row in islice(locations, 1 + SUBSTITUTES_TRIED):
            try:
                sample, stats = _timed_read(self.dataset, shard, row, self.decoder)
            except BadSampleError as error:
                bad_samples.append(BadSample(position, error.shard, error.key, error.reason))
            else:
                return sample, bad_samples, stats
        first = bad_samples[0]
        raise DataError(
            f"{first.shard}: sample {first.key} cannot be used ({first.reason}), nor can any of {len(bad_samples) - 1} "
            "replacements; find the faults with `vitrail shards check`"
        )


class _EvaluationSamples(TorchDataset[LoadedSample]):
    """Every sample once, in the order of the shards; an unusable sample has weight 0."""

    def __init__(self, dataset: Dataset, view: View) -> None:
        self.dataset = dataset
        self.view = view
        self.sizes = dataset.shard_sizes
        self.ends = np.cumsum(self.sizes)

    def __getitem__(self, i: int) -> LoadedSample:
        bad_samples: list[BadSample] = []
        try:
            sample, stats = self._read(i)
        except BadSampleError as error:
            bad_samples.append(BadSample(VALIDATION_POSITION, error.shard, error.key, error.reason))
            sample, stats = Sample(error.key, np.zeros((8, 8, 3), np.uint8), 0), LoadingStats()
        fields = self.view(sample.image, np.random.Generator(np.random.Philox(i)))  # the same in every evaluation
        weight = np.asarray(not bad_samples, dtype=np.float32)
        return LoadedSample({**fields, "label": sample.label, "position": i, "weight": weight}, bad_samples, stats)

    def _read(self, i: int) -> tuple[Sample, LoadingStats]:
        shard = int(np.searchsorted(self.ends, i, side="right"))
        return _timed_read(self.dataset, shard, i - int(self.ends[shard]) + self.sizes[shard])


def _timed_read(
    dataset: Dataset, shard: int, row: int, decoder: Callable[[bytes], ImageArray | EncodedJpeg] = decode
) -> tuple[Sample, LoadingStats]:
    """Fetch and decode a sample, and measure how long each takes."""
    started = time.perf_counter()
    encoded: EncodedSample = dataset.fetch(shard, row)
    fetched = time.perf_counter()
    sample = decode_sample(encoded, decoder)
    seconds = {"fetch": fetched - started, "decode": time.perf_counter() - fetched}
    return sample, LoadingStats(**seconds, bytes=len(encoded.data), **dataset.take_cache_counts())


class BatchSource(Protocol):
    """The micro-batches of one rank: from an indexed dataset (`IndexedBatches`) or a stream (`TarStreamBatches`).

    Attributes:
        is_stream: Whether each rank knows only its own samples, because they do not follow from the position.
    """

    is_stream: ClassVar[bool]

    @property
    def next_tar(self) -> int:
        """Number of the first tar of a stream that this rank has not opened; 0 for an indexed dataset."""

    def load(self, view: View, start: int, stop: int, next_tar: int = 0) -> Generator[LoadedBatch, None, None]:
        """Yield the micro-batches of the positions from `start` to before `stop`.

        Args:
            view: Transforms a decoded image and a random generator into the fields of a sample.
            start: First position, a multiple of the global batch size.
            stop: Position after the last one, a multiple of the global batch size.
            next_tar: Number of the first tar of a stream that no rank has opened; the same on all ranks.
        """

    def sample_names(self, position: int) -> Iterator[tuple[str, str]]:
        """Yield the shard and the key of the samples of the step that starts at `position`."""

    def epochs(self, position: int, next_tar: int) -> list[float]:
        """Return the number of epochs of each dataset before a position, or before the tar `next_tar` of a stream."""


class IndexedBatches:
    """The micro-batches of one rank from an indexed dataset.

    Args:
        dataset: Training set.
        plan: Division into micro-batches, and settings of the workers.
    """

    is_stream: ClassVar[bool] = False
    next_tar = 0  # an indexed dataset is resumed by position

    def __init__(self, dataset: Dataset, plan: BatchPlan) -> None:
        self.dataset = dataset
        self.plan = plan
        self.order = plan.order(dataset)

    def load(self, view: View, start: int, stop: int, next_tar: int = 0) -> Generator[LoadedBatch, None, None]:
        """Yield the micro-batches of the positions from `start` to before `stop`, see `training_batches`."""
        return training_batches(self.dataset, view, self.plan, start, stop)

    def sample_names(self, position: int) -> Iterator[tuple[str, str]]:
        """Yield the shard and the key of each sample of the step that starts at `position`, over all ranks."""
        for each in range(position, position + self.plan.global_batch_size):
            _, shard, row = self.order.locate(each)
            with contextlib.suppress(BadSampleError):
                encoded = self.dataset.fetch(shard, row)
                yield encoded.shard, encoded.key

    def epochs(self, position: int, next_tar: int) -> list[float]:
        """Return the number of epochs of each dataset before a position; `next_tar` is not used."""
        return self.order.epochs(position)


def training_batches(
    dataset: Dataset, view: View, plan: BatchPlan, start: int, stop: int
) -> Generator[LoadedBatch, None, None]:
    """Yield this rank's micro-batches of the positions from `start` to before `stop`.

    A batch has the fields that `view` returns, "label" [B] and "position" [B]. `order.micro_batches` determines B and
    the weights. The same positions have the same pixels for any number of ranks, workers and threads.

    Args:
        dataset: Training set.
        view: Transforms a decoded image and a random generator into the fields of a sample.
        plan: Division into micro-batches, and settings of the workers.
        start: First position, a multiple of the global batch size.
        stop: Position after the last one, a multiple of the global batch size.
    """
    positions = (batch.positions for batch in plan.micro_batches(start, stop))
    samples = _TrainingSamples(dataset, view, plan)
    with closing(load_batches(samples, positions, plan.num_workers, plan.batches_ahead)) as loading:
        for batches, loaded in zip(plan.concurrent_micro_batches(start, stop), loading, strict=True):
            yield complete_batch(loaded, batches, plan.rank)


def complete_batch(loaded: LoadedBatch, micro_batches: Sequence[MicroBatch], rank: int) -> LoadedBatch:
    """Add the weight of a micro-batch and, for self-distillation, the positions of all ranks.

    Self-distillation compares the images of all ranks. If a rank had to ask the others how many images they have, its
    host would wait for the device; the plan knows it.

    Args:
        loaded: Micro-batch of this rank.
        micro_batches: Micro-batches that the ranks process at the same time.
        rank: Rank of this process.

    Returns:
        The batch with its weight. If it has masks, it also has "all_positions" [ranks, largest B].
    """
    loaded = loaded._replace(weight=micro_batches[rank].weight)
    if "mask" not in loaded.tensors:
        return loaded
    largest = max(len(batch.positions) for batch in micro_batches)
    rows = [[*batch.positions, *[NO_POSITION] * (largest - len(batch.positions))] for batch in micro_batches]
    all_positions = torch.tensor(rows, pin_memory=torch.cuda.is_available())
    return loaded._replace(tensors={**loaded.tensors, "all_positions": all_positions})


def evaluation_batches(
    dataset: Dataset,
    view: View,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
    batches_ahead: int = BATCHES_AHEAD,
    max_samples: int | None = None,
) -> Generator[LoadedBatch, None, None]:
    """Yield this rank's share of a dataset; each usable sample has "weight" 1 on exactly one rank.

    All ranks get the same number of batches, as ZeRO-3 needs it. The last batches may therefore repeat a sample, with
    weight 0.

    Args:
        dataset: Validation set, or any other.
        view: Transforms a decoded image into the fields of a sample; its random generator depends on the row only.
        batch_size: Number of samples per batch and rank.
        rank: Rank of this process.
        world_size: Number of ranks.
        num_workers: Number of worker processes per rank; 0 loads in this process.
        batches_ahead: Number of batches that each worker prepares ahead.
        max_samples: Number of samples to take, spread evenly over the dataset; None takes all. If they are few, only
            their bytes are fetched from remote shards.
    """
    total = sum(dataset.shard_sizes)
    num_samples = min(total, max_samples or total)
    if num_samples * SPARSE_STRIDE < total:
        dataset = dataset.for_sparse_reads()
    stride = batch_size * world_size
    firsts = range(rank * batch_size, num_samples + (-num_samples) % stride, stride)
    batches = (
        [min(i, num_samples - 1) * total // num_samples for i in range(first, first + batch_size)] for first in firsts
    )
    with closing(load_batches(_EvaluationSamples(dataset, view), batches, num_workers, batches_ahead)) as loading:
        for first, loaded in zip(firsts, loading, strict=True):
            loaded.tensors["weight"] *= torch.arange(first, first + batch_size) < num_samples
            yield loaded


def load_batches(
    dataset: TorchDataset[Any],
    batches: Iterator[Sequence[int]] | None,
    num_workers: int,
    batches_ahead: int = BATCHES_AHEAD,
) -> Generator[LoadedBatch, None, None]:
    """Yield the dataset's batches; the workers end with the last batch, with an error, or when the generator closes.

    Args:
        dataset: Map-style dataset of `LoadedSample`, or iterable dataset of `LoadedBatch`.
        batches: Indices of the samples of each batch; None for an iterable dataset, which makes its own batches.
        num_workers: Number of worker processes; 0 loads in this process.
        batches_ahead: Number of batches that each worker prepares ahead.

    Raises:
        DeadWorkerError: If a worker was killed.
        LimitError: If shared memory or the limit of open files is used up.
    """
    by_index: dict[str, Any] = {"batch_sampler": batches, "collate_fn": collate_samples}  # an iterator is enough
    if num_workers:
        start_server()
    loader: DataLoader[Any] = DataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=batches_ahead if num_workers else None,
        multiprocessing_context=CONTEXT if num_workers else None,
        worker_init_fn=partial(initialize_worker, dict(os.environ)) if num_workers else None,
        generator=torch.Generator(),  # the global one drives the model's dropout, and starting workers would advance it
        **(by_index if batches is not None else {"batch_size": None, "collate_fn": _as_it_is}),
    )
    iterator = iter(loader)
    try:
        yield from iterator
    except (OSError, EOFError, RuntimeError) as error:  # EOFError: a worker was killed while it handed over memory
        if num_workers:
            if explained := limits.explain(error):
                raise explained from None
            check_workers(iterator._workers)  # type: ignore[attr-defined]
        raise
    finally:
        if num_workers:  # without this, torch's iterator waits for the garbage collector and then kills the workers
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def collate_samples(items: list[LoadedSample]) -> LoadedBatch:
    """Make a batch of samples."""
    bad_samples = [bad for item in items for bad in item.bad_samples]
    stats = sum((item.stats for item in items), LoadingStats())
    names = [item.name for item in items if item.name is not None]
    return LoadedBatch(collate([item.fields for item in items]), 1.0, bad_samples, stats, time.monotonic(), names)


def _as_it_is(batch: LoadedBatch) -> LoadedBatch:
    return batch
