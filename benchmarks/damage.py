"""Damage tars and indexes at random, and read the damaged datasets with our loader and with webdataset.

Shared by `input.py` and tests/pretrain/data.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import webdataset

from pretrain.config import AugmentConfig
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.loader import BadSample, BatchPlan, training_batches
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes
from pretrain.data.transforms.views import TrainView

VIEW = TrainView(AugmentConfig(), 8)
BATCH = 8

Damage = Callable[[bytes, random.Random], bytes | None]
DAMAGES: dict[str, Damage] = {
    "bit flipped": lambda data, generator: _at(
        data, generator.randrange(len(data)), lambda byte: byte ^ (1 << generator.randrange(8))
    ),
    "truncated": lambda data, generator: data[: generator.randrange(len(data))],
    "missing": lambda data, generator: None,
    "zeroed": lambda data, generator: _zeroed(data, generator.randrange(len(data)), generator.randrange(1, 4000)),
    "shifted": lambda data, generator: b"x" + data,
}


@dataclass(frozen=True)
class Trial:
    """One damaged file in an otherwise intact dataset, and the result of reading one epoch.

    Attributes:
        kind: Name of the damage in `DAMAGES`.
        victim: Path of the damaged file.
        changed: Whether the damage changed any byte.
        seen: Label and pixels by position.
        faults: Samples that the loader reported as bad.
    """

    kind: str
    victim: Path
    changed: bool
    seen: dict[int, bytes]
    faults: list[BadSample]


def make_small_set(folder: Path) -> Path:
    """Write forty digits in five or more shards and return their folder."""
    source = keep_classes(list_digits(), ["0", "1"])
    source = source.take(range(0, len(source), 9))
    make_shards(source, folder, ShardOptions(validation_fraction=0.0, shard_bytes=3_000, seed=0))
    return folder / "train"


def trials(whole: Path, work: Path, count: int) -> Iterator[Trial]:
    """Damage one random file in each of `count` copies of a dataset, and read one epoch from each copy."""
    files = sorted(path for path in whole.iterdir() if path.name != "dataset.json")
    generator = random.Random(0)
    for number in range(count):
        folder = work / str(number)
        folder.mkdir()
        for path in whole.iterdir():
            (folder / path.name).hardlink_to(path)
        victim = folder / generator.choice(files).name
        kind = generator.choice(list(DAMAGES))
        before = victim.read_bytes()
        after = DAMAGES[kind](before, generator)
        victim.unlink()
        if after is not None:
            victim.write_bytes(after)
        yield Trial(kind, victim, after != before, *epoch(folder))


def epoch(folder: Path) -> tuple[dict[int, bytes], list[BadSample]]:
    """Return label and pixels of every sample by position, and the samples that the loader reported as bad."""
    samples = open_dataset(folder)
    total = sum(samples.shard_sizes) // BATCH * BATCH
    seen, faults = {}, []
    for loaded in training_batches(
        samples,
        VIEW,
        BatchPlan(seed=0, shuffle_window=99, global_batch_size=BATCH),
        start=0,
        stop=total,
    ):
        faults += loaded.bad_samples
        for i, position in enumerate(loaded.tensors["position"].tolist()):
            label = bytes([loaded.tensors["label"][i]])
            seen[position] = label + loaded.tensors["image"][i].numpy().tobytes()
    return seen, faults


def webdataset_images(folder: Path) -> list[bytes] | None:
    """Return the images that webdataset reads from a folder's tars, or None if it raises."""
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    try:
        return [sample["png"] for sample in webdataset.WebDataset(tars, shardshuffle=False) if "png" in sample]
    except Exception:
        return None


def _at(data: bytes, offset: int, change: Callable[[int], int]) -> bytes:
    return data[:offset] + bytes([change(data[offset])]) + data[offset + 1 :]


def _zeroed(data: bytes, start: int, count: int) -> bytes:
    return data[:start] + b"\0" * len(data[start : start + count]) + data[start + count :]
