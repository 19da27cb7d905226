"""Mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899) of neighbors in the order, and the loss of mixed labels."""

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
    """Draw how much of the neighbor comes in, by mixup or by cutmix; both take turns where both are on."""
    mixup, cutmix = config.mixup, config.cutmix
    is_cutmix = cutmix > 0 and (mixup == 0 or random.random() < 0.5)
    alpha = cutmix if is_cutmix else mixup
    share = random.beta(alpha, alpha)
    if is_cutmix:
        return {"mix_share": 0.0, "cut_box": _cut_box(share, random)}
    return {"mix_share": share, "cut_box": np.zeros(4)}


def mix_neighbors(images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbor in the order (0 with 1, 2 with 3 ...): mixup and cutmix.

    Neighbors stay together on any number of ranks, so the pixels do too.

    Args:
        images: [B, C, H, W], B even.
        batch: the draws "mix_share" [B] and "cut_box" [B, 4].

    Returns:
        The mixed images, and each image's own share [B] of its pixels.
    """
    partners = neighbors(images)
    mask = box_mask(batch["cut_box"], images)
    share = batch["mix_share"][:, None, None, None]
    mixed = torch.where(mask, partners, images.lerp(partners, share.to(images.dtype)))
    own_share = (1 - batch["mix_share"]) * (1 - mask.float().mean(dim=(1, 2, 3)))
    return mixed, own_share


def mixed_loss(loss: Callable[[Tensor], Tensor], labels: Tensor, own_share: Tensor) -> Tensor:
    """Return the mean of s loss(y) + (1 - s) loss(neighbor's y), s an image's own share [B] of its pixels.

    That is the loss of the mixed label wherever a loss is linear in it, as both cross-entropies are.
    """
    own, other = (loss(target) for target in (labels, neighbors(labels)))
    return torch.lerp(other, own, own_share).mean()


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Return each sample's cross-entropy [B]."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Return each sample's binary cross-entropy [B], the mean over its classes or their sum."""
    targets = torch.full_like(logits, label_smoothing / logits.shape[1])
    targets.scatter_(1, labels[:, None], 1 - label_smoothing + label_smoothing / logits.shape[1])
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.sum(dim=1) if reduction == "sum" else losses.mean(dim=1)


def neighbors(values: Tensor) -> Tensor:
    """Swap 0 with 1, 2 with 3, ... along the first dimension."""
    return values.reshape(-1, 2, *values.shape[1:]).flip(1).reshape(values.shape)


def _cut_box(area: float, random: np.random.Generator) -> Array:
    """Draw a square-shaped share of the image around a random center, clipped at the borders."""
    half = math.sqrt(area) / 2
    y, x = random.random(), random.random()
    return np.clip([y - half, x - half, y + half, x + half], 0, 1)
