"""Local tars that form one dataset, and where their index is: next to the tars or in the cache folder."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.storage.index import DATASET_FILE
from pretrain.data.storage.remote import expand_braces, is_remote
from pretrain.errors import DataError


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
        tars = [(tar.name, (stat := tar.stat()).st_size, stat.st_mtime_ns) for tar in self.tars]
        digest = hashlib.sha256(json.dumps([str(self.folder.resolve()), tars]).encode()).hexdigest()
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


def local_tar_sets(path: str) -> list[TarSet]:
    """Return the local sets of tars that a data path means; none for a URL.

    Args:
        path: A folder, several folders in braces, or tars of one folder, with or without braces. A folder without tars
            is a set without tars.

    Raises:
        DataError: If a tar that the path names does not exist, or if the tars are in several folders.
    """
    places = [Path(place) for place in expand_braces(path) if not is_remote(place)]
    if not places or any(place.suffix != ".tar" or place.is_dir() for place in places):
        return [TarSet(place, tuple(sorted(tar.name for tar in place.glob("*.tar"))), True) for place in places]
    for place in places:
        if not place.is_file():
            raise DataError(f"{place}: no such tar; correct the path {path}")
    if len({place.parent for place in places}) > 1:
        raise DataError(f"{path}: names tars in several folders; give one path for each folder, as a list")
    return [TarSet(places[0].parent, tuple(place.name for place in places), False)]
