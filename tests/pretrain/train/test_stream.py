"""Training from tars that nobody has indexed, with real ranks."""

import pytest

from pretrain.data.loading.stream import WHOLE_TAR
from tests.support.training import STREAM, WORLD_SIZES, Trained, column


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_stream_has_equal_steps_on_all_ranks_and_resumes_at_the_next_tars(trained: Trained, world_size: int) -> None:
    seen = trained(world_size, STREAM)
    assert seen["begins"] == [0, 4]
    assert seen["positions"] == [list(range(64)), list(range(64, 128))]
    assert [row["step"] for row in seen["rows"]] == list(range(1, 9))
    assert 0 < seen["next_tars"][0] < seen["next_tars"][-1]
    epochs = column(seen, "data/epoch")
    assert epochs == sorted(epochs)
    assert epochs[4] > epochs[3] == seen["next_tars"][0] / 5


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_damaged_tar_of_a_stream_is_reported_and_nothing_is_unpickled(trained: Trained, world_size: int) -> None:
    seen = trained(world_size, STREAM)
    assert {tuple(bad) for bad in seen["bad"]} == {("003.tar", WHOLE_TAR)}
    assert not seen["unpickled"]
