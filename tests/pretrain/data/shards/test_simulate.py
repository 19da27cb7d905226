"""The predictions hold: classes per batch and downloads per node."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.dataset.open import open_dataset
from pretrain.data.dataset.order import Order, Part
from pretrain.data.shards.simulate import classes_in_a_batch, downloaded_bytes, expected_classes
from tests.support.launching import Vitrail


def test_class_sorted_shards_mix_as_predicted() -> None:
    """1,280 shards of 1,000 samples sorted by 1,000 classes, batches of 256; a full shuffle would give 226 classes."""
    labels = np.repeat(np.arange(1000), 1280).reshape(1280, 1000)
    order = Order([Part("sorted", [1000] * 1280)], 7, 64)
    predicted = classes_in_a_batch(order, labels.__getitem__, 256, num_batches=50, seed=0)
    counts = []
    for step in range(0, 5000, 61):  # other batches than those sampled for the prediction
        places = [order.locate(step * 256 + i) for i in range(256)]
        counts.append(len({labels[shard][row] for _, shard, row in places}))
    assert np.mean(counts) >= 80
    assert predicted == pytest.approx(np.mean(counts), rel=0.05)


@pytest.mark.parametrize(("counts", "drawn"), [([5, 3, 1], 4), ([1, 1, 1, 1], 2), ([10, 0, 2], 11), ([7], 1)])
def test_expected_classes_matches_enumeration_without_replacement(counts: list[int], drawn: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    every = [len({labels[i] for i in chosen}) for chosen in combinations(range(len(labels)), drawn)]
    assert expected_classes(np.asarray(counts), drawn) == pytest.approx(np.mean(every))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.floats(0, 1.2))
def test_downloads_are_bounded_by_the_set_and_reduced_by_the_cache(sizes: list[int], share: float) -> None:
    total = sum(sizes)
    first, later = downloaded_bytes(Part("set", [1] * len(sizes)), sizes, int(share * total))
    assert first == total
    assert later <= total
    if share >= 1:
        assert later == 0
    # What the cache cannot hold must be downloaded again.
    assert later >= total - int(share * total) - 2 * max(sizes) if len(sizes) > 2 else True


def test_command_reports_the_actual_order(digits: Path, vitrail: Vitrail) -> None:
    def run(*options: str) -> str:
        done = vitrail("shards", "simulate", digits / "train", "--global-batch-size", "50", *options)
        assert done.code == 0, done.err
        return done.out

    answer = json.loads(run("--ranks", "8", "--json", "--shuffle-window", "4"))
    samples = open_dataset(digits / "train")
    assert answer["samples"] == sum(samples.shard_sizes)
    assert answer["steps_per_epoch"] == pytest.approx(answer["samples"] / 50)
    assert answer["samples_per_rank"] == [6, 7]
    assert answer["classes_in_a_batch"] == pytest.approx(3)
    assert answer["later_epoch_bytes_per_node"] == 0
    assert answer["images_per_second_per_worker"] > 0
    assert "each with 6 or 7 samples per rank" in run("--ranks", "8")
