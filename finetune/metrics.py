"""Measure a classifier: every sample counts once, on any number of ranks."""

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from pretrain.data.dataset.dataset import Dataset
from pretrain.data.loading.loader import BadSample, evaluation_batches
from pretrain.data.loading.quarantine import Quarantine
from pretrain.data.transforms.views import View
from pretrain.distributed import gather, rank, sum_over_ranks, world_size
from pretrain.errors import DataError


@torch.no_grad()
def evaluate(
    model: Any,
    samples: Dataset,
    view: View,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    quarantine: Quarantine,
) -> dict[str, float]:
    """Return the mean "loss" (cross-entropy) and "top1" over all samples, and their "count".

    Args:
        model: a Hugging Face classifier, not wrapped for training in parallel.
        samples: the validation set; each rank takes its share.
        view: the folder's own preprocessing.
        batch_size: images at a time.
        num_workers: of the loader.
        device: where the model is.
        quarantine: where samples that cannot be used are noted; they don't count.

    Raises:
        DataError: no sample can be used.
    """
    was_training = model.training
    model.eval()
    faults: list[BadSample] = []
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for loaded in evaluation_batches(
        samples, view, batch_size=batch_size, rank=rank(), world_size=world_size(), num_workers=num_workers
    ):
        batch = loaded.tensors
        faults += loaded.bad_samples
        labels, weight = batch["label"].to(device), batch["weight"].to(device)
        logits = model(pixel_values=batch["image"].to(device)).logits.float()
        loss = F.cross_entropy(logits, labels, reduction="none")
        correct = (logits.argmax(dim=1) == labels).float()
        sums += torch.stack([(loss * weight).sum(), (correct * weight).sum(), weight.sum()])
    model.train(was_training)
    quarantine.add(chain.from_iterable(gather(faults)))
    loss_sum, correct_sum, count = sum_over_ranks(sums).tolist()
    if not count:
        raise DataError(f"no validation sample can be used; {quarantine.path} says why")
    return {"loss": loss_sum / count, "top1": correct_sum / count, "count": count}
