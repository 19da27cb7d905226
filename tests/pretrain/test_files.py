"""Files and folders are replaced as a whole, or not at all."""

import os
from pathlib import Path

import pytest

from pretrain import files
from pretrain.files import atomic_file, atomic_folder, atomic_write, partial_path, publish, remove_folder
from tests.support.disk import full_disk


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of all files and folders passed to fsync, and "->" for every rename."""
    calls: list[str] = []
    replace, fsync = Path.replace, os.fsync

    def record_fsync(descriptor: int) -> None:
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def record_replace(path: Path, target: Path) -> Path:
        calls.append("->")
        return replace(path, target)

    monkeypatch.setattr(files.os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    return calls


@pytest.mark.parametrize(("content", "expected"), [("é\n", b"\xc3\xa9\n"), (b"\0\xff", b"\0\xff")])
def test_atomic_write_replaces_a_file(tmp_path: Path, content: str | bytes, expected: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    atomic_write(path, content)
    assert path.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_visible_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
        assert Path(file.name) == partial_path(path)
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_keeps_the_old_file_and_removes_the_partial_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"new")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        atomic_write(path, "x" * 1000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_partial_file_of_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    partial_path(tmp_path / "file").write_text("a longer text of another process")
    atomic_write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_durable_files_are_flushed_before_the_rename_and_their_folder_after(tmp_path: Path, synced: list[str]) -> None:
    atomic_write(tmp_path / "file", "text")
    assert synced == ["file.partial", "->", tmp_path.name]


def test_durable_folders_are_flushed_with_all_their_files(tmp_path: Path, synced: list[str]) -> None:
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text("text")
    assert sorted(synced[:3]) == ["below", "file", "folder.partial"]
    assert synced[2:] == ["folder.partial", "->", tmp_path.name]


def test_nothing_is_flushed_without_durable(tmp_path: Path, synced: list[str]) -> None:
    atomic_write(tmp_path / "file", "text", durable=False)
    with atomic_folder(tmp_path / "folder", durable=False) as folder:
        (folder / "file").write_text("text")
    assert synced == ["->", "->"]


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    path = tmp_path / "parent" / "folder"
    partial_path(path).mkdir(parents=True)
    (partial_path(path) / "left behind").write_text("by a killed process")
    with atomic_folder(path) as folder:
        (folder / "file").write_text("text")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["file"]
    assert [each.name for each in path.parent.iterdir()] == ["folder"]


def test_an_existing_folder_is_replaced_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(FileExistsError, match="folder: already exists"), atomic_folder(path):
        pass
    with atomic_folder(path, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert (path / "old").exists()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_keeps_the_old_folder_and_removes_the_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(ValueError, match="stop"), atomic_folder(path, overwrite=True) as folder:
        (folder / "new").write_text("new")
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == [path]
    assert not list(path.iterdir())


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_while_a_folder_is_replaced_keeps_the_old_folder(
    tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")

    def interrupted(self: Path, target: Path) -> None:
        assert not target.exists()  # the old folder has already lost its name
        raise error

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(error), files.atomic_folder(tmp_path / "model", overwrite=True) as folder:
        (folder / "weights").write_text("new")
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_published_folder_does_not_replace_another(tmp_path: Path) -> None:
    for name in ("folder", "folder.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        publish(tmp_path / "folder.partial", tmp_path / "folder")
    assert (tmp_path / "folder" / "file").read_text() == "folder"


def test_a_removed_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    for name in ("folder", "folder.old.partial"):  # the second is from a removal that was interrupted
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    remove_folder(tmp_path / "folder")
    assert not list(tmp_path.iterdir())
