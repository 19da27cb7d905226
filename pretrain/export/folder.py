"""A checkpoint becomes a Hugging Face folder: written aside, proved, then renamed."""

import json
import shutil
from pathlib import Path

import transformers

from pretrain.checkpoint.history import find_checkpoint
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.pieces import find_faults, load_weights
from pretrain.config import PretrainConfig
from pretrain.errors import CheckpointError
from pretrain.export.card import model_card
from pretrain.export.proof import Proof
from pretrain.export.vit import Vit
from pretrain.export.vit_mae import VitMae

MODEL_TYPES: dict[str, type[Vit | VitMae]] = {"vit": Vit, "vit_mae": VitMae}


def export(source: Path, out: Path, overwrite: bool = False, model_type: str = "vit") -> Proof:
    """Export a run, or one checkpoint of it.

    Args:
        source: a run folder (its newest checkpoint is taken) or a checkpoint folder.
        out: the Hugging Face folder; it appears only when it is proved.
        overwrite: replace `out` if it is there.
        model_type: of transformers; `vit` is the encoder, and the classifier if there is one.

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
    model = MODEL_TYPES[model_type](config, load_weights(checkpoint, averaged=True), manifest.class_names)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save(partial)
    shutil.copymode(partial / "config.json", partial / "model.safetensors")  # safetensors writes for the owner alone
    build_processor(config).save_pretrained(partial)
    proof = model.prove(partial)
    (partial / "README.md").write_text(model_card(manifest, config, model.usage, proof), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return proof


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
