"""Images are stored with their original bytes if training can read them, else as Pillow would convert them."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from pretrain.data.shards.encoding import Encoding
from pretrain.data.transforms.decode import DecodeError, decode

PHOTO = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_readable_formats_keep_their_bytes(kind: str, extension: str) -> None:
    data = encoded(PHOTO, kind)
    assert Encoding()(data)[:4] == (data, extension, 640, 427)
    assert Encoding(shorter_side=427)(data).data == data  # already small enough
    assert Encoding(format=extension)(data).data == data  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF"])
def test_other_formats_become_png_with_the_same_pixels(kind: str) -> None:
    data = encoded(PHOTO, kind)
    stored = Encoding()(data)
    assert stored.extension == "png"
    assert np.array_equal(decode(stored.data), decode(data))


def test_resizing_uses_pillows_bicubic() -> None:
    stored = Encoding(shorter_side=200, format="png")(encoded(PHOTO, "PNG"))
    assert (stored.width, stored.height) == (300, 200)
    assert np.array_equal(decode(stored.data), np.asarray(PHOTO.resize((300, 200), Image.Resampling.BICUBIC)))


def test_rotated_jpeg_is_stored_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    stored = Encoding(shorter_side=200, quality=95)(encoded(PHOTO, "JPEG", exif=exif))
    assert (stored.extension, stored.width, stored.height) == ("jpg", 200, 300)
    expected = PHOTO.transpose(Image.Transpose.ROTATE_270).resize((200, 300), Image.Resampling.BICUBIC)
    assert np.abs(decode(stored.data).astype(int) - np.asarray(expected)).mean() < 4  # of 255; two lossy encodings


def test_quality_and_format_are_applied() -> None:
    data = encoded(PHOTO, "PNG")
    sizes = [len(Encoding(format="jpg", quality=quality)(data).data) for quality in (50, 90)]
    assert sizes[0] < sizes[1] < len(data)
    webp = Encoding(format="webp")(data)
    assert (webp.extension, Image.open(io.BytesIO(webp.data)).format) == ("webp", "WEBP")


def test_extreme_aspect_ratio_keeps_the_shorter_side() -> None:
    stored = Encoding(shorter_side=7, format="png")(encoded(Image.new("RGB", (8, 4000)), "PNG"))
    assert (stored.width, stored.height) == (7, 3500)


def test_file_that_is_not_an_image_is_refused() -> None:
    with pytest.raises(DecodeError, match="not an image"):
        Encoding(shorter_side=64)(b"no image at all")
