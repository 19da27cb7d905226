"""Store an image: with its original bytes if training can read them, else re-encoded with 8 bits per channel."""

import io
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from pretrain.data.transforms.decode import DeepImageError, ImageArray, count_bits, decode

Format = Literal["jpg", "png", "webp"]


class StoredImage(NamedTuple):
    """An encoded image as it is written to a shard.

    Attributes:
        data: Encoded image.
        extension: File name extension: jpg, png or webp.
        width: Width of the decoded image, in pixels.
        height: Height of the decoded image, in pixels.
        scaled_from: Number of bits that the 16-bit values used before they were scaled to 8 bits; 0 for others.
    """

    data: bytes
    extension: str
    width: int
    height: int
    scaled_from: int = 0


@dataclass(frozen=True)
class Encoding:
    """A callable that turns any encoded image into the stored one, and verifies that it decodes.

    Args:
        shorter_side: Length in pixels to which a longer shorter side is reduced (Pillow's bicubic filter); None keeps
            the size.
        format: Format of all images; None keeps JPEG, PNG and WebP, and converts other formats to PNG.
        quality: Quality of re-encoded JPEG and WebP images, from 1 to 100.
    """

    shorter_side: int | None = None
    format: Format | None = None
    quality: int = 90

    @property
    def keeps_bytes(self) -> bool:
        """Whether images that training can read keep their original bytes."""
        return self.shorter_side is None and self.format is None

    def __call__(self, data: bytes) -> StoredImage:
        try:
            pixels, scaled_from = decode(data), 0
        except DeepImageError:
            pixels, scaled_from = decode(data, scales=True), count_bits(data)
        height, width = pixels.shape[:2]
        known = _format_of(data)
        if self.shorter_side is not None and min(height, width) > self.shorter_side:
            pixels = _shrink(pixels, self.shorter_side)
            height, width = pixels.shape[:2]
        elif not scaled_from and known is not None and self.format in (None, known):
            return StoredImage(data, known, width, height)
        extension = self.format or known or "png"
        return StoredImage(_encode(pixels, extension, self.quality), extension, width, height, scaled_from)


def _format_of(data: bytes) -> Format | None:
    """Return the format if training can read it, by the first bytes because a file's extension can be wrong."""
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
