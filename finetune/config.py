"""A fine-tuning run on one page. What it shares with pretraining has the same name and the same class."""

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
    """Shard sets, or folders with a subfolder for each class."""

    validation: Location
    labels_per_class: Count | None = Field(None, description="train on so many samples of each class, drawn by seed")


class FinetuneScheduleConfig(Section):
    """Linear warm-up, then cosine decay to zero."""

    epochs: Count = 10
    warmup_epochs: NonNegative = 0.0


class FinetuneEngineConfig(BatchConfig):
    """How Accelerate runs a step."""

    precision: Literal["fp32", "bf16"] = "fp32"


class FinetuneEvaluationConfig(Section):
    """When the validation set is gone through: every so many epochs and at the end."""

    every_epochs: Count = 1


class FinetuneConfig(Section):
    """A fine-tuning run."""

    run_dir: UserPath
    model: UserPath = Field(description="a Hugging Face folder")
    from_scratch: bool = Field(False, description="take the folder's architecture but not its weights, as a baseline")
    freeze_backbone: bool = Field(False, description="train the new head alone")
    overwrite: bool = Field(False, description="replace the model that an earlier run left in run_dir")
    seed: CountOrZero = 0
    label_smoothing: Rate = 0.0
    data: FinetuneDataConfig
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: FinetuneScheduleConfig = FinetuneScheduleConfig()
    engine: FinetuneEngineConfig = FinetuneEngineConfig()
    evaluation: FinetuneEvaluationConfig = FinetuneEvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    tracking: TrackingConfig = TrackingConfig()

    def problems(self) -> Iterator[Problem]:
        yield from self.engine.problems_of_mixing(self.augment)
