"""Read a tar once, from front to back, from a disk or a network; prove that it was read to its end.

The stdlib's tarfile takes a damaged header for the end of the archive, and so do its users, in silence. Here the end
must be tar's own end mark.
"""

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pretrain.data.storage.remote import FetchPolicy, is_remote, open_stream
from pretrain.errors import DataError

BLOCK = tarfile.BLOCKSIZE
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """A member of a tar: its name, whether it is a plain file, where it stands, and the data of a file that is read.

    In bytes of the tar: `begin` is where its header begins, `offset` where its data does, `size` how long that is.
    """

    name: str
    is_file: bool
    is_folder: bool
    begin: int
    offset: int
    size: int
    data: bytes


class Archive:
    """A tar as a stream. `num_bytes` and `sha256` are the whole tar's, once `members` has come to its end.

    Args:
        place: what error messages call it.
        stream: read forwards only.
        wanted: says by its name whether a file's data is read. What is not is passed over, where the stream can seek,
            and `sha256` means nothing then.
    """

    def __init__(self, place: str, stream: BinaryIO, wanted: Callable[[str], bool] = lambda _: True) -> None:
        self.place = place
        self.wanted = wanted
        self._file = _Forward(stream)

    @property
    def num_bytes(self) -> int:
        """Bytes read so far."""
        return self._file.position

    @property
    def sha256(self) -> str:
        """The digest of the bytes read so far."""
        return self._file.digest.hexdigest()

    def members(self) -> Iterator[Member]:
        """Yield every member in turn.

        Raises:
            DataError: truncated, damaged, or no tar.
        """
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as archive:  # type: ignore[call-overload]
                while (info := archive.next()) is not None:
                    is_read = info.isfile() and self.wanted(info.name)
                    data = self._file.read(info.size) if is_read else b""
                    if is_read and len(data) < info.size:
                        raise DataError(f"{self.place}: truncated at byte {self.num_bytes}, within {info.name}")
                    size = info.size if info.isfile() else 0
                    yield Member(info.name, info.isfile(), info.isdir(), info.offset, info.offset_data, size, data)
                    if info.isfile() and not is_read:
                        self._file.skip(info.offset_data + size)
                end = archive.offset
        except tarfile.TarError as error:
            raise DataError(f"{self.place}: not a readable tar ({error})") from None
        self._prove_end(end)

    def _prove_end(self, end: int) -> None:
        """Make sure that where tarfile stopped, and from there on, all is zero."""
        block = self._file.last
        if len(block) < BLOCK:
            raise DataError(f"{self.place}: truncated at byte {self.num_bytes}: tar's end mark is missing")
        while block:
            if block.strip(b"\0"):
                raise DataError(f"{self.place}: damaged header at byte {end}; what follows cannot be read")
            block = self._file.read(CHUNK_BYTES)


def open_tar(place: str, policy: FetchPolicy) -> BinaryIO:
    """Open a tar to be read once, from front to back, wherever it stands.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return open_stream(place, policy) if is_remote(place) else Path(place).open("rb")
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {error.strerror}") from None


class _Forward:
    """What tarfile needs of a file, over a stream that only moves on; it is hashed on the way."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()
        self.position = 0
        self.last = b""

    def read(self, size: int) -> bytes:
        """Read `size` bytes, fewer only at the end."""
        pieces = []
        while size > 0 and (piece := self.stream.read(size)):
            pieces.append(piece)
            size -= len(piece)
        self.last = b"".join(pieces)
        self.digest.update(self.last)
        self.position += len(self.last)
        return self.last

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        while self.position < position and self.read(min(CHUNK_BYTES, position - self.position)):
            pass

    def skip(self, position: int) -> None:
        """Move on to a position without reading, all but the byte before it, which must be there."""
        if self.stream.seekable() and self.position < position:
            self.stream.seek(position - 1)
            self.position = position - 1
        self.seek(position)
