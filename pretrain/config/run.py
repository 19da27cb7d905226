"""The whole configuration of a pretraining run."""

from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

from pydantic import Discriminator, Field, Tag

from pretrain.config.checkpoint import CheckpointConfig
from pretrain.config.data import DataConfig
from pretrain.config.ema import EmaConfig
from pretrain.config.engine import EngineConfig
from pretrain.config.evaluation import EvaluationConfig
from pretrain.config.health import HealthConfig
from pretrain.config.logging import LoggingConfig
from pretrain.config.mae import MAEConfig
from pretrain.config.model import ModelConfig
from pretrain.config.optimizer import OptimizerConfig
from pretrain.config.preprocessing import PreprocessingConfig
from pretrain.config.schedule import ScheduleConfig
from pretrain.config.section import CountOrZero, Problem, Section, UserPath
from pretrain.config.self_distillation import SelfDistillationConfig
from pretrain.config.supervised import SupervisedConfig
from pretrain.config.tracking import TrackingConfig


def _objective_name(section: Any) -> str:
    """Return the objective that a section is for; a section without a name is supervised."""
    return str(section.get("name", "supervised") if isinstance(section, dict) else section.name)


ObjectiveConfig: TypeAlias = Annotated[
    Annotated[SupervisedConfig, Tag("supervised")]
    | Annotated[MAEConfig, Tag("mae")]
    | Annotated[SelfDistillationConfig, Tag("self_distillation")],
    Discriminator(_objective_name),
]


class PretrainConfig(Section):
    """A pretraining run."""

    run_dir: UserPath = Field(
        description="Run folder for checkpoints, metrics and logs; it must be visible to all machines."
    )
    init_from: UserPath | None = Field(
        None,
        description="Initial weights: a run, a checkpoint, a Hugging Face ViT folder or the id of a Hub model in the "
        "local cache; null starts from scratch.",
    )
    seed: CountOrZero = Field(0, description="Random seed for weights, data order and augmentation.")
    data: DataConfig
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = SupervisedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    schedule: ScheduleConfig
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    tracking: TrackingConfig = TrackingConfig()

    def problems(self) -> Iterator[Problem]:
        yield from self.engine.mixing_problems(self.objective.augment)
        yield from self.objective.model_problems(self.model)
        yield from self._data_problems()
        yield from self._image_size_problems()
        yield from self._objective_problems()

    def _data_problems(self) -> Iterator[Problem]:
        if self.engine.global_batch_size % self.data.repeats:
            sentence = f"{self.data.repeats} does not divide engine.global_batch_size={self.engine.global_batch_size}"
            yield Problem(("data.repeats", "engine.global_batch_size"), f"{sentence}; change one of the two")
        if self.evaluation.probe_every_steps and self.data.validation is None:
            sentence = "required by evaluation.probe_every_steps but missing; set it or turn the probes off"
            yield Problem(("data.validation", "evaluation.probe_every_steps"), sentence)
        if self.data.stream and self.evaluation.probe_every_steps:
            sentence = "probes need indexed training data, but data.stream=true; set it to 0, or index the tars"
            yield Problem(("evaluation.probe_every_steps", "data.stream"), sentence)
        if self.data.stream and self.objective.needs_class_counts:
            sentence = "balanced needs the size of each class, but data.stream=true; use a list, or index the tars"
            yield Problem(("objective.class_weights", "data.stream"), sentence)
        if self.data.stream and self.objective.needs_labels and not (self.data.validation or self.data.class_names):
            sentence = f"required by data.stream=true with objective.name={self.objective.name} but missing; set it"
            yield Problem(("data.class_names", "data.stream"), sentence)

        if self.data.stream and self.schedule.epochs:
            sentence = "the number of samples of a stream is unknown; set total_steps instead, or index the tars"
            yield Problem(("schedule.epochs", "data.stream"), sentence)

    def _image_size_problems(self) -> Iterator[Problem]:
        for _, pixels in self.schedule.image_sizes:
            if pixels % self.model.patch_size:
                sentence = f"model.patch_size={self.model.patch_size} does not divide {pixels}; use a multiple of it"
                yield Problem(("schedule.image_sizes", "model.patch_size"), sentence)
        if self.schedule.image_sizes and self.data.decode == "gpu":
            sentence = "gpu decodes to a single size, but schedule.image_sizes has several; use cpu"
            yield Problem(("data.decode", "schedule.image_sizes"), sentence)

    def _objective_problems(self) -> Iterator[Problem]:
        """Yield settings outside the objective's section that the objective does not support."""
        objective = self.objective
        given = f"objective.name={objective.name}"
        if self.schedule.image_sizes and not objective.supports_image_sizes:
            sentence = f"{given} supports only one image size; remove schedule.image_sizes"
            yield Problem(("schedule.image_sizes", "objective.name"), sentence)
        if self.engine.zero_stage > objective.max_zero_stage:
            sentence = f"{given} supports ZeRO stages up to {objective.max_zero_stage}; lower it"
            yield Problem(("engine.zero_stage", "objective.name"), sentence)
        if self.ema.decay and not objective.supports_ema:
            sentence = f"{given} already averages its weights; set it to 0"
            yield Problem(("ema.decay", "objective.name"), sentence)
        if self.data.decode == "gpu" and not objective.supports_gpu_decode:
            yield Problem(("data.decode", "objective.name"), f"{given} does not support decoding on the gpu; use cpu")
