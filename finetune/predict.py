"""Classify images with a Hugging Face folder."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.backbone import load_classifier, load_preprocessor
from pretrain.data.sources.folder import is_hidden, list_folder
from pretrain.data.transforms.decode import DecodeError, decode
from pretrain.distributed import device
from pretrain.errors import DataError

BATCH_SIZE = 32


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image.

    Attributes:
        path: Image file.
        classes: Class names with their probabilities, the most probable first; empty if the file cannot be used.
        error: Reason why the file cannot be used; empty if it can be.
    """

    path: Path
    classes: list[tuple[str, float]]
    error: str = ""


@torch.no_grad()
def predict(folder: Path, images: Sequence[Path], top_k: int = 3) -> Iterator[Prediction]:
    """Yield a prediction for each image, in the given order; a file that cannot be used has one that says why.

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
        predictions: dict[Path, Prediction] = {}
        readable: dict[Path, torch.Tensor] = {}
        for path in images[start : start + BATCH_SIZE]:
            try:
                readable[path] = preprocessor(decode(path.read_bytes(), scales=True), unused)["image"]
            except OSError as error:
                predictions[path] = Prediction(path, [], f"{path}: cannot be read: {error.strerror}")
            except DecodeError as error:
                predictions[path] = Prediction(path, [], f"{path}: cannot be used as an image: {error}")
        if readable:
            pixels = torch.stack([*readable.values()])  # [B, 3, H, W]
            probabilities = model(pixel_values=pixels.to(device())).logits.float().softmax(dim=1)  # [B, classes]
            best = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
            for path, values, labels in zip(readable, best.values.tolist(), best.indices.tolist(), strict=True):
                classes = [(names[label], value) for label, value in zip(labels, values, strict=True)]
                predictions[path] = Prediction(path, classes)
        yield from (predictions[path] for path in images[start : start + BATCH_SIZE])


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the files that paths name: files, the images of folders at any depth, and the matches of patterns.

    Raises:
        DataError: If a folder has no images or would lose some, or nothing matches a pattern.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            source = list_folder(path, labeled=False, may_have_splits=False)
            if source.problems:
                raise DataError("\n".join(f"{path}: {problem}" for problem in source.problems))
            for note in source.notes:
                print(f"{path}: {note}", file=sys.stderr)
            matches = [path / name for name in source.names]
        elif any(character in str(path) for character in "*?[") and not path.exists():
            found_files = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
            matches = sorted(file for file in found_files if not is_hidden(file.name))
        else:
            matches = [path]
        if not matches:
            raise DataError(f"{path}: no images here; name image files, folders of images or patterns such as *.jpg")
        found += matches
    return found
