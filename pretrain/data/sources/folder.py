"""A folder of images as a source, with one subfolder per class or without labels."""

import filecmp
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.data.sources.source import Content, Integers, Source, SourceImage, summarize
from pretrain.data.storage.index import NO_LABEL
from pretrain.data.storage.tar_set import ARCHIVES
from pretrain.data.transforms.decode import SUFFIXES, is_image
from pretrain.errors import DataError

OF_A_MAC = "__MACOSX"  # what a Mac's zip holds beside the files: not a class
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation", "dev", "test", "testing")  # the first that there is
SPLITS_BELOW = (
    "folder with splits of its own, whose validation images would be trained on; move train/ and val/ to the top, with "
    "the classes inside, or give the path of the folder that holds them",
    "folders with splits of their own, whose validation images would be trained on; move train/ and val/ to the top, "
    "with the classes inside, or give the path of a folder that holds them",
)


@dataclass(frozen=True)
class ReadFile:
    """A callable that reads an image file.

    Args:
        path: Path of the file.
    """

    path: str

    def __call__(self) -> Content:
        return Content(Path(self.path).read_bytes(), {}, {})


class Splits(NamedTuple):
    """The subfolders of a folder that are its splits."""

    train: str
    validation: str


def find_splits(folder: Path) -> Splits | None:
    """Return the splits of a folder whose subfolders have the names of splits, such as `train` and `val`.

    Other subfolders do not matter if the two have subfolders of the same names, which are classes then.
    """
    names = {path.name.lower(): path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)}
    train = [names[name] for name in TRAIN_NAMES if name in names]
    validation = [names[name] for name in VALIDATION_NAMES if name in names]
    if len(train) != 1 or not validation:
        return None
    splits = Splits(train[0], validation[0])
    if names.keys() - {*TRAIN_NAMES, *VALIDATION_NAMES} and not set.intersection(
        *(
            {path.name for path in (folder / split).iterdir() if path.is_dir() and not is_hidden(path.name)}
            for split in splits
        )
    ):
        return None
    return splits


def list_folder(
    folder: Path,
    labeled: bool = True,
    progress: Callable[[int], None] = lambda _: None,
    *,
    may_have_splits: bool = True,
) -> Source:
    """List the images of a folder: one subfolder per class or, without labels, images at any depth.

    A file is an image if its content is one, whatever its name. What is left out without harm is a note of the source;
    what would lose images is a problem, and all of them are found at once. If the subfolders are called `train` and
    `val`, or similar, they are splits, and each has one subfolder per class. Such subfolders further below are a
    problem, and their images are not listed.

    Args:
        folder: Folder to list. Images at any depth below a class's subfolder belong to the class. A subfolder without
            images is no class.
        labeled: Whether the subfolders are classes.
        progress: Function called with the number of files listed since the last call.
        may_have_splits: Whether subfolders with the names of splits are splits.

    Raises:
        DataError: If the folder does not exist, or has no subfolders although `labeled` is true.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name a folder, or `digits` for the built-in source")
    scan, splits = _FolderScan(folder, progress, may_have_splits), find_splits(folder) if may_have_splits else None
    add = scan.add_classes if labeled else scan.add_unlabeled
    if splits is None:
        return scan.source(add(""))
    unused = scan.look_beside(splits)
    class_names = add(splits.train)
    num_training = len(scan.names)
    add(splits.validation, class_names)
    source = scan.source(class_names)
    held_out = np.arange(len(source)) >= num_training
    copies = [row for row in np.flatnonzero(held_out).tolist() if _is_copy(folder, splits, source.names[row])]
    source = source.take(np.setdiff1d(np.arange(len(source)), copies))
    source.held_out = np.delete(held_out, copies)
    both = [scan.names[row] for row in copies]
    source.problems += summarize(both, "image that is in both splits", "images that are in both splits")
    source.notes.append(
        f"{folder}: {splits.train}/ and {splits.validation}/ are taken as its splits, with {num_training} training and "
        f"{len(source) - num_training} validation images"
    )
    source.notes += summarize(unused, "further split, not used", "further splits, not used")
    return source


def has_classes(folder: Path) -> bool:
    """Return whether a folder has subfolders and no images beside them."""
    entries = [path for path in folder.iterdir() if not is_hidden(path.name)] if folder.is_dir() else []
    images = (path for path in entries if path.is_file() and (path.suffix.lower() in SUFFIXES or is_image(path)))
    return any(path.is_dir() for path in entries) and not any(images)


def _is_copy(folder: Path, splits: Splits, name: str) -> bool:
    """Return whether a validation image has the name and the content of a training image."""
    other = folder / splits.train / os.path.relpath(name, splits.validation)
    return other.is_file() and filecmp.cmp(folder / name, other, shallow=False)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is one that no user has put there to be read."""
    return name.startswith(".") or name == OF_A_MAC


