"""Decode images to RGB pixels, identically for training, evaluation and the exported image processor.

libjpeg-turbo (simplejpeg) decodes JPEG, Pillow everything else. The orientation in EXIF or XMP is applied, transparency
is blended with white (as in transformers 5), and Pillow converts the other modes. Grayscale of 16 bits or more is
refused, because Pillow, and with it any exported processor, would turn nearly all of it white. `vitrail shards make`
scales 16 bits to 8.

What is broken beside good pixels is ignored: oversized text or color profiles of a PNG, unreadable EXIF, stray bytes
before a JPEG's end. That the bytes are those that were once stored is proven by their checksum, not here.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

ImageArray = npt.NDArray[np.uint8]

# Small files can decode to huge images (a 164 kB PNG to 507 MB), and Pillow itself only warns.
MAX_PIXELS = 64_000_000


# Formats that Pillow recognizes, but that have no pixels, or need another program to get them.
WITHOUT_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
COMMON = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
with contextlib.suppress(ImportError):
    from pillow_heif import register_heif_opener  # the extra "heic"

    register_heif_opener()
Image.init()
FORMATS = (*COMMON, *sorted(Image.OPEN.keys() - WITHOUT_PIXELS - {*COMMON}))  # in the order in which they are tried

SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
SUFFIXES |= {".heic", ".heif", ".jxl"}  # images, whether or not they can be read here

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")  # what the pixels and their orientation need
# libjpeg's warnings about bytes that belong to nothing, and about a color profile that nobody needs
STRAY_BYTES, BAD_PROFILE = "extraneous bytes before marker", "bad ICC marker"
JPEG_XL = (b"\xff\n", b"\0\0\0\x0cJXL \r\n\x87\n")
SIGNATURES = (b"\xff\xd8\xff", PNG_SIGNATURE, b"GIF8", b"II*\0", b"MM\0*", *JPEG_XL)
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
START_OF_SCAN, APP1, APP2 = 0xDA, 0xE1, 0xE2  # markers in a JPEG


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
            return _decode_jpeg(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(_without_extra_chunks(data)), formats=FORMATS)
            _check_size(image.width, image.height)
            return np.array(to_rgb(scale_grayscale(image) if scales else image))
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError(_reason_unknown(data)) from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error and others
        if BAD_PROFILE in str(error) and len(without := _without_profile(data)) < len(data):
            return decode(without, scales=scales)
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
        if BAD_PROFILE in str(error):
            return decode(data)
        raise DecodeError(str(error) or type(error).__name__) from None


def is_image(path: Path) -> bool:
    """Return whether a file's content is an image, even one that is damaged or that cannot be read here.

    Raises:
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = file.read(32)
        if start.startswith(SIGNATURES) or _is_heic(start) or (start[:4], start[8:12]) == (b"RIFF", b"WEBP"):
            return True
        file.seek(0)
        try:
            Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            return False
        except Exception:
            return True  # Pillow knows the format, and finds the file damaged
        return True


def scale_grayscale(image: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale to 8 bits, from the bits that its values use; return other images unchanged."""
    if not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(_upright(image))
    return Image.fromarray((pixels >> (bits_used(pixels) - 8)).astype(np.uint8))


def count_bits(data: bytes) -> int:
    """Return how many bits the values of an encoded 16-bit image use; see `bits_used`."""
    return bits_used(np.asarray(Image.open(io.BytesIO(_without_extra_chunks(data)), formats=FORMATS)))


def bits_used(pixels: npt.NDArray[np.uint16]) -> int:
    """Return how many bits the values of a 16-bit image use: 8, 10, 12, 14 or 16. Cameras store fewer than 16."""
    highest = int(pixels.max(initial=0))
    return next(bits for bits in (8, 10, 12, 14, 16) if highest < 1 << bits)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as a viewer would show it: EXIF orientation applied, transparency on white.

    Args:
        image: Image of any mode.

    Raises:
        DecodeError: If the image has more than 8 bits per channel.
        DeepGrayscaleError: If it has 16-bit grayscale.
    """
    image = _upright(image)
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
    if data[:2] != b"\xff\xd8" or (_names_orientation(data) and _has_orientation(data)):
        return None
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    return EncodedJpeg(data, height, width) if colorspace in ("YCbCr", "Gray", "RGB") else None


def _decode_jpeg(data: bytes) -> ImageArray:
    try:
        return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
    except ValueError as error:
        if STRAY_BYTES not in str(error):
            raise
        return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False))


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the marker and the bytes of each segment before a JPEG's pixels."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != START_OF_SCAN:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] == 0xFF:  # any number of these may precede a marker
            place += 1
            continue
        yield data[place + 1], data[place:end]
        place = end


def _without_profile(data: bytes) -> bytes:
    """Return a JPEG without its color profile."""
    for marker, segment in list(_segments(data)):
        if marker == APP2:
            data = data.replace(segment, b"", 1)
    return data


def _names_orientation(data: bytes) -> bool:
    """Return whether any segment before a JPEG's pixels is EXIF, or XMP with an orientation."""
    return any(
        marker == APP1 and (segment[4:].startswith(b"Exif\0") or b"tiff:Orientation" in segment)
        for marker, segment in _segments(data)
    )


def _has_orientation(data: bytes) -> bool:
    """Return whether the header asks for a rotation or reflection."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        try:
            return bool(image.getexif().get(ExifTags.Base.Orientation, 1) != 1)
        except Exception:
            return False  # unreadable EXIF; `_upright` ignores it too


def _upright(image: Image.Image) -> Image.Image:
    """Return the image as a viewer shows it: turned as EXIF or XMP say; unreadable EXIF is ignored."""
    image.load()  # so that no error of the pixels is taken for one of the EXIF data
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _without_extra_chunks(data: bytes) -> bytes:
    """Return a PNG without text, color profiles and other extras, which may be larger than Pillow takes."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, place = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] in PNG_CHUNKS:
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _is_heic(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS


def _reason_unknown(data: bytes) -> str:
    """Return why Pillow knows no format of this file."""
    if _is_heic(data):
        return "a HEIC image; install a decoder for it with pip install 'vitrail[heic]'"
    if data.startswith(JPEG_XL):
        return "a JPEG XL image, which Pillow cannot read; convert it to PNG or JPEG"
    return "not an image of a known format"


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}; shrink it or leave it out")
