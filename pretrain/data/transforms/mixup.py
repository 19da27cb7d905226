"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of neighboring samples, and the loss of mixed labels."""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import AugmentConfig
from pretrain.data.transforms.batch import Batch
from pretrain.data.transforms.geometry import Array, box_mask


def sample_mix(config: AugmentConfig, random: np.random.Generator) -> dict[str, Any]:
    """Sample the parameters of mixup or CutMix for one sample; if both are on, each has probability 0.5.

    Args:
        config: Augmentation settings, with at least one of `mixup` and `cutmix` above 0.
        random: Random generator of the sample.

    Returns:
        "mix_share", the neighbor's share of a mixup, and "cut_box" [4], the box that CutMix takes from the neighbor.
        One of them has no effect.
    """
    mixup, cutmix = config.mixup, config.cutmix
    is_cutmix = cutmix > 0 and (mixup == 0 or random.random() < 0.5)
    alpha = cutmix if is_cutmix else mixup
    share = random.beta(alpha, alpha)
    if is_cutmix:
        return {"mix_share": 0.0, "cut_box": _cut_box(share, random)}
    return {"mix_share": share, "cut_box": np.zeros(4)}


def mix_neighbors(images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Apply mixup and CutMix to each pair of neighbors in the order of the samples (0 and 1, 2 and 3, ...).

    Neighbors are in the same micro-batch on any number of ranks, so the result does not depend on that number.

    Args:
        images: Images [B, C, H, W], B even.
        batch: Batch with "mix_share" [B] and "cut_box" [B, 4].

    Returns:
        The mixed images, and the share [B] of each one's pixels that come from the image itself.
    """
    partners = neighbors(images)
    mask = box_mask(batch["cut_box"], images)
    share = batch["mix_share"][:, None, None, None]
    mixed = torch.where(mask, partners, images.lerp(partners, share.to(images.dtype)))
    own_share = (1 - batch["mix_share"]) * (1 - mask.float().mean(dim=(1, 2, 3)))
    return mixed, own_share


def mixed_loss(loss: Callable[[Tensor], Tensor], labels: Tensor, own_share: Tensor) -> Tensor:
    """Return the mean of s * loss(y) + (1 - s) * loss(y of the neighbor) over the batch.

    This equals the loss of the mixed label if the loss is linear in the label, as both cross-entropies are.

    Args:
        loss: Function from labels [B] to the loss of each sample, [B].
        labels: Label of each sample, [B].
        own_share: The share s of an image's pixels that come from the image itself, [B].
    """
    own, other = (loss(target) for target in (labels, neighbors(labels)))
    return torch.lerp(other, own, own_share).mean()


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Return the cross-entropy of each sample, [B], for logits [B, classes] and labels [B]."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Return the binary cross-entropy of each sample, [B], averaged or summed over the classes."""
    targets = torch.full_like(logits, label_smoothing / logits.shape[1])
    targets.scatter_(1, labels[:, None], 1 - label_smoothing + label_smoothing / logits.shape[1])
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.sum(dim=1) if reduction == "sum" else losses.mean(dim=1)


def neighbors(values: Tensor) -> Tensor:
    """Swap the entries 0 and 1, 2 and 3, ... of the first dimension, whose size is even."""
    return values.reshape(-1, 2, *values.shape[1:]).flip(1).reshape(values.shape)


def _cut_box(area: float, random: np.random.Generator) -> Array:
    """Sample a box that covers `area` of the image around a random center, clipped at the borders."""
    half = math.sqrt(area) / 2
    y, x = random.random(), random.random()
    return np.clip([y - half, x - half, y + half, x + half], 0, 1)
