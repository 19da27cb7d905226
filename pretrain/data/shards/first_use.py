"""Index local tars at their first use, so that training can start from the tars of another tool."""

import errno
import fcntl
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pretrain.data.shards.scan import IndexedShards, index_shards
from pretrain.data.shards.tasks import run_tasks_in_threads
from pretrain.data.storage.archive import TarReader, open_tar
from pretrain.data.storage.index import DATASET_FILE
from pretrain.data.storage.index_folder import cached_index_folder, find_index, list_tars
from pretrain.data.storage.remote import FetchPolicy, expand_braces, is_remote
from pretrain.data.storage.webdataset import metadata_of, samples_of
from pretrain.errors import DataError
from pretrain.files import partial_path

LABEL_KEY = "label"
LOCK_FILE = f"{DATASET_FILE}.lock"
LOCK_SECONDS = 1.0  # pause before the next attempt to lock
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

# Called with the number of tars indexed since the last call and the number of all tars.
IndexProgress = Callable[[int, int], None]


def folders_without_index(paths: Iterable[str | Path], cache_dir: Path) -> list[Path]:
    """Return the local folders that contain tars but have no index, each once.

    Args:
        paths: Paths or URLs of data, with braces; other kinds of data are skipped.
        cache_dir: Cache folder of this machine (`data.cache_dir`).
    """
    names = [name for path in paths for name in expand_braces(str(path))]
    folders = dict.fromkeys(Path(name) for name in names if not is_remote(name))
    return [folder for folder in folders if list_tars(folder) and find_index(folder, cache_dir) is None]


def index_folder(
    folder: Path, cache_dir: Path, *, labels_required: bool, progress: IndexProgress = lambda *_: None
) -> list[str]:
    """Index the tars of a folder, unless another process has done so meanwhile; return notes for the user.

    The index is written next to the tars or, if their folder is read-only, below `cache_dir`. The names of the classes
    come from "class" in the samples' JSON; otherwise the labels are the names, as with `vitrail shards index`.

    Args:
        folder: Folder of the tars.
        cache_dir: Cache folder of this machine (`data.cache_dir`).
        labels_required: Whether every sample must have a label. Otherwise labels are read only if the first sample has
            one.
        progress: Function called with the number of tars indexed since the last call and the number of all tars: when
            indexing starts, after each tar, and every few seconds while nothing is ready or another process indexes
            the folder.

    Raises:
        DataError: If the folder is read-only and the cache folder as well.
    """
    tars = list_tars(folder)
    is_cached = not _is_writable(folder)
    out = cached_index_folder(folder, cache_dir) if is_cached else folder
    if is_cached:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{folder}: is read-only, and its index cannot be written to {out} ({error.strerror}); "
                "set data.cache_dir to a folder that you can write to"
            ) from None
    with _locked(out / LOCK_FILE, waiting=lambda: progress(0, len(tars))):
        if (out / DATASET_FILE).exists():
            return []
        indexed = _index(folder, out, tars, labels_required, progress)
    info = indexed.info
    classes = f" in {len(info.class_names)} classes" if info.class_names else " without labels"
    location = f"; the folder is read-only, so the index is in {out}" if is_cached else ""
    summary = f"{folder}: indexed {info.num_samples} samples{classes} in {len(tars)} tars{location}"
    return [summary, *(f"{folder}: {note}" for note in indexed.notes)]


def _index(folder: Path, out: Path, tars: list[Path], labels_required: bool, progress: IndexProgress) -> IndexedShards:
    progress(0, len(tars))
    num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return index_shards(
        [tar.name for tar in tars],
        out,
        label_key=LABEL_KEY if labels_required or _has_labels(tars) else None,
        executor=partial(run_tasks_in_threads, num_threads=num_threads, on_wait=lambda: progress(0, len(tars))),
        progress=lambda amount: progress(amount, len(tars)),
        tar_folder=folder,
    )


def _has_labels(tars: list[Path]) -> bool:
    """Return whether the first sample has a label."""
    for tar in tars:
        with open_tar(str(tar), FetchPolicy()) as stream:
            for key, members in samples_of(TarReader(str(tar), stream), Counter()):
                return "cls" in members or LABEL_KEY in metadata_of(str(tar), key, members.get("json"))
    return False


def _is_writable(folder: Path) -> bool:
    """Return whether files can be created in a folder; permission bits alone do not show a read-only mount."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{DATASET_FILE}.", suffix=partial_path(Path("x")).suffix):
            return True
    except OSError as error:
        if error.errno in READ_ONLY:
            return False
        raise


@contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file that is removed afterwards, so that only one process at a time writes an index.

    Args:
        path: Path of the lock file.
        waiting: Function called before each further attempt while another process holds the lock.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            waiting()
            time.sleep(LOCK_SECONDS)
            continue
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # the previous holder removed the file between open and lock
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
