"""A compiled model gives the losses of a plain torch loop, and resumes exactly."""

import pytest

from pretrain.model.compiling import MOST_GRAPHS
from tests.support.training import COMPILED, Trained, assert_resumed_exactly, column, resumed


@pytest.mark.parametrize(("world_size", "name"), resumed(COMPILED))
def test_losses_equal_a_plain_torch_loop(trained: Trained, world_size: int, name: str) -> None:
    expected = trained(1, "reference")["losses"]
    assert column(trained(world_size, name), "train/loss") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("world_size", "name"), resumed(COMPILED))
def test_a_run_has_few_graphs_at_every_zero_stage(trained: Trained, world_size: int, name: str) -> None:
    """DeepSpeed's hooks stay outside: torch.compile would break its graphs at each of them."""
    seen = trained(world_size, name)
    assert seen["graph_breaks"] == 0
    assert 2 <= seen["graphs"] <= MOST_GRAPHS


@pytest.mark.parametrize(("world_size", "name"), resumed(COMPILED))
def test_resume_repeats_every_row_and_weight_exactly(trained: Trained, world_size: int, name: str) -> None:
    assert_resumed_exactly(trained(world_size, name), 8 * 16 / world_size)
