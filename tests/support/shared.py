"""What is made once for all workers of pytest."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out of the block; the lock ends with its process, whatever happens to that."""
    with path.open("w") as lock:
        flock(lock, LOCK_EX)
        yield


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """Return a file or folder, which is made by the first process that asks for it."""
    with locked(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            aside = path.with_name(f"{path.name}.aside")
            make(aside)
            aside.rename(path)
    return path
