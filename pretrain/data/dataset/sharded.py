"""Datasets of indexed shards, local or remote. Every sample is verified by its checksum when it is read."""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import lru_cache
from itertools import chain
from math import inf
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from pretrain.data.dataset.dataset import Dataset, EncodedSample
from pretrain.data.dataset.order import Part
from pretrain.data.sources.source import summarize
from pretrain.data.storage.cache import Cache, CacheError, RemoteObject
from pretrain.data.storage.index import DATASET_FILE, DatasetInfo, ShardIndex, index_name
from pretrain.data.storage.local import read_range
from pretrain.data.storage.remote import FetchPolicy, MissingObjectError, StalledFetchError, fetch_bytes, is_remote
from pretrain.data.storage.tar_set import tar_names
from pretrain.errors import BadSampleError, DataError

INDEXES_IN_MEMORY = 256


def load_info(place: str, policy: FetchPolicy | None = None) -> DatasetInfo:
    """Read the `dataset.json` of a local or remote shard set.

    Args:
        place: Folder or URL of the set.
        policy: Timeouts for a remote set.

    Raises:
        DataError: If the file is missing or damaged.
    """
    if not is_remote(place):
        return DatasetInfo.load(Path(place))
    url = f"{place}/{DATASET_FILE}"
    return DatasetInfo.parse(fetch_bytes(url, policy or FetchPolicy()), url)


def _notes(place: str, info: DatasetInfo) -> list[str]:
    """Return a remark about tars that are next to `dataset.json` but not in it."""
    listed = {shard.name for shard in info.shards}
    others = [] if is_remote(place) else [name for name in tar_names(Path(place)) if name not in listed]
    lines = summarize(others, "tar that its index does not list", "tars that its index does not list")
    return [f"{place}: {line}, not used; index the folder again to use all of its tars" for line in lines]


