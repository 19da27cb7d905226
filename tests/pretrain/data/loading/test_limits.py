"""Data workers are fitted to /dev/shm and to the limit of open files, or the limit is named."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pretrain.config import AugmentConfig, DataConfig
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.limits import BatchSize, Limits, batch_size_of, explain, fit_workers, machine_limits
from pretrain.data.loading.loader import BatchPlan, evaluation_batches, training_batches
from pretrain.data.loading.workers import DeadWorkerError, check_workers
from pretrain.data.transforms.views import EvalView, TrainView
from pretrain.errors import MachineError, UserError

MIB = 2**20
LOADERS = [BatchSize(10 * MIB, 5), BatchSize(30 * MIB, 5)]  # training and validation, 40 MiB together
DATA = DataConfig(train="shards", num_workers=4)
SHARED_MEMORY = r"/dev/shm: {free} MiB are free, but the data workers need {needed} MiB; enlarge it .*--shm-size"


def test_the_size_of_a_batch_is_that_of_a_loaded_one(digits: Path) -> None:
    augment = AugmentConfig(mixup=0.8, brightness=0.2)
    train = next(
        training_batches(
            open_dataset(digits / "train"), TrainView(augment, 24), BatchPlan(0, 4, global_batch_size=16), 0, 16
        )
    )
    validation = open_dataset(digits / "validation")
    evaluated = next(evaluation_batches(validation, EvalView(24), batch_size=16, rank=0, world_size=1, num_workers=0))
    for view, loaded in ((TrainView(augment, 24), train), (EvalView(24), evaluated)):
        tensors = cast(dict[str, Any], loaded.tensors)
        actual = BatchSize(sum(tensor.nbytes for tensor in tensors.values()), len(tensors))
        estimated = batch_size_of(view, 16)
        assert actual.num_bytes <= estimated.num_bytes <= actual.num_bytes + 16 * 24  # three numbers per sample
        assert actual.num_tensors <= estimated.num_tensors <= actual.num_tensors + 1


@pytest.mark.parametrize(
    ("shared_mib", "num_files", "num_ranks", "fitted"),
    [
        (40 * 17, 170, 1, (4, 4)),  # 4 workers with 4 batches each and one batch in use; 10 files per batch
        (40 * 17, 170, 2, (4, 1)),
        (40 * 17 - 1, 170, 1, (4, 3)),
        (40 * 17, 169, 1, (4, 3)),
        (40 * 5, 170, 1, (4, 1)),
        (40 * 5 - 1, 170, 1, (3, 1)),
        (40 * 2, 170, 1, (1, 1)),
        (40 * 17, 20, 1, (1, 1)),
    ],
)
def test_workers_are_fitted_to_the_limits(
    shared_mib: int, num_files: int, num_ranks: int, fitted: tuple[int, int]
) -> None:
    data, note = fit_workers(DATA, LOADERS, Limits(shared_mib * MIB, num_files), num_ranks)
    assert (data.num_workers, data.batches_ahead) == fitted
    assert data.model_copy(update={"num_workers": 4, "batches_ahead": 4}) == DATA
    uses = f"decrease data.num_workers; this run uses data.num_workers={fitted[0]} and data.batches_ahead={fitted[1]}"
    assert note.endswith(uses) if fitted != (4, 4) else not note


def test_what_is_short_is_named() -> None:
    _, note = fit_workers(DATA, LOADERS, Limits(100 * MIB, 999), 1)
    assert note.startswith("/dev/shm: 100 MiB are free, but the data workers need 681 MiB; enlarge it (in a container")
    _, note = fit_workers(DATA, LOADERS, Limits(999 * MIB, 100), 1)
    assert note.startswith("ulimit -n: 70 more open files are needed for the data workers; raise the hard limit (in a")
    with pytest.raises(UserError, match=r"^/dev/shm: 79 MiB are free.*--shm-size=8g\) or set data.num_workers=0, "):
        fit_workers(DATA, LOADERS, Limits(79 * MIB, 999), 1)
    with pytest.raises(UserError, match=r"^ulimit -n: 151 more open files.* or set data.num_workers=0, because"):
        fit_workers(DATA, LOADERS, Limits(999 * MIB, 19), 1)
    without_workers = DATA.model_copy(update={"num_workers": 0})
    assert fit_workers(without_workers, LOADERS, Limits(0, 0), 1) == (without_workers, "")


def test_the_limits_of_this_machine_are_read() -> None:
    before = machine_limits()
    assert before.shared_bytes == pytest.approx(os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize, 0.1)
    with Path(__file__).open("rb"):
        assert machine_limits().num_files == before.num_files - 1


class FullView:
    """Fails as torch does when a worker cannot put a batch into shared memory."""

    def __call__(self, image: Any, random: np.random.Generator) -> dict[str, Any]:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.processes
def test_a_limit_that_is_reached_later_is_named(digits: Path) -> None:
    plan = BatchPlan(0, 4, global_batch_size=16, num_workers=1)
    batches = training_batches(open_dataset(digits / "train"), FullView(), plan, 0, 160)
    with pytest.raises(MachineError, match=r"^/dev/shm: has no space for the data workers; enlarge it .*num_workers$"):
        next(batches)
    error = explain(RuntimeError("Too many open files. Communication with the workers is no longer possible."))
    assert str(error).startswith("ulimit -n: the data workers have too many files open; raise the hard limit")
    assert explain(RuntimeError("a fault")) is None


def test_a_worker_that_found_shared_memory_full_is_reported() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    worker: Any = SimpleNamespace(pid=7, exitcode=-signal.SIGBUS, sentinel=reading)
    with pytest.raises(DeadWorkerError, match=r"exit code -7; /dev/shm is full: enlarge it .*, or decrease data"):
        check_workers([worker])
    os.close(reading)
