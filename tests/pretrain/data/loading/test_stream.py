"""Streams over tars that webdataset itself wrote: uneven, damaged, with members that are none of ours."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import webdataset

from pretrain.config import AugmentConfig
from pretrain.data.loading.loader import BatchPlan, LoadedBatch
from pretrain.data.loading.stream import (
    WHOLE_TAR,
    TarStream,
    TarStreamBatches,
    open_tar_stream,
    spread_over_positions,
)
from pretrain.data.storage.remote import FetchPolicy
from pretrain.data.transforms.views import EvalView, TrainView
from pretrain.errors import DataError
from tests.support.foreign_tars import damage_header, png, write_tars

SIZES = [1, 7, 3, 12, 5]  # samples per tar
CLASSES = ["cat", "dog"]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Uneven tars with captions, metadata and pickles next to the images."""
    folder = tmp_path / "tars"
    write_tars(folder, SIZES, mark=tmp_path / "unpickled")
    return folder


def stream_of(*names: Path | str, class_names: list[str] | None = None, shuffle_buffer: int = 4) -> TarStream:
    return open_tar_stream([str(name) for name in names], class_names or [], shuffle_buffer, FetchPolicy())


def batches_of(stream: TarStream, plan: BatchPlan, steps: int, first_tar: int = 0) -> list[LoadedBatch]:
    return list(TarStreamBatches(stream, plan, first_tar).load(EvalView(8), 0, steps * plan.global_batch_size))


