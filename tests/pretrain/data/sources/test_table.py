"""Tables of images: rows become samples, and no row is lost silently."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import csv, parquet

from benchmarks.unreliable_server import UnreliableServer, serve
from pretrain.data.sources.open import SourceOptions, list_source
from pretrain.data.sources.source import Source
from pretrain.data.sources.table import Columns, list_table
from pretrain.data.storage.index import NO_LABEL
from pretrain.data.storage.remote import FetchPolicy
from pretrain.data.storage.webdataset import read_class_names
from pretrain.errors import DataError


def listed(path: Path, image: str | None = None, label: str | None = None, **options: object) -> Source:
    settings = {"class_names": None, "labeled": True, "policy": FetchPolicy(), **options}
    return list_table(path, Columns(image, label), **settings)  # type: ignore[arg-type]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for i in range(6):
        Image.new("RGB", (8 + i, 8), (i, 0, 0)).save(tmp_path / "in" / f"{i}.png")
    return tmp_path


def write(path: Path, columns: dict[str, list[object]]) -> Path:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        csv.write_csv(table, path, csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ","))
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_rows_become_samples(images: Path, suffix: str) -> None:
    columns: dict[str, list[object]] = {
        "path": [f"in/{i}.png" for i in range(6)],
        "class": ["owl", "cat", "owl", "dog", "cat", "owl"],
        "caption": ["an owl, at night", "a cat", None, "ein Hund", "猫", "x"],
    }
    source = listed(write(images / f"t.{suffix}", columns))
    assert source.class_names == ["cat", "dog", "owl"]
    assert source.labels.tolist() == [2, 0, 2, 1, 0, 2]
    assert source.sizes.tolist() == [(images / "in" / f"{i}.png").stat().st_size for i in range(6)]
    assert not source.problems
    image = source.image(4)
    assert (image.key, image.label, image.origin) == ("000000004", 0, "in/4.png")
    content = image.read()
    assert content.image == (images / "in" / "4.png").read_bytes()
    assert content.metadata == {"caption": "猫"}
    assert source.image(2).read().metadata == {}


def test_numeric_labels_are_named_by_a_list(images: Path) -> None:
    table = write(images / "t.csv", {"file_name": ["in/0.png", "in/1.png"], "target": [3, 1]})
    assert listed(table).class_names == ["0", "1", "2", "3"]
    assert listed(table, class_names=["a", "b", "c", "d"]).labels.tolist() == [3, 1]
    with pytest.raises(DataError, match="column target: label 3 is out of range because there are 2 class names"):
        listed(table, class_names=["a", "b"])
    unlabeled = listed(table, labeled=False)
    assert (unlabeled.class_names, unlabeled.labels.tolist()) == ([], [NO_LABEL, NO_LABEL])
    assert unlabeled.image(0).read().metadata == {"target": 3}


def test_codes_with_leading_zeros_are_names(images: Path) -> None:
    (images / "t.csv").write_text("path,label,code\nin/0.png,01,007\nin/1.png,01,008\nin/2.png,02,010\n")
    source = listed(images / "t.csv")
    assert (source.class_names, source.labels.tolist()) == (["01", "02"], [0, 0, 1])
    assert source.image(0).read().metadata == {"code": "007"}
    (images / "t.csv").write_text("path,label\nin/0.png,1\nin/1.png,2\n")
    source = listed(images / "t.csv")
    assert (source.class_names, source.labels.tolist()) == (["0", "1", "2"], [1, 2])


LABELS = [
    ("true", "false"),
    ("2024-01-02", "2024-01-03"),
    ("1.0", "2.50"),
    ("1e5", "1e6"),
    ("12:30", "13:00"),
    ("nan", "1"),
]


@pytest.mark.parametrize("labels", LABELS, ids=str)
def test_labels_are_the_text_of_the_file(images: Path, labels: tuple[str, str]) -> None:
    (images / "L.CSV").write_text("path,kind\n" + "".join(f"in/{i}.png,{label}\n" for i, label in enumerate(labels)))
    source = list_source(str(images / "L.CSV"), SourceOptions(columns=Columns(label="kind")))
    assert source.class_names == sorted(labels)
    assert [source.class_names[label] for label in source.labels] == [*labels]


def test_names_of_images_are_the_text_of_the_file(images: Path) -> None:
    for name in ("1.0", "7"):
        shutil.copy(images / "in" / "0.png", images / name)
    (images / "T.TSV").write_text("path\tlabel\n1.0\t0\n7\t1\n")
    source = listed(images / "T.TSV")
    assert (list(source.names), source.problems) == (["1.0", "7"], [])
    assert source.labels.tolist() == [0, 1]
    padding = "x" * (1 << 20)  # so that the last row is in another block, which pyarrow reads after it has chosen types
    (images / "t.csv").write_text(f"path,label,note\n7,1,{padding}\n7,1,{padding}\n1.0,owl,\n")
    assert listed(images / "t.csv").class_names == ["1", "owl"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_and_lists_may_have_a_byte_order_mark(images: Path, encoding: str) -> None:
    (images / "t.csv").write_text("path,label\nin/0.png,猫\nin/1.png,chat\u3000noir\n", encoding=encoding)
    assert listed(images / "t.csv").class_names == ["chat\u3000noir", "猫"]
    (images / "classes.txt").write_text("猫\r\nchat\u3000noir\u200d \n\n", encoding=encoding, newline="")
    assert read_class_names(images / "classes.txt") == ["猫", "chat\u3000noir\u200d"]


def test_an_empty_field_is_a_missing_value(images: Path) -> None:
    (images / "t.csv").write_text("path,label\nin/0.png,owl\n,owl\nin/2.png,\n")
    assert listed(images / "t.csv").problems == ["1 row without an image: row 2", "1 row without a label: row 3"]


def test_rows_without_image_or_label_are_problems(images: Path) -> None:
    columns: dict[str, list[object]] = {"path": ["in/0.png", None, "in/2.png", "in/gone.png"], "label": [0, 1, None, 1]}
    source = listed(write(images / "t.parquet", columns))
    assert source.problems == ["1 row without an image: row 2", "1 row without a label: row 3"]
    assert [source.image(i).key for i in range(len(source))] == ["000000000", "000000003"]
    assert source.sizes.tolist()[1] == 0
    with pytest.raises(FileNotFoundError):
        source.image(1).read()


def test_urls_are_fetched(images: Path) -> None:
    with serve(UnreliableServer(images / "in", unavailable=0.3)) as server:
        table = write(images / "t.csv", {"link": [f"{server.url}/{i}.png" for i in range(6)], "label": [0] * 6})
        source = listed(table, image="link")
        assert source.sizes.tolist() == [0] * 6
        for i in range(6):
            assert source.image(i).read().image == (images / "in" / f"{i}.png").read_bytes()


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"picture": ["a"], "label": [0]},
            "no column path or url .*; name one of its columns with --image-column: picture, label",
        ),
        (
            {"path": ["a"], "kind": ["x"]},
            "no column label or class .*; name one of its columns with --label-column: path, kind",
        ),
        ({"path": ["a"], "label": [0.5]}, "column label: contains double; expected class names, or whole numbers"),
        ({"path": ["a"], "label": [-1]}, "column label: has the label -1; labels must start at 0"),
        ({"path": [b"png"], "label": [0]}, "column path contains binary; expected paths or URLs"),
    ],
)
def test_unusable_tables_are_refused(tmp_path: Path, columns: dict[str, list[object]], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        listed(write(tmp_path / "t.parquet", columns))


def test_files_that_are_not_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t.csv: no such file"):
        listed(tmp_path / "t.csv")
    (tmp_path / "empty.csv").write_text("path,label\n")
    with pytest.raises(DataError, match=r"empty.csv: has no rows"):
        listed(tmp_path / "empty.csv")
    (tmp_path / "t.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="not a readable table"):
        listed(tmp_path / "t.parquet")
    table = write(tmp_path / "u.csv", {"path": ["a"], "label": ["owl"]})
    with pytest.raises(DataError, match="1 class is missing from --class-names: owl; add a line for each"):
        listed(table, class_names=["cat"])
