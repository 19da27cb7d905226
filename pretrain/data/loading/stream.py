"""Training batches from tars that nobody has indexed, read from front to back through `webdataset`.

Compared with an indexed dataset, a stream has no exact order: samples are shuffled within a buffer, an epoch may repeat or
miss samples, and a resumed run starts at the next shards. In return, training starts without reading the data first.
What stays: all ranks take equally many steps, damaged tars and samples are reported, and nothing is unpickled.
"""

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count, islice, tee
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from pretrain.data.dataset.dataset import EncodedSample, Sample, decode_sample
from pretrain.data.dataset.order import permutation, random_bits
from pretrain.data.loading.loader import SUBSTITUTES_TRIED, BadSample, BatchPlan, Item, LoadedBatch, collate_items, load
from pretrain.data.loading.loader import LoadingStats as Stats
from pretrain.data.storage.archive import Archive, open_tar
from pretrain.data.storage.index import NO_LABEL
from pretrain.data.storage.remote import FetchPolicy, StalledFetchError, expand_braces, is_remote
from pretrain.data.storage.webdataset import IMAGE_EXTENSIONS, image_of, label_of, metadata_of, samples_of
from pretrain.data.transforms.decode import decode, decode_unless_jpeg
from pretrain.data.transforms.views import View
from pretrain.errors import BadSampleError, DataError

LABEL_KEY = "label"  # key of the label in a sample's JSON, as for `vitrail shards index`
USED_EXTENSIONS = {*IMAGE_EXTENSIONS, "cls", "json"}


@dataclass(frozen=True)
class TarStream:
    """Tars of one training set that are read as a stream.

    Attributes:
        tars: Paths and URLs of the tars.
        class_names: Names of the classes in the order of the labels; empty if labels are not used.
        shuffle_buffer: Number of encoded samples among which each worker chooses the next one.
        policy: Patience with remote hosts, and whether `pipe:` commands are allowed.
    """

    tars: Sequence[str]
    class_names: Sequence[str]
    shuffle_buffer: int
    policy: FetchPolicy

    @property
    def digest(self) -> str:
        """Digest of the list of tars; their content is not known."""
        return hashlib.sha256(json.dumps(list(self.tars)).encode()).hexdigest()

    @property
    def class_shares(self) -> list[float]:
        """Assumed fraction of each class: equal, because nobody has counted."""
        return [1 / len(self.class_names)] * len(self.class_names)

    def shards(self, seed: int, first: int) -> Iterator["Shard"]:
        """Yield the tars endlessly, in a new random order each epoch, from number `first` on."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for number in count(first):
            if number // len(self.tars) != epoch:
                epoch = number // len(self.tars)
                order = permutation(len(self.tars), self.digest, seed, epoch, "stream")
            yield Shard(number, self.tars[int(order[number % len(self.tars)])])


class Shard(NamedTuple):
    """A tar and its number in the endless sequence of tars."""

    number: int
    tar: str


class _StoredSample(NamedTuple):
    """A sample as it is stored, with its shard's number and its row in the shard."""

    encoded: EncodedSample
    number: int
    row: int


def open_tar_stream(
    names: str | Sequence[str], class_names: Sequence[str], shuffle_buffer: int, policy: FetchPolicy
) -> TarStream:
    """Find the tars of a stream.

    Args:
        names: Tars, folders of tars, or URLs; braces such as `{0000..0127}` are expanded.
        class_names: Names of the classes in the order of the labels; empty if labels are not used.
        shuffle_buffer: Number of encoded samples among which each worker chooses the next one.
        policy: Patience with remote hosts, and whether `pipe:` commands are allowed.

    Raises:
        DataError: If a path does not exist or a folder has no tars.
    """
    tars: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        for place in expand_braces(name):
            tars += [place] if is_remote(place) else _local_tars(Path(place))
    return TarStream(tuple(tars), tuple(class_names), shuffle_buffer, policy)


def _local_tars(path: Path) -> list[str]:
    """Return a tar itself, or the tars of a folder."""
    if path.is_file():
        return [str(path)]
    found = sorted(str(tar) for tar in path.glob("*.tar"))
    if not found:
        reason = "has no *.tar files" if path.is_dir() else "does not exist"
        raise DataError(f"{path}: {reason}; data.stream=true reads tars, folders of tars, or URLs of tars")
    return found


def stream_batches(
    stream: TarStream, view: View, plan: BatchPlan, start: int, stop: int, first_shard: int
) -> Generator[LoadedBatch, None, None]:
    """Yield this rank's micro-batches of the positions from `start` to before `stop`.

    The sizes and weights of the micro-batches equal those of `training_batches`, so all ranks take equally many steps.
    Worker *w* of *W* on rank *r* of *R* reads every (*R* *W*)-th shard of the endless sequence, so any number of shards
    serves any number of workers.

    Args:
        stream: Tars to read.
        view: Transforms a decoded image and a random generator into the fields of a sample.
        plan: Division into micro-batches, and settings of the workers.
        start: First position, a multiple of the global batch size.
        stop: Position after the last one, a multiple of the global batch size.
        first_shard: Number of the first shard to read; larger than 0 for a resumed run.
    """
    with closing(load(_StreamedBatches(stream, view, plan, start, stop, first_shard), plan.num_workers)) as loading:
        for micro_batch, loaded in zip(plan.micro_batches(start, stop), loading, strict=True):
            yield loaded._replace(weight=micro_batch.weight)


@dataclass
class _StreamedBatches(IterableDataset[LoadedBatch]):
    """The micro-batches of one rank; each worker makes every `num_workers`-th of them."""

    stream: TarStream
    view: View
    plan: BatchPlan
    start: int
    stop: int
    first_shard: int
    bad_samples: list[BadSample] = field(default_factory=list)

    def __iter__(self) -> Iterator[LoadedBatch]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        samples = self._decoded(iter(self._pipeline(worker)))
        for micro_batch in islice(self.plan.micro_batches(self.start, self.stop), worker, None, num_workers):
            yield self._batch(micro_batch.positions, samples)

    def _pipeline(self, worker: int) -> webdataset.DataPipeline:
        """Return the stored samples of this worker's shards, shuffled within the buffer."""
        key = (self.stream.digest, self.plan.seed, self.first_shard, self.plan.rank, worker, "stream buffer")
        return webdataset.DataPipeline(
            lambda: islice(self.stream.shards(self.plan.seed, self.first_shard), self.plan.rank, None, self.plan.world_size),
            webdataset.split_by_worker,
            self._read,
            webdataset.shuffle(self.stream.shuffle_buffer, rng=random.Random(int(random_bits(*key).random_raw()))),
        )

    def _read(self, shards: Iterable[Shard]) -> Iterator[_StoredSample]:
        """Yield the stored samples of each tar up to its end, or to where it is damaged."""
        empty_shards = 0
        for shard in shards:
            empty_shards += 1
            try:
                with open_tar(shard.tar, self.stream.policy) as file:
                    archive = Archive(shard.tar, file, wanted=lambda name: name.rpartition(".")[2].lower() in USED_EXTENSIONS)
                    for row, (key, members) in enumerate(samples_of(archive, Counter())):
                        empty_shards = 0
                        ...
            except StalledFetchError:
                raise
            except DataError as error:
                self._report(shard.tar, "", str(error))
