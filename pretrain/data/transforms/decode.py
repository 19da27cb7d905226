"""Decode images to RGB pixels, identically for training, evaluation and the exported image processor.

libjpeg-turbo (simplejpeg) decodes JPEG, Pillow everything else. The orientation in EXIF or XMP is applied, transparency
is blended with white (as in transformers 5), and Pillow converts the other modes. Values of 16 bits that Pillow, and
with it any exported processor, would turn white (grayscale) or nearly black (color of fewer bits in 16-bit values) are
refused. `vitrail shards make` scales them to 8 bits, except CMYK, color with premultiplied transparency or in separate
planes, and grayscale whose 0 is white.

What is broken beside good pixels is ignored: oversized text or color profiles of a PNG, unreadable EXIF, stray bytes
before a JPEG's end. That the bytes are those that were once stored is proven by their checksum, not here.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

ImageArray = npt.NDArray[np.uint8]
Values = npt.NDArray[np.uint16]

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
ORIENTATION_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # keywords of text chunks
MAX_TEXT_BYTES = 1 << 19
# How Pillow names color of 16-bit values: what can be scaled, and what is refused unless it uses all 16 bits.
DEEP_COLOR = ("RGB;16", "RGBA;16", "RGBX;16")
DEEP_GRAY_ALPHA = "LA;16B"
DEEP_OTHERS = {"CMYK;16": "CMYK", "RGBa;16": "color with premultiplied transparency"}
BITS, PHOTOMETRIC, PLANES = 258, 262, 284  # TIFF tags
WHITE_IS_ZERO, SEPARATE_PLANES = 0, 2
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


class DeepImageError(DecodeError):
    """An image of 16-bit values, which must be scaled to 8 bits before training."""


def decode(data: bytes, *, scales: bool = False) -> ImageArray:
    """Decode an image.

    Args:
        data: Content of an image file.
        scales: Whether to scale 16-bit values to 8 bits, from the bits that they use.

    Returns:
        RGB pixels, uint8 [height, width, 3].

    Raises:
        DecodeError: If the image is damaged, has an unknown format, more than MAX_PIXELS, or more than 8 bits.
        DeepImageError: If it has 16-bit values that Pillow cannot show, and `scales` is False.
    """
    try:
        if _plain_jpeg(data):
            return _decode_jpeg(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image, values = _open(data)
            if values is None:
                return np.array(to_rgb(image))
            if not scales:
                kind = "grayscale, which transformers would turn white"
                if values.ndim == 3:
                    kind = f"color of {bits_used(values)} bits, which transformers would turn nearly black"
                raise DeepImageError(f"16-bit {kind}; convert it to 8 bits with vitrail shards make")
            return np.array(to_rgb(Image.fromarray(_scale_to_bytes(values))))
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
    """Scale 16-bit grayscale to 8 bits, from the bits that its values use; return other images unchanged.

    Raises:
        DecodeError: If 0 is white.
    """
    if not image.mode.startswith("I;16"):
        return image
    _check_zero_is_black(image)
    return Image.fromarray(_scale_to_bytes(np.asarray(_upright(image)).astype(np.uint16)))


def count_bits(data: bytes) -> int:
    """Return how many bits the values of an encoded image use; see `bits_used`."""
    values = _open(data)[1]
    return 8 if values is None else bits_used(values)


def bits_used(pixels: Values) -> int:
    """Return how many bits the values of a 16-bit image use: 8, 10, 12, 14 or 16. Cameras store fewer than 16.

    Args:
        pixels: Values [H, W] or [H, W, C]; transparency does not count.
    """
    highest = int(pixels[..., :3].max(initial=0) if pixels.ndim == 3 else pixels.max(initial=0))
    return next(bits for bits in (8, 10, 12, 14, 16) if highest < 1 << bits)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as a viewer would show it: EXIF orientation applied, transparency on white.

    Raises:
        DecodeError: If the image has 32 bits per channel.
    """
    image = _upright(image)
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


