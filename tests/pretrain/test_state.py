"""The state of a run: positions that are left out, and images that are counted once."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.state import TrainState

BATCH = 8
RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=4).map(
    lambda pairs: [(BATCH * first, BATCH * (first + count)) for first, count in pairs]
)


def state_with(ranges: list[tuple[int, int]], position: int = 0) -> TrainState:
    state = TrainState(position=position)
    for start, stop in ranges:
        state = state.skip_range(start, stop)
    return state


@pytest.mark.parametrize(("position", "expected"), [(0, 0), (8, 16), (15, 16), (16, 16), (40, 48), (48, 48)])
def test_a_position_in_a_skipped_range_moves_to_its_end(position: int, expected: int) -> None:
    assert state_with([(32, 48), (8, 16)], position).position == expected


def test_upcoming_ranges_leave_out_the_skipped_ones() -> None:
    state = state_with([(32, 48), (8, 16)])
    assert list(state.upcoming_ranges(64)) == [(0, 8), (16, 32), (48, 88)]
    assert list(state_with([(32, 48)], 100).upcoming_ranges(10)) == [(100, 110)]


@given(RANGES, st.integers(1, 60))
def test_steps_take_exactly_the_upcoming_positions(ranges: list[tuple[int, int]], num_steps: int) -> None:
    state = state_with(ranges)
    expected = [start for low, high in state.upcoming_ranges(num_steps * BATCH) for start in range(low, high, BATCH)]
    taken = []
    for _ in range(num_steps):
        taken.append(state.position)
        state = state.advance(BATCH)
    assert taken == expected
    assert state.step == num_steps
    assert not any(start <= position < stop for position in taken for start, stop in ranges)


def test_a_rollback_moves_the_position_past_the_skipped_range_and_takes_images_back() -> None:
    saved = TrainState()
    for _ in range(10):
        saved = saved.advance(BATCH).count_images(BATCH)
    diverged = saved.advance(BATCH).count_images(BATCH).advance(BATCH).advance(BATCH)  # two steps were skipped
    assert (diverged.step, diverged.position, diverged.images_seen) == (13, 13 * BATCH, 11 * BATCH)
    back = saved.skip_range(11 * BATCH, 13 * BATCH)
    assert (back.step, back.position, back.images_seen) == (10, 10 * BATCH, 10 * BATCH)
    ahead = back.advance(BATCH).count_images(BATCH)
    assert (ahead.step, ahead.position, ahead.images_seen) == (11, 13 * BATCH, 11 * BATCH)


def test_a_state_survives_json() -> None:
    state = TrainState(3, 48, 32, ((8, 16), (32, 40)), [[1.0, 2.0], [0.5, 0.25]])
    assert TrainState.from_json(json.loads(json.dumps(asdict(state)))) == state
