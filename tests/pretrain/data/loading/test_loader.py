"""Batches: the same samples and pixels for any number of ranks and workers, from any position."""

import json
import multiprocessing
import shutil
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from pretrain.config import AugmentConfig
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.open import open_dataset
from pretrain.data.dataset.sharded import ShardDataset
from pretrain.data.dataset.subset import LabelSubset
from pretrain.data.loading.loader import BatchPlan, LoadedBatch, evaluation_batches, training_batches
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes
from pretrain.data.transforms.views import EvalView, PatchOrderView, TrainView, View
from pretrain.errors import DataError

VIEW = TrainView(AugmentConfig(brightness=0.3, mixup=0.8, cutmix=1.0, erasing=0.3), 16)
GLOBAL_BATCH = 24


def batches(
    samples: Dataset, view: View = VIEW, start: int = 0, stop: int = 20 * GLOBAL_BATCH, **changes: Any
) -> Generator[LoadedBatch, None, None]:
    settings = {"seed": 0, "shuffle_window": 3, "global_batch_size": GLOBAL_BATCH, "accumulation_steps": 12}
    return training_batches(samples, view, BatchPlan(**(settings | changes)), start, stop)


def by_position(batches: Iterable[LoadedBatch]) -> dict[int, tuple[int, bytes]]:
    """Return the label and the bytes of all fields at each position."""
    seen: dict[int, tuple[int, bytes]] = {}
    for loaded in batches:
        batch = loaded.tensors
        for i, position in enumerate(batch["position"].tolist()):
            assert position not in seen
            content = b"".join(batch[name][i].numpy().tobytes() for name in sorted(batch) if name != "position")
            seen[position] = (int(batch["label"][i]), content)
    return seen


@pytest.mark.processes
def test_memory_stays_flat_over_epochs(digits: Path) -> None:
    """In the training process and its worker. A leak of 200 bytes per sample would be detected."""
    samples = open_dataset(digits / "train")
    steps, main, marks = sum(samples.shard_sizes) // GLOBAL_BATCH, psutil.Process(), []
    settings = {"stop": 16 * steps * GLOBAL_BATCH, "accumulation_steps": 1, "num_workers": 1}
    for step, _ in enumerate(batches(samples, **settings)):
        if step % (4 * steps) == 3 * steps:
            marks.append(sum(process.memory_info().rss for process in (main, *main.children(recursive=True))))
    assert len(marks) == 4
    assert marks[-1] - marks[0] < 1_000_000


@pytest.mark.processes
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("world_size", "num_workers", "num_threads", "accumulation"), [(2, 0, 1, 2), (3, 2, 3, 2), (5, 1, 1, 1)]
)
def test_pixels_are_identical_for_any_number_of_ranks_workers_and_threads(
    digits: Path, world_size: int, num_workers: int, num_threads: int, accumulation: int, mixed: bool
) -> None:
    sets = [digits / "train", digits / "validation"]
    samples = open_dataset(sets, [3.0, 1.0]) if mixed else open_dataset(sets[0])
    alone = by_position(batches(samples))
    together: dict[int, tuple[int, bytes]] = {}
    for rank in range(world_size):
        mine = by_position(
            batches(
                samples,
                rank=rank,
                world_size=world_size,
                num_workers=num_workers,
                num_threads=num_threads,
                accumulation_steps=accumulation,
            )
        )
        assert not mine.keys() & together.keys()
        together |= mine
    assert together == alone
    assert sorted(alone) == list(range(20 * GLOBAL_BATCH))


def test_loading_from_a_later_position_gives_the_same_samples(digits: Path) -> None:
    samples = open_dataset(digits / "train")
    whole = by_position(batches(samples))
    start = 13 * GLOBAL_BATCH
    assert by_position(batches(samples, start=start)) == {p: seen for p, seen in whole.items() if p >= start}


def test_second_epoch_has_the_same_samples_with_other_augmentation(digits: Path) -> None:
    samples = open_dataset(digits / "validation")
    count = sum(samples.shard_sizes)
    seen = by_position(batches(samples, stop=2 * count, global_batch_size=count, accumulation_steps=1))
    labels = [seen[p][0] for p in range(2 * count)]
    assert sorted(labels[:count]) == sorted(labels[count:])
    assert not {seen[p][1] for p in range(count)} & {seen[p][1] for p in range(count, 2 * count)}


def test_patch_order_depends_on_seed_epoch_and_sample(digits: Path) -> None:
    samples = open_dataset(digits / "validation")
    count = sum(samples.shard_sizes)
    settings = {"stop": 2 * count, "global_batch_size": count, "accumulation_steps": 1}
    orders = [
        [
            order.tobytes()
            for loaded in batches(samples, PatchOrderView(VIEW, 16), seed=seed, **settings)
            for order in loaded.tensors["patch_order"].numpy()
        ]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1]
    assert len({*orders[0], *orders[2]}) == 4 * count  # each sample its own, in each epoch and by each seed


