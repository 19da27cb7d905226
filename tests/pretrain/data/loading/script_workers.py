"""A training process for `test_workers.py`: what it finds it prints as JSON, one line at a time."""

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from torch.utils.data import dataloader

# Python puts the folder of this script first on the path; the workers' server must find the packages all the same.
sys.path[0] = str(Path(__file__).resolve().parents[4])

from pretrain.config import AugmentConfig  # noqa: E402
from pretrain.data.loading import workers  # noqa: E402

COUNT = 10


@dataclass(frozen=True)
class EnvironmentView:
    """A view that a user defines in the main script."""

    def __call__(self, image: Any, random: np.random.Generator) -> dict[str, Any]:
        path = ":".join(sys.path)
        return {"path": path, "variable": os.environ.get("VITRAIL_TEST", ""), "threads": os.environ["OMP_NUM_THREADS"]}


def say(found: Any) -> None:
    print(json.dumps(found), flush=True)


def batches(place: str, view: Any = None) -> Iterator[Any]:
    from pretrain.data.dataset.open import open_dataset
    from pretrain.data.loading.loader import BatchPlan, training_batches
    from pretrain.data.transforms.views import TrainView

    plan = BatchPlan(seed=0, shuffle_window=4, global_batch_size=16, num_workers=2)
    return training_batches(open_dataset(place), view or TrainView(AugmentConfig(), 16), plan, 0, 16 * COUNT)


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def running(module: str) -> psutil.Process:
    """Return the child that runs this module of multiprocessing."""
    [child] = [each for each in psutil.Process().children() if any(module in part for part in each.cmdline())]
    return child


def count_forks(place: str) -> None:
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    found: dict[str, Any] = {"batches": []}
    for _ in range(3):
        loading = batches(place)
        next(loading)
        server = running("forkserver")
        found |= {"server": server.pid, "server_threads": server.num_threads()}
        found["worker_parents"] = [each.ppid() for each in server.children()]
        found["batches"].append(1 + sum(1 for _ in loading))
    [found["tracker"]] = [
        each.pid for each in descendants() if any("resource_tracker" in part for part in each.cmdline())
    ]
    found["forks"] = len(forks)
    stop.set()
    for thread in threads:
        thread.join()
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    say({**found, "forks_with_fork_context": len(forks)})


def start_only(place: str) -> None:
    workers.start_server()
    say([each.pid for each in descendants()])
    input()


def load(place: str) -> None:
    loading = batches(place)
    next(loading)
    say([each.pid for each in descendants()])
    input()
    try:
        say({"batches": sum(1 for _ in loading)})
    except workers.DeadWorkerError as error:
        say({"error": str(error)})


def load_cut_off(place: str) -> None:
    """Load until a worker is killed while it hands over shared memory; Python then finds the end of a file."""

    def kill_worker(iterator: Any, timeout: float = 0.0) -> None:
        iterator._workers[0].kill()
        raise EOFError

    loading = batches(place)
    next(loading)
    dataloader._MultiProcessingDataLoaderIter._try_get_data = kill_worker
    try:
        say({"batches": sum(1 for _ in loading)})
    except workers.DeadWorkerError as error:
        say({"error": str(error)})


def environment(place: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "3"
    workers.start_server()
    os.environ["VITRAIL_TEST"] = "set after the server was started"
    batch = next(batches(place, EnvironmentView())).tensors
    say(
        {
            "VITRAIL_TEST": batch["variable"][0],
            "threads": batch["threads"][0],
            "same_path": batch["path"][0] == ":".join(sys.path),
        }
    )


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
