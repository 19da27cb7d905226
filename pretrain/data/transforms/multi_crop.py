"""Multi-crop views for self-distillation, and the patches that are masked for the student. Runs in the data workers.

The letters: B images of a batch, N patches of a global crop, M masked patches of all global crops of a batch.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pretrain.data.transforms.decode import ImageArray
from pretrain.data.transforms.views import TrainView

NUM_GLOBAL_CROPS = 2
MIN_BLOCK_PATCHES = 4
BLOCK_ASPECT = (0.3, 1 / 0.3)
MAX_BLOCKS = 10


@dataclass(frozen=True)
class MultiCropView:
    """Two global crops and several local crops of an image, each augmented independently (arXiv 2006.09882).

    The fields of a sample are "mask" [2, N], the patches of each global crop that are hidden from the student, and
    "global_crops" and "local_crops": a dictionary each, with "image" [crops, C, H, W] and the augmentation's parameters
    [crops, ...].

    Attributes:
        global_view: View of a global crop.
        local_view: View of a local crop.
        num_local_crops: Number of local crops per image.
        patches_per_side: Number of patches along a side of a global crop.
        mask_probability: Probability that any patch of a global crop is masked.
        mask_ratio: Smallest and largest share of the patches that is masked in a masked crop.
    """

    global_view: TrainView
    local_view: TrainView
    num_local_crops: int
    patches_per_side: int
    mask_probability: float
    mask_ratio: tuple[float, float]

    def __call__(self, image: ImageArray, random: np.random.Generator) -> dict[str, Any]:
        masks = [self._sample_mask(random) for _ in range(NUM_GLOBAL_CROPS)]
        return {
            "mask": np.stack(masks),
            "global_crops": _crops(self.global_view, NUM_GLOBAL_CROPS, image, random),
            "local_crops": _crops(self.local_view, self.num_local_crops, image, random),
        }

    def _sample_mask(self, random: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Return which patches of one crop are masked, [N]."""
        ratio = random.uniform(*self.mask_ratio) if random.random() < self.mask_probability else 0.0
        return sample_block_mask(self.patches_per_side, round(ratio * self.patches_per_side**2), random).reshape(-1)


def _crops(view: TrainView, count: int, image: ImageArray, random: np.random.Generator) -> dict[str, Any]:
    """Return `count` crops of an image, each field stacked: [count, ...]."""
    crops = [view(image, random) for _ in range(count)]
    return {name: np.stack([np.asarray(crop[name]) for crop in crops]) for name in crops[0]}


def index_masked_patches(mask: Tensor) -> dict[str, Tensor]:
    """Return the masked patches of a batch as indices, so that the device need not search for them.

    The number M of masked patches differs between batches, but the host knows it without waiting for the device.
    Padding to the largest possible number would make all shapes equal, but with the default mask settings 15 % of the
    patches are masked on average and 50 % at most, so the patch heads would process 3.3 times as many rows.

    Args:
        mask: Patches of each global crop that are masked, bool [B, 2, N], on the CPU.

    Returns:
        "masked_tokens" int64 [M], the indices of the masked patches among the 2 B (1 + N) tokens of the batch's global
        crops (the first token of each crop is CLS), and "masked_shares" float32 [M], 1 / (number of masked patches of
        the patch's crop).
    """
    crops, patches = mask.flatten(0, 1).nonzero(as_tuple=True)
    num_masked = mask.flatten(0, 1).sum(dim=1)
    return {"masked_tokens": crops * (1 + mask.shape[2]) + 1 + patches, "masked_shares": 1 / num_masked[crops]}


def sample_block_mask(patches_per_side: int, count: int, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Mask exactly `count` patches, most of them in rectangular blocks (BEiT, arXiv 2106.08254).

    Returns:
        bool [patches_per_side, patches_per_side], True where a patch is masked.
    """
    side = patches_per_side
    mask = np.zeros((side, side), dtype=np.bool_)
    for _ in range(MAX_BLOCKS):
        missing = count - int(mask.sum())
        if missing < MIN_BLOCK_PATCHES:
            break
        area, aspect = random.uniform(MIN_BLOCK_PATCHES, missing), math.exp(random.uniform(*np.log(BLOCK_ASPECT)))
        height, width = min(round(math.sqrt(area * aspect)), side), min(round(math.sqrt(area / aspect)), side)
        top, left = random.integers(side - height + 1), random.integers(side - width + 1)
        with_block = mask.copy()
        with_block[top : top + height, left : left + width] = True
        if with_block.sum() <= count:
            mask = with_block
    visible = np.flatnonzero(~mask)
    mask.flat[random.choice(visible, count - int(mask.sum()), replace=False)] = True
    return mask