def _open(data: bytes) -> tuple[Image.Image, Values | None]:
    """Open and load an image that is no plain JPEG.

    Returns:
        The image, and its upright 16-bit values [H, W] or [H, W, C] if Pillow would not show its 8 bits. Of color that
        uses all 16 bits, Pillow takes the upper 8, so it has no such values.

    Raises:
        DecodeError: If the image has too many pixels, or 16-bit values that cannot be scaled.
    """
    data = _without_extra_chunks(data)
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image.width, image.height)
    raw_mode = str(_raw_mode(image))
    image.load()
    _check_zero_is_black(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return image, np.asarray(_upright(image)).astype(np.uint16)
    if _has_deep_planes(image):
        # Pillow reads the upper bytes of compressed planes, and wrong values of others.
        if raw_mode.startswith(DEEP_COLOR) and _uses_upper_bits(np.asarray(image)):
            return image, None
        raise DecodeError("16-bit color in separate planes, which Pillow cannot read; convert it to 8 bits per channel")
    if raw_mode == DEEP_GRAY_ALPHA:
        # The four bytes of a pixel, upper before lower, as if they were four values.
        pixels = np.asarray(_upright(_read_as(data, "RGBA"))).astype(np.uint16)
        values = (pixels[..., ::2] << np.uint16(8) | pixels[..., 1::2])[..., [0, 0, 0, 1]]
        return image, values if values.any() and bits_used(values) < 16 else None
    if raw_mode.startswith(tuple(DEEP_OTHERS)):
        values = _read_values(data, raw_mode.replace("a", "A"))  # the values as they are stored
        if values.any() and (bits := bits_used(values.reshape(1, -1))) < 16:
            kind = next(kind for mode, kind in DEEP_OTHERS.items() if raw_mode.startswith(mode))
            raise DecodeError(f"16-bit {kind} that uses only {bits} bits; convert it to 8 bits per channel")
    if not raw_mode.startswith(DEEP_COLOR) or _uses_upper_bits(np.asarray(image)):
        return image, None
    values = _read_values(data, raw_mode)
    return image, values if values.any() and bits_used(values) < 16 else None


def _uses_upper_bits(upper: ImageArray) -> bool:
    """Return whether 16-bit color uses all 16 bits, from the upper bytes of its values [H, W, C]."""
    return bits_used(upper.astype(np.uint16) << np.uint16(8)) == 16


def _read_values(data: bytes, raw_mode: str) -> Values:
    """Return the upright 16-bit values [H, W, C] of an image.

    Pillow reads one byte of each value: the lower one, if it takes the values to be in the other byte order.
    """
    swapped = raw_mode[:-1] + ("L" if raw_mode.endswith("B") else "B")
    upper, lower = (np.asarray(_upright(_read_as(data, mode))).astype(np.uint16) for mode in (raw_mode, swapped))
    return upper << np.uint16(8) | lower


def _read_as(data: bytes, raw_mode: str) -> Image.Image:
    """Open an image as if its file stored the values of pixels in another way."""
    image: Any = Image.open(io.BytesIO(data), formats=FORMATS)
    image.tile = [tile._replace(args=_with_raw_mode(tile.args, raw_mode)) for tile in image.tile]
    return cast("Image.Image", image)


def _has_deep_planes(image: Any) -> bool:
    """Return whether an image is a TIFF that stores more than 8 bits of each channel, one channel after the other."""
    if image.format != "TIFF" or image.tag_v2.get(PLANES) != SEPARATE_PLANES or len(image.getbands()) == 1:
        return False
    return bool(max(image.tag_v2.get(BITS, (8,))) > 8)


def _check_zero_is_black(image: Any) -> None:
    """Raise a DecodeError for 16-bit grayscale whose 0 is white, which Pillow does not invert."""
    if image.format == "TIFF" and image.mode.startswith("I;16") and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        raise DecodeError("16-bit grayscale whose 0 is white; convert it to 8 bits, or invert it")


def _scale_to_bytes(values: Values) -> ImageArray:
    """Scale 16-bit values [H, W] or [H, W, C] to 8 bits; transparency by the bits that it uses itself."""
    if values.ndim == 3 and values.shape[2] == 4:
        return np.concatenate([_scale_to_bytes(values[..., :3]), _scale_to_bytes(values[..., 3:])], axis=2)
    return (values >> (bits_used(values) - 8)).astype(np.uint8)


def _raw_mode(image: Any) -> Any:
    """Return Pillow's name for how the file stores the values of pixels, or None if the format has none."""
    args = image.tile[0].args if getattr(image, "tile", None) else None
    return args[0] if isinstance(args, tuple) and args else args


def _with_raw_mode(args: Any, raw_mode: str) -> Any:
    return (raw_mode, *args[1:]) if isinstance(args, tuple) else raw_mode


def _without_extra_chunks(data: bytes) -> bytes:
    """Return a PNG without color profiles, text and other extras, which may be larger than Pillow takes.

    Text that may contain the orientation is kept, unless it is large.
    """
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, place = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        is_orientation = data[place + 8 : end].startswith(ORIENTATION_TEXTS) and end - place < MAX_TEXT_BYTES
        if data[place + 4 : place + 8] in PNG_CHUNKS or is_orientation:
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
