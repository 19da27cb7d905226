"""Index tars that someone else wrote, as WebDataset reads them: members that share a key are one sample."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from zlib_ng.zlib_ng import crc32

from pretrain.data.decode import DecodeError, decode
from pretrain.data.index import NO_LABEL, DataError, DatasetInfo, ShardIndex, count_classes
from pretrain.data.shards.archive import Archive, Member
from pretrain.data.sources import NAMES_SHOWN

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass
class Scanned:
    """What `index_shards` found."""

    info: DatasetInfo
    remarks: list[str] = field(default_factory=list)


@dataclass
class _Findings:
    """What all tars of a split have in common."""

    names: dict[int, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    seen: dict[str, str] = field(default_factory=dict)


def index_shards(
    tars: Sequence[str | Path],
    out: Path,
    open_tar: Callable[[str], BinaryIO],
    class_names: Sequence[str] | None = None,
    label_key: str | None = "label",
    progress: Callable[[int], None] = lambda _: None,
) -> Scanned:
    """Write an index of each tar and `dataset.json` into a folder.

    Args:
        tars: shards of one split, as `dataset.json` will name them: beside it, or anywhere by their URL.
        out: the folder.
        open_tar: opens a tar by its name, to be read once.
        class_names: in the order of the labels; else taken from the samples' JSON ("class"), else the labels' numbers.
        label_key: the JSON key of the label where a sample has no `cls`; None when the samples have no labels.
        progress: called with 1 after each tar.

    Raises:
        DataError: a damaged tar, an unreadable image, a duplicate key, no image or label, a label out of range.
    """
    found = _Findings()
    indexes = []
    for tar in map(str, tars):
        with open_tar(tar) as stream:
            indexes.append(_index_tar(tar, stream, label_key, found))
        progress(1)
    if not any(len(index) for index in indexes):
        raise DataError(f"{out}: the tars hold no samples")
    labels = [label for index in indexes for label in index.label]
    names = name_classes(labels, class_names, found.names) if label_key else []
    counts = count_classes(labels, len(names))
    info = DatasetInfo(names, counts, [index.save(out) for index in indexes])
    info.save(out)
    remarks = [f"{count} {what}, left as they are" for what, count in found.left_out.items()]
    if empty := [name for name, count in zip(info.class_names, info.class_counts, strict=True) if not count]:
        remarks.append(f"{len(empty)} classes without samples: {', '.join(empty[:NAMES_SHOWN])}")
    return Scanned(info, remarks)


def name_classes(labels: Sequence[int], class_names: Sequence[str] | None, found: dict[int, str]) -> list[str]:
    """Return the classes' names: those given, else those found beside samples, else the labels' numbers.

    Raises:
        DataError: a label is out of range.
    """
    highest = max(labels, default=-1)
    if class_names is None:
        return [found.get(label, str(label)) for label in range(highest + 1)]
    if highest >= len(class_names):
        raise DataError(f"label {highest} is out of range: there are {len(class_names)} class names")
    return list(class_names)


def _index_tar(name: str, stream: BinaryIO, label_key: str | None, found: _Findings) -> ShardIndex:
    """Read a tar from front to back; collect class names and members that we do not use."""
    index, archive = ShardIndex(name), Archive(name, stream)
    for key, members in samples_of(archive, found.left_out):
        if key in found.seen:
            raise DataError(f"{name}: the key {key} is also in {found.seen[key]}; keys must be unique over a split")
        found.seen[key] = name
        extension, image = image_of(name, key, members)
        height, width = _size(name, key, image.data)
        metadata = metadata_of(name, key, members.get("json"))
        label = label_of(name, key, members.get("cls"), metadata, label_key) if label_key else NO_LABEL
        if isinstance(metadata.get("class"), str):
            found.names[label] = metadata["class"]
        row = (key, extension, image.offset, len(image.data), crc32(image.data), label, width, height)
        index.append(*row)
        for other in members.keys() - {extension, "cls", "json"}:
            found.left_out[f"members .{other}"] += 1
    index.num_bytes, index.sha256 = archive.num_bytes, archive.sha256
    return index


def samples_of(archive: Archive, left_out: Counter[str]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield each key with its members by extension; count what belongs to no sample.

    Raises:
        DataError: the tar is damaged, or a sample has two members of one extension.
    """
    key: str | None = None
    members: dict[str, Member] = {}
    for member in archive.members():
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not (member.is_file and dot and stem):
            if not member.is_folder:
                what = "members without a key and an extension" if member.is_file else "links and the like"
                left_out[what] += 1
            continue
        if folder + slash + stem != key:
            if key is not None:
                yield key, members
            key, members = folder + slash + stem, {}
        if extension.lower() in members:
            raise DataError(f"{archive.place}: sample {key} has two members .{extension.lower()}")
        members[extension.lower()] = member
    if key is not None:
        yield key, members


def image_of(tar: str, key: str, members: dict[str, Member]) -> tuple[str, Member]:
    """Return the sample's one image and its extension."""
    images = [extension for extension in members if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise DataError(f"{tar}: sample {key} has {len(images) or 'no'} images among .{', .'.join(members)}")
    return images[0], members[images[0]]


def _size(tar: str, key: str, data: bytes) -> tuple[int, int]:
    """Return (height, width) of an image that has proved to decode."""
    try:
        height, width, _ = decode(data).shape
    except DecodeError as error:
        raise DataError(f"{tar}: sample {key} is no usable image: {error}") from None
    return height, width


def label_of(tar: str, key: str, cls: Member | None, metadata: dict[str, Any], label_key: str) -> int:
    """Return a sample's label, from its cls or its JSON."""
    value = cls.data.decode(errors="replace") if cls else metadata.get(label_key)
    try:
        label = int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(
            f"{tar}: sample {key} has no label: expected a number in .cls or in .json at {label_key!r}, got {value!r}; "
            "if none has one, pass --unlabelled"
        ) from None
    if label < 0:
        raise DataError(f"{tar}: sample {key} has the label {label}; labels count from 0")
    return label


def metadata_of(tar: str, key: str, member: Member | None) -> dict[str, Any]:
    """Return what a sample's JSON says."""
    if member is None:
        return {}
    try:
        content = json.loads(member.data)
    except ValueError as error:
        raise DataError(f"{tar}: sample {key} has broken JSON ({error})") from None
    return content if isinstance(content, dict) else {}
