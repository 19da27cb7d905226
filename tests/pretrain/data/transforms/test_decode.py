"""Decoding gives Pillow's pixels for every format, and refuses damaged or hostile files."""

import io
import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from sklearn.datasets import load_sample_image

from pretrain.data.shards.encoding import Encoding
from pretrain.data.transforms import decode as decode_module
from pretrain.data.transforms.decode import (
    DecodeError,
    DeepImageError,
    EncodedJpeg,
    count_bits,
    decode,
    decode_unless_jpeg,
    is_image,
    scale_grayscale,
)

Deep = npt.NDArray[np.uint16]
PHOTO = Image.fromarray(load_sample_image("flower.jpg")[:90, :130])


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_lossless_formats_decode_to_the_original_pixels() -> None:
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {})):
        assert np.array_equal(decode(encoded(PHOTO, kind, **options)), np.asarray(PHOTO))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpeg_equals_pillow(subsampling: int) -> None:
    data = encoded(PHOTO, "JPEG", quality=92, subsampling=subsampling)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert abs(decode(data).astype(int) - theirs).mean() < 0.1  # two builds of libjpeg-turbo round alike, nearly


def test_all_modes_decode_to_rgb() -> None:
    grayscale = PHOTO.convert("L")
    assert np.array_equal(decode(encoded(grayscale, "PNG")), np.asarray(grayscale.convert("RGB")))
    assert decode(encoded(grayscale, "JPEG")).shape == (90, 130, 3)
    palette = PHOTO.convert("P")
    assert np.array_equal(decode(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    cmyk = decode(encoded(PHOTO.convert("CMYK"), "JPEG", quality=95)).astype(int)
    assert abs(cmyk - np.asarray(PHOTO).astype(int)).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_grayscale_is_refused_or_scaled(kind: str) -> None:
    deep = encoded(Image.fromarray(np.full((4, 5), 0x8000, dtype=np.uint16)), kind)
    with pytest.raises(DeepImageError, match="convert it to 8 bits with vitrail shards make"):
        decode(deep)
    assert np.unique(decode(deep, scales=True)).tolist() == [0x80]
    stored = Encoding()(deep)
    assert stored.extension == "png"
    assert np.unique(decode(stored.data)).tolist() == [0x80]
    for dtype in (np.int32, np.float32):
        with pytest.raises(DecodeError, match="grayscale of 32 bits"):
            decode(encoded(Image.fromarray(np.ones((4, 5), dtype)), "TIFF"), scales=True)


def test_transparency_is_blended_with_white() -> None:
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert decode(encoded(half, "PNG"))[0, 0].tolist() == [255, 127, 127]
    assert decode(encoded(Image.new("LA", (4, 4), (0, 0)), "PNG"))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PHOTO, "JPEG", quality=95, exif=exif)
    upright = {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1, 7: 1, 8: 1}[orientation]
    assert decode(data).shape == ((130, 90, 3) if upright else (90, 130, 3))
    assert isinstance(decode_unless_jpeg(data), EncodedJpeg) == (orientation == 1)
    if orientation == 6:
        turned = np.rot90(np.asarray(PHOTO), k=-1).astype(int)
        assert abs(decode(data).astype(int) - turned).mean() < 3


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_other_bytes_are_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_image_is_a_decode_error(kind: str) -> None:
    data = encoded(PHOTO, kind)
    with pytest.raises(DecodeError):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decompression_bomb_is_refused_before_decoding(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 90 * 130 - 1)
    with pytest.raises(DecodeError, match="130 x 90 pixels, more than the limit"):
        decode(encoded(PHOTO, kind))


def segment(marker: int, payload: bytes) -> bytes:
    """A segment of a JPEG's header."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


EXIF_6 = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
XMP_6 = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
HEADERS = {
    "first": segment(0xE1, EXIF_6),
    "behind others": segment(0xED, b"Photoshop 3.0\0" + bytes(60_000)) + segment(0xFE, b"note") + segment(0xE1, EXIF_6),
    "behind fill bytes": b"\xff\xff" + segment(0xE1, EXIF_6),
    "XMP": segment(0xE1, XMP_6),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_orientation_is_found_wherever_it_stands(header: bytes) -> None:
    data = encoded(PHOTO, "JPEG", quality=95)
    data = data[:2] + header + data[2:]
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert upright.size == (90, 130)
    assert abs(decode(data).astype(int) - np.asarray(upright).astype(int)).mean() < 0.1
    assert not isinstance(decode_unless_jpeg(data), EncodedJpeg)


def test_good_pixels_are_taken_whatever_is_broken_beside_them() -> None:
    jpeg, png = encoded(PHOTO, "JPEG"), encoded(PHOTO, "PNG")
    broken_exif, broken_profile = (
        segment(0xE1, b"Exif\0\0II*\0\xff\xff"),
        segment(0xE2, b"ICC_PROFILE\0\x01\x02" + bytes(40)),
    )
    assert np.array_equal(decode(jpeg[:-2] + bytes(99) + jpeg[-2:]), decode(jpeg))
    for broken in (broken_exif, broken_profile):
        assert np.array_equal(decode(jpeg[:2] + broken + jpeg[2:]), decode(jpeg))
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * (2 << 20), zip=True)
    assert np.array_equal(decode(encoded(PHOTO, "PNG", pnginfo=text)), decode(png))
    assert np.array_equal(decode(encoded(PHOTO, "PNG", icc_profile=bytes(2 << 20))), decode(png))
    turned = Image.Exif()
    turned[0x0112] = 6
    assert decode(encoded(PHOTO, "PNG", exif=turned, pnginfo=text)).shape == (130, 90, 3)


def test_damaged_pixels_are_still_refused() -> None:
    data = bytearray(encoded(PHOTO, "JPEG"))
    start = data.index(b"\xff\xda") + 40
    data[start : start + 200] = bytes(200)
    with pytest.raises(DecodeError):
        decode(bytes(data))
    png = bytearray(encoded(PHOTO, "PNG"))
    png[png.index(b"IDAT") + 20] ^= 0x55
    with pytest.raises(DecodeError):
        decode(bytes(png))


@pytest.mark.parametrize(("highest", "bits"), [(200, 8), (1023, 10), (4095, 12), (5000, 14), (65535, 16)])
def test_deep_grayscale_is_scaled_by_the_bits_that_it_uses(highest: int, bits: int) -> None:
    values = np.linspace(0, highest, 4 * 5).round().astype(np.uint16).reshape(4, 5)
    data = encoded(Image.fromarray(values), "PNG")
    assert np.array_equal(decode(data, scales=True)[..., 0], values >> (bits - 8))


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def deep_png(values: Deep) -> bytes:
    """Encode 16-bit values [H, W, 2 to 4] as a PNG, which Pillow cannot."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def deep_tiff(
    values: Deep,
    order: str,
    photometric: int = 2,
    extra_samples: int | None = None,
    *,
    is_packed: bool = False,
    has_planes: bool = False,
) -> bytes:
    """Encode 16-bit values [H, W, C] as a TIFF of a byte order, which Pillow cannot."""
    height, width, channels = values.shape
    planes = [values[..., channel] for channel in range(channels)] if has_planes else [values]
    strips = [plane.astype(f"{order}u2").tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if is_packed else strips
    fields = {
        256: ("H", [width]),
        257: ("H", [height]),
        258: ("H", [16] * channels),
        259: ("H", [8 if is_packed else 1]),
        262: ("H", [photometric]),
        273: ("I", [0] * len(strips)),  # offsets, which are known below
        277: ("H", [channels]),
        278: ("H", [height]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [2 if has_planes else 1]),
    }
    if extra_samples is not None:
        fields[338] = ("H", [extra_samples])
    place = 8 + 2 + 12 * len(fields) + 4  # of the lists that do not fit into the fields, after which the strips follow
    start = place + sum(size for kind, items in fields.values() if (size := struct.calcsize(kind) * len(items)) > 4)
    fields[273] = ("I", [start + sum(map(len, strips[:number])) for number in range(len(strips))])
    entries, lists = b"", b""
    for tag, (kind, items) in fields.items():
        packed = struct.pack(f"{order}{len(items)}{kind}", *items)
        inline = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(f"{order}I", place + len(lists))
        entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(items)) + inline
        lists += packed if len(packed) > 4 else b""
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(fields))
    return header + entries + bytes(4) + lists + b"".join(strips)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([8, 10, 12, 14, 16]), st.sampled_from(["gray", "PNG", "II", "MM"]), st.integers(0, 10**6))