def _class_shares(infos: Sequence[DatasetInfo], weights: Sequence[float] | None) -> list[float]:
    """Return the share of each class in the concatenation of the sets, or in their mix."""
    counts = np.array([info.class_counts for info in infos], dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    per_set = totals if weights is None else np.array(weights)[:, None]
    shares: list[float] = (per_set / (per_set.sum() or 1.0) * counts / np.maximum(totals, 1)).sum(axis=0).tolist()
    return shares


class ShardDataset(Dataset):
    """The shards of one or more sets, concatenated or mixed by weight.

    Args:
        places: Folder or URL of each set's `dataset.json`, which locates the tars.
        weights: Relative frequency of each set in a mix. If None, the sets are concatenated.
        cache: Cache for remote shards.
        labeled: Whether the labels will be used. If not, sets with different classes lose their labels.

    Raises:
        DataError: If the labels will be used and the sets have different classes, or tars are not where they were.
    """

    def __init__(
        self,
        places: Sequence[str],
        weights: Sequence[float] | None = None,
        cache: Cache | None = None,
        labeled: bool = True,
    ) -> None:
        self.cache = cache
        self.reads_ranges = False
        infos = [load_info(place, self._cached(place).policy if is_remote(place) else None) for place in places]
        self.class_names = infos[0].class_names
        for place, info in zip(places, infos, strict=True):
            if info.class_names != infos[0].class_names:
                if labeled:
                    raise DataError(
                        f"{place}: its class names differ from those of {places[0]}; index or make both with the same "
                        "--class-names file"
                    )
                self.class_names = []
        self.class_shares = _class_shares(infos, weights) if self.class_names else []
        self.entries = [shard for info in infos for shard in info.shards]
        self.notes = [note for place, info in zip(places, infos, strict=True) for note in _notes(place, info)]
        self.tars = [tar for place, info in zip(places, infos, strict=True) for tar in info.tar_paths(place)]
        self.index_places = [place for place, info in zip(places, infos, strict=True) for _ in info.shards]
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

    def fetch(self, shard: int, row: int) -> EncodedSample:
        tar = self._tar(shard)
        try:
            index = self.index(shard)
        except (StalledFetchError, CacheError):
            raise
        except DataError as error:
            raise BadSampleError(tar.url, f"in row {row}", str(error)) from None
        key, size, label = index.key[row], index.size[row], index.label[row]
        data = self._read(tar, key, index.offset[row], size)
        if len(data) < size:
            raise BadSampleError(tar.url, key, f"truncated: the shard should have {index.num_bytes} bytes")
        if crc32(data) != index.crc32[row]:
            raise BadSampleError(tar.url, key, "damaged: its checksum is off")
        known = self.class_of(label) if self.class_names else label
        if known is None:
            raise BadSampleError(
                tar.url, key, f"label {label} is out of range: there are {len(self.class_names)} classes"
            )
        return EncodedSample(tar.url, key, data, known)

    def labels(self, shard: int) -> Sequence[int]:
        labels = self.index(shard).label
        return labels if self.new_labels is None else [self.new_labels[label] for label in labels]

    def set_read_schedule(self, distance: Callable[[int], float], upcoming: Callable[[], Iterable[int]]) -> None:
        if self.cache is None or not any(is_remote(self._tar(shard).url) for shard in range(len(self.entries))):
            return
        shards = {entry.index_sha256: shard for shard, entry in enumerate(self.entries)}
        shards |= {entry.sha256: shard for shard, entry in enumerate(self.entries)}
        self.cache.set_schedule(
            lambda sha256: distance(shards[sha256]) if sha256 in shards else inf,
            lambda: chain.from_iterable(map(self._remote, upcoming())),
        )

    def for_sparse_reads(self) -> Dataset:
        sparse = copy(self)
        sparse.reads_ranges = True
        return sparse

    def check_cache_size(self, window: int) -> None:
        """Check that the cache can hold the remote shards of two shuffle windows, the current and the next one.

        Args:
            window: Number of shards whose samples are shuffled together.

        Raises:
            DataError: If the cache is too small.
        """
        remote = sorted(sum(wanted.num_bytes for wanted in self._remote(i)) for i in range(len(self.entries)))
        needed = sum(remote[-2 * window :])
        if self.cache is not None and needed > self.cache.limit_bytes:
            raise DataError(
                f"data.cache_bytes: {self.cache.limit_bytes} bytes cannot hold two windows of {window} shards, "
                f"{needed} bytes; increase it or decrease data.shuffle_window"
            )

    def take_cache_counts(self) -> dict[str, int]:
        return self.cache.take_counts() if self.cache else {}

    def _tar(self, shard: int) -> RemoteObject:
        """Return the path or URL of a shard with its expected checksum and size."""
        entry = self.entries[shard]
        return RemoteObject(self.tars[shard], entry.sha256, entry.num_bytes)

    def _index_file(self, shard: int) -> RemoteObject:
        entry = self.entries[shard]
        return RemoteObject(
            f"{self.index_places[shard]}/{index_name(entry.name)}", entry.index_sha256, entry.index_bytes
        )

    def _remote(self, shard: int) -> list[RemoteObject]:
        """Return the remote files of a shard: its index, its tar, both or none."""
        return [wanted for wanted in (self._index_file(shard), self._tar(shard)) if is_remote(wanted.url)]

    def _read(self, tar: RemoteObject, key: str, offset: int, size: int) -> bytes:
        try:
            if is_remote(tar.url):
                return self._cached(tar.url).read_range(tar, offset, size, uncached=self.reads_ranges)
            return read_range(Path(tar.url), offset, size)
        except OSError as error:
            raise BadSampleError(tar.url, key, f"cannot be read: {error.strerror}") from None
        except MissingObjectError as error:
            raise BadSampleError(tar.url, key, str(error)) from None

    def _load_index(self, shard: int) -> ShardIndex:
        wanted = self._index_file(shard)
        if is_remote(wanted.url):
            data = self._cached(wanted.url).read_range(wanted, 0, wanted.num_bytes)
        else:
            try:
                data = Path(wanted.url).read_bytes()
            except FileNotFoundError:
                raise DataError(f"{wanted.url}: missing index; create it with `vitrail shards index`") from None
            except OSError as error:
                raise DataError(f"{wanted.url}: cannot be read: {error.strerror}") from None
        return ShardIndex.parse(data, wanted.url, wanted.sha256)

    def _cached(self, url: str) -> Cache:
        if self.cache is None:
            raise DataError(f"{url}: a remote shard set needs a cache; pass one to open_dataset")
        return self.cache
