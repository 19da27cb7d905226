"""The fine-tuning loop: a Hugging Face folder in, a better one out, with Accelerate on any number of ranks."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from finetune.backbone import Preprocessor, load_preprocessor, new_classifier, save_folder
from finetune.config import FinetuneConfig
from finetune.metrics import evaluate
from pretrain import distributed
from pretrain.configfile import CommandLine, exit_with_mistake, flatten
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.open import open_cache, open_dataset
from pretrain.data.dataset.order import random_bits
from pretrain.data.dataset.subset import LabelSubset
from pretrain.data.loading.loader import BadSample, BatchPlan, LoadedBatch, training_batches
from pretrain.data.loading.quarantine import QUARANTINE_FILE, Quarantine
from pretrain.data.transforms.batch import Batch, augment, to_device
from pretrain.data.transforms.mixup import cross_entropy, mix_neighbors, mixed_loss
from pretrain.data.transforms.views import TrainView
from pretrain.distributed import on_all_ranks
from pretrain.errors import DataError, MachineError, UserError
from pretrain.optimizers import build_optimizer
from pretrain.optimizers.layer_decay import apply_layer_decay
from pretrain.optimizers.placement import Placement
from pretrain.outcome import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR
from pretrain.schedules import learning_rate_at
from pretrain.tracking.progress import ProgressLine
from pretrain.tracking.tracker import RunDescription, Tracker

MODEL_FOLDER = "model"

CARD = """---
library_name: transformers
pipeline_tag: image-classification
tags: [vision, vitrail]
---

# {name}

{origin} `{model}`, fine-tuned with Vitrail on {samples} images of {classes} classes.
Top-1 on {count} validation images: {top1:.4f} (epoch {epoch} of {epochs}, the best).
"""


@dataclass
class Run:
    """Everything the loop holds."""

    config: FinetuneConfig
    accelerator: Accelerator
    classifier: Any  # the Hugging Face model itself
    model: Any  # the same, wrapped for training on all ranks
    optimizer: Any
    preprocessor: Preprocessor
    training: Dataset
    validation: Dataset
    quarantine: Quarantine

    @property
    def num_samples(self) -> int:
        """Dataset of an epoch."""
        return sum(self.training.shard_sizes)

    def steps_after(self, epochs: float) -> int:
        """Return how many optimizer steps it takes to have seen every sample so many times."""
        return math.ceil(epochs * self.num_samples / self.config.engine.global_batch_size)


@dataclass(frozen=True)
class Best:
    """The best model so far."""

    top1: float
    epoch: int


def main(command: CommandLine[FinetuneConfig]) -> int:
    """Fine-tune as the command line asks; return the exit code."""
    config = command.config
    # Some architectures have parameters that classification never uses, such as DINOv2's mask token.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    precision = "bf16" if config.engine.precision == "bf16" else "no"
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision, kwargs_handlers=[unused])
    try:
        run = build_run(config, accelerator)
    except UserError as error:
        exit_with_mistake(str(error))
    except MachineError as error:
        if distributed.is_main():
            print(error, file=sys.stderr, flush=True)
        return EXIT_FAILED
    folder = config.run_dir / MODEL_FOLDER
    try:
        with open_tracker(run, command.text) as tracker:
            tracker.tag(model_folder=str(folder.resolve()))
            best = train(run, tracker)
            tracker.finish("FINISHED")
    except DataError as error:  # met by one rank or its workers: whoever meets it says so
        print(error.summary, file=sys.stderr, flush=True)
        return EXIT_FAILED if isinstance(error, MachineError) else EXIT_USER_ERROR
    except (FloatingPointError, KeyboardInterrupt) as reason:
        if distributed.is_main():
            kept = f"; the best model so far is in {folder}" if folder.exists() else ""
            print(f"{str(reason) or 'stopped'}{kept}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    if distributed.is_main():
        print(f"best top-1 {best.top1:.4f} after epoch {best.epoch}: {folder}")
    accelerator.end_training()
    return EXIT_DONE


def build_run(config: FinetuneConfig, accelerator: Accelerator) -> Run:
    """Open the data, put a new head on the folder's backbone, hand both to Accelerate.

    Raises:
        UserError: the folder or the data cannot be used, on any rank.
        MachineError: the same, where the user is not to blame.
    """
    training, validation = on_all_ranks(lambda: open_data(config))
    torch.manual_seed(config.seed)
    preprocessor, classifier = on_all_ranks(lambda: open_model(config, training.class_names))
    optimizer = build_optimizer(classifier, config.optimizer)
    if config.optimizer.layer_decay < 1:
        apply_layer_decay(
            optimizer, Placement.unpartitioned(classifier.named_parameters()), config.optimizer.layer_decay
        )
    model, optimizer = accelerator.prepare(classifier, optimizer)
    quarantine = Quarantine(config.run_dir / QUARANTINE_FILE, config.data, 0, writes=distributed.is_main())
    return Run(config, accelerator, classifier, model, optimizer, preprocessor, training, validation, quarantine)


def open_data(config: FinetuneConfig) -> tuple[Dataset, Dataset]:
    """Open the training and the validation data.

    Raises:
        UserError: a set cannot be used, their classes differ, or the run folder is another run's.
    """
    check_run_dir(config)
    cache = open_cache(config.data)
    training = open_dataset(config.data.train, cache=cache)
    validation = open_dataset(config.data.validation, cache=cache)
    if validation.class_names != training.class_names:
        raise DataError(f"{config.data.validation}: its classes differ from those of the training data")
    if not training.class_names:
        raise DataError(f"{config.data.train}: has no labels, fine-tuning needs them")
    if config.data.labels_per_class:
        training = LabelSubset(training, config.data.labels_per_class, config.seed)
    return training, validation


def open_model(config: FinetuneConfig, class_names: list[str]) -> tuple[Preprocessor, Any]:
    """Load the folder's preprocessing, and its backbone under a new head."""
    model = new_classifier(
        config.model, class_names, from_scratch=config.from_scratch, freeze_backbone=config.freeze_backbone
    )
    return load_preprocessor(config.model), model


