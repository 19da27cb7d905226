"""Mixup and CutMix, checked by counting pixels."""

import numpy as np
import torch

from pretrain.config import AugmentConfig
from pretrain.data.transforms.mixup import mix_neighbors, neighbors, sample_mix


def test_own_share_equals_the_share_of_pixels() -> None:
    """After an image of ones is mixed with one of zeros, its mean is its own share."""
    random, config = np.random.default_rng(0), AugmentConfig(mixup=0.8, cutmix=1.0)
    draws = [sample_mix(config, random) for _ in range(64)]
    batch = {
        name: torch.tensor(np.array([draw[name] for draw in draws]), dtype=torch.float32)
        for name in ("mix_share", "cut_box")
    }
    images = torch.zeros(64, 3, 16, 16)
    images[::2] = 1.0
    mixed, own_share = mix_neighbors(images, batch)
    assert torch.allclose(mixed[::2].mean(dim=(1, 2, 3)), own_share[::2], atol=1e-5)
    assert torch.allclose(mixed[1::2].mean(dim=(1, 2, 3)), 1 - own_share[1::2], atol=1e-5)
    is_cut = batch["cut_box"].abs().sum(1) > 0
    assert 16 < is_cut.sum() < 48  # mixup and cutmix take turns


def test_neighbors_are_swapped_in_pairs() -> None:
    assert neighbors(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]
