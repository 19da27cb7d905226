"""Begin a run from weights that are there: of another run, or of an ordinary Hugging Face folder of a ViT."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.checkpoint.history import find_checkpoint
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.pieces import find_faults, load_weights
from pretrain.errors import CheckpointError
from pretrain.model.vit import resize_positions

POSITIONS = "encoder.position_embedding"
SCALES = ("attention_scale.weight", "mlp_scale.weight")
# Names on the disk in a folder of model type "vit", in either transformers 4 or 5, and ours.
NAMES = (
    ("vit.", ""),
    ("encoder.layer.", "layers."),
    ("embeddings.patch_embeddings.projection.", "patch_embedding."),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "position_embedding"),
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("layernorm_before.", "norm_before."),
    ("layernorm_after.", "norm_after."),
    ("layernorm.", "norm."),
)


def warm_start(objective: nn.Module, path: Path, class_names: list[str], layer_norm_eps: float) -> str:
    """Give an objective the weights at `path`, before it goes under an engine.

    The encoder must fit whole, but for its positions, which are interpolated to this run's number of patches, and for
    LayerScale, which an export has folded into the layers before it. What lies around it is taken over from a run with
    the same classes, else it starts anew.

    Args:
        objective: has an `encoder`.
        path: a run folder, one of its checkpoints, or a Hugging Face folder.
        class_names: of this run.
        layer_norm_eps: of this run's encoder.

    Returns:
        A sentence that says what was changed and what starts anew.

    Raises:
        CheckpointError: nothing usable there, or the encoder's tensors differ; the message names them.
    """
    own = objective.state_dict()
    if (path / "config.json").exists():
        found = _read_hugging_face(path, layer_norm_eps)
        head: dict[str, Tensor] = {}
    else:
        checkpoint = find_checkpoint(path)
        if faults := list(find_faults(checkpoint)):
            raise CheckpointError("\n".join(faults))
        found = load_weights(checkpoint, averaged=True)
        same_classes = Manifest.load(checkpoint).class_names == class_names
        head = {name: found[name] for name in found if not name.startswith("encoder.")} if same_classes else {}
    encoder = {name: weight for name, weight in found.items() if name.startswith("encoder.")}
    wanted = {name for name in own if name.startswith("encoder.")}
    wrong, said = [], f"started from {path}"
    if (positions := encoder.get(POSITIONS)) is not None and positions.shape[1:2] != own[POSITIONS].shape[1:2]:
        encoder[POSITIONS] = resize_positions(positions, own[POSITIONS].shape[1] - 1)
        said += f"; positions interpolated from {positions.shape[1] - 1} patches to {own[POSITIONS].shape[1] - 1}"
    scales = {name for name in wanted if name.endswith(SCALES)}
    if scales and not scales & encoder.keys():
        encoder |= {name: torch.ones_like(own[name]) for name in scales}
        said += "; LayerScale starts at 1, since there is none there"
    for name in sorted(wanted | encoder.keys()):
        there = list(encoder[name].shape) if name in encoder else "nothing"
        here = list(own[name].shape) if name in wanted else "nothing"
        if name.endswith("patch_embedding.weight") and name in encoder and encoder[name].numel() == own[name].numel():
            encoder[name] = encoder[name].reshape(own[name].shape)  # theirs is a convolution, ours a matrix
        elif there != here:
            wrong.append(f"  {name}: {there} there, {here} here")
    if wrong:
        raise CheckpointError("\n".join([f"{path}: its encoder does not fit this run's model:", *wrong]))
    taken = encoder | {name: head[name] for name in head if name in own and head[name].shape == own[name].shape}
    with torch.no_grad():
        for name, weight in taken.items():
            own[name].copy_(weight)
    anew = sorted(own.keys() - taken.keys())
    return said + (f"; {', '.join(anew)} anew" if anew else "")


def _read_hugging_face(folder: Path, layer_norm_eps: float) -> dict[str, Tensor]:
    """Return the encoder of a Hugging Face folder by our names."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") not in ("vit", "vit_mae"):
        raise CheckpointError(
            f"{folder}: holds a {config.get('model_type')}; init_from reads model type vit or vit_mae"
        )
    if config.get("layer_norm_eps", 1e-12) != layer_norm_eps:
        theirs = config.get("layer_norm_eps", 1e-12)
        raise CheckpointError(f"{folder}: its layer_norm_eps is {theirs:g}; set model.layer_norm_eps={theirs:g}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: has no *.safetensors; save it again with save_pretrained")
    found = {}
    for name, weight in {name: weight for file in files for name, weight in load_file(file).items()}.items():
        if name.startswith(("classifier.", "vit.pooler.", "pooler.", "decoder.")):
            continue
        for theirs, ours in NAMES:
            name = name.replace(theirs, ours)  # noqa: PLW2901
        found[f"encoder.{name}"] = weight.float()
    return found
