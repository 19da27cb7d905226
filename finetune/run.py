"""A fine-tuning run: its data, its model under Accelerate, and its run folder."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from finetune.backbone import check_input, new_classifier
from finetune.config import FinetuneConfig
from finetune.preprocessor import Normalization, Preprocessor, load_preprocessor, measure_normalization
from finetune.unused import freeze_unused_parameters
from pretrain import distributed
from pretrain.configfile import flatten
from pretrain.data.dataset.classes import check_classes, leave_out_empty_classes
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.open import open_cache, open_dataset
from pretrain.data.dataset.subset import LabelSubset
from pretrain.data.loading.quarantine import QUARANTINE_FILE, Quarantine
from pretrain.data.transforms.views import TrainView, View
from pretrain.distributed import on_all_ranks
from pretrain.environment import check_environment
from pretrain.errors import DataError, UserError
from pretrain.files import make_writable
from pretrain.heartbeat.watch import Watch
from pretrain.hub import MODEL_FOLDER, find_model
from pretrain.indexing import index_new_tars
from pretrain.machine import fit_to_machine
from pretrain.optimizers import build_optimizer
from pretrain.optimizers.layer_decay import apply_layer_decay
from pretrain.optimizers.placement import Placement
from pretrain.run_folder import claim_run_dir
from pretrain.tracking.tracker import RunDescription, Tracker

# Environment variables by which Accelerate would change a run.
PLUGINS = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")
WRAPPERS = {f"ACCELERATE_USE_{plugin}" for plugin in PLUGINS}
HARMLESS = {"ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE"}
PRETRAINING_FOLDER = "checkpoints"  # only a pretraining run has this folder


@dataclass(frozen=True)
class FinetuneRun:
    """Everything that a fine-tuning run works with.

    Attributes:
        config: Resolved run configuration.
        accelerator: Accelerate's view of the ranks, the device and the precision.
        classifier: Hugging Face model.
        model: The same model, wrapped for training on all ranks, and compiled if the config asks for it.
        optimizer: Optimizer of the trainable parameters, wrapped by Accelerate.
        preprocessor: Preprocessing of the model's folder.
        normalization: Normalization of training images, which equals that of the preprocessor.
        training: Training data.
        validation: Validation data.
        quarantine: List of unusable samples.
    """

    config: FinetuneConfig
    accelerator: Accelerator
    classifier: Any
    model: Any
    optimizer: Any
    preprocessor: Preprocessor
    normalization: Normalization
    training: Dataset
    validation: Dataset
    quarantine: Quarantine

    @property
    def uses_bf16(self) -> bool:
        """Whether training computes in bf16 where float32 is not needed."""
        if self.config.engine.precision != "auto":
            return self.config.engine.precision == "bf16"
        on_gpu: bool = self.accelerator.device.type == "cuda"
        return on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)

    @property
    def model_folder(self) -> Path:
        """Hugging Face folder of the best model."""
        return self.config.run_dir / MODEL_FOLDER

    @property
    def num_samples(self) -> int:
        """Number of training samples per epoch."""
        return sum(self.training.shard_sizes)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the run."""
        return self.steps_after(self.config.schedule.epochs)

    def steps_after(self, epochs: float) -> int:
        """Return the number of optimizer steps after which every sample has been used `epochs` times."""
        return math.ceil(epochs * self.num_samples / self.config.engine.global_batch_size)

    def evaluation_epochs(self) -> dict[int, int]:
        """Return the epoch that ends with each step after which the model is evaluated, by step."""
        epochs = self.config.schedule.epochs
        return {
            self.steps_after(epoch): epoch
            for epoch in range(1, epochs + 1)
            if epoch % self.config.evaluation.every_epochs == 0 or epoch == epochs
        }


def build_accelerator() -> Accelerator:
    """Start Accelerate on this rank: on its GPU if there is one, otherwise on the CPU. The config alone decides.

    Raises:
        UserError: If a variable that `accelerate launch` sets from its own config would wrap the model.
    """
    for name in sorted(name for name in WRAPPERS if os.environ.get(name, "").lower() in ("1", "true")):
        raise UserError(f"{name} is set, perhaps by `accelerate launch`, but fine-tuning does not support it; unset it")
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") and name not in HARMLESS]:
        del os.environ[name]
    # `mixed_precision` would also change the evaluated model, because Accelerate replaces its `forward`.
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")


@contextmanager
def claim(config: FinetuneConfig) -> Iterator[Watch]:
    """Claim the run folder for this run until the block ends; heartbeats show that it is in use (collective).

    Raises:
        UserError: If another run uses the folder, or a result in it would be lost.
    """
    on_all_ranks(check_environment)
    on_all_ranks(lambda: check_run_dir(config))
    claim_run_dir(config.run_dir)
    with Watch(config.run_dir, distributed.rank(), distributed.world_size()) as watch:
        yield watch


