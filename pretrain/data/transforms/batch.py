"""A batch of samples, and its augmentation on the device that trains.

The letters: B samples of a batch, C channels, H height, W width, N patches of an image, K entries as described.
"""

from typing import TypedDict, cast

import torch
from torch import Tensor

from pretrain.data.transforms.color import Channels, grayscale, jitter, normalize, shift_hue, solarize
from pretrain.data.transforms.geometry import blur, box_mask, warp
from pretrain.data.transforms.rand_augment import recolor


class Batch(TypedDict, total=False):
    """A batch of B samples: tensors by name.

    The view decides which keys a batch has, and an operation that is switched off has no key. Parameters of the
    augmentation are sampled for each image by the data workers (`TrainView`) and are float32.
    """

    image: Tensor  # uint8 [B, C, H, W]; float32 if the view normalizes the pixels itself
    label: Tensor  # int64 [B]: class of each sample
    position: Tensor  # int64 [B]: position in the run; during an evaluation, row of the dataset
    weight: Tensor  # float32 [B]: 1, or 0 for an unusable or repeated sample; only during an evaluation

    flip: Tensor  # [B]: 1 if the image is mirrored
    affine: Tensor  # [B, 2, 3]: map of RandAugment's geometric operations, see `geometry.warp`
    colors: Tensor  # [B, K]: indices of RandAugment's color operations, see `rand_augment.COLORS`
    strengths: Tensor  # [B, K]: strength of each of them, from -1 to 1
    brightness: Tensor  # [B]: factor
    contrast: Tensor  # [B]: factor
    saturation: Tensor  # [B]: factor
    hue: Tensor  # [B]: rotation in turns of the color circle
    grayscale: Tensor  # [B]: 1 if the image becomes gray
    solarize: Tensor  # [B]: 1 if bright values are inverted
    blur_kernel: Tensor  # [B, K]: one-dimensional Gaussian kernel
    erase_box: Tensor  # [B, 4]: top, left, bottom, right as fractions of the image
    mix_share: Tensor  # [B]: the neighbor's share of a mixup
    cut_box: Tensor  # [B, 4]: box that cutmix takes from the neighbor, as fractions of the image

    patch_order: Tensor  # int64 [B, N]: random order of the patches, visible ones first
    mask: Tensor  # bool [B, 2, N]: patches of each global crop that are hidden from the student
    masked_tokens: Tensor  # int64 [M]: indices of the masked patches, see `multi_crop.index_masked_patches`
    masked_shares: Tensor  # float32 [M]: 1 / (number of masked patches of the same crop)
    all_positions: Tensor  # int64 [ranks, largest B]: positions of all ranks in this micro-batch, filled up with -1
    global_crops: "Batch"  # "image" and augmentation parameters, all [B, 2, ...]
    local_crops: "Batch"  # the same for the local crops, all [B, crops, ...]

    jpegs: Tensor  # uint8 [bytes of all JPEGs]; only with data.decode=gpu, before `decode_on_device`
    jpeg_sizes: Tensor  # int64 [B]: bytes of each JPEG, 0 if the image is already decoded
    crop_box: Tensor  # int64 [B, 4]: top, left, bottom, right of the crop in pixels


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Start copying a batch to the device, without waiting for the copy."""
    moved = {
        name: to_device(cast(Batch, value), device)
        if isinstance(value, dict)
        else cast(Tensor, value).to(device, non_blocking=True)
        for name, value in batch.items()
    }
    return cast(Batch, moved)


def merge_crops(crops: Batch) -> Batch:
    """Merge the first two dimensions of every tensor: [B, crops, ...] -> [B crops, ...]."""
    return cast(Batch, {name: cast(Tensor, value).flatten(0, 1) for name, value in crops.items()})


def augment(batch: Batch, mean: Channels, std: Channels) -> Tensor:
    """Augment and normalize the images of a batch with their sampled parameters.

    The order: flip, RandAugment, brightness, contrast, saturation, hue, grayscale, solarize, blur, normalize, erase. An
    operation without parameters is left out. Mixup and cutmix come last and belong to the objective, because they also
    mix the labels.

    Args:
        batch: "image" uint8 [B, C, H, W] and the parameters of the operations that are switched on.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel.

    Returns:
        float32 [B, C, H, W].
    """
    images = batch["image"].float() / 255
    if "flip" in batch:
        images = torch.where(_as_mask(batch["flip"]), images.flip(-1), images)
    if "affine" in batch:
        images = recolor(warp(images, batch["affine"]), batch["colors"], batch["strengths"])
    images = jitter(images, batch.get("brightness"), batch.get("contrast"), batch.get("saturation"))
    if "hue" in batch:
        images = shift_hue(images, batch["hue"])
    if "grayscale" in batch:
        images = torch.where(_as_mask(batch["grayscale"]), grayscale(images), images)
    if "solarize" in batch:
        images = torch.where(_as_mask(batch["solarize"]), solarize(images), images)
    if "blur_kernel" in batch:
        images = blur(images, batch["blur_kernel"])
    images = normalize(images, mean, std)
    if "erase_box" in batch:
        images = images.masked_fill(box_mask(batch["erase_box"], images), 0.0)
    return images


def _as_mask(flags: Tensor) -> Tensor:
    """Return flags [B] as booleans that broadcast over images: [B, 1, 1, 1]."""
    return flags.bool()[:, None, None, None]
