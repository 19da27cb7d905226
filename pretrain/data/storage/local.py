"""Read byte ranges of local shards. A limited number of files stays open between reads."""

import os
from functools import lru_cache
from pathlib import Path

MAX_OPEN_FILES = 64


class _OpenFile:
    """A file descriptor that is closed with its last reference."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=MAX_OPEN_FILES)
def _open(path: Path) -> _OpenFile:
    return _OpenFile(path)


def read_range(path: Path, offset: int, size: int) -> bytes:
    """Read up to `size` bytes of a local file, starting at byte `offset`; fewer if the file ends before."""
    file = _open(path)  # hold a reference while reading: another thread may evict the file from the cache
    return os.pread(file.descriptor, size, offset)
