"""`vitrail init` lists the recipes and writes one, whose command then names the new file."""

from pathlib import Path

import pytest

from launch.commands.init import find_recipes
from pretrain.config import PretrainConfig
from pretrain.configfile import load_config
from tests.support.launching import ROOT, Vitrail


def test_the_list_describes_every_recipe(vitrail: Vitrail) -> None:
    listed = vitrail("init")
    assert listed.code == 0
    assert {path.resolve() for path in find_recipes().values()} == {
        *(ROOT / "configs" / "pretrain").glob("*.yaml"),
        *(ROOT / "configs" / "finetune").glob("*.yaml"),
    }
    for name in find_recipes():
        [line] = [line for line in listed.out.splitlines() if line.split()[0] == name]
        assert len(line.split()) > 5


def test_a_recipe_is_written_and_its_command_names_the_file(
    vitrail: Vitrail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = vitrail("init", "photos_mae_ti16", "my.yaml")
    assert done.out == "my.yaml: written; set its paths, then run: vitrail pretrain my.yaml\n"
    text = Path("my.yaml").read_text()
    assert "#   vitrail pretrain my.yaml\n" in text
    assert "configs/" not in text
    assert load_config(PretrainConfig, Path("my.yaml")).config.schedule.epochs == 400
    assert vitrail("init", "photos").code == 0
    assert Path("photos.yaml").exists()
    Path("folder").mkdir()
    assert vitrail("init", "mae_b16", "folder").out.startswith("folder/mae_b16.yaml: written; ")


def test_a_wrong_name_and_an_existing_file_are_refused(
    vitrail: Vitrail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("mine")
    for arguments, sentence in (
        (["mae_b61"], "mae_b61: no such recipe; did you mean mae_b16?"),
        (["???"], "???: no such recipe; `vitrail init` lists all"),
        (["mae_b16", "my.yaml"], "my.yaml: already exists; choose another file name"),
        (["mae_b16", "none/my.yaml"], "none/my.yaml: No such file or directory"),
    ):
        refused = vitrail("init", *arguments)
        assert refused.code != 0
        assert refused.err == f"{sentence}\n"
    assert Path("my.yaml").read_text() == "mine"