@pytest.mark.processes
@pytest.mark.parametrize(("world_size", "batch_size", "workers"), [(1, 7, 0), (2, 5, 1), (3, 64, 0), (5, 4, 0)])
def test_evaluation_counts_every_sample_once(digits: Path, world_size: int, batch_size: int, workers: int) -> None:
    samples = open_dataset(digits / "validation")
    positions, counts = [], set()
    for rank in range(world_size):
        mine = list(
            evaluation_batches(
                samples,
                EvalView(16),
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                num_workers=workers,
            )
        )
        counts.add(len(mine))
        for loaded in mine:
            batch = loaded.tensors
            positions += batch["position"][batch["weight"] == 1].tolist()
            assert len(batch["weight"]) == batch_size
    assert sorted(positions) == list(range(sum(samples.shard_sizes)))
    assert len(counts) == 1


def test_max_samples_are_spread_evenly_over_the_dataset(digits: Path) -> None:
    samples, positions = open_dataset(digits / "train"), []
    for rank in range(2):
        for loaded in evaluation_batches(
            samples, EvalView(16), batch_size=4, rank=rank, world_size=2, num_workers=0, max_samples=10
        ):
            positions += loaded.tensors["position"][loaded.tensors["weight"] == 1].tolist()
    total = sum(samples.shard_sizes)
    assert sorted(positions) == [i * total // 10 for i in range(10)]


@pytest.mark.processes
def test_workers_end_when_the_generator_is_closed(digits: Path) -> None:
    loading = batches(open_dataset(digits / "train"), num_workers=2)
    next(loading)
    assert len(multiprocessing.active_children()) == 2
    loading.close()
    assert not multiprocessing.active_children()


@pytest.fixture
def copied(digits: Path, tmp_path: Path) -> Path:
    """A copy of a set of many small shards, for damage."""
    shutil.copytree(digits / "train", tmp_path / "copied")
    return tmp_path / "copied"


def test_repeated_views_of_an_image_differ(digits: Path) -> None:
    """The first view is that of a run without repeats; a batch of 12 has 6 images of such a run."""
    samples = open_dataset(digits / "train")
    settings = {"global_batch_size": 12, "accumulation_steps": 1}
    twice = by_position(batches(samples, stop=24, views_per_image=2, **settings))
    once = by_position(batches(samples, stop=12, **settings))
    for first in (0, 12):
        for i in range(6):
            view, other = twice[first + i], twice[first + i + 6]
            assert view == once[first // 2 + i]
            assert view[0] == other[0]
            assert view[1] != other[1]


@pytest.mark.processes
@pytest.mark.parametrize("num_workers", [0, 1])
def test_unusable_sample_is_replaced_and_other_samples_are_unchanged(copied: Path, num_workers: int) -> None:
    whole = by_position(batches(open_dataset(copied)))
    tar = copied / "shard-000003.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1  # inside of the first image
    tar.write_bytes(data)
    samples = open_dataset(copied)
    assert isinstance(samples, ShardDataset)
    key = samples.index(3).key[0]
    loaded = list(batches(samples, num_workers=num_workers))
    faults = [fault for batch in loaded for fault in batch.bad_samples]
    assert {fault[1:] for fault in faults} == {(str(tar), key, "damaged: its checksum is off")}
    seen = by_position(loaded)
    assert {p for p in seen if seen[p] != whole[p]} == {fault.position for fault in faults}
    assert [b.bad_samples for b in batches(samples)] == [b.bad_samples for b in loaded]  # again the same


def test_substitute_comes_from_the_same_window(copied: Path) -> None:
    samples = open_dataset(copied)
    order = samples.order(0, 3)
    (copied / "shard-000002.tar").unlink()
    bad = [fault for batch in batches(samples) for fault in batch.bad_samples if "No such file" in fault.reason]
    assert len(bad) > 10
    for fault in bad[:5]:
        window = {shard for _, shard, _ in order.substitutes(fault.position)}
        assert 2 in window
        assert len(window) <= 3


def test_edited_index_is_detected(copied: Path) -> None:
    path = copied / "shard-000001.index.json"
    content = json.loads(path.read_text())
    content["label"][0] = (content["label"][0] + 1) % 3
    path.write_text(json.dumps(content))
    faults = [fault for batch in batches(open_dataset(copied)) for fault in batch.bad_samples]
    assert {fault.shard for fault in faults} == {str(copied / "shard-000001.tar")}
    assert all("its checksum is not the one in dataset.json" in fault.reason for fault in faults)


@pytest.mark.processes
def test_data_without_any_usable_sample_is_an_error(copied: Path) -> None:
    for path in copied.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"sample .* cannot be used \(cannot be read: No such file.*\), nor can any of"):
        by_position(batches(open_dataset(copied), num_workers=1))
    assert not multiprocessing.active_children()


def test_missing_shard_is_named(digits: Path, tmp_path: Path) -> None:
    for path in (digits / "validation").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"shard-000000.tar: sample .*: cannot be read: No such file"):
        open_dataset(tmp_path).read(0, 0)


