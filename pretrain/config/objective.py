"""The base class of an objective's section: what the other sections need to know about the objective."""

from collections.abc import Iterator
from typing import ClassVar

from pretrain.config.model import ModelConfig
from pretrain.config.section import Problem, Section


class ObjectiveSection(Section):
    """Base class of the objectives' sections. Its class attributes say what an objective needs and supports.

    Attributes:
        needs_labels: Whether the training data must have labels.
        max_zero_stage: Largest ZeRO stage that the objective supports.
        supports_image_sizes: Whether the size of training images may change during the run.
        supports_gpu_decode: Whether training JPEGs may be decoded on the GPU.
        supports_ema: Whether an average of the weights may be kept (section `ema`).
        export_types: Model types in transformers that a run can be exported as.
    """

    needs_labels: ClassVar[bool] = False
    max_zero_stage: ClassVar[int] = 3
    supports_image_sizes: ClassVar[bool] = False
    supports_gpu_decode: ClassVar[bool] = True
    supports_ema: ClassVar[bool] = True
    export_types: ClassVar[tuple[str, ...]] = ("vit",)

    @property
    def needs_class_counts(self) -> bool:
        """Whether the number of training samples of each class must be known."""
        return False

    def model_problems(self, model: ModelConfig) -> Iterator[Problem]:
        """Yield what makes the objective impossible with `model`; keys are relative to the whole config."""
        yield from ()
