"""The image processor of a Hugging Face folder, and what training must do to give the model the same pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from finetune.folder import LOADING, ModelError, check_folder, errors_of_transformers, first_sentence
from pretrain.config import AugmentConfig
from pretrain.data.transforms.batch import Batch, augment
from pretrain.data.transforms.color import Channels
from pretrain.data.transforms.decode import ImageArray
from pretrain.data.transforms.views import TrainView
from pretrain.hub import PROCESSOR_FILE

# Imported once by the server of the data workers, instead of by each worker that unpickles a `Preprocessor`.
WORKER_MODULES = ("finetune.preprocessor", "transformers.image_processing_backends")

SHAPES = ((64, 64), (60, 160), (160, 60), (700, 500))  # height and width of the images that are tried
QUADRANTS = ((200, 60, 30), (20, 180, 90), (40, 70, 220), (128, 128, 128))  # colors of an image's quarters
TOLERANCE = 0.5 / 255  # half a level of 8 bits


@dataclass(frozen=True)
class Preprocessor:
    """The image processor of a Hugging Face folder, usable as a view: it runs in the data workers.

    Attributes:
        processor: Hugging Face image processor.
        file: Its file, for error messages.
        image_size: Height and width of the model's input in pixels.
    """

    processor: Any
    file: Path
    image_size: int

    def __call__(self, image: ImageArray, random: np.random.Generator) -> dict[str, Tensor]:
        """Preprocess an image.

        Args:
            image: Decoded image, uint8 [H, W, 3].
            random: Unused; training views need it.

        Returns:
            "image", float [3, H, W] with the size and the normalization of the folder.
        """
        return {"image": process(self.processor, image)}

    def batch(self, images: Sequence[ImageArray]) -> Tensor:
        """Preprocess decoded images of any sizes: float [B, 3, H, W]."""
        return torch.stack([process(self.processor, image) for image in images])


@dataclass(frozen=True)
class Normalization:
    """What a processor does to the values of pixels, whatever its settings are called.

    Attributes:
        mean: Mean of red, green and blue, for pixels in [0, 1].
        std: Standard deviation of red, green and blue.
        is_bgr: Whether the model's channels are in the order blue, green, red.
    """

    mean: Channels
    std: Channels
    is_bgr: bool

    def __call__(self, batch: Batch) -> Tensor:
        """Augment and normalize the images of a batch: float32 [B, 3, H, W]."""
        images = augment(batch, self.mean, self.std)
        return images.flip(1) if self.is_bgr else images


def process(processor: Any, image: ImageArray) -> Tensor:
    """Preprocess an image uint8 [H, W, 3] with a Hugging Face image processor: float [3, H, W]."""
    pixels: Tensor = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
    return pixels.float()


def load_preprocessor(folder: Path) -> Preprocessor:
    """Load a folder's image processor. It uses Pillow, which returns the same pixels on every machine.

    Raises:
        ModelError: If the folder has no usable preprocessor_config.json, or if it does not turn every color image into
            pixels of the same square.
    """
    check_folder(folder)
    with errors_of_transformers(folder / PROCESSOR_FILE):
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **LOADING)
    file = folder / PROCESSOR_FILE
    sizes = {_output_size(processor, file, shape) for shape in SHAPES}
    if len(sizes) > 1 or any(height != width for height, width in sizes):
        found = " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise ModelError(
            f"{file}: makes images of {found} pixels, but all must be squares of one size; "
            "set do_center_crop=true and crop_size, or a size with height and width"
        )
    return Preprocessor(processor, file, image_size=sizes.pop()[0])


def measure_normalization(preprocessor: Preprocessor) -> Normalization:
    """Measure what a processor does to the values of pixels, from its output for black, red, green and blue.

    Raises:
        ModelError: If training, which normalizes each channel of a crop, cannot give the model the same pixels.
    """
    side = preprocessor.image_size
    black, *others = (
        process(preprocessor.processor, np.full((side, side, 3), color, np.uint8))[:, side // 2, side // 2].double()
        for color in ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
    )
    rise = torch.stack(others) - black  # [3, 3]: change of each channel (column) by each color (row)
    is_bgr = bool(rise[0, 2].abs() > rise[0, 0].abs())
    if is_bgr:
        black, rise = black.flip(0), rise.flip(1)
    std = 1 / rise.diagonal()
    normalization = Normalization(_channels(-black * std), _channels(std), is_bgr)
    _compare_colors(preprocessor, normalization)
    for shape in ((side, side), (side // 2, side // 2), *SHAPES):
        _compare_frames(preprocessor, normalization, quadrants(*shape))
    return normalization


def quadrants(height: int, width: int) -> ImageArray:
    """Return an image whose quarters have the colors QUADRANTS, uint8 [height, width, 3]."""
    rows, columns = np.arange(height) >= height / 2, np.arange(width) >= width / 2
    image: ImageArray = np.array(QUADRANTS, np.uint8)[2 * rows[:, None] + columns]
    return image


def _output_size(processor: Any, file: Path, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of a processor's output for an image of a shape.

    Raises:
        ModelError: If the output is not the pixels of a color image.
    """
    kind = type(processor).__name__.removesuffix("Pil")
    other = "choose a model whose image processor returns images of three channels"
    try:
        features = processor(Image.fromarray(quadrants(*shape)), return_tensors="pt")
    except Exception as error:  # settings that others wrote can fail in any way
        raise ModelError(f"{file}: {kind} cannot process a color image: {first_sentence(error)}; {other}") from None
    if "pixel_values" not in features:
        raise ModelError(f"{file}: {kind} returns {', '.join(features)} in place of pixels; {other}")
    pixels = torch.as_tensor(features["pixel_values"][0])
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        found = " x ".join(map(str, pixels.shape))
        raise ModelError(f"{file}: {kind} returns values of shape {found} in place of 3 x height x width; {other}")
    return pixels.shape[1], pixels.shape[2]


