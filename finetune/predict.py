"""Classify images with a Hugging Face folder."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from finetune.backbone import check_input, load_classifier
from finetune.preprocessor import load_preprocessor
from pretrain.data.sources.folder import is_hidden, list_folder
from pretrain.data.transforms.decode import DecodeError, ImageArray, decode
from pretrain.distributed import device
from pretrain.errors import DataError
from pretrain.hub import find_model

BATCH_SIZE = 32

Classes: TypeAlias = list[tuple[str, float]]  # class names with their probabilities, the most probable first


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image file.

    Attributes:
        path: Image file.
        classes: Class names with their probabilities, the most probable first; empty if the file cannot be used.
        error: Reason why the file cannot be used; empty if it can be.
    """

    path: Path
    classes: Classes
    error: str = ""


class Classifier:
    """A fine-tuned model with its preprocessing.

    Args:
        folder: Hugging Face folder with a trained classification head, the folder of a fine-tuning run, or the id of a
            Hub model in the local cache.

    Attributes:
        model: Hugging Face model in evaluation mode, on the GPU if there is one.
        preprocessor: Preprocessing of the folder.
        class_names: Name of each class, in the order of the model's outputs.
    """

    def __init__(self, folder: Path) -> None:
        folder = find_model(folder)
        self.preprocessor = load_preprocessor(folder)
        model: Any = load_classifier(folder).eval()
        check_input(model, self.preprocessor)
        self.model = model.to(device())
        self.class_names = [self.model.config.id2label[label] for label in range(self.model.config.num_labels)]

    @torch.no_grad()
    def predict(self, images: Sequence[ImageArray], top_k: int) -> list[Classes]:
        """Return the most probable classes of each image of a batch.

        Args:
            images: Decoded images, uint8 [H, W, 3], of any sizes.
            top_k: Number of classes per image.
        """
        pixels = self.preprocessor.batch(images).to(self.model.device)
        probabilities = self.model(pixel_values=pixels).logits.float().softmax(dim=1)  # [B, classes]
        best = probabilities.topk(min(top_k, len(self.class_names)), dim=1)
        return [
            [(self.class_names[label], value) for label, value in zip(labels, values, strict=True)]
            for labels, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def predict(folder: Path, images: Sequence[Path], top_k: int = 3) -> Iterator[Prediction]:
    """Yield a prediction for each image, in the given order; a file that cannot be used has one that says why.

    Args:
        folder: Folder or id of a model, as of a `Classifier`.
        images: Image files in any format that training reads.
        top_k: Number of classes per image.
    """
    classifier = Classifier(folder)
    for start in range(0, len(images), BATCH_SIZE):
        predictions: dict[Path, Prediction] = {}
        readable: dict[Path, ImageArray] = {}
        for path in images[start : start + BATCH_SIZE]:
            try:
                readable[path] = read_image(path)
            except DataError as error:
                predictions[path] = Prediction(path, [], str(error))
        if readable:
            found = zip(readable, classifier.predict([*readable.values()], top_k), strict=True)
            predictions |= {path: Prediction(path, classes) for path, classes in found}
        yield from (predictions[path] for path in images[start : start + BATCH_SIZE])


def read_image(path: Path) -> ImageArray:
    """Read and decode an image file of any format that training reads; 16-bit grayscale is scaled to 8 bits.

    Returns:
        RGB pixels, uint8 [H, W, 3].

    Raises:
        DataError: If the file cannot be read, or is not a usable image.
    """
    try:
        return decode(path.read_bytes(), scales=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except DecodeError as error:
        raise DataError(f"{path}: cannot be used as an image: {error}") from None


def find_images(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Find the files that paths name: files, the images of folders at any depth, and the matches of patterns.

    Returns:
        The files, and a sentence about each path that names none and about what cannot be used in a folder.

    Raises:
        DataError: If there is no file at all.
    """
    found: list[Path] = []
    faults: list[str] = []
    for path in paths:
        if os.path.isdir(path):  # noqa: PTH112 - `Path.is_dir` raises if a parent folder cannot be read
            source = list_folder(path, labeled=False, may_have_splits=False)
            faults += [f"{path}: {problem}" for problem in source.problems]
            for note in source.notes:
                print(f"{path}: {note}", file=sys.stderr)
            matches = [path / name for name in source.names]
        elif os.path.lexists(path):
            matches = [path]
        elif any(character in str(path) for character in "*?["):
            found_files = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
            matches = sorted(file for file in found_files if not is_hidden(file.name))
        else:
            faults.append(f"{path}: no such file or folder; check the path")
            continue
        if not matches:
            faults.append(f"{path}: no images here; name image files, folders of images or patterns such as *.jpg")
        found += matches
    if not found:
        raise DataError("\n".join(faults))
    return found, faults
