"""Order: every sample once per epoch and equal steps on all ranks, for any layout and number of ranks."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.dataset.order import MIX_BLOCK, Order, Part, RepeatedAugmentation, micro_batches, permutation

layouts = st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(any)


@settings(max_examples=200, deadline=None)
@given(layouts, st.integers(1, 50), st.integers(0, 3), st.integers(0, 2))
def test_epoch_contains_every_sample_once(sizes: list[int], window: int, seed: int, epoch: int) -> None:
    order = Order([Part("digest", sizes)], seed, window)
    start = epoch * sum(sizes)
    places = [order.locate(start + i) for i in range(sum(sizes))]
    expected = [(epoch, shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert sorted(places) == expected


@settings(max_examples=100, deadline=None)
@given(layouts, st.integers(1, 50), st.data())
def test_locate_does_not_depend_on_earlier_calls(sizes: list[int], window: int, data: st.DataObject) -> None:
    walked = Order([Part("digest", sizes)], 0, window)
    position = data.draw(st.integers(0, 3 * sum(sizes) - 1))
    for before in range(position):
        walked.locate(before)
    assert walked.locate(position) == Order([Part("digest", sizes)], 0, window).locate(position)


@settings(max_examples=100, deadline=None)
@given(layouts, st.integers(1, 8))
def test_window_reads_only_its_own_shards(sizes: list[int], window: int) -> None:
    order = Order([Part("digest", sizes)], 0, window)
    shards = [order.locate(i)[1] for i in range(sum(sizes))]
    open_now = 0
    for i in range(len(shards)):
        still_needed = set(shards[i:]) & set(shards[: i + 1])
        open_now = max(open_now, len(still_needed))
    assert open_now <= window


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(
    st.integers(1, 500),
    st.integers(0, 2000),
    st.integers(1, 64),
    st.integers(1, 200),
    st.integers(1, 5),
    st.data(),
)
def test_ranks_share_each_step_without_overlap(
    shards: int, largest: int, world_size: int, batch: int, accumulation: int, data: st.DataObject
) -> None:
    """Two steps at any position of the run. Workers have no influence, because each loads whole micro-batches."""
    sizes = np.random.default_rng(shards).integers(0, largest, shards, endpoint=True)
    sizes[0] = max(sizes[0], 1)
    order = Order([Part("digest", sizes)], 0, data.draw(st.integers(1, 500)))
    group_size = data.draw(st.sampled_from([1, 2])) if batch % 2 == 0 else 1
    first = data.draw(st.integers(0, 2 * order.parts[0].num_samples // batch))
    start, stop = first * batch, (first + 2) * batch
    ranks = [
        list(
            micro_batches(
                start,
                stop,
                global_batch_size=batch,
                accumulation_steps=accumulation,
                rank=rank,
                world_size=world_size,
                group_size=group_size,
            )
        )
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {2 * accumulation}
    dealt = [micro for rank in ranks for micro in rank]
    assert sorted(chain.from_iterable(micro.positions for micro in dealt if micro.weight)) == list(range(start, stop))
    assert sum(micro.weight for micro in dealt) == pytest.approx(2 * accumulation * world_size)
    assert all(micro.positions and micro.positions.start % group_size == 0 for micro in dealt)
    shares = [sum(len(micro.positions) for micro in rank if micro.weight) for rank in ranks]
    assert max(shares) - min(shares) <= 2 * group_size
    epochs = {order.locate(position) for position in range(start, min(stop, start + 50))}
    assert len(epochs) == min(2 * batch, 50)


@settings(max_examples=50, deadline=None)
@given(layouts, st.integers(1, 50), st.integers(0, 2))
def test_substitutes_are_the_other_samples_of_the_window(sizes: list[int], window: int, epoch: int) -> None:
    order = Order([Part("digest", sizes)], 0, window)
    position = epoch * sum(sizes) + sum(sizes) // 2
    found = [order.locate(position), *order.substitutes(position)]
    assert len(set(found)) == len(found)
    shards = {shard for _, shard, _ in found}
    assert sorted(found) == sorted((epoch, shard, row) for shard in shards for row in range(sizes[shard]))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=8).filter(any), min_size=2, max_size=4),
    st.data(),
)
def test_mix_visits_each_part_by_weight_and_in_its_own_order(layout: list[list[int]], data: st.DataObject) -> None:
    weights = [data.draw(st.floats(0.05, 10)) for _ in layout]
    parts = [Part(f"set {i}", sizes) for i, sizes in enumerate(layout)]
    mix = Order(parts, 5, 3, weights)
    start, count = data.draw(st.sampled_from([0, MIX_BLOCK - 700, 5 * MIX_BLOCK - 100])), 2000
    drawn = [round(e * sum(part.shard_sizes)) for e, part in zip(mix.epochs(start), parts, strict=True)]
    assert sum(drawn) == start
    places = [mix.locate(start + i) for i in range(count)]
    for i, part in enumerate(parts):
        alone = Order([part], 5, 3)
        first = int(mix.first_shards[i])
        mine = [place for place in places if first <= place.shard < mix.first_shards[i + 1]]
        assert [p._replace(shard=p.shard - first) for p in mine] == [
            alone.locate(drawn[i] + k) for k in range(len(mine))
        ]
        share = weights[i] / sum(weights)
        # Whole blocks are exact to a sample; within one, chance has its say.
        assert abs(drawn[i] - start * share) <= start / MIX_BLOCK + 5.5 * (MIX_BLOCK * share * (1 - share)) ** 0.5 + 1
        assert abs(len(mine) / count - share) < 5.5 * (share * (1 - share) / count) ** 0.5 + 1 / MIX_BLOCK


@settings(max_examples=100, deadline=None)
@given(layouts, st.integers(1, 6), st.integers(0, 4000))
def test_upcoming_and_distance_predict_the_shards_read(sizes: list[int], window: int, position: int) -> None:
    order = Order([Part("digest", sizes)], 0, window)
    shards = [order.locate(position + i).shard for i in range(2 * sum(sizes))]
    first_read = {shard: i for i, shard in reversed(list(enumerate(shards)))}
    largest_window = sum(sorted(sizes)[-window:])
    for shard, read in first_read.items():
        distance = order.distance(shard, position)
        assert distance <= read
        assert distance <= 0 or read < distance + largest_window
    upcoming = order.upcoming(position)
    assert len(set(upcoming)) == len(upcoming) <= 2 * window
    now = [shard for shard in first_read if order.distance(shard, position) <= 0]
    assert {shards[0], *now} <= set(upcoming)


@settings(max_examples=50, deadline=None)
@given(st.lists(layouts, min_size=2, max_size=3), st.integers(1, 6), st.integers(0, 10**6))
def test_upcoming_and_distance_predict_the_shards_of_each_part_of_a_mix(
    layout: list[list[int]], window: int, position: int
) -> None:
    order = Order([Part(f"set {i}", sizes) for i, sizes in enumerate(layout)], 0, window, [1.0] * len(layout))
    upcoming = order.upcoming(position)
    met: set[int] = set()
    for place in (order.locate(position + i) for i in range(100)):
        part = int(np.searchsorted(order.first_shards, place.shard, side="right")) - 1
        if part not in met:
            met.add(part)
            assert place.shard in upcoming
            assert order.distance(place.shard, position) <= 100


def test_part_with_a_tiny_weight_is_still_visited() -> None:
    mix = Order([Part("a", [5]), Part("b", [5]), Part("c", [5])], 0, 1, [1e-9, 1e-9, 1.0])
    assert mix.quotas.tolist() == [1, 1, MIX_BLOCK - 2]
    assert mix.epochs(MIX_BLOCK) == [1 / 5, 1 / 5, (MIX_BLOCK - 2) / 5]


def test_order_depends_on_seed_epoch_and_digest() -> None:
    def order(digest: str, seed: int, epoch: int) -> list[tuple[int, int]]:
        plan = Order([Part(digest, [20, 20, 20])], seed, 2)
        return [plan.locate(epoch * 60 + i)[1:] for i in range(60)]

    orders = [order("a", 0, 0), order("b", 0, 0), order("a", 1, 0), order("a", 0, 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    assert order("a", 0, 0) == orders[0]


def test_order_equals_recorded_values() -> None:
    """The values were recorded once; a change breaks every run that is in progress."""
    assert permutation(8, "key", 0).tolist() == FROZEN_PERMUTATION
    order = Order([Part("digest", [3, 2, 4])], 7, 2)
    assert [order.locate(i) for i in range(7, 11)] == FROZEN_ORDER


def test_permutations_are_uniform() -> None:
    counts = np.zeros((5, 5))
    for i in range(4000):
        counts[np.arange(5), permutation(5, i)] += 1
    assert abs(counts / 4000 - 0.2).max() < 0.03  # five standard deviations are 0.032


def test_order_without_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="without samples"):
        Order([Part("digest", [0, 0])], 0, 1)


def test_position_among_a_billion_samples_is_found() -> None:
    """Three parts with a hundred thousand shards, from the middle; benchmarks/input.py measures the time."""
    parts = [Part(name, np.full(33_333, 10_000)) for name in "abc"]
    order = Order(parts, 0, 64, [1.0, 2.0, 3.0])
    epoch, shard, row = order.locate(5 * 10**8 + 12_345)
    assert (epoch, 0 <= shard < 100_000, 0 <= row < 10_000) == (0, True, True)


FROZEN_PERMUTATION = [6, 0, 1, 3, 7, 4, 2, 5]
FROZEN_ORDER = [(0, 0, 0), (0, 0, 2), (1, 0, 0), (1, 0, 1)]


@settings(max_examples=100, deadline=None)
@given(layouts, st.integers(1, 4), st.integers(1, 9), st.integers(0, 30))
def test_repeated_augmentation_repeats_each_image_of_a_batch(
    sizes: list[int], views: int, images: int, batch: int
) -> None:
    repeats = RepeatedAugmentation(views, views * images)
    once, order = Order([Part("digest", sizes)], 0, 3), Order([Part("digest", sizes)], 0, 3, repeats=repeats)
    positions = range(batch * repeats.batch_size, (batch + 1) * repeats.batch_size)
    expected = [once.locate(batch * images + i) for i in range(images)]
    assert [order.locate(position) for position in positions] == views * expected
    assert [repeats.view_at(position) for position in positions] == [
        view for view in range(views) for _ in range(images)
    ]
    assert order.epochs(positions.start) == once.epochs(batch * images)
    assert order.upcoming(positions.start) == once.upcoming(batch * images)
    assert [*order.substitutes(positions[-1])] == [*once.substitutes((batch + 1) * images - 1)]
