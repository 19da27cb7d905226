"""scikit-learn's handwritten digits as a source: data for tests and first runs that needs no download."""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pretrain.data.sources.source import Content, Source, SourceImage


def list_digits() -> Source:
    """List scikit-learn's 1,797 handwritten digits as PNGs of 32 x 32 pixels (UCI ML hand-written digits)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pngs, labels = [_digit_png(pixels) for pixels in digits.images], digits.target.astype(np.int64)
    names = [f"sklearn.datasets.load_digits()[{i}]" for i in range(len(pngs))]

    def image(i: int) -> SourceImage:
        return SourceImage(f"{labels[i]}/{i:04d}", int(labels[i]), names[i], _ReadMemory(pngs[i]))

    return Source([str(name) for name in digits.target_names], names, labels, np.asarray(list(map(len, pngs))), image)


@dataclass(frozen=True)
class _ReadMemory:
    """A callable that returns an image from memory."""

    data: bytes

    def __call__(self) -> Content:
        return Content(self.data, {}, {})


def _digit_png(pixels: npt.NDArray[np.float64]) -> bytes:
    """Encode a digit, 8 x 8 values from 0 to 16, as a PNG."""
    image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
    buffer = io.BytesIO()
    image.resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()
