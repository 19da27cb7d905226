"""Encoders and classifiers: the same numbers as the commands and the trained model, from any kind of image."""

import json
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_image

import vitrail
from pretrain.checkpoint.pieces import load_weights
from pretrain.config import ModelConfig
from pretrain.export.folder import export
from tests.support.checkpoints import write_run
from tests.support.classifiers import save_classifier, tiny_configs
from tests.support.launching import Vitrail

MODEL = ModelConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=8, image_size=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a checkpoint, and its export."""
    folder = write_run(tmp_path_factory.mktemp("run"), MODEL, ["cat", "dog", "owl"])
    export(folder, folder / "export")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """More photos than a batch, of several sizes and modes."""
    folder = tmp_path_factory.mktemp("photos")
    flower = Image.fromarray(load_sample_image("flower.jpg"))
    paths = [folder / f"{i}.png" for i in range(35)]
    for i, path in enumerate(paths):
        flower.crop((8 * i, 4 * i, 8 * i + 60 + i, 4 * i + 80)).convert(("RGB", "L", "RGBA")[i % 3]).save(path)
    return paths


def test_predictions_are_those_of_the_command(run: Path, photos: list[Path], vitrail_command: Vitrail) -> None:
    printed = vitrail_command("predict", run / "export", *photos, "--top-k", "2", "--json").out.splitlines()
    expected = [[(row["class"], row["probability"]) for row in json.loads(line)["classes"]] for line in printed]
    assert vitrail.predict(run / "export", photos, top_k=2) == expected
    classifier = vitrail.load_classifier(run / "export")
    assert classifier.class_names == ["cat", "dog", "owl"]
    assert vitrail.predict(classifier, iter(photos), top_k=2) == expected
    opened = vitrail.predict(classifier, [Image.open(path) for path in photos], top_k=2)
    assert opened == expected
    arrays = [np.asarray(Image.open(path)) for path in photos]
    assert {array.ndim for array in arrays} == {2, 3}
    assert vitrail.predict(classifier, arrays, top_k=2) == expected
    for one in (str(photos[0]), Image.open(photos[0]), arrays[0], arrays[0][None]):
        [classes] = vitrail.predict(classifier, one)
        assert [name for name, _ in classes][:2] == [name for name, _ in expected[0]]
        assert sum(probability for _, probability in classes) == pytest.approx(1)
    assert vitrail.predict(classifier, []) == []


@pytest.fixture
def vitrail_command(vitrail: Vitrail) -> Vitrail:
    """The command, whose name in these tests is that of the package."""
    return vitrail


def test_an_export_its_run_and_its_checkpoint_have_the_same_features(run: Path, photos: list[Path]) -> None:
    features = vitrail.embed(run / "export", photos)
    assert (features.dtype, features.shape) == (np.float32, (len(photos), 48))
    for path in (run, run / "checkpoints" / "step-00000009", str(run)):
        assert np.abs(vitrail.embed(path, photos) - features).max() < 1e-5 * np.abs(features).max()
    hub = transformers.AutoModel.from_pretrained(run / "export", add_pooling_layer=False)
    encoder = vitrail.load_encoder(run / "export")
    pixels = torch.stack([encoder.preprocess(path) for path in photos[:3]])
    with torch.no_grad():
        cls_tokens = hub(pixels).last_hidden_state[:, 0]
        assert np.abs(cls_tokens.numpy() - features[:3]).max() < 1e-5 * np.abs(features).max()
        assert torch.equal(encoder(pixels), torch.from_numpy(vitrail.embed(encoder, photos[:3])))
    assert (encoder.image_size, encoder.training, encoder.device) == (32, False, torch.device("cpu"))
    weight, bias = (load_weights(run / "checkpoints" / "step-00000009")[f"classifier.{x}"] for x in ("weight", "bias"))
    probabilities = (torch.from_numpy(features) @ weight.T + bias).softmax(dim=1)
    for found, expected in zip(vitrail.predict(run / "export", photos), probabilities.tolist(), strict=True):
        assert dict(found) == pytest.approx(dict(zip(("cat", "dog", "owl"), expected, strict=True)), abs=1e-5)


@pytest.mark.parametrize("architecture", tiny_configs())
def test_features_are_what_the_head_of_any_architecture_is_given(architecture: str, tmp_path: Path) -> None:
    run = save_classifier(tiny_configs()[architecture], tmp_path / "run" / "model").parent
    seen: list[torch.Tensor] = []
    model = transformers.AutoModelForImageClassification.from_pretrained(run / "model")
    [head] = [module for module in model.modules() if getattr(module, "out_features", None) == 3]
    head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    encoder = vitrail.load_encoder(run)
    image = Image.fromarray(load_sample_image("china.jpg"))
    model.eval()(encoder.preprocess(image)[None])
    found = vitrail.embed(encoder, image)
    assert np.abs(found - seen[0].detach().numpy()).max() <= 1e-5 * np.abs(found).max()
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_a_fine_tuning_run_is_found_by_its_folder(tmp_path: Path, photos: list[Path]) -> None:
    save_classifier(tiny_configs()["vit"], tmp_path / "run" / "model")
    expected = vitrail.predict(tmp_path / "run" / "model", photos[:2])
    assert vitrail.predict(str(tmp_path / "run"), photos[:2]) == expected


def test_a_model_of_the_hub_is_found_in_the_local_cache(
    tmp_path: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--google--vit-tiny"
    snapshot = save_classifier(tiny_configs()["vit"], cached / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(snapshot.name)
    assert np.array_equal(vitrail.embed("google/vit-tiny", photos[:2]), vitrail.embed(snapshot, photos[:2]))
    assert vitrail.predict("google/vit-tiny", photos[:2]) == vitrail.predict(snapshot, photos[:2])
    for load in (vitrail.load_encoder, vitrail.load_classifier):
        with pytest.raises(vitrail.UserError, match=r"no such folder; .* with: hf download google/vit-large"):
            load("google/vit-large")


@pytest.mark.parametrize("change", [{"size": {"height": 64, "width": 64}}, {"num_channels": 1}], ids=["size", "gray"])
def test_a_model_that_does_not_fit_its_processor_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    config = tiny_configs()["vit"]
    config.num_channels = change.get("num_channels", 3)
    folder = save_classifier(config, tmp_path / "model")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    side = 64 if "size" in change else 32
    message = (
        rf"preprocessor_config\.json: the model cannot use the images .*, 3 channels of {side} x {side} pixels: .*;"
    )
    for load in (vitrail.load_encoder, vitrail.load_classifier):
        with pytest.raises(vitrail.UserError, match=f"{message} make it agree with config.json"):
            load(folder)


def test_mistakes_are_errors_of_the_user(run: Path, photos: list[Path], tmp_path: Path) -> None:
    with pytest.raises(vitrail.UserError, match=r"empty: no model here; name an exported or fine-tuned folder, a run"):
        vitrail.load_encoder(tmp_path / "empty")
    with pytest.raises(vitrail.UserError, match=r"empty: not a Hugging Face folder \(config\.json is missing\)"):
        vitrail.predict(tmp_path / "empty", photos)
    encoder = vitrail.load_encoder(run)
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(vitrail.UserError, match=r"text\.jpg: cannot be used as an image: not an image of a known"):
        vitrail.embed(encoder, [*photos, tmp_path / "text.jpg"])
    with pytest.raises(vitrail.UserError, match=r"none\.jpg: cannot be read: No such file or directory"):
        vitrail.embed(encoder, tmp_path / "none.jpg")
    with pytest.raises(vitrail.UserError, match=r"images\[1\]: float64 \[4, 4, 3\] is not an image; pass a path"):
        vitrail.embed(encoder, [photos[0], np.zeros((4, 4, 3))])
    with pytest.raises(vitrail.UserError, match=r"images\[0\]: tuple is not an image"):
        vitrail.predict(run / "export", [(Image.open(photos[0]), 0)])  # type: ignore[list-item]
    with pytest.raises(vitrail.UserError, match=r"images\[0\]: cannot be used as an image: grayscale of 32 bits.*; "):
        vitrail.embed(encoder, Image.new("F", (8, 8)))
    with pytest.raises(vitrail.UserError, match="images: there are none; pass at least one image"):
        vitrail.embed(encoder, [])
