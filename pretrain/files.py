"""Write a file or folder under a temporary name and rename it once it is complete.

Readers see either the old content or the new, never a part of it. The temporary name is the final name plus `.partial`.

The functions that rename take `durable`. With the default, True, the data and the rename are flushed to the disk with
fsync before the function returns, so the result survives a power failure. Pass `durable=False` for files that are
rewritten often or can be made again: the rename is still atomic for other processes, but after a power failure the file
may be empty.
"""

import codecs
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    """Return the temporary name under which `path` is written."""
    return path.with_name(path.name + PARTIAL)


def atomic_write(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a whole file, replacing what was there.

    Args:
        path: File to write; its folder must exist.
        content: Text, which is encoded as UTF-8, or bytes.
        durable: Whether to fsync the file and its folder.
    """
    with atomic_file(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a binary file to write to; it becomes `path` at the end of the block, or is removed if the block raises.

    Args:
        path: File to write; its folder must exist. An existing file is replaced.
        durable: Whether to fsync the file and its folder.
    """
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            yield file
        publish(partial, path, durable=durable)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path` at the end of the block, or is removed if the block raises.

    Args:
        path: Folder to create, along with its parents.
        overwrite: Whether to replace an existing folder. It is removed only after the new one is complete.
        durable: Whether to fsync every file of the folder, the folder and its parent.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is false.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: already exists")
    partial, old = partial_path(path), None
    shutil.rmtree(partial, ignore_errors=True)  # left behind by a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if durable:
            for item in partial.rglob("*"):
                sync(item)
        old = _unname(path) if path.exists() else None
        publish(partial, path, durable=durable)
    except BaseException:
        if old and not path.exists():
            old.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if old:
        shutil.rmtree(old, ignore_errors=True)


def publish(partial: Path, path: Path, *, durable: bool = True) -> None:
    """Rename a complete file or folder to its final name.

    An existing file is replaced; a folder that is not empty is never replaced.

    Args:
        partial: Complete file or folder, on the same file system as `path`.
        path: Final name.
        durable: Whether to fsync `partial` and the folder of `path`. The files inside a folder are not flushed here.
    """
    if durable:
        sync(partial)
    partial.replace(path)
    if durable:
        sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder. It is renamed first, so that no reader finds it with a part of its files."""
    shutil.rmtree(_unname(path), ignore_errors=True)


def _unname(path: Path) -> Path:
    """Give a folder that is about to be removed a temporary name, and return that."""
    doomed = partial_path(path.with_name(f"{path.name}.old"))
    shutil.rmtree(doomed, ignore_errors=True)  # left behind by a process that was killed
    path.rename(doomed)
    return doomed


def sync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk with fsync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_encoding(path: Path) -> str:
    """Return the encoding of a text file by its byte-order mark: UTF-8 if it has none."""
    with path.open("rb") as file:
        return bytes_encoding(file.read(3))


def bytes_encoding(start: bytes) -> str:
    """Return the encoding of text by its byte-order mark: UTF-8 if it has none.

    Args:
        start: First bytes of the text, three or more.
    """
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig" if start.startswith(codecs.BOM_UTF8) else "utf-8"


def make_writable(folder: Path) -> str:
    """Create a folder unless it exists; return why files cannot be written to it, or an empty string."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot be created ({error.strerror})"
    return "" if os.access(folder, os.W_OK | os.X_OK) else "cannot be written"
