"""A run: what it holds, how it begins or goes on from a checkpoint, and how it goes back to one."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pretrain import distributed
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.restore import newest_intact, restore
from pretrain.checkpoint.warm_start import warm_start
from pretrain.config import PretrainConfig
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.open import open_cache, open_dataset
from pretrain.data.loading.quarantine import QUARANTINE_FILE, Quarantine
from pretrain.data.transforms.device_decode import Decoder, build_decoder
from pretrain.distributed import on_all_ranks
from pretrain.engine.deepspeed import build_engine, guard_updates
from pretrain.engine.ema import Ema
from pretrain.engine.protocol import TrainingEngine
from pretrain.errors import CheckpointError, DataError, DivergedError
from pretrain.health import SKIPPED_FILE, Health, Ledger
from pretrain.heartbeat.watch import Watch
from pretrain.model.vit import ViT, compile_blocks
from pretrain.objectives import build_objective
from pretrain.objectives.objective import Objective
from pretrain.run_folder import claim
from pretrain.state import TrainState
from pretrain.tracking.tracker import git_commit


@dataclass(frozen=True)
class Data:
    """What a run starts from."""

    training: Dataset
    validation: Dataset | None

    @property
    def digests(self) -> dict[str, str]:
        """What each of them holds, in short."""
        sets = {"training": self.training, "validation": self.validation}
        return {name: samples.digest for name, samples in sets.items() if samples}


@dataclass
class Run:
    """The parts of an open run, and the state that training advances.

    Attributes:
        identity: Manifest without a state or tensors: what must not change when the run is resumed.
        state: State of the run after the last step.
    """

    config: PretrainConfig
    watch: Watch
    objective: Objective
    engine: TrainingEngine
    data: Data
    identity: Manifest
    state: TrainState
    health: Health
    ema: Ema
    quarantine: Quarantine
    skipped: Ledger
    decoder: Decoder | None

    def advance(self) -> None:
        """Count one optimizer step, whether its update was applied or skipped."""
        self.state = self.state.advance(self.config.engine.global_batch_size)

    def count_images(self, num_images: int) -> None:
        """Count the images of steps whose update was applied."""
        self.state = self.state.count_images(num_images)

    def judge(self, grad_norm: Tensor) -> Tensor:
        """Return 1 where the step at hand must move nothing."""
        return self.health.judge(grad_norm)

    def manifest(self, mlflow_run_id: str | None) -> Manifest:
        """Return the manifest of a checkpoint taken now, without its files."""
        state = replace(self.state, spike_window=self.health.state())
        return replace(self.identity, state=state, mlflow_run_id=mlflow_run_id)


@contextmanager
def open_run(config: PretrainConfig, *, insist_on_resume: bool = False) -> Iterator[Run]:
    """Begin a run, or go on with one, and watch over it.

    Raises:
        UserError: on every rank, whatever was wrong on any.
        MachineError: the same, where the user is not to blame.
    """
    claim(config.run_dir)
    rank, world_size, on_gpu = distributed.rank(), distributed.world_size(), torch.cuda.is_available()
    with Watch(config.run_dir, rank, world_size, hang_seconds=config.health.hang_seconds, on_gpu=on_gpu) as watch:
        yield prepare(config, watch, insist_on_resume)


def prepare(config: PretrainConfig, watch: Watch, insist_on_resume: bool) -> Run:
    """Open the data, build the model under its engine, and continue from the newest checkpoint that is whole."""
    data = on_all_ranks(lambda: open_data(config))
    checkpoint, faults = newest_intact(config.run_dir)
    if distributed.is_main():
        for fault in faults:
            print(f"{fault}; set aside, an older checkpoint is taken", file=sys.stderr, flush=True)
    if insist_on_resume and not checkpoint:
        raise CheckpointError(f"{config.run_dir}: nothing to resume, the run has no checkpoint")
    objective = on_all_ranks(lambda: build_model(config, data, begins=checkpoint is None))
    return build_run(config, watch, data, objective, checkpoint)


def open_data(config: PretrainConfig) -> Data:
    """Open the shard sets.

    Raises:
        DataError: a set cannot be used, or the two sets' classes differ.
    """
    cache = open_cache(config.data)
    labeled = config.objective.needs_labels
    training = open_dataset(config.data.train, config.data.weights, cache, labeled)
    training.check_cache_size(config.data.shuffle_window)
    validation = open_dataset(config.data.validation, cache=cache) if config.data.validation else None
    if labeled and validation and validation.class_names != training.class_names:
        raise DataError(f"{config.data.validation}: its classes differ from those of the training data")
    if labeled and not training.class_names:
        raise DataError(f"{config.data.train}: has no labels, objective.name={config.objective.name} needs them")
    return Data(training, validation)


def build_model(config: PretrainConfig, data: Data, *, begins: bool) -> Objective:
    """Build the model; where the run begins, from the weights that it is to begin with.

    Raises:
        CheckpointError: these do not fit.
    """
    torch.manual_seed(config.seed)
    encoder = ViT(config.model, config.engine.activation_checkpointing)
    objective = build_objective(config.objective, encoder, data.training.class_shares, config.preprocessing)
    if config.init_from and begins:
        said = warm_start(objective, config.init_from, data.training.class_names, config.model.layer_norm_eps)
        objective.after_warm_start()
        if distributed.is_main():
            print(said, flush=True)
    return objective


def build_run(config: PretrainConfig, watch: Watch, data: Data, objective: Objective, checkpoint: Path | None) -> Run:
    """Put the model under its engine, and continue from the checkpoint if there is one."""
    if config.engine.compile:
        compile_blocks(objective)
    identity = Manifest(
        state=TrainState(),
        world_size=distributed.world_size(),
        data_digests=data.digests,
        class_names=data.training.class_names,
        config=json.loads(config.model_dump_json()),
        git_commit=git_commit(),
    )
    engine = build_engine(objective, config.engine, config.optimizer)
    state = restore(engine, checkpoint, identity).state if checkpoint else TrainState()
    main = distributed.is_main()
    run = Run(
        config,
        watch,
        objective,
        engine,
        data,
        identity,
        state,
        health=Health(config.health, engine.device, state.spike_window),
        ema=Ema(engine, config.ema.decay),
        quarantine=Quarantine(config.run_dir / QUARANTINE_FILE, config.data, state.position, writes=main),
        skipped=Ledger(config.run_dir / SKIPPED_FILE, state.step, writes=main),
        decoder=build_decoder(engine.device) if config.data.decode == "gpu" else None,
    )
    guard_updates(engine, run.judge)
    return run


def go_back(run: Run) -> None:
    """Return to the newest checkpoint; the samples of the steps that were skipped in a row will be passed over.

    Raises:
        DivergedError: there is none, or the run has gone back often enough.
    """
    config, bad = run.config, run.skipped.in_a_row
    said = f"step {bad[-1].step}: {len(bad)} steps in a row could not be taken, {bad[-1].reason}"
    advice = f"their samples are in {run.skipped.path}; look at them, or lower optimizer.learning_rate"
    if len(run.state.skipped_ranges) >= config.health.max_rollbacks:
        raise DivergedError(f"{said}, after health.max_rollbacks={config.health.max_rollbacks}; {advice}")
    checkpoint, _ = newest_intact(config.run_dir)
    if checkpoint is None:
        raise DivergedError(f"{said}, and there is no checkpoint to go back to; {advice}")
    saved = restore(run.engine, checkpoint, run.identity).state
    first, last = bad[0].first_sample, bad[-1].first_sample + config.engine.global_batch_size
    run.state = replace(saved, skipped_ranges=run.state.skipped_ranges).skip_range(first, last)
    run.health = Health(config.health, run.engine.device, saved.spike_window)
    run.skipped.in_a_row.clear()
    if distributed.is_main():
        print(f"{said}; back to step {saved.step}, past samples {first} to {last - 1}", flush=True)
