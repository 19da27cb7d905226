"""Views of an image. The worker crops, resizes and draws; what costs FLOPs runs batched where the model is.

The letters: B images of a batch, C channels, H height, W width. A draw is one number (or box) a sample; boxes are
[top, left, bottom, right] as shares of the image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pretrain.config import AugmentConfig
from pretrain.data.decode import Pixels

View = Callable[[Pixels, np.random.Generator], dict[str, Any]]
Channels = tuple[float, float, float]

CROP_TRIES = 10
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class TrainView:
    """A random crop of an image with the draws for the rest of its augmentation. Runs in the loader's workers."""

    config: AugmentConfig
    image_size: int

    def __call__(self, image: Pixels, random: np.random.Generator) -> dict[str, Any]:
        height, width = image.shape[:2]
        top, left, bottom, right = crop_box(height, width, self.config.crop_scale, self.config.crop_aspect, random)
        return {"image": resize(image[top:bottom, left:right], self.image_size), **self.draw(random)}

    def draw(self, random: np.random.Generator) -> dict[str, Any]:
        """Draw one sample's share of a batch's augmentation; what is switched off has no draw and costs nothing."""
        config = self.config
        draws: dict[str, Any] = {}
        if config.flip:
            draws["flip"] = random.random() < config.flip
        for name in ("brightness", "contrast", "saturation"):
            if strength := getattr(config, name):
                draws[name] = random.uniform(max(0.0, 1 - strength), 1 + strength)
        if config.erasing:
            draws["erase_box"] = _erase_box(random) if random.random() < config.erasing else np.zeros(4)
        if config.mixes:
            draws |= self._draw_mix(random)
        return {name: np.asarray(value, dtype=np.float32) for name, value in draws.items()}

    def _draw_mix(self, random: np.random.Generator) -> dict[str, Any]:
        """Draw how much of the neighbour comes in, by mixup or by cutmix; both take turns where both are on."""
        mixup, cutmix = self.config.mixup, self.config.cutmix
        is_cutmix = cutmix > 0 and (mixup == 0 or random.random() < 0.5)
        alpha = cutmix if is_cutmix else mixup
        share = random.beta(alpha, alpha)
        if is_cutmix:
            return {"mix_share": 0.0, "cut_box": _cut_box(share, random)}
        return {"mix_share": share, "cut_box": np.zeros(4)}


@dataclass(frozen=True)
class EvalView:
    """The shorter edge resized, the centre cropped: what the exported image processor does, pixel for pixel."""

    image_size: int
    resize_ratio: float = 1.0

    @property
    def shortest_edge(self) -> int:
        """Pixels of the shorter edge before the crop."""
        return round(self.image_size * self.resize_ratio)

    def __call__(self, image: Pixels, random: np.random.Generator) -> dict[str, Any]:
        # Hugging Face truncates the longer edge and floors the centre; torchvision rounds both.
        shorter = min(image.shape[:2])
        height, width = (int(self.shortest_edge * edge / shorter) for edge in image.shape[:2])
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        top, left = (height - self.image_size) // 2, (width - self.image_size) // 2
        cropped = resized.crop((left, top, left + self.image_size, top + self.image_size))
        return {"image": np.asarray(cropped).transpose(2, 0, 1).copy()}


def crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    random: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draw a random resized crop (arXiv 1409.4842): top, left, bottom, right in pixels."""
    for _ in range(CROP_TRIES):
        area = height * width * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
            return top, left, top + h, left + w
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return top, left, top + side, left + side


def resize(image: Pixels, size: int) -> Tensor:
    """Resize [H, W, C] to a square, antialiased bicubic in uint8; about twice Pillow's speed.

    Returns:
        uint8 [C, size, size].
    """
    channels_last = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    return F.interpolate(channels_last, (size, size), mode="bicubic", antialias=True)[0].contiguous()


def normalize(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """Standardise float images [B, C, H, W] in [0, 1], each channel by its mean and deviation."""
    return (images - _channels(mean, images.device)) / _channels(std, images.device)


def augment(batch: dict[str, Tensor], mean: Channels, std: Channels) -> Tensor:
    """Flip, jitter, normalise and erase a batch by its draws.

    Args:
        batch: "image" uint8 [B, C, H, W] and those draws of `TrainView` that are switched on.
        mean: of each channel, of pixels in [0, 1].
        std: of each channel.

    Returns:
        float [B, C, H, W].
    """
    images = batch["image"].float() / 255
    if "flip" in batch:
        images = torch.where(batch["flip"].bool()[:, None, None, None], images.flip(-1), images)
    images = jitter(images, batch.get("brightness"), batch.get("contrast"), batch.get("saturation"))
    images = normalize(images, mean, std)
    if "erase_box" in batch:
        images = images.masked_fill(box_mask(batch["erase_box"], images), 0.0)
    return images


def jitter(images: Tensor, brightness: Tensor | None, contrast: Tensor | None, saturation: Tensor | None) -> Tensor:
    """Scale brightness, then contrast around the mean grey, then saturation around each pixel's grey; factors [B]."""
    if brightness is not None:
        images = (images * brightness[:, None, None, None]).clamp(0, 1)
    if contrast is not None:
        mean = grey(images).mean(dim=(-2, -1), keepdim=True)
        images = (mean + (images - mean) * contrast[:, None, None, None]).clamp(0, 1)
    if saturation is not None:
        own = grey(images)
        images = (own + (images - own) * saturation[:, None, None, None]).clamp(0, 1)
    return images


def grey(images: Tensor) -> Tensor:
    """Return the luma [B, 1, H, W] of RGB images."""
    return (images * _channels(GREY, images.device)).sum(dim=1, keepdim=True)


def mix_neighbours(images: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbour in the order (0 with 1, 2 with 3 ...): mixup and cutmix.

    Neighbours stay together on any number of ranks, so the pixels do too.

    Args:
        images: [B, C, H, W], B even.
        batch: the draws "mix_share" [B] and "cut_box" [B, 4].

    Returns:
        The mixed images, and each image's own share [B] of its pixels.
    """
    partners = neighbours(images)
    mask = box_mask(batch["cut_box"], images)
    share = batch["mix_share"][:, None, None, None]
    mixed = torch.where(mask, partners, images.lerp(partners, share.to(images.dtype)))
    own_share = (1 - batch["mix_share"]) * (1 - mask.float().mean(dim=(1, 2, 3)))
    return mixed, own_share


def mixed_cross_entropy(logits: Tensor, labels: Tensor, own_share: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean of s CE(y) + (1 - s) CE(neighbour's y), s an image's own share [B] of its pixels."""
    own, other = (
        F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
        for target in (labels, neighbours(labels))
    )
    return torch.lerp(other, own, own_share).mean()


def neighbours(values: Tensor) -> Tensor:
    """Swap 0 with 1, 2 with 3, ... along the first dimension."""
    return values.reshape(-1, 2, *values.shape[1:]).flip(1).reshape(values.shape)


def box_mask(boxes: Tensor, images: Tensor) -> Tensor:
    """Return bool [B, 1, H, W]: the pixels whose centre lies in the box [B, 4] of shares."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=boxes.device) + 0.5)[None, :, None] / height
    columns = (torch.arange(width, device=boxes.device) + 0.5)[None, None, :] / width
    top, left, bottom, right = boxes[:, :, None, None].unbind(1)
    return ((rows >= top) & (rows < bottom) & (columns >= left) & (columns < right))[:, None]


@cache
def _channels(values: Channels, device: torch.device) -> Tensor:
    """Return one number a channel, [C, 1, 1]; kept, because a copy to the device would make the host wait."""
    return torch.tensor(values, device=device)[:, None, None]


def _erase_box(random: np.random.Generator) -> Any:
    area = random.uniform(*ERASED_AREA)
    ratio = math.exp(random.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
    height, width = min(math.sqrt(area / ratio), 1.0), min(math.sqrt(area * ratio), 1.0)
    top, left = random.uniform(0, 1 - height), random.uniform(0, 1 - width)
    return np.array([top, left, top + height, left + width])


def _cut_box(area: float, random: np.random.Generator) -> Any:
    """Draw a square-shaped share of the image around a random centre, clipped at the borders."""
    half = math.sqrt(area) / 2
    y, x = random.random(), random.random()
    return np.clip([y - half, x - half, y + half, x + half], 0, 1)
