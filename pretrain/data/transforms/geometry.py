"""Geometric transforms of batches: affine maps, blur and boxes. Workers sample them, the device applies them.

The letters: B images of a batch, C channels, H height, W width, K taps of a blur kernel. Affine maps use coordinates
from -1 to 1, x before y, and map a point of the result to the point of the image that it shows. Boxes are
[top, left, bottom, right] as fractions of the image. Nothing here makes the host wait for the device.
"""

import math
from collections.abc import Iterable
from functools import reduce

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Array = npt.NDArray[np.float64]

# Geometric operations of RandAugment (arXiv 1909.13719), and the strength of each at the largest magnitude.
OPERATIONS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
MAX_SHEAR = 0.3
MAX_TRANSLATION = 0.45  # as a fraction of the image's side
MAX_ROTATION_DEGREES = 30
FILL = 0.5  # gray value of the pixels outside of the image, which are in [0, 1]

BLUR_RADIUS = 3  # in standard deviations of the widest Gaussian; 0.3% of its weight lies outside
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)


def compose(operations: Iterable[tuple[str, float]]) -> Array:
    """Return the affine map [2, 3] that applies the (operation, strength) pairs to an image in this order."""
    return reduce(np.matmul, (_affine(name, strength) for name, strength in operations), np.eye(3))[:2]


def warp(images: Tensor, affine: Tensor) -> Tensor:
    """Apply an affine map [B, 2, 3] to each image [B, C, H, W]: bilinear, with gray outside of the image."""
    height, width = images.shape[-2:]
    y = ((torch.arange(height, device=images.device) * 2 + 1) / height - 1)[:, None, None]
    x = ((torch.arange(width, device=images.device) * 2 + 1) / width - 1)[:, None]
    by_x, by_y, shift = affine[:, None, None].unbind(-1)
    # F.affine_grid uses a matrix product, which rounds the coordinates to ten bits if TF32 is allowed.
    grid = by_x * x + by_y * y + shift
    return F.grid_sample(images - FILL, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + FILL


def sample_blur_kernel(
    probability: float, sigma: tuple[float, float], image_size: int, random: np.random.Generator
) -> Array:
    """Sample a Gaussian blur kernel [K], or the identity kernel if the image is not blurred.

    Args:
        probability: Probability of a blur.
        sigma: Smallest and largest standard deviation in pixels; the largest determines K.
        image_size: Side of the image in pixels; reflection padding limits the kernel's radius to one less.
        random: Random generator of the sample.
    """
    radius = min(math.ceil(BLUR_RADIUS * sigma[1]), image_size - 1)
    offsets = np.arange(-radius, radius + 1)
    if random.random() >= probability:
        return np.where(offsets == 0, 1.0, 0.0)
    weights: Array = np.exp(-0.5 * (offsets / random.uniform(*sigma)) ** 2)
    weights /= weights.sum()
    return weights


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each image [B, C, H, W] with its kernel [B, K] along both axes, with reflection padding."""
    channels, radius = images.shape[1], kernels.shape[1] // 2
    planes = F.pad(images, (radius, radius, radius, radius), mode="reflect").flatten(0, 1)[None]
    taps = kernels.repeat_interleave(channels, dim=0)[:, None]  # [B C, 1, K]
    planes = F.conv2d(planes, taps[..., :, None], groups=len(taps))
    planes = F.conv2d(planes, taps[..., None, :], groups=len(taps))
    return planes.view(images.shape)


def sample_erase_box(probability: float, random: np.random.Generator) -> Array:
    """Sample the box of random erasing (arXiv 1708.04896), [4]; an empty box if nothing is erased."""
    if random.random() >= probability:
        return np.zeros(4)
    area = random.uniform(*ERASE_AREA)
    ratio = math.exp(random.uniform(math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])))
    height, width = min(math.sqrt(area / ratio), 1.0), min(math.sqrt(area * ratio), 1.0)
    top, left = random.uniform(0, 1 - height), random.uniform(0, 1 - width)
    return np.array([top, left, top + height, left + width])


def box_mask(boxes: Tensor, images: Tensor) -> Tensor:
    """Return bool [B, 1, H, W]: whether the center of a pixel lies inside the box [B, 4]."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=boxes.device) + 0.5)[None, :, None] / height
    columns = (torch.arange(width, device=boxes.device) + 0.5)[None, None, :] / width
    top, left, bottom, right = boxes[:, :, None, None].unbind(1)
    return ((rows >= top) & (rows < bottom) & (columns >= left) & (columns < right))[:, None]


def _affine(operation: str, strength: float) -> Array:
    """Return the affine map [3, 3] of one operation around the center, with a strength from -1 to 1."""
    affine = np.eye(3)
    match operation:
        case "shear_x":
            affine[0, 1] = MAX_SHEAR * strength
        case "shear_y":
            affine[1, 0] = MAX_SHEAR * strength
        case "translate_x":
            affine[0, 2] = 2 * MAX_TRANSLATION * strength
        case "translate_y":
            affine[1, 2] = 2 * MAX_TRANSLATION * strength
        case "rotate":
            angle = math.radians(MAX_ROTATION_DEGREES * strength)
            affine[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        case _:
            raise AssertionError(operation)
    return affine
