"""RandAugment (arXiv 1909.13719): a few random operations per sample, all of the same magnitude.

The geometric operations are composed into one affine map and applied first; the color operations follow in the order in
which they were sampled. Operations and their ranges are those of torchvision. The letters: B images of a batch,
C channels, H height, W width, K operations per sample.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.transforms.color import jitter
from pretrain.data.transforms.geometry import OPERATIONS, compose

MAX_MAGNITUDE = 10
MAX_FACTOR_CHANGE = 0.9  # brightness, contrast, saturation and sharpness have factors from 0.1 to 1.9
MAX_BITS_REMOVED = 4
# Operations are numbered: first geometry.OPERATIONS, then these.
COLORS = ("identity", "brightness", "contrast", "saturation", "sharpness", "posterize", "solarize", "auto", "equalize")
CENTER_WEIGHT, KERNEL_SIZE = 5, 3  # of the smoothing kernel; its other weights are 1


def sample_rand_augment(num_operations: int, magnitude: float, random: np.random.Generator) -> dict[str, Any]:
    """Sample the operations of one sample, with replacement and with a random sign of their strength.

    Args:
        num_operations: Number of operations.
        magnitude: Magnitude of all operations, from 0 to 10.
        random: Random generator of the sample.

    Returns:
        "affine" [2, 3], the map of the geometric operations; "colors" [K], indices of the color operations in COLORS;
        "strengths" [K], from -1 to 1.
    """
    moves, colors, strengths = [], np.zeros(num_operations), np.zeros(num_operations)
    for i in range(num_operations):
        operation = int(random.integers(len(OPERATIONS) + len(COLORS)))
        strength = (1 if random.random() < 0.5 else -1) * magnitude / MAX_MAGNITUDE
        if operation < len(OPERATIONS):
            moves.append((OPERATIONS[operation], strength))
        else:
            colors[i], strengths[i] = operation - len(OPERATIONS), strength
    return {"affine": compose(moves), "colors": colors, "strengths": strengths}


def recolor(images: Tensor, colors: Tensor, strengths: Tensor) -> Tensor:
    """Apply color operations [B, K] with strengths [B, K] to images [B, C, H, W], float in [0, 1], in order."""
    for names, strength in zip(colors.unbind(1), strengths.unbind(1), strict=True):
        images = _recolor_once(images, names, strength)
    return images


def _recolor_once(images: Tensor, names: Tensor, strength: Tensor) -> Tensor:
    def factor(name: str) -> Tensor:
        """Return the factor of an operation for each image, [B]: 1 if the image has another operation."""
        return torch.where(names == COLORS.index(name), 1 + MAX_FACTOR_CHANGE * strength, 1.0)

    def where(name: str, changed: Tensor) -> Tensor:
        return torch.where((names == COLORS.index(name))[:, None, None, None], changed, images)

    reach = strength.abs()[:, None, None, None]
    images = jitter(images, factor("brightness"), factor("contrast"), factor("saturation"))
    images = where("sharpness", sharpen(images, factor("sharpness")))
    images = where("posterize", posterize(images, (MAX_BITS_REMOVED * reach).round()))
    images = where("solarize", torch.where(images >= 1 - reach, 1 - images, images))
    images = where("auto", stretch(images))
    return where("equalize", equalize(images))


def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """Sharpen (factor above 1) or smooth (below 1) images by factors [B]; pixels at the border stay unchanged."""
    inner, num_weights = images[..., 1:-1, 1:-1], KERNEL_SIZE**2
    total = F.avg_pool2d(images, KERNEL_SIZE, stride=1) * num_weights + (CENTER_WEIGHT - 1) * inner
    smooth = total / (num_weights + CENTER_WEIGHT - 1)
    sharpened = images.clone()
    sharpened[..., 1:-1, 1:-1] = (smooth + (inner - smooth) * factor[:, None, None, None]).clamp(0, 1)
    return sharpened


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Set the lowest `bits` [B, 1, 1, 1] of 8 to 0."""
    step = 2.0**bits
    return ((images * 255).round() / step).floor() * step / 255


def stretch(images: Tensor) -> Tensor:
    """Stretch the values of each channel to the range from 0 to 1; constant channels stay unchanged."""
    low, high = images.amin(dim=(-2, -1), keepdim=True), images.amax(dim=(-2, -1), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp_min(1e-8), images)


def equalize(images: Tensor) -> Tensor:
    """Equalize the histogram of each channel's 8-bit values as Pillow does; constant channels stay unchanged."""
    values = (images * 255).round().long().flatten(2).flatten(0, 1)  # [B C, H W]
    counts = histogram(values)
    last = counts.gather(1, values.amax(dim=1, keepdim=True))
    step = ((values.shape[1] - last) / 255).floor()
    before = counts.long().cumsum(dim=1) - counts  # of integers, because that of floats is not deterministic on a GPU
    table = ((before + (step / 2).floor()) / step.clamp_min(1)).floor().clamp(0, 255)
    table = torch.where(step > 0, table, torch.arange(256.0, device=images.device))
    return (table.gather(1, values) / 255).view_as(images)


def histogram(values: Tensor) -> Tensor:
    """Count the 8-bit values in each row: int64 [rows, N] -> float32 [rows, 256].

    It multiplies the one-hot codes of the upper and the lower four bits. Adding ones at the place of each value would
    be slow on a GPU, where many threads would add to the same place.
    """
    bits = torch.arange(16, device=values.device)
    upper = (values[:, None] // 16 == bits[:, None]).float()  # [rows, 16, N]
    lower = (values[:, :, None] % 16 == bits).float()  # [rows, N, 16]
    return torch.bmm(upper, lower).flatten(1)