def test_values_of_any_depth_in_16_bits_are_scaled_by_their_range(bits: int, kind: str, seed: int) -> None:
    shape = (3, 4) if kind == "gray" else (3, 4, 3)
    values = np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(np.uint16)
    values[0, 0] = (1 << bits) - 1
    if kind == "gray":
        data = encoded(Image.fromarray(values), "PNG")
    else:
        data = deep_png(values) if kind == "PNG" else deep_tiff(values, {"II": "<", "MM": ">"}[kind])
    expected = np.broadcast_to((values >> (bits - 8)).reshape(3, 4, -1), (3, 4, 3))
    assert np.array_equal(decode(data, scales=True), expected)
    assert count_bits(data) == (8 if bits == 16 and kind != "gray" else bits)
    if bits < 16:  # of color that uses all bits, Pillow and transformers take the upper 8
        with pytest.raises(DeepImageError, match="convert it to 8 bits with vitrail shards make"):
            decode(data)
        assert np.array_equal(decode(Encoding()(data).data), expected)


def test_transparency_of_16_bits_is_scaled_by_itself() -> None:
    values = np.full((2, 2, 4), 4095, np.uint16)
    values[..., 3] = 65535
    values[0, 0] = (4095, 0, 0, 32768)
    assert decode(deep_png(values), scales=True)[0].tolist() == [[255, 127, 127], [255, 255, 255]]
    assert decode(deep_png(np.zeros((2, 2, 3), np.uint16))).tolist() == np.zeros((2, 2, 3)).tolist()


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_gray_with_transparency_of_16_bits_is_scaled(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, (5, 7, 2)).astype(np.uint16)
    values[0, 0], values[..., 1] = (1 << bits) - 1, 65535
    expected = np.repeat(values[..., :1] >> (bits - 8), 3, axis=2)
    assert np.array_equal(decode(deep_png(values), scales=True), expected)
    if bits < 16:
        with pytest.raises(DeepImageError, match=f"color of {bits} bits"):
            decode(deep_png(values))
    else:
        assert np.array_equal(decode(deep_png(values)), expected)
    assert decode(deep_png(np.full((2, 2, 2), [4095, 32768], np.uint16)), scales=True)[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_other_color_of_16_bits_is_scaled_or_refused(order: str, is_packed: bool) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (3, 4, 4)).astype(np.uint16)
    values[0, 0] = 4095
    ignored = deep_tiff(values, order, extra_samples=0, is_packed=is_packed)
    assert np.array_equal(decode(ignored, scales=True), values[..., :3] >> 4)
    with pytest.raises(DeepImageError, match="color of 12 bits"):
        decode(ignored)
    for kind, tags in (("color with premultiplied transparency", (2, 1)), ("CMYK", (5, None))):
        message = f"16-bit {kind} that uses only 12 bits; convert it to 8 bits"
        for scales in (False, True):
            with pytest.raises(DecodeError, match=message):
                decode(deep_tiff(values, order, *tags, is_packed=is_packed), scales=scales)
            assert decode(deep_tiff(values << 4, order, *tags, is_packed=is_packed), scales=scales).shape == (3, 4, 3)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("channels", "photometric", "extra"), [(3, 2, None), (4, 2, 0), (4, 2, 1), (4, 5, None)])
