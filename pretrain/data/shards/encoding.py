"""How an image is stored: its own bytes where they will do, else resized, scaled to 8 bits, encoded anew."""

import io
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from pretrain.data.transforms.decode import DeepGrayscaleError, ImageArray, decode

Format = Literal["jpg", "png", "webp"]


class Stored(NamedTuple):
    """An image as it goes into a shard; width and height are in pixels, as it decodes."""

    data: bytes
    extension: str
    width: int
    height: int


@dataclass(frozen=True)
class Encoding:
    """Makes of any image what is stored, and proves on the way that it decodes.

    Args:
        shorter_side: images whose shorter side is longer are shrunk to it (Pillow's bicubic); None keeps their size.
        format: of all images; None keeps JPEG, PNG and WebP, and makes PNG of the rest.
        quality: of a JPEG or WebP that is encoded here.
    """

    shorter_side: int | None = None
    format: Format | None = None
    quality: int = 90

    @property
    def keeps_bytes(self) -> bool:
        """Whether images that training reads stay as they are."""
        return self.shorter_side is None and self.format is None

    def __call__(self, data: bytes) -> Stored:
        """Return what is stored of an image.

        Raises:
            DecodeError: it is no usable image.
        """
        try:
            pixels, usable = decode(data), True
        except DeepGrayscaleError:
            pixels, usable = decode(data, scales=True), False
        height, width = pixels.shape[:2]
        known = _format_of(data)
        if self.shorter_side is not None and min(height, width) > self.shorter_side:
            pixels = _shrink(pixels, self.shorter_side)
            height, width = pixels.shape[:2]
        elif usable and known is not None and self.format in (None, known):
            return Stored(data, known, width, height)
        extension = self.format or known or "png"
        return Stored(_encode(pixels, extension, self.quality), extension, width, height)


def _format_of(data: bytes) -> Format | None:
    """Return a format that training reads, by the first bytes; a file's name may lie."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _shrink(pixels: ImageArray, shorter_side: int) -> ImageArray:
    height, width = pixels.shape[:2]
    scale = shorter_side / min(height, width)
    size = (max(round(width * scale), shorter_side), max(round(height * scale), shorter_side))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _encode(pixels: ImageArray, extension: Format, quality: int) -> bytes:
    if extension == "jpg":
        return bytes(
            simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, colorspace="RGB", colorsubsampling="420")
        )
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, extension, quality=quality)
    return buffer.getvalue()
