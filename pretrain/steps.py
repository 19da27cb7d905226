"""The batches of each step, and what happened between two rows of metrics."""

import contextlib
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from pretrain import distributed
from pretrain.data.loading.loader import BadSample, BatchPlan, LoadedBatch, training_batches
from pretrain.data.loading.meters import Meter, loading_metrics
from pretrain.data.transforms.batch import Batch, to_device
from pretrain.data.transforms.device_decode import decode_on_device
from pretrain.errors import BadSampleError
from pretrain.health import Verdict
from pretrain.run import Run
from pretrain.schedules import split_by_image_size


class Batches:
    """This rank's micro-batches, what was unusable among them, and how long they took."""

    def __init__(self, run: Run) -> None:
        engine = run.config.engine
        self.run = run
        self.watch = run.watch
        self.device = run.engine.device
        self.decoder = run.decoder
        self.image_size = run.config.model.image_size
        self.meter = Meter()
        self.faults: list[BadSample] = []
        self.per_step = engine.accumulation_steps(distributed.world_size())
        self.plan = BatchPlan(
            seed=run.config.seed,
            shuffle_window=run.config.data.shuffle_window,
            global_batch_size=engine.global_batch_size,
            accumulation_steps=self.per_step,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=run.config.data.num_workers,
            num_threads=run.config.data.num_threads,
            group_size=run.objective.group_size,
            views_per_image=run.config.data.repeats,
            decodes_jpegs=self.decoder is None,
        )
        self.order = self.plan.order(run.data.training)
        self.samples = run.data.training
        self._stretch: Generator[LoadedBatch, None, None] | None = None
        self.global_batch_size = engine.global_batch_size
        left = (run.config.schedule.total_steps - run.state.step) * engine.global_batch_size
        changes = run.config.schedule.size_changes(engine.global_batch_size)
        self.loading = chain.from_iterable(
            self._load(run, *stretch)
            for start, stop in run.state.upcoming_ranges(left)
            for stretch in split_by_image_size(start, stop, changes, self.image_size)
        )

    def _load(self, run: Run, start: int, stop: int, image_size: int) -> Generator[LoadedBatch, None, None]:
        """Load the positions from `start` to before `stop`."""
        self._stretch = training_batches(
            run.data.training, run.objective.train_view(image_size), self.plan, start, stop
        )
        return self._stretch

    def close(self) -> None:
        """End the workers, and hear of the last step, unless what was skipped before it decides what comes next."""
        if self._stretch is not None:
            self._stretch.close()
        if len(self.run.skipped.in_a_row) < self.run.config.health.max_consecutive_skips:
            self.note(self.run.health.flush())

    def note(self, judged: Verdict | None) -> None:
        """Write a step into the ledger if it was skipped."""
        if judged is not None:
            self.run.skipped.note(judged, self._names(judged.first_sample))

    def _names(self, first: int) -> Iterator[tuple[str, str]]:
        """Yield the shard and the key of each sample of a step."""
        for position in range(first, first + self.global_batch_size):
            _, shard, row = self.order.locate(position)
            with contextlib.suppress(BadSampleError):
                encoded = self.samples.fetch(shard, row)
                yield encoded.shard, encoded.key

    def next_step(self) -> Iterator[tuple[Batch, float, bool]]:
        """Yield the micro-batches of one optimizer step, each with its weight, and whether it is the last of them."""
        for number in range(self.per_step):
            self.watch.enter("data", self.run.state.step)
            asked_at = time.monotonic()
            loaded: LoadedBatch = next(self.loading)
            self.meter.add(loaded, asked_at, time.monotonic())
            self.faults += loaded.bad_samples
            batch = self._on_device(loaded.tensors)
            self.watch.enter("forward")
            yield batch, loaded.weight, number == self.per_step - 1

    def _on_device(self, batch: Batch) -> Batch:
        if self.decoder is not None:
            batch = decode_on_device(batch, self.image_size, self.device, self.decoder)
        return to_device(batch, self.device)

    def epochs(self, position: int) -> dict[str, float]:
        """Return how often each set has been gone through before a position of the run."""
        epochs = self.order.epochs(position)
        return {f"data/epoch_{i}" if len(epochs) > 1 else "data/epoch": epoch for i, epoch in enumerate(epochs)}

    def take_faults(self) -> list[BadSample]:
        """Return the faults met since the last call."""
        faults, self.faults = self.faults, []
        return faults


@dataclass
class Interval:
    """What happened between two rows of metrics, steps that were skipped left out; it stays on the device till then."""

    device: torch.device
    per_step: int  # micro-batches
    started: float = field(default_factory=time.perf_counter)
    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    _step: dict[str, Tensor] = field(default_factory=dict)

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        """Count one micro-batch."""
        for name, value in losses.items():
            self._step[name] = self._step.get(name, 0.0) + value.detach().double() * weight / self.per_step

    def step_loss(self) -> Tensor:
        """Return this rank's mean loss of the step so far."""
        return self._step["loss"]

    def end_step(self, bad: Tensor, grad_norm: Tensor) -> None:
        """Take the step into account, unless it was bad."""
        norm = grad_norm.to(self.device).double()
        for name, value in {**self._step, "grad_norm": norm, "good": torch.ones_like(norm)}.items():
            self.sums[name] = self.sums.get(name, 0.0) + torch.where(bad > 0, 0.0, value)
        self._step = {}
        self.steps += 1

    def close(self, run: Run, batches: Batches) -> dict[str, float]:
        """Meet all ranks and return the row."""
        config, world_size = run.config, distributed.world_size()
        own = torch.tensor([float(len(batches.faults)), *batches.meter.take()], dtype=torch.float64, device=self.device)
        totals = distributed.sum_over_ranks(torch.cat([torch.stack([*self.sums.values()]), own])).tolist()
        sums, (faults, *work) = dict(zip(self.sums, totals, strict=False)), totals[len(self.sums) :]
        if faults:
            run.quarantine.add(chain.from_iterable(distributed.gather(batches.take_faults())))
        seconds = time.perf_counter() - self.started
        good = sums.pop("good")
        run.count_images(round(good / world_size) * config.engine.global_batch_size)
        means = {name: total / good for name, total in sums.items()} if good else {}
        row = {f"train/{name}": mean for name, mean in means.items() if name != "grad_norm"}
        row |= {"optim/grad_norm": means["grad_norm"]} if good else {}
        row |= {
            "health/skipped_steps": run.skipped.total,
            "speed/images_per_second": self.steps * config.engine.global_batch_size / seconds,
            "data/samples": run.state.position,
            "data/bad_samples": len(run.quarantine),
            **batches.epochs(run.state.position),
            **loading_metrics(work, seconds, world_size, max(config.data.num_workers, 1) * config.data.num_threads),
        }
        return row