def check_run_dir(config: FinetuneConfig) -> None:
    """Refuse a folder in which another run's results would be lost."""
    if (config.run_dir / MODEL_FOLDER).exists() and not config.overwrite:
        raise UserError(
            f"{config.run_dir / MODEL_FOLDER}: holds a fine-tuned model already; "
            "choose another run_dir or set overwrite=true"
        )
    if (config.run_dir / "checkpoints").exists():
        raise UserError(f"{config.run_dir}: holds a pretraining run; choose another run_dir")


def train(run: Run, tracker: Tracker) -> Best:
    """Train to the last epoch; keep the model of the best evaluation."""
    config, accelerator = run.config, run.accelerator
    total_steps = run.steps_after(config.schedule.epochs)
    evaluations = {
        run.steps_after(epoch): epoch
        for epoch in range(1, config.schedule.epochs + 1)
        if epoch % config.evaluation.every_epochs == 0 or epoch == config.schedule.epochs
    }
    progress = ProgressLine(total_steps, 0, enabled=distributed.is_main())
    progress.print_message(
        f"{run.num_samples} training and {sum(run.validation.shard_sizes)} validation images, "
        f"{len(run.training.class_names)} classes, {accelerator.num_processes} x {accelerator.device.type}, "
        f"{total_steps} steps, {config.optimizer.describe_learning_rate(config.engine.global_batch_size)}"
    )
    batches = _batches(run, total_steps)
    interval = Interval()
    best: Best | None = None
    _set_training_mode(run)
    for step in range(1, total_steps + 1):
        learning_rate = learning_rate_at(
            step - 1,
            peak=config.optimizer.peak_learning_rate(config.engine.global_batch_size),
            final=0.0,
            warmup_steps=min(run.steps_after(config.schedule.warmup_epochs), total_steps - 1),
            total_steps=total_steps,
        )
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate
        torch.manual_seed(int(random_bits(config.seed, step, distributed.rank()).random_raw() >> 1))  # for dropout
        micro_batches, waited = next(batches)
        interval.add(*_step(run, micro_batches), waited)
        interval.faults += [fault for loaded in micro_batches for fault in loaded.bad_samples]

        if step % config.logging.every_steps == 0 or step == total_steps:
            row = interval.close(run, step)
            row["optim/learning_rate"] = learning_rate
            tracker.log(row, step)
            progress.print_metrics(row, step)
            if not math.isfinite(row["train/loss"] + row["optim/grad_norm"]):
                raise FloatingPointError(f"step {step}: the loss or its gradient is not finite")
            interval = Interval()
        if step in evaluations:
            paused = time.perf_counter()
            best = _evaluate(run, tracker, progress, step, evaluations[step], best)
            interval.started += time.perf_counter() - paused
    assert best is not None
    return best


