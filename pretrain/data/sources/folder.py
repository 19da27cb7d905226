"""A folder of images as a source, with one subfolder per class or without labels."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.sources.source import Content, Integers, Source, SourceImage, summarize
from pretrain.data.storage.index import NO_LABEL
from pretrain.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class ReadFile:
    """A callable that reads an image file.

    Args:
        path: Path of the file.
    """

    path: str

    def __call__(self) -> Content:
        return Content(Path(self.path).read_bytes(), {}, {})


def list_folder(folder: Path, labeled: bool = True, progress: Callable[[int], None] = lambda _: None) -> Source:
    """List the images of a folder: one subfolder per class or, without labels, images at any depth.

    Args:
        folder: Folder to list. Images at any depth below a class's subfolder belong to the class.
        labeled: Whether the subfolders are classes.
        progress: Function called with the number of files listed since the last call.

    Raises:
        DataError: If the folder does not exist, or has no subfolders although `labeled` is true.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name a folder, or `digits` for the built-in source")
    if not labeled:
        scan = _FolderScan(folder)
        scan.add("", NO_LABEL, progress)
        return scan.source([])
    entries = sorted(folder.iterdir())
    folders = [path.name for path in entries if path.is_dir()]
    class_names = [name for name in folders if not name.startswith(".")]
    if not class_names:
        raise DataError(
            f"{folder}: has no subfolders; expected one per class, such as {folder}/cat/1.jpg, or --unlabeled"
        )
    scan = _FolderScan(folder)
    empty = [name for label, name in enumerate(class_names) if not scan.add(name, label, progress)]
    top_level = [path.name for path in entries if path.is_file()]
    images_outside = [name for name in top_level if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    scan.leave_out(name for name in top_level if name not in images_outside)
    source = scan.source(class_names)
    hidden = [name for name in folders if name not in class_names]
    source.notes += summarize(hidden, "hidden folder, skipped", "hidden folders, skipped")
    source.problems += summarize(images_outside, "image outside of the classes", "images outside of the classes")
    source.problems += summarize(empty, "class without images", "classes without images")
    return source


class _FolderScan:
    """The files found in a folder, by their paths relative to it.

    Args:
        folder: Folder to scan.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self.labels: list[int] = []
        self.sizes: list[int] = []
        self.name_by_key: dict[str, str] = {}
        self.not_images: list[str] = []
        self.repeated_keys: list[str] = []
        self.unprintable: list[str] = []
        self.unreadable_folders: list[str] = []

    def add(self, subfolder: str, label: int, progress: Callable[[int], None]) -> int:
        """Add all images below a subfolder; return their number."""
        before = len(self.names)
        for path, size in _files_below(str(self.folder / subfolder), self.unreadable_folders):
            progress(1)
            name = os.path.relpath(path, self.folder)
            key, suffix = _key(name), Path(name).suffix.lower()
            if not path.isprintable():
                self.unprintable.append(ascii(name))
            elif suffix not in IMAGE_SUFFIXES:
                self.not_images.append(name)
            elif key in self.name_by_key:
                self.repeated_keys.append(f"{name} (same as {self.name_by_key[key]})")
            else:
                self.name_by_key[key] = name
                self.names.append(name)
                self.labels.append(label)
                self.sizes.append(size)
        return len(self.names) - before

    def leave_out(self, names: Iterable[str]) -> None:
        """Count files that are not images."""
        self.not_images.extend(names)

    def source(self, class_names: list[str]) -> Source:
        """Return the images as a source."""
        labels = np.asarray(self.labels, np.int64)
        unreadable = summarize(self.unreadable_folders, "folder that cannot be listed", "folders that cannot be listed")
        repeated = summarize(self.repeated_keys, "image whose key is taken", "images whose keys are taken")
        unprintable = summarize(self.unprintable, "name that is not printable", "names that are not printable")
        return Source(
            class_names,
            self.names,
            labels,
            np.asarray(self.sizes, np.int64),
            _ImageAt(self.folder, self.names, labels),
            summarize(self.not_images, "file that is not an image, skipped", "files that are not images, skipped"),
            [*unreadable, *repeated, *unprintable],
        )


@dataclass(frozen=True)
class _ImageAt:
    """A callable that returns the image at a position; not a closure, so that it can be sent to loader workers."""

    folder: Path
    names: list[str]
    labels: Integers

    def __call__(self, i: int) -> SourceImage:
        name = self.names[i]
        return SourceImage(_key(name), int(self.labels[i]), name, ReadFile(str(self.folder / name)))


def _key(name: str) -> str:
    """Return the sample key of a file; dots are replaced because WebDataset ends a key at the first dot."""
    return str(Path(name).with_suffix("")).replace(".", "_")


def _files_below(folder: str, unreadable: list[str], parents: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    """Yield the path and size of every file at any depth, following links.

    A broken link has size 0 and fails when it is read.
    """
    real_path = os.path.realpath(folder)
    if real_path in parents:
        unreadable.append(f"{folder} (links to one of its parent folders)")
        return
    try:
        with os.scandir(folder) as found:
            entries = sorted(
                ((entry.path, entry.is_dir(), _size(entry)) for entry in found), key=lambda entry: entry[0]
            )
    except OSError as error:
        unreadable.append(f"{folder} ({error.strerror})")
        return
    for path, is_folder, size in entries:
        if is_folder:
            yield from _files_below(path, unreadable, (*parents, real_path))
        else:
            yield path, size


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0
