"""Grids of pictures, and the files that they are saved to."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.tracking.pictures import GAP, MARGIN, MIN_HEIGHT, add_captions, make_grid, save_picture


@pytest.mark.parametrize(("size", "scale"), [(8, 12), (64, 2), (MIN_HEIGHT, 1), (2 * MIN_HEIGHT, 1)])
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


@pytest.mark.parametrize(("size", "columns", "rows"), [(8, 7, 8), (64, 3, 2), (224, 2, 3), (96, 1, 1)])
def test_captions_surround_the_grid_and_leave_it_as_it_is(size: int, columns: int, rows: int) -> None:
    grid = make_grid(torch.rand(rows, columns, 3, size, size))
    headings, names = [f"heading {i}" for i in range(columns)], [f"name of row {i}" for i in range(rows)]
    page = np.asarray(add_captions(grid, "title", headings, names))
    height, width = page.shape[0] - grid.height - MARGIN, page.shape[1] - grid.width - MARGIN
    assert (page[height:-MARGIN, width:-MARGIN] == np.asarray(grid)).all()
    assert (page[:MARGIN] == 255).all()
    assert (page[-MARGIN:] == 255).all()
    assert (page[:, -MARGIN:] == 255).all()
    side = (grid.width + GAP) // columns
    is_dark = page.min(axis=2) < 128
    for column in range(columns):
        assert is_dark[height // 2 : height, width + column * side : width + (column + 1) * side].any()
    for row in range(rows):
        assert is_dark[height + row * side : height + (row + 1) * side - GAP, :width].any()
    assert is_dark[: height // 2].any()
    without_names = add_captions(grid, "title", headings)
    assert without_names.width == grid.width + 2 * MARGIN


def test_a_saved_picture_replaces_the_one_of_the_same_step(tmp_path: Path) -> None:
    for color in ("red", "blue"):
        save_picture(Image.new("RGB", (4, 4), color), tmp_path, 12)
    [path] = (tmp_path / "pictures").iterdir()
    assert path.name == "step-00000012.png"
    assert Image.open(path).getpixel((0, 0)) == (0, 0, 255)
