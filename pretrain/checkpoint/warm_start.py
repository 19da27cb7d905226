"""Start a run from existing weights: another run, or an ordinary Hugging Face folder of a ViT."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.checkpoint.history import find_checkpoint
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.pieces import load_verified
from pretrain.config import PreprocessingConfig
from pretrain.errors import CheckpointError
from pretrain.hub import CONFIG_FILE, PROCESSOR_FILE, find_model, read_settings
from pretrain.model.hub_names import encoder_from_hub
from pretrain.model.vit import resize_positions

ENCODER_PREFIX = "encoder."
POSITIONS = "encoder.position_embedding"
SCALES = ("attention_scale.weight", "mlp_scale.weight")
HUB_LAYER_NORM_EPS = 1e-12  # what transformers assumes if a folder's config does not set it
# Settings of image processors that no setting of a run can repeat, with the values that every run has.
FIXED_SETTINGS = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "rescale_offset": False,
    "do_flip_channel_order": False,
}
UNCHANGED = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}  # the normalization that changes nothing


def warm_start(
    objective: nn.Module,
    path: Path,
    class_names: list[str],
    layer_norm_eps: float,
    preprocessing: PreprocessingConfig | None = None,
) -> str:
    """Copy the weights at `path` into an objective, before DeepSpeed takes it over.

    All tensors of the encoder must match, with two exceptions: positions are interpolated to this model's number of
    patches, and LayerScale starts at 1 if the source has none (an export folds it into other layers). Heads and other
    weights outside the encoder are copied only from a run with the same classes; otherwise they keep their random
    values.

    Args:
        objective: Objective of this run, with an `encoder`.
        path: Run folder, checkpoint folder, Hugging Face folder, or the id of a Hub model in the local cache.
        class_names: Class names of this run.
        layer_norm_eps: Epsilon of this run's LayerNorms.
        preprocessing: Normalization of this run's images, to be compared with that of the source.

    Returns:
        Sentence for the log that says what was changed, which weights start from random values, and whether the source
        was trained on images that were normalized otherwise.

    Raises:
        CheckpointError: If there are no usable weights, if the encoder's tensors differ (the message names them), or if
            the source changes pixels in a way that this run cannot.
    """
    path = find_model(path)
    own = objective.state_dict()
    others: dict[str, Tensor] = {}
    if (path / CONFIG_FILE).exists():
        encoder = _read_hub_encoder(path, layer_norm_eps)
    else:
        encoder, others = _read_checkpoint(path, class_names)
    changes = [*_fit_positions(encoder, own), *_add_layer_scale(encoder, own)]
    if differences := _differences(encoder, own):
        lines = "\n".join(f"  {line}" for line in differences)
        raise CheckpointError(f"{path}: its encoder does not fit this run's model; change the section model:\n{lines}")
    fitting = {name: weight for name, weight in others.items() if name in own and own[name].shape == weight.shape}
    copied = encoder | fitting
    with torch.no_grad():
        for name, weight in copied.items():
            own[name].copy_(weight)
    random = sorted(own.keys() - copied.keys())
    if random:
        changes.append(f"random values for {', '.join(random)}")
    if preprocessing is not None:
        changes += _compare_normalization(_read_normalization(path), preprocessing)
    return "; ".join([f"started from {path}", *changes])


def _read_normalization(path: Path) -> dict[str, list[float]]:
    """Return the mean and the standard deviation with which a source normalizes pixels in [0, 1].

    Values that the source does not name are left out.

    Raises:
        CheckpointError: If the source changes pixels in a way that this run cannot.
    """
    if not (path / CONFIG_FILE).exists():
        return dict(Manifest.load(find_checkpoint(path)).config.get("preprocessing", {}))
    file = path / PROCESSOR_FILE
    settings = read_settings(file)
    for name, expected in FIXED_SETTINGS.items():
        if not _is_close(settings.get(name, expected) or False, expected):  # null has the effect of false
            raise CheckpointError(
                f"{file}: has {name}={settings[name]}, but a run rescales pixels to [0, 1] and has the channels red, "
                "green, blue; choose a folder whose images are prepared in this way"
            )
    if not settings.get("do_normalize", True):
        return UNCHANGED
    return {name: _channels(file, name, settings[name]) for name in UNCHANGED if settings.get(name) is not None}


def _is_close(value: Any, expected: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, expected, rel_tol=1e-4)


def _channels(file: Path, name: str, value: Any) -> list[float]:
    """Return a setting of an image processor, a number or one for each color, as three numbers.

    Raises:
        CheckpointError: If it is something else.
    """
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3 or not all(isinstance(each, int | float) for each in values):
        raise CheckpointError(
            f"{file}: {name}={value} is not a number or a list of three; correct it or download the folder again"
        )
    return values


def _compare_normalization(source: Mapping[str, list[float]], preprocessing: PreprocessingConfig) -> list[str]:
    """Return a sentence if a source normalizes images in another way than this run."""
    others = [
        f"preprocessing.{name}={[*source[name]]}"
        for name in UNCHANGED
        if name in source and not np.allclose(source[name], getattr(preprocessing, name), atol=1e-4)
    ]
    if not others:
        return []
    settings = " ".join(others)
    return [f"the source normalizes images otherwise; set {settings} so that it sees the images that it knows"]


def _read_checkpoint(path: Path, class_names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the encoder of a run's checkpoint, and its other weights if the run had the same classes."""
    manifest, weights = load_verified(path)
    encoder = {name: weight for name, weight in weights.items() if name.startswith(ENCODER_PREFIX)}
    if manifest.class_names != class_names:
        return encoder, {}
    return encoder, {name: weight for name, weight in weights.items() if name not in encoder}


