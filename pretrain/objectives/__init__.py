"""What a model learns from an image: one file an objective."""

from pretrain.config import PreprocessingConfig, SupervisedConfig
from pretrain.model.vit import ViT
from pretrain.objectives.objective import Objective
from pretrain.objectives.supervised import SupervisedObjective

OBJECTIVES: dict[str, type[SupervisedObjective]] = {"supervised": SupervisedObjective}


def build_objective(
    config: SupervisedConfig, encoder: ViT, num_classes: int, preprocessing: PreprocessingConfig
) -> Objective:
    """Build the objective that the config names, around an encoder."""
    return OBJECTIVES[config.name](config, encoder, num_classes, preprocessing)
