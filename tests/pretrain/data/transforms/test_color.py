"""Color transforms compared with Pillow and with the standard library's HSV."""

import colorsys
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from pretrain.data.transforms.color import grayscale, jitter, shift_hue, solarize

PHOTO = load_sample_image("flower.jpg")[200:264, 260:324]


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.5])
def test_jitter_equals_pillow(factor: float) -> None:
    image = Image.fromarray(PHOTO)
    one, other = torch.ones(1), torch.full((1,), factor)
    for enhancer, factors in (
        (ImageEnhance.Brightness, (other, one, one)),
        (ImageEnhance.Contrast, (one, other, one)),
        (ImageEnhance.Color, (one, one, other)),
    ):
        theirs = pixels_of(enhancer(image).enhance(factor))
        assert (jitter(pixels_of(image), *factors) - theirs).abs().max() < 2.1 / 255  # Pillow rounds on the way


@pytest.mark.parametrize("turns", [-0.5, -0.37, -0.1, 0.0, 0.02, 0.25, 0.5])
def test_hue_shift_equals_the_standard_library(turns: float) -> None:
    corners = np.array(
        list(itertools.product((0.0, 0.5, 1.0), repeat=3))
    )  # grayscales and full colors: every special case
    colors = np.concatenate([corners, PHOTO.reshape(-1, 3)[::3] / 255])
    expected = []
    for color in colors:
        hue, saturation, value = colorsys.rgb_to_hsv(*color)
        expected.append(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value))
    images = torch.tensor(colors.T[None, :, None], dtype=torch.float32)
    ours = shift_hue(images, torch.tensor([turns]))[0, :, 0].T
    assert (ours - torch.tensor(expected)).abs().max() < 5e-6  # float32 beside float64


def test_hue_shift_is_per_image() -> None:
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 3, 1, 1)
    turned = shift_hue(red, torch.tensor([0.0, 1 / 3, -1 / 3]))[:, :, 0, 0]
    assert torch.allclose(turned, torch.eye(3), atol=1e-6)


def test_grayscale_equals_pillow() -> None:
    theirs = torch.from_numpy(np.array(Image.fromarray(PHOTO).convert("L"))).float()
    ours = grayscale(pixels_of(Image.fromarray(PHOTO)))[0, 0] * 255
    assert (ours - theirs).abs().max() < 0.51  # Pillow rounds to whole numbers, its weights to sixteen bits


def test_solarize_equals_pillow() -> None:
    values = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    theirs = torch.from_numpy(np.array(ImageOps.solarize(values, threshold=128))).float()
    ours = solarize(torch.arange(256).reshape(16, 16) / 255) * 255
    assert (ours - theirs).abs().max() < 1e-4
