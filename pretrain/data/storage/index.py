"""What stands beside a tar: an index of its samples; and over all tars of a split: `dataset.json`.

Both are JSON that a stranger can open. With them a sample is read by offset, in any order, and proved by checksum.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.errors import DataError

VERSION = 3
DATASET_FILE = "dataset.json"
NO_LABEL = -1
SHARD_COLUMNS = ("name", "num_samples", "num_bytes", "sha256", "index_bytes", "index_sha256")


@dataclass
class ShardIndex:
    """The samples of one tar, column by column, in the order of the tar.

    `offset` and `size` (bytes) find the encoded image in the tar, `crc32` proves it; `width` and `height` (pixels) are
    the decoded image's.
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
        """Add a sample."""
        self.key.append(key)
        self.extension.append(extension)
        self.offset.append(offset)
        self.size.append(size)
        self.crc32.append(crc32)
        self.label.append(label)
        self.width.append(width)
        self.height.append(height)

    def save(self, folder: Path) -> "ShardEntry":
        """Write the index into the folder of `dataset.json`; return what that has to know of it and its tar."""
        size, digest = write_json(folder / index_name(self.name), {"version": VERSION, **asdict(self)})
        return ShardEntry(self.name, len(self), self.num_bytes, self.sha256, size, digest)

    @classmethod
    def parse(cls, data: bytes, place: Path | str, digest: str) -> "ShardIndex":
        """Read an index from its bytes, which must have the sha256 that `dataset.json` promises.

        Raises:
            DataError: they have another.
        """
        if hashlib.sha256(data).hexdigest() != digest:
            raise DataError(f"{place}: damaged or edited, its checksum is off; run `vitrail shards index` again")
        return cls(**_parse(data, place))


@dataclass(frozen=True)
class ShardEntry:
    """A shard as `dataset.json` knows it; `name` is relative to it, or a whole URL."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """One split: its classes in the order of their labels, and its shards."""

    class_names: list[str]
    class_counts: list[int]
    shards: list[ShardEntry]

    @property
    def num_samples(self) -> int:
        """Dataset over all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """A digest of the classes and of every shard's content, labels included; not of where the shards stand."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for shard in self.shards:
            digest.update(f"{shard.num_samples} {shard.sha256} {shard.index_sha256}\n".encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write `dataset.json`."""
        sums = {"num_samples": self.num_samples, "num_bytes": self.num_bytes, "digest": self.digest}
        shards = {name: [getattr(shard, name) for shard in self.shards] for name in SHARD_COLUMNS}
        classes = {"class_names": self.class_names, "class_counts": self.class_counts}
        content = {"version": VERSION, **sums, **classes, "shards": shards}
        write_json(folder / DATASET_FILE, {**content, "sha256": _sha256_of(content)})

    @classmethod
    def load(cls, folder: Path) -> "DatasetInfo":
        """Read `dataset.json`, which must have the checksum that it promises of itself."""
        path = folder / DATASET_FILE
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: not there; `vitrail shards make` writes it") from None
        return cls.parse(data, path)

    @classmethod
    def parse(cls, data: bytes, place: Path | str) -> "DatasetInfo":
        """Read `dataset.json` from its bytes.

        Raises:
            DataError: damaged, edited by hand, or of another version.
        """
        content = _parse(data, place)
        try:
            promised, found = content.pop("sha256"), _sha256_of({"version": VERSION, **content})
            columns = content.pop("shards")
            shards = [ShardEntry(*entry) for entry in zip(*(columns[name] for name in SHARD_COLUMNS), strict=True)]
            info = cls(content.pop("class_names"), content.pop("class_counts"), shards)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place}: damaged ({error!r}); write it again with `vitrail shards index`") from None
        if promised != found:
            raise DataError(f"{place}: damaged or edited by hand, its checksum is off; run `vitrail shards index`")
        return info


def _sha256_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def index_name(tar: str) -> str:
    """Return the name of a shard's index in the folder of `dataset.json`, wherever the shard itself stands."""
    return Path(tar.partition("?")[0]).with_suffix(".index.json").name


def _parse(data: bytes, place: Path | str) -> dict[str, Any]:
    """Read one of our JSON files."""
    try:
        content: dict[str, Any] = json.loads(data)
        version = content.pop("version", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{place}: damaged ({error}); write it again with `vitrail shards index`") from None
    if version != VERSION:
        raise DataError(f"{place}: version {version}, this Vitrail reads {VERSION}; run `vitrail shards index` again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> tuple[int, str]:
    """Write aside, then rename, so that nobody reads half a file; return the bytes written and their sha256."""
    aside = path.with_name(path.name + ".partial")
    data = (json.dumps(content, separators=(",", ":")) + "\n").encode()
    aside.write_bytes(data)
    aside.replace(path)
    return len(data), hashlib.sha256(data).hexdigest()
