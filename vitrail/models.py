"""Encoders and classifiers for single images, and the functions that apply them to many."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from finetune.backbone import FeatureExtractor
from finetune.predict import BATCH_SIZE, Classes, Classifier, read_image
from finetune.preprocessor import Preprocessor, load_preprocessor
from pretrain.checkpoint.history import find_checkpoint
from pretrain.checkpoint.manifest import MANIFEST
from pretrain.checkpoint.pieces import load_verified
from pretrain.config.section import with_home
from pretrain.data.transforms.decode import DecodeError, ImageArray, scale_grayscale, to_rgb
from pretrain.distributed import device
from pretrain.errors import CheckpointError, DataError, UserError
from pretrain.export.folder import build_processor
from pretrain.export.vit import load_encoder as load_vit
from pretrain.hub import find_model
from pretrain.model.vit import ViT

ImageLike: TypeAlias = str | Path | Image.Image | npt.NDArray[np.uint8]  # an array is [H, W], [H, W, 3] or [H, W, 4]
Images: TypeAlias = ImageLike | Iterable[ImageLike]


@dataclass(frozen=True)
class Preprocess:
    """Turn an image into the input of a model: resized, cropped and normalized as in the model's evaluation.

    Attributes:
        preprocessor: Image processor of the model.
    """

    preprocessor: Preprocessor

    def __call__(self, image: ImageLike) -> Tensor:
        """Return the pixels of one image, float [3, H, W]."""
        return self.preprocessor.batch([to_pixels(image)])[0]


class Encoder(nn.Module):
    """A model without its head, in evaluation mode and on the GPU if there is one: a torch module to build on.

    Args:
        backbone: Module that turns normalized pixels [B, 3, H, W] into features [B, D].
        preprocessor: Preprocessing of the model.

    Attributes:
        backbone: The same module.
        preprocess: Function that turns an image into pixels [3, H, W], usable as a dataset's `transform`.
        image_size: Height and width of the input in pixels.
    """

    def __init__(self, backbone: nn.Module, preprocessor: Preprocessor) -> None:
        super().__init__()
        self.backbone = backbone
        self.preprocess = Preprocess(preprocessor)
        self.image_size = preprocessor.image_size
        self.to(device()).eval()

    @property
    def device(self) -> torch.device:
        """Device of the weights, where `forward` needs the pixels."""
        return next(self.parameters()).device

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features [B, D] of preprocessed images [B, 3, H, W]."""
        features: Tensor = self.backbone(pixels)
        return features


class ClsToken(nn.Module):
    """The CLS token of a run's Vision Transformer, which probes use and a classifier is given.

    Args:
        encoder: Vision Transformer.
    """

    def __init__(self, encoder: ViT) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the CLS tokens [B, D] of normalized pixels [B, 3, H, W]."""
        tokens: Tensor = self.encoder(pixels)
        return tokens[:, 0]


def load_encoder(path: str | Path) -> Encoder:
    """Load a model without its head.

    Args:
        path: Hugging Face folder, as `vitrail export` or fine-tuning writes it; or the folder of a run, whose newest
            checkpoint (or fine-tuned model) is loaded; or one of its checkpoints/step-* folders; or the id of a Hub
            model in the local cache.

    Raises:
        UserError: If there is no usable model.
    """
    folder = find_model(Path(with_home(str(path))))
    if (folder / "config.json").exists():
        preprocessor = load_preprocessor(folder)
        return Encoder(FeatureExtractor(folder, preprocessor), preprocessor)
    try:
        checkpoint = find_checkpoint(folder)
    except CheckpointError:
        raise UserError(
            f"{path}: no model here; name an exported or fine-tuned folder, a run folder or one of its "
            "checkpoints/step-*"
        ) from None
    manifest, weights = load_verified(checkpoint)
    config = manifest.parse_config(checkpoint)
    preprocessor = Preprocessor(build_processor(config), checkpoint / MANIFEST, config.model.image_size)
    return Encoder(ClsToken(load_vit(config.model, weights)), preprocessor)


def load_classifier(path: str | Path) -> Classifier:
    """Load a model with its classification head, to classify images more than once with `predict`.

    Args:
        path: Hugging Face folder with a trained classifier, the folder of a fine-tuning run, or the id of a Hub model
            in the local cache.

    Raises:
        UserError: If there is no trained classifier.
    """
    return Classifier(Path(with_home(str(path))))


def predict(model: Classifier | str | Path, images: Images, top_k: int = 3) -> list[Classes]:
    """Classify images, with the same result as `vitrail predict`.

    Args:
        model: Classifier, or the path of one; see `load_classifier`.
        images: One image, or any number of them: paths, PIL images or uint8 arrays [H, W], [H, W, 3] or [H, W, 4].
        top_k: Number of classes per image.

    Returns:
        For each image the `top_k` most probable classes as (class name, probability), the most probable first.

    Raises:
        UserError: If an image or the model cannot be used.
    """
    classifier = model if isinstance(model, Classifier) else load_classifier(model)
    return [classes for batch in batches(images) for classes in classifier.predict(batch, top_k)]


def embed(model: Encoder | str | Path, images: Images) -> npt.NDArray[np.float32]:
    """Compute the features of images.

    A feature vector is what a classification head is given: for a ViT the CLS token after the last LayerNorm, which the
    probes of a run use too; for DINOv2 the CLS token and the mean of the patches; for networks without a CLS token,
    such as ResNet and Swin, the mean over all positions.

    Args:
        model: Encoder, or the path of one; see `load_encoder`.
        images: One image, or any number of them: paths, PIL images or uint8 arrays [H, W], [H, W, 3] or [H, W, 4].

    Returns:
        Features, float32 [N, D].

    Raises:
        UserError: If an image or the model cannot be used, or there are no images.
    """
    encoder = model if isinstance(model, Encoder) else load_encoder(model)
    preprocessor = encoder.preprocess.preprocessor
    with torch.no_grad():
        found = [encoder(preprocessor.batch(batch).to(encoder.device)).float().cpu() for batch in batches(images)]
    if not found:
        raise UserError("images: there are none; pass at least one image")
    features: npt.NDArray[np.float32] = torch.cat(found).numpy()
    return features


def batches(images: Images) -> Iterator[list[ImageArray]]:
    """Decode images and yield them in batches; a long iterable is never in memory as a whole."""
    remaining = enumerate([images] if is_image(images) else images)  # type: ignore[arg-type]
    while batch := [to_pixels(image, f"images[{i}]") for i, image in islice(remaining, BATCH_SIZE)]:
        yield batch


def is_image(value: object) -> bool:
    """Return whether a value is one image rather than several."""
    if isinstance(value, np.ndarray):
        return value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (3, 4))
    return isinstance(value, str | Path | Image.Image)


def to_pixels(image: Any, name: str = "image") -> ImageArray:
    """Return an image as RGB pixels, uint8 [H, W, 3]: upright, with transparency on white, as in training.

    Args:
        image: Path, PIL image, or uint8 array [H, W], [H, W, 3] or [H, W, 4].
        name: Name of the image for an error, unless it has a path.

    Raises:
        DataError: If it cannot be used.
    """
    if isinstance(image, str | Path):
        return read_image(Path(with_home(str(image))))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and is_image(image):
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        kind = f"{image.dtype} {list(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        raise DataError(
            f"{name}: {kind} is not an image; pass a path, a PIL image or a uint8 array [H, W], [H, W, 3] or [H, W, 4]"
        )
    try:
        return np.array(to_rgb(scale_grayscale(image)))
    except (DecodeError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{name}: cannot be used as an image: {error}; leave it out or convert it") from None