def test_planes_of_16_bits_are_right_or_refused(order: str, channels: int, photometric: int, extra: int | None) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 16, (3, 4, channels)).astype(np.uint16)
    values[0, 0] = 65535
    for is_packed, bits in itertools.product((False, True), (12, 16)):
        data = deep_tiff(values >> (16 - bits), order, photometric, extra, is_packed=is_packed, has_planes=True)
        if is_packed and bits == 16 and photometric == 2 and extra != 1:
            assert np.array_equal(decode(data), values[..., :3] >> 8)
            continue
        for scales in (False, True):
            with pytest.raises(DecodeError):
                decode(data, scales=scales)


def test_deep_grayscale_whose_zero_is_white_is_refused() -> None:
    image = Image.fromarray(np.full((4, 5), 60_000, np.uint16))
    data = bytearray(encoded(image, "TIFF"))
    place = data.index(struct.pack("<HHI", 262, 3, 1)) + 8
    assert data[place] == 1
    data[place] = 0
    for scales in (False, True):
        with pytest.raises(DecodeError, match="16-bit grayscale whose 0 is white; convert it to 8 bits"):
            decode(bytes(data), scales=scales)
    with pytest.raises(DecodeError, match="16-bit grayscale whose 0 is white"):
        scale_grayscale(Image.open(io.BytesIO(bytes(data))))


def test_a_gray_map_of_16_bits_is_scaled() -> None:
    """Pillow opens it as 32 bits, scaled from the range that the file states."""
    values = np.arange(0, 4096, 205, np.uint16)
    data = b"P5 20 1 4095\n" + values.astype(">u2").tobytes()
    assert abs(decode(data, scales=True)[0, :, 0] - values / 4095 * 255).max() < 1
    with pytest.raises(DeepImageError, match="16-bit grayscale, which transformers would turn white"):
        decode(data)


def test_an_image_that_cannot_be_read_here_is_named() -> None:
    with pytest.raises(DecodeError, match="JPEG XL image, which Pillow cannot read; convert it to PNG or JPEG"):
        decode(b"\xff\x0a" + bytes(40))
    with pytest.raises(DecodeError, match="not an image of a known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would start Ghostscript


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "TGA", "PPM", "HEIF"]
)
def test_every_format_is_an_image(kind: str, tmp_path: Path) -> None:
    picture = PHOTO.resize((64, 64))
    (tmp_path / "image").write_bytes(encoded(picture, kind))
    assert is_image(tmp_path / "image")
    assert decode(encoded(picture, kind)).shape == (64, 64, 3)
