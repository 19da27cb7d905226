"""In bf16 the fp32 masters take the optimizer's steps, and checkpoints keep the masters."""

import pytest

from tests.support.training import (
    PRECISION,
    SETTINGS,
    WORLD_SIZES,
    Trained,
    assert_resumed_exactly,
    column,
    digest_distance,
    resumed,
)

REFERENCE_OF = {
    "bf16-zero0": "reference",
    "bf16-zero1": "reference",
    "bf16-zero3": "reference",
    "layer-decay-bf16": "reference-layer-decay",
    "lamb-bf16": "reference-lamb",
    "muon-bf16": "reference-muon",
    "muon-bf16-zero0": "reference-muon",
}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", REFERENCE_OF)
def test_bf16_moves_the_masters_as_the_optimizer_does(trained: Trained, world_size: int, name: str) -> None:
    """DeepSpeed itself would take a step before the first one at stage 0."""
    start, expected = trained(1, "start"), trained(1, REFERENCE_OF[name])
    found = trained(world_size, name)
    assert column(found, "train/loss") == pytest.approx(expected["losses"], abs=0.01)
    share = 0.3 if name.startswith("lamb") else 0.1  # LAMB scales each update by a ratio that rounding changes
    for kind in ("weights", "averages"):
        moved = digest_distance(start[kind], expected[kind])
        assert digest_distance(found[kind], expected[kind]) < share * moved, kind


@pytest.mark.parametrize(("world_size", "name"), resumed(PRECISION))
def test_resume_repeats_every_row_and_weight_exactly(trained: Trained, world_size: int, name: str) -> None:
    assert_resumed_exactly(trained(world_size, name), 8 * 16 / world_size)


@pytest.mark.parametrize("name", [name for size, name in resumed(SETTINGS) if size == 2])
def test_checkpoints_hold_the_fp32_masters(trained: Trained, name: str) -> None:
    assert not trained(2, name)["rounded"]
