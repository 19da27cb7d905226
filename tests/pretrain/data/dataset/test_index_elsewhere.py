"""A set whose index is not next to its tars is the same set, and is found again after a move."""

import shutil
from pathlib import Path

import pytest

from pretrain.data.dataset.open import open_dataset
from pretrain.data.dataset.sharded import ShardDataset
from pretrain.data.shards.check import check_set
from pretrain.data.shards.scan import index_shards
from pretrain.data.sources.open import list_source
from pretrain.data.storage.index import DatasetInfo
from pretrain.data.storage.tar_set import tar_names
from pretrain.errors import DataError


@pytest.fixture
def elsewhere(digits: Path, tmp_path: Path) -> Path:
    """A folder with `tars/` and their index in `index/`."""
    (tmp_path / "set" / "tars").mkdir(parents=True)
    (tmp_path / "set" / "index").mkdir()
    for tar in (digits / "train").glob("*.tar"):
        shutil.copy(tar, tmp_path / "set" / "tars")
    tars = tmp_path / "set" / "tars"
    index_shards(tar_names(tars), tmp_path / "set" / "index", tar_folder=tars)
    return tmp_path / "set"


def tars_of(index: Path) -> set[Path]:
    dataset = open_dataset(index)
    assert isinstance(dataset, ShardDataset)
    dataset.read(0, 0)
    return {Path(tar).parent for tar in dataset.tars}


def test_it_is_the_same_set(elsewhere: Path, digits: Path) -> None:
    """A run may go on with the other one."""
    here, there = open_dataset(digits / "train"), open_dataset(elsewhere / "index")
    assert there.digest == here.digest
    assert there.fetch(1, 2)[1:] == here.fetch(1, 2)[1:]
    assert list(check_set(str(elsewhere / "index"))) == []
    assert not {path.name for path in (elsewhere / "tars").iterdir()} - {*tar_names(digits / "train")}
    source = list_source(str(elsewhere / "index"))
    assert len(source) == sum(here.shard_sizes)


def test_the_index_may_be_moved_alone(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    index = shutil.move(elsewhere / "index", tmp_path / "a" / "b" / "index")
    assert tars_of(index) == {elsewhere / "tars"}


def test_both_may_be_moved_together(elsewhere: Path, tmp_path: Path) -> None:
    """A copy reads its own tars."""
    shutil.copytree(elsewhere, tmp_path / "copy")
    assert tars_of(tmp_path / "copy" / "index") == {tmp_path / "copy" / "tars"}
    shutil.rmtree(elsewhere)
    assert tars_of(tmp_path / "copy" / "index") == {tmp_path / "copy" / "tars"}


def test_tars_that_were_moved_alone_are_missed(elsewhere: Path, tmp_path: Path) -> None:
    shutil.move(elsewhere / "tars", tmp_path / "moved")
    expected = rf"its tars are not in {elsewhere}/tars; mount that folder, or index the tars where they are now: "
    with pytest.raises(DataError, match=expected):
        open_dataset(elsewhere / "index")
    with pytest.raises(DataError, match=expected):
        list(check_set(str(elsewhere / "index")))


def test_an_index_next_to_its_tars_names_no_folder(digits: Path) -> None:
    assert DatasetInfo.load(digits / "train").tar_folders == []


def test_tars_that_were_added_later_are_noted(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "validation", tmp_path / "set")
    shutil.copy(next((digits / "train").glob("*.tar")), tmp_path / "set" / "new.tar")
    assert open_dataset(tmp_path / "set").notes == [
        f"{tmp_path}/set: 1 tar that its index does not list: new.tar, not used; "
        "index the folder again to use all of its tars"
    ]
