"""Plan shards: decide which image goes into which shard before any is written, from the list of images alone."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.dataset.order import permutation
from pretrain.data.shards.encoding import Encoding
from pretrain.data.sources.source import Integers, Source, SourceImage, keep_classes
from pretrain.data.storage.archive import BLOCK_BYTES
from pretrain.data.storage.index import NO_LABEL, write_json
from pretrain.data.transforms.decode import DecodeError
from pretrain.errors import DataError

SPLITS = ("train", "validation")
PLAN_FILE = "plan.json"
OVERHEAD_BYTES = 6 * BLOCK_BYTES  # per sample: three headers, two small files and padding
NUM_PROBED_IMAGES = 64
NUM_READERS = 8
SAMPLE_ERRORS = (DataError, DecodeError, OSError, ValueError)  # raised when one image cannot be read or encoded


@dataclass(frozen=True)
class ShardOptions:
    """Options for turning a source into shards. The source and these options determine every byte.

    Args:
        validation_fraction: Fraction of each class that goes to the validation split.
        shard_bytes: Maximum expected size of a shard; the shards of a split are about equally large.
        seed: Random seed for the split and for the order within the shards.
        encoding: Conversion of images before they are stored.
    """

    validation_fraction: float = 0.1
    shard_bytes: int = 256 * 10**6
    seed: int = 0
    encoding: Encoding = field(default_factory=Encoding)


def plan_shards(
    source: Source, options: ShardOptions, folder: Path, *, replaced: Source | None = None
) -> dict[str, list[Integers]]:
    """Return the positions in the source of the images of each shard, for each split that has any.

    Args:
        source: Images.
        options: Options for the split, the order, the encoding and the size of shards.
        folder: Working folder. The plan is saved there, or compared with one that is saved there.
        replaced: Source whose plan and shards are removed from the folder: the same with classes that are left out now.

    Raises:
        DataError: If the folder holds the plan of another source or of other options.
    """
    digest = _digest(source, options)
    path = folder / PLAN_FILE
    if (
        replaced is not None
        and replaced is not source
        and path.exists()
        and json.loads(path.read_bytes())["digest"] == _digest(replaced, options)
    ):
        for old in (folder / "done", folder / "out"):
            shutil.rmtree(old, ignore_errors=True)
        path.unlink()
    if path.exists():
        plan = json.loads(path.read_bytes())
        if plan["digest"] != digest:
            raise DataError(
                f"{folder}: was started with other images or options; remove it to start again, or use the same ones"
            )
    else:
        plan = {"digest": digest, **_estimate_sizes(source, options)}
        write_json(path, plan)
    sizes = plan["factor"] * np.where(source.sizes > 0, source.sizes, plan["unknown_bytes"]) + OVERHEAD_BYTES
    shards = {}
    splits = split(source, options.validation_fraction, options.seed)
    for name, rows in zip(SPLITS, splits, strict=True):
        if len(rows):
            shuffled = rows[permutation(len(rows), options.seed, name, "mix")]
            shards[name] = _cut(shuffled, sizes[shuffled], options.shard_bytes)
    return shards


def split(source: Source, validation_fraction: float, seed: int) -> tuple[Integers, Integers]:
    """Split each class at random into training and validation images; return the positions of both.

    A source that has splits keeps them. The random numbers of a class depend only on the seed and on its name and size,
    so adding a class changes no other.

    Args:
        source: Images.
        validation_fraction: Fraction of each class for validation; at least one image stays on each side.
        seed: Random seed.
    """
    if source.held_out is not None:
        return np.flatnonzero(~source.held_out), np.flatnonzero(source.held_out)
    train, held_out = [], []
    classes = [*enumerate(source.class_names)] or [(NO_LABEL, "unlabeled")]
    order = np.argsort(source.labels, kind="stable")
    ends = np.searchsorted(source.labels[order], [label for label, _ in classes], side="right")
    starts = np.searchsorted(source.labels[order], [label for label, _ in classes], side="left")
    for (_, name), start, end in zip(classes, starts, ends, strict=True):
        rows = order[start:end]
        count = round(len(rows) * validation_fraction)
        if validation_fraction > 0:
            count = max(min(max(count, 1), len(rows) - 1), 0)
        shuffled = rows[permutation(len(rows), seed, name, "split")]
        held_out.append(shuffled[:count])
        train.append(shuffled[count:])
    return np.concatenate(train), np.concatenate(held_out)


def leave_out_unusable_classes(source: Source, options: ShardOptions) -> tuple[Source, list[str]]:
    """Return the source without the classes of which no training image can be used, and a line about each loss.

    Of every other class, images are tried up to the first one that can be used. A second call with the same source
    returns the same.

    Args:
        source: Images; without classes, the source is returned as it is.
        options: Options for the split and the encoding.
    """
    training, _ = split(source, options.validation_fraction, options.seed)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        rows_of = [training[source.labels[training] == label] for label in range(len(source.class_names))]
        faults_of = list(pool.map(partial(_faults_if_unusable, source, options.encoding), rows_of))
    lost = {name: faults for name, faults in zip(source.class_names, faults_of, strict=True) if faults}
    if not lost:
        return source, []
    lines = []
    for name, faults in lost.items():
        others = int((source.labels == source.class_names.index(name)).sum()) - len(faults)
        held_out = f", nor are its {others} validation images" * bool(others)
        lines += [f"class {name}: none of its {len(faults)} training images can be used, so it is no class{held_out}"]
        lines += faults
    return keep_classes(source, [name for name in source.class_names if name not in lost]), lines


def _faults_if_unusable(source: Source, encoding: Encoding, rows: Integers) -> list[str]:
    """Return why each of some images cannot be used; nothing as soon as one of them can be used."""
    faults = []
    for row in rows:
        probed = _probe_size(encoding, source.image(int(row)))
        if not isinstance(probed, str):
            return []
        faults.append(probed)
    return faults


def _cut(rows: Integers, sizes: "np.ndarray[Any, Any]", shard_bytes: int) -> list[Integers]:
    """Cut rows into shards of about equal size, none expected to exceed `shard_bytes`."""
    ends = np.cumsum(sizes)
    count = int(-(-ends[-1] // shard_bytes))
    shard = np.minimum((ends - sizes) * count // ends[-1], count - 1)
    return np.split(rows, np.flatnonzero(np.diff(shard)) + 1)


def _digest(source: Source, options: ShardOptions) -> str:
    """Return a digest of everything that determines the shards, as far as the list of images shows it."""
    digest = hashlib.sha256(json.dumps([asdict(options), source.class_names, len(source)]).encode())
    digest.update(source.labels.tobytes() + source.sizes.tobytes())
    if source.held_out is not None:
        digest.update(source.held_out.tobytes())
    for name in source.names:
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def _estimate_sizes(source: Source, options: ShardOptions) -> dict[str, float]:
    """Return the expected size of an image of unknown size, and the ratio of stored to original bytes.

    Both are estimated from a few random images, unless all sizes are known and stay the same.
    """
    if options.encoding.keeps_bytes and source.sizes.all():
        return {"factor": 1.0, "unknown_bytes": 0}
    rows = permutation(len(source), options.seed, "tried")[:NUM_PROBED_IMAGES]
    images = [source.image(int(row)) for row in rows]
    with ThreadPoolExecutor(NUM_READERS) as pool:
        probed = list(pool.map(partial(_probe_size, options.encoding), images))
    sizes = [size for size in probed if not isinstance(size, str)]
    if not sizes:
        raise DataError(
            f"none of {len(probed)} sampled images can be used; check the source. The first error: {probed[0]}"
        )
    original, stored = (sum(column) for column in zip(*sizes, strict=True))
    return {"factor": stored / original, "unknown_bytes": original / len(sizes)}


def _probe_size(encoding: Encoding, image: SourceImage) -> tuple[int, int] | str:
    """Return the original and stored size of an image in bytes, or the reason why it cannot be used."""
    try:
        data = image.read().image
        return len(data), len(encoding(data).data)
    except SAMPLE_ERRORS as error:
        return f"{image.origin}: {error}"
