"""Write ranges of tensors to safetensors files with a checksum, and read any other ranges back."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from pretrain.checkpoint.history import find_checkpoint
from pretrain.checkpoint.manifest import Manifest, SavedFile
from pretrain.engine.partitions import EMA, WEIGHT
from pretrain.errors import CheckpointError

CHUNK_BYTES = 8 << 20


class Piece(NamedTuple):
    """A range of a flattened fp32 tensor that one rank saves.

    Attributes:
        name: Name of the parameter or buffer.
        start: First element of the range.
        stop: Element after the last one of the range.
        kinds: Kinds of values that are saved for the range, such as "weight" and "exp_avg".
    """

    name: str
    start: int
    stop: int
    kinds: tuple[str, ...]


class NonFiniteError(Exception):
    """A tensor contains NaN or infinity, so it must not be saved."""


class Layout:
    """The layout of a rank's file: a safetensors header, then the values of all pieces in fp32, one after another.

    Args:
        pieces: Pieces in the order in which they are written.

    Attributes:
        spans: Kind, piece and first element in the file's values, for each kind of each piece.
        numel: Number of values in the file.
        header: Header of the file.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = list(pieces)
        self.spans: list[tuple[str, Piece, int]] = []
        header: dict[str, Any] = {}
        offset = 0
        for piece in self.pieces:
            size = piece.stop - piece.start
            for kind in piece.kinds:
                self.spans.append((kind, piece, offset))
                header[_key(kind, piece.name, piece.start)] = {
                    "dtype": "F32",
                    "shape": [size],
                    "data_offsets": [4 * offset, 4 * (offset + size)],
                }
                offset += size
        self.numel = offset
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text

    def find_non_finite(self, values: Tensor) -> str | None:
        """Return a description of the first piece that contains NaN or infinity, or None.

        Args:
            values: Values of all pieces, [numel].
        """
        for kind, piece, offset in self.spans:
            if not bool(torch.isfinite(values[offset : offset + piece.stop - piece.start]).all()):
                return f"{kind} of {piece.name}"
        return None


def write_file(path: Path, layout: Layout, values: Tensor) -> SavedFile:
    """Write a rank's file and flush it to the disk.

    The file gets its final name at once, because the folder around it still has a temporary one.

    Args:
        path: File to write.
        layout: Layout of the file.
        values: Values of all pieces, [layout.numel], fp32 on the CPU.

    Returns:
        Name, size and checksum for the manifest.

    Raises:
        NonFiniteError: If a value is NaN or infinite; then nothing is written.
    """
    if bad := layout.find_non_finite(values):
        raise NonFiniteError(f"{bad} is not finite")
    sha256 = hashlib.sha256()
    data = memoryview(values.numpy().view(np.uint8))  # type: ignore[arg-type]  # numpy's arrays are buffers
    chunks = (data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES))
    with path.open("wb", buffering=0) as file:
        for chunk in (memoryview(layout.header), *chunks):
            sha256.update(chunk)
            _write_all(file, chunk)
        os.fsync(file.fileno())
    return SavedFile(path.name, len(layout.header) + len(data), sha256.hexdigest())


def _write_all(file: FileIO, data: memoryview) -> None:
    """Write all bytes: a nearly full disk accepts a part of them, and raises an error only at the next write."""
    while data:
        data = data[file.write(data) :]


