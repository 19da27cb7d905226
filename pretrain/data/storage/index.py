"""The index format: one JSON file per tar with the position of every sample, and one `dataset.json` per split.

With the index, a sample is read by offset in any order, and verified by its checksum.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.data.storage.remote import is_remote
from pretrain.errors import DataError
from pretrain.files import atomic_write

FORMAT_VERSION = 3
DATASET_FILE = "dataset.json"
LEFT_OUT_FILE = "left_out.txt"  # one line for each image that could not be used
NO_LABEL = -1
SAMPLE_COLUMNS = ("key", "extension", "offset", "size", "crc32", "label", "width", "height")
SHARD_COLUMNS = ("name", "num_samples", "num_bytes", "sha256", "index_bytes", "index_sha256")


@dataclass
class ShardIndex:
    """The samples of one tar in columns, in the order of the tar.

    Attributes:
        name: File name or URL of the tar.
        num_bytes: Size of the tar.
        sha256: SHA-256 of the tar, in hexadecimal.
        key: Key of each sample.
        extension: File name extension of each image.
        offset: Position of each encoded image in the tar, in bytes.
        size: Length of each encoded image, in bytes.
        crc32: CRC-32 of each encoded image.
        label: Label of each sample, NO_LABEL if the samples have none.
        width: Width of each decoded image, in pixels.
        height: Height of each decoded image, in pixels.
    """

    name: str
    num_bytes: int = 0
    sha256: str = ""
    key: list[str] = field(default_factory=list)
    extension: list[str] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    width: list[int] = field(default_factory=list)
    height: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.key)

    def append(
        self, key: str, extension: str, offset: int, size: int, crc32: int, label: int, width: int, height: int
    ) -> None:
        """Add a sample; the arguments are its values in the columns of the same names."""
        self.key.append(key)
        self.extension.append(extension)
        self.offset.append(offset)
        self.size.append(size)
        self.crc32.append(crc32)
        self.label.append(label)
        self.width.append(width)
        self.height.append(height)

    def drop(self, rows: Sequence[int]) -> None:
        """Remove samples from the index."""
        kept = sorted(set(range(len(self))).difference(rows))
        for name in SAMPLE_COLUMNS:
            setattr(self, name, [getattr(self, name)[row] for row in kept])

    def describe_tar(self, num_bytes: int, sha256: str) -> None:
        """Set the size and the hash of the tar, which are known once all of it has been read or written."""
        self.num_bytes, self.sha256 = num_bytes, sha256

    def save(self, folder: Path) -> "ShardEntry":
        """Write the index into the folder of `dataset.json` and return the entry for `dataset.json`."""
        size, digest = write_json(folder / index_name(self.name), {"version": FORMAT_VERSION, **asdict(self)})
        return ShardEntry(self.name, len(self), self.num_bytes, self.sha256, size, digest)

    @classmethod
    def parse(cls, data: bytes, path: Path | str, digest: str) -> "ShardIndex":
        """Parse the content of an index file and verify its checksum.

        Args:
            data: Content of the file.
            path: Path or URL of the file, for error messages.
            digest: SHA-256 of the file according to `dataset.json`.

        Raises:
            DataError: If the checksum differs.
        """
        if hashlib.sha256(data).hexdigest() != digest:
            raise DataError(
                f"{path}: damaged or edited, its checksum is not the one in {DATASET_FILE}; "
                "run `vitrail shards index` again"
            )
        return cls(**_parse(data, path))


@dataclass(frozen=True)
class ShardEntry:
    """The entry of one shard in `dataset.json`.

    Attributes:
        name: Path of the tar relative to its folder, or its URL.
        num_samples: Number of samples in the shard.
        num_bytes: Size of the tar.
        sha256: SHA-256 of the tar, in hexadecimal.
        index_bytes: Size of the index file.
        index_sha256: SHA-256 of the index file, in hexadecimal.
    """

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`: the classes and shards of one split.

    Attributes:
        class_names: Name of each class, in the order of the labels; empty if the samples have no labels.
        class_counts: Number of samples of each class.
        shards: Entry of each shard.
        tar_folders: Folder of the tars, if they are not next to `dataset.json`: its path relative to that, for tars
            that are moved together with their index, and its absolute path, for an index that is moved alone.
    """

    class_names: list[str]
    class_counts: list[int]
    shards: list[ShardEntry]
    tar_folders: list[str] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Total size of all tars, in bytes."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 over the class names and the content and labels of every shard, but not over where the set is."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for shard in self.shards:
            digest.update(f"{shard.num_samples} {shard.sha256} {shard.index_sha256}\n".encode())
        return digest.hexdigest()

    def find_tars(self, place: str) -> str:
        """Return the folder or URL of the tars.

        Args:
            place: Folder or URL of this `dataset.json`.

        Raises:
            DataError: If the tars are no longer where they were when they were indexed.
        """
        if not self.tar_folders or not self.shards:
            return place
        folders = [Path(place).resolve() / folder for folder in self.tar_folders]
        for folder in folders:
            if folder.is_dir() and any((folder / shard.name).exists() for shard in self.shards):
                return os.path.normpath(folder)
        raise DataError(
            f"{place}/{DATASET_FILE}: its tars are not in {folders[-1]}; mount that folder, or index the tars where "
            f"they are now: `vitrail shards index TARS --out {place}`"
        )

    def tar_paths(self, place: str) -> list[str]:
        """Return the path or URL of every tar.

        Args:
            place: Folder or URL of this `dataset.json`.

        Raises:
            DataError: If the tars are no longer where they were when they were indexed.
        """
        folder = self.find_tars(place)
        return [shard.name if is_remote(shard.name) else f"{folder}/{shard.name}" for shard in self.shards]

    def save(self, folder: Path) -> None:
        """Write `dataset.json` into a folder."""
        sums = {"num_samples": self.num_samples, "num_bytes": self.num_bytes, "digest": self.digest}
        shards = {name: [getattr(shard, name) for shard in self.shards] for name in SHARD_COLUMNS}
        classes = {"class_names": self.class_names, "class_counts": self.class_counts}
        located = {"tar_folders": self.tar_folders} if self.tar_folders else {}
        content = {"version": FORMAT_VERSION, **sums, **classes, **located, "shards": shards}
        write_json(folder / DATASET_FILE, {**content, "sha256": _sha256_of(content)}, durable=True)

    @classmethod
    def load(cls, folder: Path) -> "DatasetInfo":
        """Read the `dataset.json` of a folder and verify its checksum.

        Raises:
            DataError: If there is no `dataset.json`.
        """
        path = folder / DATASET_FILE
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{path}: does not exist; `vitrail shards make` writes it for new shards, "
                "`vitrail shards index` for existing tars"
            ) from None
        return cls.parse(data, path)

    @classmethod
    def parse(cls, data: bytes, path: Path | str) -> "DatasetInfo":
        """Parse the content of `dataset.json` and verify its checksum.

        Args:
            data: Content of the file.
            path: Path or URL of the file, for error messages.

        Raises:
            DataError: If the file is damaged, edited by hand or of another version.
        """
        content = _parse(data, path)
        try:
            expected, actual = content.pop("sha256"), _sha256_of({"version": FORMAT_VERSION, **content})
            columns = content.pop("shards")
            shards = [ShardEntry(*entry) for entry in zip(*(columns[name] for name in SHARD_COLUMNS), strict=True)]
            info = cls(content["class_names"], content["class_counts"], shards, content.get("tar_folders", []))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: damaged ({error!r}); run `vitrail shards index` to write it again") from None
        if expected != actual:
            raise DataError(
                f"{path}: damaged or edited by hand, its checksum is wrong; "
                "run `vitrail shards index` to write it again"
            )
        return info


def _sha256_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def index_name(tar: str) -> str:
    """Return the file name of a shard's index; it is next to `dataset.json`, even if the tar is elsewhere.

    Args:
        tar: File name or URL of the tar.
    """
    return Path(tar.partition("?")[0]).with_suffix(".index.json").name


def _parse(data: bytes, path: Path | str) -> dict[str, Any]:
    """Parse one of the two JSON files and check its version."""
    try:
        content: dict[str, Any] = json.loads(data)
        version = content.pop("version", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); run `vitrail shards index` to write it again") from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {version}, but this Vitrail reads version {FORMAT_VERSION}; "
            "run `vitrail shards index` to write it again"
        )
    return content


def write_json(path: Path, content: dict[str, Any], *, durable: bool = False) -> tuple[int, str]:
    """Write a JSON file atomically; return its size in bytes and its SHA-256.

    Args:
        path: File to write.
        content: JSON object.
        durable: Whether to flush the file to the disk. Most callers can detect and rewrite a file that a power failure
            left empty.
    """
    data = (json.dumps(content, separators=(",", ":")) + "\n").encode()
    atomic_write(path, data, durable=durable)
    return len(data), hashlib.sha256(data).hexdigest()
