"""Index tars that someone else wrote, as WebDataset reads them: members that share a key are one sample.

The stdlib's tarfile takes a damaged header for the end of the archive, and so do its users, in silence. Here the end
must be tar's own end mark.
"""

import hashlib
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.data.decode import DecodeError, decode
from pretrain.data.index import DataError, DatasetInfo, ShardIndex, count_classes
from pretrain.data.sources import NAMES_SHOWN

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CHUNK_BYTES = 1 << 20


@dataclass
class Scanned:
    """What `index_shards` found."""

    info: DatasetInfo
    remarks: list[str] = field(default_factory=list)


def index_shards(
    tars: Sequence[Path],
    class_names: Sequence[str] | None = None,
    label_key: str = "label",
    progress: Callable[[int], None] = lambda _: None,
) -> Scanned:
    """Write an index beside each tar and `dataset.json` in their folder.

    Args:
        tars: shards of one split, in one folder.
        class_names: in the order of the labels; else taken from the samples' JSON ("class"), else the labels' numbers.
        label_key: the JSON key of the label where a sample has no `cls`.
        progress: called with the number of bytes just read.

    Raises:
        DataError: a damaged tar, an unreadable image, a duplicate key, no image or label, a label out of range.
    """
    names: dict[int, str] = {}
    left_out: Counter[str] = Counter()
    seen: dict[str, str] = {}
    indexes = []
    for tar in tars:
        index = _index_tar(tar, label_key, names, left_out, progress)
        for key in index.key:
            if key in seen:
                raise DataError(f"{tar}: the key {key} is also in {seen[key]}; keys must be unique over a split")
            seen[key] = tar.name
        indexes.append(index)
    if not any(len(index) for index in indexes):
        raise DataError(f"{tars[0].parent}: the tars hold no samples")
    highest = max((label for index in indexes for label in index.label), default=-1)
    if class_names is None:
        class_names = [names.get(label, str(label)) for label in range(highest + 1)]
    if highest >= len(class_names):
        raise DataError(f"label {highest} is out of range: there are {len(class_names)} class names")
    folder = tars[0].parent
    counts = count_classes((label for index in indexes for label in index.label), len(class_names))
    info = DatasetInfo(list(class_names), counts, [index.save(folder) for index in indexes])
    info.save(folder)
    remarks = [f"{count} {what}, left as they are" for what, count in left_out.items()]
    if empty := [name for name, count in zip(info.class_names, info.class_counts, strict=True) if not count]:
        remarks.append(f"{len(empty)} classes without samples: {', '.join(empty[:NAMES_SHOWN])}")
    return Scanned(info, remarks)


def _index_tar(
    tar: Path, label_key: str, names: dict[int, str], left_out: Counter[str], progress: Callable[[int], None]
) -> ShardIndex:
    """Read a tar from front to back; collect class names and members that we do not use."""
    index = ShardIndex(tar.name, tar.stat().st_size, _sha256(tar, progress))
    with tar.open("rb") as file:
        for key, members in _samples(tar, file, left_out):
            images = [extension for extension in members if extension in IMAGE_EXTENSIONS]
            if len(images) != 1:
                raise DataError(f"{tar}: sample {key} has {len(images) or 'no'} images among .{', .'.join(members)}")
            metadata = _json(tar, key, file, members.get("json"))
            label = _label(tar, key, file, members.get("cls"), metadata, label_key)
            if isinstance(metadata.get("class"), str):
                names[label] = metadata["class"]
            offset, size = members[images[0]]
            index.key.append(key)
            index.extension.append(images[0])
            index.offset.append(offset)
            index.size.append(size)
            image, (height, width) = _readable_image(tar, key, file, (offset, size))
            index.crc32.append(zlib.crc32(image))
            index.label.append(label)
            index.width.append(width)
            index.height.append(height)
            for extension in members.keys() - {images[0], "cls", "json"}:
                left_out[f"members .{extension}"] += 1
    return index


def _samples(tar: Path, file: BinaryIO, left_out: Counter[str]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield each key with its members: extension -> (offset, size)."""
    key: str | None = None
    members: dict[str, tuple[int, int]] = {}
    for member_key, extension, place in _members(tar, file, left_out):
        if member_key != key:
            if key is not None:
                yield key, members
            key, members = member_key, {}
        if extension in members:
            raise DataError(f"{tar}: sample {key} has two members .{extension}")
        members[extension] = place
    if key is not None:
        yield key, members


def _members(tar: Path, file: BinaryIO, left_out: Counter[str]) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Yield (key, extension, place) of each file, and prove that the archive was read to its end."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                folder, slash, name = info.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if info.isfile() and dot and stem:
                    yield folder + slash + stem, extension.lower(), (info.offset_data, info.size)
                elif not info.isdir():
                    left_out["members without a key and an extension" if info.isfile() else "links and the like"] += 1
            end = archive.offset
    except tarfile.TarError as error:
        raise DataError(f"{tar}: not a readable tar ({error})") from None
    size = tar.stat().st_size
    if size < end + tarfile.BLOCKSIZE:
        raise DataError(f"{tar}: truncated at byte {size}: tar's end mark is missing")
    if _pread(file, (end, size - end)).strip(b"\0"):
        raise DataError(f"{tar}: damaged header at byte {end}; what follows cannot be read")


def _readable_image(tar: Path, key: str, file: BinaryIO, place: tuple[int, int]) -> tuple[bytes, tuple[int, int]]:
    """Return an image's bytes and (height, width), once it has proved to decode."""
    data = _pread(file, place)
    try:
        height, width, _ = decode(data).shape
    except DecodeError as error:
        raise DataError(f"{tar}: sample {key} is no usable image: {error}") from None
    return data, (height, width)


def _label(
    tar: Path, key: str, file: BinaryIO, cls: tuple[int, int] | None, metadata: dict[str, Any], label_key: str
) -> int:
    value = _pread(file, cls).decode(errors="replace") if cls else metadata.get(label_key)
    try:
        label = int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(
            f"{tar}: sample {key} has no label: expected a number in .cls or in .json at {label_key!r}, got {value!r}"
        ) from None
    if label < 0:
        raise DataError(f"{tar}: sample {key} has the label {label}; labels count from 0")
    return label


def _json(tar: Path, key: str, file: BinaryIO, place: tuple[int, int] | None) -> dict[str, Any]:
    if place is None:
        return {}
    try:
        content = json.loads(_pread(file, place))
    except ValueError as error:
        raise DataError(f"{tar}: sample {key} has broken JSON ({error})") from None
    return content if isinstance(content, dict) else {}


def _pread(file: BinaryIO, place: tuple[int, int]) -> bytes:
    """Read (offset, size) without moving where tarfile reads next."""
    here = file.tell()
    file.seek(place[0])
    data = file.read(place[1])
    file.seek(here)
    return data


def _sha256(path: Path, progress: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()
