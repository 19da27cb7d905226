"""Where the index of a folder of tars is: next to the tars or, if their folder is read-only, in the cache folder."""

import hashlib
import json
from pathlib import Path

from pretrain.data.storage.index import DATASET_FILE


def list_tars(folder: Path) -> list[Path]:
    """Return the tars of a folder, sorted by name."""
    return sorted(folder.glob("*.tar"))


def cached_index_folder(folder: Path, cache_dir: Path) -> Path:
    """Return the folder below the cache folder for the index of read-only tars.

    Its name depends on the path of the tars and on their names, sizes and modification times, so tars that have changed
    get a new index.

    Args:
        folder: Folder of the tars.
        cache_dir: Cache folder of this machine (`data.cache_dir`).
    """
    tars = [(tar.name, (stat := tar.stat()).st_size, stat.st_mtime_ns) for tar in list_tars(folder)]
    digest = hashlib.sha256(json.dumps([str(folder.resolve()), tars]).encode()).hexdigest()
    return cache_dir / "indexes" / digest[:32]


def find_index(folder: Path, cache_dir: Path | None) -> Path | None:
    """Return the folder that contains `dataset.json` for a folder of tars; None if the tars have no index.

    Args:
        folder: Folder of the tars.
        cache_dir: Cache folder of this machine, or None to look only next to the tars.
    """
    if (folder / DATASET_FILE).exists():
        return folder
    if cache_dir is None or not list_tars(folder):
        return None
    cached = cached_index_folder(folder, cache_dir)
    return cached if (cached / DATASET_FILE).exists() else None
