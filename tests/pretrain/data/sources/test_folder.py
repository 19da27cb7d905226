"""Folders of images as a source: nothing is skipped or listed twice silently."""

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from pretrain.data.sources.folder import list_folder
from pretrain.errors import DataError


def test_skipped_and_repeated_folders_are_reported(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = len(list_folder(photos))
    (photos / "china" / "loop").symlink_to(photos / "china")
    (photos / ".cache").mkdir()
    source = list_folder(photos)
    assert len(source) == whole
    assert source.notes == ["1 hidden folder, skipped: .cache"]
    [problem] = source.problems
    assert "1 folder that cannot be listed" in problem
    assert "china/loop (links to one of its parent folders)" in problem
    (photos / "china" / "loop").unlink()

    (photos / "china" / "far").symlink_to(photos / "flower")  # a link to another folder is followed
    assert len(list_folder(photos)) == whole + len(list(photos.glob("flower/**/*.*")))
    (photos / "china" / "far").unlink()

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: _refuse() if str(path).endswith("deep") else scandir(path))
    [problem] = list_folder(photos).problems
    assert "2 folders that cannot be listed" in problem
    assert "deep (Permission denied)" in problem


def _refuse() -> NoReturn:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_unusable_folders_are_refused(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        list_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no subfolders; expected one per class"):
        list_folder(photos / "china" / "deep")