def _compare_colors(preprocessor: Preprocessor, normalization: Normalization) -> None:
    """Send images of one color through the views of training and evaluation, and compare their centers.

    Raises:
        ModelError: If they differ.
    """
    side = preprocessor.image_size
    for color in QUADRANTS:
        difference = _difference(preprocessor, normalization, np.full((side, side, 3), color, np.uint8))
        if not difference[side // 2, side // 2] < TOLERANCE:  # also true for NaN
            raise ModelError(
                f"{preprocessor.file}: the processor changes colors in a way that training cannot repeat; turn off "
                "what it does beyond do_rescale, do_normalize and do_flip_channel_order"
            )


def _compare_frames(preprocessor: Preprocessor, normalization: Normalization, image: ImageArray) -> None:
    """Send an image through the views of training and evaluation, and compare the pixels near the corners.

    Raises:
        ModelError: If they differ, although the colors do not.
    """
    quarter, (height, width) = preprocessor.image_size // 4, image.shape[:2]
    difference = _difference(preprocessor, normalization, image)
    corners = [slice(0, quarter), slice(-quarter, None)]
    if not all((difference[rows, columns] < TOLERANCE).all() for rows in corners for columns in corners):
        raise ModelError(
            f"{preprocessor.file}: the processor puts a border around an image of {height} x {width} pixels, or "
            "enlarges its center, which training does not do; set do_resize=true and do_pad=false, and a size that is "
            "at least crop_size"
        )


def _difference(preprocessor: Preprocessor, normalization: Normalization, image: ImageArray) -> Tensor:
    """Return how much each pixel differs between training and evaluation, [side, side] for pixels in [0, 1]."""
    random = np.random.default_rng(0)
    whole = AugmentConfig(crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip=0.0)
    trained = normalization({"image": TrainView(whole, preprocessor.image_size)(image, random)["image"][None]})[0]
    evaluated = preprocessor(image, random)["image"]
    std = torch.tensor(normalization.std).flip(0) if normalization.is_bgr else torch.tensor(normalization.std)
    return ((trained - evaluated) * std[:, None, None]).abs().amax(dim=0)


def _channels(values: Tensor) -> Channels:
    red, green, blue = values.tolist()
    return red, green, blue
