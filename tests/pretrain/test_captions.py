"""Captions fit into their boxes, and lose no letter unless the box is too small for the smallest font."""

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.captions import ELLIPSIS, MIN_SIZE, caption_of_class, fit, plain

WORDS = st.text("abcXYZ_-/ é鳥", max_size=80)


@settings(max_examples=60)
@given(WORDS, st.integers(30, 300), st.integers(MIN_SIZE, 30), st.integers(12, 200) | st.none())
def test_a_caption_stays_in_its_box_with_all_of_its_letters(
    text: str, width: int, size: int, height: int | None
) -> None:
    caption = fit(text, width, size, height)
    assert caption.width <= width
    assert caption.size <= size
    letters, expected = (re.sub(r"\s", "", part) for part in ("".join(caption.lines), plain(text)))
    if letters != expected:
        assert height is not None
        assert caption.size == MIN_SIZE
        assert letters.endswith(ELLIPSIS)
        assert expected.startswith(letters.removesuffix(ELLIPSIS))
    box = caption.height if height is None else height
    page = Image.new("RGB", (width + 40, box + 40), "white")
    caption.draw(page, 20, 20, width, box)
    pixels = np.asarray(page).copy()
    assert pixels.min() < 255 or not expected
    pixels[20 : 20 + box, 19 : 21 + width] = 255
    assert pixels.min() == 255


def test_lines_break_between_words_and_long_words_only_where_they_must() -> None:
    assert fit("visible patches", 200, 12).lines == ["visible patches"]
    assert fit("visible patches", 70, 12).lines == ["visible", "patches"]
    assert fit("n0123_tabby_cat", 70, 12).lines == ["n0123_", "tabby_cat"]
    smaller = fit("reconstruction", 70, 12)
    assert (smaller.lines, smaller.size) == (["reconstruction"], 10)
    broken = fit("reconstruction", 40, 12)
    assert broken.size == 12
    assert "".join(broken.lines) == "reconstruction"


def test_letters_that_the_font_lacks_are_replaced() -> None:
    assert plain("Café Zoë\n") == "Cafe Zoe?"
    assert caption_of_class("Café?", 3) == "Café?"
    assert caption_of_class("鳥", 3) == "class 3"
