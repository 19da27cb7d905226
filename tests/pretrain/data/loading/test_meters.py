"""Loading metrics, and the sentence that names the bottleneck."""

import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from pretrain.config import AugmentConfig
from pretrain.data.dataset.dataset import Dataset, EncodedSample
from pretrain.data.dataset.open import open_dataset
from pretrain.data.dataset.sharded import ShardDataset
from pretrain.data.loading.loader import BadSample, BatchPlan, LoadedBatch, LoadingStats, training_batches
from pretrain.data.loading.meters import STAGES, Meter, describe_bottleneck, loading_metrics
from pretrain.data.transforms.decode import ImageArray
from pretrain.data.transforms.views import TrainView

SLOW_SECONDS = 0.004


class SlowFetch(ShardDataset):
    def fetch(self, shard: int, row: int) -> EncodedSample:
        time.sleep(SLOW_SECONDS)
        return super().fetch(shard, row)


class SlowView(TrainView):
    def __call__(self, image: ImageArray, random: np.random.Generator) -> dict[str, Any]:
        time.sleep(SLOW_SECONDS)
        return super().__call__(image, random)


class SlowImages(ShardDataset):
    """The digits' labels with images that are slow to decode: large JPEGs of noise."""

    def fetch(self, shard: int, row: int) -> EncodedSample:
        return super().fetch(shard, row)._replace(data=large_jpeg())


@cache
def large_jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    return bytes(simplejpeg.encode_jpeg(noise))


def row_of(samples: Dataset, view: TrainView, train_seconds: float = 0.0) -> dict[str, float]:
    """Return the metrics of 20 batches after the first one, with as much time between them as training takes."""
    meter = Meter()
    loading = training_batches(
        samples,
        view,
        BatchPlan(seed=0, shuffle_window=4, global_batch_size=16, num_workers=1),
        start=0,
        stop=21 * 16,
    )
    next(loading)
    started = time.monotonic()
    for _ in range(20):
        meter.next_batch(loading)
        time.sleep(train_seconds)
    return loading_metrics(meter.take(), time.monotonic() - started, 1, 1)


@pytest.mark.processes
@pytest.mark.parametrize("stage", STAGES)
def test_slowest_stage_is_named(digits: Path, stage: str) -> None:
    dataset = {"fetch": SlowFetch, "decode": SlowImages, "augment": ShardDataset}[stage]([str(digits / "train")])
    view = (SlowView if stage == "augment" else TrainView)(AugmentConfig(), 16)
    sentence = describe_bottleneck(row_of(dataset, view), 1)
    assert sentence is not None
    assert f"% of the time: {STAGES[stage][0]} keeps 1 worker per rank " in sentence
    assert f"% busy; {STAGES[stage][1]}" in sentence


@pytest.mark.processes
def test_fast_loader_is_not_reported(digits: Path) -> None:
    row = row_of(open_dataset(digits / "train"), TrainView(AugmentConfig(), 16), train_seconds=0.1)
    assert describe_bottleneck(row | {"data/wait_fraction": 0.02}, 1) is None
    assert row["data/batches_ready"] > 1
    assert row["data/megabytes_per_second"] > 0


def test_advice_without_workers_is_to_use_workers() -> None:
    sentence = describe_bottleneck({"data/wait_fraction": 0.4}, 0)
    assert sentence == "input-bound 40% of the time: the training process loads the data itself; set data.num_workers"


def test_batches_ready_is_the_mean_length_of_the_queue() -> None:
    """Batches done at 1, 2 and 3 and taken at 4, 5 and 6: two, one and none were waiting behind the one taken."""
    meter = Meter()
    for done, taken in [(1.0, 4.0), (2.0, 5.0), (3.0, 6.0)]:
        meter.add(LoadedBatch({}, 1.0, [], LoadingStats(1.0, 2.0, 3.0, 4e6), done), taken - 0.5, taken)
    row = loading_metrics(meter.take(), 10.0, 1, 2)
    assert row == {
        "data/wait_fraction": pytest.approx(0.15),
        "data/batches_ready": 1.0,
        "data/megabytes_per_second": pytest.approx(1.2),
        "data/fetch_busy": pytest.approx(0.15),
        "data/decode_busy": pytest.approx(0.3),
        "data/augment_busy": pytest.approx(0.45),
    }
    assert meter.take() == [0.0] * 11


def test_remote_data_adds_cache_metrics() -> None:
    meter = Meter()
    stats = LoadingStats(bytes=1e6, hits=9, downloads=1, downloaded_bytes=5e6, retries=2)
    meter.add(LoadedBatch({}, 1.0, [], stats, 1.0), 1.5, 2.0)
    row = loading_metrics(meter.take(), 10.0, 1, 2)
    assert row["data/cache_hits"] == pytest.approx(0.9)
    assert row["data/downloaded_megabytes_per_second"] == pytest.approx(0.5)
    assert row["data/retries"] == 2


def test_meter_lists_bad_samples_until_they_are_taken() -> None:
    bad = [BadSample(position, "a.tar", "x", "damaged") for position in (3, 5)]
    batches = iter([LoadedBatch({}, 1.0, [each], LoadingStats(), 1.0) for each in bad])
    meter = Meter()
    assert meter.next_batch(batches).bad_samples == bad[:1]
    meter.next_batch(batches)
    assert meter.num_bad_samples == 2
    assert meter.take_bad_samples() == bad
    assert (meter.num_bad_samples, meter.take_bad_samples()) == (0, [])
