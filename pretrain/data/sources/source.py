"""Images before they are shards: what a source is; a folder of images, and scikit-learn's digits."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from pretrain.data.storage.index import NO_LABEL
from pretrain.errors import DataError

Integers = npt.NDArray[np.int64]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
NAMES_SHOWN = 5


class Content(NamedTuple):
    """What a sample holds: the encoded image; what its JSON says; other members by extension, as a caption's txt."""

    image: bytes
    metadata: dict[str, Any]
    members: dict[str, bytes]


@dataclass(frozen=True)
class SourceImage:
    """An image before it is in a shard; `read` gets its content, in this process or another."""

    key: str
    label: int
    origin: str
    read: Callable[[], Content]


@dataclass
class Source:
    """Images in columns, so that millions can be listed, and everything that was noticed while listing them.

    `names` are a person's words for the images; `labels` count from 0, NO_LABEL where there are no classes; `sizes`
    are in bytes, 0 where they are not known beforehand; `image` gives the i-th.
    """

    class_names: list[str]
    names: Sequence[str]
    labels: Integers
    sizes: Integers
    image: Callable[[int], SourceImage]
    remarks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int] | Integers) -> "Source":
        """Return some of the images, with all that was noticed."""
        rows = np.asarray(rows, np.int64)
        return Source(
            self.class_names,
            [self.names[row] for row in rows],
            self.labels[rows],
            self.sizes[rows],
            lambda i: self.image(int(rows[i])),
            self.remarks,
            self.faults,
        )


@dataclass(frozen=True)
class ReadFile:
    """Reads an image's file."""

    path: str

    def __call__(self) -> Content:
        return Content(Path(self.path).read_bytes(), {}, {})


def list_folder(folder: Path, labeled: bool = True, listed: Callable[[int], None] = lambda _: None) -> Source:
    """List a folder that has a subfolder for each class, or, without labels, images at any depth.

    Args:
        folder: files below a class's subfolder, at any depth, belong to the class.
        labeled: whether there are classes.
        listed: called with the number of files just seen.

    Raises:
        DataError: there is no such folder, or no subfolder for a class.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (the built-in source is called digits)")
    if not labeled:
        found = _Found(folder)
        found.add("", NO_LABEL, listed)
        return found.source([])
    entries = sorted(folder.iterdir())
    folders = [path.name for path in entries if path.is_dir()]
    class_names = [name for name in folders if not name.startswith(".")]
    if not class_names:
        raise DataError(
            f"{folder}: has no subfolders; expected one for each class, as in {folder}/cat/1.jpg, or --unlabeled"
        )
    found = _Found(folder)
    empty = [name for label, name in enumerate(class_names) if not found.add(name, label, listed)]
    stray = [path.name for path in entries if path.is_file()]
    images_outside = [name for name in stray if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    found.others += [name for name in stray if name not in images_outside]
    source = found.source(class_names)
    hidden = [name for name in folders if name not in class_names]
    source.remarks += counted(hidden, "hidden folder, left out", "hidden folders, left out")
    source.faults += counted(images_outside, "image outside of any class", "images outside of any class")
    source.faults += counted(empty, "class without images", "classes without images")
    return source


class _Found:
    """The images of a folder, by their names relative to it, and what else is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self.labels: list[int] = []
        self.sizes: list[int] = []
        self.names_of_keys: dict[str, str] = {}
        self.others: list[str] = []
        self.twice: list[str] = []
        self.unnameable: list[str] = []
        self.unlisted: list[str] = []

    def add(self, subfolder: str, label: int, listed: Callable[[int], None]) -> int:
        """Take all images below a subfolder; return how many they are."""
        before = len(self.names)
        for path, size in _files_below(str(self.folder / subfolder), self.unlisted):
            listed(1)
            name = os.path.relpath(path, self.folder)
            key, suffix = _key(name), Path(name).suffix.lower()
            if not path.isprintable():
                self.unnameable.append(ascii(name))
            elif suffix not in IMAGE_SUFFIXES:
                self.others.append(name)
            elif key in self.names_of_keys:
                self.twice.append(f"{name} (as {self.names_of_keys[key]})")
            else:
                self.names_of_keys[key] = name
                self.names.append(name)
                self.labels.append(label)
                self.sizes.append(size)
        return len(self.names) - before

    def source(self, class_names: list[str]) -> Source:
        """Return what was found as a source."""
        labels = np.asarray(self.labels, np.int64)
        return Source(
            class_names,
            self.names,
            labels,
            np.asarray(self.sizes, np.int64),
            _ImageOfFolder(self.folder, self.names, labels),
            counted(self.others, "not an image, left out", "not images, left out"),
            [
                *counted(self.unlisted, "folder that cannot be listed", "folders that cannot be listed"),
                *counted(self.twice, "image with a key already taken", "images with keys already taken"),
                *counted(self.unnameable, "name that is not readable text", "names that are not readable text"),
            ],
        )


