"""Decode images to RGB pixels, identically for training, evaluation and the exported image processor.

libjpeg-turbo (simplejpeg) decodes JPEG, Pillow everything else. EXIF orientation is applied, transparency is blended
with white (as in transformers 5), and Pillow converts the other modes. Grayscale of 16 bits or more is refused,
because Pillow, and with it any exported processor, would turn nearly all of it white. `vitrail shards make` scales
16 bits to 8.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

ImageArray = npt.NDArray[np.uint8]

# Small files can decode to huge images (a 164 kB PNG to 507 MB), and Pillow itself only warns.
MAX_PIXELS = 64_000_000


class EncodedJpeg(NamedTuple):
    """A JPEG that the device will decode, with its height and width in pixels."""

    data: bytes
    height: int
    width: int


class DecodeError(Exception):
    """Bytes that are not a usable image; the message is the reason."""


class DeepGrayscaleError(DecodeError):
    """A 16-bit grayscale image, which must be scaled to 8 bits before training."""

    def __init__(self) -> None:
        super().__init__(
            "16-bit grayscale, which transformers would turn white; convert it to 8 bits with vitrail shards make"
        )


def decode(data: bytes, *, scales: bool = False) -> ImageArray:
    """Decode an image.

    Args:
        data: Content of an image file.
        scales: Whether to scale 16-bit grayscale to 8 bits.

    Returns:
        RGB pixels, uint8 [height, width, 3].

    Raises:
        DecodeError: If the image is damaged, has an unknown format, more than MAX_PIXELS, or more than 8 bits.
    """
    try:
        if _plain_jpeg(data):
            return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            _check_size(image.width, image.height)
            return np.array(to_rgb(scale_grayscale(image) if scales else image))
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError("not an image of a known format") from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error and others
        raise DecodeError(str(error) or type(error).__name__) from None


def decode_unless_jpeg(data: bytes) -> ImageArray | EncodedJpeg:
    """Leave a JPEG to the device if it decodes the JPEG as `decode` would; decode everything else.

    Args:
        data: Content of an image file.

    Raises:
        DecodeError: If `decode` would fail, or the header of a JPEG is damaged.
    """
    try:
        return _plain_jpeg(data) or decode(data)
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(str(error) or type(error).__name__) from None


def scale_grayscale(image: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale to 8 bits; return other images unchanged."""
    if not image.mode.startswith("I;16"):
        return image
    upright = ImageOps.exif_transpose(image)
    return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as a viewer would show it: EXIF orientation applied, transparency on white.

    Args:
        image: Image of any mode.

    Raises:
        DecodeError: If the image has more than 8 bits per channel.
        DeepGrayscaleError: If it has 16-bit grayscale.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        raise DeepGrayscaleError
    if image.mode in ("I", "F"):
        raise DecodeError("grayscale of 32 bits, whose range of values is unknown; convert it to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _plain_jpeg(data: bytes) -> EncodedJpeg | None:
    """Return a JPEG that simplejpeg decodes as Pillow would: without CMYK and EXIF orientation. None otherwise."""
    if data[:2] != b"\xff\xd8" or (b"Exif\x00\x00" in data[:4096] and _has_orientation(data)):
        return None
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    return EncodedJpeg(data, height, width) if colorspace in ("YCbCr", "Gray", "RGB") else None


def _has_orientation(data: bytes) -> bool:
    """Return whether EXIF data asks for a rotation or reflection; reads only the header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1) != 1)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}; shrink it or leave it out")