def test_label_subset_has_the_requested_number_per_class(digits: Path) -> None:
    samples = open_dataset(digits / "train")
    few = LabelSubset(samples, 4, seed=1)
    records = [few.read(0, row) for row in range(few.shard_sizes[0])]
    assert sorted(record.label for record in records) == [0] * 4 + [1] * 4 + [2] * 4
    assert [record.label for record in records] == list(few.labels(0))
    assert len({record.key for record in records}) == 12
    assert {r.key for r in records} != {LabelSubset(samples, 4, seed=2).read(0, row).key for row in range(12)}
    with pytest.raises(DataError, match=r"class 0: has 160 samples, but data.labels_per_class=999; lower it"):
        LabelSubset(samples, 999, seed=0)


def test_folder_of_images_is_a_dataset(digits: Path, tmp_path: Path) -> None:
    shards = open_dataset(digits / "validation")
    expected = {}
    for shard, size in enumerate(shards.shard_sizes):
        for row in range(size):
            record = shards.read(shard, row)
            path = tmp_path / "in" / f"{record.key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(record.image).save(path)
            expected[f"{record.key}.png"] = (record.image.tobytes(), record.label)
    folder = open_dataset(tmp_path / "in")
    assert folder.class_names == shards.class_names
    records = [folder.read(0, row) for row in range(folder.shard_sizes[0])]
    assert {record.key: (record.image.tobytes(), record.label) for record in records} == expected
    assert list(folder.labels(0)) == [record.label for record in records]
    moved = tmp_path / "in" / "0" / "extra.png"
    Image.fromarray(records[0].image).save(moved)
    assert open_dataset(tmp_path / "in").digest != folder.digest
    moved.write_text("broken")
    broken = open_dataset(tmp_path / "in")
    with pytest.raises(DataError, match=r"sample 0/extra.png: no usable image: not an image of a known format"):
        for row in range(broken.shard_sizes[0]):
            broken.read(0, row)
    (tmp_path / "stray.png").write_bytes(moved.read_bytes())
    with pytest.raises(DataError, match=r"1 image outside of the classes: stray\.png"):
        open_dataset(tmp_path)


def test_sets_with_different_classes_can_be_combined_without_labels(digits: Path, tmp_path: Path) -> None:
    make_shards(keep_classes(list_digits(), ["4", "5"]), tmp_path / "other", ShardOptions(validation_fraction=0.5))
    both = [digits / "train", tmp_path / "other" / "train"]
    with pytest.raises(DataError, match="its class names differ from those of"):
        open_dataset(both)
    samples = open_dataset(both, labeled=False)
    assert samples.class_names == []
    assert sum(samples.shard_sizes) == sum(sum(open_dataset(one).shard_sizes) for one in both)
    assert open_dataset([both[0], both[0]], labeled=False).class_names == ["0", "1", "2"]


def test_class_shares_are_those_of_the_visited_samples(digits: Path, tmp_path: Path) -> None:
    places = [digits / "train", digits / "validation"]
    infos = [json.loads((place / "dataset.json").read_text()) for place in places]
    counts = np.array([info["class_counts"] for info in infos], float)
    assert open_dataset(places).class_shares == pytest.approx(counts.sum(axis=0) / counts.sum())
    mixed = open_dataset(places, weights=[3.0, 1.0]).class_shares
    assert mixed == pytest.approx(np.array([0.75, 0.25]) @ (counts / counts.sum(axis=1, keepdims=True)))
    assert LabelSubset(open_dataset(places[0]), 2, 0).class_shares == [1 / 3] * 3


def test_several_sets_are_concatenated(digits: Path, tmp_path: Path) -> None:
    both = open_dataset([digits / "train", digits / "validation"])
    assert sum(both.shard_sizes) == 537
    assert both.read(len(both.shard_sizes) - 1, 0).key == open_dataset(digits / "validation").read(-1, 0).key
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="vitrail shards make"):
        open_dataset([digits / "train", tmp_path])
    with pytest.raises(DataError, match="list of data paths is empty"):
        open_dataset([])
    with pytest.raises(DataError, match="contains several splits; name one"):
        open_dataset(digits)
    with pytest.raises(DataError, match="no such folder; expected one with"):
        open_dataset(tmp_path / "nowhere")
