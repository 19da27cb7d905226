"""WebDataset's conventions: members of a tar that share a key form one sample; the extension names the content."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pretrain.data.storage.archive import Member, TarReader
from pretrain.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def samples_of(archive: TarReader, left_out: Counter[str]) -> Iterator[tuple[str, dict[str, Member]]]:
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
            raise DataError(f"{archive.name}: sample {key} has two members .{extension.lower()}")
        members[extension.lower()] = member
    if key is not None:
        yield key, members


def image_of(tar: str, key: str, members: dict[str, Member]) -> tuple[str, Member]:
    """Return the sample's one image and its extension."""
    images = [extension for extension in members if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise DataError(f"{tar}: sample {key} has {len(images) or 'no'} images among .{', .'.join(members)}")
    return images[0], members[images[0]]


def label_of(tar: str, key: str, cls: Member | None, metadata: dict[str, Any], label_key: str) -> int:
    """Return a sample's label, from its cls or its JSON."""
    value = cls.data.decode(errors="replace") if cls else metadata.get(label_key)
    try:
        label = int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(
            f"{tar}: sample {key} has no label: expected a number in .cls or in .json at {label_key!r}, got {value!r}; "
            "if none has one, pass --unlabeled"
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


def name_classes(highest: int, class_names: Sequence[str] | None, found: dict[int, str]) -> list[str]:
    """Return the classes' names: those given, else those found beside samples, else the labels' numbers.

    Raises:
        DataError: the highest label is out of range.
    """
    if class_names is None:
        return [found.get(label, str(label)) for label in range(highest + 1)]
    if highest >= len(class_names):
        raise DataError(f"label {highest} is out of range: there are {len(class_names)} class names")
    return list(class_names)
