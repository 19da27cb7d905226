"""The micro-batches of each optimizer step, and the step itself."""

import contextlib
import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.run import FinetuneRun
from pretrain import distributed
from pretrain.data.loading.loader import BatchPlan, training_batches
from pretrain.data.loading.meters import Meter
from pretrain.data.loading.prefetch import Prefetcher
from pretrain.data.transforms.batch import Batch, to_device
from pretrain.data.transforms.mixup import cross_entropy, mix_neighbors, mixed_loss
from pretrain.data.transforms.views import TrainView
from pretrain.interval import Interval


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
        self._device = run.accelerator.device
        self._prefetcher = Prefetcher(self._device)
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
                batches_ahead=config.data.batches_ahead,
                num_threads=config.data.num_threads,
                group_size=2 if config.augment.mixes else 1,
            ),
            start=0,
            stop=run.total_steps * config.engine.global_batch_size,
        )

    def next_step(self) -> Iterator[tuple[Batch, float, bool]]:
        """Load the micro-batches of one optimizer step.

        Yields:
            The micro-batch on the device, its weight in the mean loss, and whether it is the last one of the step.
        """
        for number in range(self.accumulation_steps):
            loaded = self.meter.next_batch(self._loaded)
            batch = self._prefetcher.prepare(partial(to_device, loaded.tensors, self._device))
            yield batch, loaded.weight, number == self.accumulation_steps - 1

    def close(self) -> None:
        """Stop the data workers."""
        self._loaded.close()


def take_step(run: FinetuneRun, batches: Batches, interval: Interval) -> None:
    """Take one optimizer step; its losses and the norm of its gradient go into the interval."""
    for batch, weight, is_last in batches.next_step():
        with contextlib.nullcontext() if is_last else run.accelerator.no_sync(run.model):
            loss = batch_loss(run, batch)
            run.accelerator.backward(loss * (weight / batches.accumulation_steps))
        interval.add({"loss": loss}, weight)
    max_norm = run.config.engine.gradient_clipping or math.inf
    grad_norm: Tensor = run.accelerator.clip_grad_norm_(run.model.parameters(), max_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    interval.end_step(grad_norm)


def batch_loss(run: FinetuneRun, batch: Batch) -> Tensor:
    """Augment a batch on the device and return its mean cross-entropy."""
    config, images = run.config, run.normalization(batch)
    labels, label_smoothing = batch["label"], config.label_smoothing
    if not config.augment.mixes:
        return F.cross_entropy(_logits(run, images), labels, label_smoothing=label_smoothing)
    images, own_share = mix_neighbors(images, batch)
    logits = _logits(run, images)
    return mixed_loss(lambda target: cross_entropy(logits, target, label_smoothing), labels, own_share)


def _logits(run: FinetuneRun, images: Tensor) -> Tensor:
    """Return the model's logits for normalized images, float32 [B, classes]."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=run.uses_bf16):
        logits: Tensor = run.model(pixel_values=images).logits
    return logits.float()
