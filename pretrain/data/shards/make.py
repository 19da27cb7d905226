"""Images become shards: plain WebDataset tars, an index beside each, `dataset.json` over each split.

The same source, seed and sizes give the same bytes. Everything is written into a folder beside OUT that is renamed
last, so a stopped command leaves nothing that could be mistaken for shards.
"""

import hashlib
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from pretrain.data.decode import DecodeError, decode
from pretrain.data.index import DataError, DatasetInfo, ShardIndex, count_classes
from pretrain.data.order import permutation
from pretrain.data.sources import NAMES_SHOWN, Source, SourceImage

BLOCK = tarfile.BLOCKSIZE
IMAGES_IN_FLIGHT = 512

Progress = Callable[[int], None]
Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Made:
    """What `make_shards` wrote."""

    splits: dict[str, DatasetInfo]
    left_out: list[str]


def make_shards(
    source: Source,
    out: Path,
    *,
    validation: float,
    shard_bytes: int,
    seed: int,
    skip_bad: bool,
    progress: Progress = lambda _: None,
) -> Made:
    """Write `out/train` and `out/validation`.

    Args:
        source: the images.
        out: a folder that does not exist yet.
        validation: the share of each class that goes to the validation split.
        shard_bytes: a shard is closed once it holds this many bytes of images.
        seed: of the split and of the order in the shards.
        skip_bad: leave out what cannot be used, instead of stopping.
        progress: called with the number of images just done.

    Raises:
        DataError: an image is unreadable or a class is empty, and `skip_bad` is not set; or `out` is in use.
    """
    if out.exists():
        raise DataError(f"{out}: is there already; choose another folder or remove it")
    if source.faults and not skip_bad:
        faults = "\n".join(f"  {fault}" for fault in source.faults)
        raise DataError(f"going on would lose data:\n{faults}\nmend this, or leave it all out with --skip-bad")
    if not source.images:
        raise DataError("the source has no images")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    infos: dict[str, DatasetInfo] = {}
    unreadable: list[str] = []
    for name, images in zip(("train", "validation"), split(source, validation, seed), strict=True):
        if not images:
            continue
        (partial / name).mkdir(parents=True)
        mixed = [images[i] for i in permutation(len(images), seed, name, "mix")]
        indexes = list(_write_split(mixed, partial / name, source.class_names, shard_bytes, unreadable, progress))
        if indexes:
            entries = [index.save(partial / name) for index in indexes]
            counts = count_classes(chain.from_iterable(index.label for index in indexes), len(source.class_names))
            infos[name] = DatasetInfo(source.class_names, counts, entries)
            infos[name].save(partial / name)
        else:
            (partial / name).rmdir()
    if unreadable and not skip_bad:
        more = ["..."] if len(unreadable) > NAMES_SHOWN else []
        shown = "\n".join(f"  {line}" for line in [*unreadable[:NAMES_SHOWN], *more])
        shutil.rmtree(partial)
        raise DataError(
            f"{len(unreadable)} unreadable {'file' if len(unreadable) == 1 else 'files'}:\n{shown}\n"
            "mend or remove them, or leave them out with --skip-bad"
        )
    if "train" not in infos:
        raise DataError("no image to train on is readable")
    partial.rename(out)
    return Made(infos, unreadable)


def split(source: Source, validation: float, seed: int) -> tuple[list[SourceImage], list[SourceImage]]:
    """Split each class by itself, by a draw that depends on the class's name and size alone."""
    train: list[SourceImage] = []
    held_out: list[SourceImage] = []
    by_class: list[list[SourceImage]] = [[] for _ in source.class_names]
    for image in source.images:
        by_class[image.label].append(image)
    for name, images in zip(source.class_names, by_class, strict=True):
        count = round(len(images) * validation)
        if validation > 0 and len(images) > 1:
            count = min(max(count, 1), len(images) - 1)
        mixed = [images[i] for i in permutation(len(images), seed, name, "split")]
        held_out += mixed[:count]
        train += mixed[count:]
    return train, held_out


def _write_split(
    images: Sequence[SourceImage],
    folder: Path,
    class_names: Sequence[str],
    shard_bytes: int,
    unreadable: list[str],
    progress: Progress,
) -> Iterator[ShardIndex]:
    """Write the shards of a split; yield the index of each."""
    writer: ShardWriter | None = None
    count = 0
    for image, data, size in _read(images, unreadable, progress):
        if writer is None:
            writer = ShardWriter(folder / f"shard-{count:06d}.tar")
            count += 1
        metadata = {"class": class_names[image.label], "source": image.origin}
        writer.add(image.key, image.extension, data, size, image.label, metadata)
        if writer.position >= shard_bytes:
            yield writer.close()
            writer = None
    if writer is not None:
        yield writer.close()


def _read(
    images: Sequence[SourceImage], unreadable: list[str], progress: Progress
) -> Iterator[tuple[SourceImage, bytes, Size]]:
    """Read and prove the images, some at a time on all cores, in their order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(images), IMAGES_IN_FLIGHT):
            some = images[start : start + IMAGES_IN_FLIGHT]
            for image, data in zip(some, pool.map(_read_one, some), strict=True):
                progress(1)
                if isinstance(data, Exception):
                    unreadable.append(f"{image.origin}: {data}")
                else:
                    yield image, *data


def _read_one(image: SourceImage) -> tuple[bytes, Size] | Exception:
    """Return an image's bytes and its size, or why they are no image."""
    try:
        data = image.read()
        height, width, _ = decode(data).shape
    except (DecodeError, OSError, ValueError) as error:  # Pillow raises ValueError for some files that are cut
        return error
    return data, (width, height)


class ShardWriter:
    """Writes one tar, its checksum and its index; the bytes depend on the samples alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = path.open("wb")
        self.hash = hashlib.sha256()
        self.position = 0
        self.index = ShardIndex(path.name)

    def add(self, key: str, extension: str, image: bytes, size: Size, label: int, metadata: dict[str, str]) -> None:
        """Append one sample: the image, its class and its JSON."""
        self.index.key.append(key)
        self.index.extension.append(extension)
        self.index.offset.append(self._add_member(f"{key}.{extension}", image))
        self.index.size.append(len(image))
        self.index.crc32.append(zlib.crc32(image))
        self.index.label.append(label)
        self.index.width.append(size[0])
        self.index.height.append(size[1])
        self._add_member(f"{key}.cls", str(label).encode())
        self._add_member(f"{key}.json", json.dumps(metadata, ensure_ascii=False).encode())

    def close(self) -> ShardIndex:
        """Write tar's end mark; return the index."""
        self._write(b"\0" * (2 * BLOCK))
        self.file.close()
        self.index.num_bytes = self.position
        self.index.sha256 = self.hash.hexdigest()
        return self.index

    def _add_member(self, name: str, data: bytes) -> int:
        """Append a file; return the offset of its data."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.PAX_FORMAT))
        offset = self.position
        self._write(data + b"\0" * (-len(data) % BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.position += len(data)
