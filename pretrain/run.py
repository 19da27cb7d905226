"""Open a run: its data, its model under DeepSpeed, and its state, new or from the newest checkpoint."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError

from pretrain import distributed
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.restore import newest_intact, restore
from pretrain.checkpoint.warm_start import warm_start
from pretrain.config import PretrainConfig
from pretrain.data.dataset.classes import check_classes, leave_out_empty_classes
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.open import open_cache, open_dataset
from pretrain.data.loading.quarantine import QUARANTINE_FILE, Quarantine
from pretrain.data.loading.stream import TarStream, open_tar_stream
from pretrain.data.storage.remote import FetchPolicy
from pretrain.data.storage.webdataset import read_class_names
from pretrain.data.transforms.device_decode import Decoder, build_decoder
from pretrain.data.transforms.views import View
from pretrain.distributed import on_all_ranks
from pretrain.engine.deepspeed import build_engine
from pretrain.engine.ema import Ema
from pretrain.engine.gradients import Gradients
from pretrain.engine.protocol import TrainingEngine
from pretrain.environment import check_environment
from pretrain.errors import CheckpointError, DivergedError, UserError
from pretrain.health import SKIPPED_FILE, Health, SkippedSteps
from pretrain.heartbeat.watch import Watch
from pretrain.indexing import index_new_tars
from pretrain.machine import fit_to_machine
from pretrain.model.compiling import compile_graphs
from pretrain.model.vit import Block, ViT
from pretrain.objectives import build_objective
from pretrain.objectives.objective import Objective
from pretrain.run_folder import claim_run_dir
from pretrain.state import TrainState
from pretrain.tracking.tracker import git_commit


@dataclass(frozen=True)
class Data:
    """The datasets of a run."""

    training: Dataset | TarStream
    validation: Dataset | None

    @property
    def digests(self) -> dict[str, str]:
        """Digest of the content of each set."""
        sets = {"training": self.training, "validation": self.validation}
        return {name: dataset.digest for name, dataset in sets.items() if dataset}

    @property
    def samples_per_epoch(self) -> int:
        """Number of training samples; 0 if it is unknown, because they are streamed."""
        return sum(self.training.shard_sizes) if isinstance(self.training, Dataset) else 0

    @property
    def notes(self) -> list[str]:
        """Remarks about what was left out of each set, or how it was understood."""
        sets = [dataset for dataset in (self.training, self.validation) if isinstance(dataset, Dataset)]
        return list(dict.fromkeys(note for dataset in sets for note in dataset.notes))


@dataclass
class Run:
    """The parts of an open run, and the state that training advances.

    Attributes:
        config: Resolved run configuration.
        data: Training and validation data.
        objective: Model that is trained.
        engine: DeepSpeed engine around the objective.
        gradients: Gradients of the engine, with which it updates the weights.
        ema: Moving average of the weights.
        health: Decides which updates are applied.
        skipped_steps: Steps whose update was not applied.
        quarantine: Samples that could not be used.
        watch: Watch of this rank, which writes its heartbeats.
        decoder: JPEG decoder of the GPU, or None if the data workers decode.
        identity: Manifest without state and tensors: config, data digests and class names, as in every checkpoint.
        state: State after the latest step.
    """

    config: PretrainConfig
    data: Data
    objective: Objective
    engine: TrainingEngine
    gradients: Gradients
    ema: Ema
    health: Health
    skipped_steps: SkippedSteps
    quarantine: Quarantine
    watch: Watch
    decoder: Decoder | None
    identity: Manifest
    state: TrainState

    def advance(self) -> None:
        """Count one optimizer step, whether its update was applied or skipped."""
        self.state = self.state.advance(self.config.engine.global_batch_size)

    def resume_stream_at(self, next_tar: int) -> None:
        """Set the first tar that a resumed stream reads; 0 for indexed data."""
        self.state = replace(self.state, next_tar=next_tar)

    def count_images(self, num_images: int) -> None:
        """Count the images of steps whose update was applied."""
        self.state = self.state.count_images(num_images)

    @property
    def num_epochs(self) -> float:
        """Number of passes over the training data in the whole run; 0 if it is unknown, because they are streamed."""
        if not self.data.samples_per_epoch:
            return 0.0
        num_positions = self.config.schedule.total_steps * self.config.engine.global_batch_size
        return num_positions / (self.data.samples_per_epoch * self.config.data.repeats)

    @property
    def has_diverged(self) -> bool:
        """Whether so many consecutive steps were skipped that the run must roll back."""
        return len(self.skipped_steps.consecutive) >= self.config.health.max_consecutive_skips

    def manifest(self, mlflow_run_id: str | None) -> Manifest:
        """Return the manifest of a checkpoint of the current state, without its files."""
        state = replace(self.state, spike_window=self.health.spike_window())
        return replace(self.identity, state=state, mlflow_run_id=mlflow_run_id)

    def roll_back(self) -> None:
        """Return to the newest checkpoint, and leave out the samples of the skipped steps from now on (collective).

        Raises:
            DivergedError: If the run has no checkpoint, or has rolled back `health.max_rollbacks` times before.
        """
        config, skipped = self.config, self.skipped_steps.consecutive
        problem = f"step {skipped[-1].step}: {len(skipped)} steps in a row were skipped ({skipped[-1].reason})"
        advice = f"check their samples in {self.skipped_steps.path}, or lower optimizer.learning_rate"
        if len(self.state.skipped_ranges) >= config.health.max_rollbacks:
            raise DivergedError(
                f"{problem} after health.max_rollbacks={config.health.max_rollbacks} rollbacks; {advice}"
            )
        checkpoint, _ = newest_intact(config.run_dir)
        if checkpoint is None:
            raise DivergedError(f"{problem}, and there is no checkpoint to roll back to; {advice}")
        saved = restore(self.engine, checkpoint, self.identity).state
        start, stop = skipped[0].position, skipped[-1].position + config.engine.global_batch_size
        saved = replace(saved, skipped_ranges=self.state.skipped_ranges, next_tar=self.state.next_tar)
        self.state = saved.skip_range(start, stop)
        self.health.reset(saved.spike_window)
        self.skipped_steps.forget_consecutive()
        if distributed.is_main():
            print(f"{problem}; rolled back to step {saved.step}, leaving out samples {start} to {stop - 1}", flush=True)


@contextmanager
def open_run(config: PretrainConfig, *, must_resume: bool = False) -> Iterator[Run]:
    """Start a run, or resume it from its newest checkpoint, and watch over its ranks until the block ends (collective).

    Args:
        config: Resolved run configuration.
        must_resume: Whether to refuse a run that has no checkpoint.
    """
    on_all_ranks(check_environment)
    claim_run_dir(config.run_dir)
    rank, world_size, on_gpu = distributed.rank(), distributed.world_size(), torch.cuda.is_available()
    with Watch(config.run_dir, rank, world_size, hang_seconds=config.health.hang_seconds, on_gpu=on_gpu) as watch:
        index_new_tars(
            config.data,
            None if config.data.stream else config.data.train,
            config.data.validation,
            labels_required=config.objective.needs_labels,
            on_progress=lambda: watch.enter("index"),
        )
        data = on_all_ranks(lambda: open_data(config))
        config = on_all_ranks(lambda: with_schedule_in_steps(config, data))
        checkpoint = find_resumable_checkpoint(config.run_dir, must_resume=must_resume)
        objective = on_all_ranks(lambda: build_model(config, data, is_new=checkpoint is None))
        workers = fit_to_machine(config.data, views_of(config, objective), config.engine.micro_batch_size)
        config = config.model_copy(update={"data": workers})
        yield build_run(config, watch, data, objective, checkpoint)


def find_resumable_checkpoint(run_dir: Path, *, must_resume: bool) -> Path | None:
    """Return the newest intact checkpoint, or None for a new run; report damaged ones on the main rank (collective).

    Args:
        run_dir: Run folder.
        must_resume: Whether to refuse a run that has no checkpoint.

    Raises:
        CheckpointError: If `must_resume` is set and the run has no checkpoint.
    """
    checkpoint, faults = newest_intact(run_dir)
    if distributed.is_main():
        for fault in faults:
            print(
                f"{fault}; the checkpoint was renamed to *.damaged and an older one is used",
                file=sys.stderr,
                flush=True,
            )
    if must_resume and not checkpoint:
        raise CheckpointError(f"{run_dir}: cannot resume because the run has no checkpoint; start it without --resume")
    return checkpoint


def open_data(config: PretrainConfig) -> Data:
    """Open the training and validation data, and check their labels if the objective needs them."""
    cache = open_cache(config.data)
    labeled = config.objective.needs_labels
    validation = (
        open_dataset(config.data.validation, cache=cache, labeled=labeled, split="validation")
        if config.data.validation
        else None
    )
    training: Dataset | TarStream
    if config.data.stream:
        training = open_training_stream(config, cache.policy, validation)
    else:
        training = open_dataset(config.data.train, config.data.weights, cache, labeled, "train")
        training.check_cache_size(config.data.shuffle_window)
        if labeled:
            leave_out_empty_classes(training, validation)
    if labeled:
        check_classes(training, validation, config.data, needed_by=f"objective.name={config.objective.name}")
    return Data(training, validation)


def with_schedule_in_steps(config: PretrainConfig, data: Data) -> PretrainConfig:
    """Return the config with the epochs of its schedule converted to optimizer steps.

    Raises:
        UserError: If so few steps result that the warm-up and the cool-down use up all of them.
    """
    if not data.samples_per_epoch:
        return config
    samples_per_epoch = data.samples_per_epoch * config.data.repeats
    try:
        schedule = config.schedule.in_steps(samples_per_epoch, config.engine.global_batch_size)
    except ValidationError as error:
        raise UserError(f"schedule.epochs={config.schedule.epochs:g}: {error.errors()[0]['msg']}") from None
    return config.model_copy(update={"schedule": schedule})


def open_training_stream(config: PretrainConfig, policy: FetchPolicy, validation: Dataset | None) -> TarStream:
    """Find the tars of a stream, with the class names of `data.class_names` or else of the validation data."""
    class_names: list[str] = []
    if config.objective.needs_labels and config.data.class_names:
        class_names = read_class_names(config.data.class_names)
    elif config.objective.needs_labels and validation:
        class_names = validation.class_names
    return open_tar_stream(config.data.train, class_names, config.data.shuffle_buffer, policy)


def build_model(config: PretrainConfig, data: Data, *, is_new: bool) -> Objective:
    """Build the model.

    Args:
        config: Resolved run configuration.
        data: Data of the run, which determines the number of classes.
        is_new: Whether the run starts now; only then are the weights of `init_from` loaded.
    """
    torch.manual_seed(config.seed)
    encoder = ViT(config.model, config.engine.activation_checkpointing)
    objective = build_objective(config.objective, encoder, data.training.class_shares, config.preprocessing)
    if config.init_from and is_new:
        summary = warm_start(
            objective,
            config.init_from,
            data.training.class_names,
            config.model.layer_norm_eps,
            config.preprocessing,
        )
        objective.after_warm_start()
        if distributed.is_main():
            print(summary, flush=True)
    return objective


def views_of(config: PretrainConfig, objective: Objective) -> list[View]:
    """Return the view of training, at its largest image size, and that of the validation data if there are any."""
    image_size = max([config.model.image_size, *(pixels for _, pixels in config.schedule.image_sizes)])
    return [objective.train_view(image_size), *([objective.evaluation_view()] if config.data.validation else [])]


def has_several_shapes(config: PretrainConfig, objective: Objective) -> bool:
    """Return whether training images have several sizes, or the micro-batches of a step have several."""
    world_size = distributed.world_size()
    num_groups = config.engine.global_batch_size // objective.group_size
    is_uneven = bool(num_groups % (world_size * config.engine.accumulation_steps(world_size)))
    return is_uneven or objective.several_sizes or bool(config.schedule.image_sizes)


def build_run(config: PretrainConfig, watch: Watch, data: Data, objective: Objective, checkpoint: Path | None) -> Run:
    """Wrap the model in DeepSpeed and build the other parts of the run (collective).

    Args:
        config: Resolved run configuration.
        watch: Heartbeat of this rank.
        data: Training and validation data.
        objective: Model to train.
        checkpoint: Checkpoint to resume from, or None for a new run.
    """
    if config.engine.compile:
        partitioned = config.engine.zero_stage == 3
        compile_graphs(objective, partitioned=partitioned, several_shapes=has_several_shapes(config, objective))
    engine = build_engine(objective, config.engine, config.optimizer, [Block])
    identity = Manifest(
        state=TrainState(),
        world_size=distributed.world_size(),
        data_digests=data.digests,
        class_names=data.training.class_names,
        config=json.loads(config.model_dump_json()),
        git_commit=git_commit(),
    )
    state = restore(engine, checkpoint, identity).state if checkpoint else TrainState()
    writes = distributed.is_main()
    return Run(
        config=config,
        data=data,
        objective=objective,
        engine=engine,
        gradients=Gradients(engine, config.engine.gradient_clipping),
        ema=Ema(engine, config.ema.decay),
        health=Health(config.health, engine.device, state.spike_window),
        skipped_steps=SkippedSteps(config.run_dir / SKIPPED_FILE, state.step, writes=writes),
        quarantine=Quarantine(config.run_dir / QUARANTINE_FILE, config.data, state.position, writes=writes),
        watch=watch,
        decoder=build_decoder(engine.device) if config.data.decode == "gpu" else None,
        identity=identity,
        state=state,
    )
