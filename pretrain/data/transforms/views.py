"""Views turn a decoded image into the fields of a sample: they crop, resize and sample the augmentation's parameters.

Views run in the data workers. `batch.augment` applies the parameters to a whole batch on the device, which is faster.
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

# Takes an ImageArray and a random generator. Views for training also accept an EncodedJpeg.
View = Callable[[Any, np.random.Generator], dict[str, Any]]

MAX_CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class TrainView:
    """A random resized crop of an image, and parameters for the rest of its augmentation.

    Attributes:
        config: Augmentation settings.
        image_size: Side of the crop in pixels.
    """

    config: AugmentConfig
    image_size: int

    def __call__(self, image: ImageArray | EncodedJpeg, random: np.random.Generator) -> dict[str, Any]:
        height, width = (image.height, image.width) if isinstance(image, EncodedJpeg) else image.shape[:2]
        box = crop_box(height, width, self.config.crop_scale, self.config.crop_aspect, random)
        if isinstance(image, EncodedJpeg):
            return {"jpeg": image.data, "crop_box": np.asarray(box), **self.sample_augmentation(random)}
        top, left, bottom, right = box
        return {"image": resize(image[top:bottom, left:right], self.image_size), **self.sample_augmentation(random)}

    def sample_augmentation(self, random: np.random.Generator) -> dict[str, Any]:
        """Sample the parameters of one sample's augmentation; operations that are switched off have none."""
        config = self.config
        parameters: dict[str, Any] = {}
        if config.flip:
            parameters["flip"] = random.random() < config.flip
        if config.rand_augment_ops:
            parameters |= sample_rand_augment(config.rand_augment_ops, config.rand_augment_magnitude, random)
        for name in ("brightness", "contrast", "saturation"):
            if strength := getattr(config, name):
                parameters[name] = random.uniform(max(0.0, 1 - strength), 1 + strength)
        if config.hue:
            parameters["hue"] = random.uniform(-config.hue, config.hue)
        for name in ("grayscale", "solarize"):
            if probability := getattr(config, name):
                parameters[name] = random.random() < probability
        if config.blur:
            parameters["blur_kernel"] = sample_blur_kernel(config.blur, config.blur_sigma, self.image_size, random)
        if config.three_augment:
            parameters["grayscale"], parameters["solarize"], is_blurred = np.eye(3)[random.integers(3)]
            parameters["blur_kernel"] = sample_blur_kernel(is_blurred, config.blur_sigma, self.image_size, random)
        if config.erasing:
            parameters["erase_box"] = sample_erase_box(config.erasing, random)
        if config.mixes:
            parameters |= sample_mix(config, random)
        return {name: np.asarray(value, dtype=np.float32) for name, value in parameters.items()}


@dataclass(frozen=True)
class PatchOrderView:
    """Another view, with a random order of the patches in which the visible ones come first.

    Attributes:
        view: View of the image.
        num_patches: Number of patches of the image.
    """

    view: View
    num_patches: int

    def __call__(self, image: ImageArray | EncodedJpeg, random: np.random.Generator) -> dict[str, Any]:
        return {**self.view(image, random), "patch_order": random.permutation(self.num_patches)}


@dataclass(frozen=True)
class EvalView:
    """A resized image's center crop, identical to that of the exported image processor.

    Attributes:
        image_size: Side of the crop in pixels.
        resize_ratio: Shorter edge of the resized image, as a multiple of `image_size`.
    """

    image_size: int
    resize_ratio: float = 1.0

    @property
    def shortest_edge(self) -> int:
        """Shorter edge of the resized image in pixels."""
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
    """Sample the box of a random resized crop (arXiv 1409.4842).

    If no box fits after several attempts, the box is centered and has the nearest allowed aspect, as in torchvision.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        scale: Smallest and largest share of the image's area.
        aspect: Smallest and largest ratio of width to height.
        random: Random generator of the sample.

    Returns:
        Top, left, bottom and right in pixels.
    """
    for _ in range(MAX_CROP_ATTEMPTS):
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
    """Resize an image to a square with antialiased bicubic interpolation in uint8, about twice as fast as Pillow.

    Args:
        image: Pixels [H, W, C].
        size: Side of the square in pixels.

    Returns:
        uint8 [C, size, size].
    """
    channels_last = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    return F.interpolate(channels_last, (size, size), mode="bicubic", antialias=True)[0].contiguous()
