"""Views compared with Pillow, and the order and independence of the augmentation's operations."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_sample_image

from pretrain.config import AugmentConfig
from pretrain.data.transforms.batch import augment
from pretrain.data.transforms.color import grayscale, jitter, normalize, shift_hue, solarize
from pretrain.data.transforms.geometry import blur, box_mask, warp
from pretrain.data.transforms.mixup import mix_neighbors
from pretrain.data.transforms.rand_augment import recolor
from pretrain.data.transforms.views import EvalView, TrainView, crop_box, resize

PHOTO = load_sample_image("china.jpg")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
FULL = AugmentConfig(
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grayscale=0.3,
    solarize=0.3,
    blur=0.5,
    rand_augment_ops=2,
    erasing=0.5,
    mixup=0.8,
    cutmix=1.0,
)


def batch_of(view: TrainView, count: int) -> dict[str, torch.Tensor]:
    drawn = [view(PHOTO, np.random.default_rng(i)) for i in range(count)]
    return {name: torch.stack([torch.as_tensor(item[name]) for item in drawn]) for name in drawn[0]}


def test_resize_equals_pillow() -> None:
    crop = PHOTO[30:205, 40:240]
    theirs = np.asarray(Image.fromarray(crop).resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
    ours = resize(crop, 96).permute(1, 2, 0).numpy().astype(int)
    assert abs(ours - theirs).mean() < 0.05
    assert abs(ours - theirs).max() <= 1


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10**6))
def test_crop_lies_inside_the_image(height: int, width: int, seed: int) -> None:
    box = crop_box(height, width, (0.08, 1.0), (3 / 4, 4 / 3), np.random.default_rng(seed))
    top, left, bottom, right = box
    assert 0 <= top < bottom <= height
    assert 0 <= left < right <= width


def test_crop_is_centered_if_none_fits() -> None:
    """The crop has the nearest allowed aspect, as in torchvision."""
    random, scale, aspect = np.random.default_rng(0), (0.8, 1.0), (3 / 4, 4 / 3)
    assert crop_box(100, 400, scale, aspect, random) == (0, 133, 100, 266)
    assert crop_box(400, 100, scale, aspect, random) == (133, 0, 266, 100)


def test_crops_have_the_configured_share_of_the_area() -> None:
    shares = []
    for seed in range(500):
        top, left, bottom, right = crop_box(400, 400, (0.3, 0.6), (1.0, 1.0), np.random.default_rng(seed))
        shares.append((bottom - top) * (right - left) / 400**2)
    assert 0.29 < min(shares) < 0.32
    assert 0.58 < max(shares) < 0.61
    assert abs(np.mean(shares) - 0.45) < 0.02


def test_aspect_ratios_are_log_uniform() -> None:
    logs = []
    for seed in range(500):
        top, left, bottom, right = crop_box(400, 400, (0.2, 0.3), (0.5, 2.0), np.random.default_rng(seed))
        logs.append(np.log2((right - left) / (bottom - top)))
    assert -1.02 < min(logs) < -0.97
    assert 0.97 < max(logs) < 1.02
    quarters = np.histogram(logs, bins=[-1.1, -0.5, 0, 0.5, 1.1])[0]
    assert (abs(quarters - 125) < 45).all()  # more than four standard deviations


def test_parameters_have_the_configured_strength_and_probability() -> None:
    config = AugmentConfig(
        flip=0.25, brightness=0.4, contrast=0.2, saturation=1.5, hue=0.3, grayscale=0.2, solarize=0.6, erasing=0.1
    )
    view = TrainView(config, 16)
    draws = [view.sample_augmentation(np.random.default_rng(seed)) for seed in range(2000)]
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.8, 1.2), "saturation": (0.0, 2.5), "hue": (-0.3, 0.3)}
    for name, (low, high) in ranges.items():
        values = np.array([draw[name] for draw in draws])
        assert values.min() == pytest.approx(low, abs=0.02)
        assert values.max() == pytest.approx(high, abs=0.02)
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.07)
    for name, probability in (("flip", 0.25), ("grayscale", 0.2), ("solarize", 0.6)):
        assert np.mean([draw[name] for draw in draws]) == pytest.approx(probability, abs=0.04)
    erased = np.array([draw["erase_box"] for draw in draws])
    areas = (erased[:, 2] - erased[:, 0]) * (erased[:, 3] - erased[:, 1])
    assert np.mean(areas > 0) == pytest.approx(0.1, abs=0.03)
    assert 0.02 <= areas[areas > 0].min() < 0.05
    assert 0.25 < areas.max() <= 1 / 3 + 1e-6


def test_three_augment_applies_exactly_one_operation() -> None:
    view = TrainView(AugmentConfig(three_augment=True), 16)
    draws = [view.sample_augmentation(np.random.default_rng(seed)) for seed in range(900)]
    still = view.sample_augmentation(
        np.random.default_rng(next(i for i, draw in enumerate(draws) if draw["grayscale"]))
    )["blur_kernel"]
    taken = np.array([[d["grayscale"], d["solarize"], not np.array_equal(d["blur_kernel"], still)] for d in draws])
    assert (taken.sum(axis=1) == 1).all()
    assert taken.mean(axis=0) == pytest.approx([1 / 3] * 3, abs=0.06)


def test_batch_without_parameters_is_only_normalized() -> None:
    view = TrainView(AugmentConfig(crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip=0.0), 32)
    batch = batch_of(view, 2)
    expected = (batch["image"] / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert batch.keys() == {"image"}
    assert torch.allclose(augment(batch, MEAN, STD), expected, atol=1e-6)


def test_flip_is_per_image() -> None:
    view = TrainView(AugmentConfig(crop_scale=(1.0, 1.0), flip=0.5), 16)
    batch = batch_of(view, 8)
    plain = augment({**batch, "flip": torch.zeros(8)}, MEAN, STD)
    flipped = augment(batch, MEAN, STD)
    for i in range(8):
        assert torch.equal(flipped[i], plain[i].flip(-1) if batch["flip"][i] else plain[i])
    assert 0 < batch["flip"].sum() < 8


def test_operations_are_applied_in_the_documented_order() -> None:
    batch = batch_of(TrainView(FULL, 16), 12)
    images = batch["image"] / 255
    yes = {name: batch[name].bool()[:, None, None, None] for name in ("flip", "grayscale", "solarize")}
    images = torch.where(yes["flip"], images.flip(-1), images)
    images = recolor(warp(images, batch["affine"]), batch["colors"], batch["strengths"])
    images = jitter(images, batch["brightness"], batch["contrast"], batch["saturation"])
    images = shift_hue(images, batch["hue"])
    images = torch.where(yes["grayscale"], grayscale(images), images)
    images = torch.where(yes["solarize"], solarize(images), images)
    images = normalize(blur(images, batch["blur_kernel"]), MEAN, STD)
    images = torch.where(box_mask(batch["erase_box"], images), 0.0, images)
    assert torch.equal(augment(batch, MEAN, STD), images)
    assert all(0 < flags.sum() < 12 for flags in yes.values())


@pytest.mark.parametrize("name", ["grayscale", "solarize", "blur", "erasing"])
def test_image_without_an_operation_is_unchanged_by_it(name: str) -> None:
    config = AugmentConfig(crop_scale=(1.0, 1.0), flip=0.0, blur_sigma=(0.5, 2.0)).model_copy(update={name: 0.5})
    batch = batch_of(TrainView(config, 32), 32)
    alone = augment({"image": batch["image"]}, MEAN, STD)
    changed = (augment(batch, MEAN, STD) != alone).any(dim=(1, 2, 3))
    draw = next(value for key, value in batch.items() if key != "image")
    is_drawn = draw[:, draw.shape[1] // 2] < 1 if name == "blur" else draw.reshape(32, -1).any(dim=1)
    assert torch.equal(changed, is_drawn)
    assert 6 < is_drawn.sum() < 26  # more than three standard deviations


def test_disabled_operations_take_no_random_numbers() -> None:
    """The parameters of a config without the later operations are sampled again here by hand."""
    config = AugmentConfig(
        brightness=0.4, contrast=0.2, erasing=1.0, mixup=0.8, rand_augment_magnitude=3.0, blur_sigma=(1.0, 3.0)
    )
    ours = TrainView(config, 16).sample_augmentation(np.random.default_rng(5))
    random = np.random.default_rng(5)
    expected = {
        "flip": float(random.random() < 0.5),
        "brightness": random.uniform(0.6, 1.4),
        "contrast": random.uniform(0.8, 1.2),
        "erase_box": _erased(random),
        "mix_share": random.beta(0.8, 0.8),
        "cut_box": np.zeros(4),
    }
    assert list(ours) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-6)


def _erased(random: np.random.Generator) -> list[float]:
    random.random()  # whether to erase at all
    area, log_ratio = random.uniform(0.02, 1 / 3), random.uniform(np.log(0.3), np.log(1 / 0.3))
    height, width = min(1, np.sqrt(area / np.exp(log_ratio))), min(1, np.sqrt(area * np.exp(log_ratio)))
    top, left = random.uniform(0, 1 - height), random.uniform(0, 1 - width)
    return [top, left, top + height, left + width]


def test_augmentation_does_not_depend_on_the_batch() -> None:
    batch = batch_of(TrainView(FULL, 24), 10)
    whole = augment(batch, MEAN, STD)
    for i in range(10):
        alone = augment({name: value[i : i + 1] for name, value in batch.items()}, MEAN, STD)
        assert torch.equal(alone[0], whole[i])
    others = torch.randperm(10, generator=torch.Generator().manual_seed(0))[:7]
    assert torch.equal(augment({name: value[others] for name, value in batch.items()}, MEAN, STD), whole[others])


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # the cache holds constants
def test_augment_never_copies_from_the_device() -> None:
    """The meta device has no values that the host could read, and a graph without breaks contains no read."""
    batch = batch_of(TrainView(FULL, 16), 4)
    shapes = {name: value.to("meta") for name, value in batch.items()}
    assert augment(shapes, MEAN, STD).shape == (4, 3, 16, 16)
    compiled = torch.compile(augment, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(batch, MEAN, STD), augment(batch, MEAN, STD))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"hue": 0.6}, "must be at most 0.5 (half the color circle), got 0.6; lower it"),
        ({"rand_augment_magnitude": 11.0}, "must be from 0 to 10, got 11.0; lower it"),
        ({"blur_sigma": (2.0, 0.1)}, "must be [low, high] with 0 < low <= high, got [2.0, 0.1]; correct the range"),
        ({"blur_sigma": (0.0, 0.1)}, "greater than 0"),
        ({"grayscale": 1.5}, "less than or equal to 1"),
        ({"solarize": -0.1}, "greater than or equal to 0"),
        ({"rand_augment_ops": -1}, "greater than or equal to 0"),
    ],
)
def test_impossible_strengths_are_config_errors(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(sentence)) as caught:
        AugmentConfig(**values)
    assert caught.value.errors()[0]["loc"][0] in values


def test_mixing_depends_only_on_the_neighbor() -> None:
    batch = batch_of(TrainView(FULL, 16), 12)
    whole, share = mix_neighbors(augment(batch, MEAN, STD), batch)
    for start in range(0, 12, 4):
        part = {name: value[start : start + 4] for name, value in batch.items()}
        alone, alone_share = mix_neighbors(augment(part, MEAN, STD), part)
        assert torch.equal(alone, whole[start : start + 4])
        assert torch.equal(alone_share, share[start : start + 4])


def test_erased_boxes_are_zero_after_normalization() -> None:
    batch = batch_of(TrainView(AugmentConfig(erasing=1.0), 32), 6)
    images = augment(batch, MEAN, STD)
    mask = box_mask(batch["erase_box"], images)
    assert (images.masked_select(mask) == 0).all()
    whole = augment({**batch, "erase_box": torch.zeros(6, 4)}, MEAN, STD)
    assert torch.equal(images.masked_select(~mask), whole.masked_select(~mask))
    assert (mask.float().mean(dim=(1, 2, 3)) < 0.4).all()
    assert mask.any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("shape", [(40, 57), (57, 40), (33, 33), (20, 90)])
def test_evaluation_view_crops_the_center(shape: tuple[int, int]) -> None:
    height, width = shape
    pixels = EvalView(32, 1.25)(PHOTO[:height, :width], np.random.default_rng(0))["image"]
    edge = 40
    size = (edge, int(edge * height / width)) if width < height else (int(edge * width / height), edge)
    image = Image.fromarray(PHOTO[:height, :width]).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    theirs = np.asarray(image.crop((left, top, left + 32, top + 32)))
    assert np.array_equal(pixels.transpose(1, 2, 0), theirs)
