"""Geometry compared with Pillow, the blur with SciPy, composed maps with sequences of operations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_image

from pretrain.data.transforms.geometry import FILL, OPERATIONS, blur, compose, sample_blur_kernel, warp

SIDE = 96
PHOTO = load_sample_image("china.jpg")[100 : 100 + SIDE, 200 : 200 + SIDE]
PIXELS = torch.from_numpy(PHOTO.copy()).permute(2, 0, 1)[None].float() / 255

# What each operation is at a strength of s, said to Pillow: a x + b y + c and d x + e y + f, in pixels from the corner.
IN_PIXELS = {
    "shear_x": lambda s: (1, 0.3 * s, -0.3 * s * SIDE / 2, 0, 1, 0),
    "shear_y": lambda s: (1, 0, 0, 0.3 * s, 1, -0.3 * s * SIDE / 2),
    "translate_x": lambda s: (1, 0, 0.45 * s * SIDE, 0, 1, 0),
    "translate_y": lambda s: (1, 0, 0, 0, 1, 0.45 * s * SIDE),
}


def warped(images: torch.Tensor, *operations: tuple[str, float]) -> torch.Tensor:
    return warp(images, torch.tensor(compose(operations), dtype=torch.float32)[None])


def is_inside(*operations: tuple[str, float]) -> torch.Tensor:
    """Return the pixels of the result that do not depend on anything outside of the image."""
    return warped(torch.ones(1, 1, SIDE, SIDE), *operations)[0, 0] > 1 - 1e-6


@pytest.mark.parametrize("strength", [-1.0, -0.45, 0.3, 1.0])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_equals_pillow(operation: str, strength: float) -> None:
    image, black = Image.fromarray(PHOTO), (0, 0, 0)
    if operation == "rotate":
        theirs = image.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=black)
    else:
        coefficients = IN_PIXELS[operation](strength)
        theirs = image.transform(
            image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=black
        )
    ours = warped(PIXELS, (operation, strength))[0] * 255
    inside = is_inside((operation, strength))
    assert inside.float().mean() > 0.5
    # Pillow cuts off what is behind the point, so it is up to one level below.
    excess = (ours - torch.from_numpy(np.array(theirs)).permute(2, 0, 1))[:, inside]
    assert excess.min() > -0.01
    assert excess.max() < 1.01


def test_warp_equals_torch_on_any_shape() -> None:
    images = torch.rand(4, 3, 17, 29, generator=torch.Generator().manual_seed(0))
    affine = torch.eye(3)[:2] + 0.3 * torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    theirs = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    covered = F.grid_sample(torch.ones_like(images), grid, padding_mode="zeros", align_corners=False)
    assert torch.allclose(warp(images, affine), theirs + FILL * (1 - covered), atol=1e-4)


def test_pixels_from_outside_are_gray() -> None:
    shifted = warped(PIXELS, ("translate_x", 1.0))
    assert torch.allclose(shifted[..., -int(0.45 * SIDE) :], torch.tensor(FILL))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.floats(-0.5, 0.5)), min_size=1, max_size=4))
def test_composed_map_equals_the_operations_in_sequence(operations: list[tuple[str, float]]) -> None:
    """On a linear gradient, where repeated bilinear sampling is exact."""
    rows, columns = torch.meshgrid(torch.arange(SIDE) / SIDE, torch.arange(SIDE) / SIDE, indexing="ij")
    slopes = torch.stack([rows, columns, rows - columns])[None]
    in_turn, inside = slopes, torch.ones(1, 1, SIDE, SIDE)
    for operation in operations:
        in_turn, inside = warped(in_turn, operation), warped(inside, operation)
    both = (inside[0, 0] > 1 - 1e-6) & is_inside(*operations)
    difference = (warped(slopes, *operations) - in_turn)[0][:, both]
    assert (difference.abs() < 1e-5).all()


def test_the_order_of_operations_matters() -> None:
    shift, turn = ("translate_x", 0.5), ("rotate", 1.0)
    assert not np.allclose(compose([shift, turn]), compose([turn, shift]), atol=0.05)
    # Turned last, so the center of the result shows the center of the shifted image: 22.5 % of the side to the right.
    np.testing.assert_allclose(compose([shift, turn])[:, 2], [0.45, 0.0], atol=1e-12)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.4, 2.0])
def test_blur_equals_scipy(sigma: float) -> None:
    kernel = sample_blur_kernel(1.0, (sigma, sigma), SIDE, np.random.default_rng(0))
    ours = blur(PIXELS, torch.tensor(kernel, dtype=torch.float32)[None])[0].numpy()
    theirs = gaussian_filter(PIXELS[0].numpy(), (0, sigma, sigma), mode="mirror", radius=(0, *[len(kernel) // 2] * 2))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)  # float32 sums of thirteen weights, twice


def test_blur_is_per_image() -> None:
    sigmas = (0.3, 1.0, 2.0)
    kernels = [sample_blur_kernel(1.0, (sigma, sigma + 1e-9), SIDE, np.random.default_rng(0)) for sigma in sigmas]
    radius = len(kernels[-1]) // 2
    padded = np.stack([np.pad(kernel, radius - len(kernel) // 2) for kernel in kernels])
    together = blur(PIXELS.expand(3, -1, -1, -1), torch.tensor(padded, dtype=torch.float32))
    for i, kernel in enumerate(kernels):
        alone = blur(PIXELS, torch.tensor(kernel, dtype=torch.float32)[None])[0]
        assert torch.allclose(together[i], alone, atol=1e-6)


def test_blurs_have_the_configured_probability_and_width() -> None:
    random = np.random.default_rng(0)
    kernels = np.stack([sample_blur_kernel(0.3, (0.5, 2.0), SIDE, random) for _ in range(2000)])
    assert kernels.shape == (2000, 13)  # six pixels either way: three of the widest deviations
    np.testing.assert_allclose(kernels.sum(axis=1), 1)
    is_blurred = kernels[:, 6] < 1
    assert is_blurred.mean() == pytest.approx(0.3, abs=0.04)
    assert np.array_equal(kernels[~is_blurred], np.eye(13)[np.full((~is_blurred).sum(), 6)])
    drawn = kernels[is_blurred]
    sigmas = np.sqrt(-0.5 / np.log(drawn[:, 7] / drawn[:, 6]))  # the ratio of neighbors of a Gaussian
    assert sigmas.min() == pytest.approx(0.5, abs=0.03)
    assert sigmas.max() == pytest.approx(2.0, abs=0.03)
    assert sigmas.mean() == pytest.approx(1.25, abs=0.08)


@pytest.mark.parametrize("side", [1, 2, 5])
def test_blur_works_on_small_images(side: int) -> None:
    kernel = sample_blur_kernel(1.0, (2.0, 2.0), side, np.random.default_rng(0))
    flat = torch.full((1, 3, side, side), 0.7)
    assert torch.allclose(blur(flat, torch.tensor(kernel, dtype=torch.float32)[None]), flat)