class Reader:
    """Reads ranges of the tensors of a checkpoint. Files are opened when first needed; nothing is unpickled.

    Args:
        folder: Folder of the checkpoint.
        manifest: Manifest of the checkpoint.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._open: dict[int, Any] = {}

    def read_into(self, out: Tensor, name: str, start: int, kind: str = WEIGHT) -> None:
        """Fill a tensor with a range of a saved one.

        Args:
            out: Tensor to fill, [N], on any device.
            name: Name of the parameter or buffer.
            start: First element of the range in the flattened saved tensor.
            kind: Kind of values to read.

        Raises:
            CheckpointError: If a file does not contain what the manifest lists.
        """
        stop = start + out.numel()
        for number, first, last in self.manifest.tensors[name].pieces:
            low, high = max(first, start), min(last, stop)
            if low < high:
                try:
                    piece = self._file(number).get_slice(_key(kind, name, first))[low - first : high - first]
                except Exception as error:  # safetensors raises a type of its own that derives from Exception alone
                    raise CheckpointError(f"{self.folder}: {kind} of {name} cannot be read ({error})") from None
                out[low - start : high - start].copy_(piece)

    def read_tensor(self, name: str, kind: str = WEIGHT) -> Tensor:
        """Return a whole tensor in its own shape, fp32 on the CPU.

        Args:
            name: Name of the parameter or buffer.
            kind: Kind of values to read.
        """
        shape = self.manifest.tensors[name].shape
        flat = torch.empty(math.prod(shape), dtype=torch.float32)
        self.read_into(flat, name, 0, kind)
        return flat.view(shape)

    def _file(self, number: int) -> Any:
        if number not in self._open:
            path = self.folder / self.manifest.files[number].name
            self._open[number] = safe_open(path, framework="pt")
        return self._open[number]


def load_weights(folder: Path, *, averaged: bool = False) -> dict[str, Tensor]:
    """Return the fp32 weights of a checkpoint by their names in the objective, without reading optimizer moments.

    Args:
        folder: Folder of the checkpoint.
        averaged: Whether to return the moving average of each weight that has one.
    """
    manifest = Manifest.load(folder)
    reader = Reader(folder, manifest)
    kinds = {name: EMA if averaged and EMA in tensor.kinds else WEIGHT for name, tensor in manifest.tensors.items()}
    return {name: reader.read_tensor(name, kind) for name, kind in kinds.items()}


def load_verified(source: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """Verify every byte of a checkpoint; return its manifest and its weights, averaged ones where the run has them.

    Args:
        source: Run folder, whose newest checkpoint is read, or a checkpoint folder.

    Raises:
        CheckpointError: If there is no checkpoint, or it is damaged.
    """
    checkpoint = find_checkpoint(source)
    if faults := list(find_faults(checkpoint)):
        raise CheckpointError("\n".join([*faults, f"{checkpoint}: cannot be used; name another checkpoints/step-*"]))
    return Manifest.load(checkpoint), load_weights(checkpoint, averaged=True)


def find_faults(
    folder: Path, checksummed: slice = slice(None), progress: Callable[[int], None] = lambda _: None
) -> Iterator[str]:
    """Verify a checkpoint and yield a sentence for each fault.

    A manifest of another version raises a `VersionError`, because such a checkpoint is not damaged.

    Args:
        folder: Folder of the checkpoint.
        checksummed: Slice of the list of files whose checksums are verified. All files are checked for their size.
        progress: Function that is called with the number of bytes read since its last call.
    """
    try:
        manifest = Manifest.load(folder)
    except CheckpointError as error:
        yield str(error)
        return
    for name, tensor in manifest.tensors.items():
        if not _covers(tensor.pieces, math.prod(tensor.shape)):
            yield f"{folder}: damaged (the pieces of {name} leave a gap or overlap)"
    for file in manifest.files:
        path = folder / file.name
        size = path.stat().st_size if path.is_file() else None
        if size != file.num_bytes:
            yield f"{path}: {'missing' if size is None else f'damaged ({size} bytes, expected {file.num_bytes})'}"
        elif file in manifest.files[checksummed] and _sha256(path, progress) != file.sha256:
            yield f"{path}: damaged (its checksum differs)"


def _covers(pieces: list[list[int]], numel: int) -> bool:
    """Return whether pieces cover a flattened tensor without a gap or an overlap."""
    end = 0
    for _, start, stop in sorted(pieces, key=lambda piece: piece[1:]):
        if start != end:
            return False
        end = stop
    return end == numel


def _sha256(path: Path, progress: Callable[[int], None]) -> str:
    sha256 = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            buffer = memoryview(bytearray(CHUNK_BYTES))
            while count := file.readinto(buffer):
                sha256.update(buffer[:count])
                progress(count)
    except OSError:
        return "unreadable"
    return sha256.hexdigest()


def _key(kind: str, name: str, start: int) -> str:
    return f"{kind}:{name}:{start}"
