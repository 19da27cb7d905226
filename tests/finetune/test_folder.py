"""Folders of other libraries, damaged ones and those with code of their own are refused with a sentence."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.backbone import load_classifier, new_classifier
from finetune.folder import ModelError, check_folder
from finetune.preprocessor import load_preprocessor
from pretrain.errors import UserError
from tests.support.classifiers import save_classifier, tiny_configs

NAMES = ["cat", "dog", "owl"]
USES = (load_classifier, lambda path: new_classifier(path, NAMES, from_scratch=False, freeze_backbone=False))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_classifier(tiny_configs()["vit"], tmp_path / "vit")


def change_config(folder: Path, **settings: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_folders_of_other_libraries_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "vit"  # transformers guesses the type of a model from such a name
    folder.mkdir()
    with pytest.raises(ModelError, match=r"not a Hugging Face folder \(config.json is missing\); create one with"):
        check_folder(folder)
    timm = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 224, 224]}}
    (folder / "config.json").write_text(json.dumps(timm))
    save_file({"cls_token": torch.zeros(1, 1, 192)}, folder / "model.safetensors")
    for use in (*USES, load_preprocessor):
        with pytest.raises(ModelError, match="a model of timm, which is not installed; pip install timm torchvision"):
            use(folder)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 32}))
    with pytest.raises(ModelError, match="has no model_type, so transformers cannot load it; download the model in"):
        check_folder(folder)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(("content", "reason"), [("[]", "is not a JSON object"), ("{", "Expecting"), ("[" * 9**5, "")])
def test_damaged_files_are_errors(folder: Path, file: str, content: str, reason: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=rf"{file}: .*{reason}.*; export or download the folder again"):
        check_folder(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "newer"},
        {"model_type": "bert"},
        {"hidden_size": "wide"},
        {"hidden_act": "none"},
        {"id2label": ["cat"]},
        {"dtype": "float7"},
        {"patch_size": 0},
    ],
    ids=str,
)
def test_a_config_that_transformers_cannot_use_is_an_error(folder: Path, settings: dict[str, object]) -> None:
    change_config(folder, **settings)
    with pytest.raises(ModelError, match=r"vit: transformers cannot load it: .*; export or download it again"):
        load_classifier(folder)


def test_a_package_that_the_folder_needs_is_named(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ModelError, match=r"vit: a package is not installed: .*bitsandbytes.*; install it"):
        load_classifier(folder)


def test_classes_without_a_number_of_the_head_are_an_error(folder: Path) -> None:
    change_config(folder, id2label={"1": "cat", "2": "dog", "3": "owl"})
    with pytest.raises(ModelError, match=r"config\.json: id2label does not number its classes from 0 to 2; fix it"):
        load_classifier(folder)


def test_damaged_weights_are_an_error(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for use in USES:
        with pytest.raises(ModelError, match=r"vit: transformers cannot load it: .*; export or download it again"):
            use(folder)


def test_a_missing_processor_is_an_error(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"preprocessor_config\.json: transformers cannot load it: Can't load image"):
        load_preprocessor(folder)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_folder_with_code_of_its_own_is_refused(folder: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, "auto_map": {"AutoConfig": "mine.Config"}}))
    (folder / "mine.py").write_text("raise AssertionError('this was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on the terminal"))
    for use in (*USES, load_preprocessor):
        with pytest.raises(ModelError, match=r"needs code of its own \(auto_map\), which is never run"):
            use(folder)
    for module in ("finetune.backbone", "finetune.preprocessor"):
        monkeypatch.setattr(f"{module}.check_folder", lambda _: None)
    for use in (*USES, load_preprocessor):  # even without that check, transformers is told not to ask
        with contextlib.suppress(ModelError):
            use(folder)
