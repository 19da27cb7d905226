"""The configuration of a fine-tuning run. What it shares with pretraining has the same name and the same class."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from pretrain.config import (
    AugmentConfig,
    BatchConfig,
    Count,
    CountOrZero,
    Location,
    LoggingConfig,
    NonNegative,
    OptimizerConfig,
    Problem,
    Rate,
    Section,
    SourceConfig,
    TrackingConfig,
    UserPath,
)


class FinetuneDataConfig(SourceConfig):
    """Training and validation data: shard sets, or folders with one subfolder per class."""

    validation: Location = Field(description="Validation data: a path or URL.")
    labels_per_class: Count | None = Field(
        None, description="Training samples per class, chosen by the seed; null uses all of them."
    )


class FinetuneScheduleConfig(Section):
    """Linear warm-up followed by a cosine decay to zero."""

    epochs: Count = Field(10, description="Number of passes over the training data.")
    warmup_epochs: NonNegative = Field(0.0, description="Epochs over which the learning rate rises to its peak.")


class FinetuneEngineConfig(BatchConfig):
    """Batch sizes and precision under Accelerate."""

    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Precision of the forward and backward pass in training; auto is bf16 on GPUs that support it and "
        "fp32 elsewhere. Weights, their updates and evaluations are always fp32.",
    )
    compile: bool = Field(
        False, description="Whether to compile the model with torch.compile for training; faster on a GPU."
    )


class FinetuneEvaluationConfig(Section):
    """Frequency of validation. The last epoch is always validated."""

    every_epochs: Count = Field(1, description="Epochs between validations.")


class FinetuneConfig(Section):
    """A fine-tuning run."""

    run_dir: UserPath = Field(description="Run folder for the fine-tuned model, its metrics and its report.")
    model: UserPath = Field(
        description="Model to fine-tune: a Hugging Face folder, or the id of a Hub model in the local cache."
    )
    from_scratch: bool = Field(
        False, description="Whether to start from random weights in the model's architecture, as a baseline."
    )
    freeze_backbone: bool = Field(False, description="Whether to train only the new classification head.")
    overwrite: bool = Field(False, description="Whether to replace the model that an earlier run left in run_dir.")
    seed: CountOrZero = Field(0, description="Random seed for the new weights, data order and augmentation.")
    label_smoothing: Rate = Field(0.0, description="Share of the target distributed evenly over all classes.")
    data: FinetuneDataConfig
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: FinetuneScheduleConfig = FinetuneScheduleConfig()
    engine: FinetuneEngineConfig = FinetuneEngineConfig()
    evaluation: FinetuneEvaluationConfig = FinetuneEvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    tracking: TrackingConfig = TrackingConfig()

    def problems(self) -> Iterator[Problem]:
        yield from self.engine.mixing_problems(self.augment)
