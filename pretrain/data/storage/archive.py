"""Read a tar once from start to end, from a disk or a network, and verify that the whole tar was read.

Python's tarfile treats a damaged header as the end of the archive, so tools built on it lose samples without an error.
`TarReader` accepts only tar's own end mark as the end.
"""

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pretrain.data.storage.remote import FetchPolicy, is_remote, open_stream
from pretrain.errors import DataError

BLOCK_BYTES = tarfile.BLOCKSIZE
CHUNK_BYTES = 1 << 20
CURE = "copy or download the tar again"


@dataclass(frozen=True)
class Member:
    """A member of a tar.

    Attributes:
        name: Path within the tar.
        is_file: Whether the member is a regular file.
        is_folder: Whether the member is a folder.
        header_offset: Position of the header in the tar, in bytes.
        offset: Position of the data in the tar, in bytes.
        size: Length of the data, in bytes.
        data: Content of a file that was read; empty otherwise.
    """

    name: str
    is_file: bool
    is_folder: bool
    header_offset: int
    offset: int
    size: int
    data: bytes


class TarReader:
    """Reads the members of a tar from a stream that only moves forward.

    Args:
        name: Name of the tar in error messages.
        stream: Content of the tar.
        should_read: Decides by a member's name whether its data is read. Other data is skipped, where the stream can
            seek, and `sha256` is meaningless then.
    """

    def __init__(self, name: str, stream: BinaryIO, should_read: Callable[[str], bool] = lambda _: True) -> None:
        self.name = name
        self.should_read = should_read
        self._file = _HashingStream(stream)

    @property
    def num_bytes(self) -> int:
        """Bytes read so far; the size of the tar after `members` has ended."""
        return self._file.position

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes read so far; that of the tar after `members` has ended."""
        return self._file.digest.hexdigest()

    def members(self) -> Iterator[Member]:
        """Yield every member in order.

        Raises:
            DataError: If the file is truncated, damaged or not a tar.
        """
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as archive:  # type: ignore[call-overload]
                while (info := archive.next()) is not None:
                    is_read = info.isfile() and self.should_read(info.name)
                    data = self._file.read(info.size) if is_read else b""
                    if is_read and len(data) < info.size:
                        raise DataError(f"{self.name}: truncated at byte {self.num_bytes}, within {info.name}; {CURE}")
                    size = info.size if info.isfile() else 0
                    yield Member(info.name, info.isfile(), info.isdir(), info.offset, info.offset_data, size, data)
                    if info.isfile() and not is_read:
                        self._file.skip(info.offset_data + size)
                end = archive.offset
        except tarfile.TarError as error:
            raise DataError(f"{self.name}: not a readable tar ({error}); {CURE}") from None
        self._check_end(end)

    def read_to_end(self) -> None:
        """Read the rest of a tar whose members cannot be read on, so that `num_bytes` and `sha256` are the tar's."""
        while self._file.read(CHUNK_BYTES):
            pass

    def _check_end(self, end: int) -> None:
        """Check that the tar holds only zeros from where tarfile stopped."""
        block = self._file.last_read
        if len(block) < BLOCK_BYTES:
            raise DataError(f"{self.name}: truncated at byte {self.num_bytes}, without the end mark; {CURE}")
        while block:
            if block.strip(b"\0"):
                raise DataError(
                    f"{self.name}: damaged header at byte {end}, so the members after it cannot be read; {CURE}"
                )
            block = self._file.read(CHUNK_BYTES)


def open_tar(path: str, policy: FetchPolicy) -> BinaryIO:
    """Open a local or remote tar to read it once from start to end.

    Args:
        path: Path or URL.
        policy: Timeouts and permissions for remote reads.

    Raises:
        DataError: If the tar cannot be opened.
    """
    try:
        return open_stream(path, policy) if is_remote(path) else Path(path).open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


class _HashingStream:
    """The file interface that tarfile needs, over a forward-only stream; it hashes all bytes that pass."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()
        self.position = 0
        self.last_read = b""

    def read(self, size: int) -> bytes:
        """Read `size` bytes, or fewer at the end of the stream."""
        pieces = []
        while size > 0 and (piece := self.stream.read(size)):
            pieces.append(piece)
            size -= len(piece)
        self.last_read = b"".join(pieces)
        self.digest.update(self.last_read)
        self.position += len(self.last_read)
        return self.last_read

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        while self.position < position and self.read(min(CHUNK_BYTES, position - self.position)):
            pass

    def skip(self, position: int) -> None:
        """Move to `position` without reading, except for the byte before it, which proves that the file is long enough.

        A seek past the end of a truncated file would succeed.
        """
        if self.stream.seekable() and self.position < position:
            self.stream.seek(position - 1)
            self.position = position - 1
        self.seek(position)
