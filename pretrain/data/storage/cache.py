"""A disk cache for remote objects: each is downloaded once per machine and shared by all ranks, workers and runs.

A cached file is named by its SHA-256, so its name guarantees its content. A download is written to NAME.partial under
an exclusive lock, verified, flushed to the disk and renamed. Readers hold a shared lock on each file that they have
open, and a locked file is never evicted; the kernel releases the locks of a process that dies. Space is reserved under
a short lock of the whole cache, and a partial file counts with its full size, so the cache never exceeds its limit.

A run evicts by its own schedule: what it needs last goes first. Of the files of other runs it knows only the
modification time. Each run therefore keeps the times of files that it reads soon current, and resets those of files
that it no longer needs.
"""

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import NamedTuple

from pretrain.data.storage.remote import (
    PIPE,
    FetchPolicy,
    MissingObjectError,
    StalledFetchError,
    fetch_range,
    read_pieces,
)
from pretrain.errors import DataError
from pretrain.files import PARTIAL, make_writable, partial_path, publish, sync

POLL_SECONDS = 0.02
PREFETCH_PAUSE_SECONDS = 0.2
LEASE_SECONDS = 5.0  # time for which a file that another run needs is spared


class CacheError(DataError):
    """An object for which the cache has no room, or that it cannot write: no fault of the object."""


class RemoteObject(NamedTuple):
    """A remote object and what its content must be.

    Attributes:
        url: URL of the object, or `pipe:` and a command that prints it.
        sha256: SHA-256 of the content, in hexadecimal.
        num_bytes: Size in bytes.
    """

    url: str
    sha256: str
    num_bytes: int


@dataclass
class CacheCounts:
    """What one process did with the cache.

    Attributes:
        hits: Reads of objects that were in the cache.
        downloads: Objects downloaded whole.
        downloaded_bytes: Bytes downloaded, including ranges that were not cached.
        retries: Requests that had to be repeated.
    """

    hits: int = 0
    downloads: int = 0
    downloaded_bytes: int = 0
    retries: int = 0


def prepare_cache_folder(folder: Path) -> None:
    """Create the cache folder, or a folder in it.

    Raises:
        CacheError: If no home folder is known, or the folder cannot be written.
    """
    fix = "set data.cache_dir to a folder that you can write to"
    if folder.parts[:1] == ("~",):
        raise CacheError(f"{folder}: no home folder is known, because HOME is not set; {fix}")
    if reason := make_writable(folder):
        raise CacheError(f"{folder}: {reason}; {fix}")