@dataclass(frozen=True)
class _ImageOfFolder:
    """The i-th image of a folder; not a closure, so that it can be sent to a loader's workers."""

    folder: Path
    names: list[str]
    labels: Integers

    def __call__(self, i: int) -> SourceImage:
        name = self.names[i]
        return SourceImage(_key(name), int(self.labels[i]), name, ReadFile(str(self.folder / name)))


def _key(name: str) -> str:
    """Return the key of a file's sample; WebDataset takes a key to end at the first dot."""
    return str(Path(name).with_suffix("")).replace(".", "_")


def _files_below(folder: str, unlisted: list[str], above: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    """Yield every file at any depth and its size, links followed; a link to nowhere has size 0, and fails when read."""
    here = os.path.realpath(folder)
    if here in above:
        unlisted.append(f"{folder} (links to a folder above it)")
        return
    try:
        with os.scandir(folder) as found:
            entries = sorted(
                ((entry.path, entry.is_dir(), _size(entry)) for entry in found), key=lambda entry: entry[0]
            )
    except OSError as error:
        unlisted.append(f"{folder} ({error.strerror})")
        return
    for path, is_folder, size in entries:
        if is_folder:
            yield from _files_below(path, unlisted, (*above, here))
        else:
            yield path, size


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0


def list_digits() -> Source:
    """List scikit-learn's 1,797 handwritten digits as PNGs of 32 x 32 pixels (UCI ML hand-written digits)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pngs, labels = [_digit_png(pixels) for pixels in digits.images], digits.target.astype(np.int64)
    names = [f"sklearn.datasets.load_digits()[{i}]" for i in range(len(pngs))]

    def image(i: int) -> SourceImage:
        return SourceImage(f"{labels[i]}/{i:04d}", int(labels[i]), names[i], _Ready(pngs[i]))

    return Source([str(name) for name in digits.target_names], names, labels, np.asarray(list(map(len, pngs))), image)


def keep_classes(source: Source, names: Sequence[str]) -> Source:
    """Keep only some classes; their labels are counted anew from 0, in the source's order."""
    unknown = [name for name in names if name not in source.class_names]
    if unknown:
        raise DataError(f"no class {', '.join(unknown)}; the classes are {', '.join(source.class_names)}")
    kept = [name for name in source.class_names if name in names]
    new_labels = np.full(len(source.class_names), NO_LABEL)
    for label, name in enumerate(kept):
        new_labels[source.class_names.index(name)] = label
    taken = source.take(np.flatnonzero(new_labels[source.labels] != NO_LABEL))
    labels = new_labels[taken.labels]
    return replace(
        taken, class_names=kept, labels=labels, image=lambda i: replace(taken.image(i), label=int(labels[i]))
    )


@dataclass(frozen=True)
class _Ready:
    """An image that is in memory already."""

    data: bytes

    def __call__(self) -> Content:
        return Content(self.data, {}, {})


def _digit_png(pixels: npt.NDArray[np.float64]) -> bytes:
    """Return a digit, 8 x 8 values of 0 to 16, as a PNG."""
    image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
    buffer = io.BytesIO()
    image.resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def counted(names: list[str], one: str, many: str) -> list[str]:
    """Return one line that counts and names, or none."""
    if not names:
        return []
    shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
    return [f"{len(names)} {one if len(names) == 1 else many}: {shown}"]
