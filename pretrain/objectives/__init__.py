"""What a model learns from an image: one file an objective."""

from collections.abc import Callable, Sequence

from pretrain.config import ObjectiveConfig, PreprocessingConfig
from pretrain.model.vit import ViT
from pretrain.objectives.mae import MAEObjective
from pretrain.objectives.objective import Objective
from pretrain.objectives.self_distillation import SelfDistillationObjective
from pretrain.objectives.supervised import SupervisedObjective

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "supervised": SupervisedObjective,
    "mae": MAEObjective,
    "self_distillation": SelfDistillationObjective,
}


def build_objective(
    config: ObjectiveConfig, encoder: ViT, class_shares: Sequence[float], preprocessing: PreprocessingConfig
) -> Objective:
    """Build the objective that the config names, around an encoder.

    Args:
        config: of the objective.
        encoder: what is trained.
        class_shares: of the training data; as many as it has classes.
        preprocessing: of images in evaluation.
    """
    return OBJECTIVES[config.name](config, encoder, class_shares, preprocessing)
