"""Where images come from before they are shards: a folder with a subfolder a class, or the digits of scikit-learn."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.data.index import DataError

KEPT = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
REENCODED = {".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
NAMES_SHOWN = 5


@dataclass(frozen=True)
class SourceImage:
    """An image before it is in a shard; `read` gives its encoded bytes."""

    key: str
    label: int
    extension: str
    origin: str
    read: Callable[[], bytes]


@dataclass
class Source:
    """Labelled images, and everything that was noticed while listing them."""

    class_names: list[str]
    images: list[SourceImage]
    remarks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def list_source(name: str) -> Source:
    """List the images of `name`: a folder's path, or `digits`."""
    if name == "digits" and not Path(name).exists():
        return list_digits()
    return list_folder(Path(name))


def list_folder(folder: Path) -> Source:
    """List a folder that has a subfolder for each class; files below it at any depth belong to the class."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (the built-in source is called digits)")
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    class_names = [name for name in folders if not name.startswith(".")]
    if not class_names:
        raise DataError(f"{folder}: has no subfolders; expected one for each class, as in {folder}/cat/1.jpg")
    source = Source(class_names, [])
    stray = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    others: list[str] = []
    twice: list[str] = []
    empty: list[str] = []
    unnameable: list[str] = []
    unlisted: list[str] = []
    seen: dict[str, str] = {}
    for label, class_name in enumerate(class_names):
        before = len(source.images)
        for path in _files_below(folder / class_name, unlisted):
            suffix = path.suffix.lower()
            if not str(path).isprintable():
                unnameable.append(ascii(str(path.relative_to(folder))))
                continue
            if suffix not in KEPT and suffix not in REENCODED:
                others.append(str(path.relative_to(folder)))
                continue
            key = str(path.relative_to(folder).with_suffix("")).replace(".", "_")
            if key in seen:
                twice.append(f"{path.relative_to(folder)} (as {seen[key]})")
                continue
            seen[key] = str(path.relative_to(folder))
            read = path.read_bytes if suffix in KEPT else _Reencode(path)
            source.images.append(SourceImage(key, label, KEPT.get(suffix, "png"), seen[key], read))
        if len(source.images) == before:
            empty.append(class_name)
    images_outside = [name for name in stray if Path(name).suffix.lower() in KEPT.keys() | REENCODED]
    others += [name for name in stray if name not in images_outside]
    source.remarks += _counted(others, "not an image, left out", "not images, left out")
    hidden = [name for name in folders if name not in class_names]
    source.remarks += _counted(hidden, "hidden folder, left out", "hidden folders, left out")
    source.faults += _counted(unlisted, "folder that cannot be listed", "folders that cannot be listed")
    source.faults += _counted(images_outside, "image outside of any class", "images outside of any class")
    source.faults += _counted(twice, "image with a key already taken", "images with keys already taken")
    source.faults += _counted(unnameable, "name that is not readable text", "names that are not readable text")
    source.faults += _counted(empty, "class without images", "classes without images")
    return source


def _files_below(folder: Path, unlisted: list[str], above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield every file at any depth, links followed; a link to nowhere is listed too, and fails when it is read."""
    here = folder.resolve()
    if here in above:
        unlisted.append(f"{folder} (links to a folder above it)")
        return
    try:
        found = [(path, path.is_dir()) for path in sorted(folder.iterdir())]
    except OSError as error:
        unlisted.append(f"{folder} ({error.strerror})")
        return
    for path, is_folder in found:
        if is_folder:
            yield from _files_below(path, unlisted, (*above, here))
        else:
            yield path


def list_digits() -> Source:
    """List scikit-learn's 1,797 handwritten digits as PNGs of 32 x 32 pixels (UCI ML hand-written digits)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [
        SourceImage(f"{label}/{i:04d}", int(label), "png", f"sklearn.datasets.load_digits()[{i}]", _DigitPng(pixels))
        for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True))
    ]
    return Source([str(name) for name in digits.target_names], images)


def keep_classes(source: Source, names: Sequence[str]) -> Source:
    """Keep only some classes; their labels are counted anew from 0, in the source's order."""
    unknown = [name for name in names if name not in source.class_names]
    if unknown:
        raise DataError(f"no class {', '.join(unknown)}; the classes are {', '.join(source.class_names)}")
    kept = [name for name in source.class_names if name in names]
    labels = {source.class_names.index(name): label for label, name in enumerate(kept)}
    images = [
        SourceImage(image.key, labels[image.label], image.extension, image.origin, image.read)
        for image in source.images
        if image.label in labels
    ]
    return Source(kept, images, source.remarks, source.faults)


@dataclass(frozen=True)
class _Reencode:
    """Reads a file that training does not, as a PNG."""

    path: Path

    def __call__(self) -> bytes:
        with Image.open(self.path) as image:
            return _png(image)


@dataclass(frozen=True)
class _DigitPng:
    """A digit, 8 x 8 values of 0 to 16, as a PNG."""

    pixels: "np.ndarray[tuple[int, int], np.dtype[np.float64]]"

    def __call__(self) -> bytes:
        image = Image.fromarray(np.round(self.pixels * (255 / 16)).astype(np.uint8))
        return _png(image.resize((32, 32), Image.Resampling.BICUBIC))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _counted(names: list[str], one: str, many: str) -> list[str]:
    """Return one line that counts and names, or none."""
    if not names:
        return []
    shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
    return [f"{len(names)} {one if len(names) == 1 else many}: {shown}"]
