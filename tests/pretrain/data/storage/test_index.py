"""The index format: a damaged, edited or unknown `dataset.json` is refused."""

import json
import shutil
from pathlib import Path

import pytest

from pretrain.data.storage.index import DatasetInfo, index_name
from pretrain.errors import DataError


def test_dataset_edited_by_hand_is_refused(digits: Path, tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    shutil.copy(digits / "train" / "dataset.json", path)
    assert DatasetInfo.load(tmp_path).class_names == ["0", "1", "2"]
    content = json.loads(path.read_text())
    content["class_names"][0] = "three"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="edited by hand, its checksum is wrong"):
        DatasetInfo.load(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        DatasetInfo.load(tmp_path)
    path.write_text('{"version": 99}')
    with pytest.raises(DataError, match="version 99, but this Vitrail reads version 3"):
        DatasetInfo.load(tmp_path)


def test_saved_dataset_loads_unchanged(digits: Path, tmp_path: Path) -> None:
    info = DatasetInfo.load(digits / "train")
    info.save(tmp_path)
    assert DatasetInfo.load(tmp_path) == info
    assert (tmp_path / "dataset.json").read_bytes() == (digits / "train" / "dataset.json").read_bytes()


def test_index_of_a_url_is_named_by_its_path() -> None:
    assert index_name("part-0.tar") == "part-0.index.json"
    assert index_name("https://host/data/part-0.tar?version=2") == "part-0.index.json"