def build_run(config: FinetuneConfig, accelerator: Accelerator) -> FinetuneRun:
    """Open the data, load the backbone under a new head, and prepare both for training on all ranks (collective)."""
    index_new_tars(config.data, config.data.train, config.data.validation, labels_required=True)
    training, validation = on_all_ranks(lambda: open_data(config))
    torch.manual_seed(config.seed)
    folder = on_all_ranks(lambda: find_model(config.model))
    preprocessor = on_all_ranks(lambda: load_preprocessor(folder))
    normalization = on_all_ranks(lambda: measure_normalization(preprocessor))
    classifier = on_all_ranks(lambda: build_classifier(config, folder, training.class_names, preprocessor))
    views: list[View] = [TrainView(config.augment, preprocessor.image_size), preprocessor]
    data = fit_to_machine(config.data, views, config.engine.micro_batch_size)
    config = config.model_copy(update={"data": data})
    model = wrap_model(accelerator, classifier, preprocessor.image_size, compiles=config.engine.compile)
    optimizer = build_optimizer(classifier, config.optimizer)
    if config.optimizer.layer_decay < 1:
        placement = Placement.unpartitioned(classifier.named_parameters())
        apply_layer_decay(optimizer, placement, config.optimizer.layer_decay)
    optimizer = accelerator.prepare(optimizer)
    quarantine = Quarantine(config.run_dir / QUARANTINE_FILE, config.data, 0, writes=distributed.is_main())
    return FinetuneRun(
        config,
        accelerator,
        classifier,
        model,
        optimizer,
        preprocessor,
        normalization,
        training,
        validation,
        quarantine,
    )


def wrap_model(accelerator: Accelerator, classifier: nn.Module, image_size: int, *, compiles: bool) -> Any:
    """Move the classifier to the device, and wrap it for training on all ranks (collective).

    Args:
        accelerator: Accelerate's view of the ranks and the device.
        classifier: Hugging Face model.
        image_size: Height and width of its input in pixels.
        compiles: Whether to compile the wrapped model; the classifier itself stays as it is.
    """
    model: Any = classifier.to(accelerator.device)
    if distributed.world_size() > 1:  # a single rank has no gradients to reduce
        searches = freeze_unused_parameters(classifier, image_size)
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            find_unused_parameters=searches, gradient_as_bucket_view=True
        )
        model = accelerator.prepare(classifier)
    return torch.compile(model) if compiles else model


def check_run_dir(config: FinetuneConfig) -> None:
    """Check that no result of another run would be lost.

    Raises:
        UserError: If the run folder contains a fine-tuned model that must not be replaced, or a pretraining run, or
            cannot be written.
    """
    model_folder = config.run_dir / MODEL_FOLDER
    if model_folder.exists() and not config.overwrite:
        raise UserError(
            f"{model_folder}: a fine-tuned model already exists here; choose another run_dir or set overwrite=true"
        )
    if reason := make_writable(config.run_dir):
        raise UserError(f"{config.run_dir}: {reason}; choose another run_dir")
    if (config.run_dir / PRETRAINING_FOLDER).exists():
        raise UserError(f"{config.run_dir}: this folder contains a pretraining run; choose another run_dir")


def open_data(config: FinetuneConfig) -> tuple[Dataset, Dataset]:
    """Open the training and the validation data.

    Raises:
        DataError: If their classes differ, or there is only one.
    """
    cache = open_cache(config.data)
    training = open_dataset(config.data.train, cache=cache, split="train")
    validation = open_dataset(config.data.validation, cache=cache, split="validation")
    leave_out_empty_classes(training, validation)
    check_classes(training, validation, config.data, needed_by="fine-tuning")
    if len(training.class_names) < 2:
        raise DataError(
            f"{config.data.train}: all images have the class {training.class_names[0]}; fine-tuning needs two classes"
        )
    if config.data.labels_per_class:
        training = LabelSubset(training, config.data.labels_per_class, config.seed)
    return training, validation


def build_classifier(config: FinetuneConfig, folder: Path, class_names: list[str], preprocessor: Preprocessor) -> Any:
    """Load a folder's backbone under a new head, and check that it can use the preprocessor's images."""
    classifier = new_classifier(
        folder, class_names, from_scratch=config.from_scratch, freeze_backbone=config.freeze_backbone
    )
    check_input(classifier, preprocessor)
    return classifier


def open_tracker(run: FinetuneRun, config_text: str, *, enabled: bool = True) -> Tracker:
    """Start tracking on the main rank, unless tracking is not `enabled`."""
    return Tracker(
        run.config.run_dir,
        run.config.tracking,
        RunDescription("finetune", run.training.digest, config_text, flatten(run.config)),
        enabled=enabled and distributed.is_main(),
    )
