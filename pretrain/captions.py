"""Captions in pictures, in Pillow's own scalable font, which has the characters of ASCII only."""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

INK = (34, 48, 60)
MIN_SIZE = 8  # pixels; smaller text cannot be read
ELLIPSIS = "…"


@dataclass(frozen=True)
class Caption:
    """Text that has been broken into lines, so that it fits into a box.

    Attributes:
        lines: Lines of the text.
        size: Size of the font in pixels.
    """

    lines: list[str]
    size: int

    @property
    def line_height(self) -> int:
        """Height of a line in pixels."""
        return sum(load_font(self.size).getmetrics())

    @property
    def height(self) -> int:
        """Height of all lines in pixels."""
        return len(self.lines) * self.line_height

    @property
    def width(self) -> int:
        """Width of the longest line in pixels."""
        return max((_width(line, self.size) for line in self.lines), default=0)

    def draw(self, image: Image.Image, left: int, top: int, width: int, height: int) -> None:
        """Draw the text into the middle of a box of an image."""
        draw, font = ImageDraw.Draw(image), load_font(self.size)
        top += (height - self.height) // 2
        for number, line in enumerate(self.lines):
            start = left + (width - _width(line, self.size)) // 2
            draw.text((start, top + number * self.line_height), line, INK, font)


def fit(text: str, width: int, size: int, height: int | None = None) -> Caption:
    """Break a text into lines, and make it smaller, until it fits.

    Words are broken only if they do not fit in three quarters of the size, and the rest of the text is replaced by an
    ellipsis only if all of it does not fit in the smallest size.

    Args:
        text: Text to draw.
        width: Width of the box in pixels.
        size: Size of the font in pixels, unless it must be smaller.
        height: Height of the box in pixels, or None if any is available.
    """
    text = plain(text)
    sizes = range(size, MIN_SIZE - 1, -1)
    attempts = [(each, False) for each in sizes if each >= 0.75 * size] + [(each, True) for each in sizes]
    for each, breaks_words in attempts:
        caption = Caption(_break(text, width, each, breaks_words=breaks_words), each)
        if caption.width <= width and (height is None or caption.height <= height):
            return caption
    assert height is not None  # a broken text fits into any width
    lines = caption.lines[: max(1, height // caption.line_height)]
    while lines[-1] and _width(lines[-1] + ELLIPSIS, MIN_SIZE) > width:
        lines[-1] = lines[-1][:-1]
    return Caption([*lines[:-1], lines[-1] + ELLIPSIS], MIN_SIZE)


def plain(text: str) -> str:
    """Return a text without accents, and with a question mark for each character that the font lacks."""
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in letters)


def caption_of_class(name: str, label: int) -> str:
    """Return the name of a class, or its number where the font lacks the letters of its name."""
    return name if "?" not in plain(name.replace("?", "")) else f"class {label}"


@lru_cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load Pillow's own font in a size in pixels."""
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # without FreeType, Pillow raises an error
    return font


def _width(text: str, size: int) -> int:
    return round(load_font(size).getlength(text) + 0.5)


def _break(text: str, width: int, size: int, *, breaks_words: bool) -> list[str]:
    """Break a text after spaces, underscores, hyphens and slashes; words that are too wide, after any character."""
    lines = [""]
    for word in re.findall(r"[^\s_/-]*[\s_/-]?", text):
        is_too_wide = breaks_words and _width(word.rstrip(), size) > width
        for part in word if is_too_wide else [word]:
            if lines[-1] and _width((lines[-1] + part).rstrip(), size) > width:
                lines.append("")
            lines[-1] += part
    return [line.strip() for line in lines]
