"""Read byte ranges of shards. Local files; a few descriptors stay open."""

import os
from functools import lru_cache
from pathlib import Path

OPEN_FILES = 64


class _OpenFile:
    """A descriptor that closes with its last reference."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=OPEN_FILES)
def _open(path: Path) -> _OpenFile:
    return _OpenFile(path)


def read_range(path: Path, offset: int, size: int) -> bytes:
    """Read `size` bytes of a local file from `offset`; fewer come back where the file ends sooner."""
    file = _open(path)  # held while it is read: another thread may drop it from the cache
    return os.pread(file.descriptor, size, offset)
