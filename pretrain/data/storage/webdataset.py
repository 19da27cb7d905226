"""WebDataset's conventions: members of a tar that share a key form one sample; the extension names the content."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.data.storage.archive import Member, TarReader
from pretrain.data.transforms.decode import SUFFIXES
from pretrain.errors import DataError
from pretrain.files import bytes_encoding, text_encoding

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
OTHER_IMAGE_EXTENSIONS = tuple(sorted({suffix[1:] for suffix in SUFFIXES}.difference(IMAGE_EXTENSIONS)))
AGAIN = "\0"  # ends the extension of a member that a sample has twice; no name in a tar contains it
LABEL_KEY = "label"  # key of the label in a sample's JSON


def samples_of(tar: TarReader, ignored: Counter[str]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield the key of each sample and its members by extension, in lower case.

    Args:
        tar: Tar to read.
        ignored: Counter of members that belong to no sample, by kind; it is updated.

    Raises:
        DataError: If the tar cannot be read on.
    """
    key: str | None = None
    members: dict[str, Member] = {}
    for member in tar.members():
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not (member.is_file and dot and stem):
            if not member.is_folder:
                ignored["members without a key and an extension" if member.is_file else "links or special files"] += 1
            continue
        if folder + slash + stem != key:
            if key is not None:
                yield key, members
            key, members = folder + slash + stem, {}
        is_repeated = extension.lower() in members
        members[extension.lower() + AGAIN * is_repeated] = member
    if key is not None:
        yield key, members


def is_label_file(name: str) -> bool:
    """Return whether a member may hold the label or the name of the class."""
    return name.lower().endswith((".cls", ".json"))


def image_of(tar: str, key: str, members: dict[str, Member]) -> tuple[str, Member]:
    """Return the only image of a sample: its extension and its member.

    Args:
        tar: Name of the tar, for error messages.
        key: Key of the sample.
        members: Members of the sample by extension.

    Raises:
        DataError: If the sample has no image or several, or two members with the same extension.
    """
    for extension in members:
        if extension.endswith(AGAIN):
            repeated = extension.removesuffix(AGAIN)
            raise DataError(f"{tar}: sample {key} has two members .{repeated}; give each sample its own key")
    images = [extension for extension in members if extension in IMAGE_EXTENSIONS]
    images = images or [extension for extension in members if extension in OTHER_IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise DataError(
            f"{tar}: sample {key} has {len(images) or 'no'} images among .{', .'.join(members)}; expected one of "
            f".{', .'.join(IMAGE_EXTENSIONS)} or another format"
        )
    return images[0], members[images[0]]


def label_of(tar: str, key: str, cls: Member | None, metadata: dict[str, Any], label_key: str) -> int:
    """Return the label of a sample.

    Args:
        tar: Name of the tar, for error messages.
        key: Key of the sample.
        cls: The sample's .cls member, if it has one.
        metadata: Content of the sample's .json member.
        label_key: Key of the label in `metadata`, used if there is no .cls member.

    Raises:
        DataError: If the sample has no label, or it is not a whole number from 0.
    """
    value = cls.data.decode(bytes_encoding(cls.data), errors="replace") if cls else metadata.get(label_key)
    try:
        label = int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(
            f"{tar}: sample {key} has no label: expected a number in .cls or in .json at {label_key!r}, got {value!r}; "
            "pass --unlabeled to `vitrail shards` if no sample has a label, or --label-key if the key has another name"
        ) from None
    if label < 0:
        raise DataError(f"{tar}: sample {key} has the label {label}; labels must start at 0")
    return label


def metadata_of(tar: str, key: str, member: Member | None) -> dict[str, Any]:
    """Return the content of a sample's .json member; empty if there is none or it is not an object.

    Args:
        tar: Name of the tar, for error messages.
        key: Key of the sample.
        member: The sample's .json member, if it has one.

    Raises:
        DataError: If the member is not valid JSON.
    """
    if member is None:
        return {}
    try:
        content = json.loads(member.data)
    except ValueError as error:
        raise DataError(f"{tar}: sample {key} has invalid JSON ({error}); repair its .json member") from None
    return content if isinstance(content, dict) else {}


def name_classes(max_label: int, class_names: Sequence[str] | None, names_found: dict[int, str]) -> list[str]:
    """Return the name of each class: the given name, else the one found in the samples' JSON, else the label.

    Args:
        max_label: Largest label of the set.
        class_names: Names in the order of the labels, or None.
        names_found: Names from the samples' JSON, by label.

    Raises:
        DataError: If `max_label` has no name in `class_names`.
    """
    if class_names is None:
        return [names_found.get(label, str(label)) for label in range(max_label + 1)]
    if max_label >= len(class_names):
        raise DataError(
            f"label {max_label} is out of range because there are {len(class_names)} class names; add a line for every "
            "label to the --class-names file"
        )
    return list(class_names)


def read_class_names(path: Path) -> list[str]:
    """Read a text file with one class name per line, in the order of the labels; empty lines are ignored.

    Raises:
        DataError: If the file cannot be read or has no names.
    """
    try:
        lines = path.read_text(encoding=text_encoding(path)).split("\n")  # no other character ends a line of a list
        names = [name for line in lines if (name := line.strip(" \t\r"))]
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not text in UTF-8 or UTF-16; save it again as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read the class names: {error.strerror}; name a text file") from None
    if not names:
        raise DataError(f"{path}: has no class names; write one per line, in the order of the labels")
    return names
