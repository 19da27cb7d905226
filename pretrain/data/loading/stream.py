"""Training batches from tars without an index, read from front to back through `webdataset`.

Compared with an indexed dataset, a stream has no exact order: samples are shuffled within a buffer, an epoch may repeat
or miss samples, and a resumed run starts at the next shards. In return, training starts without reading the data first.
What stays: all ranks take equally many steps, damaged tars and samples are reported, and nothing is unpickled.
"""

import hashlib
import json
import random
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from pretrain.data.dataset.dataset import EncodedSample, decode_sample
from pretrain.data.dataset.order import permutation, random_bits
from pretrain.data.loading.loader import (
    SUBSTITUTES_TRIED,
    BadSample,
    BatchPlan,
    LoadedBatch,
    LoadedSample,
    LoadingStats,
    collate_samples,
    complete_batch,
    load_batches,
)
from pretrain.data.storage.archive import Member, TarReader, open_tar
from pretrain.data.storage.index import DATASET_FILE, NO_LABEL, DatasetInfo
from pretrain.data.storage.remote import PIPE, FetchPolicy, StalledFetchError, expand_braces, is_remote
from pretrain.data.storage.tar_set import describe_beside, tar_names
from pretrain.data.storage.webdataset import (
    IMAGE_EXTENSIONS,
    LABEL_KEY,
    OTHER_IMAGE_EXTENSIONS,
    image_of,
    label_of,
    metadata_of,
    samples_of,
)
from pretrain.data.transforms.decode import decode, decode_unless_jpeg
from pretrain.data.transforms.views import View
from pretrain.errors import BadSampleError, DataError

READ_EXTENSIONS = {*IMAGE_EXTENSIONS, *OTHER_IMAGE_EXTENSIONS, "cls", "json"}
STEPS_WITH_NAMES = 3  # a step's result is known while the next step runs
WHOLE_TAR = "(the rest of the tar)"  # in place of a sample's key, where a tar cannot be read on


@dataclass(frozen=True)
class TarStream:
    """The tars of a training set that is read as a stream.

    Attributes:
        tars: Paths and URLs of the tars.
        class_names: Names of the classes in the order of the labels; empty if labels are not used.
        shuffle_buffer: Number of encoded samples among which each worker chooses the next one.
        policy: Patience with remote hosts, and whether `pipe:` commands are allowed.
    """

    tars: Sequence[str]
    class_names: list[str]
    shuffle_buffer: int
    policy: FetchPolicy

    @property
    def digest(self) -> str:
        """Digest of the names of the tars, wherever they are; their content is not known."""
        names = [tar if tar.startswith(PIPE) else tar.rpartition("/")[2] for tar in self.tars]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    @property
    def class_shares(self) -> list[float]:
        """Assumed fraction of each class: equal fractions, because the samples were not counted."""
        return [1 / len(self.class_names)] * len(self.class_names)

    def describe(self) -> str:
        """Return the number of tars, and what a stream does not guarantee."""
        return (
            f"{len(self.tars)} tars read as a stream (samples are shuffled within a buffer of {self.shuffle_buffer}, "
            "and a resumed run starts at the next tars; index them for an exact order and an exact resume)"
        )

    def numbered_tars(self, seed: int, first: int) -> Iterator["NumberedTar"]:
        """Yield the tars endlessly, in a new random order each epoch.

        Args:
            seed: Seed of the run.
            first: Number of the first tar to yield; epoch *e* has the numbers from *e* times the number of tars on.
        """
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for number in count(first):
            if number // len(self.tars) != epoch:
                epoch = number // len(self.tars)
                order = permutation(len(self.tars), self.digest, seed, epoch, "stream")
            yield NumberedTar(number, self.tars[int(order[number % len(self.tars)])])


class NumberedTar(NamedTuple):
    """A tar and its number in the endless sequence of tars."""

    number: int
    tar: str


class _StoredSample(NamedTuple):
    """An encoded sample with the number of its tar and its row in the tar."""

    encoded: EncodedSample
    number: int
    row: int


def open_tar_stream(
    names: str | Sequence[str], class_names: Sequence[str], shuffle_buffer: int, policy: FetchPolicy
) -> TarStream:
    """Find the tars of a stream; nothing of them is read yet.

    Args:
        names: Tars, folders of tars, or URLs; braces such as `{0000..0127}` are expanded.
        class_names: Names of the classes in the order of the labels; empty if labels are not used.
        shuffle_buffer: Number of encoded samples among which each worker chooses the next one.
        policy: Patience with remote hosts, and whether `pipe:` commands are allowed.

    Raises:
        DataError: If nothing is named.
    """
    given = [names] if isinstance(names, str) else names
    tars: list[str] = []
    for place in (place for name in given for place in expand_braces(name)):
        tars += [place] if is_remote(place) else _local_tars(Path(place))
    if not tars:
        raise DataError("data.train: the list is empty; name tars, folders of tars, or URLs of tars")
    return TarStream(tuple(tars), list(class_names), shuffle_buffer, policy)


