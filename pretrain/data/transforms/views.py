"""Views of an image. The worker crops, resizes and draws; what costs FLOPs runs batched where the model is.

The letters: B images of a batch, C channels, H height, W width. A draw is one sample's parameter of one operation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pretrain.config import AugmentConfig
from pretrain.data.transforms.decode import EncodedJpeg, ImageArray
from pretrain.data.transforms.geometry import sample_blur_kernel, sample_erase_box
from pretrain.data.transforms.mixup import sample_mix
from pretrain.data.transforms.rand_augment import sample_rand_augment

View = Callable[[Any, np.random.Generator], dict[str, Any]]  # of ImageArray, and training's of a EncodedJpeg too

CROP_TRIES = 10


@dataclass(frozen=True)
class TrainView:
    """A random crop of an image with the draws for the rest of its augmentation. Runs in the loader's workers."""

    config: AugmentConfig
    image_size: int

    def __call__(self, image: ImageArray | EncodedJpeg, random: np.random.Generator) -> dict[str, Any]:
        height, width = (image.height, image.width) if isinstance(image, EncodedJpeg) else image.shape[:2]
        box = crop_box(height, width, self.config.crop_scale, self.config.crop_aspect, random)
        if isinstance(image, EncodedJpeg):
            return {"jpeg": image.data, "crop_box": np.asarray(box), **self.draw(random)}
        top, left, bottom, right = box
        return {"image": resize(image[top:bottom, left:right], self.image_size), **self.draw(random)}

    def draw(self, random: np.random.Generator) -> dict[str, Any]:
        """Draw one sample's share of a batch's augmentation; what is switched off has no draw and costs nothing."""
        config = self.config
        draws: dict[str, Any] = {}
        if config.flip:
            draws["flip"] = random.random() < config.flip
        if config.rand_augment_ops:
            draws |= sample_rand_augment(config.rand_augment_ops, config.rand_augment_magnitude, random)
        for name in ("brightness", "contrast", "saturation"):
            if strength := getattr(config, name):
                draws[name] = random.uniform(max(0.0, 1 - strength), 1 + strength)
        if config.hue:
            draws["hue"] = random.uniform(-config.hue, config.hue)
        for name in ("grayscale", "solarize"):
            if probability := getattr(config, name):
                draws[name] = random.random() < probability
        if config.blur:
            draws["blur_kernel"] = sample_blur_kernel(config.blur, config.blur_sigma, self.image_size, random)
        if config.three_augment:
            draws["grayscale"], draws["solarize"], is_blurred = np.eye(3)[random.integers(3)]
            draws["blur_kernel"] = sample_blur_kernel(is_blurred, config.blur_sigma, self.image_size, random)
        if config.erasing:
            draws["erase_box"] = sample_erase_box(config.erasing, random)
        if config.mixes:
            draws |= sample_mix(config, random)
        return {name: np.asarray(value, dtype=np.float32) for name, value in draws.items()}


@dataclass(frozen=True)
class PatchOrderView:
    """Another view, and an order of the patches in which the visible ones come first."""

    view: View
    num_patches: int

    def __call__(self, image: ImageArray | EncodedJpeg, random: np.random.Generator) -> dict[str, Any]:
        return {**self.view(image, random), "patch_order": random.permutation(self.num_patches)}


@dataclass(frozen=True)
class EvalView:
    """The shorter edge resized, the center cropped: what the exported image processor does, pixel for pixel."""

    image_size: int
    resize_ratio: float = 1.0

    @property
    def shortest_edge(self) -> int:
        """ImageArray of the shorter edge before the crop."""
        return round(self.image_size * self.resize_ratio)

    def __call__(self, image: ImageArray, random: np.random.Generator) -> dict[str, Any]:
        # Hugging Face truncates the longer edge and floors the center; torchvision rounds both.
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
    """Draw a random resized crop (arXiv 1409.4842): top, left, bottom, right in pixels.

    Where none fits, it is the middle of the image, of the nearest aspect that is allowed: as torchvision has it.
    """
    for _ in range(CROP_TRIES):
        area = height * width * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
            return top, left, top + h, left + w
    w, h = min(width, max(1, round(height * aspect[1]))), min(height, max(1, round(width / aspect[0])))
    top, left = (height - h) // 2, (width - w) // 2
    return top, left, top + h, left + w


def resize(image: ImageArray, size: int) -> Tensor:
    """Resize [H, W, C] to a square, antialiased bicubic in uint8; about twice Pillow's speed.

    Returns:
        uint8 [C, size, size].
    """
    channels_last = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    return F.interpolate(channels_last, (size, size), mode="bicubic", antialias=True)[0].contiguous()
