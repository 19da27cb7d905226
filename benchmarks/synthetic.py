"""Run the project's own training loop on random images, which are in host memory before they are needed.

Everything but the reading of images is that of a real run: copies to the device, augmentation, guard against bad steps,
reduction, moving average, heartbeats and the checkpoint at the end.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import cast

import numpy as np
import torch

from pretrain import distributed
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.config.run import ObjectiveConfig
from pretrain.data.dataset.dataset import Dataset, EncodedSample
from pretrain.data.dataset.order import Part
from pretrain.data.loading.loader import (
    IndexedBatches,
    LoadedBatch,
    LoadedSample,
    LoadingStats,
    complete_batch,
    load_batches,
)
from pretrain.data.transforms.batch import Batch
from pretrain.data.transforms.views import View
from pretrain.evaluation import Evaluator
from pretrain.heartbeat.watch import Watch
from pretrain.outcome import Outcome
from pretrain.run import Data, Run, build_model, build_run
from pretrain.run_folder import claim_run_dir
from pretrain.steps import Batches
from pretrain.stop_signal import StopSignal
from pretrain.tracking.progress import ProgressLine
from pretrain.tracking.tracker import RunDescription, Tracker
from pretrain.train import train

NUM_BATCHES = 4  # different micro-batches, which are repeated in turn
NEVER = 10**9  # steps
EMA_DECAY = 0.9999


class SyntheticDataset(Dataset):
    """Classes and numbered samples without images.

    Args:
        num_classes: Number of classes, all equally frequent.
        num_samples: Number of samples.
    """

    def __init__(self, num_classes: int, num_samples: int) -> None:
        self.class_names = [f"class {label}" for label in range(num_classes)]
        self.class_shares = [1 / num_classes] * num_classes
        self.parts = [Part("synthetic", [num_samples])]

    def fetch(self, shard: int, row: int) -> EncodedSample:
        """Return the name of a sample, for the list of skipped steps."""
        return EncodedSample("synthetic", str(row), b"", 0)

    def labels(self, shard: int) -> Sequence[int]:
        """Return the label of each row."""
        return [0] * self.shard_sizes[shard]


class SyntheticBatches(Batches):
    """Micro-batches of random images; they reach the device in the same way as those of a real run.

    Args:
        run: Open run, whose global batch size is a multiple of the micro-batch size.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run.config, cast(Dataset, run.data.training), run.objective, run.state, None, run.watch)
        self.micro_batch_size = run.config.engine.micro_batch_size
        self.num_classes = len(run.data.training.class_names)

    def _load(self, start: int, stop: int, image_size: int) -> Generator[LoadedBatch, None, None]:
        self._open = self._repeat(self._make(image_size), start, stop)
        return self._open

    def _make(self, image_size: int) -> list[LoadedBatch]:
        """Return different micro-batches, in pinned memory if there is a GPU."""
        view, size = self.objective.train_view(image_size), self.micro_batch_size
        samples = [random_sample(view, image_size, self.num_classes, seed) for seed in range(NUM_BATCHES * size)]
        rows = (range(first, first + size) for first in range(0, len(samples), size))
        return list(load_batches(samples, rows, num_workers=0))  # type: ignore[arg-type]  # a list is enough

    def _repeat(self, batches: list[LoadedBatch], start: int, stop: int) -> Generator[LoadedBatch, None, None]:
        """Yield the micro-batches in turn, with the positions and weights that the run's plan gives them."""
        plan = cast(IndexedBatches, self._source).plan
        for micro_batches, loaded in zip(plan.concurrent_micro_batches(start, stop), cycle(batches), strict=False):
            positions = torch.tensor(micro_batches[plan.rank].positions, pin_memory=torch.cuda.is_available())
            tensors: Batch = {**loaded.tensors, "position": positions}
            yield complete_batch(loaded._replace(tensors=tensors), micro_batches, plan.rank)


def random_sample(view: View, image_size: int, num_classes: int, seed: int) -> LoadedSample:
    """Return a random image with a random label, and the parameters of its augmentation."""
    random = np.random.default_rng(seed)
    image = random.integers(256, size=(image_size, image_size, 3), dtype=np.uint8)
    fields = {**view(image, random), "label": int(random.integers(num_classes)), "position": seed}
    return LoadedSample(fields, [], LoadingStats())


def synthetic_config(
    run_dir: Path,
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    total_steps: int,
    compiled: bool,
    precision: str,
) -> PretrainConfig:
    """Return the config of a run that neither evaluates nor writes metrics between its first and its last step."""
    batch_size = micro_batch_size * accumulation_steps * distributed.world_size()
    return PretrainConfig.model_validate(
        {
            "run_dir": run_dir,
            "data": {"train": "synthetic", "num_workers": 0},
            "model": model,
            "objective": objective,
            "schedule": {"total_steps": total_steps},
            "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.05},
            "ema": {"decay": EMA_DECAY if objective.supports_ema else 0.0},
            "engine": {
                "zero_stage": 1,
                "precision": precision,
                "global_batch_size": batch_size,
                "micro_batch_size": micro_batch_size,
                "compile": compiled,
            },
            "logging": {"every_steps": NEVER},
            "checkpoint": {"every_steps": NEVER},
            "tracking": {"uri": "off"},
        }
    )


@contextmanager
def open_synthetic_run(config: PretrainConfig, num_classes: int) -> Iterator[Run]:
    """Open a run as `pretrain.run.open_run` does, without data and checkpoints (collective).

    Args:
        config: Config from `synthetic_config`.
        num_classes: Number of classes of the random labels.
    """
    claim_run_dir(config.run_dir)
    dataset = SyntheticDataset(num_classes, config.schedule.total_steps * config.engine.global_batch_size)
    data = Data(dataset, validation=None)
    rank, world_size, on_gpu = distributed.rank(), distributed.world_size(), torch.cuda.is_available()
    with Watch(config.run_dir, rank, world_size, on_gpu=on_gpu) as watch:
        objective = build_model(config, data, is_new=True)
        yield build_run(config, watch, data, objective, checkpoint=None)


def train_synthetic(run: Run, progress: ProgressLine) -> Outcome:
    """Train with the project's own loop, without tracking, and report the end of each step to `progress`."""
    evaluator = Evaluator(
        run.config, None, None, run.objective, run.engine, run.ema, run.quarantine, run.watch
    )  # it has no validation data, so it is never due
    description = RunDescription("pretrain", run.data.digests["training"], "", {})
    tracker = Tracker(run.config.run_dir, run.config.tracking, description, enabled=False)
    outcome = train(run, SyntheticBatches(run), evaluator, tracker, progress, StopSignal())
    run.watch.finish(outcome)
    return outcome
