"""Grids of pictures, and the files that they are saved to."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.tracking.pictures import GAP, MIN_HEIGHT, make_grid, save_picture


@pytest.mark.parametrize(("size", "scale"), [(8, 12), (MIN_HEIGHT, 1), (2 * MIN_HEIGHT, 1)])
def test_a_grid_has_white_gaps_and_enlarges_small_pictures(size: int, scale: int) -> None:
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, 3, size, size)
    grid = np.asarray(make_grid(pictures))
    side = size * scale
    assert grid.shape == (2 * side + GAP, 3 * side + 2 * GAP, 3)
    assert (grid[side : side + GAP] == 255).all()
    for row in range(2):
        for column in range(3):
            top, left = row * (side + GAP), column * (side + GAP)
            tile = grid[top : top + side, left : left + side].reshape(size, scale, size, scale, 3)
            expected = (pictures[row, column].permute(1, 2, 0) * 255).round().numpy()
            assert (tile == expected[:, None, :, None]).all()
    assert (grid[:, side : side + GAP] == 255).all()


def test_a_saved_picture_replaces_the_one_of_the_same_step(tmp_path: Path) -> None:
    for color in ("red", "blue"):
        save_picture(Image.new("RGB", (4, 4), color), tmp_path, 12)
    [path] = (tmp_path / "pictures").iterdir()
    assert path.name == "step-00000012.png"
    assert Image.open(path).getpixel((0, 0)) == (0, 0, 255)
