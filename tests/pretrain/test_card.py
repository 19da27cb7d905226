"""What model cards share: names without paths, classes, metadata."""

import json

import pytest
import yaml

from finetune.config import FinetuneConfig
from pretrain.card import MAX_CLASSES, class_list, config_json, data_names, front_matter
from pretrain.config import PretrainConfig, Section

PLACE = "/home/jane/secret"


@pytest.mark.parametrize(
    ("locations", "name"),
    [
        (f"{PLACE}/photos/train", "photos"),
        (f"{PLACE}/photos", "photos"),
        ("train", "train"),
        ("s3://bucket/photos/validation/", "photos"),
        ("https://jane:secret@host/photos/part-{000..007}.tar?token=secret", "part-{000..007}.tar"),
        ([f"{PLACE}/photos/train", f"{PLACE}/drawings/train", "other/photos/train"], "photos, drawings"),
        ("pipe:ssh jane@host cat secret.tar", "unnamed"),
        ("/", "unnamed"),
        (None, "none"),
    ],
)
def test_data_is_named_without_its_path(locations: str | list[str] | None, name: str) -> None:
    assert data_names(locations) == name


def test_few_classes_are_named_and_many_are_counted() -> None:
    assert class_list(["a b"]) == "1 class: `a b`."
    assert class_list(["cat", "dog"]) == "2 classes: `cat`, `dog`."
    text = class_list([f"n{i}" for i in range(1000)])
    assert text.startswith("1000 classes: `n0`, `n1`, ")
    assert text.endswith(
        f"`n{MAX_CLASSES - 1}`, and {1000 - MAX_CLASSES} more, which are in `id2label` of `config.json`."
    )


@pytest.mark.parametrize(
    ("config_class", "values"),
    [
        (
            PretrainConfig,
            {
                "run_dir": f"{PLACE}/run",
                "init_from": f"{PLACE}/other",
                "data": {
                    "train": [f"{PLACE}/a", f"{PLACE}/b"],
                    "validation": f"{PLACE}/c",
                    "cache_dir": f"{PLACE}/cache",
                },
                "objective": {"name": "mae"},
                "schedule": {"total_steps": 3},
                "tracking": {"uri": f"sqlite:///{PLACE}/mlflow.db", "experiment": "mine"},
            },
        ),
        (
            FinetuneConfig,
            {
                "run_dir": f"{PLACE}/run",
                "model": f"{PLACE}/model",
                "data": {"train": f"{PLACE}/a", "validation": f"{PLACE}/c", "cache_dir": f"{PLACE}/cache"},
                "tracking": {"uri": f"sqlite:///{PLACE}/mlflow.db", "experiment": "mine"},
            },
        ),
    ],
)
def test_a_config_without_paths_keeps_everything_else(config_class: type[Section], values: dict[str, object]) -> None:
    config = config_class.model_validate_json(json.dumps(values))
    text = config_json(config)
    assert "secret" not in text
    kept, whole = json.loads(text), json.loads(config.model_dump_json())
    assert kept["tracking"] == {"experiment": "mine"}
    assert kept["optimizer"] == whole["optimizer"]
    assert set(whole["data"]) - set(kept["data"]) >= {"train", "validation", "cache_dir"}


def test_metadata_are_yaml_for_any_name() -> None:
    text = front_matter("a: 'b' #1", ["vit"], is_classifier=True, data="x: y", top1=0.123456)
    fields = yaml.safe_load(text.strip("-"))
    [model] = fields["model-index"]
    assert model["name"] == "a: 'b' #1"
    assert model["results"][0]["dataset"]["name"] == "x: y"
    assert model["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.1235}]
    assert fields["tags"] == ["vision", "vitrail", "vit"]
    encoder = yaml.safe_load(front_matter("run", [], is_classifier=False).strip("-"))
    assert (encoder["pipeline_tag"], encoder["license"]) == ("image-feature-extraction", "unknown")
    assert "model-index" not in encoder
