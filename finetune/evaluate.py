"""Evaluate a classifier: every sample counts once, on any number of ranks."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from pretrain import distributed
from pretrain.config.data import BATCHES_AHEAD
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.loading.loader import BadSample, evaluation_batches
from pretrain.data.loading.prefetch import Prefetcher
from pretrain.data.loading.quarantine import Quarantine
from pretrain.data.transforms.batch import Batch, to_device
from pretrain.data.transforms.views import View
from pretrain.delayed_flag import DelayedFlag
from pretrain.errors import DataError


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        loss: Mean cross-entropy.
        top1: Share of samples whose most probable class is correct.
        num_samples: Number of usable samples.
    """

    loss: float
    top1: float
    num_samples: int


@torch.no_grad()
def evaluate(
    model: Any,
    dataset: Dataset,
    view: View,
    *,
    batch_size: int,
    num_workers: int,
    batches_ahead: int = BATCHES_AHEAD,
    device: torch.device,
    quarantine: Quarantine,
    should_stop: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Measure the loss and the accuracy of a classifier, in the precision of its weights (collective).

    The host queues a batch while the device still computes the one before, and waits for neither.

    Args:
        model: Hugging Face classifier, without a wrapper for parallel training.
        dataset: Validation data, of which each rank evaluates its share.
        view: Preprocessing of the model's folder.
        batch_size: Images per batch.
        num_workers: Data workers per rank.
        batches_ahead: Number of batches that each worker prepares ahead.
        device: Device of the model.
        quarantine: Record of unusable samples; such samples do not count.
        should_stop: Whether this rank was asked to stop, checked before each batch. All ranks stop together, one batch
            later.

    Returns:
        The result, or None if any rank was asked to stop before the last batch.

    Raises:
        DataError: If no sample is usable.
    """
    batches = evaluation_batches(
        dataset,
        view,
        batch_size=batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        num_workers=num_workers,
        batches_ahead=batches_ahead,
    )
    bad_samples: list[BadSample] = []
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    prefetcher, stopping = Prefetcher(device), DelayedFlag(device)
    was_training = model.training
    model.eval()
    try:
        with closing(batches):
            for loaded in batches:
                if should_stop is not None and stopping.any_over_ranks(should_stop()):
                    return None
                bad_samples += loaded.bad_samples
                batch = prefetcher.prepare(partial(to_device, loaded.tensors, device))
                sums += _sums_of_batch(model, batch)
    finally:
        model.train(was_training)
    quarantine.add(chain.from_iterable(distributed.gather(bad_samples)))
    loss_sum, correct_sum, count = distributed.sum_over_ranks(sums).tolist()
    if not count:
        raise DataError(f"validation data: no sample is usable; see the reasons in {quarantine.path}")
    return Evaluation(loss=loss_sum / count, top1=correct_sum / count, num_samples=round(count))


def _sums_of_batch(model: Any, batch: Batch) -> torch.Tensor:
    """Return the sums over a batch of the loss, the correct predictions and the weights, float [3]."""
    labels, weight = batch["label"], batch["weight"]
    logits = model(pixel_values=batch["image"]).logits.float()
    loss = F.cross_entropy(logits, labels, reduction="none")
    correct = (logits.argmax(dim=1) == labels).float()
    return torch.stack([(loss * weight).sum(), (correct * weight).sum(), weight.sum()])
