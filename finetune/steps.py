"""The micro-batches of each optimizer step, the step itself, and the metrics of the steps between two log rows."""

import contextlib
import math
import time
from collections.abc import Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.run import FinetuneRun
from pretrain import distributed
from pretrain.data.loading.loader import BatchPlan, LoadedBatch, training_batches
from pretrain.data.loading.meters import Meter, loading_metrics
from pretrain.data.transforms.batch import Batch, augment, to_device
from pretrain.data.transforms.mixup import cross_entropy, mix_neighbors, mixed_loss
from pretrain.data.transforms.views import TrainView


class Batches:
    """This rank's micro-batches, from the first step to the last.

    Args:
        run: Fine-tuning run.

    Attributes:
        accumulation_steps: Number of micro-batches per optimizer step.
        meter: Loading statistics and unusable samples since the last row of metrics.
    """

    def __init__(self, run: FinetuneRun) -> None:
        config = run.config
        self.accumulation_steps = config.engine.accumulation_steps(distributed.world_size())
        self.meter = Meter()
        self._loaded = training_batches(
            run.training,
            TrainView(config.augment, run.preprocessor.image_size),
            BatchPlan(
                seed=config.seed,
                shuffle_window=len(run.training.shard_sizes),
                global_batch_size=config.engine.global_batch_size,
                accumulation_steps=self.accumulation_steps,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                num_workers=config.data.num_workers,
                num_threads=config.data.num_threads,
                group_size=2 if config.augment.mixes else 1,
            ),
            start=0,
            stop=run.total_steps * config.engine.global_batch_size,
        )

    def next_step(self) -> list[LoadedBatch]:
        """Load the micro-batches of one optimizer step."""
        return [self.meter.next_batch(self._loaded) for _ in range(self.accumulation_steps)]

    def close(self) -> None:
        """Stop the data workers."""
        self._loaded.close()


def take_step(run: FinetuneRun, micro_batches: list[LoadedBatch]) -> tuple[Tensor, Tensor]:
    """Take one optimizer step.

    Returns:
        This rank's mean loss, and the norm of the gradient over all ranks before clipping; scalars on the device.
    """
    step_loss = torch.zeros((), device=run.accelerator.device)
    for number, loaded in enumerate(micro_batches, start=1):
        is_last = number == len(micro_batches)
        with contextlib.nullcontext() if is_last else run.accelerator.no_sync(run.model):
            batch = to_device(loaded.tensors, run.accelerator.device)
            loss = batch_loss(run, batch) * (loaded.weight / len(micro_batches))
            run.accelerator.backward(loss)
        step_loss += loss.detach()
    max_norm = run.config.engine.gradient_clipping or math.inf
    grad_norm: Tensor = run.accelerator.clip_grad_norm_(run.model.parameters(), max_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return step_loss, grad_norm


def batch_loss(run: FinetuneRun, batch: Batch) -> Tensor:
    """Augment a batch on the device and return its mean cross-entropy."""
    images = augment(batch, run.preprocessor.mean, run.preprocessor.std)
    labels, label_smoothing = batch["label"], run.config.label_smoothing
    if not run.config.augment.mixes:
        logits = run.model(pixel_values=images).logits.float()
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    images, own_share = mix_neighbors(images, batch)
    logits = run.model(pixel_values=images).logits.float()
    return mixed_loss(lambda target: cross_entropy(logits, target, label_smoothing), labels, own_share)


class StepMetrics:
    """Losses and times of the steps since the last row of metrics. The losses stay on the device until `reduce`."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._losses: list[Tensor] = []
        self._grad_norm: Tensor | None = None

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Add the loss and the gradient norm of one step."""
        self._losses.append(loss)
        self._grad_norm = grad_norm

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time of the block, such as an evaluation, from the duration of the steps."""
        paused = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused

    def reduce(self, run: FinetuneRun, batches: Batches, step: int) -> dict[str, float]:
        """Return the row of metrics after a step (collective); the host waits for the device.

        Unusable samples since the last row are added to the quarantine.
        """
        assert self._grad_norm is not None
        config, world_size, device = run.config, distributed.world_size(), run.accelerator.device
        loss = float(distributed.sum_over_ranks(torch.stack(self._losses).mean()) / world_size)
        counts = torch.tensor(batches.meter.take(), dtype=torch.float64, device=device)
        totals = distributed.sum_over_ranks(counts).tolist()
        run.quarantine.add(chain.from_iterable(distributed.gather(batches.meter.take_bad_samples())))
        seconds = time.perf_counter() - self._started
        num_loaders = max(config.data.num_workers, 1) * config.data.num_threads
        return {
            "train/loss": loss,
            "optim/grad_norm": float(self._grad_norm),
            "speed/images_per_second": len(self._losses) * config.engine.global_batch_size / seconds,
            "data/samples": step * config.engine.global_batch_size,
            "data/bad_samples": len(run.quarantine),
            **loading_metrics(totals, seconds, world_size, num_loaders),
        }