def numbers_of(batches: list[LoadedBatch]) -> list[int]:
    return [int(image[0, 0, 0]) for batch in batches for image in batch.tensors["image"]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_ranks_take_equally_many_steps_over_uneven_tars(tars: Path, num_workers: int) -> None:
    seen: Counter[int] = Counter()
    for rank in range(3):
        plan = BatchPlan(
            0, 1, global_batch_size=7, accumulation_steps=2, rank=rank, world_size=3, num_workers=num_workers
        )
        batches = batches_of(stream_of(tars), plan, steps=20)
        assert len(batches) == 40
        assert [len(batch.tensors["image"]) for batch in batches[:2]] in ([1, 1], [1, 2])
        assert not any(batch.bad_samples for batch in batches)
        seen.update(numbers_of(batches))
    assert set(seen) == set(range(sum(SIZES)))


def test_ranks_read_other_tars_after_the_loader_was_restarted(tmp_path: Path) -> None:
    """A rollback or another image size restarts it; the ranks have then opened different numbers of tars."""
    write_tars(tmp_path / "tars", [4] * 12, mark=tmp_path / "unpickled")
    stream = stream_of(tmp_path / "tars", shuffle_buffer=1)
    plans = [BatchPlan(0, 1, global_batch_size=6, rank=rank, world_size=2) for rank in range(2)]
    sources = [TarStreamBatches(stream, plan, 0) for plan in plans]
    seen: list[list[int]] = [[], []]
    for start, stop in ((0, 12), (12, 24)):  # each rank takes 6 samples of 2 tars, then 6 of 2 others
        next_tar = max(source.next_tar for source in sources)
        for rank, source in enumerate(sources):
            seen[rank] += numbers_of(list(source.load(EvalView(8), start, stop, next_tar)))
    assert len(seen[0]) == len(seen[1]) == 12
    assert len({*seen[0], *seen[1]}) == 24  # no sample twice within an epoch of 48


@pytest.mark.parametrize(
    ("num_bad", "positions"), [(0, []), (1, [8]), (2, [8, 10]), (3, [8, 9, 10]), (9, [8, 9, 10, 11])]
)
def test_every_bad_sample_counts_toward_the_limits(num_bad: int, positions: list[int]) -> None:
    bad = spread_over_positions([("a.tar", str(i), "broken") for i in range(num_bad)], [8, 9, 10, 11])
    assert [sample.key for sample in bad] == [str(i) for i in range(num_bad)]
    assert sorted({sample.position for sample in bad}) == positions


def test_weights_of_micro_batches_are_those_of_an_indexed_dataset(tars: Path) -> None:
    plan = BatchPlan(0, 1, global_batch_size=3, accumulation_steps=2, rank=1, world_size=2)
    weights = [batch.weight for batch in batches_of(stream_of(tars), plan, steps=3)]
    assert weights == [micro_batch.weight for micro_batch in plan.micro_batches(0, 9)]


def test_every_tar_is_read_once_per_epoch_in_a_new_order_by_any_number_of_workers(tars: Path) -> None:
    stream = stream_of(tars)
    epochs = [[number_and_tar.tar for number_and_tar in islice(stream.numbered_tars(0, 5 * i), 5)] for i in range(4)]
    assert all(sorted(epoch) == sorted(stream.tars) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    for num_readers in (1, 3, 8):
        shares = [islice(stream.numbered_tars(0, 0), reader, 40, num_readers) for reader in range(num_readers)]
        assert sorted(shard.number for share in shares for shard in share) == list(range(40))


def test_a_stream_is_shuffled_and_repeatable(tars: Path) -> None:
    plan = BatchPlan(0, 1, global_batch_size=4)
    first, second = (numbers_of(batches_of(stream_of(tars), plan, steps=7)) for _ in range(2))
    assert first == second
    assert first != sorted(first)
    assert first != numbers_of(batches_of(stream_of(tars), BatchPlan(1, 1, global_batch_size=4), steps=7))


def test_nothing_is_unpickled_and_captions_are_left_alone(tars: Path, tmp_path: Path) -> None:
    batches = batches_of(stream_of(tars), BatchPlan(0, 1, global_batch_size=4), steps=10)
    assert set(batches[0].tensors) == {"image", "label", "position"}
    assert not (tmp_path / "unpickled").exists()


def test_labels_and_names_come_with_their_images(tars: Path) -> None:
    for batch in batches_of(stream_of(tars, class_names=CLASSES), BatchPlan(0, 1, global_batch_size=4), steps=7):
        numbers = numbers_of([batch])
        assert batch.tensors["label"].tolist() == [number % 2 for number in numbers]
        assert [key for _, key in batch.names] == [f"{number:04d}" for number in numbers]


def test_a_resumed_stream_starts_at_the_next_tars(tars: Path) -> None:
    stream, plan = stream_of(tars, shuffle_buffer=1), BatchPlan(0, 1, global_batch_size=2)
    batch = batches_of(stream, plan, steps=4)[-1]
    opened = [shard.tar for shard in islice(stream.numbered_tars(0, 0), batch.next_tar)]
    resumed = batches_of(stream, plan, steps=2, first_tar=batch.next_tar)
    expected = next(stream.numbered_tars(0, batch.next_tar)).tar
    assert resumed[0].names[0][0] == expected
    assert expected not in opened[-1:]


def test_a_damaged_header_is_reported_and_the_samples_before_it_are_used(tars: Path) -> None:
    damage_header(tars / "003.tar", "0017")  # the seventh of twelve samples
    batches = batches_of(stream_of(tars), BatchPlan(0, 1, global_batch_size=4), steps=30)
    bad = {(Path(bad.shard).name, bad.key) for batch in batches for bad in batch.bad_samples}
    assert bad == {("003.tar", WHOLE_TAR)}
    seen = set(numbers_of(batches))
    assert set(range(11, 17)) <= seen
    assert not set(range(17, 23)) & seen


def test_a_damaged_image_and_a_bad_label_are_reported_and_passed_over(tars: Path) -> None:
    with webdataset.TarWriter(str(tars / "005.tar"), encoder=False) as writer:
        writer.write({"__key__": "broken", "png": b"not an image", "cls": b"0"})
        writer.write({"__key__": "unlabeled", "png": png(200)})
        writer.write({"__key__": "outside", "png": png(201), "cls": b"7"})
    batches = batches_of(stream_of(tars, class_names=CLASSES), BatchPlan(0, 1, global_batch_size=4), steps=20)
    reasons = {bad.key: bad.reason for batch in batches for bad in batch.bad_samples}
    assert reasons.keys() == {"broken", "unlabeled", "outside"}
    assert "label 7 is out of range: there are 2 classes" in reasons["outside"]
    assert not {200, 201} & set(numbers_of(batches))


def test_tars_without_any_usable_sample_end_the_run_with_a_sentence(tmp_path: Path) -> None:
    for shard, image in (("captions", None), ("broken", b"not an image")):
        folder = tmp_path / shard
        folder.mkdir()
        with webdataset.TarWriter(str(folder / "0.tar"), encoder=False) as writer:
            for number in range(200):
                writer.write({"__key__": str(number), **({"png": image} if image else {"txt": b"words"})})
    plan = BatchPlan(0, 1, global_batch_size=4)
    with pytest.raises(
        DataError, match=r"no usable sample in this .* read before it; the last problem: sample 199 has no images"
    ):
        batches_of(stream_of(tmp_path / "captions"), plan, steps=1)
    with pytest.raises(DataError, match="100 samples in a row cannot be used, the last one"):
        batches_of(stream_of(tmp_path / "broken"), plan, steps=1)


def test_images_beside_streamed_tars_are_not_lost(tars: Path) -> None:
    (tars / "cat").mkdir()
    (tars / "cat" / "0.jpg").touch()
    with pytest.raises(DataError, match=r"1 image, archive or folder beside the tars: cat/; move them away, or name"):
        stream_of(tars)
    assert len(stream_of(f"{tars}/{{000,001}}.tar").tars) == 2


def test_a_stream_that_was_moved_is_the_same_stream(tars: Path, tmp_path: Path) -> None:
    before = stream_of(tars)
    tars.rename(tmp_path / "moved")
    assert stream_of(tmp_path / "moved").digest == before.digest
    assert stream_of(tmp_path / "moved" / "000.tar").digest != before.digest


def test_names_are_expanded_and_wrong_ones_are_explained(tars: Path, tmp_path: Path) -> None:
    braces = stream_of(f"{tars}/{{000..002}}.tar", "https://host/{0..1}.tar")
    assert [tar.rpartition("/")[2] for tar in braces.tars] == ["000.tar", "001.tar", "002.tar", "0.tar", "1.tar"]
    with pytest.raises(DataError, match=r"missing: does not exist; with data\.stream=true, name tars"):
        stream_of(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: has no \*\.tar files"):
        stream_of(tmp_path / "empty")
    with pytest.raises(DataError, match=r"data\.train: the list is empty"):
        stream_of()


@pytest.mark.processes
def test_a_pipe_runs_only_where_it_is_allowed(tars: Path) -> None:
    plan = BatchPlan(0, 1, global_batch_size=2)
    names = [f"pipe:cat {tars / '001.tar'}"]
    with pytest.raises(DataError, match="allow_pipe"):
        batches_of(open_tar_stream(names, [], 1, FetchPolicy()), plan, steps=2)
    allowed = open_tar_stream(names, [], 1, FetchPolicy(allow_pipe=True))
    assert numbers_of(batches_of(allowed, plan, steps=4)) == [1, 2, 3, 4, 5, 6, 7, 1]


def test_augmentation_differs_between_epochs(tars: Path) -> None:
    stream = stream_of(tars / "000.tar", shuffle_buffer=1)
    view = TrainView(AugmentConfig(brightness=0.5, flip=0.0), 8)
    batches = list(TarStreamBatches(stream, BatchPlan(0, 1, global_batch_size=1), 0).load(view, 0, 6))
    assert len({float(batch.tensors["brightness"][0]) for batch in batches}) == 6
