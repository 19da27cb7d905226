"""Tars as other tools write them with webdataset: uneven, with captions and with pickles that must not be opened."""

import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def png(number: int) -> bytes:
    """Return an image whose pixels all have the value `number`."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tars(folder: Path, sizes: Sequence[int], mark: Path) -> None:
    """Write a tar of each size. Sample *n* of all has the pixels *n*, the label *n* mod 2, a caption and a pickle.

    Args:
        folder: Folder to make.
        sizes: Number of samples in each tar.
        mark: File that exists once something was unpickled.
    """
    folder.mkdir(parents=True)
    number = 0
    for shard, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"{shard:03d}.tar"), encoder=False) as writer:
            for _ in range(size):
                label = str(number % 2).encode()
                extra = {"txt": b"a caption", "pyd": pickle.dumps(_Bomb(mark))}
                writer.write({"__key__": f"{number:04d}", "png": png(number), "cls": label, **extra})
                number += 1


def damage_header(tar: Path, key: str) -> None:
    """Flip a byte in the header of a sample's image; tarfile and webdataset then end the tar there without an error."""
    content = bytearray(tar.read_bytes())
    content[content.index(f"{key}.png".encode()) + 150] ^= 0xFF
    tar.write_bytes(content)
