"""A CSV or Parquet table as a source: a row an image, by its path or URL, its class, and whatever else is known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.sources.folder import ReadFile
from pretrain.data.sources.source import Content, Integers, Source, SourceImage, counted
from pretrain.data.storage.index import NO_LABEL
from pretrain.data.storage.remote import FetchPolicy, fetch_bytes, is_remote
from pretrain.errors import DataError

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, Table

SUFFIXES = (".csv", ".tsv", ".parquet")
IMAGE_COLUMNS = ("path", "url", "image", "file_name", "filename", "file")
LABEL_COLUMNS = ("label", "class", "category", "target")


@dataclass(frozen=True)
class Columns:
    """Which columns to use; None takes the first of the usual names."""

    image: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class ReadRow:
    """Reads a row's image; the row's other columns are its metadata."""

    place: str
    metadata: dict[str, Any]
    policy: FetchPolicy

    def __call__(self) -> Content:
        if is_remote(self.place):
            return Content(fetch_bytes(self.place, self.policy), self.metadata, {})
        return Content(ReadFile(self.place)().image, self.metadata, {})


def list_table(
    path: Path,
    columns: Columns,
    class_names: Sequence[str] | None,
    labeled: bool,
    policy: FetchPolicy,
    listed: Callable[[int], None] = lambda _: None,
) -> Source:
    """List the rows of a table; a path is relative to the table's folder.

    Args:
        path: of a .csv (with a line of names), .tsv or .parquet file.
        columns: where the images and labels stand.
        class_names: in the order of the labels; else labels that are words give them, sorted, and numbers themselves.
        labeled: whether there are classes.
        policy: how patient to be with URLs.
        listed: called with the number of rows just seen.

    Raises:
        DataError: not readable, a column is missing, or labels are neither words nor whole numbers from 0.
    """
    table = _read(path)
    if not table.num_rows:
        raise DataError(f"{path}: has no rows")
    image_column = _column(path, table, columns.image, IMAGE_COLUMNS, "--image-column")
    label_column = _column(path, table, columns.label, LABEL_COLUMNS, "--label-column") if labeled else None
    places = table.column(image_column)
    if not _is_text(places):
        raise DataError(f"{path}: column {image_column} holds {places.type}; expected paths or URLs")
    no_image = _rows(places.is_null())
    no_label = _rows(table.column(label_column).is_null()) if label_column else []
    rows = np.setdiff1d(np.arange(table.num_rows), [*no_image, *no_label])
    table = table.take(rows)
    given: list[str] = table.column(image_column).to_pylist()
    labels, names = np.full(len(rows), NO_LABEL), list[str]()
    if label_column:
        labels, names = _labels(f"{path}: column {label_column}", table.column(label_column), class_names)
    others = [name for name in table.column_names if name not in (image_column, label_column)]

    def place(i: int) -> str:
        return given[i] if is_remote(given[i]) else str(path.parent / given[i])

    def image(i: int) -> SourceImage:
        metadata = {name: value for name in others if (value := table.column(name)[i].as_py()) is not None}
        return SourceImage(f"{rows[i]:09d}", int(labels[i]), given[i], ReadRow(place(i), metadata, policy))

    sizes = np.zeros(len(rows), np.int64)
    for i in range(len(rows)):
        sizes[i] = _size(place(i))
        listed(1)
    return Source(
        names,
        given,
        labels,
        sizes,
        image,
        faults=[
            *counted([f"row {row + 1}" for row in no_image], "row without an image", "rows without an image"),
            *counted([f"row {row + 1}" for row in no_label], "row without a label", "rows without a label"),
        ],
    )


def _read(path: Path) -> "Table":
    """Read a table. pyarrow is imported here, since most sources need none."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path)
        return csv.read_csv(path, parse_options=csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ","))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable table ({error})") from None


def _column(path: Path, table: "Table", asked: str | None, usual: Sequence[str], option: str) -> str:
    """Return the column that was asked for, else the first of the usual names."""
    for name in [asked] if asked else usual:
        if name in table.column_names:
            return name
    wanted = asked or " or ".join(usual)
    raise DataError(f"{path}: no column {wanted}; it has {', '.join(table.column_names)}. Name one with {option}")


def _labels(place: str, column: "ChunkedArray", class_names: Sequence[str] | None) -> tuple[Integers, list[str]]:
    """Return the labels as numbers, and the classes' names."""
    import pyarrow as pa

    if pa.types.is_integer(column.type):
        labels = column.to_numpy().astype(np.int64)
        if len(labels) and labels.min() < 0:
            raise DataError(f"{place}: has the label {labels.min()}; labels count from 0")
        highest = int(labels.max(initial=-1))
        if class_names is not None and highest >= len(class_names):
            raise DataError(f"{place}: label {highest} is out of range: there are {len(class_names)} class names")
        return labels, list(class_names) if class_names is not None else [str(i) for i in range(highest + 1)]
    if not _is_text(column):
        raise DataError(f"{place}: holds {column.type}; expected the classes' names, or whole numbers from 0")
    names = sorted(column.unique().to_pylist()) if class_names is None else list(class_names)
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted(set(column.unique().to_pylist()) - numbers.keys())
    if unknown:
        raise DataError(f"{place}: " + counted(unknown, "class without a name", "classes without a name")[0])
    return np.asarray([numbers[name] for name in column.to_pylist()], np.int64), names


def _is_text(column: "ChunkedArray") -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def _rows(mask: "ChunkedArray") -> list[int]:
    """Return the rows that are true."""
    return np.flatnonzero(mask.to_numpy()).tolist()


def _size(place: str) -> int:
    """Return the bytes of a local file; 0 where nobody knows, as of a URL, or of a file that is not there."""
    try:
        return 0 if is_remote(place) else Path(place).stat().st_size
    except OSError:
        return 0
