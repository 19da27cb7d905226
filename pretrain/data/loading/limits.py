"""Fit the data workers to the machine: their batches need space in /dev/shm and open files, which may be scarce.

A worker puts each tensor of a batch into shared memory, and the training process holds a file open for each of them. A
container has 64 MB of shared memory by default, which four workers fill with a few batches.
"""

import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from pretrain.config import SourceConfig
from pretrain.data.transforms.views import View
from pretrain.errors import DataError, MachineError, UserError

SHARED_MEMORY = Path("/dev/shm")
OPEN_FILES = Path("/proc/self/fd")
SPARE_FILES = 32  # for shards and logs
BATCH_FIELDS = 3  # fields that the loader adds to those of the view: label, position and weight

ENLARGE = "enlarge it (in a container with --shm-size=8g)"
RAISE = "raise the hard limit (in a container with --ulimit nofile=65536)"

Data = TypeVar("Data", bound=SourceConfig)


class LimitError(DataError, MachineError):
    """A limit of the machine that data workers reached during the run."""


class BatchSize(NamedTuple):
    """Size of one batch: bytes of shared memory, and number of tensors."""

    num_bytes: int
    num_tensors: int


class Limits(NamedTuple):
    """What is left: bytes of shared memory for all ranks of the machine together, and open files for each rank."""

    shared_bytes: int
    num_files: int

    def shortage(self, batches: Sequence[BatchSize], num_workers: int, batches_ahead: int, num_ranks: int) -> str:
        """Return what is short and how to get more of it, or an empty string if the loaders fit."""
        num_batches = num_workers * batches_ahead + 1
        num_bytes = num_ranks * num_batches * sum(batch.num_bytes for batch in batches)
        num_files = num_batches * sum(batch.num_tensors for batch in batches)
        if num_bytes > self.shared_bytes:
            sizes = f"{self.shared_bytes >> 20} MiB are free, but the data workers need {1 + (num_bytes >> 20)} MiB"
            return f"{SHARED_MEMORY}: {sizes}; {ENLARGE}"
        if num_files > self.num_files:
            return f"ulimit -n: {num_files - self.num_files} more open files are needed for the data workers; {RAISE}"
        return ""


def machine_limits() -> Limits:
    """Return what is free now."""
    shared = os.statvfs(SHARED_MEMORY)
    num_open = len([*OPEN_FILES.iterdir()])
    return Limits(
        shared.f_bavail * shared.f_frsize, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - num_open - SPARE_FILES
    )


def batch_size_of(view: View, num_samples: int) -> BatchSize:
    """Return the size of a batch of samples that a view has transformed."""
    sample = view(np.zeros((256, 256, 3), np.uint8), np.random.Generator(np.random.Philox(0)))
    arrays = [np.asarray(field) for field in sample.values()]
    num_bytes = sum(array.nbytes for array in arrays) + 8 * BATCH_FIELDS
    return BatchSize(num_bytes * num_samples, len(arrays) + BATCH_FIELDS)


def fit_workers(data: Data, batches: Sequence[BatchSize], limits: Limits, num_ranks: int) -> tuple[Data, str]:
    """Let workers prepare fewer batches ahead, then use fewer workers, until what they load fits into the limits.

    Args:
        data: The `data` section of a run.
        batches: Size of a batch of each loader that is open at the same time.
        limits: Limits of the machine.
        num_ranks: Number of ranks on the machine.

    Returns:
        The section with what fits, and a sentence about it, which is empty if everything does.

    Raises:
        UserError: If a single worker does not fit.
    """
    problem = limits.shortage(batches, data.num_workers, data.batches_ahead, num_ranks)
    if not data.num_workers or not problem:
        return data, ""
    smaller = [(data.num_workers, ahead) for ahead in range(data.batches_ahead - 1, 0, -1)]
    smaller += [(num_workers, 1) for num_workers in range(data.num_workers - 1, 0, -1)]
    for num_workers, ahead in smaller:
        if not limits.shortage(batches, num_workers, ahead, num_ranks):
            fitted = data.model_copy(update={"num_workers": num_workers, "batches_ahead": ahead})
            uses = f"this run uses data.num_workers={num_workers} and data.batches_ahead={ahead}"
            return fitted, f"{problem} or decrease data.num_workers; {uses}"
    raise UserError(f"{problem} or set data.num_workers=0, because not even one worker fits")


def explain(error: Exception) -> LimitError | None:
    """Return what to do about an error of a loader, or None if it has nothing to do with the limits."""
    if "shared memory" in str(error):
        return LimitError(f"{SHARED_MEMORY}: has no space for the data workers; {ENLARGE} or decrease data.num_workers")
    if "Too many open files" in str(error):
        return LimitError(f"ulimit -n: the data workers have too many files open; {RAISE} or decrease data.num_workers")
    return None
