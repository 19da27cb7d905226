"""Optimizers, schedules and layer-wise decay give the same numbers wherever ZeRO divides the parameters."""

import pytest

from tests.support.training import OPTIMIZERS, WORLD_SIZES, Trained, assert_resumed_exactly, column, resumed


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_schedules_equal_a_plain_torch_loop(trained: Trained, world_size: int, name: str) -> None:
    """AdamW with cosine, LAMB with linear, Muon with wsd; the plain loop has a parameter group for each parameter."""
    reference = f"reference-{name.rpartition('-')[0]}"
    expected, found = trained(1, reference), trained(world_size, name)
    assert column(found, "train/loss") == pytest.approx(expected["losses"], abs=1e-5)
    for weight in expected["weights"]:
        assert found["weights"][weight] == pytest.approx(expected["weights"][weight], abs=2e-4), weight
    assert expected["losses"][-1] != pytest.approx(trained(1, "reference")["losses"][-1], abs=1e-3)


@pytest.mark.parametrize(("world_size", "name"), resumed(OPTIMIZERS))
def test_resume_repeats_every_row_and_weight_exactly(trained: Trained, world_size: int, name: str) -> None:
    assert_resumed_exactly(trained(world_size, name), 8 * 16 / world_size)
