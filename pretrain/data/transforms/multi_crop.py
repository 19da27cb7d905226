"""Several crops of one image, and blocks of patches to hide from the student. Runs in the loader's workers."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.transforms.decode import Pixels
from pretrain.data.transforms.views import TrainView

LEAST_BLOCK = 4  # patches
BLOCK_ASPECT = (0.3, 1 / 0.3)
BLOCKS_TRIED = 10
NUM_LARGE = 2


@dataclass(frozen=True)
class CropsView:
    """Two large crops and some small ones, each augmented by draws of its own (arXiv 2006.09882).

    The fields of a large crop stand together as "large.image" [2, C, H, W], "large.flip" [2] and so on, those of the
    small ones as "small.image"; "hidden" [2, N] says which patches of the large ones the student is not shown.

    Attributes:
        large: the view of a large crop.
        small: of a small one.
        num_small: how many of these.
        patches_a_side: of a large crop.
        mask_probability: that any patch of a large crop is hidden.
        mask_ratio: the smallest and the largest share that is hidden then.
    """

    large: TrainView
    small: TrainView
    num_small: int
    patches_a_side: int
    mask_probability: float
    mask_ratio: tuple[float, float]

    def __call__(self, image: Pixels, random: np.random.Generator) -> dict[str, Any]:
        hidden = [self._hide(random) for _ in range(NUM_LARGE)]
        fields: dict[str, Any] = {"hidden": np.stack(hidden)}
        for size, view, count in (("large", self.large, NUM_LARGE), ("small", self.small, self.num_small)):
            crops = [view(image, random) for _ in range(count)]
            fields |= {f"{size}.{name}": np.stack([np.asarray(crop[name]) for crop in crops]) for name in crops[0]}
        return fields

    def _hide(self, random: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Draw which patches of one crop are hidden, [N]."""
        share = random.uniform(*self.mask_ratio) if random.random() < self.mask_probability else 0.0
        return draw_hidden(self.patches_a_side, round(share * self.patches_a_side**2), random).reshape(-1)


def draw_hidden(side: int, count: int, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Hide exactly `count` patches of a square of `side`, most of them in rectangles (arXiv 2106.08254).

    Returns:
        [side, side], true where a patch is hidden.
    """
    hidden = np.zeros((side, side), dtype=np.bool_)
    for _ in range(BLOCKS_TRIED):
        missing = count - int(hidden.sum())
        if missing < LEAST_BLOCK:
            break
        area, aspect = random.uniform(LEAST_BLOCK, missing), math.exp(random.uniform(*np.log(BLOCK_ASPECT)))
        height, width = min(round(math.sqrt(area * aspect)), side), min(round(math.sqrt(area / aspect)), side)
        top, left = random.integers(side - height + 1), random.integers(side - width + 1)
        block = hidden.copy()
        block[top : top + height, left : left + width] = True
        if block.sum() <= count:
            hidden = block
    shown = np.flatnonzero(~hidden)
    hidden.flat[random.choice(shown, count - int(hidden.sum()), replace=False)] = True
    return hidden