def _read_hub_encoder(folder: Path, layer_norm_eps: float) -> dict[str, Tensor]:
    """Return the encoder of a Hugging Face folder by its names in an objective."""
    config = read_settings(folder / CONFIG_FILE)
    if config.get("model_type") not in ("vit", "vit_mae"):
        found = f"has model type {config.get('model_type')}, but init_from reads vit and vit_mae"
        raise CheckpointError(f"{folder}: {found}; choose a folder of one of these")
    found_eps = config.get("layer_norm_eps", HUB_LAYER_NORM_EPS)
    if found_eps != layer_norm_eps:
        raise CheckpointError(f"{folder}: its layer_norm_eps is {found_eps:g}; set model.layer_norm_eps={found_eps:g}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: has no *.safetensors; save it again with save_pretrained")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {f"{ENCODER_PREFIX}{name}": weight for name, weight in encoder_from_hub(tensors).items()}


def _fit_positions(encoder: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Interpolate the encoder's positions in place if this model has another number of patches."""
    positions = encoder.get(POSITIONS)
    if positions is None or positions.shape[1:2] == own[POSITIONS].shape[1:2]:
        return []
    num_patches = own[POSITIONS].shape[1] - 1
    encoder[POSITIONS] = resize_positions(positions, math.isqrt(num_patches))
    return [f"positions interpolated from {positions.shape[1] - 1} patches to {num_patches}"]


def _add_layer_scale(encoder: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Add LayerScale factors of 1 in place if this model has them and the source does not."""
    scales = {name for name in own if name.startswith(ENCODER_PREFIX) and name.endswith(SCALES)}
    if not scales or scales & encoder.keys():
        return []
    encoder |= {name: torch.ones_like(own[name]) for name in scales}
    return ["LayerScale starts at 1, because the source has none"]


def _differences(encoder: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Return one line for each tensor of the encoder that is missing, unexpected or of another shape."""
    expected = {name: weight for name, weight in own.items() if name.startswith(ENCODER_PREFIX)}
    lines = []
    for name in sorted(expected.keys() | encoder.keys()):
        theirs, ours = (list(each[name].shape) if name in each else "missing" for each in (encoder, expected))
        if theirs != ours:
            lines.append(f"{name}: {theirs} in the source, {ours} in this model")
    return lines
