"""Local tars that form one dataset, and where their index is: next to the tars or in the cache folder."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.sources.source import summarize
from pretrain.data.storage.index import DATASET_FILE
from pretrain.data.storage.remote import expand_braces, is_remote
from pretrain.data.transforms.decode import SUFFIXES, is_image
from pretrain.errors import DataError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
ARCHIVES = (".tar", *COMPRESSED, ".zip", ".rar", ".7z")


@dataclass(frozen=True)
class TarSet:
    """All tars of a folder, or those that a path names, such as `photos/train-{000..007}.tar`.

    Attributes:
        folder: Folder of the tars.
        names: File names of the tars, in order.
        is_whole_folder: Whether these are all tars of the folder, so that their index belongs next to them.
    """

    folder: Path
    names: tuple[str, ...]
    is_whole_folder: bool

    @property
    def tars(self) -> list[Path]:
        """Paths of the tars."""
        return [self.folder / name for name in self.names]

    def cached_index(self, cache_dir: Path) -> Path:
        """Return the folder below the cache folder for the index of tars that cannot have it next to them.

        Its name depends on the path of the tars and on their names, sizes and modification times, so tars that have
        changed get a new index.

        Args:
            cache_dir: Cache folder of this machine (`data.cache_dir`).
        """
        tars = [(tar.name, (stat := tar.stat()).st_size, stat.st_mtime_ns) for tar in self.tars if tar.exists()]
        digest = hashlib.sha256(json.dumps(["located", str(self.folder.resolve()), tars]).encode()).hexdigest()
        return cache_dir / "indexes" / digest[:32]

    def find_index(self, cache_dir: Path | None) -> Path | None:
        """Return the folder that contains the index of these tars; None if they have none.

        Args:
            cache_dir: Cache folder of this machine, or None to look only next to the tars.
        """
        if self.is_whole_folder and (self.folder / DATASET_FILE).exists():
            return self.folder
        if cache_dir is None or not self.names:
            return None
        cached = self.cached_index(cache_dir)
        return cached if (cached / DATASET_FILE).exists() else None


def tar_names(folder: Path) -> list[str]:
    """Return the file names of the tars of a folder, in order; hidden files, such as those of a Mac, are no tars."""
    return [name for name in _names_of_tars(folder) if not name.startswith(".")]


def describe_hidden(folder: Path) -> list[str]:
    """Return a line about the hidden tars of a folder, or no line."""
    hidden = [name for name in _names_of_tars(folder) if name.startswith(".")]
    return summarize(hidden, "hidden tar, skipped", "hidden tars, skipped")


def _names_of_tars(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if is_tar(path.name)) if folder.is_dir() else []


def is_tar(name: str) -> bool:
    """Return whether a file is a tar by its name."""
    return name.lower().endswith(".tar")


def describe_beside(folder: Path) -> list[str]:
    """Return a line about what a folder of tars holds that would be lost if only the tars are read, or no line.

    These are images, archives, and subfolders with tars or such files.
    """
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (is_tar(path.name) and not path.is_dir()):
            continue
        files = (Path(place, name) for place, _, names in os.walk(path) for name in names)
        if any(map(_is_lost, files if path.is_dir() else [path])):
            found.append(path.name + "/" * path.is_dir())
    return summarize(found, "image, archive or folder beside the tars", "images, archives or folders beside the tars")


def _is_lost(path: Path) -> bool:
    """Return whether a file that is not read contains images: it is an image by its name or content, or an archive.

    A file that cannot be read counts as one, because it may be an image.
    """
    try:
        return path.name.lower().endswith((*SUFFIXES, *ARCHIVES)) or (path.is_file() and is_image(path))
    except OSError:
        return True


def local_tar_sets(path: str) -> list[TarSet]:
    """Return the local sets of tars that a data path means; none for a URL.

    Args:
        path: A folder, several folders in braces, or tars of one folder, with or without braces. A folder without tars
            is a set without tars.

    Raises:
        DataError: If a tar that the path names does not exist, or if the tars are in several folders.
    """
    places = [Path(place) for place in expand_braces(path) if not is_remote(place)]
    if not places or any(not is_tar(place.name) or place.is_dir() for place in places):
        return [TarSet(place, tuple(tar_names(place)), True) for place in places]
    for place in places:
        if not place.is_file():
            raise DataError(f"{place}: no such tar; correct the path {path}")
    if len({place.parent for place in places}) > 1:
        raise DataError(f"{path}: names tars in several folders; give one path for each folder, as a list")
    return [TarSet(places[0].parent, tuple(place.name for place in places), False)]
