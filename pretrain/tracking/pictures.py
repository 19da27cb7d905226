"""Arrange pictures in a grid and save it as a PNG file in the run folder."""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pretrain.files import atomic_write
from pretrain.tracking.tracker import PICTURES_FOLDER, picture_name

MIN_HEIGHT = 96  # pixels; smaller pictures are enlarged by a whole factor
GAP = 4  # pixels between pictures
GAP_VALUE = 1.0  # white


def make_grid(pictures: Tensor) -> Image.Image:
    """Arrange pictures in rows and columns with gaps between them; small pictures are enlarged.

    Args:
        pictures: Pictures, float [rows, columns, C, H, W] between 0 and 1.
    """
    scale = max(1, MIN_HEIGHT // pictures.shape[-2])
    enlarged = pictures.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    padded = F.pad(enlarged, (0, GAP, 0, GAP), value=GAP_VALUE)  # [rows, columns, C, H, W]
    grid = padded.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [rows * H, columns * W, C]
    return Image.fromarray(np.asarray(grid[:-GAP, :-GAP].mul(255).round().to(torch.uint8)))


def save_picture(picture: Image.Image, run_dir: Path, step: int) -> None:
    """Save a picture of a step into the run folder, where the tracker finds it."""
    path = run_dir / PICTURES_FOLDER / picture_name(step)
    path.parent.mkdir(exist_ok=True)
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic_write(path, content.getvalue(), durable=False)
