"""The names of the package, and the code of its guide."""

import inspect
import re
import shutil
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
