"""An exported folder loads offline and strictly, computes what our model computes, and a wrong one is refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.pieces import load_weights
from pretrain.config import ModelConfig
from pretrain.errors import CheckpointError, VersionError
from pretrain.export.folder import export
from pretrain.export.proof import ProofError, evaluation_pixels, proof_images
from pretrain.export.vit import Vit
from tests.support.checkpoints import write_run

TOP1, KNN = "validation/top1", "probe/knn_top1"
NAMES = ["tabby cat", "dog", "鳥"]
MODEL = ModelConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=8, image_size=32)


@pytest.fixture(
    scope="module",
    params=[{"position_embedding": "learned"}, {"position_embedding": "sincos"}, {"layer_scale": 0.1}],
    ids=["learned", "sincos", "layer_scale"],
)
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("run")
    return write_run(folder, MODEL.model_copy(update=request.param), NAMES)


def trained(run_dir: Path) -> Vit:
    checkpoint = run_dir / "checkpoints" / "step-00000009"
    return Vit(Manifest.load(checkpoint).parse_config(checkpoint), load_weights(checkpoint), NAMES)


@pytest.fixture(scope="module")
def folder(run_dir: Path) -> Path:
    out = run_dir / "export"
    proof = export(run_dir, out)
    assert proof.differences.keys() == {"logits", "features", "pixels"}
    assert proof.differences["logits"] <= 1e-5
    assert proof.differences["pixels"] == 0.0
    return out


def test_transformers_loads_the_folder_strictly_with_the_same_logits(run_dir: Path, folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    model, report = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert [model.config.id2label[i] for i in range(3)] == NAMES
    assert model.config.label2id == {name: i for i, name in enumerate(NAMES)}
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    reference = trained(run_dir)
    for image in [*proof_images(), Image.fromarray(load_sample_image("china.jpg"))]:
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, evaluation_pixels(reference.config, image))
        with torch.no_grad():
            difference = (model(pixels).logits - reference.logits(pixels)).abs().max()
        assert difference <= 1e-5


def test_automodel_loads_the_encoder(run_dir: Path, folder: Path) -> None:
    encoder, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, add_pooling_layer=False)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert set(report["unexpected_keys"]) == {"classifier.weight", "classifier.bias"}
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(encoder(pixels).last_hidden_state, trained(run_dir).features(pixels), atol=1e-5)


def test_pipeline_and_code_of_the_model_card_work(
    run_dir: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.fromarray(load_sample_image("flower.jpg")[:200])
    image.save(tmp_path / "image.jpg", quality=100)
    card = (folder / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 2
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        code = snippet.replace("path/to/this/folder", str(folder))
        space: dict[str, torch.Tensor] = {}
        exec(code, space)
    assert space["features"].shape == (1, 48)
    classify = transformers.pipeline("image-classification", model=str(folder))
    scores = {row["label"]: row["score"] for row in classify(image)}
    expected = trained(run_dir).logits(evaluation_pixels(trained(run_dir).config, image)).softmax(dim=1)[0]
    assert scores == {name: pytest.approx(float(p), abs=1e-5) for name, p in zip(NAMES, expected, strict=True)}


def test_the_model_card_has_what_the_run_knows_and_no_path(run_dir: Path, folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for line in (
        "It classifies images into 3 classes: `tabby cat`, `dog`, `鳥`.",
        "| on the validation data `none`, at step 9 | value |",
        "| top-1 accuracy | not measured |",
        "| top-1 accuracy of k-NN on the frozen features | not measured |",
        "| images seen | 72 |",
        "| data digest | `digest` |",
        "| code of the run | `commit` |",
        f"| written by | vitrail 0.1.0, torch {torch.__version__}, transformers {transformers.__version__} |",
        '  "seed": 0,',
    ):
        assert line in card.splitlines(), line
    assert "model-index" not in card
    rows = [{"step": 8, TOP1: 0.5}, {"step": 9, "validation/loss": 0.25}, {"step": 9, TOP1: 0.75, KNN: 0.625}]
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    export(run_dir, folder, overwrite=True)
    (run_dir / "metrics.jsonl").unlink()
    card = (folder / "README.md").read_text()
    for line in (
        "| top-1 accuracy | 0.7500 |",
        "| top-1 accuracy of k-NN on the frozen features | 0.6250 |",
        "| top-1 accuracy of a linear probe of the frozen features | not measured |",
        "| loss | 0.2500 |",
    ):
        assert line in card.splitlines(), line
    metadata = ModelCard(card).data
    assert (metadata.library_name, metadata.pipeline_tag) == ("transformers", "image-classification")
    [result] = metadata.eval_results or []
    assert (result.metric_type, result.metric_value, result.task_type) == ("accuracy", 0.75, "image-classification")
    for path in folder.iterdir():
        assert str(run_dir.parent).encode() not in path.read_bytes(), path
        assert b"cache_dir" not in path.read_bytes()


def test_tensor_names_are_those_that_transformers_4_and_5_load(folder: Path) -> None:
    """transformers 5 has other names in memory; 4.57 loads only these and initializes the rest."""
    names = set(safetensors.torch.load_file(folder / "model.safetensors"))
    layer = "vit.encoder.layer.0."
    assert {
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.weight",
        f"{layer}attention.attention.query.weight",
        f"{layer}attention.attention.key.bias",
        f"{layer}attention.output.dense.weight",
        f"{layer}intermediate.dense.weight",
        f"{layer}output.dense.bias",
        f"{layer}layernorm_before.weight",
        "vit.layernorm.weight",
        "classifier.weight",
    } <= names
    assert len(names) == 4 + 2 * 16 + 4
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "BitImageProcessor"


@pytest.mark.parametrize("damage", ["weight", "missing", "extra", "labels", "resize"])
def test_proof_rejects_a_damaged_folder(run_dir: Path, folder: Path, tmp_path: Path, damage: str) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = "vit.encoder.layer.1.output.dense.weight"
    if damage == "weight":
        weights[name][0, 0] += 0.1
    elif damage == "missing":
        del weights[name]
    elif damage == "extra":
        weights["vit.pooler.dense.weight"] = torch.zeros(48, 48)
    elif damage == "labels":
        text = (folder / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace("tabby cat", "lion"))
    elif damage == "resize":
        text = (folder / "preprocessor_config.json").read_text()
        (tmp_path / "preprocessor_config.json").write_text(text.replace('"resample": 3', '"resample": 2'))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError):
        trained(run_dir).prove(tmp_path)


def test_export_overwrites_only_on_request(run_dir: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="output folder already exists; choose another one or pass --overwrite"):
        export(run_dir, folder)
    (run_dir / "photos").mkdir()
    with pytest.raises(CheckpointError, match="photos: not a Hugging Face folder, so it is not overwritten; choose"):
        export(run_dir, run_dir / "photos", overwrite=True)
    assert export(run_dir / "checkpoints" / "step-00000009", folder, overwrite=True).differences["logits"] <= 1e-5


def test_damaged_checkpoint_is_not_exported(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(run_dir / "checkpoints" / "step-00000009", tmp_path / "step-00000009"))
    data = bytearray((checkpoint / "rank-00001.safetensors").read_bytes())
    data[-9] ^= 1
    (checkpoint / "rank-00001.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors: damaged \(its checksum differs\)"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_config_of_another_version_is_named(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(run_dir / "checkpoints" / "step-00000009", tmp_path / "step-00000009"))
    manifest = Manifest.load(checkpoint)
    replace(manifest, config={**manifest.config, "model": {**manifest.config["model"], "depth": 3}}).save(checkpoint)
    with pytest.raises(VersionError, match=r"step-00000009: this version .* config of the run \(model\.depth\); use"):
        export(checkpoint, tmp_path / "out")