class _FolderScan:
    """The files found in a folder, by their paths relative to it.

    Args:
        folder: Folder to scan.
        progress: Function called with the number of files found since the last call.
        may_have_splits: Whether subfolders with the names of splits are splits.
    """

    def __init__(self, folder: Path, progress: Callable[[int], None], may_have_splits: bool) -> None:
        self.folder = folder
        self.progress = progress
        self.may_have_splits = may_have_splits
        self.names: list[str] = []
        self.labels: list[int] = []
        self.sizes: list[int] = []
        self.name_by_key: dict[str, str] = {}
        self.other_keys: dict[str, str] = {}  # by name, where another image has the key of that name
        self.outside: list[str] = []
        self.empty_classes: list[str] = []
        self.unknown_classes: list[str] = []
        self.with_splits: list[str] = []
        self.hidden: list[str] = []
        self.not_images: list[str] = []
        self.archives: list[str] = []
        self.dangling: list[str] = []
        self.unprintable: list[str] = []
        self.unreadable: list[str] = []

    def look_beside(self, splits: Splits) -> list[str]:
        """Count the images beside the splits; return the subfolders that are further splits."""
        further = []
        for entry in self._entries(str(self.folder)):
            if entry.is_file():
                self.outside += [entry.name] * self._is_image(entry)
            elif entry.name.lower() in (*TRAIN_NAMES, *VALIDATION_NAMES):
                further += [entry.name] * (entry.name not in splits)
            elif any(self._is_image(file) for file in self._files_below(entry.path)):
                self.outside.append(f"{entry.name}/")
        return further

    def add_classes(self, inside: str, class_names: Sequence[str] | None = None) -> list[str]:
        """Add the images of each class of a folder; return the classes.

        Args:
            inside: The folder, relative to that of the scan.
            class_names: The classes that there are; None takes every subfolder that has images.

        Raises:
            DataError: If there are no subfolders.
        """
        found: list[str] = []
        top = self.folder / inside
        for entry in self._entries(str(top)):
            name = os.path.relpath(entry.path, self.folder)
            if not entry.is_dir():
                self.outside += [name] * self._is_image(entry)
            elif class_names is not None and entry.name not in class_names:
                self.unknown_classes.append(name)
            elif self.add(name, len(found) if class_names is None else class_names.index(entry.name)):
                found.append(entry.name)
            elif name not in self.with_splits:
                self.empty_classes.append(name)
        known = (self.empty_classes, self.unknown_classes, self.with_splits, self.dangling, self.archives)
        if not (found or any(known)):
            lacking = "has no subfolders, so its images have no classes" if self.outside else "has no images"
            raise DataError(f"{top}: {lacking}; expected one subfolder per class, such as {top}/cat/1.jpg")
        return found if class_names is None else list(class_names)

    def add_unlabeled(self, inside: str, class_names: Sequence[str] | None = None) -> list[str]:
        """Add all images at any depth of a folder, without classes; takes and returns what `add_classes` does."""
        self.add(inside, NO_LABEL)
        return []

    def add(self, subfolder: str, label: int) -> int:
        """Add all images below a subfolder; return their number."""
        before = len(self.names)
        for entry in self._files_below(str(self.folder / subfolder), takes_splits=not self.may_have_splits):
            if self._is_image(entry):
                name = os.path.relpath(entry.path, self.folder)
                self._name_key(name)
                self.names.append(name)
                self.labels.append(label)
                self.sizes.append(entry.stat().st_size)
        return len(self.names) - before

    def source(self, class_names: list[str]) -> Source:
        """Return the images as a source."""
        labels = np.asarray(self.labels, np.int64)
        return Source(
            class_names,
            self.names,
            labels,
            np.asarray(self.sizes, np.int64),
            _ImageAt(self.folder, self.names, labels, self.other_keys),
            [
                *summarize(self.hidden, "hidden file or folder, skipped", "hidden files or folders, skipped"),
                *summarize(self.not_images, "file that is not an image, skipped", "files that are not images, skipped"),
            ],
            [
                *summarize(self.unreadable, "file or folder not readable", "files or folders not readable"),
                *summarize(self.dangling, "link that leads nowhere", "links that lead nowhere"),
                *summarize(self.archives, "archive whose images are not read", "archives whose images are not read"),
                *summarize(self.unprintable, "name with control characters", "names with control characters"),
                *summarize(self.outside, "image outside of the classes", "images outside of the classes"),
                *summarize(self.with_splits, *SPLITS_BELOW),
                *summarize(self.empty_classes, "class without images", "classes without images"),
                *summarize(
                    self.unknown_classes,
                    "validation class that has no training images",
                    "validation classes that have no training images",
                ),
            ],
        )

    def _name_key(self, name: str) -> None:
        """Give an image a key that no other image has."""
        key, suffix = _key(name), Path(name).suffix
        if key in self.name_by_key:
            others = chain([suffix.replace(".", "_")], (f"_{number}" for number in count(2)))
            key = next(key + other for other in others if key + other not in self.name_by_key)
            self.other_keys[name] = key
        self.name_by_key[key] = name

    def _is_image(self, entry: "os.DirEntry[str]") -> bool:
        """Return whether a file is an image; count it if it is not."""
        self.progress(1)
        name = os.path.relpath(entry.path, self.folder)
        if _has_control_characters(name):
            self.unprintable.append(ascii(name))
            return False
        try:
            if Path(name).suffix.lower() in SUFFIXES or is_image(Path(entry.path)):
                return True
        except OSError as error:
            self.unreadable.append(f"{name} ({error.strerror})")
            return False
        (self.archives if entry.name.lower().endswith(ARCHIVES) else self.not_images).append(name)
        return False

    def _entries(self, folder: str) -> "Iterator[os.DirEntry[str]]":
        """Yield the entries of a folder by name, but hidden ones, links that lead nowhere, and devices."""
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            self.unreadable.append(f"{folder} ({error.strerror})")
            return
        for entry in entries:
            name = os.path.relpath(entry.path, self.folder)
            if is_hidden(entry.name):
                self.hidden.append(name)
                continue
            try:
                entry.stat()
            except (FileNotFoundError, NotADirectoryError):
                self.dangling.append(name)
            except OSError as error:
                self.unreadable.append(f"{name} ({error.strerror})")
            else:
                if entry.is_dir() or entry.is_file():
                    yield entry
                else:
                    self.not_images.append(name)  # a device or a pipe

    def _files_below(
        self, folder: str, parents: tuple[str, ...] = (), *, takes_splits: bool = True
    ) -> "Iterator[os.DirEntry[str]]":
        """Yield every file at any depth, following links; of a folder with splits below the top only if told so."""
        real_path = os.path.realpath(folder)
        if real_path in parents:
            self.unreadable.append(f"{folder} (links to one of its parent folders)")
            return
        entries = list(self._entries(folder))
        folders = {entry.name.lower() for entry in entries if entry.is_dir()}
        is_below = folder != str(self.folder)
        if is_below and not takes_splits and folders & {*TRAIN_NAMES} and folders & {*VALIDATION_NAMES}:
            self.with_splits.append(os.path.relpath(folder, self.folder))
            return
        for entry in entries:
            if entry.is_dir():
                yield from self._files_below(entry.path, (*parents, real_path), takes_splits=takes_splits)
            else:
                yield entry


@dataclass(frozen=True)
class _ImageAt:
    """A callable that returns the image at a position; not a closure, so that it can be sent to loader workers."""

    folder: Path
    names: list[str]
    labels: Integers
    other_keys: dict[str, str]

    def __call__(self, i: int) -> SourceImage:
        name = self.names[i]
        key = self.other_keys.get(name) or _key(name)
        return SourceImage(key, int(self.labels[i]), name, ReadFile(str(self.folder / name)))


def _key(name: str) -> str:
    """Return the sample key of a file; dots are replaced because WebDataset ends a key at the first dot."""
    return str(Path(name).with_suffix("")).replace(".", "_")


def _has_control_characters(name: str) -> bool:
    """Return whether a name has characters that no list or table can hold: control characters, or invalid UTF-8."""
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
