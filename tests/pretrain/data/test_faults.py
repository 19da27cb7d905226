"""A thousand faults in tars and indexes: whatever a fault changes is found, named and replaced; the rest stays."""

import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from pretrain.config import AugmentConfig
from pretrain.data.augment import TrainView
from pretrain.data.loader import Fault, training_batches
from pretrain.data.sets import open_samples
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import Recipe
from pretrain.data.sources import keep_classes, list_digits

VIEW = TrainView(AugmentConfig(), 8)
BATCH = 8
FAULTS = 1000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty digits in five or more shards."""
    out = tmp_path_factory.mktemp("small") / "set"
    source = keep_classes(list_digits(), ["0", "1"])
    source = source.take(range(0, len(source), 9))
    make_shards(source, out, Recipe(validation=0.0, shard_bytes=3_000, seed=0))
    return out / "train"


Damage = Callable[[bytes, random.Random], bytes | None]
DAMAGES: dict[str, Damage] = {
    "flip": lambda data, chance: _at(data, chance.randrange(len(data)), lambda byte: byte ^ (1 << chance.randrange(8))),
    "cut": lambda data, chance: data[: chance.randrange(len(data))],
    "missing": lambda data, chance: None,
    "zeros": lambda data, chance: _zeroed(data, chance.randrange(len(data)), chance.randrange(1, 4000)),
    "shifted": lambda data, chance: b"x" + data,
}


def _at(data: bytes, place: int, change: Callable[[int], int]) -> bytes:
    return data[:place] + bytes([change(data[place])]) + data[place + 1 :]


def _zeroed(data: bytes, start: int, count: int) -> bytes:
    return data[:start] + b"\0" * len(data[start : start + count]) + data[start + count :]


def epoch(folder: Path) -> tuple[dict[int, bytes], list[Fault]]:
    """Every sample's label and pixels by position, and the faults."""
    samples = open_samples(folder)
    total = sum(samples.shard_sizes) // BATCH * BATCH
    seen, faults = {}, []
    for loaded in training_batches(
        samples,
        VIEW,
        seed=0,
        window=99,
        start=0,
        stop=total,
        global_batch_size=BATCH,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        num_workers=0,
    ):
        faults += loaded.faults
        for i, position in enumerate(loaded.tensors["position"].tolist()):
            label = bytes([loaded.tensors["label"][i]])
            seen[position] = label + loaded.tensors["image"][i].numpy().tobytes()
    return seen, faults


def test_every_fault_is_named_and_nothing_else_changes(small: Path, tmp_path: Path) -> None:
    whole, none = epoch(small)
    assert not none
    files = sorted(path for path in small.iterdir() if path.name != "dataset.json")
    chance = random.Random(0)
    images = webdataset_images(small)
    assert images is not None
    harmless, tried, silent = 0, 0, 0
    for number in range(FAULTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in small.iterdir():
            (folder / path.name).hardlink_to(path)
        victim = folder / chance.choice(files).name
        kind = chance.choice(list(DAMAGES))
        data = DAMAGES[kind](victim.read_bytes(), chance)
        changed = data != victim.read_bytes()
        victim.unlink()
        if data is not None:
            victim.write_bytes(data)

        seen, faults = epoch(folder)
        assert seen.keys() == whole.keys()  # as many steps, with as many samples
        named = {fault.position for fault in faults}
        assert {p for p in seen if seen[p] != whole[p]} <= named, (kind, victim)
        assert {Path(fault.shard).stem for fault in faults} <= {victim.name.split(".")[0]}
        if not faults:  # no sample was touched: padding, a header, a label's own member, zeros over zeros
            assert not changed or (victim.suffix == ".tar" and _images_are_whole(victim, small / victim.name)), kind
            harmless += 1
        if number % 10 == 0:
            assert epoch(folder) == (seen, faults)  # a second run meets the same
        if changed and victim.suffix == ".tar" and faults:
            tried += 1
            silent += webdataset_is_silent(folder, images)
    assert harmless < FAULTS / 2
    print(f"{tried} damaged tars, all named by us; webdataset lost or changed samples of {silent} without a word")
    assert silent > tried / 4


def webdataset_is_silent(folder: Path, images: list[bytes]) -> bool:
    """Say whether webdataset reads a folder's tars to the end without an error, but not these images."""
    return webdataset_images(folder) not in (None, images)


def webdataset_images(folder: Path) -> list[bytes] | None:
    """Return the images of a folder's tars as webdataset reads them; None where it raises."""
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    try:
        return [sample["png"] for sample in webdataset.WebDataset(tars, shardshuffle=False) if "png" in sample]
    except Exception:
        return None


def _images_are_whole(damaged: Path, whole: Path) -> bool:
    """Say whether every image's bytes stand where they stood."""
    before, after = whole.read_bytes(), damaged.read_bytes()
    with tarfile.open(whole) as archive:
        places = [(m.offset_data, m.offset_data + m.size) for m in archive if m.name.endswith(".png")]
    return all(before[start:stop] == after[start:stop] for start, stop in places)
