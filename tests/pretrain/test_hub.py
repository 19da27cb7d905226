"""Ids of the Hub name a model in the local cache, or are answered with the command that downloads it."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from pretrain.errors import UserError
from pretrain.hub import find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_model_in_the_cache_is_found_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--google--vit-tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    assert find_model(Path("google/vit-tiny")) == snapshot
    sentence = (
        "google/vit-large: no such folder; create it first, or, for a model of the Hugging Face Hub, download it with: "
        "hf download google/vit-large --local-dir google/vit-large"
    )
    with pytest.raises(UserError) as refused:
        find_model(Path("google/vit-large"))
    assert str(refused.value) == sentence


def test_the_folder_of_a_fine_tuning_run_stands_for_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert find_model(tmp_path) == tmp_path
    (tmp_path / "model" / "config.json").write_text("{}")
    assert find_model(tmp_path) == tmp_path / "model"
    (tmp_path / "config.json").write_text("{}")  # a model of its own
    assert find_model(tmp_path) == tmp_path


def test_a_folder_goes_before_the_cache_and_other_paths_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("google/vit-tiny").mkdir(parents=True)
    for path in (Path("google/vit-tiny"), Path("nowhere"), Path("a/b/c"), tmp_path / "none"):
        assert find_model(path) == path
