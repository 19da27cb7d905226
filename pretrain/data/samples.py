"""Labelled images that can be read one by one: shard sets, a mix of them, or a folder with a subfolder a class."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from pretrain.data.decode import DecodeError, Pixels, decode
from pretrain.data.fetch import read_range
from pretrain.data.index import DATASET_FILE, DataError, DatasetInfo, ShardIndex, index_name
from pretrain.data.order import Order, Part, permutation
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


def open_samples(paths: Path | list[Path], weights: Sequence[float] | None = None) -> Samples:
    """Open a shard set or a folder of images; several sets become one, or are mixed by weight.

    Raises:
        DataError: nothing usable at a path, or the sets' classes differ.
    """
    folders = paths if isinstance(paths, list) else [paths]
    if not folders:
        raise DataError("no data: the list of paths is empty")
    if weights is not None and len(weights) != len(folders):
        raise DataError(f"{len(weights)} weights for {len(folders)} sets; expected one for each")
    is_plain = len(folders) == 1 and not (folders[0] / DATASET_FILE).exists()
    samples = _open_folder(folders[0]) if is_plain else ShardSet(folders, weights)
    for part, folder in zip(samples.parts, folders, strict=False):
        if not sum(part.shard_sizes):
            raise DataError(f"{folder}: holds no samples")
    return samples


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

    def __init__(self, folders: Sequence[Path], weights: Sequence[float] | None = None) -> None:
        infos = [DatasetInfo.load(folder) for folder in folders]
        self.class_names = infos[0].class_names
        for folder, info in zip(folders, infos, strict=True):
            if info.class_names != self.class_names:
                raise DataError(f"{folder}: its classes differ from those of {folders[0]}")
        self.entries = [shard for info in infos for shard in info.shards]
        self.folders = [folder for folder, info in zip(folders, infos, strict=True) for _ in info.shards]
        self.parts = [Part(info.digest, [shard.num_samples for shard in info.shards]) for info in infos]
        if weights is None:
            digest = "+".join(part.digest for part in self.parts)
            self.parts = [Part(digest, [shard.num_samples for shard in self.entries])]
        else:
            self.weights = tuple(weights)
        self._index = lru_cache(maxsize=INDEXES_IN_MEMORY)(self._load_index)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_index"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._index = lru_cache(maxsize=INDEXES_IN_MEMORY)(self._load_index)

    def fetch(self, shard: int, row: int) -> Encoded:
        tar = self.folders[shard] / self.entries[shard].name
        try:
            index = self._index(shard)
        except DataError as error:
            raise BadSampleError(str(tar), f"at row {row}", str(error)) from None
        key, size, label = index.key[row], index.size[row], index.label[row]
        try:
            data = read_range(tar, index.offset[row], size)
        except OSError as error:
            raise BadSampleError(str(tar), key, f"cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise BadSampleError(str(tar), key, f"truncated: the shard should have {index.num_bytes} bytes")
        if crc32(data) != index.crc32[row]:
            raise BadSampleError(str(tar), key, "damaged: its checksum is off")
        if not 0 <= label < len(self.class_names) and self.class_names:
            raise BadSampleError(
                str(tar), key, f"label {label} is out of range: there are {len(self.class_names)} classes"
            )
        return Encoded(str(tar), key, data, label)

    def labels(self, shard: int) -> Sequence[int]:
        return self._index(shard).label

    def _load_index(self, shard: int) -> ShardIndex:
        path = self.folders[shard] / index_name(self.entries[shard].name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: not there; `tessera shards index` writes it") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        return ShardIndex.parse(data, path, self.entries[shard].index_sha256)


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
