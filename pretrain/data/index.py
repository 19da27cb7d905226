"""What stands beside a tar: an index of its samples; and over all tars of a split: `dataset.json`.

Both are JSON that a stranger can open. With them a sample is read by offset, in any order, and proved by checksum.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain import UserError

VERSION = 1
DATASET_FILE = "dataset.json"


class DataError(UserError):
    """Data that cannot be used as it is: the message names it and the fix."""


@dataclass
class ShardIndex:
    """The samples of one tar, column by column, in the order of the tar.

    `offset` and `size` (bytes) find the encoded image in the tar, `crc32` proves it.
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

    def __len__(self) -> int:
        return len(self.key)

    def save(self, folder: Path) -> None:
        """Write the index beside its tar."""
        write_json(index_path(folder / self.name), {"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, tar: Path) -> "ShardIndex":
        """Read the index beside `tar`."""
        return cls(**read_json(index_path(tar), "tessera shards index"))


@dataclass(frozen=True)
class ShardEntry:
    """A shard as `dataset.json` knows it."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """One split: its classes in the order of their labels, and its shards."""

    class_names: list[str]
    class_counts: list[int]
    shards: list[ShardEntry]

    @property
    def num_samples(self) -> int:
        """Samples over all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """A digest of the classes and of every shard's content."""
        content = json.dumps([self.class_names, [(s.name, s.num_samples, s.sha256) for s in self.shards]])
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `dataset.json`."""
        sums = {"num_samples": self.num_samples, "num_bytes": self.num_bytes, "digest": self.digest}
        write_json(folder / DATASET_FILE, {"version": VERSION, **sums, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> "DatasetInfo":
        """Read `dataset.json` and hold its digest against its content."""
        content = read_json(folder / DATASET_FILE, "tessera shards make")
        digest = content.pop("digest")
        for name in ("num_samples", "num_bytes"):
            content.pop(name)
        shards = [ShardEntry(**shard) for shard in content.pop("shards")]
        info = cls(shards=shards, **content)
        if info.digest != digest:
            raise DataError(f"{folder / DATASET_FILE}: edited by hand, its digest is off; run `tessera shards index`")
        return info

    @classmethod
    def of(cls, indexes: Sequence[ShardIndex], class_names: Sequence[str]) -> "DatasetInfo":
        """Sum up the indexes of a split."""
        counts = [0] * len(class_names)
        for index in indexes:
            for label in index.label:
                counts[label] += 1
        shards = [ShardEntry(index.name, len(index), index.num_bytes, index.sha256) for index in indexes]
        return cls(list(class_names), counts, shards)


def index_path(tar: Path) -> Path:
    """Return where the index of `tar` stands."""
    return tar.with_suffix(".index.json")


def read_json(path: Path, maker: str) -> dict[str, Any]:
    """Read one of our JSON files; `maker` is the command that writes it."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: not there; `{maker}` writes it") from None
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); write it again with `tessera shards index`") from None
    version = content.pop("version", None)
    if version != VERSION:
        raise DataError(f"{path}: version {version}, this Tessera reads {VERSION}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write aside, then rename, so that nobody reads half a file."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    aside.replace(path)
