"""The `objective` section with `name: self_distillation`."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pretrain.config.augment import AugmentConfig
from pretrain.config.model import ModelConfig
from pretrain.config.objective import ObjectiveSection
from pretrain.config.section import Count, Fraction, NonNegative, Positive, Problem, Rate, range_problems


class SelfDistillationConfig(ObjectiveSection):
    """Self-distillation (DINO and iBOT, arXiv 2304.07193): a student learns to predict its teacher's outputs.

    The teacher is the moving average of the student. It needs whole weights, which ZeRO stage 3 partitions, and it
    makes a second average (section `ema`) pointless. An image is cropped many times, so the CPU decodes it once.

    Both global crops are augmented in the same way; DINOv2 almost always blurs the first and rarely the second.
    """

    max_zero_stage: ClassVar[int] = 2
    supports_gpu_decode: ClassVar[bool] = False
    supports_ema: ClassVar[bool] = False

    name: Literal["self_distillation"] = Field("self_distillation", description="Objective: self-distillation.")
    num_local_crops: Count = Field(
        8, description="Number of local crops (small ones, which only the student processes) per image."
    )
    local_image_size: Count = Field(96, description="Side of a local crop in pixels; a multiple of model.patch_size.")
    local_crop_scale: tuple[Fraction, Fraction] = Field(
        (0.05, 0.32), description="Smallest and largest fraction of the image's area that a local crop keeps."
    )
    mask_probability: Fraction = Field(0.5, description="Probability that patches of a global crop are masked.")
    mask_ratios: tuple[Fraction, Fraction] = Field(
        (0.1, 0.5), description="Smallest and largest fraction of patches that are masked in such a crop."
    )
    num_prototypes: Count = Field(65536, description="Number of output prototypes of each projection head.")
    head_hidden_size: Count = Field(2048, description="Width of the hidden layers of each projection head.")
    head_bottleneck_size: Count = Field(256, description="Width of the layer before the prototypes.")
    student_temperature: Positive = Field(0.1, description="Softmax temperature of the student.")
    teacher_temperature: Positive = Field(0.07, description="Softmax temperature of the teacher after its warm-up.")
    initial_teacher_temperature: Positive = Field(
        0.04, description="Softmax temperature of the teacher at the start of the run."
    )
    temperature_warmup_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.3, description="Fraction of the run over which the teacher's temperature rises linearly."
    )
    teacher_momentum: Rate = Field(
        0.992, description="Initial momentum of the teacher's moving average; it rises to 1 at the end of the run."
    )
    koleo_weight: NonNegative = Field(
        0.1, description="Weight of the KoLeo loss, which spreads features apart; 0 disables it."
    )
    augment: AugmentConfig = AugmentConfig(
        crop_scale=(0.32, 1.0),
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        grayscale=0.2,
        solarize=0.1,
        blur=0.55,
    )

    def problems(self) -> Iterator[Problem]:
        yield from range_problems(self, "local_crop_scale", "mask_ratios")
        if self.augment.mixes:
            sentence = "mixup and cutmix mix labels, which self_distillation does not use; set both to 0"
            yield Problem(("augment.mixup", "augment.cutmix"), sentence)

    def model_problems(self, model: ModelConfig) -> Iterator[Problem]:
        if self.local_image_size % model.patch_size:
            yield Problem(
                ("objective.local_image_size", "model.patch_size"),
                f"model.patch_size={model.patch_size} does not divide {self.local_image_size}; choose a multiple of it",
            )
