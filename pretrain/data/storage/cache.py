"""Remote objects on the node's own disk: one download each, shared by all ranks, workers and runs of a machine.

A file's name is its sha256, so that a name is a promise. A download goes into NAME.partial under an exclusive lock,
is checked, synced and renamed. Readers hold a shared lock on what they have open, and what is locked is not evicted;
the kernel drops the locks of whoever dies. Room is made under one short lock of the whole cache, a partial counted at
its full size, so that the limit always holds.

A run knows its own future and evicts by it; of another run's it sees the time that each file was last wanted, which
every run keeps fresh for what it reads soon, and sets back for what it has done with.
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

from pretrain.data.storage.remote import PIPE, FetchPolicy, MissingObjectError, fetch_range, read_pieces
from pretrain.errors import DataError

POLL_SECONDS = 0.02
PREFETCH_PAUSE_SECONDS = 0.2
LEASE_SECONDS = 5.0


class RemoteObject(NamedTuple):
    """What is cached: where it comes from, and what it must be."""

    url: str
    sha256: str
    num_bytes: int


@dataclass
class Counts:
    """What a process has asked of the cache."""

    hits: int = 0
    downloads: int = 0
    downloaded_bytes: int = 0
    retries: int = 0


class Cache:
    """A folder of verified copies, never larger than its limit.

    Args:
        folder: on a disk of this machine; it may be shared by any number of processes.
        limit_bytes: of all files in it.
        policy: how patient to be with hosts.
    """

    def __init__(self, folder: Path, limit_bytes: int, policy: FetchPolicy) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.policy = policy
        self.distance: Callable[[str], float] = lambda sha256: inf
        self._reset()

    def _reset(self) -> None:
        self.counts = Counts()
        self._pid = os.getpid()
        self._open: dict[str, int] = {}
        self._mutex = threading.Lock()
        self._prefetching: threading.Thread | None = None

    def read_range(self, wanted: RemoteObject, offset: int, size: int, alone: bool = False) -> bytes:
        """Read `size` bytes from `offset`, downloading the object first where it is not here.

        Args:
            wanted: the object.
            offset: of the first byte.
            size: in bytes.
            alone: whether of an object that is not here only these bytes are fetched, and not kept; not so of a pipe.

        Raises:
            DataError: it cannot be had; the sentence names the URL.
        """
        self._mind_a_fork()
        with self._mutex:
            descriptor = self._open.get(wanted.sha256)
            if descriptor is not None:
                self.counts.hits += 1
            elif not alone or wanted.url.startswith(PIPE) or self._path(wanted).exists():
                descriptor = self._acquire(wanted)
            if descriptor is not None:
                return os.pread(descriptor, size, offset)
        data = fetch_range(wanted.url, offset, size, self.policy, self._count_retry)
        self.counts.downloaded_bytes += len(data)
        return data

    def take_counts(self) -> dict[str, int]:
        """Return this process's counts since the last call."""
        taken, self.counts = self.counts, Counts()
        return vars(taken)

    def prefetch(self, upcoming: Callable[[], Iterable[RemoteObject]]) -> None:
        """Keep downloading what will be read next, in the background of this process.

        Processes share the work without speaking: what one is downloading the others skip.
        """
        self._mind_a_fork()
        if self._prefetching is None:
            self._prefetching = threading.Thread(target=self._prefetch, args=(upcoming,), daemon=True)
            self._prefetching.start()
            threading.Thread(target=self._keep_wanted, args=(upcoming,), daemon=True).start()

    def _mind_a_fork(self) -> None:
        """Begin anew in a forked process: threads did not come along, and the parent's locks are the parent's."""
        if self._pid != os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)
            self._reset()

    def _prefetch(self, upcoming: Callable[[], Iterable[RemoteObject]]) -> None:
        while True:
            for wanted in upcoming():
                if self._path(wanted).exists() or wanted not in upcoming():  # reading has gone on in the meantime
                    continue
                with suppress(DataError, OSError):  # whoever reads it meets the same and says so
                    if (descriptor := self._download(wanted)) is not None:
                        os.close(descriptor)
            time.sleep(PREFETCH_PAUSE_SECONDS)

    def _keep_wanted(self, upcoming: Callable[[], Iterable[RemoteObject]]) -> None:
        """Say to other runs, by the files' times, what is read soon and what is done with."""
        before: set[Path] = set()
        while True:
            wanted = {self._path(one) for one in upcoming()}
            for path in wanted | before:
                with suppress(FileNotFoundError):
                    os.utime(path, None if path in wanted else (0, 0))
            before = wanted
            time.sleep(PREFETCH_PAUSE_SECONDS)

    def _acquire(self, wanted: RemoteObject) -> int:
        """Return a descriptor of the whole object, locked against eviction; give up what is not needed now."""
        for sha256 in [name for name in self._open if self.distance(name) > 0]:
            os.close(self._open.pop(sha256))
        deadline = time.time() + self.policy.stall_seconds
        while True:
            descriptor = self._opened(wanted)
            if descriptor is not None:
                self.counts.hits += 1
            else:
                descriptor = self._download(wanted)
            if descriptor is not None:
                self._open[wanted.sha256] = descriptor
                return descriptor
            if time.time() > max(deadline, self._last_progress(wanted) + 2 * self.policy.stall_seconds):
                raise DataError(
                    f"{self.folder}: no room for {wanted.url} ({wanted.num_bytes} bytes): all {self.limit_bytes} bytes "
                    "are in use; raise data.cache_bytes or lower data.shuffle_window"
                )
            time.sleep(POLL_SECONDS)

    def _opened(self, wanted: RemoteObject) -> int | None:
        """Open an object that is here."""
        try:
            descriptor = os.open(self._path(wanted), os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink == 0:  # evicted a moment ago
            os.close(descriptor)
            return None
        os.utime(descriptor)
        return descriptor

    def _download(self, wanted: RemoteObject) -> int | None:
        """Download an object, unless somebody is at it or there is no room now; return its locked descriptor."""
        descriptor = self._reserve(wanted)
        if descriptor is None:
            return None
        partial = self._partial(wanted)
        try:
            self._fill(wanted, descriptor)
            os.fsync(descriptor)
            with self._alone():
                partial.rename(self._path(wanted))
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException as error:
            with self._alone():
                partial.unlink(missing_ok=True)
            os.close(descriptor)
            if not isinstance(error, OSError):
                raise
            cure = "move data.cache_dir, or lower data.cache_bytes"
            raise DataError(f"{self.folder}: {error.strerror}; {cure}") from None
        self.counts.downloads += 1
        return descriptor

    def _fill(self, wanted: RemoteObject, descriptor: int) -> None:
        """Write an object into its partial file, and prove it; what arrived wrong is fetched once more."""
        for last in (False, True):
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
            if last:
                raise MissingObjectError(
                    f"{wanted.url}: its sha256 is {digest.hexdigest()}, the index promises {wanted.sha256}; "
                    "it has changed or is damaged: run `vitrail shards index` again"
                )

    def _count_retry(self) -> None:
        self.counts.retries += 1

    def _reserve(self, wanted: RemoteObject) -> int | None:
        """Make room and return the locked partial file; None if somebody has it, or there is no room now."""
        if wanted.num_bytes > self.limit_bytes:
            raise DataError(
                f"{wanted.url}: {wanted.num_bytes} bytes, more than the whole cache: raise data.cache_bytes"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            if self._path(wanted).exists():
                return None
            descriptor = os.open(self._partial(wanted), os.O_RDWR | os.O_CREAT, 0o644)
            is_ours = False
            try:
                is_ours = _try_lock(descriptor) and self._make_room(wanted)
                if is_ours:
                    os.ftruncate(descriptor, wanted.num_bytes)
            finally:
                if not is_ours:  # left open, it would keep its lock
                    os.close(descriptor)
            return descriptor if is_ours else None

    def _make_room(self, wanted: RemoteObject) -> bool:
        """Evict what is needed last, but nothing that is needed sooner than this, until it fits.

        What another run wanted a moment ago goes last, and only for what is needed now.
        """
        own = self._partial(wanted)
        sizes = {path: path.stat().st_size for path in self.folder.iterdir() if path != own and path.name != "lock"}
        for partial in [path for path in sizes if path.suffix == ".partial"]:
            if _remove_if_unused(partial):  # of a process that died
                del sizes[partial]
        free = self.limit_bytes - sum(sizes.values())
        ahead = self.distance(wanted.sha256)
        is_urgent = ahead <= 0 or ahead == inf
        candidates = []
        for path in [path for path in sizes if not path.suffix]:
            distance, age = self.distance(path.name), time.time() - path.stat().st_mtime
            is_leased = distance == inf and age < LEASE_SECONDS
            if (distance > ahead or distance == inf) and (is_urgent or not is_leased):
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
        """Return when somebody last wrote at the partial file; long ago if nobody is at it."""
        try:
            return self._partial(wanted).stat().st_mtime
        except FileNotFoundError:
            return -inf

    @contextmanager
    def _alone(self) -> Iterator[None]:
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
        return self.folder / f"{wanted.sha256}.partial"

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
    """Remove a file that nobody has locked."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not _try_lock(descriptor):
            return False
        path.unlink()
        return True
    finally:
        os.close(descriptor)
