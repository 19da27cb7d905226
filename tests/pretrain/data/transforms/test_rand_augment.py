"""RandAugment's color operations compared with Pillow, and the distribution of its parameters."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from pretrain.data.transforms.geometry import OPERATIONS, compose
from pretrain.data.transforms.rand_augment import COLORS, recolor, sample_rand_augment

PHOTO = Image.fromarray(load_sample_image("china.jpg")[100:164, 200:280] // 2 + 40)
PIXELS = torch.from_numpy(np.array(PHOTO)).permute(2, 0, 1)[None] / 255

PILLOWS: dict[str, Callable[[float], Image.Image]] = {
    "identity": lambda _: PHOTO,
    "brightness": lambda s: ImageEnhance.Brightness(PHOTO).enhance(1 + 0.9 * s),
    "contrast": lambda s: ImageEnhance.Contrast(PHOTO).enhance(1 + 0.9 * s),
    "saturation": lambda s: ImageEnhance.Color(PHOTO).enhance(1 + 0.9 * s),
    "sharpness": lambda s: ImageEnhance.Sharpness(PHOTO).enhance(1 + 0.9 * s),
    "posterize": lambda s: ImageOps.posterize(PHOTO, 8 - round(4 * abs(s))),
    "solarize": lambda s: ImageOps.solarize(PHOTO, round(255 * (1 - abs(s)))),
    "auto": lambda _: ImageOps.autocontrast(PHOTO),
    "equalize": lambda _: ImageOps.equalize(PHOTO),
}


@pytest.mark.parametrize("strength", [-0.8, 0.4])
@pytest.mark.parametrize("name", COLORS)
def test_color_operation_equals_pillow(name: str, strength: float) -> None:
    ours = recolor(PIXELS, torch.tensor([[float(COLORS.index(name))]]), torch.tensor([[strength]]))
    theirs = np.asarray(PILLOWS[name](strength)).astype(float)
    difference = np.abs(ours[0].permute(1, 2, 0).numpy() * 255 - theirs)
    assert np.quantile(difference, 0.999) < 1.5  # Pillow rounds in between
    assert name == "identity" or np.abs(theirs - np.asarray(PHOTO)).mean() > 0.5


def test_color_operations_are_per_image_and_in_order() -> None:
    contrast, solarize, nothing = (float(COLORS.index(name)) for name in ("contrast", "solarize", "identity"))
    batch = PIXELS.expand(3, -1, -1, -1)
    colors = torch.tensor([[contrast, solarize], [solarize, contrast], [nothing, nothing]])
    both = recolor(batch, colors, torch.full((3, 2), 0.7))
    for i in range(3):
        alone = PIXELS
        for color in colors[i]:
            alone = recolor(alone, color[None, None], torch.tensor([[0.7]]))
        torch.testing.assert_close(both[i : i + 1], alone)
    assert not torch.allclose(both[0], both[1], atol=0.05)
    torch.testing.assert_close(both[2], PIXELS[0])


def test_constant_image_is_unchanged() -> None:
    flat = torch.full((1, 3, 8, 8), 0.4)
    for name in ("auto", "equalize", "sharpness", "contrast"):
        torch.testing.assert_close(recolor(flat, torch.tensor([[float(COLORS.index(name))]]), torch.ones(1, 1)), flat)


def test_operations_are_sampled_uniformly() -> None:
    random, counts = np.random.default_rng(0), Counter[str]()
    moves = {compose([(name, sign * 0.4)]).tobytes(): name for name in OPERATIONS for sign in (-1, 1)}
    for _ in range(2800):
        drawn = sample_rand_augment(1, 4.0, random)
        moved = moves.get(drawn["affine"].tobytes())
        counts[moved or COLORS[int(drawn["colors"][0])]] += 1
        assert moved is None or drawn["strengths"][0] == 0
        assert moved or abs(drawn["strengths"][0]) == 0.4
    assert len(counts) == 14
    assert all(abs(count - 200) < 60 for count in counts.values())  # four standard deviations


def test_geometric_operations_are_composed_in_order() -> None:
    for seed in range(40):
        random = np.random.default_rng(seed)
        one, two = (sample_rand_augment(1, 7.0, random)["affine"] for _ in range(2))
        both = sample_rand_augment(2, 7.0, np.random.default_rng(seed))["affine"]
        square = [np.vstack([affine, [0, 0, 1]]) for affine in (one, two)]
        np.testing.assert_allclose(both, (square[0] @ square[1])[:2], atol=1e-12)
