"""Masked autoencoding and self-distillation on real ranks: losses, pictures, the teacher, and what MLflow receives."""

from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from numpy.typing import NDArray
from PIL import Image

from pretrain.tracking.pictures import GAP, MARGIN
from pretrain.tracking.tracker import picture_name
from tests.support.training import (
    IN_MLFLOW,
    OBJECTIVES,
    WORLD_SIZES,
    Trained,
    assert_resumed_exactly,
    column,
    digest_distance,
    resumed,
)

MAE = [f"mae-zero{stage}" for stage in range(4)]
DISTILLATION = [f"distillation-zero{stage}" for stage in range(3)]


@pytest.mark.parametrize("metric", ["train/loss", "optim/grad_norm", "validation/loss"])
def test_masked_autoencoding_is_the_same_on_any_topology(trained: Trained, metric: str) -> None:
    expected = column(trained(1, "mae-zero0"), metric)
    for world_size in WORLD_SIZES:
        for stage in MAE:
            found = column(trained(world_size, stage), metric)
            assert found == pytest.approx(expected, rel=1e-4), (world_size, stage)


@pytest.mark.parametrize("metric", ["train/loss", "train/koleo", "optim/grad_norm", "validation/loss"])
def test_self_distillation_is_the_same_on_any_topology(trained: Trained, metric: str) -> None:
    expected = column(trained(1, "distillation-zero0"), metric)
    for world_size in WORLD_SIZES:
        for stage in DISTILLATION:
            found = column(trained(world_size, stage), metric)
            assert found == pytest.approx(expected, rel=1e-4), (world_size, stage)
    one, two = (column(trained(size, "distillation-batch-of-1"), metric) for size in WORLD_SIZES)
    assert two == pytest.approx(one, rel=1e-4)


def test_masked_autoencoding_in_bf16_is_near_fp32(trained: Trained) -> None:
    bf16, fp32 = (column(trained(2, name), "train/loss") for name in ("mae-bf16", "mae-zero0"))
    assert bf16 == pytest.approx(fp32, abs=0.02)


def test_masked_autoencoding_writes_pictures_of_images_masks_and_reconstructions(trained: Trained) -> None:
    for stage in MAE:
        pictures = trained(2, stage)["folder"] / "whole" / "pictures"
        assert sorted(path.name for path in pictures.iterdir()) == ["step-00000004.png", "step-00000008.png"]
        (image, visible, _, *_), (*later, rebuilt, _, _) = (columns_of(path, 5) for path in sorted(pictures.iterdir()))
        assert np.array_equal([image, visible], later)  # the same images with the same masks
        changed, filled = (np.abs(image - other).reshape(8, 4, 8, 4, 8, 3) for other in (visible, rebuilt))
        masked = changed.max(axis=(2, 4, 5)) > 1
        assert masked.mean() == 0.5
        assert filled.max(axis=(2, 4, 5))[~masked].max() <= 1
        assert np.median(filled.max(axis=(2, 4, 5))[masked]) > 10  # not the image itself
    picture, *heads = columns_of(trained(2, "zero0")["folder"] / "whole" / "pictures" / "step-00000008.png", 3)
    assert np.abs(picture - image).max() <= 1
    assert len(heads) == 2
    assert all(head.max() == 255 for head in heads)


def columns_of(page: Path, count: int) -> list[NDArray[np.int64]]:
    """Return the columns of a page of pictures, [8 images, 32, 32, 3] each, without the captions around them."""
    side = 96 + GAP
    pixels = np.asarray(Image.open(page)).astype(int)[: GAP - MARGIN, : GAP - MARGIN]
    tiles = pixels[-8 * side :, -count * side :].reshape(8, side, count, side, 3).swapaxes(1, 2)
    assert (tiles[:, :, 96:] == 255).all()
    assert (tiles[:, :, :, 96:] == 255).all()
    return [*tiles[:, :, :96:3, :96:3].swapaxes(0, 1)]


def test_mlflow_receives_every_probe_and_picture(trained: Trained) -> None:
    folder = trained(*IN_MLFLOW)["folder"]
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    [run] = [run for run in runs if run.info.run_name == "whole"]
    for name in ("knn_top1", "linear_top1", "feature_rank", "feature_spread", "seconds"):
        points = client.get_metric_history(run.info.run_id, f"probe/{name}")
        assert [point.step for point in points] == [4, 8]
    sent = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert sorted(int(path.split("+")[2]) for path in sent) == [4, 8]
    for path in sent:
        written = Image.open(folder / "whole" / "pictures" / picture_name(int(path.split("+")[2])))
        received = Image.open(client.download_artifacts(run.info.run_id, path))
        assert np.array_equal(np.asarray(received), np.asarray(written))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_teacher_moves_in_bf16_by_less_than_bf16_can_represent(trained: Trained, world_size: int) -> None:
    start, exact = trained(1, "start-distillation")["weights"], trained(1, "distillation-zero2")["weights"]
    found = trained(world_size, "distillation-bf16")["weights"]
    matrices = [name for name in start if name.startswith("encoder.") and "norm" not in name and "bias" not in name]
    for name in matrices:
        first, fp32, bf16 = ({name: weights[name]} for weights in (start, exact, found))
        assert digest_distance(bf16, fp32) < 0.5 * digest_distance(fp32, first), name


@pytest.mark.parametrize(("world_size", "name"), resumed(OBJECTIVES))
def test_resume_repeats_every_row_and_weight_exactly(trained: Trained, world_size: int, name: str) -> None:
    assert_resumed_exactly(trained(world_size, name), 8 * 16 / world_size)
