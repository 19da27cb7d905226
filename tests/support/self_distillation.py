"""A small self-distillation objective, its batches, and its losses with boolean masks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import ModelConfig, PreprocessingConfig, SelfDistillationConfig
from pretrain.data.transforms.batch import Batch
from pretrain.data.transforms.device_decode import collate
from pretrain.model.vit import ViT
from pretrain.objectives import build_objective
from pretrain.objectives.self_distillation import SelfDistillationObjective

MODEL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=8, image_size=32
)
SMALL = {
    "num_local_crops": 3,
    "local_image_size": 16,
    "num_prototypes": 48,
    "head_hidden_size": 32,
    "head_bottleneck_size": 16,
    "mask_probability": 1.0,
}
# Operations whose result or its shape the host must know before it can go on.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "is_nonzero",
    "equal",
    "lift_fresh",  # a tensor of Python numbers, which the host copies from memory that is not pinned
    "lift_fresh_copy",
}


def build_self_distillation(**changes: object) -> SelfDistillationObjective:
    """Build the objective in training mode, with changes to its small config."""
    torch.manual_seed(0)
    config = SelfDistillationConfig.model_validate({**SMALL, **changes})
    objective = build_objective(config, ViT(MODEL), [], PreprocessingConfig())
    assert isinstance(objective, SelfDistillationObjective)
    return objective.train()


def crop_images(objective: SelfDistillationObjective, positions: Sequence[int]) -> Batch:
    """Return a batch of random images; the image at a position and its crops depend on the position only."""
    view, samples = objective.train_view(32), []
    for position in positions:
        random = np.random.default_rng(position)
        image = np.kron(random.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((6, 6, 1), np.uint8))
        samples.append({**view(image, random), "position": position})
    return collate(samples)


def move_apart(objective: SelfDistillationObjective) -> None:
    """Change all weights, so that student and teacher differ."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in [*objective.parameters(), *objective.encoder.buffers()]:
            tensor.add_(0.1 * torch.randn_like(tensor))


def losses_with_boolean_masks(objective: SelfDistillationObjective, batch: Batch) -> dict[str, Tensor]:
    """Return the losses of one process, whose host waits to learn which patches the boolean masks select."""
    masked, temperature = batch["mask"].flatten(0, 1), objective.config.student_temperature
    global_crops, local_crops = objective._augment(batch["global_crops"]), objective._augment(batch["local_crops"])
    with torch.no_grad():
        seen = objective.encoder(global_crops)
        targets = _balanced(objective.cls_head(seen[:, 0]) / objective.teacher_temperature).reshape(
            len(seen) // 2, 2, -1
        )
        patch_targets = _balanced(objective.patch_head(seen[:, 1:][masked]) / objective.teacher_temperature)
    tokens = objective.student(global_crops, mask=(masked, objective.mask_token))
    global_cls = tokens[:, 0].reshape(len(tokens) // 2, 2, -1)
    local_cls = objective.student(local_crops)[:, 0].reshape(len(global_cls), -1, tokens.shape[-1])
    global_said, local_said = (
        (objective.student_cls_head(cls) / temperature).log_softmax(-1) for cls in (global_cls, local_cls)
    )
    pairs = (targets.flip(1) * global_said).sum((1, 2)) + (targets.sum(1, keepdim=True) * local_said).sum((1, 2))
    patches_said = (objective.student_patch_head(tokens[:, 1:][masked]) / temperature).log_softmax(-1)
    num_masked = masked.sum(1, keepdim=True).expand_as(masked)[masked]
    losses = {
        "dino": -pairs.mean() / (2 * (1 + local_said.shape[1])),
        "ibot": (-(patch_targets * patches_said).sum(-1) / num_masked).sum() / len(masked),
        "koleo": sum((_log_distances(crop) for crop in global_cls.unbind(1)), torch.zeros(())),
    }
    return {**losses, "loss": losses["dino"] + losses["ibot"] + objective.config.koleo_weight * losses["koleo"]}


def _balanced(logits: Tensor) -> Tensor:
    """Return the result of Sinkhorn-Knopp, every entry of which is divided in each iteration."""
    shares = logits.exp()
    for _ in range(3):
        shares = shares / shares.sum(0) * shares.shape[0] / shares.shape[1]
        shares = shares / shares.sum(1, keepdim=True)
    return shares


def _log_distances(features: Tensor) -> Tensor:
    """Return the mean of -log(distance to the nearest other row), or of a constant if there is no other."""
    rows = F.normalize(features, dim=-1)
    nearest = (rows @ rows.T - 4 * torch.eye(len(rows))).argmax(1)
    return -(torch.linalg.vector_norm(rows - rows[nearest] + 1e-8, dim=1) + 1e-8).log().mean()


class OperationCounter(TorchDispatchMode):
    """Count the operations that torch starts, and those among them for which the host of a GPU would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        self.operations[name] += 1
        masks = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        sizes_on_device = function._overloadname == "Tensor" and name == "repeat_interleave"
        if name in WAITS or sizes_on_device or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            self.waits[name] += 1
        return function(*args, **(kwargs or {}))
