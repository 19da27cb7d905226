"""Index local tars at their first use, so that training can start from the tars of another tool."""

import errno
import fcntl
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path

from pretrain.cores import available_cores
from pretrain.data.shards.scan import IndexedShards, index_shards
from pretrain.data.shards.tasks import run_tasks_in_threads
from pretrain.data.storage.archive import Member, TarReader, open_tar
from pretrain.data.storage.cache import CacheError, prepare_cache_folder
from pretrain.data.storage.index import DATASET_FILE
from pretrain.data.storage.remote import FetchPolicy
from pretrain.data.storage.tar_set import TarSet, describe_beside, local_tar_sets
from pretrain.data.storage.webdataset import LABEL_KEY, is_label_file, metadata_of, samples_of
from pretrain.errors import DataError
from pretrain.files import PARTIAL

LOCK_FILE = f"{DATASET_FILE}.lock"
LOCK_SECONDS = 1.0  # pause before the next attempt to lock
NUM_SAMPLES_TRIED = 100  # read to find out whether samples have labels
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

# Called with the number of tars indexed since the last call and the number of all tars.
IndexProgress = Callable[[int, int], None]


def tars_without_index(paths: Iterable[str | Path], cache_dir: Path) -> list[TarSet]:
    """Return the local sets of tars that have no index, each once.

    Args:
        paths: Paths or URLs of data, with braces; other kinds of data are skipped.
        cache_dir: Cache folder of this machine (`data.cache_dir`).

    Raises:
        DataError: If a tar that a path names does not exist.
    """
    sets = dict.fromkeys(tars for path in paths for tars in local_tar_sets(str(path)))
    return [tars for tars in sets if tars.names and tars.find_index(cache_dir) is None]


def index_tars(
    tars: TarSet, cache_dir: Path, *, labels_required: bool, progress: IndexProgress = lambda *_: None
) -> list[str]:
    """Index a set of tars, unless another process has done so meanwhile; return notes for the user.

    The index is written next to the tars. If their folder is read-only, or if the set is only a part of its tars, it is
    written below `cache_dir`. The names of the classes come from "class" in the samples' JSON; otherwise the labels are
    the names, as with `vitrail shards index`.

    Args:
        tars: Tars without an index.
        cache_dir: Cache folder of this machine (`data.cache_dir`).
        labels_required: Whether every sample must have a label. Otherwise labels are read only if some of the first
            samples have one.
        progress: Function called with the number of tars indexed since the last call and the number of all tars: when
            indexing starts, after each tar, and every few seconds while nothing is ready or another process indexes
            the folder.

    Raises:
        DataError: If the folder is read-only and the cache folder as well, or if some samples cannot be used.
    """
    folder, num_tars = tars.folder, len(tars.names)
    is_read_only = not _is_writable(folder)
    out = folder
    if is_read_only or not tars.is_whole_folder:
        out = tars.cached_index(cache_dir)
        try:
            prepare_cache_folder(out)
        except CacheError as error:
            raise DataError(
                f"{folder}: the index of its tars cannot be stored: {error}, or use {_command(folder, None)}"
            ) from None
    with _locked(out / LOCK_FILE, waiting=lambda: progress(0, num_tars)):
        if (out / DATASET_FILE).exists():
            return []
        if tars.is_whole_folder and (lost := describe_beside(folder)):
            raise DataError(f"{folder}: {lost[0]}; move them away, or use {_command(folder, out, ' --skip-bad')}")
        way_out = f"leave them out with {_command(folder, out, ' --skip-bad')}"
        indexed = _index(tars, out, labels_required, progress, way_out)
    info = indexed.info
    classes = f" in {len(info.class_names)} classes" if info.class_names else " without labels"
    reason = "; the folder is read-only, so the index" if is_read_only else "; the index of this part of the folder"
    location = "" if out == folder else f"{reason} is in {out}"
    counted = f"{num_tars} {'tar' if num_tars == 1 else 'tars'}"
    summary = f"{folder}: indexed {info.num_samples} samples{classes} in {counted}{location}"
    return [summary, *(f"{folder}: {note}" for note in indexed.notes)]


def _command(folder: Path, out: Path | None, option: str = "") -> str:
    """Return the command with which the user can index the tars of a folder, and what to do then."""
    if out == folder:
        return f"`vitrail shards index {folder}{option}`"
    return f"`vitrail shards index TARS --out FOLDER{option}`, and name FOLDER in the config"


def _index(tars: TarSet, out: Path, labels_required: bool, progress: IndexProgress, way_out: str) -> IndexedShards:
    num_tars = len(tars.names)
    progress(0, num_tars)
    num_threads = available_cores()
    return index_shards(
        tars.names,
        out,
        label_key=LABEL_KEY if labels_required or _has_labels(tars.tars) else None,
        executor=partial(run_tasks_in_threads, num_threads=num_threads, on_wait=lambda: progress(0, num_tars)),
        progress=lambda amount: progress(amount, num_tars),
        tar_folder=tars.folder,
        way_out=way_out,
    )


def _has_labels(tars: list[Path]) -> bool:
    """Return whether any of the first samples has a label."""
    for tar in tars:
        with suppress(DataError), open_tar(str(tar), FetchPolicy()) as stream:
            samples = samples_of(TarReader(str(tar), stream, is_label_file), Counter())
            if first := list(islice(samples, NUM_SAMPLES_TRIED)):
                return any(_has_label(str(tar), key, members) for key, members in first)
    return False


def _has_label(tar: str, key: str, members: dict[str, Member]) -> bool:
    with suppress(DataError):
        return "cls" in members or LABEL_KEY in metadata_of(tar, key, members.get("json"))
    return False


def _is_writable(folder: Path) -> bool:
    """Return whether files can be created in a folder; permission bits alone do not show a read-only mount."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{DATASET_FILE}.", suffix=PARTIAL):
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
