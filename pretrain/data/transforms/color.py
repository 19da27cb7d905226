"""What changes a pixel's color and not its place: batched, with one parameter a sample.

The letters: B images of a batch, C channels, H height, W width. Images are float in [0, 1], and RGB. Nothing here makes
the host wait for the device.
"""

from functools import cache

import torch
from torch import Tensor

Channels = tuple[float, float, float]

LUMA = (0.299, 0.587, 0.114)
SOLARIZE_FROM = 0.5  # arXiv 2006.07733, appendix A


def jitter(images: Tensor, brightness: Tensor | None, contrast: Tensor | None, saturation: Tensor | None) -> Tensor:
    """Scale brightness, contrast around the mean gray and saturation around each pixel's gray by factors [B]."""
    if brightness is not None:
        images = (images * brightness[:, None, None, None]).clamp(0, 1)
    if contrast is not None:
        mean = grayscale(images).mean(dim=(-2, -1), keepdim=True)
        images = (mean + (images - mean) * contrast[:, None, None, None]).clamp(0, 1)
    if saturation is not None:
        own = grayscale(images)
        images = (own + (images - own) * saturation[:, None, None, None]).clamp(0, 1)
    return images


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn every pixel's hue by a share [B] of the circle; HSV's value and saturation stay."""
    red, green, blue = images.unbind(dim=1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    some = chroma.clamp(min=1e-8)  # a grayscale pixel has no hue: any will do
    sixths = torch.where(
        red == value,
        (green - blue) / some,
        torch.where(green == value, 2 + (blue - red) / some, 4 + (red - green) / some),
    )
    # Each channel is without its chroma in a third of the circle, and at its full value in another.
    place = ((sixths + 6 * turns[:, None, None])[:, None] + per_channel((5, 3, 1), images.device)) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(place, 4 - place).clamp(0, 1)


def grayscale(images: Tensor) -> Tensor:
    """Return the luma [B, 1, H, W] of RGB images."""
    return (images * per_channel(LUMA, images.device)).sum(dim=1, keepdim=True)


def solarize(images: Tensor) -> Tensor:
    """Invert the values of at least half."""
    return torch.where(images >= SOLARIZE_FROM, 1 - images, images)


def normalize(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """Standardise float images [B, C, H, W] in [0, 1], each channel by its mean and deviation."""
    return (images - per_channel(mean, images.device)) / per_channel(std, images.device)


def denormalize(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """Undo `normalize`."""
    return images * per_channel(std, images.device) + per_channel(mean, images.device)


@cache
def per_channel(values: Channels, device: torch.device) -> Tensor:
    """Return one number a channel, [C, 1, 1]; kept, because a copy to the device would make the host wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
