"""RandAugment (arXiv 1909.13719): some operations, drawn anew for each sample, all of one magnitude.

Where pixels come from is composed to one affine map and comes first; what becomes of their color follows in the order
that was drawn. Operations and their reach are torchvision's. The letters: B images of a batch, C channels, H height,
W width, K operations of a sample.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.transforms.color import jitter
from pretrain.data.transforms.geometry import OPERATIONS, compose

LARGEST_MAGNITUDE = 10
LARGEST_FACTOR = 0.9  # of brightness, contrast, saturation and sharpness: from 0.1 to 1.9
MOST_BITS_LOST = 4
# A sample's operation is a number in what it was drawn from: the geometric ones first, then these.
COLORS = ("identity", "brightness", "contrast", "saturation", "sharpness", "posterize", "solarize", "auto", "equalize")
SHARPEN = ((1.0, 1.0, 1.0), (1.0, 5.0, 1.0), (1.0, 1.0, 1.0))


def sample_rand_augment(num_operations: int, magnitude: float, random: np.random.Generator) -> dict[str, Any]:
    """Draw a sample's operations, repeats allowed, those with a direction in either.

    Returns:
        "affine" [2, 3], "colors" [K], places in COLORS, and "strengths" [K], from -1 to 1.
    """
    moves, colors, strengths = [], np.zeros(num_operations), np.zeros(num_operations)
    for i in range(num_operations):
        drawn = int(random.integers(len(OPERATIONS) + len(COLORS)))
        strength = (1 if random.random() < 0.5 else -1) * magnitude / LARGEST_MAGNITUDE
        if drawn < len(OPERATIONS):
            moves.append((OPERATIONS[drawn], strength))
        else:
            colors[i], strengths[i] = drawn - len(OPERATIONS), strength
    return {"affine": compose(moves), "colors": colors, "strengths": strengths}


def recolor(images: Tensor, colors: Tensor, strengths: Tensor) -> Tensor:
    """Take each image [B, C, H, W], float in [0, 1], through its operations [B, K], one after the other."""
    for names, strength in zip(colors.unbind(1), strengths.unbind(1), strict=True):
        images = _recolor_once(images, names, strength)
    return images


def _recolor_once(images: Tensor, names: Tensor, strength: Tensor) -> Tensor:
    def factor(name: str) -> Tensor:
        """Return by how much this is scaled, [B]: 1 where it is not drawn."""
        return torch.where(names == COLORS.index(name), 1 + LARGEST_FACTOR * strength, 1.0)

    def where(name: str, changed: Tensor) -> Tensor:
        return torch.where((names == COLORS.index(name))[:, None, None, None], changed, images)

    reach = strength.abs()[:, None, None, None]
    images = jitter(images, factor("brightness"), factor("contrast"), factor("saturation"))
    images = where("sharpness", sharpen(images, factor("sharpness")))
    images = where("posterize", posterize(images, (MOST_BITS_LOST * reach).round()))
    images = where("solarize", torch.where(images >= 1 - reach, 1 - images, images))
    images = where("auto", stretch(images))
    return where("equalize", equalize(images))


def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """Move each pixel away from its smoothed neighborhood, or toward it; factors [B], the border stays."""
    channels = images.shape[1]
    kernel = torch.tensor(SHARPEN, device=images.device) / sum(map(sum, SHARPEN))
    smooth = F.conv2d(images, kernel.expand(channels, 1, 3, 3), groups=channels)
    inner = smooth + (images[..., 1:-1, 1:-1] - smooth) * factor[:, None, None, None]
    sharpened = images.clone()
    sharpened[..., 1:-1, 1:-1] = inner.clamp(0, 1)
    return sharpened


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Forget the lowest bits [B, 1, 1, 1] of 8."""
    step = 2.0**bits
    return ((images * 255).round() / step).floor() * step / 255


def stretch(images: Tensor) -> Tensor:
    """Let each channel reach from 0 to 1; one of a single value stays."""
    low, high = images.amin(dim=(-2, -1), keepdim=True), images.amax(dim=(-2, -1), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp_min(1e-8), images)


def equalize(images: Tensor) -> Tensor:
    """Let each channel's 8-bit values be equally frequent, by Pillow's table; one of a single value stays."""
    values = (images * 255).round().long().flatten(2).flatten(0, 1)  # [B C, H W]
    ones = torch.ones_like(values, dtype=torch.float32)
    counts = torch.zeros(len(values), 256, device=images.device).scatter_add_(1, values, ones)
    last = counts.gather(1, values.amax(dim=1, keepdim=True))
    step = ((values.shape[1] - last) / 255).floor()
    before = counts.cumsum(dim=1) - counts
    table = ((before + (step / 2).floor()) / step.clamp_min(1)).floor().clamp(0, 255)
    table = torch.where(step > 0, table, torch.arange(256.0, device=images.device))
    return (table.gather(1, values) / 255).view_as(images)
