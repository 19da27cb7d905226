"""Runs that are killed at any moment and resumed on any number of ranks see the same samples and pixels."""

import hashlib
import json
import multiprocessing
import random
import time
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from pretrain.config import AugmentConfig
from pretrain.data.dataset.dataset import Dataset
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.loader import BatchPlan, training_batches
from pretrain.data.loading.workers import CONTEXT, start_server
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.source import keep_classes
from pretrain.data.transforms.views import TrainView

VIEW = TrainView(AugmentConfig(brightness=0.3, mixup=0.8, erasing=0.3), 16)
GLOBAL_BATCH, STEPS = 26, 40  # 13 pairs of neighbors: no number of ranks below divides them
NO_PROGRESS_SECONDS = 240
Seen = dict[int, tuple[str, str]]


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A mix of three sets of different sizes with weights 3 : 2 : 1; one has fewer shards than there are ranks."""
    folder = tmp_path_factory.mktemp("mix")
    source = keep_classes(list_digits(), ["0", "1", "2"])
    for i, shard_bytes in enumerate([20_000, 60_000, 10**9]):
        make_shards(source, folder / str(i), ShardOptions(validation_fraction=0.2 * i, shard_bytes=shard_bytes, seed=i))
    return open_dataset([folder / str(i) / "train" for i in range(3)], [3.0, 2.0, 1.0])


def run_rank(samples: Dataset, log: Path, start: int, rank: int, world_size: int, num_workers: int) -> None:
    """Write one line for each sample of this rank."""
    loading = training_batches(
        samples,
        VIEW,
        BatchPlan(
            seed=1,
            shuffle_window=4,
            global_batch_size=GLOBAL_BATCH,
            accumulation_steps=2,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            group_size=2,
        ),
        start=start,
        stop=STEPS * GLOBAL_BATCH,
    )
    order = samples.order(1, 4)
    with log.open("a") as file:
        for loaded in loading:
            batch = loaded.tensors
            for i, position in enumerate(batch["position"].tolist() if loaded.weight else []):
                _, shard, row = order.locate(position)
                key = samples.fetch(shard, row).key
                pixels = b"".join(batch[name][i].numpy().tobytes() for name in sorted(batch))
                file.write(json.dumps([position, f"{shard}/{key}", hashlib.sha256(pixels).hexdigest()]) + "\n")
            file.flush()


def read_log(log: Path) -> Seen:
    """Read the lines of a rank; a kill may have truncated the last one."""
    seen = {}
    for line in log.read_text().splitlines(keepends=True) if log.exists() else []:
        if line.endswith("\n"):
            position, key, pixels = json.loads(line)
            assert position not in seen
            seen[position] = (key, pixels)
    return seen


def run_world(samples: Dataset, folder: Path, start: int, world_size: int, num_workers: int, kill: bool) -> Seen:
    """Run all ranks, kill them with SIGKILL meanwhile if asked to, and return the samples that they saw."""
    logs = [folder / f"{world_size}-{rank}.jsonl" for rank in range(world_size)]
    # A fork is quick and this process has no other threads, but a forked rank cannot start workers of its own.
    if num_workers:
        start_server()  # it imports torch once for all ranks
    context: BaseContext = CONTEXT if num_workers else multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=run_rank, args=(samples, log, start, rank, world_size, num_workers))  # type: ignore[attr-defined]
        for rank, log in enumerate(logs)
    ]
    for process in ranks:
        process.start()
    length, last_progress = 0, time.monotonic()
    while any(process.is_alive() for process in ranks) and time.monotonic() < last_progress + NO_PROGRESS_SECONDS:
        seen_so_far = sum(len(read_log(log)) for log in logs)
        if seen_so_far > length:
            length, last_progress = seen_so_far, time.monotonic()
        if kill and seen_so_far > random.Random(world_size).randint(30, 200):
            for process in ranks:
                process.kill()
        time.sleep(0.01)
    for process in ranks:
        process.kill()
        process.join()
    seen: Seen = {}
    for log in logs:
        mine = read_log(log)
        assert not mine.keys() & seen.keys()
        seen |= mine
    return seen


@pytest.mark.processes
def test_killed_runs_resumed_on_other_numbers_of_ranks_see_the_same_samples(mix: Dataset, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = run_world(mix, tmp_path / "whole", 0, 2, 0, kill=False)
    assert sorted(whole) == list(range(STEPS * GLOBAL_BATCH))
    seen: Seen = {}
    start = 0
    for world_size, num_workers in [(8, 0), (6, 0), (5, 0), (2, 1), (1, 2), (16, 0)]:
        found = run_world(mix, tmp_path, start, world_size, num_workers, kill=world_size != 16)
        # A checkpoint holds whole steps: up to the first that some rank had not finished.
        steps = start // GLOBAL_BATCH
        while all(p in found for p in range(steps * GLOBAL_BATCH, (steps + 1) * GLOBAL_BATCH)):
            steps += 1
        seen |= {position: what for position, what in found.items() if position < steps * GLOBAL_BATCH}
        start = steps * GLOBAL_BATCH
    assert start == STEPS * GLOBAL_BATCH
    assert seen == whole
