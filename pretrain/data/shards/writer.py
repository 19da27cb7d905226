"""Write one shard: a tar that every tool reads, its checksums and its index, in one pass.

The headers are ours (POSIX.1-2001: ustar, and pax where a name needs it): the same bytes under any Python, and faster
than tarfile's.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from zlib_ng.zlib_ng import crc32

from pretrain.data.shards.encoding import Stored
from pretrain.data.storage.index import NO_LABEL, ShardIndex

BLOCK = 512
NAME_BYTES = 100
LONGEST_FILE = 0o77777777777
# mode 0644, no owner, [size], the epoch's first second, [checksum], [type], then: ustar, and blanks.
BEFORE_SIZE, AFTER_SIZE = b"0000644\0" + b"0000000\0" * 2, b"00000000000\0"
AFTER_TYPE = b"\0" * 100 + b"ustar\x0000" + b"\0" * (BLOCK - 265)
FIXED_SUM = sum(BEFORE_SIZE + AFTER_SIZE + AFTER_TYPE) + 8 * ord(" ")  # its own checksum counts as blanks


class ShardWriter:
    """Writes a shard's tar aside; `close` puts it in its place. The bytes depend on the samples alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.aside = path.with_name(path.name + ".partial")
        self.file: BinaryIO = self.aside.open("wb")
        self.hash = hashlib.sha256()
        self.position = 0
        self.index = ShardIndex(path.name)

    def add(self, key: str, image: Stored, label: int, members: dict[str, bytes]) -> None:
        """Append a sample: the image, its class, and other members by extension."""
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
        """Write tar's end mark, make the file last, give it its name; return the index."""
        self._write(b"\0" * (2 * BLOCK))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.aside.replace(self.path)
        self.index.num_bytes = self.position
        self.index.sha256 = self.hash.hexdigest()
        return self.index

    def abandon(self) -> None:
        """Remove what was written."""
        self.file.close()
        self.aside.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.position += len(data)


def header(name: str, size: int) -> bytes:
    """Return what stands before a file of `size` bytes in a tar.

    Raises:
        ValueError: the file is too large for tar's plain size field, 8 GiB.
    """
    if size > LONGEST_FILE:
        raise ValueError(f"{name}: {size} bytes, more than the 8 GiB of a tar's member")
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
    """Return `LENGTH keyword=value`, where the length counts its own digits."""
    rest = f" {keyword}={value}\n".encode()
    length = len(rest) + len(str(len(rest)))
    return str(len(rest) + len(str(length))).encode() + rest


def _padding(size: int) -> bytes:
    return b"\0" * (-size % BLOCK)
