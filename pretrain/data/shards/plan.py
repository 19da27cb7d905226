"""Plan shards: which image goes into which, decided before anything is written, from the source's list alone."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.dataset.order import permutation
from pretrain.data.shards.encoding import Encoding
from pretrain.data.sources.source import Integers, Source, SourceImage
from pretrain.data.storage.archive import BLOCK_BYTES
from pretrain.data.storage.index import NO_LABEL, write_json
from pretrain.data.transforms.decode import DecodeError
from pretrain.errors import DataError

SPLITS = ("train", "validation")
PLAN_FILE = "plan.json"
HEADERS_BYTES = 6 * BLOCK_BYTES  # of a sample: three headers, two small files, and what fills the blocks
IMAGES_TRIED = 64
READERS = 8
UNUSABLE = (DataError, DecodeError, OSError, ValueError)  # what reading and encoding an image may end with


@dataclass(frozen=True)
class Recipe:
    """What is made of a source; together with that, it decides every byte.

    Args:
        validation: the share of each class that goes to the validation split.
        shard_bytes: no shard is expected to be larger; all of a split are about equal.
        seed: of the split and of the order in the shards.
        encoding: how the images are stored.
    """

    validation: float = 0.1
    shard_bytes: int = 256 * 10**6
    seed: int = 0
    encoding: Encoding = field(default_factory=Encoding)


def plan_shards(source: Source, recipe: Recipe, folder: Path) -> dict[str, list[Integers]]:
    """Return the rows of each shard of each split that has any; write the plan down in a folder, or prove it the same.

    Raises:
        DataError: the folder was begun with another source or recipe.
    """
    digest = _digest(source, recipe)
    path = folder / PLAN_FILE
    if path.exists():
        plan = json.loads(path.read_bytes())
        if plan["digest"] != digest:
            raise DataError(
                f"{folder}: was begun with other images or another recipe; remove it to begin anew, or go on with those"
            )
    else:
        plan = {"digest": digest, **_sizes_of_stored(source, recipe)}
        write_json(path, plan)
    sizes = plan["factor"] * np.where(source.sizes > 0, source.sizes, plan["unknown_bytes"]) + HEADERS_BYTES
    shards = {}
    for name, rows in zip(SPLITS, split(source, recipe.validation, recipe.seed), strict=True):
        if len(rows):
            mixed = rows[permutation(len(rows), recipe.seed, name, "mix")]
            shards[name] = _cut(mixed, sizes[mixed], recipe.shard_bytes)
    return shards


def split(source: Source, validation: float, seed: int) -> tuple[Integers, Integers]:
    """Split each class by itself, by a draw that depends on the class's name and size alone; return the rows."""
    train, held_out = [], []
    classes = [*enumerate(source.class_names)] or [(NO_LABEL, "unlabeled")]
    order = np.argsort(source.labels, kind="stable")
    ends = np.searchsorted(source.labels[order], [label for label, _ in classes], side="right")
    starts = np.searchsorted(source.labels[order], [label for label, _ in classes], side="left")
    for (_, name), start, end in zip(classes, starts, ends, strict=True):
        rows = order[start:end]
        count = round(len(rows) * validation)
        if validation > 0 and len(rows) > 1:
            count = min(max(count, 1), len(rows) - 1)
        mixed = rows[permutation(len(rows), seed, name, "split")]
        held_out.append(mixed[:count])
        train.append(mixed[count:])
    return np.concatenate(train), np.concatenate(held_out)


def _cut(rows: Integers, sizes: "np.ndarray[Any, Any]", shard_bytes: int) -> list[Integers]:
    """Cut rows into shards of about equal bytes, none expected to be larger than asked."""
    ends = np.cumsum(sizes)
    count = int(-(-ends[-1] // shard_bytes))
    shard = np.minimum((ends - sizes) * count // ends[-1], count - 1)
    return np.split(rows, np.flatnonzero(np.diff(shard)) + 1)


def _digest(source: Source, recipe: Recipe) -> str:
    """Digest everything that decides what is written, as far as a list of the source can tell."""
    digest = hashlib.sha256(json.dumps([asdict(recipe), source.class_names, len(source)]).encode())
    digest.update(source.labels.tobytes() + source.sizes.tobytes())
    for name in source.names:
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def _sizes_of_stored(source: Source, recipe: Recipe) -> dict[str, float]:
    """Return what an image of unknown size is expected to have, and what becomes of a byte; from a few, if need be.

    Raises:
        DataError: not one of them can be used.
    """
    if recipe.encoding.keeps_bytes and source.sizes.all():
        return {"factor": 1.0, "unknown_bytes": 0}
    images = [source.image(int(row)) for row in permutation(len(source), recipe.seed, "tried")[:IMAGES_TRIED]]
    with ThreadPoolExecutor(READERS) as pool:
        tried = list(pool.map(partial(_size_of_stored, recipe.encoding), images))
    sizes = [size for size in tried if not isinstance(size, str)]
    if not sizes:
        raise DataError(f"none of {len(tried)} images that were tried can be used; the first: {tried[0]}")
    read, stored = (sum(column) for column in zip(*sizes, strict=True))
    return {"factor": stored / read, "unknown_bytes": read / len(sizes)}


def _size_of_stored(encoding: Encoding, image: SourceImage) -> tuple[int, int] | str:
    """Return an image's bytes as it is and as it is stored, or why it cannot be used."""
    try:
        data = image.read().image
        return len(data), len(encoding(data).data)
    except UNUSABLE as error:
        return f"{image.origin}: {error}"