class Cache:
    """A folder of verified copies of remote objects that never exceeds its size limit.

    Args:
        folder: Folder on a disk of this machine; any number of processes may share it.
        limit_bytes: Maximum total size of the files in the folder; folders in it are not counted.
        policy: Timeouts and permissions for downloads.
    """

    def __init__(self, folder: Path, limit_bytes: int, policy: FetchPolicy) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.policy = policy
        self._distance: Callable[[str], float] = lambda sha256: inf
        self._upcoming: Callable[[], Iterable[RemoteObject]] = tuple
        self._reset_process_state()

    def _reset_process_state(self) -> None:
        self.counts = CacheCounts()
        self._pid = os.getpid()
        self._open: dict[str, int] = {}
        self._mutex = threading.Lock()
        self._prefetching: threading.Thread | None = None

    def read_range(self, wanted: RemoteObject, offset: int, size: int, uncached: bool = False) -> bytes:
        """Read `size` bytes starting at byte `offset`. On a miss, download the whole object into the cache first.

        Args:
            wanted: Object to read.
            offset: Position of the first byte.
            size: Number of bytes.
            uncached: Whether a miss fetches only the requested range and caches nothing. Ignored for pipes, which have
                no ranges.
        """
        self._reset_after_fork()
        with self._mutex:
            descriptor = self._open.get(wanted.sha256)
            if descriptor is not None:
                self.counts.hits += 1
            elif not uncached or wanted.url.startswith(PIPE) or self._path(wanted).exists():
                descriptor = self._acquire(wanted)
            if descriptor is not None:
                return os.pread(descriptor, size, offset)
        data = fetch_range(wanted.url, offset, size, self.policy, self._count_retry)
        self.counts.downloaded_bytes += len(data)
        return data

    def take_counts(self) -> dict[str, int]:
        """Return the counts of this process since the last call, and start again from zero."""
        taken, self.counts = self.counts, CacheCounts()
        return vars(taken)

    def set_schedule(
        self, distance: Callable[[str], float], upcoming: Callable[[], Iterable[RemoteObject]] | None = None
    ) -> None:
        """Set what this process will read: it decides what is evicted, and what is downloaded in the background.

        Processes on one machine divide the downloads without coordination: each skips what another is downloading.

        Args:
            distance: Function from an object's SHA-256 to how far ahead its next use is: 0 or less if it is needed now,
                infinity if this process has no use for it.
            upcoming: Function that returns the objects to read next, in order; None disables background downloads.
        """
        self._reset_after_fork()
        self._distance = distance
        if upcoming is None:
            return
        self._upcoming = upcoming
        if self._prefetching is None:
            self._prefetching = threading.Thread(target=self._prefetch, daemon=True)
            self._prefetching.start()
            threading.Thread(target=self._refresh_times, daemon=True).start()

    def _reset_after_fork(self) -> None:
        """In a forked process, close the parent's descriptors, whose locks belong to the parent, and start afresh."""
        if self._pid != os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)
            self._reset_process_state()

    def _prefetch(self) -> None:
        """Download upcoming objects, forever."""
        while True:
            for wanted in self._upcoming():
                if self._path(wanted).exists() or wanted not in self._upcoming():  # reading has moved on meanwhile
                    continue
                with suppress(DataError, OSError):  # the reader of this object gets the same error and reports it
                    if (descriptor := self._download(wanted)) is not None:
                        os.close(descriptor)
            time.sleep(PREFETCH_PAUSE_SECONDS)

    def _refresh_times(self) -> None:
        """Show other runs by modification times which files this run reads soon and which it has finished, forever."""
        previous: set[Path] = set()
        while True:
            current = {self._path(wanted) for wanted in self._upcoming()}
            for path in current | previous:
                with suppress(FileNotFoundError):
                    os.utime(path, None if path in current else (0, 0))
            previous = current
            time.sleep(PREFETCH_PAUSE_SECONDS)

    def _acquire(self, wanted: RemoteObject) -> int:
        """Return a descriptor of the whole object, locked against eviction; release objects that are not needed now."""
        for sha256 in [name for name in self._open if self._distance(name) > 0]:
            os.close(self._open.pop(sha256))
        deadline = time.time() + self.policy.stall_seconds
        while True:
            descriptor = self._open_cached(wanted)
            if descriptor is not None:
                self.counts.hits += 1
            else:
                descriptor = self._download(wanted)
            if descriptor is not None:
                self._open[wanted.sha256] = descriptor
                return descriptor
            last_progress = self._last_progress(wanted)
            if time.time() > max(deadline, last_progress + 2 * self.policy.stall_seconds):
                if last_progress > -inf:
                    raise StalledFetchError(
                        f"{wanted.url}: another process downloads it, but has received nothing for "
                        f"{time.time() - last_progress:.0f} seconds; check the network and the host, or increase "
                        "data.stall_seconds"
                    )
                raise CacheError(
                    f"{self.folder}: no room for {wanted.url} ({wanted.num_bytes} bytes) because all "
                    f"{self.limit_bytes} bytes are in use; increase data.cache_bytes or decrease data.shuffle_window"
                )
            time.sleep(POLL_SECONDS)

    def _open_cached(self, wanted: RemoteObject) -> int | None:
        """Open and lock a cached object; return None on a miss."""
        try:
            descriptor = os.open(self._path(wanted), os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink == 0:  # evicted between open and lock
            os.close(descriptor)
            return None
        os.utime(descriptor)
        return descriptor

    def _download(self, wanted: RemoteObject) -> int | None:
        """Download an object and return its locked descriptor; None if another process does so or there is no room."""
        descriptor = self._reserve(wanted)
        if descriptor is None:
            return None
        partial = self._partial(wanted)
        try:
            self._download_verified(wanted, descriptor)
            sync(partial)
            with self._locked():
                publish(partial, self._path(wanted), durable=False)  # a lost name costs another download
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException as error:
            with self._locked():
                partial.unlink(missing_ok=True)
            os.close(descriptor)
            if not isinstance(error, OSError):
                raise
            fix = "move data.cache_dir to a larger disk, or decrease data.cache_bytes"
            raise CacheError(f"{self.folder}: {error.strerror}; {fix}") from None
        self.counts.downloads += 1
        return descriptor

    def _download_verified(self, wanted: RemoteObject, descriptor: int) -> None:
        """Download an object into its partial file and verify its SHA-256; try a second time if that differs."""
        for is_last in (False, True):
            digest, position = hashlib.sha256(), 0
            for piece in read_pieces(wanted.url, self.policy, wanted.num_bytes, self._count_retry):
                digest.update(piece)
                if position + len(piece) > wanted.num_bytes:
                    break
                os.pwrite(descriptor, piece, position)
                position += len(piece)
                self.counts.downloaded_bytes += len(piece)
            if digest.hexdigest() == wanted.sha256:
                return
            if is_last:
                raise MissingObjectError(
                    f"{wanted.url}: SHA-256 is {digest.hexdigest()}, but the index says {wanted.sha256}; the object "
                    "was changed or is damaged: restore it, or run `vitrail shards index` again"
                )

    def _count_retry(self) -> None:
        self.counts.retries += 1

    def _reserve(self, wanted: RemoteObject) -> int | None:
        """Make room and return the locked partial file; None if another process has it or there is no room now."""
        if wanted.num_bytes > self.limit_bytes:
            raise CacheError(
                f"{wanted.url}: {wanted.num_bytes} bytes, more than the whole cache; increase data.cache_bytes"
            )
        prepare_cache_folder(self.folder)
        with self._locked():
            if self._path(wanted).exists():
                return None
            descriptor = os.open(self._partial(wanted), os.O_RDWR | os.O_CREAT, 0o644)
            is_reserved = False
            try:
                is_reserved = _try_lock(descriptor) and self._make_room(wanted)
                if is_reserved:
                    os.ftruncate(descriptor, wanted.num_bytes)
            finally:
                if not is_reserved:  # an open descriptor would keep the lock
                    os.close(descriptor)
            return descriptor if is_reserved else None

    def _make_room(self, wanted: RemoteObject) -> bool:
        """Evict files until `wanted` fits, the one needed last first, and none that is needed sooner than `wanted`.

        Files that another run has needed recently are evicted last, and only for an object that is needed now.
        """
        own = self._partial(wanted)
        files = [path for path in self.folder.iterdir() if path != own and path.name != "lock" and path.is_file()]
        sizes = {path: path.stat().st_size for path in files}
        for partial in [path for path in sizes if path.suffix == PARTIAL]:
            if _remove_if_unused(partial):  # left behind by a process that died
                del sizes[partial]
        free = self.limit_bytes - sum(sizes.values())
        wanted_distance = self._distance(wanted.sha256)
        is_urgent = wanted_distance <= 0 or wanted_distance == inf
        candidates = []
        for path in [path for path in sizes if not path.suffix]:
            distance, age = self._distance(path.name), time.time() - path.stat().st_mtime
            is_leased = distance == inf and age < LEASE_SECONDS
            if (distance > wanted_distance or distance == inf) and (is_urgent or not is_leased):
                candidates.append((is_leased, -distance, -age, path))
        for *_, path in sorted(candidates):
            if free >= wanted.num_bytes:
                break
            if _remove_if_unused(path):
                free += sizes[path]
        if free < wanted.num_bytes:
            own.unlink()
        return free >= wanted.num_bytes

    def _last_progress(self, wanted: RemoteObject) -> float:
        """Return the time of the last write to the partial file; minus infinity if there is none."""
        try:
            return self._partial(wanted).stat().st_mtime
        except FileNotFoundError:
            return -inf

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the whole cache."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _path(self, wanted: RemoteObject) -> Path:
        return self.folder / wanted.sha256

    def _partial(self, wanted: RemoteObject) -> Path:
        return partial_path(self._path(wanted))

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "limit_bytes": self.limit_bytes, "policy": self.policy}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_if_unused(path: Path) -> bool:
    """Remove a file unless it is locked; return whether it was removed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not _try_lock(descriptor):
            return False
        path.unlink()
        return True
    finally:
        os.close(descriptor)
