"""The names of the package, and the code of its guide."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import pretrain
import vitrail
from pretrain.config import ModelConfig
from pretrain.export.folder import export
from tests.support.checkpoints import write_run
from tests.support.launching import ROOT

GUIDE = (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8")
MODEL = ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=32)


def test_every_name_exists_and_is_documented() -> None:
    assert dir(vitrail) == sorted(vitrail.__all__)
    for name in vitrail.__all__:
        assert inspect.getdoc(getattr(vitrail, name)), name
        if inspect.isfunction(getattr(vitrail, name)):
            assert f"`vitrail.{name}(" in GUIDE
    assert vitrail.__version__ == pretrain.__version__
    with pytest.raises(AttributeError, match="module 'vitrail' has no attribute 'train'"):
        vitrail.train  # noqa: B018


@pytest.mark.processes
@pytest.mark.parametrize("module", ["pretrain.py", "launch/__init__.py", "finetune.py"])
def test_a_module_that_hides_a_package_is_named(tmp_path: Path, module: str) -> None:
    (tmp_path / module).parent.mkdir(exist_ok=True)
    (tmp_path / module).write_text("raise SystemExit('mine was imported')\n")
    package = module.partition(".")[0].partition("/")[0]
    sentence = f"{tmp_path / module}: hides the package `{package}` of Vitrail; rename it"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for words in (["-m", "vitrail", "--version"], ["-c", "import vitrail; vitrail.open_dataset"]):
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.stderr.splitlines()[-1].removeprefix("ImportError: ").startswith(sentence)
        assert done.returncode == (2 if "-m" in words else 1)
        assert ("Traceback" in done.stderr) == ("-c" in words)


@pytest.mark.processes
def test_the_code_of_the_guide_runs(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(digits, tmp_path / "shards" / "photos")
    export(write_run(tmp_path / "runs" / "photos", MODEL, ["0", "1", "2"]), tmp_path / "runs" / "photos" / "export")
    shutil.copytree(tmp_path / "runs" / "photos" / "export", tmp_path / "runs" / "photos-finetune" / "model")
    Image.new("RGB", (40, 30), "orange").save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
        exec(code, space)
    printed = capsys.readouterr().out
    assert "images in 3 classes> (32, 32)" in printed
    assert "linear probe: " in printed
    assert "shards/fotos: no such folder" in printed
    assert abs(space["same_features"].numpy() - space["features"]).max() < 1e-4  # type: ignore[attr-defined]
