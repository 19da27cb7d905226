"""A checkpoint becomes a Hugging Face folder: written aside, proved, then renamed."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from torch import Tensor

from pretrain.checkpoint.history import find_checkpoint
from pretrain.checkpoint.manifest import CheckpointError, Manifest
from pretrain.checkpoint.pieces import find_faults, load_weights
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.export.card import model_card
from pretrain.export.proof import NativeClassifier, Proof, prove


def export(source: Path, out: Path, overwrite: bool = False) -> Proof:
    """Export a run, or one checkpoint of it.

    Args:
        source: a run folder (its newest checkpoint is taken) or a checkpoint folder.
        out: the Hugging Face folder; it appears only when it is proved.
        overwrite: replace `out` if it is there.

    Raises:
        CheckpointError: no checkpoint at `source`, or `out` is in use.
        ProofError: what was written does not load back as the same model.
    """
    checkpoint = find_checkpoint(source)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out}: is there already; choose another folder or add --overwrite")
    if out.exists() and not (out / "config.json").exists():
        raise CheckpointError(f"{out}: is no Hugging Face folder, so it is not overwritten")
    if faults := list(find_faults(checkpoint)):
        raise CheckpointError("\n".join(faults))
    manifest = Manifest.load(checkpoint)
    config = PretrainConfig.model_validate_json(json.dumps(manifest.config))
    weights = load_weights(checkpoint, averaged=True)
    native = NativeClassifier(config.model, config.preprocessing, weights)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = build_hugging_face(config.model, manifest.class_names)
    model.load_state_dict(to_hugging_face(weights, config.model), strict=True)
    model.save_pretrained(partial)
    shutil.copymode(partial / "config.json", partial / "model.safetensors")  # safetensors writes for the owner alone
    build_processor(config).save_pretrained(partial)
    proof = prove(partial, native, manifest.class_names)
    (partial / "README.md").write_text(model_card(manifest, config, proof), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return proof


def build_hugging_face(config: ModelConfig, class_names: list[str]) -> transformers.ViTForImageClassification:
    """Build transformers' twin of our encoder with a linear head on CLS."""
    hf_config = transformers.ViTConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.mlp_size,
        hidden_act="gelu",
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        layer_norm_eps=config.layer_norm_eps,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        qkv_bias=True,
        id2label=dict(enumerate(class_names)),
        label2id={name: label for label, name in enumerate(class_names)},
        problem_type="single_label_classification",
    )
    model = transformers.ViTForImageClassification(hf_config)
    model.train(False)
    return model


def build_processor(config: PretrainConfig) -> transformers.BitImageProcessorPil:
    """Build the image processor of `EvalView`; BitImageProcessor is the one that loads in transformers 4 as well."""
    size = config.model.image_size
    return transformers.BitImageProcessorPil(
        do_resize=True,
        size={"shortest_edge": round(size * config.preprocessing.resize_ratio)},
        resample=3,  # bicubic
        do_center_crop=True,
        crop_size={"height": size, "width": size},
        do_convert_rgb=True,
        image_mean=list(config.preprocessing.image_mean),
        image_std=list(config.preprocessing.image_std),
    )


def to_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename our weights to those of transformers' ViTForImageClassification in memory; nothing is dropped."""
    return {_hf_name(name): _hf_shape(name, weight, config) for name, weight in weights.items()}


def _hf_name(name: str) -> str:
    for ours, theirs in (
        ("encoder.patch_embedding.", "vit.embeddings.patch_embeddings.projection."),
        ("encoder.cls_token", "vit.embeddings.cls_token"),
        ("encoder.position_embedding", "vit.embeddings.position_embeddings"),
        ("encoder.norm.", "vit.layernorm."),
        ("encoder.", "vit."),
        (".norm_before.", ".layernorm_before."),
        (".norm_after.", ".layernorm_after."),
    ):
        name = name.replace(ours, theirs)
    return name


def _hf_shape(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """Our patch embedding is a matrix over a patch's values, theirs a convolution that steps patch by patch."""
    if name == "encoder.patch_embedding.weight":
        return weight.reshape(-1, config.num_channels, config.patch_size, config.patch_size)
    return weight.to(torch.float32)
