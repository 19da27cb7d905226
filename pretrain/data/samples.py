"""Labelled images that can be read one by one: shard sets, a mix of them, or a folder with a subfolder a class."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from pretrain.config import SourceConfig
from pretrain.data.cache import Cache, RemoteObject
from pretrain.data.decode import DecodeError, Pixels, decode
from pretrain.data.fetch import read_range
from pretrain.data.index import DATASET_FILE, DataError, DatasetInfo, ShardIndex, index_name
from pretrain.data.order import Order, Part, permutation
from pretrain.data.remote import (
    FetchPolicy,
    MissingObjectError,
    StalledFetchError,
    expand_braces,
    fetch_bytes,
    is_remote,
)
from pretrain.data.sources import SourceImage, list_folder

INDEXES_IN_MEMORY = 256


class Encoded(NamedTuple):
    """One sample as it is stored, proved by its checksum."""

    shard: str
    key: str
    data: bytes
    label: int


class Record(NamedTuple):
    """One sample: its name, its pixels [height, width, 3] and its class."""

    key: str
    image: Pixels
    label: int


class BadSampleError(DataError):
    """A sample that cannot be used, though its set can: which one, and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: sample {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return BadSampleError, (self.shard, self.key, self.reason)


class Samples(ABC):
    """Images in shards; what the order and the loader need to know of any data."""

    class_names: list[str]
    parts: list[Part]
    weights: Sequence[float] = (1.0,)

    @abstractmethod
    def fetch(self, shard: int, row: int) -> Encoded:
        """Read one sample's bytes.

        Raises:
            BadSampleError: they are not there, or not what was promised.
        """

    @abstractmethod
    def labels(self, shard: int) -> Sequence[int]:
        """Return the label of every row of a shard."""

    @property
    def shard_sizes(self) -> list[int]:
        """Samples in each shard, over all sets."""
        return [size for part in self.parts for size in part.shard_sizes]

    @property
    def digest(self) -> str:
        """What the order depends on: the sets' content and, where they are mixed, their weights."""
        if len(self.parts) == 1:
            return self.parts[0].digest
        content = json.dumps([[part.digest for part in self.parts], list(self.weights)])
        return hashlib.sha256(content.encode()).hexdigest()

    def expect(  # noqa: B027  # most have no use for it
        self, distance: Callable[[int], float], upcoming: Callable[[], Iterable[int]]
    ) -> None:
        """Hear what will be read: how far ahead a shard is, and which come next; what is local does not care."""

    def check_room(self, window: int) -> None:  # noqa: B027
        """Make sure that what is remote can be kept while it is read."""

    def take_counts(self) -> dict[str, int]:
        """Return what the cache has done for this process since the last call; nothing where there is none."""
        return {}

    def order(self, seed: int, window: int) -> Order:
        """Return the order of a run over these samples."""
        return Order(self.parts, seed, window, self.weights)

    def read(self, shard: int, row: int) -> Record:
        """Read and decode one sample.

        Raises:
            BadSampleError: it cannot be used.
        """
        return decoded(self.fetch(shard, row))


def decoded(encoded: Encoded) -> Record:
    """Decode a sample.

    Raises:
        BadSampleError: it is no usable image.
    """
    try:
        return Record(encoded.key, decode(encoded.data), encoded.label)
    except DecodeError as error:
        raise BadSampleError(encoded.shard, encoded.key, f"no usable image: {error}") from None


def open_samples(
    names: str | Path | Sequence[str | Path], weights: Sequence[float] | None = None, cache: Cache | None = None
) -> Samples:
    """Open a shard set or a folder of images; several sets become one, or are mixed by weight.

    Args:
        names: paths or URLs; braces are expanded.
        weights: how often each set is drawn; without them several sets are one.
        cache: where remote shards are kept.

    Raises:
        DataError: nothing usable at a path, or the sets' classes differ.
    """
    given = [names] if isinstance(names, str | Path) else names
    places = [place for name in given for place in expand_braces(str(name))]
    if not places:
        raise DataError("no data: the list of paths is empty")
    if weights is not None and len(weights) != len(places):
        raise DataError(f"{len(weights)} weights for {len(places)} sets; expected one for each")
    first = Path(places[0])
    is_plain = len(places) == 1 and not is_remote(places[0]) and not (first / DATASET_FILE).exists()
    samples = _open_folder(first) if is_plain else ShardSet(places, weights, cache)
    for part, place in zip(samples.parts, places, strict=False):
        if not sum(part.shard_sizes):
            raise DataError(f"{place}: holds no samples")
    return samples


def open_cache(config: SourceConfig) -> Cache:
    """Return the node's cache as a run's config describes it; nothing is made until something remote is read."""
    policy = FetchPolicy(
        request_seconds=min(config.stall_seconds, FetchPolicy.request_seconds),
        stall_seconds=config.stall_seconds,
        allow_pipe=config.allow_pipe,
    )
    return Cache(config.cache_dir, config.cache_bytes, policy)


def _open_folder(folder: Path) -> "FolderSet":
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with a {DATASET_FILE}, or with a subfolder a class")
    if list(folder.glob("*.tar")):
        raise DataError(f"{folder}: tars without a {DATASET_FILE}; run `tessera shards index {folder}` first")
    if (folder / "train" / DATASET_FILE).exists():
        raise DataError(f"{folder}: holds several splits; name one, as in {folder / 'train'}")
    return FolderSet(folder)


class ShardSet(Samples):
    """The shards of one or more sets: one after the other as if they were one set, or mixed by weight."""

    def __init__(
        self, places: Sequence[str], weights: Sequence[float] | None = None, cache: Cache | None = None
    ) -> None:
        self.cache = cache
        infos = [self._load_info(place) for place in places]
        self.class_names = infos[0].class_names
        for place, info in zip(places, infos, strict=True):
            if info.class_names != self.class_names:
                raise DataError(f"{place}: its classes differ from those of {places[0]}")
        self.entries = [shard for info in infos for shard in info.shards]
        self.places = [place for place, info in zip(places, infos, strict=True) for _ in info.shards]
        self.parts = [Part(info.digest, [shard.num_samples for shard in info.shards]) for info in infos]
        if weights is None:
            digest = "+".join(part.digest for part in self.parts)
            self.parts = [Part(digest, [shard.num_samples for shard in self.entries])]
        else:
            self.weights = tuple(weights)
        self.index = lru_cache(maxsize=INDEXES_IN_MEMORY)(self._load_index)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "index"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.index = lru_cache(maxsize=INDEXES_IN_MEMORY)(self._load_index)

    def fetch(self, shard: int, row: int) -> Encoded:
        tar = self._tar(shard)
        try:
            index = self.index(shard)
        except StalledFetchError:
            raise
        except DataError as error:
            raise BadSampleError(tar.url, f"at row {row}", str(error)) from None
        key, size, label = index.key[row], index.size[row], index.label[row]
        data = self._read(tar, key, index.offset[row], size)
        if len(data) < size:
            raise BadSampleError(tar.url, key, f"truncated: the shard should have {index.num_bytes} bytes")
        if crc32(data) != index.crc32[row]:
            raise BadSampleError(tar.url, key, "damaged: its checksum is off")
        if not 0 <= label < len(self.class_names) and self.class_names:
            raise BadSampleError(
                tar.url, key, f"label {label} is out of range: there are {len(self.class_names)} classes"
            )
        return Encoded(tar.url, key, data, label)

    def labels(self, shard: int) -> Sequence[int]:
        return self.index(shard).label

    def expect(self, distance: Callable[[int], float], upcoming: Callable[[], Iterable[int]]) -> None:
        if self.cache is None or not any(is_remote(self._tar(shard).url) for shard in range(len(self.entries))):
            return
        shards = {entry.index_sha256: shard for shard, entry in enumerate(self.entries)}
        shards |= {entry.sha256: shard for shard, entry in enumerate(self.entries)}
        self.cache.distance = lambda sha256: distance(shards[sha256]) if sha256 in shards else inf
        self.cache.prefetch(lambda: chain.from_iterable(map(self._remote, upcoming())))

    def check_room(self, window: int) -> None:
        """Make sure that the cache can hold the shards of two windows, the one being read and the next.

        Raises:
            DataError: it cannot.
        """
        remote = sorted(sum(wanted.num_bytes for wanted in self._remote(i)) for i in range(len(self.entries)))
        needed = sum(remote[-2 * window :])
        if self.cache is not None and needed > self.cache.limit_bytes:
            raise DataError(
                f"data.cache_bytes: {self.cache.limit_bytes} bytes cannot hold two windows of {window} shards, "
                f"{needed} bytes; raise it, or lower data.shuffle_window"
            )

    def take_counts(self) -> dict[str, int]:
        return self.cache.take_counts() if self.cache else {}

    def _tar(self, shard: int) -> RemoteObject:
        """Return where a shard stands and what it must be, remote or not."""
        entry, place = self.entries[shard], self.places[shard]
        name = entry.name if is_remote(entry.name) else f"{place}/{entry.name}"
        return RemoteObject(name, entry.sha256, entry.num_bytes)

    def _index_file(self, shard: int) -> RemoteObject:
        entry = self.entries[shard]
        return RemoteObject(f"{self.places[shard]}/{index_name(entry.name)}", entry.index_sha256, entry.index_bytes)

    def _remote(self, shard: int) -> list[RemoteObject]:
        """Return what a cache has to hold of a shard."""
        return [wanted for wanted in (self._index_file(shard), self._tar(shard)) if is_remote(wanted.url)]

    def _read(self, tar: RemoteObject, key: str, offset: int, size: int) -> bytes:
        try:
            if is_remote(tar.url):
                return self._cached(tar.url).read_range(tar, offset, size)
            return read_range(Path(tar.url), offset, size)
        except OSError as error:
            raise BadSampleError(tar.url, key, f"cannot be read: {error.strerror}") from None
        except MissingObjectError as error:
            raise BadSampleError(tar.url, key, str(error)) from None

    def _load_info(self, place: str) -> DatasetInfo:
        if not is_remote(place):
            return DatasetInfo.load(Path(place))
        url = f"{place}/{DATASET_FILE}"
        return DatasetInfo.parse(fetch_bytes(url, self._cached(url).policy), url)

    def _load_index(self, shard: int) -> ShardIndex:
        wanted = self._index_file(shard)
        if is_remote(wanted.url):
            data = self._cached(wanted.url).read_range(wanted, 0, wanted.num_bytes)
        else:
            try:
                data = Path(wanted.url).read_bytes()
            except FileNotFoundError:
                raise DataError(f"{wanted.url}: not there; `tessera shards index` writes it") from None
            except OSError as error:
                raise DataError(f"{wanted.url}: cannot be read: {error.strerror}") from None
        return ShardIndex.parse(data, wanted.url, wanted.sha256)

    def _cached(self, url: str) -> Cache:
        if self.cache is None:
            raise DataError(f"{url}: a remote set needs a cache; give open_samples one")
        return self.cache


class FolderSet(Samples):
    """A folder with a subfolder for each class, read as one shard."""

    def __init__(self, folder: Path) -> None:
        source = list_folder(folder)
        if source.faults:
            raise DataError("\n".join(f"{folder}: {fault}" for fault in source.faults))
        self.folder = folder
        self.class_names = source.class_names
        self.images: list[SourceImage] = source.images
        content = [(image.origin, (folder / image.origin).stat().st_size) for image in source.images]
        digest = hashlib.sha256(json.dumps([self.class_names, content]).encode()).hexdigest()
        self.parts = [Part(digest, [len(source.images)])]

    def fetch(self, shard: int, row: int) -> Encoded:
        image = self.images[row]
        try:
            return Encoded(str(self.folder), image.origin, image.read(), image.label)
        except OSError as error:
            raise BadSampleError(str(self.folder), image.origin, f"cannot be read: {error}") from None

    def labels(self, shard: int) -> Sequence[int]:
        return [image.label for image in self.images]


class FewLabels(Samples):
    """The same number of samples of each class, drawn by seed: for learning from few labels."""

    def __init__(self, samples: Samples, per_class: int, seed: int) -> None:
        self.samples = samples
        self.class_names = samples.class_names
        sizes = samples.shard_sizes
        labels = np.asarray(list(chain.from_iterable(samples.labels(shard) for shard in range(len(sizes)))))
        starts = np.cumsum([0, *sizes])
        chosen: list[int] = []
        for label, name in enumerate(self.class_names):
            rows = np.flatnonzero(labels == label)
            if len(rows) < per_class:
                raise DataError(f"class {name} has {len(rows)} samples, {per_class} labels a class were asked for")
            chosen += sorted(rows[permutation(len(rows), seed, name, "few labels")[:per_class]].tolist())
        shards = np.searchsorted(starts, chosen, side="right") - 1
        self.places = [(int(shard), int(place - starts[shard])) for shard, place in zip(shards, chosen, strict=True)]
        self.parts = [Part(f"{samples.digest}/{per_class} a class/{seed}", [len(self.places)])]

    def fetch(self, shard: int, row: int) -> Encoded:
        return self.samples.fetch(*self.places[row])

    def labels(self, shard: int) -> Sequence[int]:
        return [self.samples.labels(shard)[row] for shard, row in self.places]
