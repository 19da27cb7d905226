"""Color transforms of batches, with one parameter per image.

The letters: B images of a batch, C channels, H height, W width. Images are RGB, float in [0, 1]. Nothing here makes the
host wait for the device.
"""

import torch
from torch import Tensor

Channels = tuple[float, float, float]

LUMA = (0.299, 0.587, 0.114)
SOLARIZE_THRESHOLD = 0.5  # arXiv 2006.07733, appendix A


def jitter(images: Tensor, brightness: Tensor | None, contrast: Tensor | None, saturation: Tensor | None) -> Tensor:
    """Scale brightness, contrast (around the mean luma) and saturation (around the luma of each pixel).

    Args:
        images: RGB images [B, 3, H, W] in [0, 1].
        brightness: Factor of each image, [B]; None leaves the brightness unchanged.
        contrast: Factor of each image, [B], or None.
        saturation: Factor of each image, [B], or None.
    """
    if brightness is not None:
        images = (images * brightness[:, None, None, None]).clamp(0, 1)
    if contrast is not None:
        mean = grayscale(images).mean(dim=(-2, -1), keepdim=True)
        images = (mean + (images - mean) * contrast[:, None, None, None]).clamp(0, 1)
    if saturation is not None:
        luma = grayscale(images)
        images = (luma + (images - luma) * saturation[:, None, None, None]).clamp(0, 1)
    return images


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of each image by `turns` [B] of the color circle; HSV value and saturation stay the same."""
    red, green, blue = images.unbind(dim=1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    divisor = chroma.clamp(min=1e-8)  # the hue of a gray pixel has no effect
    sixths = torch.where(
        red == value,
        (green - blue) / divisor,
        torch.where(green == value, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    # Each channel has its lowest value in one third of the circle and its full value in another third.
    angle = ((sixths + 6 * turns[:, None, None])[:, None] + per_channel((5, 3, 1), images.device)) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(angle, 4 - angle).clamp(0, 1)


def grayscale(images: Tensor) -> Tensor:
    """Return the luma [B, 1, H, W] of RGB images."""
    return (images * per_channel(LUMA, images.device)).sum(dim=1, keepdim=True)


def solarize(images: Tensor) -> Tensor:
    """Invert all values of at least 0.5."""
    return torch.where(images >= SOLARIZE_THRESHOLD, 1 - images, images)


def normalize(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """Standardize images [B, C, H, W], float in [0, 1], with the mean and standard deviation of each channel."""
    return (images - per_channel(mean, images.device)) / per_channel(std, images.device)


def denormalize(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """Undo `normalize`."""
    return images * per_channel(std, images.device) + per_channel(mean, images.device)


def per_channel(values: Channels, device: torch.device) -> Tensor:
    """Return one value per channel as a tensor [C, 1, 1].

    It is filled on the device, because the host would wait for a copy of the values.
    """
    return torch.stack([torch.full((), value, device=device) for value in values])[:, None, None]
