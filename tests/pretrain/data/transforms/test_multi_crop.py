"""Masks of self-distillation: their indices select what the boolean masks select, on any number of ranks."""

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import AugmentConfig
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.loader import NO_POSITION, BatchPlan, training_batches
from pretrain.data.transforms.batch import Batch
from pretrain.data.transforms.multi_crop import MultiCropView, index_masked_patches
from pretrain.data.transforms.views import TrainView

VIEW = MultiCropView(
    TrainView(AugmentConfig(), 16),
    TrainView(AugmentConfig(), 8),
    num_local_crops=2,
    patches_per_side=4,
    mask_probability=0.5,
    mask_ratio=(0.1, 0.5),
)


@given(st.integers(1, 5), st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**32))
def test_indices_select_the_masked_patches_of_all_tokens(batch: int, patches: int, share: float, seed: int) -> None:
    mask = torch.from_numpy(np.random.default_rng(seed).random((batch, 2, patches)) < share)
    tokens = torch.arange(batch * 2 * (1 + patches)).reshape(batch, 2, 1 + patches)
    found = index_masked_patches(mask)
    assert torch.equal(tokens.flatten()[found["masked_tokens"]], tokens[:, :, 1:][mask])
    num_masked = mask.sum(2, keepdim=True).expand_as(mask)[mask]
    assert torch.equal(found["masked_shares"], 1 / num_masked)


def masks_by_position(batch: Batch) -> dict[int, bytes]:
    return {
        int(position): mask.numpy().tobytes() for position, mask in zip(batch["position"], batch["mask"], strict=True)
    }


def test_masks_are_the_same_on_any_number_of_ranks_which_know_the_positions_of_all(digits: Path) -> None:
    samples = open_dataset(digits / "train")
    runs = {
        world_size: [
            list(
                training_batches(
                    samples,
                    VIEW,
                    BatchPlan(0, 3, global_batch_size=7, accumulation_steps=2, rank=rank, world_size=world_size),
                    start=0,
                    stop=21,
                )
            )
            for rank in range(world_size)
        ]
        for world_size in (1, 2, 5)
    }
    masks = [
        {place: mask for rank in ranks for loaded in rank for place, mask in masks_by_position(loaded.tensors).items()}
        for ranks in runs.values()
    ]
    assert masks[0] == masks[1] == masks[2]
    assert sorted(masks[0]) == list(range(21))
    for ranks in runs.values():
        for together in zip(*ranks, strict=True):
            [all_positions, *others] = [loaded.tensors["all_positions"] for loaded in together]
            assert all(torch.equal(all_positions, other) for other in others)
            for row, loaded in zip(all_positions, together, strict=True):
                assert row[row != NO_POSITION].tolist() == loaded.tensors["position"].tolist()
                expected = index_masked_patches(loaded.tensors["mask"])
                assert all(torch.equal(loaded.tensors[name], expected[name]) for name in expected)
