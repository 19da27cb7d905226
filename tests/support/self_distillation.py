"""A small self-distillation objective."""

import torch

from pretrain.config import ModelConfig, PreprocessingConfig, SelfDistillationConfig
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


def build_self_distillation(**changes: object) -> SelfDistillationObjective:
    """Build the objective in training mode, with changes to its small config."""
    torch.manual_seed(0)
    config = SelfDistillationConfig.model_validate({**SMALL, **changes})
    objective = build_objective(config, ViT(MODEL), [], PreprocessingConfig())
    assert isinstance(objective, SelfDistillationObjective)
    return objective.train()
