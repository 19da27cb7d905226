"""Supervised training gives the same numbers at every ZeRO stage, on one and two ranks and in a plain torch loop."""

from itertools import groupby

import pytest

from tests.support.training import (
    BATCHES_OF_10,
    SUPERVISED,
    WORLD_SIZES,
    Trained,
    assert_resumed_exactly,
    column,
    resumed,
)

STAGES = ["zero0", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_equal_a_plain_torch_loop(trained: Trained, world_size: int, stage: str) -> None:
    expected = trained(1, "reference")["losses"]
    assert column(trained(world_size, stage), "train/loss") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", [*STAGES, "offload"])
@pytest.mark.parametrize("kind", ["weights", "averages"])
def test_checkpoints_equal_a_plain_torch_loop(trained: Trained, world_size: int, stage: str, kind: str) -> None:
    expected, found = trained(1, "reference")[kind], trained(world_size, stage)[kind]
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], abs=2e-4), name


@pytest.mark.parametrize("metric", ["optim/grad_norm", "validation/loss", "validation/top1", "data/samples"])
def test_metrics_are_the_same_on_any_topology(trained: Trained, metric: str) -> None:
    expected = column(trained(1, "zero0"), metric)
    assert expected
    for world_size in WORLD_SIZES:
        for stage in [*STAGES, "offload"]:
            found = column(trained(world_size, stage), metric)
            assert found == pytest.approx(expected, rel=1e-4), (world_size, stage)


@pytest.mark.parametrize("metric", ["knn_top1", "linear_top1", "feature_rank", "feature_spread"])
@pytest.mark.parametrize("settings", [STAGES, [f"mae-{stage}" for stage in STAGES]], ids=["supervised", "mae"])
def test_probes_are_the_same_on_any_topology(trained: Trained, settings: list[str], metric: str) -> None:
    expected = column(trained(1, settings[0]), f"probe/{metric}")
    assert len(expected) == 2
    assert all(0 < value < (1.01 if metric.endswith("1") else 50) for value in expected)
    tolerance = {"abs": 0.02} if metric.endswith("top1") else {"rel": 1e-2}
    for world_size in WORLD_SIZES:
        for stage in settings:
            found = column(trained(world_size, stage), f"probe/{metric}")
            assert found == pytest.approx(expected, **tolerance), (world_size, stage)


@pytest.mark.parametrize("metric", ["train/loss", "optim/grad_norm", "validation/loss", "optim/learning_rate"])
def test_a_recipe_with_every_option_is_the_same_on_any_topology(trained: Trained, metric: str) -> None:
    one, two = trained(1, "everything"), trained(2, "everything")
    assert column(two, metric) == pytest.approx(column(one, metric), rel=1e-4)
    assert column(one, metric) != pytest.approx(column(trained(1, "zero1"), metric), rel=1e-2)
    assert max(column(one, "optim/learning_rate")) == pytest.approx(1e-3)  # scaled to the batch
    assert [size for size, _ in groupby(one["image_sizes"])] == [16, 24, 32]
    assert "learning rate 0.001 (0.016 x 16 / 256)" in one["output"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", BATCHES_OF_10)
def test_ranks_that_do_not_divide_the_batch_train_as_one_rank_does(
    trained: Trained, world_size: int, name: str
) -> None:
    for metric in ("train/loss", "optim/grad_norm", "validation/loss"):
        expected = column(trained(1, "batch-of-10"), metric)
        assert column(trained(world_size, name), metric) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("world_size", "name"), resumed(SUPERVISED | BATCHES_OF_10))
def test_resume_repeats_every_row_and_weight_exactly(trained: Trained, world_size: int, name: str) -> None:
    # Ten samples are five pairs of neighbors: the main rank of two has two of them.
    share = {1: 10, 2: 4}[world_size] if name in BATCHES_OF_10 else 16 / world_size
    assert_resumed_exactly(trained(world_size, name), 8 * share)


def test_dropout_changes_the_losses(trained: Trained) -> None:
    expected = trained(1, "reference")["losses"]
    assert column(trained(1, "dropout"), "train/loss") != pytest.approx(expected, abs=1e-4)


def test_without_clipping_the_first_norm_is_the_same_and_the_losses_are_not(trained: Trained) -> None:
    unclipped = trained(1, "no-clipping")
    assert column(unclipped, "train/loss") != pytest.approx(trained(1, "reference")["losses"], abs=1e-4)
    assert column(unclipped, "optim/grad_norm")[0] == column(trained(1, "zero2"), "optim/grad_norm")[0]
