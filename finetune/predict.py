"""Classify images with a Hugging Face folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.backbone import load_classifier, load_preprocessor
from pretrain.data.transforms.decode import DecodeError, ImageArray, decode
from pretrain.distributed import device
from pretrain.errors import DataError

BATCH_SIZE = 32


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image.

    Attributes:
        path: Image file.
        classes: Class names with their probabilities, the most probable first.
    """

    path: Path
    classes: list[tuple[str, float]]


@torch.no_grad()
def predict(folder: Path, images: Sequence[Path], top_k: int = 3) -> Iterator[Prediction]:
    """Yield a prediction for each image, in the given order.

    Args:
        folder: Hugging Face folder with a trained classification head.
        images: Image files in any format that training reads.
        top_k: Number of classes per image.
    """
    model: Any = load_classifier(folder).to(device()).eval()
    preprocessor = load_preprocessor(folder)
    names: dict[int, str] = model.config.id2label
    unused = np.random.default_rng(0)
    for start in range(0, len(images), BATCH_SIZE):
        paths = images[start : start + BATCH_SIZE]
        pixels = torch.stack([preprocessor(_read(path), unused)["image"] for path in paths])  # [B, 3, H, W]
        probabilities = model(pixel_values=pixels.to(device())).logits.float().softmax(dim=1)  # [B, classes]
        best = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
        for path, values, labels in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
            yield Prediction(path, [(names[label], value) for label, value in zip(labels, values, strict=True)])


def _read(path: Path) -> ImageArray:
    """Read and decode an image file.

    Raises:
        DataError: If the file cannot be read or is not an image.
    """
    try:
        return decode(path.read_bytes(), scales=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except DecodeError as error:
        raise DataError(f"{path}: cannot be used as an image: {error}") from None
