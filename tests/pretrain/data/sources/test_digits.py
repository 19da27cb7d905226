"""The built-in digits show the digits of scikit-learn."""

import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pretrain.data.sources.digits import list_digits


def test_pngs_of_digits_are_the_digits() -> None:
    source = list_digits()
    digit = Image.open(io.BytesIO(source.image(7).read().image))
    small = np.asarray(digit.resize((8, 8), Image.Resampling.BOX), dtype=float) / 255 * 16
    assert np.corrcoef(small.ravel(), load_digits().images[7].ravel())[0, 1] > 0.98
