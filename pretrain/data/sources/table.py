"""A CSV or Parquet table as a source: each row has the path or URL of an image, its class and optional metadata."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.sources.folder import ReadFile
from pretrain.data.sources.source import Content, Integers, Source, SourceImage, summarize
from pretrain.data.storage.index import NO_LABEL
from pretrain.data.storage.remote import FetchPolicy, fetch_bytes, is_remote
from pretrain.errors import DataError
from pretrain.files import text_encoding

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, Table

SUFFIXES = (".csv", ".tsv", ".parquet")
IMAGE_COLUMNS = ("path", "url", "image", "file_name", "filename", "file")
LABEL_COLUMNS = ("label", "class", "category", "target")


@dataclass(frozen=True)
class Columns:
    """Columns of a table.

    Args:
        image: Column with the paths or URLs; None takes the first column named in IMAGE_COLUMNS.
        label: Column with the classes; None takes the first column named in LABEL_COLUMNS.
    """

    image: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class ReadRow:
    """A callable that reads the image of one row.

    Args:
        path: Path or URL of the image.
        metadata: Values of the row's other columns.
        policy: Timeouts for a URL.
    """

    path: str
    metadata: dict[str, Any]
    policy: FetchPolicy

    def __call__(self) -> Content:
        if is_remote(self.path):
            return Content(fetch_bytes(self.path, self.policy), self.metadata, {})
        return Content(ReadFile(self.path)().image, self.metadata, {})


def list_table(
    path: Path,
    columns: Columns,
    class_names: Sequence[str] | None,
    labeled: bool,
    policy: FetchPolicy,
    progress: Callable[[int], None] = lambda _: None,
) -> Source:
    """List the rows of a table. Relative paths start at the table's folder.

    Args:
        path: Path of a .csv, .tsv (both with a header line) or .parquet file; upper case is possible.
        columns: Columns of the images and labels.
        class_names: Names of the classes in the order of the labels. None takes the sorted names from a column of text,
            or uses the numbers of a column of numbers.
        labeled: Whether the images have classes.
        policy: Timeouts for URLs.
        progress: Function called with the number of rows listed since the last call.

    Raises:
        DataError: If the table has no rows, or the image column holds neither paths nor URLs.
    """
    table = _read(path, columns)
    if not table.num_rows:
        raise DataError(f"{path}: has no rows; check that this is the right table")
    image_column = _column(path, table, columns.image, IMAGE_COLUMNS, "--image-column")
    label_column = _column(path, table, columns.label, LABEL_COLUMNS, "--label-column") if labeled else None
    paths = table.column(image_column)
    if not _is_text(paths):
        raise DataError(f"{path}: column {image_column} contains {paths.type}; expected paths or URLs")
    no_image = _rows(paths.is_null())
    no_label = _rows(table.column(label_column).is_null()) if label_column else []
    rows = np.setdiff1d(np.arange(table.num_rows), [*no_image, *no_label])
    table = table.take(rows)
    given: list[str] = table.column(image_column).to_pylist()
    labels, names = np.full(len(rows), NO_LABEL), list[str]()
    if label_column:
        labels, names = _labels(f"{path}: column {label_column}", table.column(label_column), class_names)
    others = [name for name in table.column_names if name not in (image_column, label_column)]

    def full_path(i: int) -> str:
        return given[i] if is_remote(given[i]) else str(path.parent / given[i])

    def image(i: int) -> SourceImage:
        metadata = {name: value for name in others if (value := table.column(name)[i].as_py()) is not None}
        return SourceImage(f"{rows[i]:09d}", int(labels[i]), given[i], ReadRow(full_path(i), metadata, policy))

    sizes = np.zeros(len(rows), np.int64)
    for i in range(len(rows)):
        sizes[i] = _size(full_path(i))
        progress(1)
    return Source(
        names,
        given,
        labels,
        sizes,
        image,
        problems=[
            *summarize([f"row {row + 1}" for row in no_image], "row without an image", "rows without an image"),
            *summarize([f"row {row + 1}" for row in no_label], "row without a label", "rows without a label"),
        ],
    )


def is_table(path: Path) -> bool:
    """Return whether a file is a table by its name."""
    return path.suffix.lower() in SUFFIXES


def _read(path: Path, columns: Columns) -> "Table":
    """Read a table. pyarrow is imported here because most sources do not need it."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.read_table(path) if path.suffix.lower() == ".parquet" else _read_csv(path, columns)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable table ({error}); save it again as .csv, .tsv or .parquet") from None


