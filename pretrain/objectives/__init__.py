"""Training objectives, one file each: supervised classification, masked autoencoding and self-distillation."""

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
    """Build the objective that the config names around an encoder.

    Args:
        config: Section `objective` of the run's config.
        encoder: Vision Transformer to train.
        class_shares: Share of each class in the training data, one value per class; empty without labels.
        preprocessing: Resize ratio, mean and standard deviation of images in evaluation.
    """
    return OBJECTIVES[config.name](config, encoder, class_shares, preprocessing)
