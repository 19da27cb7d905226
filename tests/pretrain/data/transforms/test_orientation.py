"""The orientation is found wherever it stands in a file, as Pillow and transformers find it."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from sklearn.datasets import load_sample_image

from pretrain.data.shards.encoding import Encoding
from pretrain.data.transforms.decode import EncodedJpeg, decode, decode_unless_jpeg

PHOTO = Image.fromarray(load_sample_image("flower.jpg")[:24, :32])
TAG = 0x0112


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_opened(data: bytes) -> Image.Image:
    """Return the image as transformers' `load_image` does."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def exif(orientation: int, order: str = "<", before: int = 0) -> bytes:
    """EXIF data with an orientation in a byte order, behind other entries."""
    entries = [struct.pack(f"{order}HHIHH", 0x100 + i, 3, 1, 7, 0) for i in range(before)]
    entries.append(struct.pack(f"{order}HHIHH", TAG, 3, 1, orientation, 0))
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}IH", 8, len(entries)) + b"".join(entries) + bytes(4)


def xmp(orientation: int, *, is_attribute: bool = True) -> bytes:
    """XMP data with an orientation, as an attribute or as an element."""
    if is_attribute:
        return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    return f"<x:xmpmeta><tiff:Orientation>{orientation}</tiff:Orientation></x:xmpmeta>".encode()


def segment(marker: int, content: bytes) -> bytes:
    """A segment of a JPEG's header, with bytes that may fill the space before it."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


ORIENTATION = st.integers(1, 8)
SEGMENTS = st.one_of(
    st.builds(
        lambda *given: segment(0xE1, b"Exif\0\0" + exif(*given)),
        ORIENTATION,
        st.sampled_from("<>"),
        st.integers(0, 5),
    ),
    st.builds(
        lambda orientation, is_attribute: segment(
            0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(orientation, is_attribute=is_attribute)
        ),
        ORIENTATION,
        st.booleans(),
    ),
    st.builds(lambda size: segment(0xED, b"Photoshop 3.0\0" + bytes(size)), st.integers(0, 60_000)),
    st.builds(lambda text: segment(0xFE, text), st.binary(max_size=50)),
    st.just(segment(0xE1, b"Exif\0\0II*\0\xff\xff")),
    st.just(b"\xff\xff"),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(SEGMENTS, max_size=5), st.booleans())
def test_a_jpeg_is_upright_whatever_its_segments_and_their_order(segments: list[bytes], is_gray: bool) -> None:
    data = encoded(PHOTO.convert("L") if is_gray else PHOTO, "JPEG", quality=95)
    data = data[:2] + b"".join(segments) + data[2:]
    try:
        expected = as_opened(data)
    except Exception:  # EXIF that Pillow cannot read
        expected = Image.open(io.BytesIO(data)).convert("RGB")
    pixels = decode(data)
    assert (pixels.shape[1], pixels.shape[0]) == expected.size
    assert abs(pixels.astype(int) - np.asarray(expected).astype(int)).max() <= 2  # two builds of libjpeg-turbo
    stored = decode(Encoding()(data).data)
    assert np.array_equal(stored, pixels)
    on_device = decode_unless_jpeg(data)
    assert isinstance(on_device, EncodedJpeg) or np.array_equal(on_device, pixels)
    if isinstance(on_device, EncodedJpeg):
        plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert abs(pixels.astype(int) - plain).max() <= 2


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


PLACES = ("eXIf", "eXIf at the end", "XMP", "XMP, compressed", "raw profile")


def png_with_orientation(orientation: int, place: str) -> bytes:
    if place.startswith("eXIf"):
        data, added = encoded(PHOTO, "PNG"), chunk(b"eXIf", exif(orientation, ">"))
        position = data.index(b"IEND" if place.endswith("end") else b"IDAT") - 4
        return data[:position] + added + data[position:]
    text = PngImagePlugin.PngInfo()
    if place.startswith("XMP"):
        text.add_itxt("XML:com.adobe.xmp", xmp(orientation).decode(), zip=place.endswith("compressed"))
    else:
        content = b"Exif\0\0" + exif(orientation)
        text.add_text("Raw profile type exif", f"\nexif\n{len(content):8}\n{content.hex()}\n", zip=True)
    return encoded(PHOTO, "PNG", pnginfo=text)


@pytest.mark.parametrize("place", PLACES)
def test_a_png_is_upright(place: str) -> None:
    for orientation in range(1, 9):
        data = png_with_orientation(orientation, place)
        expected = np.asarray(as_opened(data))
        assert np.array_equal(decode(data), expected), orientation
        assert np.array_equal(decode(Encoding()(data).data), expected), orientation
        assert (expected.shape[0] == 32) == (orientation > 4)


@pytest.mark.parametrize("kind", ["WEBP", "TIFF"])
@pytest.mark.parametrize("is_xmp", [False, True])
def test_other_formats_are_upright(kind: str, is_xmp: bool) -> None:
    for orientation in range(1, 9):
        if is_xmp:
            options: dict[str, object] = (
                {"xmp": xmp(orientation)} if kind == "WEBP" else {"tiffinfo": {700: xmp(orientation)}}
            )
        else:
            options = {"exif": b"Exif\0\0" + exif(orientation)}
        data = encoded(PHOTO, kind, **options, **({"lossless": True} if kind == "WEBP" else {}))
        expected = np.asarray(as_opened(data))
        assert np.array_equal(decode(data), expected), orientation
        assert np.array_equal(decode(Encoding()(data).data), expected), orientation
        assert (expected.shape[0] == 32) == (orientation > 4)
