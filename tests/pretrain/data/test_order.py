"""The order: every sample once an epoch, the same steps on every rank, whatever the layout, ranks and workers."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import Order, micro_batches, permutation

layouts = st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(any)


@settings(max_examples=200, deadline=None)
@given(layouts, st.integers(1, 50), st.integers(0, 3), st.integers(0, 2))
def test_an_epoch_has_every_sample_once(sizes: list[int], window: int, seed: int, epoch: int) -> None:
    order = Order(sizes, "digest", seed, window)
    start = epoch * order.num_samples
    places = [order.locate(start + i) for i in range(order.num_samples)]
    expected = [(epoch, shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert sorted(places) == expected


@settings(max_examples=100, deadline=None)
@given(layouts, st.integers(1, 50), st.data())
def test_any_position_is_found_without_walking_there(sizes: list[int], window: int, data: st.DataObject) -> None:
    walked = Order(sizes, "digest", 0, window)
    position = data.draw(st.integers(0, 3 * walked.num_samples - 1))
    for before in range(position):
        walked.locate(before)
    assert walked.locate(position) == Order(sizes, "digest", 0, window).locate(position)


@settings(max_examples=100, deadline=None)
@given(layouts, st.integers(1, 8))
def test_a_window_opens_only_its_shards(sizes: list[int], window: int) -> None:
    order = Order(sizes, "digest", 0, window)
    shards = [order.locate(i)[1] for i in range(order.num_samples)]
    open_now = 0
    for i in range(len(shards)):
        still_needed = set(shards[i:]) & set(shards[: i + 1])
        open_now = max(open_now, len(still_needed))
    assert open_now <= window


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(1, 5))
def test_ranks_take_equal_steps_and_share_each_batch(
    world_size: int, micro: int, accumulation: int, first_step: int, steps: int
) -> None:
    batch = world_size * micro * accumulation
    start, stop = first_step * batch, (first_step + steps) * batch
    ranks = [list(micro_batches(start, stop, batch, micro, rank, world_size)) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {steps * accumulation}
    for step in range(steps):
        positions = chain.from_iterable(
            chain.from_iterable(rank[step * accumulation : (step + 1) * accumulation]) for rank in ranks
        )
        assert sorted(positions) == list(range(start + step * batch, start + (step + 1) * batch))


def test_seed_epoch_and_data_each_change_the_order() -> None:
    def order(digest: str, seed: int, epoch: int) -> list[tuple[int, int]]:
        plan = Order([20, 20, 20], digest, seed, 2)
        return [plan.locate(epoch * 60 + i)[1:] for i in range(60)]

    orders = [order("a", 0, 0), order("b", 0, 0), order("a", 1, 0), order("a", 0, 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    assert order("a", 0, 0) == orders[0]


def test_the_order_is_the_same_in_every_release() -> None:
    """Numbers written down once: a change here breaks every run that is under way."""
    assert permutation(8, "key", 0).tolist() == FROZEN_PERMUTATION
    order = Order([3, 2, 4], "digest", 7, 2)
    assert [order.locate(i) for i in range(7, 11)] == FROZEN_ORDER


def test_permutations_are_uniform() -> None:
    counts = np.zeros((5, 5))
    for i in range(4000):
        counts[np.arange(5), permutation(5, i)] += 1
    assert abs(counts / 4000 - 0.2).max() < 0.03  # five standard deviations are 0.032


def test_data_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="without samples"):
        Order([0, 0], "digest", 0, 1)


def test_a_billion_samples_are_sought_at_once() -> None:
    order = Order(np.full(100_000, 10_000), "digest", 0, 64)
    epoch, shard, row = order.locate(5 * 10**8 + 12_345)
    assert (epoch, 0 <= shard < 100_000, 0 <= row < 10_000) == (0, True, True)


FROZEN_PERMUTATION = [6, 0, 1, 3, 7, 4, 2, 5]
FROZEN_ORDER = [(0, 0, 0), (0, 0, 2), (1, 0, 0), (1, 0, 1)]
