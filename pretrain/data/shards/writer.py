"""Write one shard in a single pass: a tar that every tool reads, its checksums and its index.

The tar headers are written by this module (POSIX.1-2001: ustar, with pax records for long or non-ASCII names), because
the bytes must be the same under any Python version, and because that is faster than tarfile.
"""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from zlib_ng.zlib_ng import crc32

from pretrain.data.shards.encoding import StoredImage
from pretrain.data.storage.archive import BLOCK_BYTES
from pretrain.data.storage.index import NO_LABEL, ShardIndex
from pretrain.files import partial_path, publish

NAME_BYTES = 100
MAX_FILE_BYTES = 0o77777777777
# A header: mode 0644, no owner, [size], modification time 0, [checksum], [type], then the ustar magic and zeros.
BEFORE_SIZE, AFTER_SIZE = b"0000644\0" + b"0000000\0" * 2, b"00000000000\0"
AFTER_TYPE = b"\0" * 100 + b"ustar\x0000" + b"\0" * (BLOCK_BYTES - 265)
FIXED_SUM = sum(BEFORE_SIZE + AFTER_SIZE + AFTER_TYPE) + 8 * ord(" ")  # the checksum field itself counts as blanks


class ShardWriter:
    """Writes a tar under a temporary name until `close`. The bytes depend only on the samples.

    Args:
        path: Path of the tar.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = partial_path(path).open("wb")
        self.hash = hashlib.sha256()
        self.position = 0
        self.index = ShardIndex(path.name)

    def add(self, key: str, image: StoredImage, label: int, members: dict[str, bytes]) -> None:
        """Append a sample.

        Args:
            key: Key of the sample.
            image: Image to store.
            label: Label, NO_LABEL if the sample has none.
            members: Other files of the sample by extension.
        """
        size = len(image.data)
        name = header(f"{key}.{image.extension}", size)
        offset = self.position + len(name)
        self.index.append(key, image.extension, offset, size, crc32(image.data), label, image.width, image.height)
        pieces = [name, image.data, _padding(size)]
        others = members if label == NO_LABEL else {"cls": str(label).encode(), **members}
        for extension, data in others.items():
            pieces += [header(f"{key}.{extension}", len(data)), data, _padding(len(data))]
        self._write(b"".join(pieces))

    def close(self) -> ShardIndex:
        """Write the end mark, flush the tar to the disk, give it its final name, and return its index."""
        self._write(b"\0" * (2 * BLOCK_BYTES))
        self.file.close()
        publish(partial_path(self.path), self.path)
        self.index.describe_tar(self.position, self.hash.hexdigest())
        return self.index

    def abandon(self) -> None:
        """Remove what was written so far."""
        with suppress(OSError):  # on a full disk, closing the file fails to write its last bytes
            self.file.close()
        partial_path(self.path).unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.position += len(data)


def header(name: str, size: int) -> bytes:
    """Return the tar header of a file.

    Args:
        name: Name of the file in the tar.
        size: Size of the file in bytes.

    Raises:
        ValueError: If the file exceeds 8 GiB, the limit of tar's size field.
    """
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{name}: {size} bytes, but a file in a tar must not exceed 8 GiB")
    plain = name.encode("ascii", "replace")
    if len(plain) <= NAME_BYTES and plain.decode() == name:
        return _ustar(plain, size, b"0")
    record = _pax_record("path", name)
    extended = _ustar(b"././@PaxHeader", len(record), b"x") + record + _padding(len(record))
    return extended + _ustar(plain[:NAME_BYTES], size, b"0")


def _ustar(name: bytes, size: int, kind: bytes) -> bytes:
    octal = b"%011o\0" % size
    checksum = FIXED_SUM + sum(name) + sum(octal) + kind[0]
    return b"".join(
        (name.ljust(NAME_BYTES, b"\0"), BEFORE_SIZE, octal, AFTER_SIZE, b"%06o\0 " % checksum, kind, AFTER_TYPE)
    )


def _pax_record(keyword: str, value: str) -> bytes:
    """Return `LENGTH keyword=value`, where the length includes its own digits."""
    rest = f" {keyword}={value}\n".encode()
    length = len(rest) + len(str(len(rest)))
    return str(len(rest) + len(str(length))).encode() + rest


def _padding(size: int) -> bytes:
    return b"\0" * (-size % BLOCK_BYTES)
