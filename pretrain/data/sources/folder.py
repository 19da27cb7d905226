"""A folder of images as a source, with one subfolder per class or without labels."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.sources.source import Content, Integers, Source, SourceImage, counted
from pretrain.data.storage.index import NO_LABEL
from pretrain.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


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
