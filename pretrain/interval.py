"""The losses and gradient norms of the steps between two rows of the log, in pretraining and in fine-tuning."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from pretrain import distributed
from pretrain.config import SourceConfig
from pretrain.data.loading.meters import Meter, loading_metrics
from pretrain.data.loading.quarantine import Quarantine
from pretrain.device_copies import HostCopy, to_device


@dataclass(frozen=True)
class IntervalTotals:
    """Result of an interval, the same on all ranks.

    Attributes:
        means: Mean over the applied steps of each loss and of "grad_norm"; empty if every step was skipped.
        num_steps: Number of steps.
        num_applied: Number of steps whose update was applied.
        counts: Sum over ranks of the counts given to `Interval.reduce`.
        seconds: Duration.
    """

    means: dict[str, float]
    num_steps: int
    num_applied: int
    counts: list[float]
    seconds: float


class Interval:
    """Losses and gradient norms of the steps since the last row of metrics. They stay on the device until `reduce`.

    Args:
        device: Training device.
        accumulation_steps: Number of micro-batches per step.
    """

    def __init__(self, device: torch.device, accumulation_steps: int) -> None:
        self.device = device
        self.accumulation_steps = accumulation_steps
        self._started = time.perf_counter()
        self._num_steps = 0
        self._sums: dict[str, Tensor] = {}  # over the applied steps
        self._step: dict[str, Tensor] = {}  # means over the current step

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        """Add the losses of one micro-batch to the current step."""
        for name, value in losses.items():
            contribution = value.detach().double() * weight / self.accumulation_steps
            self._step[name] = self._step.get(name, 0.0) + contribution

    def step_loss(self) -> Tensor:
        """Return this rank's mean loss over the micro-batches of the current step, a scalar on the device."""
        return self._step["loss"]

    def end_step(self, grad_norm: Tensor, skipped: Tensor | None = None) -> None:
        """End the current step; a skipped step does not enter the means.

        Args:
            grad_norm: Norm of the gradient before clipping.
            skipped: 1 if the update was skipped, else 0; a scalar on the device. None if no step can be skipped.
        """
        norm = grad_norm.to(self.device).double()
        for name, value in {**self._step, "grad_norm": norm, "applied": torch.ones_like(norm)}.items():
            applied = value if skipped is None else torch.where(skipped > 0, 0.0, value)
            self._sums[name] = self._sums.get(name, 0.0) + applied
        self._step = {}
        self._num_steps += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time of the block, such as an evaluation, from the duration of the steps."""
        paused = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused

    def reduce(self, counts: Sequence[float]) -> IntervalTotals:
        """All-reduce the interval and copy it to the host, which waits for the device (collective).

        Args:
            counts: Further numbers to sum over the ranks.
        """
        own = torch.cat([torch.stack([*self._sums.values()]), to_device(counts, self.device)])
        totals = HostCopy(distributed.sum_over_ranks(own)).read().tolist()
        sums = dict(zip(self._sums, totals, strict=False))
        applied_on_all_ranks = sums.pop("applied")
        return IntervalTotals(
            means={name: total / applied_on_all_ranks for name, total in sums.items()} if applied_on_all_ranks else {},
            num_steps=self._num_steps,
            num_applied=round(applied_on_all_ranks / distributed.world_size()),
            counts=totals[len(self._sums) :],
            seconds=time.perf_counter() - self._started,
        )


def interval_metrics(
    interval: Interval, meter: Meter, quarantine: Quarantine, data: SourceConfig, global_batch_size: int
) -> tuple[IntervalTotals, dict[str, float]]:
    """All-reduce an interval, and add its unusable samples to the quarantine (collective).

    Args:
        interval: Losses and gradient norms since the last row of metrics.
        meter: Loading statistics and unusable samples since then.
        quarantine: Record of unusable samples.
        data: Section with the number of data workers and reader threads.
        global_batch_size: Images per optimizer step.

    Returns:
        The totals, and the metrics that pretraining and fine-tuning share. Losses and the gradient norm are missing if
        every step was skipped.
    """
    totals = interval.reduce([float(meter.num_bad_samples), *meter.take()])
    num_bad_samples, *loading_counts = totals.counts
    if num_bad_samples:
        quarantine.add(chain.from_iterable(distributed.gather(meter.take_bad_samples())))
    num_reader_threads = max(data.num_workers, 1) * data.num_threads
    return totals, {
        **{f"optim/{name}" if name == "grad_norm" else f"train/{name}": mean for name, mean in totals.means.items()},
        "speed/images_per_second": totals.num_steps * global_batch_size / totals.seconds,
        "data/bad_samples": len(quarantine),
        **loading_metrics(loading_counts, totals.seconds, distributed.world_size(), num_reader_threads),
    }
