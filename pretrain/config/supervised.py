"""The `objective` section with `name: supervised`."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from pretrain.config.augment import AugmentConfig
from pretrain.config.objective import ObjectiveSection
from pretrain.config.section import Positive, Problem, Rate


class SupervisedConfig(ObjectiveSection):
    """Supervised classification of whole images."""

    needs_labels: ClassVar[bool] = True
    supports_image_sizes: ClassVar[bool] = True

    @property
    def needs_class_counts(self) -> bool:
        return self.class_weights == "balanced"

    name: Literal["supervised"] = Field(
        "supervised", description="Objective: supervised, mae or self_distillation; each has its own keys."
    )
    loss: Literal["cross_entropy", "binary_cross_entropy"] = Field(
        "cross_entropy",
        description='Loss: "cross_entropy", or "binary_cross_entropy" for an independent decision per class '
        "(arXiv 2110.00476).",
    )
    loss_reduction: Literal["mean", "sum"] = Field(
        "mean", description='Reduction of binary_cross_entropy over classes: "mean", or "sum" as in arXiv 2106.10270.'
    )
    head_bias: float = Field(
        0.0,
        description="Initial bias of the classifier; -10 starts binary_cross_entropy near probability 0 for each class "
        "(arXiv 2106.10270).",
    )
    label_smoothing: Rate = Field(0.0, description="Share of the target distributed evenly over all classes.")
    class_weights: Literal["none", "balanced"] | list[Positive] = Field(
        "none",
        description='Per-class loss weights: "none", "balanced" (inverse frequency) or a list with one value each.',
    )
    patch_dropout: Rate = Field(
        0.0,
        description="Fraction of patches dropped in training (arXiv 2208.07220); faster but less accurate.",
    )
    augment: AugmentConfig = AugmentConfig()

    def problems(self) -> Iterator[Problem]:
        if self.loss_reduction == "sum" and self.loss == "cross_entropy":
            yield Problem(("loss_reduction", "loss"), "sum requires loss=binary_cross_entropy; use mean")