def _read_csv(path: Path, columns: Columns) -> "Table":
    """Read a .csv or .tsv file. An empty field is a missing value.

    Images and labels are the text of the file, such as true, 1.0 or 12:30. Labels become numbers only if all are whole
    numbers. Codes such as 01 stay text in all columns.
    """
    import pyarrow as pa
    from pyarrow import csv

    def read(**options: Any) -> "Table":
        return csv.read_csv(
            path,
            csv.ReadOptions(encoding=text_encoding(path)),
            csv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True),
            csv.ConvertOptions(null_values=[""], strings_can_be_null=True, **options),
        )

    image_columns = [columns.image] if columns.image else IMAGE_COLUMNS
    label_columns = [columns.label] if columns.label else LABEL_COLUMNS
    table = read(column_types=dict.fromkeys([*image_columns, *label_columns], pa.string()))
    for name in set(label_columns).intersection(table.column_names).difference(image_columns):
        with contextlib.suppress(pa.ArrowInvalid):  # not all are numbers
            labels = table.column(name).cast(pa.int64())
            if labels.cast(pa.string()).equals(table.column(name)):
                table = table.set_column(table.column_names.index(name), name, labels)
    numbers = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    if numbers:
        texts = read(include_columns=numbers, column_types=dict.fromkeys(numbers, pa.string()))
        for name in numbers:
            if not table.column(name).cast(pa.string()).equals(texts.column(name)):
                table = table.set_column(table.column_names.index(name), name, texts.column(name))
    return table


def _column(path: Path, table: "Table", requested: str | None, defaults: Sequence[str], option: str) -> str:
    """Return the requested column, or the first default name that the table has."""
    for name in [requested] if requested else defaults:
        if name in table.column_names:
            return name
    wanted = requested or " or ".join(defaults)
    columns = ", ".join(table.column_names)
    raise DataError(f"{path}: no column {wanted}; name one of its columns with {option}: {columns}")


def _labels(name: str, column: "ChunkedArray", class_names: Sequence[str] | None) -> tuple[Integers, list[str]]:
    """Return the labels as numbers [N], and the names of the classes."""
    import pyarrow as pa

    if pa.types.is_integer(column.type):
        labels = column.to_numpy().astype(np.int64)
        if len(labels) and labels.min() < 0:
            raise DataError(f"{name}: has the label {labels.min()}; labels must start at 0")
        highest = int(labels.max(initial=-1))
        if class_names is not None and highest >= len(class_names):
            raise DataError(
                f"{name}: label {highest} is out of range because there are {len(class_names)} class names; "
                "add a line for every label to the --class-names file"
            )
        return labels, list(class_names) if class_names is not None else [str(i) for i in range(highest + 1)]
    if not _is_text(column):
        raise DataError(f"{name}: contains {column.type}; expected class names, or whole numbers from 0")
    names = sorted(column.unique().to_pylist()) if class_names is None else list(class_names)
    numbers = {class_name: number for number, class_name in enumerate(names)}
    unknown = sorted(set(column.unique().to_pylist()) - numbers.keys())
    if unknown:
        [sentence] = summarize(unknown, "class is missing from --class-names", "classes are missing from --class-names")
        raise DataError(f"{name}: {sentence}; add a line for each")
    return np.asarray([numbers[class_name] for class_name in column.to_pylist()], np.int64), names


def _is_text(column: "ChunkedArray") -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def _rows(mask: "ChunkedArray") -> list[int]:
    """Return the positions of the true values."""
    return np.flatnonzero(mask.to_numpy()).tolist()


def _size(path: str) -> int:
    """Return the size of a local file in bytes; 0 for a URL or a missing file."""
    try:
        return 0 if is_remote(path) else Path(path).stat().st_size
    except OSError:
        return 0