@dataclass
class Interval:
    """What happened between two rows of metrics; the numbers stay on the device until the row is due."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    losses: list[Tensor] = field(default_factory=list)
    norm: Tensor | None = None
    faults: list[BadSample] = field(default_factory=list)

    def add(self, loss: Tensor, norm: Tensor, waited: float) -> None:
        """Count one optimizer step."""
        self.losses.append(loss)
        self.norm = norm
        self.waited += waited

    def close(self, run: Run, step: int) -> dict[str, float]:
        """Meet all ranks and return the row."""
        assert self.norm is not None
        batch = run.config.engine.global_batch_size
        loss = float(distributed.sum_over_ranks(torch.stack(self.losses).mean()) / run.accelerator.num_processes)
        run.quarantine.add(chain.from_iterable(distributed.gather(self.faults)))
        run.quarantine.check(step * batch)
        elapsed = time.perf_counter() - self.started
        return {
            "train/loss": loss,
            "optim/grad_norm": float(self.norm),
            "speed/images_per_second": len(self.losses) * batch / elapsed,
            "data/wait_fraction": self.waited / elapsed,
            "data/samples": step * batch,
            "data/bad_samples": len(run.quarantine),
        }


def open_tracker(run: Run, config_text: str, enabled: bool = True) -> Tracker:
    """Start tracking on the main rank."""
    return Tracker(
        run.config.run_dir,
        run.config.tracking,
        RunDescription("finetune", run.training.digest, config_text, flatten(run.config)),
        enabled=enabled and distributed.is_main(),
    )


def _step(run: Run, micro_batches: list[LoadedBatch]) -> tuple[Tensor, Tensor]:
    """Take one optimizer step; return this rank's share of the mean loss and the norm of all ranks' gradient."""
    total = torch.zeros((), device=run.accelerator.device)
    for i, loaded in enumerate(micro_batches, start=1):
        with contextlib.nullcontext() if i == len(micro_batches) else run.accelerator.no_sync(run.model):
            loss = _loss(run, to_device(loaded.tensors, run.accelerator.device)) * (loaded.weight / len(micro_batches))
            run.accelerator.backward(loss)
        total += loss.detach()
    limit = run.config.engine.gradient_clipping or math.inf
    norm: Tensor = run.accelerator.clip_grad_norm_(run.model.parameters(), limit)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return total, norm


def _loss(run: Run, batch: Batch) -> Tensor:
    """Cross-entropy of a batch, augmented by its draws."""
    images = augment(batch, run.preprocessor.mean, run.preprocessor.std)
    labels, smoothing = batch["label"], run.config.label_smoothing
    if not run.config.augment.mixes:
        return F.cross_entropy(run.model(pixel_values=images).logits.float(), labels, label_smoothing=smoothing)
    images, own_share = mix_neighbors(images, batch)
    logits = run.model(pixel_values=images).logits.float()
    return mixed_loss(lambda target: cross_entropy(logits, target, smoothing), labels, own_share)


def _batches(run: Run, total_steps: int) -> Iterator[tuple[list[LoadedBatch], float]]:
    """Yield each step's micro-batches of this rank, with the seconds spent waiting for them."""
    config, world_size = run.config, run.accelerator.num_processes
    accumulation_steps = config.engine.accumulation_steps(world_size)
    batches = training_batches(
        run.training,
        TrainView(config.augment, run.preprocessor.image_size),
        BatchPlan(
            seed=config.seed,
            shuffle_window=len(run.training.shard_sizes),
            global_batch_size=config.engine.global_batch_size,
            accumulation_steps=accumulation_steps,
            rank=distributed.rank(),
            world_size=world_size,
            num_workers=config.data.num_workers,
            num_threads=config.data.num_threads,
            group_size=2 if config.augment.mixes else 1,
        ),
        start=0,
        stop=total_steps * config.engine.global_batch_size,
    )
    while True:
        start = time.perf_counter()
        micro_batches = [next(batches) for _ in range(accumulation_steps)]
        yield micro_batches, time.perf_counter() - start


def _evaluate(run: Run, tracker: Tracker, progress: ProgressLine, step: int, epoch: int, best: Best | None) -> Best:
    """Measure; keep the model if it is the best so far."""
    config = run.config
    # BatchNorm's statistics differ by rank; the main rank's are measured and saved.
    distributed.broadcast_from_main(run.classifier.buffers())
    measured = evaluate(
        run.classifier,
        run.validation,
        run.preprocessor,
        batch_size=config.engine.micro_batch_size,
        num_workers=config.data.num_workers,
        device=run.accelerator.device,
        quarantine=run.quarantine,
    )
    _set_training_mode(run)
    tracker.log({"validation/loss": measured["loss"], "validation/top1": measured["top1"], "train/epoch": epoch}, step)
    progress.print_message(f"epoch {epoch}  validation loss {measured['loss']:.4f}  top-1 {measured['top1']:.4f}")
    if best is not None and measured["top1"] <= best.top1:
        return best
    if distributed.is_main():
        card = CARD.format(
            name=config.run_dir.name,
            origin="The architecture of" if config.from_scratch else "The backbone of",
            model=config.model,
            samples=run.num_samples,
            classes=len(run.training.class_names),
            count=int(measured["count"]),
            top1=measured["top1"],
            epoch=epoch,
            epochs=config.schedule.epochs,
        )
        save_folder(run.classifier, run.preprocessor, card, config.run_dir / MODEL_FOLDER)
    distributed.barrier()
    return Best(measured["top1"], epoch)


def _set_training_mode(run: Run) -> None:
    """Put the model into training mode; with a frozen backbone it stays as it is in use, without dropout."""
    run.model.train(not run.config.freeze_backbone)
