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
    """The likeliest classes of an image, the best first, with their probabilities."""

    path: Path
    classes: list[tuple[str, float]]


@torch.no_grad()
def predict(folder: Path, images: Sequence[Path], top_k: int = 3) -> Iterator[Prediction]:
    """Yield a prediction for each image, in their order.

    Args:
        folder: a fine-tuned or exported Hugging Face folder.
        images: files of any format that training reads.
        top_k: classes to name.

    Raises:
        ModelError: no such folder.
        DataError: a file is no image.
    """
    model: Any = load_classifier(folder).to(device()).eval()
    view = load_preprocessor(folder)
    names: dict[int, str] = model.config.id2label
    unused = np.random.default_rng(0)
    for start in range(0, len(images), BATCH_SIZE):
        some = images[start : start + BATCH_SIZE]
        pixels = torch.stack([view(_read(path), unused)["image"] for path in some])
        probabilities = model(pixel_values=pixels.to(device())).logits.float().softmax(dim=1)
        best = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
        for path, values, labels in zip(some, best.values.tolist(), best.indices.tolist(), strict=True):
            yield Prediction(path, [(names[label], value) for label, value in zip(labels, values, strict=True)])


def _read(path: Path) -> ImageArray:
    try:
        return decode(path.read_bytes(), scales=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except DecodeError as error:
        raise DataError(f"{path}: is no usable image: {error}") from None
