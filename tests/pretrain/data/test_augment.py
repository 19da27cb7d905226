"""Augmentation against Pillow, and by what must not change."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_image

from pretrain.config import AugmentConfig
from pretrain.data.augment import (
    EvalView,
    TrainView,
    augment,
    box_mask,
    crop_box,
    jitter,
    mix_neighbours,
    neighbours,
    resize,
)

PHOTO = load_sample_image("china.jpg")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
FULL = AugmentConfig(brightness=0.4, contrast=0.4, saturation=0.4, erasing=0.5, mixup=0.8, cutmix=1.0)


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
def test_a_crop_lies_in_the_image(height: int, width: int, seed: int) -> None:
    box = crop_box(height, width, (0.08, 1.0), (3 / 4, 4 / 3), np.random.default_rng(seed))
    top, left, bottom, right = box
    assert 0 <= top < bottom <= height
    assert 0 <= left < right <= width


def test_crops_keep_the_asked_share_of_the_area() -> None:
    shares = []
    for seed in range(500):
        top, left, bottom, right = crop_box(400, 400, (0.3, 0.6), (1.0, 1.0), np.random.default_rng(seed))
        shares.append((bottom - top) * (right - left) / 400**2)
    assert 0.29 < min(shares) < 0.32
    assert 0.58 < max(shares) < 0.61
    assert abs(np.mean(shares) - 0.45) < 0.02


def test_crops_have_the_asked_aspects_log_uniformly() -> None:
    logs = []
    for seed in range(500):
        top, left, bottom, right = crop_box(400, 400, (0.2, 0.3), (0.5, 2.0), np.random.default_rng(seed))
        logs.append(np.log2((right - left) / (bottom - top)))
    assert -1.02 < min(logs) < -0.97
    assert 0.97 < max(logs) < 1.02
    quarters = np.histogram(logs, bins=[-1.1, -0.5, 0, 0.5, 1.1])[0]
    assert (abs(quarters - 125) < 45).all()  # more than four standard deviations


def test_draws_have_the_asked_strength_and_probability() -> None:
    view = TrainView(AugmentConfig(flip=0.25, brightness=0.4, contrast=0.2, saturation=1.5, erasing=0.1), 16)
    draws = [view.draw(np.random.default_rng(seed)) for seed in range(2000)]
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.8, 1.2), ("saturation", 0.0, 2.5)):
        values = np.array([draw[name] for draw in draws])
        assert values.min() == pytest.approx(low, abs=0.02)
        assert values.max() == pytest.approx(high, abs=0.02)
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.07)
    assert np.mean([draw["flip"] for draw in draws]) == pytest.approx(0.25, abs=0.04)
    erased = np.array([draw["erase_box"] for draw in draws])
    areas = (erased[:, 2] - erased[:, 0]) * (erased[:, 3] - erased[:, 1])
    assert np.mean(areas > 0) == pytest.approx(0.1, abs=0.03)
    assert 0.02 <= areas[areas > 0].min() < 0.05
    assert 0.25 < areas.max() <= 1 / 3 + 1e-6


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.5])
def test_jitter_equals_pillow(factor: float) -> None:
    image = Image.fromarray(PHOTO[:64, :64])
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    one, other = torch.ones(1), torch.full((1,), factor)
    for enhancer, factors in (
        (ImageEnhance.Brightness, (other, one, one)),
        (ImageEnhance.Contrast, (one, other, one)),
        (ImageEnhance.Color, (one, one, other)),
    ):
        theirs = torch.from_numpy(np.asarray(enhancer(image).enhance(factor)).copy()).permute(2, 0, 1) / 255
        assert (jitter(pixels, *factors)[0] - theirs).abs().max() < 2.1 / 255  # Pillow rounds on the way


def test_without_draws_an_image_is_only_normalised() -> None:
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


def test_a_sample_looks_the_same_in_any_batch_that_keeps_its_neighbour() -> None:
    batch = batch_of(TrainView(FULL, 16), 12)
    whole, share = mix_neighbours(augment(batch, MEAN, STD), batch)
    for start in range(0, 12, 4):
        part = {name: value[start : start + 4] for name, value in batch.items()}
        alone, alone_share = mix_neighbours(augment(part, MEAN, STD), part)
        assert torch.equal(alone, whole[start : start + 4])
        assert torch.equal(alone_share, share[start : start + 4])


def test_mixing_counts_its_pixels_right() -> None:
    """An image of ones beside one of zeros: its mean after mixing is its own share."""
    batch = batch_of(TrainView(FULL, 16), 64)
    images = torch.zeros(64, 3, 16, 16)
    images[::2] = 1.0
    mixed, own_share = mix_neighbours(images, batch)
    assert torch.allclose(mixed[::2].mean(dim=(1, 2, 3)), own_share[::2], atol=1e-5)
    assert torch.allclose(mixed[1::2].mean(dim=(1, 2, 3)), 1 - own_share[1::2], atol=1e-5)
    is_cut = batch["cut_box"].abs().sum(1) > 0
    assert 16 < is_cut.sum() < 48  # mixup and cutmix take turns


def test_erased_boxes_have_the_mean_of_the_data() -> None:
    batch = batch_of(TrainView(AugmentConfig(erasing=1.0), 32), 6)
    images = augment(batch, MEAN, STD)
    mask = box_mask(batch["erase_box"], images)
    assert (images.masked_select(mask) == 0).all()
    whole = augment({**batch, "erase_box": torch.zeros(6, 4)}, MEAN, STD)
    assert torch.equal(images.masked_select(~mask), whole.masked_select(~mask))
    assert (mask.float().mean(dim=(1, 2, 3)) < 0.4).all()
    assert mask.any(dim=(1, 2, 3)).all()


def test_neighbours_swap_pairs() -> None:
    assert neighbours(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


@pytest.mark.parametrize("shape", [(40, 57), (57, 40), (33, 33), (20, 90)])
def test_evaluation_crops_the_centre(shape: tuple[int, int]) -> None:
    height, width = shape
    pixels = EvalView(32, 1.25)(PHOTO[:height, :width], np.random.default_rng(0))["image"]
    edge = 40
    size = (edge, int(edge * height / width)) if width < height else (int(edge * width / height), edge)
    image = Image.fromarray(PHOTO[:height, :width]).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    theirs = np.asarray(image.crop((left, top, left + 32, top + 32)))
    assert np.array_equal(pixels.transpose(1, 2, 0), theirs)
