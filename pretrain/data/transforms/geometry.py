"""Which places of an image a pixel is made of: affine maps, blur, boxes. Drawn in a worker, applied to a whole batch.

The letters: B images of a batch, C channels, H height, W width, K taps of a blur. Affine maps are in coordinates from
-1 to 1, x before y, and lead from a place of the result to the place of the image that it shows. Boxes are
[top, left, bottom, right] as shares of the image. Nothing here makes the host wait for the device.
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

# RandAugment's operations that move pixels (arXiv 1909.13719), and how far each goes at the largest magnitude.
OPERATIONS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
LARGEST_SHEAR = 0.3
LARGEST_SHIFT = 0.45  # of the image's side
LARGEST_DEGREES = 30
FILL = 0.5  # the grayscale that comes in from outside, of pixels in [0, 1]

BLUR_REACH = 3  # deviations of the widest Gaussian on either side; 0.3 % of its weight lies beyond
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)


def compose(operations: Iterable[tuple[str, float]]) -> Array:
    """Return the map [2, 3] of (operation, strength) pairs that an image goes through in this order."""
    return reduce(np.matmul, (_affine(name, strength) for name, strength in operations), np.eye(3))[:2]


def warp(images: Tensor, affine: Tensor) -> Tensor:
    """Show each image [B, C, H, W] through its map [B, 2, 3], bilinearly; what lies outside is filled with gray."""
    height, width = images.shape[-2:]
    y = ((torch.arange(height, device=images.device) * 2 + 1) / height - 1)[:, None, None]
    x = ((torch.arange(width, device=images.device) * 2 + 1) / width - 1)[:, None]
    by_x, by_y, shift = affine[:, None, None].unbind(-1)
    # Not F.affine_grid: it multiplies matrices, which where TF32 is allowed rounds the places to ten bits.
    places = by_x * x + by_y * y + shift
    return F.grid_sample(images - FILL, places, mode="bilinear", padding_mode="zeros", align_corners=False) + FILL


def sample_blur_kernel(
    probability: float, sigma: tuple[float, float], image_size: int, random: np.random.Generator
) -> Array:
    """Draw the kernel [K] of a Gaussian; of one that changes nothing where the blur is not drawn.

    Args:
        probability: of a blur.
        sigma: the smallest and the largest deviation in pixels; the largest decides K.
        image_size: pixels of a side; a mirrored border reaches no further.
        random: the sample's own.
    """
    radius = min(math.ceil(BLUR_REACH * sigma[1]), image_size - 1)
    offsets = np.arange(-radius, radius + 1)
    if random.random() >= probability:
        return np.where(offsets == 0, 1.0, 0.0)
    weights: Array = np.exp(-0.5 * (offsets / random.uniform(*sigma)) ** 2)
    weights /= weights.sum()
    return weights


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Blur each image [B, C, H, W] by its kernel [B, K], down and across; the border is a mirror."""
    channels, radius = images.shape[1], kernels.shape[1] // 2
    planes = F.pad(images, (radius, radius, radius, radius), mode="reflect").flatten(0, 1)[None]
    taps = kernels.repeat_interleave(channels, dim=0)[:, None]  # [B C, 1, K]
    planes = F.conv2d(planes, taps[..., :, None], groups=len(taps))
    planes = F.conv2d(planes, taps[..., None, :], groups=len(taps))
    return planes.view(images.shape)


def sample_erase_box(probability: float, random: np.random.Generator) -> Array:
    """Draw the box to erase (arXiv 1708.04896); an empty one where nothing is erased."""
    if random.random() >= probability:
        return np.zeros(4)
    area = random.uniform(*ERASED_AREA)
    ratio = math.exp(random.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
    height, width = min(math.sqrt(area / ratio), 1.0), min(math.sqrt(area * ratio), 1.0)
    top, left = random.uniform(0, 1 - height), random.uniform(0, 1 - width)
    return np.array([top, left, top + height, left + width])


def box_mask(boxes: Tensor, images: Tensor) -> Tensor:
    """Return bool [B, 1, H, W]: the pixels whose center lies in the box [B, 4] of shares."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=boxes.device) + 0.5)[None, :, None] / height
    columns = (torch.arange(width, device=boxes.device) + 0.5)[None, None, :] / width
    top, left, bottom, right = boxes[:, :, None, None].unbind(1)
    return ((rows >= top) & (rows < bottom) & (columns >= left) & (columns < right))[:, None]


def _affine(operation: str, strength: float) -> Array:
    """Return the map [3, 3] of one operation around the center; strength from -1 to 1, either way at the most."""
    affine = np.eye(3)
    match operation:
        case "shear_x":
            affine[0, 1] = LARGEST_SHEAR * strength
        case "shear_y":
            affine[1, 0] = LARGEST_SHEAR * strength
        case "translate_x":
            affine[0, 2] = 2 * LARGEST_SHIFT * strength
        case "translate_y":
            affine[1, 2] = 2 * LARGEST_SHIFT * strength
        case "rotate":
            angle = math.radians(LARGEST_DEGREES * strength)
            affine[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        case _:
            raise AssertionError(operation)
    return affine
