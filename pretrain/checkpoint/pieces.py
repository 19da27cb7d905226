"""Ranges of tensors in safetensors files: written in one stroke with their checksum, read back by any other ranges."""

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

from pretrain.checkpoint.manifest import Manifest, SavedFile
from pretrain.engine.partitions import EMA, WEIGHT
from pretrain.errors import CheckpointError

CHUNK = 8 << 20  # bytes


class Piece(NamedTuple):
    """A range of a flat fp32 tensor, and the kinds that are saved of it."""

    name: str
    start: int
    stop: int
    kinds: tuple[str, ...]


class NotFiniteError(Exception):
    """A tensor that must not reach the disk: it holds NaN or infinity."""


class Layout:
    """How a rank's pieces lie in its file: a safetensors header, then one piece after the other, all fp32."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = list(pieces)
        self.spans: list[tuple[str, Piece, int]] = []  # kind, piece, first element
        header: dict[str, Any] = {}
        place = 0
        for piece in self.pieces:
            size = piece.stop - piece.start
            for kind in piece.kinds:
                self.spans.append((kind, piece, place))
                offsets = [4 * place, 4 * (place + size)]
                header[_key(kind, piece.name, piece.start)] = {
                    "dtype": "F32",
                    "shape": [size],
                    "data_offsets": offsets,
                }
                place += size
        self.numel = place
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text

    def first_not_finite(self, values: Tensor) -> str | None:
        """Name the first piece that holds NaN or infinity."""
        for kind, piece, place in self.spans:
            if not bool(torch.isfinite(values[place : place + piece.stop - piece.start]).all()):
                return f"{kind} of {piece.name}"
        return None


def write_file(path: Path, layout: Layout, values: Tensor) -> SavedFile:
    """Write a rank's file; it is on the disk when this returns.

    Args:
        path: of the file.
        layout: of `values`.
        values: all pieces, [layout.numel], fp32 on the CPU.

    Raises:
        NotFiniteError: a value is NaN or infinite; nothing is written.
        OSError: the disk is full, or gone.
    """
    if bad := layout.first_not_finite(values):
        raise NotFiniteError(f"{bad} is not finite")
    sha256 = hashlib.sha256()
    data = memoryview(values.numpy().view(np.uint8))  # type: ignore[arg-type]  # numpy's arrays are buffers
    with path.open("wb", buffering=0) as file:
        for part in (memoryview(layout.header), *(data[i : i + CHUNK] for i in range(0, len(data), CHUNK))):
            sha256.update(part)
            _write_all(file, part)
        os.fsync(file.fileno())
    return SavedFile(path.name, len(layout.header) + len(data), sha256.hexdigest())


def _write_all(file: FileIO, data: memoryview) -> None:
    """Write all of `data`; a disk that is nearly full takes a part, and refuses the next."""
    while data:
        data = data[file.write(data) :]


class Reader:
    """The tensors of a checkpoint, by ranges; files are opened when they are first needed, and never unpickled."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._open: dict[int, Any] = {}

    def copy(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with a range of a tensor, [out.numel()] from `start`.

        Raises:
            CheckpointError: a file lacks what the manifest promises.
        """
        stop = start + out.numel()
        for number, first, last in self.manifest.tensors[name].pieces:
            low, high = max(first, start), min(last, stop)
            if low < high:
                try:
                    piece = self._file(number).get_slice(_key(kind, name, first))[low - first : high - first]
                except Exception as error:  # safetensors has an error type of its own, which is no subclass of any
                    raise CheckpointError(f"{self.folder}: {kind} of {name} cannot be read ({error})") from None
                out[low - start : high - start].copy_(piece)

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """Return a whole tensor."""
        shape = self.manifest.tensors[name].shape
        flat = torch.empty(math.prod(shape), dtype=torch.float32)
        self.copy(kind, name, 0, flat)
        return flat.view(shape)

    def _file(self, number: int) -> Any:
        if number not in self._open:
            path = self.folder / self.manifest.files[number].name
            self._open[number] = safe_open(path, framework="pt")
        return self._open[number]


def load_weights(folder: Path, *, averaged: bool = False) -> dict[str, Tensor]:
    """Return the fp32 weights of a checkpoint by their names in the objective; no moment is read.

    Args:
        folder: of the checkpoint.
        averaged: take the average of a weight where the run keeps one.
    """
    manifest = Manifest.load(folder)
    reader = Reader(folder, manifest)
    kinds = {name: EMA if averaged and EMA in tensor.kinds else WEIGHT for name, tensor in manifest.tensors.items()}
    return {name: reader.whole(name, kind) for name, kind in kinds.items()}


def find_faults(
    folder: Path, share: slice = slice(None), progress: Callable[[int], None] = lambda _: None
) -> Iterator[str]:
    """Yield a sentence for whatever is wrong with a checkpoint.

    Args:
        folder: of the checkpoint.
        share: of its files; their bytes are read and compared, the others are only looked for.
        progress: called with the bytes read since the last call.

    Raises:
        VersionError: another version of Vitrail wrote it.
    """
    try:
        manifest = Manifest.load(folder)
    except CheckpointError as error:
        yield str(error)
        return
    for name, tensor in manifest.tensors.items():
        if not _tiles(tensor.pieces, math.prod(tensor.shape)):
            yield f"{folder}: the pieces of {name} do not make up the tensor"
    for file in manifest.files:
        path = folder / file.name
        found = path.stat().st_size if path.is_file() else None
        if found != file.num_bytes:
            yield f"{path}: {'missing' if found is None else f'{found} bytes, expected {file.num_bytes}'}"
        elif file in manifest.files[share] and _sha256(path, progress) != file.sha256:
            yield f"{path}: damaged (its checksum differs)"


def _tiles(pieces: list[list[int]], numel: int) -> bool:
    """Say whether pieces cover a tensor without a gap or an overlap."""
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
            buffer = memoryview(bytearray(CHUNK))
            while count := file.readinto(buffer):
                sha256.update(buffer[:count])
                progress(count)
    except OSError:
        return "unreadable"
    return sha256.hexdigest()


def _key(kind: str, name: str, start: int) -> str:
    return f"{kind}:{name}:{start}"
