"""Folders and their sizes, and a disk that is full."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def full_disk(limit_bytes: int = 100) -> Iterator[None]:
    """Let no file of this process grow beyond a limit: the write that reaches it is truncated, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def folder_size(folder: Path) -> int:
    """Return the bytes of a folder's files, some of which may vanish meanwhile."""
    total = 0
    for path in folder.iterdir() if folder.exists() else []:
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
