"""Labelled images that can be read one by one: shard sets, or a folder with a subfolder a class."""

import hashlib
import json
import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from pretrain.data.decode import DecodeError, Pixels, decode
from pretrain.data.fetch import read_range
from pretrain.data.index import DATASET_FILE, DataError, DatasetInfo, ShardIndex, index_path
from pretrain.data.order import permutation
from pretrain.data.sources import SourceImage, list_folder

INDEXES_IN_MEMORY = 256


class Record(NamedTuple):
    """One sample: its name, its pixels [height, width, 3] and its class."""

    key: str
    image: Pixels
    label: int


class Samples(Protocol):
    """Images in shards; what the order and the loader need to know of any data."""

    class_names: list[str]
    digest: str
    shard_sizes: list[int]

    def read(self, shard: int, row: int) -> Record:
        """Read and decode one sample."""

    def labels(self, shard: int) -> Sequence[int]:
        """Return the label of every row of a shard."""


def open_samples(paths: Path | list[Path]) -> Samples:
    """Open one shard set, several of the same classes as one, or a folder of images.

    Raises:
        DataError: nothing usable at a path, or the sets' classes differ.
    """
    folders = paths if isinstance(paths, list) else [paths]
    if not folders:
        raise DataError("no data: the list of paths is empty")
    is_plain = len(folders) == 1 and not (folders[0] / DATASET_FILE).exists()
    samples = _open_folder(folders[0]) if is_plain else ShardSet(folders)
    if not sum(samples.shard_sizes):
        raise DataError(f"{folders[0]}: holds no samples")
    return samples


def _open_folder(folder: Path) -> "FolderSet":
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with a {DATASET_FILE}, or with a subfolder a class")
    if list(folder.glob("*.tar")):
        raise DataError(f"{folder}: tars without a {DATASET_FILE}; run `tessera shards index {folder}` first")
    if (folder / "train" / DATASET_FILE).exists():
        raise DataError(f"{folder}: holds several splits; name one, as in {folder / 'train'}")
    return FolderSet(folder)


class ShardSet:
    """The shards of one or more sets, one after the other."""

    def __init__(self, folders: Sequence[Path]) -> None:
        infos = [DatasetInfo.load(folder) for folder in folders]
        self.class_names = infos[0].class_names
        for folder, info in zip(folders, infos, strict=True):
            if info.class_names != self.class_names:
                raise DataError(f"{folder}: its classes differ from those of {folders[0]}")
        self.digest = "+".join(info.digest for info in infos)
        self.tars = [folder / shard.name for folder, info in zip(folders, infos, strict=True) for shard in info.shards]
        self.entries = [shard for info in infos for shard in info.shards]
        self.shard_sizes = [shard.num_samples for shard in self.entries]
        self._index = lru_cache(maxsize=INDEXES_IN_MEMORY)(self._load_index)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_index"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._index = lru_cache(maxsize=INDEXES_IN_MEMORY)(self._load_index)

    def _load_index(self, shard: int) -> ShardIndex:
        path = index_path(self.tars[shard])
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: not there; `tessera shards index` writes it") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        return ShardIndex.parse(data, path, self.entries[shard].index_sha256)

    def read(self, shard: int, row: int) -> Record:
        tar = self.tars[shard]
        index = self._index(shard)
        key, size = index.key[row], index.size[row]
        try:
            data = read_range(tar, index.offset[row], size)
        except OSError as error:
            raise DataError(f"{tar}: cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise DataError(f"{tar}: truncated within sample {key}; `dataset.json` promises {index.num_bytes} bytes")
        if zlib.crc32(data) != index.crc32[row]:
            raise DataError(f"{tar}: sample {key} is damaged: its checksum is off")
        return _decoded(str(tar), key, data, index.label[row])

    def labels(self, shard: int) -> Sequence[int]:
        return self._index(shard).label


class FolderSet:
    """A folder with a subfolder for each class, read as one shard."""

    def __init__(self, folder: Path) -> None:
        source = list_folder(folder)
        if source.faults:
            raise DataError("\n".join(f"{folder}: {fault}" for fault in source.faults))
        self.folder = folder
        self.class_names = source.class_names
        self.images: list[SourceImage] = source.images
        content = [(image.origin, (folder / image.origin).stat().st_size) for image in source.images]
        self.digest = hashlib.sha256(json.dumps([self.class_names, content]).encode()).hexdigest()
        self.shard_sizes = [len(source.images)]

    def read(self, shard: int, row: int) -> Record:
        image = self.images[row]
        try:
            data = image.read()
        except OSError as error:
            raise DataError(f"{self.folder / image.origin}: cannot be read: {error}") from None
        return _decoded(str(self.folder), image.origin, data, image.label)

    def labels(self, shard: int) -> Sequence[int]:
        return [image.label for image in self.images]


class FewLabels:
    """The same number of samples of each class, drawn by seed: for learning from few labels."""

    def __init__(self, samples: Samples, per_class: int, seed: int) -> None:
        self.samples = samples
        self.class_names = samples.class_names
        self.digest = f"{samples.digest}/{per_class} a class/{seed}"
        labels = np.asarray(list(chain.from_iterable(samples.labels(i) for i in range(len(samples.shard_sizes)))))
        starts = np.cumsum([0, *samples.shard_sizes])
        chosen: list[int] = []
        for label, name in enumerate(self.class_names):
            rows = np.flatnonzero(labels == label)
            if len(rows) < per_class:
                raise DataError(f"class {name} has {len(rows)} samples, {per_class} labels a class were asked for")
            chosen += sorted(rows[permutation(len(rows), seed, name, "few labels")[:per_class]].tolist())
        shards = np.searchsorted(starts, chosen, side="right") - 1
        self.places = [(int(shard), int(place - starts[shard])) for shard, place in zip(shards, chosen, strict=True)]
        self.shard_sizes = [len(self.places)]

    def read(self, shard: int, row: int) -> Record:
        return self.samples.read(*self.places[row])

    def labels(self, shard: int) -> Sequence[int]:
        return [self.samples.labels(shard)[row] for shard, row in self.places]


def _decoded(place: str, key: str, data: bytes, label: int) -> Record:
    try:
        return Record(key, decode(data), label)
    except DecodeError as error:
        raise DataError(f"{place}: sample {key} is no usable image: {error}") from None
