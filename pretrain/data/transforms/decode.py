"""Encoded bytes become RGB pixels, the same for training, evaluation and the exported processor.

JPEG is decoded by libjpeg-turbo (simplejpeg), everything else by Pillow. EXIF orientation is applied, transparency is
put on white (as transformers 5 does), other modes are converted by Pillow. Grayscale of 16 bits or more is refused:
Pillow,
and with it any exported processor, would turn nearly all of it white. `vitrail shards make` scales 16 bits to 8.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

ImageArray = npt.NDArray[np.uint8]

# A 164 kB PNG was seen to decode to 507 MB; Pillow itself only warns.
MAX_PIXELS = 64_000_000


class EncodedJpeg(NamedTuple):
    """A JPEG left for the device to decode, and the size it will have, in pixels."""

    data: bytes
    height: int
    width: int


class DecodeError(Exception):
    """Bytes that are no usable image; the message says why."""


class DeepGrayscaleError(DecodeError):
    """An image of 16-bit grayscale, which must be scaled before training."""

    def __init__(self) -> None:
        super().__init__(
            "16-bit grayscale, which transformers would turn white; vitrail shards make scales it to 8 bits"
        )


def decode(data: bytes, *, scales: bool = False) -> ImageArray:
    """Decode an image.

    Args:
        data: of the file.
        scales: whether 16-bit grayscale is scaled to 8 bits.

    Returns:
        ImageArray [height, width, 3], RGB.

    Raises:
        DecodeError: broken, truncated, of an unknown format, of more than MAX_PIXELS, or deeper than 8 bits.
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
    except Exception as error:  # decoders raise what they like: OSError, ValueError, SyntaxError, struct.error ...
        raise DecodeError(str(error) or type(error).__name__) from None


def decode_unless_jpeg(data: bytes) -> ImageArray | EncodedJpeg:
    """Leave a JPEG to the device if that decodes it as `decode` would; decode everything else.

    Raises:
        DecodeError: as `decode` does; a JPEG's header must be whole.
    """
    try:
        return _plain_jpeg(data) or decode(data)
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(str(error) or type(error).__name__) from None


def scale_grayscale(image: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale to 8 bits, and leave everything else as it is."""
    if not image.mode.startswith("I;16"):
        return image
    upright = ImageOps.exif_transpose(image)
    return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn a Pillow image into RGB as a person sees it.

    Raises:
        DecodeError: it is deeper than 8 bits.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        raise DeepGrayscaleError
    if image.mode in ("I", "F"):
        raise DecodeError("grayscale of 32 bits, whose black and white nobody knows; convert it to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _plain_jpeg(data: bytes) -> EncodedJpeg | None:
    """Return a JPEG that simplejpeg decodes as Pillow would: no CMYK, no EXIF that turns the image."""
    if data[:2] != b"\xff\xd8" or (b"Exif\x00\x00" in data[:4096] and _is_turned(data)):
        return None
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    return EncodedJpeg(data, height, width) if colorspace in ("YCbCr", "Gray", "RGB") else None


def _is_turned(data: bytes) -> bool:
    """Say whether EXIF wants the image turned or mirrored; nothing is decoded for that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1) != 1)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}")
