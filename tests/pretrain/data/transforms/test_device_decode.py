"""JPEGs that the device decodes give the workers' crops; torchvision is tested if it is installed."""

import io
from pathlib import Path
from typing import Any

import pytest
import simplejpeg
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from pretrain.config import AugmentConfig
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.loader import BatchPlan, LoadedBatch, training_batches
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.folder import list_folder
from pretrain.data.transforms.decode import DecodeError, EncodedJpeg, decode_unless_jpeg
from pretrain.data.transforms.device_decode import build_decoder, decode_on_device, torchvision_decoder
from pretrain.data.transforms.views import TrainView
from pretrain.errors import DataError

CPU = torch.device("cpu")
SIZE = 48


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Color and grayscale JPEGs, some with an EXIF orientation, and PNGs."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "in" / "a").mkdir(parents=True)
    photo = Image.fromarray(load_sample_image("china.jpg"))
    for i in range(24):
        piece = photo.crop((10 * i, 5 * i, 10 * i + 200, 5 * i + 150))
        exif = Image.Exif()
        exif[0x0112] = 6 if i % 4 == 1 else 1  # turned by a quarter, or upright
        image = piece.convert("L") if i % 4 == 2 else piece
        image.save(folder / "in" / "a" / f"{i}.{'png' if i % 4 == 3 else 'jpg'}", exif=exif)
    make_shards(list_folder(folder / "in"), folder / "out", ShardOptions(validation_fraction=0.0))
    return open_dataset(folder / "out" / "train")


def by_simplejpeg(jpegs: list[Tensor]) -> list[Tensor]:
    decoded = [simplejpeg.decode_jpeg(jpeg.numpy().tobytes(), colorspace="RGB") for jpeg in jpegs]
    return [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in decoded]


def refuse(jpegs: list[Tensor]) -> list[Tensor]:
    raise RuntimeError("nvJPEG cannot read this")


def load(samples: Dataset, **options: Any) -> list[LoadedBatch]:
    view = TrainView(AugmentConfig(brightness=0.2), SIZE)
    plan = BatchPlan(seed=0, shuffle_window=9, global_batch_size=8, num_workers=1, **options)
    return list(training_batches(samples, view, plan, start=0, stop=48))


@pytest.mark.processes
@pytest.mark.parametrize("decoder", [by_simplejpeg, refuse])
def test_crops_on_the_device_equal_those_of_the_workers(mixed: Dataset, decoder: Any) -> None:
    for here, later in zip(load(mixed), load(mixed, decodes_jpegs=False), strict=True):
        assert "image" not in later.tensors or len(later.tensors["image"]) < 8
        batch = decode_on_device(later.tensors, SIZE, CPU, decoder)
        assert batch.keys() == here.tensors.keys()
        difference = (batch["image"].int() - here.tensors["image"].int()).abs()
        assert difference.max() <= 2  # one resizes in uint8, the other in float
        assert difference.float().mean() < 0.1
        assert all(torch.equal(batch[name], here.tensors[name]) for name in ("label", "position", "flip", "brightness"))


@pytest.mark.processes
def test_batch_without_jpegs_is_returned_unchanged(digits: Path) -> None:
    [first, *_] = load(open_dataset(digits / "train"), decodes_jpegs=False)
    assert decode_on_device(first.tensors, SIZE, CPU, refuse) is first.tensors


def test_only_plain_jpegs_are_left_to_the_device() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG")
    left = decode_unless_jpeg(buffer.getvalue())
    assert isinstance(left, EncodedJpeg)
    assert (left.height, left.width) == (20, 30)
    with pytest.raises(DecodeError):
        decode_unless_jpeg(b"\xff\xd8 no header follows")
    Image.new("CMYK", (30, 20)).save(buffer := io.BytesIO(), "JPEG")
    assert not isinstance(decode_unless_jpeg(buffer.getvalue()), EncodedJpeg)


def test_missing_torchvision_or_gpu_is_explained(mixed: Dataset) -> None:
    with pytest.raises(DataError, match=r"gpu needs a CUDA device, but this run uses cpu; set data.decode=cpu"):
        build_decoder(CPU)
    try:
        decoder = torchvision_decoder(CPU)
    except DataError as error:
        assert f"gpu needs a torchvision that matches torch {torch.__version__}" in str(error)
        assert "pip install 'vitrail[gpu-decode]'" in str(error)
        return
    for here, later in zip(load(mixed), load(mixed, decodes_jpegs=False), strict=True):
        batch = decode_on_device(later.tensors, SIZE, CPU, decoder)
        assert (batch["image"].float() - here.tensors["image"].float()).abs().mean() < 1


@pytest.mark.gpu
@pytest.mark.processes
def test_pixels_that_a_gpu_decodes_equal_those_of_the_workers(mixed: Dataset) -> None:
    pytest.importorskip("torchvision")
    device = torch.device("cuda", 0)
    for here, later in zip(load(mixed), load(mixed, decodes_jpegs=False), strict=True):
        batch = decode_on_device(later.tensors, SIZE, device, build_decoder(device))
        difference = (batch["image"].cpu().float() - here.tensors["image"].float()).abs()
        assert difference.mean() < 2  # of 255, as in torchvision's tests: nvJPEG rounds and interpolates in another way
