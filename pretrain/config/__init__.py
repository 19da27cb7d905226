"""The configuration of a pretraining run: typed, strict, one file per section, validated before torch is imported.

Model sizes have Hugging Face's names. A constructor is given the section it needs, never the whole config.
"""

from pretrain.config.augment import AugmentConfig
from pretrain.config.checkpoint import CheckpointConfig
from pretrain.config.data import DataConfig, FaultBudget, SourceConfig
from pretrain.config.ema import EmaConfig
from pretrain.config.engine import BatchConfig, EngineConfig
from pretrain.config.evaluation import EvaluationConfig
from pretrain.config.health import HealthConfig
from pretrain.config.logging import LoggingConfig
from pretrain.config.mae import MAEConfig
from pretrain.config.model import ModelConfig
from pretrain.config.objective import ObjectiveSection
from pretrain.config.optimizer import OptimizerConfig
from pretrain.config.preprocessing import PreprocessingConfig
from pretrain.config.run import ObjectiveConfig, PretrainConfig
from pretrain.config.schedule import ScheduleConfig
from pretrain.config.section import (
    Count,
    CountOrZero,
    Fraction,
    Location,
    NonNegative,
    Positive,
    Problem,
    Rate,
    Section,
    UserPath,
)
from pretrain.config.self_distillation import SelfDistillationConfig
from pretrain.config.supervised import SupervisedConfig
from pretrain.config.tracking import TrackingConfig

__all__ = [
    "AugmentConfig",
    "BatchConfig",
    "CheckpointConfig",
    "Count",
    "CountOrZero",
    "DataConfig",
    "EmaConfig",
    "EngineConfig",
    "EvaluationConfig",
    "FaultBudget",
    "Fraction",
    "HealthConfig",
    "Location",
    "LoggingConfig",
    "MAEConfig",
    "ModelConfig",
    "NonNegative",
    "ObjectiveConfig",
    "ObjectiveSection",
    "OptimizerConfig",
    "Positive",
    "PreprocessingConfig",
    "PretrainConfig",
    "Problem",
    "Rate",
    "ScheduleConfig",
    "Section",
    "SelfDistillationConfig",
    "SourceConfig",
    "SupervisedConfig",
    "TrackingConfig",
    "UserPath",
]
