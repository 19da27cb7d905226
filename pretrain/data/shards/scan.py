"""Index tars that someone else wrote, as WebDataset reads them: members that share a key are one sample."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from pretrain.data.shards.keys import Digests, digest_keys, find_repeated
from pretrain.data.shards.units import run_units
from pretrain.data.sources.source import NAMES_SHOWN
from pretrain.data.storage.archive import TarReader, open_tar
from pretrain.data.storage.index import NO_LABEL, DatasetInfo, ShardEntry, ShardIndex, index_name
from pretrain.data.storage.remote import FetchPolicy, is_remote
from pretrain.data.storage.webdataset import image_of, label_of, metadata_of, name_classes, samples_of
from pretrain.data.transforms.decode import DecodeError, decode
from pretrain.errors import DataError


@dataclass
class Scanned:
    """What `index_shards` found."""

    info: DatasetInfo
    remarks: list[str] = field(default_factory=list)


@dataclass
class _Indexed:
    """What one tar has to say beyond its index: digests of its keys, its classes, members that we do not use."""

    entry: ShardEntry
    keys: Digests
    class_counts: Counter[int]
    class_names: dict[int, str]
    left_out: Counter[str]


Engine = Callable[[Callable[[str], _Indexed], Iterable[str]], Generator[_Indexed, None, None]]


def index_shards(
    tars: Sequence[str],
    out: Path,
    class_names: Sequence[str] | None = None,
    label_key: str | None = "label",
    policy: FetchPolicy | None = None,
    engine: Engine = run_units,
    progress: Callable[[int], None] = lambda _: None,
) -> Scanned:
    """Write an index of each tar and `dataset.json` into a folder.

    Args:
        tars: shards of one split, as `dataset.json` will name them: by their names in the folder, or by their URLs.
        out: the folder.
        class_names: in the order of the labels; else taken from the samples' JSON ("class"), else the labels' numbers.
        label_key: the JSON key of the label where a sample has no `cls`; None when the samples have no labels.
        policy: how patient to be with remote tars.
        engine: runs the units of work, a tar each.
        progress: called with 1 after each tar.

    Raises:
        DataError: a damaged tar, an unreadable image, a duplicate key, no image or label, a label out of range.
    """
    entries: list[ShardEntry] = []
    keys: list[Digests] = []
    counts: Counter[int] = Counter()
    found: dict[int, str] = {}
    left_out: Counter[str] = Counter()
    with closing(engine(partial(_index_tar, out, label_key, policy or FetchPolicy()), tars)) as results:
        for indexed in results:
            entries.append(indexed.entry)
            keys.append(indexed.keys)
            counts.update(indexed.class_counts)
            found |= indexed.class_names
            left_out.update(indexed.left_out)
            progress(1)
    if not counts:
        raise DataError(f"{out}: the tars hold no samples")
    _refuse_repeated(out, entries, keys)
    names = name_classes(max(counts), class_names, found) if label_key else []
    info = DatasetInfo(names, [counts[label] for label in range(len(names))], entries)
    info.save(out)
    remarks = [f"{count} {what}, left as they are" for what, count in left_out.items()]
    if empty := [name for name, count in zip(info.class_names, info.class_counts, strict=True) if not count]:
        remarks.append(f"{len(empty)} classes without samples: {', '.join(empty[:NAMES_SHOWN])}")
    return Scanned(info, remarks)


def _refuse_repeated(out: Path, entries: Sequence[ShardEntry], keys: Sequence[Digests]) -> None:
    for (shard, row), (first, _) in find_repeated(keys):
        path = out / index_name(entries[shard].name)
        key = ShardIndex.parse(path.read_bytes(), path, entries[shard].index_sha256).key[row]
        raise DataError(
            f"{entries[shard].name}: the key {key} is also in {entries[first].name}; keys must be unique over a split"
        )


def _index_tar(out: Path, label_key: str | None, policy: FetchPolicy, name: str) -> _Indexed:
    """Read a tar from front to back and write its index."""
    index, left_out, found = ShardIndex(name), Counter[str](), dict[int, str]()
    with open_tar(name if is_remote(name) else str(out / name), policy) as stream:
        archive = TarReader(name, stream)
        for key, members in samples_of(archive, left_out):
            extension, image = image_of(name, key, members)
            height, width = _size(name, key, image.data)
            metadata = metadata_of(name, key, members.get("json"))
            label = label_of(name, key, members.get("cls"), metadata, label_key) if label_key else NO_LABEL
            if isinstance(metadata.get("class"), str):
                found[label] = metadata["class"]
            index.append(key, extension, image.offset, image.size, crc32(image.data), label, width, height)
            left_out.update(f"members .{other}" for other in members.keys() - {extension, "cls", "json"})
    index.num_bytes, index.sha256 = archive.num_bytes, archive.sha256
    return _Indexed(index.save(out), digest_keys(index.key), Counter(index.label), found, left_out)


def _size(tar: str, key: str, data: bytes) -> tuple[int, int]:
    """Return (height, width) of an image that has proved to decode."""
    try:
        height, width, _ = decode(data).shape
    except DecodeError as error:
        raise DataError(f"{tar}: sample {key} is no usable image: {error}") from None
    return height, width
