"""Export of a checkpoint as a Hugging Face folder, which is written aside, proved and then renamed."""

import shutil
from pathlib import Path

import transformers

from pretrain.checkpoint.history import find_checkpoint
from pretrain.checkpoint.pieces import load_verified
from pretrain.config import PretrainConfig
from pretrain.errors import CheckpointError
from pretrain.export.card import model_card
from pretrain.export.proof import Proof
from pretrain.export.vit import Vit
from pretrain.export.vit_mae import VitMae
from pretrain.files import atomic_folder
from pretrain.journal import Row, read_rows
from pretrain.tracking.tracker import METRICS_FILE

MODEL_TYPES: dict[str, type[Vit | VitMae]] = {"vit": Vit, "vit_mae": VitMae}


def export(source: Path, out: Path, overwrite: bool = False, model_type: str = "vit") -> Proof:
    """Export a run, or one of its checkpoints, as a Hugging Face folder.

    Args:
        source: Run folder, whose newest checkpoint is exported, or a checkpoint folder.
        out: Hugging Face folder to create. It appears only after the proof has succeeded.
        overwrite: Whether to replace `out` if it exists.
        model_type: Model type in transformers: "vit" for the encoder and its classifier if there is one, "vit_mae"
            for a masked autoencoder with its decoder.

    Returns:
        Largest differences between the folder and the trained model.

    Raises:
        CheckpointError: If `source` has no intact checkpoint, or if `out` exists and may not be replaced.
    """
    checkpoint = find_checkpoint(source)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out}: output folder already exists; choose another one or pass --overwrite")
    if out.exists() and not (out / "config.json").exists():
        raise CheckpointError(f"{out}: not a Hugging Face folder, so it is not overwritten; choose another one")
    manifest, weights = load_verified(checkpoint)
    config = manifest.parse_config(checkpoint)
    model = MODEL_TYPES[model_type](config, weights, manifest.class_names)
    with atomic_folder(out, overwrite=overwrite) as folder:
        model.save(folder)
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes it private
        build_processor(config).save_pretrained(folder)
        proof = model.prove(folder)
        measured = read_measured(checkpoint.parents[1], manifest.state.step)
        card = model_card(manifest, config, model.usage, proof, measured)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return proof


def read_measured(run_dir: Path, step: int) -> Row:
    """Return all metrics that a run has logged for a step; several rows may share it."""
    rows = (row for row in read_rows(run_dir / METRICS_FILE) if row["step"] == step)
    return {name: value for row in rows for name, value in row.items()}


def build_processor(config: PretrainConfig) -> transformers.BitImageProcessorPil:
    """Build the image processor that does what `EvalView` does. transformers 4 and 5 both load BitImageProcessor."""
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
