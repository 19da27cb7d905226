"""What a model learns from an image: one file an objective."""

from collections.abc import Callable

from pretrain.config import ObjectiveConfig, PreprocessingConfig
from pretrain.model.vit import ViT
from pretrain.objectives.mae import MAEObjective
from pretrain.objectives.objective import Objective
from pretrain.objectives.supervised import SupervisedObjective

OBJECTIVES: dict[str, Callable[..., Objective]] = {"supervised": SupervisedObjective, "mae": MAEObjective}


def build_objective(
    config: ObjectiveConfig, encoder: ViT, num_classes: int, preprocessing: PreprocessingConfig
) -> Objective:
    """Build the objective that the config names, around an encoder."""
    return OBJECTIVES[config.name](config, encoder, num_classes, preprocessing)