def _local_tars(path: Path) -> list[str]:
    """Return the absolute path of a tar, or of all tars of a folder."""
    if path.is_file():
        return [str(path.resolve())]
    found = [str(path.resolve() / tar) for tar in tar_names(path)]
    if not found and (path / DATASET_FILE).exists():
        found = DatasetInfo.load(path).tar_paths(str(path))
    if found and (lost := describe_beside(path)):
        raise DataError(f"{path}: {lost[0]}; move them away, or name the tars in data.train")
    if not found:
        reason = "has no *.tar files" if path.is_dir() else "does not exist"
        raise DataError(f"{path}: {reason}; with data.stream=true, name tars, folders of tars, or URLs of tars")
    return found


class TarStreamBatches:
    """The micro-batches of one rank from a stream of tars.

    Sizes and weights of the micro-batches are those of an indexed dataset, so all ranks take equally many steps. Each
    worker of each rank reads its share of the endless sequence of tars, so any number of tars serves any number of
    workers.

    Args:
        stream: Tars to read.
        plan: Division into micro-batches, and settings of the workers.
        first_tar: Number of the first tar to read; above 0 for a resumed run.

    Attributes:
        next_tar: Number of the first tar after all that this rank has opened.
    """

    is_stream: ClassVar[bool] = True

    def __init__(self, stream: TarStream, plan: BatchPlan, first_tar: int) -> None:
        self.stream = stream
        self.plan = plan
        self.next_tar = first_tar
        self._names: deque[tuple[int, Sequence[tuple[str, str]]]] = deque(
            maxlen=STEPS_WITH_NAMES * plan.accumulation_steps
        )

    def load(self, view: View, start: int, stop: int, next_tar: int = 0) -> Generator[LoadedBatch, None, None]:
        """Yield the micro-batches of the positions from `start` to before `stop`.

        Args:
            view: Transforms a decoded image and a random generator into the fields of a sample.
            start: First position, a multiple of the global batch size.
            stop: Position after the last one, a multiple of the global batch size.
            next_tar: Number of the first tar that no rank has opened. The ranks divide the tars from there, so that
                they would read some twice and others never if each went on after its own last tar.
        """
        self.next_tar = max(self.next_tar, next_tar)
        batches = _StreamedBatches(self.stream, view, self.plan, start, stop, self.next_tar)
        with closing(load_batches(batches, None, self.plan.num_workers, self.plan.batches_ahead)) as loading:
            for micro_batches, loaded in zip(self.plan.concurrent_micro_batches(start, stop), loading, strict=True):
                self.next_tar = max(self.next_tar, loaded.next_tar)
                first = micro_batches[self.plan.rank].positions[0]
                self._names.append((first // self.plan.global_batch_size, loaded.names))
                yield complete_batch(loaded, micro_batches, self.plan.rank)

    def sample_names(self, position: int) -> Iterator[tuple[str, str]]:
        """Yield the shard and the key of this rank's samples of the step that starts at `position`."""
        for step, names in self._names:
            if step == position // self.plan.global_batch_size:
                yield from names

    def epochs(self, position: int, next_tar: int) -> list[float]:
        """Return the number of epochs of tars before the tar `next_tar`; it does not follow from the position."""
        return [next_tar / len(self.stream.tars)]


class _StreamedBatches(IterableDataset[LoadedBatch]):
    """The micro-batches of one rank; of *W* workers, worker *w* makes the micro-batches *w*, *w + W*, ..."""

    def __init__(self, stream: TarStream, view: View, plan: BatchPlan, start: int, stop: int, first_tar: int) -> None:
        self.stream = stream
        self.view = view
        self.plan = plan
        self.start = start
        self.stop = stop
        self.first_tar = first_tar
        self.decoder = decode if plan.decodes_jpegs else decode_unless_jpeg
        self.bad: list[tuple[str, str, str]] = []  # tar, key and reason since the last batch
        self.next_tar = first_tar

    def __iter__(self) -> Iterator[LoadedBatch]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        stored = self._stored_samples(worker)
        for micro_batch in islice(self.plan.micro_batches(self.start, self.stop), worker, None, num_workers):
            items = [self._next_item(stored, position) for position in micro_batch.positions]
            bad_samples = spread_over_positions(self.bad, micro_batch.positions)
            self.bad = []
            yield collate_samples(items)._replace(bad_samples=bad_samples, next_tar=self.next_tar)

    def _stored_samples(self, worker: int) -> Iterator[_StoredSample]:
        """Yield the encoded samples of this worker's tars, shuffled within the buffer."""
        plan, key = self.plan, (self.stream.digest, self.plan.seed, self.first_tar, self.plan.rank, worker)
        pipeline = webdataset.DataPipeline(
            lambda: islice(self.stream.numbered_tars(plan.seed, self.first_tar), plan.rank, None, plan.world_size),
            webdataset.split_by_worker,
            self._read,
            webdataset.shuffle(
                self.stream.shuffle_buffer,
                initial=self.stream.shuffle_buffer,
                rng=random.Random(int(random_bits(*key, "stream buffer").random_raw())),
            ),
        )
        return iter(pipeline)

    def _read(self, tars: Iterable[NumberedTar]) -> Iterator[_StoredSample]:
        """Yield the encoded samples of each tar, up to its end or to where it is damaged."""
        without_sample = 0
        for number, tar in tars:
            without_sample += 1
            self.next_tar = number + 1
            try:
                with open_tar(tar, self.stream.policy) as file:
                    reader = TarReader(tar, file, _is_read)
                    for row, (key, members) in enumerate(samples_of(reader, Counter())):
                        if (encoded := self._encoded(tar, key, members)) is not None:
                            without_sample = 0
                            yield _StoredSample(encoded, number, row)
            except StalledFetchError:
                raise
            except DataError as error:
                self.bad.append((tar, WHOLE_TAR, str(error).removeprefix(f"{tar}: ")))
            if without_sample > len(self.stream.tars):
                reason = f"; the last problem: {self.bad[-1][2]}" if self.bad else ""
                raise DataError(
                    f"{tar}: no usable sample in this tar or in the {without_sample - 1} read before it{reason}; "
                    "name WebDataset tars with images in data.train"
                )

    def _encoded(self, tar: str, key: str, members: Mapping[str, Member]) -> EncodedSample | None:
        """Return the image and the label of a sample, or record why there is none."""
        try:
            _, image = image_of(tar, key, dict(members))
            label = self._label(tar, key, members)
        except DataError as error:
            self.bad.append((tar, key, str(error).removeprefix(f"{tar}: ")))
            return None
        return EncodedSample(tar, key, image.data, label)

    def _label(self, tar: str, key: str, members: Mapping[str, Member]) -> int:
        """Return the label of a sample, or NO_LABEL if the run has no class names."""
        if not self.stream.class_names:
            return NO_LABEL
        metadata = metadata_of(tar, key, members.get("json"))
        label = label_of(tar, key, members.get("cls"), metadata, LABEL_KEY)
        if label >= len(self.stream.class_names):
            raise DataError(f"label {label} is out of range: there are {len(self.stream.class_names)} classes")
        return label

    def _next_item(self, stored: Iterator[_StoredSample], position: int) -> LoadedSample:
        """Return the next sample that can be decoded, transformed by the view."""
        for _ in range(SUBSTITUTES_TRIED):
            started = time.perf_counter()
            encoded, number, row = next(stored)
            fetched = time.perf_counter()
            try:
                sample = decode_sample(encoded, self.decoder)
            except BadSampleError as error:
                self.bad.append((error.shard, error.key, error.reason))
                continue
            decoded = time.perf_counter()
            random_numbers = np.random.Generator(random_bits(self.stream.digest, self.plan.seed, number, row))
            fields = {**self.view(sample.image, random_numbers), "label": sample.label, "position": position}
            stats = LoadingStats(
                fetch=fetched - started,
                decode=decoded - fetched,
                augment=time.perf_counter() - decoded,
                bytes=len(encoded.data),
            )
            return LoadedSample(fields, [], stats, (encoded.shard, encoded.key))
        tar, key, reason = self.bad[-1]
        raise DataError(
            f"{tar}: {SUBSTITUTES_TRIED} samples in a row cannot be used, the last one {key}: {reason}; "
            "repair the tars or remove them from data.train"
        )


def spread_over_positions(bad: Sequence[tuple[str, str, str]], positions: Sequence[int]) -> list[BadSample]:
    """Return the bad samples that were met during a micro-batch, spread evenly over its positions.

    In a stream no position belongs to a bad sample, but the limits of the run count positions.

    Args:
        bad: Tar, key and reason of each.
        positions: Positions of the micro-batch.
    """
    return [BadSample(positions[i * len(positions) // len(bad)], *sample) for i, sample in enumerate(bad)]


def _is_read(member: str) -> bool:
    """Return whether the content of a tar's member is needed."""
    return member.rpartition("/")[2].partition(".")[2].lower() in READ_EXTENSIONS
