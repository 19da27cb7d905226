"""A masked autoencoder is exported and proved as `vit_mae` and `vit`, with names that transformers 4 and 5 load."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune.backbone import load_classifier, new_classifier
from finetune.folder import ModelError
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.pieces import load_weights
from pretrain.checkpoint.warm_start import warm_start
from pretrain.config import DataConfig, MAEConfig, ModelConfig, PretrainConfig, ScheduleConfig, SupervisedConfig
from pretrain.errors import UserError
from pretrain.export.folder import export
from pretrain.export.proof import Proof, ProofError
from pretrain.export.vit_mae import VitMae
from pretrain.model.hub_names import fold_layer_scale
from pretrain.model.vit import ViT
from pretrain.objectives import build_objective
from pretrain.state import TrainState
from tests.support.checkpoints import write_checkpoint

MODEL = ModelConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=8, image_size=32)
OBJECTIVE = MAEConfig(
    decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=64
)

LAYERS_ON_DISK = ("vit.encoder.layer.0", "vit.encoder.layer.1", "decoder.decoder_layers.0")


@pytest.fixture(
    scope="module",
    params=[{"position_embedding": "learned"}, {"position_embedding": "sincos"}, {"layer_scale": 0.1}],
    ids=["learned", "sincos", "layer_scale"],
)
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("mae")
    model = MODEL.model_copy(update=request.param)
    config = PretrainConfig(
        run_dir=folder,
        data=DataConfig(train=str(folder)),
        model=model,
        objective=OBJECTIVE,
        schedule=ScheduleConfig(total_steps=9),
    )
    torch.manual_seed(1)
    weights = build_objective(OBJECTIVE, ViT(model), [], config.preprocessing).state_dict()
    weights = {name: weight + 0.05 * torch.randn_like(weight) for name, weight in weights.items()}
    resolved = json.loads(config.model_dump_json())
    manifest = Manifest(TrainState(9, 99, 72), 1, {"training": "digest"}, [], resolved, "commit")
    write_checkpoint(folder / "checkpoints" / "step-00000009", manifest, weights, num_files=2)
    return folder


@pytest.fixture(scope="module")
def autoencoder(run_dir: Path) -> Proof:
    """Export the whole autoencoder; return its proof."""
    return export(run_dir, run_dir / "autoencoder", model_type="vit_mae")


@pytest.fixture(scope="module")
def encoder(run_dir: Path) -> Proof:
    """Export the encoder; return its proof."""
    return export(run_dir, run_dir / "encoder")


def test_exported_autoencoder_reconstructs_the_same_patches(run_dir: Path, autoencoder: Proof) -> None:
    assert autoencoder.differences.keys() == {"reconstructed patches", "pixels"}
    assert autoencoder.differences["reconstructed patches"] <= 1e-5
    assert autoencoder.differences["pixels"] == 0.0
    card = (run_dir / "autoencoder" / "README.md").read_text()
    assert "It has no classifier." in card
    assert "pipeline_tag: image-feature-extraction\n" in card
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    Image.new("RGB", (50, 40), "orange").save(run_dir / "image.jpg")
    code = code.replace("path/to/this/folder", str(run_dir / "autoencoder"))
    space: dict[str, torch.Tensor] = {}
    exec(code.replace("image.jpg", str(run_dir / "image.jpg")), space)
    assert space["reconstructed"].shape == (1, 3, MODEL.image_size, MODEL.image_size)
    assert "in the reconstructed patches and 0.0e+00 in the pixels" in card


def test_a_proof_reads_as_a_sentence(tmp_path: Path) -> None:
    assert str(Proof(tmp_path, {"features": 2e-6})) == "2.0e-06 in the features"
    both = str(Proof(tmp_path, {"logits": 1e-6, "features": 2e-6, "pixels": 0.0}))
    assert both == "1.0e-06 in the logits, 2.0e-06 in the features and 0.0e+00 in the pixels"


@pytest.mark.usefixtures("autoencoder")
def test_tensor_names_are_those_of_folders_on_the_hub(run_dir: Path) -> None:
    """transformers 4.57 loads these; 5.23 would write `decoder.decoder_encoder.layer` and has other names in memory."""
    layer = (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
        "layernorm_before",
        "layernorm_after",
    )
    modules = [f"{place}.{name}" for place in LAYERS_ON_DISK for name in layer]
    modules += ["vit.embeddings.patch_embeddings.projection", "vit.layernorm"]
    modules += [f"decoder.{name}" for name in ("decoder_embed", "decoder_norm", "decoder_pred")]
    assert set(load_file(run_dir / "autoencoder" / "model.safetensors")) == {
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "decoder.mask_token",
        "decoder.decoder_pos_embed",
        *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias")),
    }


def test_encoder_is_exported_as_an_ordinary_vit(run_dir: Path, encoder: Proof) -> None:
    assert encoder.differences.keys() == {"features", "pixels"}
    _, report = transformers.AutoModel.from_pretrained(
        run_dir / "encoder", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report.values())
    model = new_classifier(run_dir / "encoder", ["a", "b"], from_scratch=False, freeze_backbone=False)
    trained = fold_layer_scale(load_weights(run_dir / "checkpoints" / "step-00000009"))
    assert torch.equal(model.state_dict()["vit.layers.1.mlp.fc2.weight"], trained["encoder.layers.1.mlp.fc2.weight"])


@pytest.mark.usefixtures("autoencoder", "encoder")
def test_both_folders_are_fine_tuned_alike_but_are_no_classifiers(run_dir: Path) -> None:
    states = []
    for folder in ("autoencoder", "encoder"):
        with pytest.raises(
            ModelError, match=r"no trained classification head \(missing: classifier.bias, .*\); fine-tune it first"
        ):
            load_classifier(run_dir / folder)
        torch.manual_seed(0)
        states.append(
            new_classifier(run_dir / folder, ["a", "b"], from_scratch=False, freeze_backbone=False).state_dict()
        )
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.usefixtures("autoencoder", "encoder")
@pytest.mark.parametrize("folder", ["autoencoder", "encoder"])
def test_another_run_starts_from_either_folder(run_dir: Path, folder: str) -> None:
    config = PretrainConfig.model_validate_json(
        json.dumps(Manifest.load(run_dir / "checkpoints" / "step-00000009").config)
    )
    objective = build_objective(SupervisedConfig(), ViT(config.model), [0.5, 0.5], config.preprocessing)
    assert "random values for classifier.bias, classifier.weight" in warm_start(
        objective, run_dir / folder, ["a", "b"], 1e-6
    )
    trained = fold_layer_scale(load_weights(run_dir / "checkpoints" / "step-00000009"))
    for name, weight in objective.encoder.state_dict().items():
        assert torch.equal(weight, trained.get(f"encoder.{name}", torch.ones_like(weight))), (
            name
        )  # LayerScale starts at 1


@pytest.mark.usefixtures("autoencoder")
@pytest.mark.parametrize("damage", ["weight", "missing", "mask", "targets"])
def test_proof_rejects_a_damaged_folder(run_dir: Path, tmp_path: Path, damage: str) -> None:
    for path in (run_dir / "autoencoder").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = "decoder.decoder_layers.0.output.dense.weight"
    text = (tmp_path / "config.json").read_text()
    if damage == "weight":
        weights[name][0, 0] += 0.1
    elif damage == "missing":
        del weights[name]
    elif damage == "mask":
        (tmp_path / "config.json").write_text(text.replace('"mask_ratio": 0.75', '"mask_ratio": 0.5'))
    elif damage == "targets":
        (tmp_path / "config.json").write_text(text.replace('"norm_pix_loss": true', '"norm_pix_loss": false'))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = run_dir / "checkpoints" / "step-00000009"
    config = PretrainConfig.model_validate_json(json.dumps(Manifest.load(checkpoint).config))
    with pytest.raises(ProofError):
        VitMae(config, load_weights(checkpoint), []).prove(tmp_path)


def test_run_without_a_decoder_is_not_exported_as_an_autoencoder(tmp_path: Path) -> None:
    config = PretrainConfig(
        run_dir=tmp_path, data=DataConfig(train="x"), model=MODEL, schedule=ScheduleConfig(total_steps=1)
    )
    with pytest.raises(UserError, match=r"objective.name=supervised has no decoder to export; remove --as vit_mae"):
        VitMae(config, {}, [])
