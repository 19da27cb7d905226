"""Arrange pictures in a grid with captions and save it as a PNG file in the run folder."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pretrain.captions import fit
from pretrain.files import atomic_write
from pretrain.tracking.tracker import PICTURES_FOLDER, picture_name

MIN_HEIGHT = 96  # pixels; smaller pictures are enlarged by a whole factor
GAP = 4  # pixels between pictures
GAP_VALUE = 1.0  # white
TITLE_SIZE = 16  # pixels
MARGIN = 8  # pixels between captions and pictures, and around everything


def make_grid(pictures: Tensor) -> Image.Image:
    """Arrange pictures in rows and columns with gaps between them; small pictures are enlarged.

    Args:
        pictures: Pictures, float [rows, columns, C, H, W] between 0 and 1.
    """
    scale = max(1, -(-MIN_HEIGHT // pictures.shape[-2]))
    enlarged = pictures.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    padded = F.pad(enlarged, (0, GAP, 0, GAP), value=GAP_VALUE)  # [rows, columns, C, H, W]
    grid = padded.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [rows * H, columns * W, C]
    return Image.fromarray(np.asarray(grid[:-GAP, :-GAP].mul(255).round().to(torch.uint8)))


def add_captions(
    grid: Image.Image, title: str, headings: Sequence[str], row_names: Sequence[str] | None = None
) -> Image.Image:
    """Add a title, a heading over each column and, to its left, the name of each row; the grid stays as it is.

    Args:
        grid: Result of `make_grid`.
        title: Title of the whole.
        headings: Heading of each column.
        row_names: Name of each row, such as the class of its image; None for rows without names.
    """
    names = row_names or []
    width, height = (grid.width + GAP) // len(headings), (grid.height + GAP) // max(1, len(names))
    size = min(22, max(12, width // 10))
    heads = [fit(heading, width - 4 * GAP, size) for heading in headings]
    labels = [fit(name, width, size, height - GAP) for name in names]
    label_width = max((label.width for label in labels), default=0)
    left = MARGIN + label_width + (MARGIN if label_width else 0)
    caption = fit(title, left + grid.width - MARGIN, max(TITLE_SIZE, size))
    head_height = max(head.height for head in heads)
    top = MARGIN + caption.height + MARGIN + head_height + GAP
    page = Image.new("RGB", (left + grid.width + MARGIN, top + grid.height + MARGIN), "white")
    caption.draw(page, MARGIN, MARGIN, page.width - 2 * MARGIN, caption.height)
    for column, head in enumerate(heads):
        head.draw(page, left + column * width, top - GAP - head.height, width - GAP, head.height)
    for row, label in enumerate(labels):
        label.draw(page, MARGIN, top + row * height, label_width, height - GAP)
    page.paste(grid, (left, top))
    return page


def save_picture(picture: Image.Image, run_dir: Path, step: int) -> None:
    """Save a picture of a step into the run folder, where the tracker finds it."""
    path = run_dir / PICTURES_FOLDER / picture_name(step)
    path.parent.mkdir(exist_ok=True)
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic_write(path, content.getvalue(), durable=False)
